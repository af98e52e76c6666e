"""The server that sentinels call the master: found, followed, and no other one used.

A failover leaves connections to the old master that still look good: while it is cut off or stands
still, and after it wakes up, until a sentinel makes it a replica. What is written there is lost. So
the sentinels are asked twice a second, and every connection to another server is cut.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import redis.asyncio as aioredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError, RedisError

from shared.connection import Tcp, Tls
from shared.redis_url import SentinelUrl
from shared.tasks import end

log = logging.getLogger(__name__)

WATCH_S = 0.5
"""Pause between two questions to the sentinels."""
ASK_S = 0.5
"""A sentinel that has not answered by then is left out."""
FIRST_S = 1.0
"""Longest wait for the first answer of any."""
CONNECT_S = 1.0
"""A master that cannot be reached may be one that was: it is not tried for longer than this."""

Address = tuple[str, int]


class Sentinels:
    """Knows where the master is, from the first question on until it is closed.

    All sentinels are asked, and the one that has seen most failovers is right: one that stood
    still or was cut off says what was true before.

    Args:
        url: the sentinels.
        on_answer: called with the master's address twice a second, while any sentinel answers.
    """

    def __init__(self, url: SentinelUrl, on_answer: Callable[[Address], None]) -> None:
        self._name = url.master
        self._on_answer = on_answer
        self._clients = [_client(host, port, url) for host, port in url.sentinels]
        self._master: Address | None = None
        self._known = asyncio.Event()
        self._trouble = "no answer"
        self._watching: asyncio.Task[None] | None = None

    async def master(self) -> Address:
        """Host and port of the master. While no sentinel answers, it is where it was.

        Raises:
            ConnectionError: no sentinel has said so yet.
        """
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch(), name="sentinels")
        if self._master is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_S):
                    await self._known.wait()
        if self._master is None:
            raise ConnectionError(f"no sentinel knows {self._name!r}: {self._trouble}")
        return self._master

    async def close(self) -> None:
        """Asks no more. `master` begins again."""
        watching, self._watching = self._watching, None
        if watching is not None:
            await end(watching)
        for client in self._clients:
            await client.aclose(close_connection_pool=True)

    async def _watch(self) -> None:
        answering = True
        while True:
            views = await asyncio.gather(
                *(self._view(client) for client in self._clients), return_exceptions=True
            )
            answers = [view for view in views if not isinstance(view, BaseException)]
            errors = [view for view in views if isinstance(view, BaseException)]
            self._trouble = "; ".join(sorted({str(error) for error in errors}))
            if bool(answers) != answering:
                answering = bool(answers)
                if answering:
                    log.info("sentinels answer")
                else:
                    log.warning("no sentinel answers", extra={"error": self._trouble})
            if answers:
                self._learn(answers)
            await asyncio.sleep(WATCH_S)

    def _learn(self, answers: list[tuple[int, Address]]) -> None:
        _, master = max(answers, key=lambda view: (view[0], view[1] == self._master))
        if self._master not in (None, master):
            log.warning("redis has another master", extra={"address": f"{master[0]}:{master[1]}"})
        self._master = master
        self._known.set()
        self._on_answer(master)

    async def _view(self, client: aioredis.Redis) -> tuple[int, Address]:
        """Which failover is the last that a sentinel knows of, and where the master is since."""
        async with client.pipeline(transaction=False) as pipe:
            pipe.execute_command("SENTINEL MASTER", self._name)
            # The state above names the old master until all replicas follow the new one.
            pipe.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", self._name)
            state, address = await pipe.execute()
        if address is None:
            raise RedisError("the sentinel has no address for it")
        host, port = address
        return int(state["config-epoch"]), (_text(host), int(port))


class _ToMaster(AbstractConnection):
    """A connection to whatever server is the master when it is made."""

    host: str
    port: int

    def __init__(self, *, sentinels: Sentinels, **options: Any) -> None:
        super().__init__(**options)
        self._sentinels = sentinels

    async def connect(self) -> None:
        """Connects, if it is not."""
        if not self.is_connected:
            self.host, self.port = await self._sentinels.master()
        await super().connect()  # type: ignore[no-untyped-call]

    def cut_unless(self, master: Address) -> None:
        """Ends the connection, also under whoever waits for an answer, if it is to another one."""
        if self._writer is not None and (self.host, self.port) != master:
            self._writer.transport.abort()


class _TcpToMaster(_ToMaster, Tcp):
    """sentinel://."""


class _TlsToMaster(_ToMaster, Tls):
    """sentinels://."""


class SentinelPool(aioredis.BlockingConnectionPool):
    """Connections to the master; those to what was the master are cut."""

    def __init__(self, url: SentinelUrl, *, socket_connect_timeout: float, **options: Any) -> None:
        self._sentinels = Sentinels(url, self._cut_others)
        if url.tls:
            options["tls"] = url.tls
        super().__init__(
            connection_class=_TlsToMaster if url.tls else _TcpToMaster,
            sentinels=self._sentinels,
            db=url.db,
            username=url.username or None,
            password=url.password or None,
            socket_connect_timeout=min(CONNECT_S, socket_connect_timeout),
            **options,
        )

    async def disconnect(self, inuse_connections: bool = True) -> None:
        """Ends the connections; if all of them, asks the sentinels no more."""
        if inuse_connections:
            await self._sentinels.close()
        await super().disconnect(inuse_connections)

    def _cut_others(self, master: Address) -> None:
        for connection in (*self._available_connections, *self._in_use_connections):
            assert isinstance(connection, _ToMaster)
            connection.cut_unless(master)


def _client(host: str, port: int, url: SentinelUrl) -> aioredis.Redis:
    options: dict[str, Any] = {"timeout": ASK_S, "socket_timeout": ASK_S}
    if url.tls:
        options["tls"] = url.tls
    pool = aioredis.BlockingConnectionPool(
        connection_class=Tls if url.tls else Tcp,
        host=host,
        port=port,
        username=url.sentinel_username or None,
        password=url.sentinel_password or None,
        max_connections=1,
        socket_connect_timeout=ASK_S,
        **options,
    )
    return aioredis.Redis(connection_pool=pool)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
