"""The synchronous client: the asynchronous one on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from realtime_serve.client.aio import DEFAULT_URL, AsyncClient, StreamView
from realtime_serve.client.answers import Answer, RequestState, Token
from realtime_serve.client.course import Course
from realtime_serve.client.orders import Options

T = TypeVar("T")


class LoopThread:
    """An event loop in a thread, for callers in any other thread."""

    def __init__(self) -> None:
        ready: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]
        ready = concurrent.futures.Future()
        # A daemon: a program that forgets to close its client ends nevertheless.
        self._thread = threading.Thread(
            target=asyncio.run, args=(_run(ready),), name="realtime-serve-client", daemon=True
        )
        self._thread.start()
        self._loop, self._stop = ready.result()
        self._lock = threading.Lock()
        self._closed = False
        self._last: asyncio.Task[None] | None = None

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs it there, and waits for it here.

        Raises:
            RuntimeError: the client is, or was meanwhile, closed.
        """
        with self._lock:
            if self._closed:
                coroutine.close()
                raise RuntimeError("this client is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("this client was closed") from None
        except BaseException:
            # Ctrl-C ends the waiting here; what is waited for must end, too.
            future.cancel()
            raise

    def leave(self, course: Course, *, cancel: bool) -> None:
        """Leaves a course without waiting; from any thread, also from a finalizer."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_leave, course, cancel)

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Runs the last coroutine, then ends everything else that runs there. Idempotent."""
        with self._lock:
            if self._closed:
                last.close()
                return
            self._closed = True
            if threading.current_thread() is self._thread:
                # The collector found a forgotten client here: this thread cannot wait for itself.
                self._last = self._loop.create_task(last)
                self._last.add_done_callback(lambda _: self._stop.set())
                return
            future = asyncio.run_coroutine_threadsafe(last, self._loop)
        try:
            future.result()
        finally:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()


async def _run(
    ready: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]],
) -> None:
    stop = asyncio.Event()
    ready.set_result((asyncio.get_running_loop(), stop))
    await stop.wait()


async def _fill(tokens: deque[Token], course: Course) -> None:
    # There, not as a result: Ctrl-C at the moment of its return would lose them.
    tokens.extend(await course.more())


def _leave(course: Course, cancel: bool) -> None:
    course.leave(cancel=cancel)


def _close(thread: LoopThread, client: AsyncClient) -> None:
    thread.close(client.close())


class Stream(StreamView):
    """Tokens as they come, each once, in order, whatever dies meanwhile.

    The request is made when the stream is first read, or entered with `with`. Leaving it before
    its end cancels the request, unless it came from `resume` or others may have its idempotency
    key, too. For one thread at a time.
    """

    def __init__(self, client: Client, thread: LoopThread, course: Course) -> None:
        super().__init__(course)
        self._thread = thread
        # The client closes when nobody holds it any more.
        self._client = client

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token:
        if not self._tokens:
            self._thread.call(_fill(self._tokens, self._course))
            if not self._tokens:
                raise StopIteration
        return self._next()

    def __enter__(self) -> Self:
        try:
            self._thread.call(self._course.open())
        except BaseException:
            # Ctrl-C: what was not entered is not exited.
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the stream, as told above: a cancel goes out in the background. Idempotent."""
        self._tokens.clear()
        self._thread.leave(self._course, cancel=True)

    def detach(self) -> None:
        """Leaves the stream and lets the request run, for `resume` within the grace time."""
        self._tokens.clear()
        self._thread.leave(self._course, cancel=False)

    def __del__(self) -> None:
        if not self._course.over:
            self._thread.leave(self._course, cancel=True)


class Client:
    """A client of one cluster, whose streams survive worker, gateway and connection.

    May be used by several threads. A process that forks makes a new one in the child.

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
        self._client = AsyncClient(
            urls,
            api_key=api_key,
            client_id=client_id,
            patience_s=patience_s,
            grace_s=grace_s,
            connect_timeout_s=connect_timeout_s,
            read_timeout_s=read_timeout_s,
        )
        self._thread = LoopThread()
        # Also when the program ends, so that what it left open is cancelled.
        self._finalizer = weakref.finalize(self, _close, self._thread, self._client)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the streams that are open, and closes all connections. Idempotent."""
        self._finalizer()

    def stream(self, prompt: str, **options: Unpack[Options]) -> Stream:
        """Continues a text, token by token.

        Raises (when it is read):
            APIError: see `realtime_serve.client.errors`.
        """
        return self._stream(self._client.orders.infer(prompt, options))

    def stream_chat(
        self, messages: Iterable[Mapping[str, Any]], **options: Unpack[Options]
    ) -> Stream:
        """Answers a conversation, token by token; messages are OpenAI's.

        Raises (when it is read):
            APIError: see `realtime_serve.client.errors`.
        """
        return self._stream(self._client.orders.chat(messages, options))

    def infer(self, prompt: str, **options: Unpack[Options]) -> Answer:
        """Continues a text. Survives what a stream does, for it is one.

        Raises:
            APIError: see `realtime_serve.client.errors`.
        """
        return self._thread.call(self._client.infer(prompt, **options))

    def chat(self, messages: Iterable[Mapping[str, Any]], **options: Unpack[Options]) -> Answer:
        """Answers a conversation; messages are OpenAI's.

        Raises:
            APIError: see `realtime_serve.client.errors`.
        """
        return self._thread.call(self._client.chat(messages, **options))

    def resume(self, request_id: str, after: int = 0) -> Stream:
        """A stream that is there, from behind token number `after` on.

        Leaving it early does not cancel the request.

        Raises (when it is read):
            NotFoundError: it is not yours, or its tokens are not kept any more.
            BadRequestError: it has fewer tokens than that.
            APIError: otherwise; see `realtime_serve.client.errors`.
        """
        return self._stream(self._client.orders.resume(request_id, after))

    def cancel(self, request_id: str) -> RequestState:
        """Ends a request; one that had ended before stays as it is.

        Raises:
            NotFoundError: it is not there, or not yours.
            APIError: otherwise; see `realtime_serve.client.errors`.
        """
        return self._thread.call(self._client.cancel(request_id))

    def request(self, request_id: str) -> RequestState:
        """Where a request is.

        Raises:
            NotFoundError: it is not there, or not yours.
            APIError: otherwise; see `realtime_serve.client.errors`.
        """
        return self._thread.call(self._client.request(request_id))

    def models(self) -> dict[str, dict[str, Any]]:
        """What is served: version, context_length, chat and more, by the model's name.

        Raises:
            APIError: see `realtime_serve.client.errors`.
        """
        return self._thread.call(self._client.models())

    def status(self) -> dict[str, Any]:
        """Connections, streams, models, queues and workers, as one gateway sees them.

        Raises:
            APIError: see `realtime_serve.client.errors`.
        """
        return self._thread.call(self._client.status())

    def _stream(self, course: Course) -> Stream:
        return Stream(self, self._thread, course)
