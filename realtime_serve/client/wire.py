"""Connections to the gateways: which one to ask, and how long to go on asking."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp

from realtime_serve.client import errors

log = logging.getLogger("realtime_serve.client")

BACKOFF_S = 0.1
BACKOFF_MAX_S = 2.0
RETRY_AFTER_MAX_S = 5.0
LAST_WORDS_S = 5.0
"""How long cancelling in the background may take."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How patient a client is, in seconds.

    Attributes:
        connect_s: for a connection to open. read_s: between two signs of life of a gateway.
        patience_s: without any progress, from the first failure on.
        grace_s: how long the server keeps a stream for this client when it is not connected.
    """

    connect_s: float
    read_s: float
    patience_s: float
    grace_s: float

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number of seconds above 0, not {value!r}")


class Patience:
    """Says after each failure how long to wait, until it is over.

    Each gateway is asked once without a pause; from then on pauses double, with jitter.

    Args:
        total_s: since the first failure without progress.
        gateways: how many there are to ask.
        clock: monotonic seconds. jitter: a factor for each pause.
    """

    def __init__(
        self,
        total_s: float,
        gateways: int,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = lambda: random.uniform(0.5, 1.5),
    ) -> None:
        self._total_s = total_s
        self._gateways = gateways
        self._clock = clock
        self._jitter = jitter
        self._failures = 0
        self._since = 0.0

    def progress(self) -> None:
        """Something came: all is well."""
        self._failures = 0

    def pause_s(self, error: errors.APIError) -> float | None:
        """How long to wait before it is tried again; None: it is not."""
        if not errors.is_passing(error):
            return None
        now = self._clock()
        if not self._failures:
            self._since = now
        self._failures += 1
        tried_all = self._failures >= self._gateways
        rounds = (self._failures - 1) // self._gateways
        pause_s = 0.0
        if rounds:
            # Far below the exponent at which a float overflows.
            doubled = BACKOFF_S * 2.0 ** min(rounds - 1, 16)
            pause_s = min(BACKOFF_MAX_S, doubled) * self._jitter()
        if tried_all and error.retry_after_s is not None:
            pause_s = max(pause_s, min(error.retry_after_s, RETRY_AFTER_MAX_S))
        left_s = self._since + self._total_s - now
        if pause_s > left_s:
            return None
        if self._failures == self._gateways + 1:
            log.warning("%s; trying again for up to %.0f s", error.message, left_s)
        return pause_s


class Reply:
    """A response whose status was good.

    Attributes:
        request_id: of X-Stream-Id, or "". run: which run of it, as this server calls it, or "".
    """

    def __init__(self, response: aiohttp.ClientResponse, failed: Callable[[], None]) -> None:
        self._response = response
        self._failed = failed
        self.request_id = errors.request_id_of(response.headers)
        self.run = response.headers.get("X-Stream-Run", "")
        self.is_stream = response.content_type == "text/event-stream"

    async def some(self) -> bytes:
        """The bytes that have come; b"" at the end.

        Raises:
            APIConnectionError: the connection broke, or was silent for too long.
        """
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            self.failed()
            raise _broken(str(self._response.url.origin()), error) from error

    async def whole(self) -> bytes:
        """All bytes.

        Raises:
            APIConnectionError: the connection broke, or was silent for too long.
        """
        found = []
        while data := await self.some():
            found.append(data)
        return b"".join(found)

    def failed(self) -> None:
        """The next question goes to another gateway."""
        self._failed()

    async def finish(self) -> None:
        """Lets the connection be used again, once the end of what matters has come."""
        with contextlib.suppress(TimeoutError, errors.APIError):
            async with asyncio.timeout(1):
                await self.whole()
        self.close()

    def close(self) -> None:
        """Closes the connection, unless all was read. Idempotent."""
        self._response.release()


class Wire:
    """One client's connections.

    Args:
        urls: of the gateways.
        headers: of every request.
        limits: its patience.
    """

    def __init__(self, urls: list[str], headers: Mapping[str, str], limits: Limits) -> None:
        self.limits = limits
        self._urls = [_base(url) for url in urls]
        if not self._urls:
            raise ValueError("there must be at least one URL")
        self._headers = dict(headers)
        self._current = 0
        self._session: aiohttp.ClientSession | None = None
        self._errands: set[asyncio.Task[None]] = set()
        self.closed = False

    def patience(self, total_s: float | None = None) -> Patience:
        """For one request."""
        return Patience(total_s or self.limits.patience_s, len(self._urls))

    async def open(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Reply:
        """Asks the gateway that answered last.

        Raises:
            APIError: it refused, or did not answer.
        """
        if self.closed:
            raise RuntimeError("this client is closed")
        index, limits = self._current, self.limits
        session, url = self._open_session(), self._urls[index]
        try:
            # The read timeout of aiohttp does not bound the sending of the body.
            async with asyncio.timeout(limits.connect_s + limits.read_s):
                response = await session.request(
                    method, url + path, headers=headers, data=body or None
                )
                content = await response.read() if response.status != 200 else b""
        except (aiohttp.ClientError, OSError) as error:
            self._failed(index)
            raise _broken(url, error) from error
        if response.status == 200:
            return Reply(response, lambda: self._failed(index))
        refused = errors.of_response(response.status, response.headers, content)
        if errors.is_passing(refused):
            self._failed(index)
        raise refused

    async def call(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        patience_s: float | None = None,
    ) -> bytes:
        """The body of a reply to a question that may be asked twice.

        Raises:
            APIError: it was refused, or nobody answered.
        """
        patience = self.patience(patience_s)
        while True:
            try:
                reply = await self.open(method, path, headers)
                try:
                    return await reply.whole()
                finally:
                    reply.close()
            except errors.APIError as error:
                pause_s = patience.pause_s(error)
                if pause_s is None:
                    raise
            await asyncio.sleep(pause_s)

    def withdraw(self, request_id: str, run: str) -> None:
        """Cancels this run of a request in the background."""
        if not self.closed:
            self._send(self._withdraw(request_id, run))

    def abandon(self, posting: asyncio.Task[Reply], *, cancel: bool) -> None:
        """Awaits in the background an answer that nobody waits for any more.

        Args:
            posting: it comes from this.
            cancel: end the request that it accepts.
        """
        self._send(self._abandon(posting, cancel))

    async def close(self) -> None:
        """Finishes what runs in the background, then closes all connections. Idempotent."""
        if self._errands:
            await asyncio.wait(self._errands, timeout=LAST_WORDS_S)
        self.closed = True
        for task in list(self._errands):
            task.cancel()
        await asyncio.gather(*self._errands, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def _send(self, errand: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(errand)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def _abandon(self, posting: asyncio.Task[Reply], cancel: bool) -> None:
        try:
            reply = await posting
        except (errors.APIError, RuntimeError) as error:
            log.info("a request that was left was not accepted: %s", error)
            return
        reply.close()
        if cancel and reply.request_id:
            await self._withdraw(reply.request_id, reply.run)

    async def _withdraw(self, request_id: str, run: str) -> None:
        try:
            await self.call("DELETE", request_path(request_id), of_run(run), LAST_WORDS_S)
        except (errors.APIError, RuntimeError) as error:
            # The server ends it by itself when nobody has listened for the grace time.
            log.info("request %s was not cancelled: %s", request_id, error)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            limits = self.limits
            self._session = aiohttp.ClientSession(
                # A proxy that compresses holds events back.
                headers={"Accept-Encoding": "identity", **self._headers},
                # One would bind us to the gateway that is dead.
                cookie_jar=aiohttp.DummyCookieJar(),
                # Streams stay open for long: a limit would make the next one wait for their ends.
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=limits.connect_s, sock_read=limits.read_s
                ),
            )
        return self._session

    def _failed(self, index: int) -> None:
        # Only if nobody else has moved on before: many streams notice the same death.
        if self._current == index:
            self._current = (index + 1) % len(self._urls)


def request_path(request_id: str) -> str:
    """Where a request is found.

    Raises:
        ValueError: an empty id.
    """
    if not request_id:
        raise ValueError("request_id is empty")
    return f"/requests/{quote(request_id, safe='')}"


def of_run(run: str) -> dict[str, str]:
    """The headers by which a question is about this run of a request only."""
    return {"X-Stream-Run": run} if run else {}


def _base(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ValueError(f"{url!r} is not the http:// or https:// URL of a gateway")
    return url.rstrip("/")


def _broken(url: str, error: Exception) -> errors.APIConnectionError:
    reason = str(error) or type(error).__name__
    return errors.APIConnectionError(f"No answer from {url}: {reason}", code="no_answer")
