"""Connections of redis-py from which a cancellation always comes back.

Up to Python 3.11 `asyncio.wait_for`, through which redis-py 5 sends each command, loses a
cancellation that meets its end, and so does the `timeout(0)` with which it probes a connection
before use: a client that left, or a task that should stop, went unnoticed. Both are replaced, which
also makes a command cheaper by a third: no task and no timer for each.

And none of them is used again once the server at its other end takes no writes: after a failover
that is the old master, and the new one is found by connecting anew.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import redis.asyncio as aioredis
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.connection import HiredisRespSerializer
from redis.exceptions import ConnectionError, ReadOnlyError

from shared.redis_url import TlsFiles


class _Cancellable(AbstractConnection):
    """What is replaced, for all transports."""

    _serializer = HiredisRespSerializer()

    def pack_command(self, *args: Any) -> list[bytes]:
        """In C, as redis-py's own blocking client does: a quarter of the time for a step's emit."""
        packed: list[bytes] = self._serializer.pack(*args)
        return packed

    async def can_read_destructive(self) -> bool:
        """Whether an idle connection is of no use: closed by the server, or out of step."""
        reader: Any = self._reader
        return bool(reader.at_eof() or reader.exception() or reader._buffer)

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Sends within the socket's timeout."""
        if not self.is_connected:
            await self.connect()  # type: ignore[no-untyped-call]
        writer: Any = self._writer
        if writer.transport.is_closing():
            # It broke, or was cut, since its last answer; uvloop would raise a RuntimeError.
            await self.disconnect(nowait=True)
            raise ConnectionError("the connection is closed")
        timeout_s, self.socket_timeout = self.socket_timeout, None
        try:
            async with asyncio.timeout(timeout_s):
                await super().send_packed_command(command, check_health)
        finally:
            self.socket_timeout = timeout_s

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """As redis-py does; a refused write ends the connection."""
        try:
            return await super().read_response(*args, **kwargs)
        except ReadOnlyError as error:
            await self.disconnect(nowait=True)
            raise ConnectionError(str(error)) from error


class Tcp(_Cancellable, Connection):
    """redis://, and sentinels."""


class Tls(_Cancellable, SSLConnection):
    """rediss://, and sentinels with TLS."""

    def __init__(self, *, tls: TlsFiles, **options: Any) -> None:
        self._tls = tls
        super().__init__(**options)

    def _connection_arguments(self) -> dict[str, Any]:
        # redis-py's own would trust the system's authorities beside the one that is named, and by
        # default not look at the name. Made anew each time, because certificates are renewed.
        return {"host": self.host, "port": self.port, "ssl": tls_context(self._tls)}


class _Unix(_Cancellable, UnixDomainSocketConnection):
    """unix://."""


_CLASSES = {Connection: Tcp, SSLConnection: Tls, UnixDomainSocketConnection: _Unix}


def tls_context(tls: TlsFiles) -> ssl.SSLContext:
    """Verifies the server's certificate and the name in it.

    Raises:
        OSError, ssl.SSLError: a file is not there, or not what it should be.
    """
    context = ssl.create_default_context(cafile=tls.ssl_ca_certs or None)
    if tls.ssl_certfile:
        context.load_cert_chain(tls.ssl_certfile, tls.ssl_keyfile)
    return context


def make_cancellable(pool: aioredis.ConnectionPool) -> None:
    """The pool's connections, none of which exists yet, will be of this kind."""
    pool.connection_class = _CLASSES[pool.connection_class]
