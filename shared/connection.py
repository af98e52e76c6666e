"""Connections of redis-py from which a cancellation always comes back.

Up to Python 3.11 `asyncio.wait_for`, through which redis-py 5 sends each command, loses a cancellation
that meets its end, and so does the `timeout(0)` with which it probes a connection before use: a
client that left, or a task that should stop, was then not noticed. Both are replaced, which also
halves the cost of a command.
"""

from __future__ import annotations

import asyncio
from typing import Any

import redis.asyncio as aioredis
from redis.asyncio import connection as plain


class _Cancellable(plain.AbstractConnection):
    """What is replaced, for all transports."""

    async def can_read_destructive(self) -> bool:
        """Whether an idle connection is of no use any more: closed by the server, or out of step."""
        reader: Any = self._reader
        return bool(reader.at_eof() or reader.exception() or reader._buffer)

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Sends, within the socket's timeout."""
        timeout_s, self.socket_timeout = self.socket_timeout, None
        try:
            async with asyncio.timeout(timeout_s):
                await super().send_packed_command(command, check_health)
        finally:
            self.socket_timeout = timeout_s


class _Tcp(_Cancellable, plain.Connection):
    pass


class _Tls(_Cancellable, plain.SSLConnection):
    pass


class _Unix(_Cancellable, plain.UnixDomainSocketConnection):
    pass


_CLASSES: dict[type, type] = {
    plain.Connection: _Tcp,
    plain.SSLConnection: _Tls,
    plain.UnixDomainSocketConnection: _Unix,
}
