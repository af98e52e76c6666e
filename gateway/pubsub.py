"""One raw pub/sub connection to Redis: connects, watches itself, connects again.

redis-py's PubSub costs 6-10 us a message and resubscribes silently; this is a protocol over the
parser of hiredis (0.4 us) that reports every confirmation, so that its owner can tell a gap.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import hiredis
from redis.asyncio.connection import parse_url
from redis.exceptions import RedisError

from shared.connection import tls_context
from shared.redis_url import is_sentinel, parse_sentinel, parse_tls
from shared.sentinel import Address, Sentinels

log = logging.getLogger(__name__)

PING_S = 0.25
"""How often the connection is asked for a sign of life."""
PONG_S = 0.5
"""A connection that has been silent this long after a ping is half-open: it is dropped."""
_FIRST_PAUSE_S = 0.05
_UNHEARD = int(PONG_S / PING_S)
"""Pings without any sign of life after which that is so."""


class _Protocol(asyncio.Protocol):
    """Feeds the parser; messages go straight to `deliver`."""

    def __init__(
        self, deliver: Callable[[list[Any]], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._reader = hiredis.Reader()
        self._deliver = deliver
        self.heard = False
        self.lost = loop.create_future()

    def data_received(self, data: bytes) -> None:
        self.heard = True
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            if isinstance(reply, hiredis.ReplyError):
                self.connection_lost(ConnectionError(str(reply)))
            elif isinstance(reply, list):
                self._deliver(reply)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(error)


class PubSubConnection:
    """Keeps one subscribing connection up.

    Args:
        url: what RTS_REDIS_URL may say, with credentials when there are any.
        on_message: called with (channel, payload).
        on_subscribed: called with a channel for every confirmation, also after a reconnect.
        channels: what to subscribe to after a (re)connect.
    """

    def __init__(
        self,
        url: str,
        *,
        on_message: Callable[[bytes, bytes], None],
        on_subscribed: Callable[[bytes], None],
        channels: Callable[[], Iterable[bytes]],
    ) -> None:
        self._url = url
        self._on_message = on_message
        self._on_subscribed = on_subscribed
        self._channels = channels
        self._transport: asyncio.Transport | None = None
        self._protocol: _Protocol | None = None
        self._address: Address | None = None
        self._answered = False
        self._tls = parse_tls(url)
        self._sentinels: Sentinels | None = None
        if is_sentinel(url):
            self._sentinels = Sentinels(parse_sentinel(url), self._leave_unless)

    @property
    def up(self) -> bool:
        """Whether there is a connection that answered of late."""
        return self._transport is not None

    def subscribe(self, channel: bytes) -> None:
        """Asks for a channel; `on_subscribed` follows, after the next connect if there is none."""
        self._send(b"SUBSCRIBE", channel)

    def unsubscribe(self, channel: bytes) -> None:
        """Gives a channel up."""
        self._send(b"UNSUBSCRIBE", channel)

    async def run(self) -> None:
        """Connects and watches, for ever."""
        pause = _FIRST_PAUSE_S
        try:
            while True:
                self._answered = False
                try:
                    await self._connected()
                except (OSError, RedisError) as error:
                    log.warning("pub/sub connection failed", extra={"error": str(error)})
                if self._answered:
                    pause = _FIRST_PAUSE_S
                await asyncio.sleep(pause)
                pause = min(1.0, pause * 2)
        finally:
            if self._sentinels is not None:
                await self._sentinels.close()

    async def _connected(self) -> NoReturn:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PONG_S * 4):
            transport, protocol = await self._open(loop)
        try:
            self._transport, self._protocol = transport, protocol
            if channels := list(self._channels()):
                self._send(b"SUBSCRIBE", *channels)
            unheard = 0
            while True:
                asked_at = loop.time()
                protocol.heard = False
                self._send(b"PING")
                done, _ = await asyncio.wait([protocol.lost], timeout=PING_S)
                if done:
                    raise ConnectionError(str(protocol.lost.result() or "closed by the server"))
                if protocol.heard:
                    self._answered = True
                    unheard = 0
                elif loop.time() - asked_at < 2 * PING_S:
                    unheard += 1
                # Else this loop stood still, and what came meanwhile has yet to be read.
                if unheard >= _UNHEARD:
                    raise ConnectionError(f"no answer for {PONG_S} s")
        finally:
            self._transport = self._protocol = None
            transport.abort()

    async def _open(self, loop: asyncio.AbstractEventLoop) -> tuple[asyncio.Transport, _Protocol]:
        where = await self._where()
        protocol = _Protocol(self._dispatch, loop)

        def factory() -> _Protocol:
            return protocol

        if "path" in where:
            transport, _ = await loop.create_unix_connection(factory, where["path"])
        else:
            transport, _ = await loop.create_connection(
                factory,
                where.get("host", "localhost"),
                where.get("port", 6379),
                ssl=tls_context(self._tls) if self._tls else None,
            )
        if password := where.get("password"):
            user = where.get("username")
            words = [b"AUTH", *([user.encode()] if user else []), password.encode()]
            transport.write(hiredis.pack_command(tuple(words)))
        return transport, protocol

    async def _where(self) -> dict[str, Any]:
        """The server's address and credentials, as redis-py calls them."""
        if self._sentinels is None:
            return dict(parse_url(self._url))
        url = parse_sentinel(self._url)
        self._address = host, port = await self._sentinels.master()
        return {"host": host, "port": port, "username": url.username, "password": url.password}

    def _leave_unless(self, master: Address) -> None:
        """Gives up a connection to what was the master: nothing is published there any more."""
        if self._protocol is not None and self._address != master:
            self._protocol.connection_lost(ConnectionError("the master is another server now"))

    def _send(self, *words: bytes) -> None:
        # What is not sent is asked for by the next connection.
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(hiredis.pack_command(words))  # type: ignore[arg-type]

    def _dispatch(self, reply: list[Any]) -> None:
        kind = reply[0]
        if kind == b"message":
            self._on_message(reply[1], reply[2])
        elif kind == b"subscribe":
            self._on_subscribed(reply[1])
