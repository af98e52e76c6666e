"""A TCP proxy in front of a Redis server that loses messages, goes silent, or cuts connections."""

from __future__ import annotations

import asyncio
import random
from types import TracebackType

from shared.tasks import end

_MESSAGE = b"*3\r\n$7\r\nmessage\r\n$"


class NetProxy:
    """Forwards connections to a server.

    Args:
        port: of the server, on loopback. rng: decides which messages are lost.

    Attributes:
        port: where it listens.
        loss: share of pub/sub messages that it loses. lost: how many it has.
    """

    def __init__(self, port: int, rng: random.Random) -> None:
        self._target = port
        self._rng = rng
        self._links: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.loss = 0.0
        self.lost = 0
        self.port = 0

    async def __aenter__(self) -> NetProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        self.cut()
        self._open.set()
        await end(*self._serving)

    def silence(self) -> int:
        """From now on nothing gets through, in either direction, and nothing is closed.

        Returns how many connections there are; with none it does nothing, as new ones would wait.
        """
        if self._links:
            self._open.clear()
        return len(self._links)

    def heal(self) -> None:
        """New connections work; those that were silent stay so, as a firewall leaves them."""
        for link in self._links:
            for writer in link:
                writer.transport.pause_reading()  # type: ignore[attr-defined]
        self._links.clear()
        self._open.set()

    def cut(self) -> int:
        """Closes every connection in the middle of whatever it carries; how many there were."""
        links = list(self._links)
        for link in links:
            for writer in link:
                writer.transport.abort()
        return len(links)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        await self._open.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        link = (writer, far_writer)
        self._links.add(link)
        try:
            await asyncio.gather(
                self._pump(reader, far_writer), self._pump(far_reader, writer, lossy=True)
            )
        except asyncio.CancelledError:
            # asyncio's streams would report it as an error of this handler.
            pass
        finally:
            self._links.discard(link)
            for end in link:
                end.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, lossy: bool = False
    ) -> None:
        rest = b""
        try:
            while data := await reader.read(65536):
                await self._open.wait()
                if lossy and self.loss:
                    data, rest = self._drop(rest + data)
                elif rest:
                    data, rest = rest + data, b""
                writer.write(data)
                await writer.drain()
        except (ConnectionError, OSError):
            pass
        writer.transport.abort()

    def _drop(self, data: bytes) -> tuple[bytes, bytes]:
        """(what goes on, what is not complete yet); only whole messages of channels are lost."""
        out = []
        while data.startswith(_MESSAGE):
            end = _message_end(data)
            if end < 0:
                return b"".join(out), data
            if self._rng.random() < self.loss:
                self.lost += 1
            else:
                out.append(data[:end])
            data = data[end:]
        if _MESSAGE.startswith(data[: len(_MESSAGE)]) and len(data) < len(_MESSAGE):
            return b"".join(out), data
        following = data.find(_MESSAGE, 1)
        if following > 0:
            more, rest = self._drop(data[following:])
            return b"".join([*out, data[:following], more]), rest
        return b"".join([*out, data]), b""


def _message_end(data: bytes) -> int:
    """Where a message ends that `data` begins with; -1 when the rest has yet to come."""
    at = len(_MESSAGE)
    for _ in range(2):
        line = data.find(b"\r\n", at)
        if line < 0:
            return -1
        at = line + 2 + int(data[at:line]) + 2
        if at > len(data):
            return -1
        at += 1
    return at - 1
