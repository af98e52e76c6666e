"""A cluster whose processes may be killed at will, and a proxy that loses what passes it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from cluster import Cluster, Process

from shared import keys


class Stand:
    """Two gateways and two workers; `mend` replaces those that died."""

    def __init__(self, folder: Path, **settings: str | int | float) -> None:
        self.cluster = Cluster(
            folder,
            **{
                "echo_step_ms": 5,
                "keep_alive_s": 0.1,
                "lease_ms": 1000,
                "drain_grace_s": 5,
                **settings,
            },
        )

    def __enter__(self) -> Self:
        self.cluster.__enter__().up(gateways=2, workers=2, control=False)
        self.gateways = [p for p in self.cluster.processes if p.role == "gateway"]
        self.workers = [p for p in self.cluster.processes if p.role == "worker"]
        self.urls = [f"http://127.0.0.1:{port}" for port in self.cluster.ports]
        self.redis: Any = redis.Redis.from_url(self.cluster.redis.url)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.redis.close()
        self.cluster.__exit__(kind, error, trace)

    def mend(self) -> None:
        for i, port in enumerate(self.cluster.ports):
            if self._is_gone(self.gateways[i]):
                self.gateways[i] = self.cluster.start("gateway", port=port)
        for i, worker in enumerate(self.workers):
            if self._is_gone(worker):
                self.workers[i] = self.cluster.start("worker")
        pids = {worker.pid for worker in self.workers}
        deadline = time.monotonic() + 30
        for port in self.cluster.ports:
            while True:
                status, body = self.cluster.get("/status", port)
                found = {card["pid"] for card in body["workers"]} if status == 200 else set()
                if found >= pids and self.cluster.get("/readyz", port)[0] == 200:
                    break
                assert time.monotonic() < deadline, (status, body)
                time.sleep(0.02)

    def _is_gone(self, process: Process) -> bool:
        if process.popen.poll() is None:
            process.signal(signal.SIGCONT)
        return process.popen.poll() is not None

    def busy_worker(self) -> Process:
        """One that runs a request."""
        deadline = time.monotonic() + 10
        while True:
            _, body = self.cluster.get("/status")
            busy = {card["pid"] for card in body["workers"] if card["running"]}
            for worker in self.workers:
                if worker.pid in busy:
                    return worker
            assert time.monotonic() < deadline, body
            time.sleep(0.01)

    def ended(self, but: str = "") -> list[str]:
        """The request ids of the facts of requests that ended, but for those with this reason."""
        facts = [fields for _, fields in self.redis.xrange(keys.ENDED)]
        return [fact[b"rid"].decode() for fact in facts if fact[b"reason"].decode() != but]


class Proxy:
    """Between a client and a gateway.

    Attributes:
        requests: the first line of each request that came.
        keys: the Idempotency-Key of each that had one.
        cuts: for each further connection, after how many bytes of replies it is cut; then none is.
        swallow: how many further replies are read and not passed on.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.requests: list[str] = []
        self.keys: list[str] = []
        self.cuts: Iterator[int] = iter(())
        self.swallow = 0
        self.connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Breaks all connections."""
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self._open.add(writer)
        pumps: list[asyncio.Task[None]] = []
        try:
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._target)
            self._open.add(to_writer)
            pumps = [
                asyncio.create_task(self._pass_requests(reader, to_writer)),
                asyncio.create_task(self._pass_replies(to_reader, writer)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            to_writer.transport.abort()
            self._open.discard(to_writer)
        except ConnectionError:
            pass
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            writer.transport.abort()
            self._open.discard(writer)
            self._tasks.discard(task)

    async def _pass_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(65536):
            for line in data.decode(errors="replace").split("\r\n"):
                if line.endswith(" HTTP/1.1"):
                    self.requests.append(line.removesuffix(" HTTP/1.1"))
                elif line.startswith("Idempotency-Key: "):
                    self.keys.append(line.partition(": ")[2])
            writer.write(data)
            await writer.drain()

    async def _pass_replies(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        left = next(self.cuts, None)
        while data := await reader.read(65536):
            if self.swallow:
                self.swallow -= 1
                return
            if left is not None:
                data, left = data[:left], left - len(data)
            writer.write(data)
            await writer.drain()
            if left is not None and left <= 0:
                # Half of them end as a connection does that is closed in order.
                if self.connections % 2:
                    writer.write_eof()
                    await asyncio.sleep(0.01)
                return
