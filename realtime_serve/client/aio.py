"""The asynchronous client; the synchronous one runs this one in a thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import msgspec

from realtime_serve.client.answers import Answer, RequestState, Token
from realtime_serve.client.course import Course
from realtime_serve.client.orders import Options, Orders
from realtime_serve.client.wire import Limits, Wire, request_path

DEFAULT_URL = "http://127.0.0.1:8000"


class StreamView:
    """What can be known of a stream at any time."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._tokens: deque[Token] = deque()
        self._last = course.transcript.last

    @property
    def request_id(self) -> str:
        """The request's name at the server; "" before it was accepted."""
        return self._course.transcript.request_id

    @property
    def last(self) -> int:
        """Number of the last token it gave: `after` for `resume`."""
        return self._last

    @property
    def answer(self) -> Answer:
        """The whole answer, with its usage, once the stream was read to its end.

        Raises:
            RuntimeError: it was not.
        """
        if not self._course.transcript.done:
            raise RuntimeError("the stream was not read to its end")
        return self._course.transcript.answer()

    def _next(self) -> Token:
        token = self._tokens.popleft()
        self._last = token.number
        return token


class AsyncStream(StreamView):
    """Tokens as they come, each once, in order, whatever dies meanwhile.

    The request is made when the stream is first read, or entered with `async with`. Leaving it
    before its end cancels the request, unless it came from `resume` or others may have its
    idempotency key, too.
    """

    def __init__(self, course: Course) -> None:
        super().__init__(course)
        self._loop: asyncio.AbstractEventLoop | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        self._loop = asyncio.get_running_loop()
        if not self._tokens:
            self._tokens.extend(await self._course.more())
            if not self._tokens:
                raise StopAsyncIteration
        return self._next()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        try:
            await self._course.open()
        except BaseException:
            # Cancelled: what was not entered is not exited.
            self._course.leave(cancel=True)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Leaves the stream, as told above: a cancel goes out in the background. Idempotent."""
        self._tokens.clear()
        self._course.leave(cancel=True)

    async def detach(self) -> None:
        """Leaves the stream and lets the request run, for `resume` within the grace time."""
        self._tokens.clear()
        self._course.leave(cancel=False)

    def __del__(self) -> None:
        if self._loop is None or self._course.over:
            return
        # The collector may run in any thread.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_leave, self._course)


def _leave(course: Course) -> None:
    course.leave(cancel=True)


class AsyncClient:
    """A client of one cluster, whose streams survive worker, gateway and connection.

    Args:
        urls: of one gateway, or of several, tried in this order; the one that answered last is
            asked first.
        api_key: sent as `Authorization: Bearer`.
        client_id: who you are to limits, fair turns and ownership. Without it that is your
            address, and a stream cannot be resumed from another one.
        patience_s: how long a request goes on trying without any progress.
        grace_s: how long the server keeps a stream going while the client is not connected.
        connect_timeout_s: for a connection to open.
        read_timeout_s: longest silence of a gateway, which sends something every 15 s.

    Attributes:
        orders: makes its requests.

    Raises:
        ValueError: a bad argument.
    """

    def __init__(
        self,
        urls: str | Sequence[str] = DEFAULT_URL,
        *,
        api_key: str | None = None,
        client_id: str | None = None,
        patience_s: float = 60.0,
        grace_s: float = 60.0,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 35.0,
    ) -> None:
        headers = {}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        if client_id is not None:
            headers["X-Client-Id"] = client_id
        limits = Limits(connect_timeout_s, read_timeout_s, patience_s, grace_s)
        self._wire = Wire([urls] if isinstance(urls, str) else list(urls), headers, limits)
        self.orders = Orders(self._wire)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Leaves the streams that are open, and closes all connections. Idempotent."""
        self.orders.leave()
        await self._wire.close()

    def stream(self, prompt: str, **options: Unpack[Options]) -> AsyncStream:
        """Continues a text, token by token.

        Raises (when it is read):
            APIError: see `realtime_serve.client.errors`.
        """
        return AsyncStream(self.orders.infer(prompt, options))

    def stream_chat(
        self, messages: Iterable[Mapping[str, Any]], **options: Unpack[Options]
    ) -> AsyncStream:
        """Answers a conversation, token by token; messages are OpenAI's.

        Raises (when it is read):
            APIError: see `realtime_serve.client.errors`.
        """
        return AsyncStream(self.orders.chat(messages, options))

    async def infer(self, prompt: str, **options: Unpack[Options]) -> Answer:
        """Continues a text. Survives what a stream does, for it is one.

        Raises:
            APIError: see `realtime_serve.client.errors`.
        """
        return await self._whole(self.stream(prompt, **options))

    async def chat(
        self, messages: Iterable[Mapping[str, Any]], **options: Unpack[Options]
    ) -> Answer:
        """Answers a conversation; messages are OpenAI's.

        Raises:
            APIError: see `realtime_serve.client.errors`.
        """
        return await self._whole(self.stream_chat(messages, **options))

    def resume(self, request_id: str, after: int = 0) -> AsyncStream:
        """A stream that is there, from behind token number `after` on.

        Leaving it early does not cancel the request.

        Raises (when it is read):
            NotFoundError: it is not yours, or its tokens are not kept any more.
            BadRequestError: it has fewer tokens than that.
            APIError: otherwise; see `realtime_serve.client.errors`.
        """
        return AsyncStream(self.orders.resume(request_id, after))

    async def cancel(self, request_id: str) -> RequestState:
        """Ends a request; one that had ended before stays as it is.

        Raises:
            NotFoundError: it is not there, or not yours.
            APIError: otherwise; see `realtime_serve.client.errors`.
        """
        data = await self._wire.call("DELETE", request_path(request_id))
        return msgspec.json.decode(data, type=RequestState)

    async def request(self, request_id: str) -> RequestState:
        """Where a request is.

        Raises:
            NotFoundError: it is not there, or not yours.
            APIError: otherwise; see `realtime_serve.client.errors`.
        """
        data = await self._wire.call("GET", request_path(request_id))
        return msgspec.json.decode(data, type=RequestState)

    async def models(self) -> dict[str, dict[str, Any]]:
        """What is served: version, context_length, chat and more, by the model's name.

        Raises:
            APIError: see `realtime_serve.client.errors`.
        """
        found: dict[str, dict[str, Any]] = (await self._json("/models"))["models"]
        return found

    async def status(self) -> dict[str, Any]:
        """Connections, streams, models, queues and workers, as one gateway sees them.

        Raises:
            APIError: see `realtime_serve.client.errors`.
        """
        return await self._json("/status")

    async def _whole(self, stream: AsyncStream) -> Answer:
        async with stream:
            async for _ in stream:
                pass
        return stream.answer

    async def _json(self, path: str) -> dict[str, Any]:
        return msgspec.json.decode(await self._wire.call("GET", path), type=dict[str, Any])
