"""The pub/sub connection, against a server of a few lines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvloop

from gateway import pubsub
from gateway.pubsub import PubSubConnection
from shared import tasks


class Server:
    """Answers pings, or does not.

    Attributes:
        met: connections there have been. deaf: it reads and says nothing.
    """

    def __init__(self) -> None:
        self.met = 0
        self.pings = 0
        self.deaf = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.met += 1
        while data := await reader.read(4096):
            self.pings += data.count(b"PING")
            if not self.deaf:
                writer.write(b"+PONG\r\n" * data.count(b"PING"))
        writer.close()


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Server, PubSubConnection]]:
    server = Server()
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        connection = PubSubConnection(
            f"redis://127.0.0.1:{port}",
            on_message=lambda channel, payload: None,
            on_subscribed=lambda channel: None,
            channels=list,
        )
        task = asyncio.create_task(connection.run())
        try:
            await pings(server, 1)
            yield server, connection
        finally:
            await tasks.end(task)


async def pings(server: Server, count: int) -> None:
    async with asyncio.timeout(5):
        while server.pings < count:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stall_s", [0.45, 0.7])
def test_our_own_pause_is_not_taken_for_silence(stall_s: float) -> None:
    async def stall() -> None:
        async with connected() as (server, connection):
            before = server.pings
            for _ in range(2):
                time.sleep(stall_s)  # noqa: ASYNC251
                await asyncio.sleep(0)
            await pings(server, before + 2)
            assert connection.up
            assert server.met == 1

    # The gateway's own loop, which looks at timers before it reads.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(stall())


async def test_a_silent_server_is_left() -> None:
    async with connected() as (server, connection):
        server.deaf = True
        started = time.monotonic()
        async with asyncio.timeout(5):
            while connection.up:
                await asyncio.sleep(0.01)
        assert time.monotonic() - started < pubsub.PONG_S + 2 * pubsub.PING_S + 0.2
