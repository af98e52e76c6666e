"""One request's course over however many connections it takes: the heart of the client."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass

from realtime_serve.client import errors
from realtime_serve.client.answers import Token
from realtime_serve.client.transcript import Event, EventReader, Transcript
from realtime_serve.client.wire import Reply, Wire, of_run, request_path

LASTING_S = 1.0
"""Age of a connection from which on its signs of life are progress."""


@dataclass(frozen=True, slots=True)
class Post:
    """A request to be made.

    Attributes:
        key: its Idempotency-Key, so that it is made once. shared: others may have it, too, so who
            leaves early does not end it for all.
    """

    path: str
    body: bytes
    key: str
    shared: bool = False


class Course:
    """Reads one stream to its end.

    Args:
        wire: the client's connections.
        post: what starts it; None: the request is there.
        request_id: of a request that is there.
        after: number of the last token the user has.
    """

    def __init__(self, wire: Wire, post: Post | None, request_id: str = "", after: int = 0) -> None:
        self.transcript = Transcript(after)
        self.transcript.request_id = request_id
        self._wire = wire
        self._post = post
        self._patience = wire.patience()
        self._posting: asyncio.Task[Reply] | None = None
        self._reply: Reply | None = None
        self._connected_at = 0.0
        self._reader = EventReader()
        self._events: deque[Event] = deque()
        self._opened = False
        self._run = ""
        self._failure: errors.APIError | None = None
        self._left = False

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self._left or self._failure is not None or self.transcript.done

    async def open(self) -> None:
        """Waits until a gateway has accepted the request. Does nothing a second time.

        Raises:
            APIError: it was refused, or nobody answered.
        """
        while not (self._opened or self.over):
            await self._step()

    async def more(self) -> list[Token]:
        """The tokens that have come since; none at the end.

        Raises:
            APIError: how it ended, if not well; again at each further call.
        """
        if self._failure is not None:
            raise self._failure
        while not self.transcript.done:
            if self._left:
                raise RuntimeError("this stream was closed before its end")
            if tokens := await self._step():
                return tokens
        if self._reply is not None:
            reply, self._reply = self._reply, None
            await reply.finish()
        return []

    def leave(self, *, cancel: bool) -> None:
        """Closes the connection. Idempotent.

        Args:
            cancel: end the request too, if this client alone made it and it has not ended.
        """
        if self.over:
            return
        self._left = True
        self._hang_up()
        cancel = cancel and self._post is not None and not self._post.shared
        if self._posting is not None:
            posting, self._posting = self._posting, None
            self._wire.abandon(posting, cancel=cancel)
        elif cancel and self.transcript.request_id:
            self._wire.withdraw(self.transcript.request_id, self._run)

    async def _step(self) -> list[Token]:
        """Opens a connection or reads from it, and bears what goes wrong as long as it may."""
        try:
            if self._reply is None:
                await self._connect()
                return []
            return await self._read(self._reply)
        except errors.APIError as error:
            self._hang_up()
            if self._left:
                return []
            pause_s = self._patience.pause_s(error)
            if pause_s is None:
                error.request_id = self.transcript.request_id or error.request_id
                self._failure = error
                raise
        await asyncio.sleep(pause_s)
        return []

    async def _connect(self) -> None:
        rid, post = self.transcript.request_id, self._post
        self._reader = EventReader()
        if not rid and post is not None:
            posting = self._posting = self._posting or self._start(post)
            # It goes on when the task that waits here is cancelled: what a gateway has accepted
            # can only be cancelled by the name that its answer gives it.
            await asyncio.wait([posting])
            if self._left:
                return
            self._posting = None
            reply = posting.result()
        else:
            headers = {"Last-Event-ID": str(self.transcript.last), **of_run(self._run)}
            try:
                reply = await self._wire.open("GET", f"{request_path(rid)}/stream", headers)
            except (errors.NotFoundError, errors.BadRequestError) as error:
                if not self._opened:
                    raise
                raise errors.StreamLostError(
                    f"The server lost this stream behind token {self.transcript.last}: "
                    f"{error.message}",
                    code=error.code,
                    status=error.status,
                    request_id=rid,
                ) from error
        if self._left:
            reply.close()
            return
        if not reply.is_stream:
            reply.close()
            raise errors.APIError("The server did not answer with a stream", code="no_stream")
        self.transcript.request_id = rid or reply.request_id
        # A gateway of release 0.1 tells none.
        self._run = reply.run or self._run
        self._reply, self._opened = reply, True
        self._connected_at = time.monotonic()

    def _start(self, post: Post) -> asyncio.Task[Reply]:
        # Once more with the same key, should its answer get lost, attaches to what it started.
        headers = {
            "Content-Type": "application/json",
            "Idempotency-Key": post.key,
            "X-Resumable": f"{self._wire.limits.grace_s:.3f}",
        }
        return asyncio.create_task(self._wire.open("POST", post.path, headers, post.body))

    async def _read(self, reply: Reply) -> list[Token]:
        if not self._events:
            data = await reply.some()
            if not data:
                reply.failed()
                raise errors.APIConnectionError(
                    "The stream ended before its last event", code="cut"
                )
            comments = self._reader.comments
            self._events.extend(self._reader.feed(data))
            # A gateway that greets each connection and cuts it would be asked without end.
            lasting = time.monotonic() - self._connected_at >= LASTING_S
            if lasting and self._reader.comments > comments:
                self._patience.progress()
        tokens: list[Token] = []
        while self._events and not self.transcript.done:
            try:
                token = self.transcript.take(self._events[0])
            except errors.APIError as error:
                if tokens:
                    # First the tokens in front of it; it is looked at again the next time.
                    break
                if errors.is_passing(error):
                    reply.failed()
                raise
            self._events.popleft()
            if token is not None:
                tokens.append(token)
        if tokens:
            self._patience.progress()
        return tokens

    def _hang_up(self) -> None:
        self._events.clear()
        if self._reply is not None:
            self._reply.close()
            self._reply = None
