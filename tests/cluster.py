"""A cluster of real processes for tests: each can be started, stopped and killed by itself."""

from __future__ import annotations

import fcntl
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from realtime_serve.lifeline import Lifeline
from realtime_serve.redis_server import RedisServer, ServerBinary, find_binary

ROOT = Path(__file__).parents[1]
READY_S = 60.0


PORTS = range(10_000, 32_000)
"""Below those that the system gives to connections."""
BLOCK = 100


@functools.cache
def _own_ports() -> tuple[Iterator[int], TextIO]:
    """A hundred ports that are this process's for as long as it runs, over and over again."""
    folder = Path(tempfile.gettempdir()) / f"realtime-ai-serve-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for first in PORTS[::BLOCK]:
        lock = (folder / str(first)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            return itertools.cycle(range(first, first + BLOCK)), lock
    raise OSError("other tests have all ports")


def free_port() -> int:
    """A port that nobody has, nor takes before it is used; tests beside these choose others."""
    ports, _ = _own_ports()
    for port in itertools.islice(ports, BLOCK):
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise OSError("this process's ports are all taken")


class Process:
    """One process of the cluster, its own settings and its log file."""

    def __init__(
        self,
        role: str,
        index: int,
        log: Path,
        popen: subprocess.Popen[bytes],
        settings: Mapping[str, str | int | float],
    ) -> None:
        self.role = role
        self.index = index
        self.log = log
        self.popen = popen
        self.settings = settings
        self.port = int(settings.get("port", 0))
        self.told_to_end = False

    @property
    def pid(self) -> int:
        return self.popen.pid

    def signal(self, number: int) -> None:
        self.told_to_end |= number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
        self.popen.send_signal(number)

    def kill(self) -> None:
        self.told_to_end = True
        self.popen.kill()
        self.popen.wait()

    def stop(self, timeout_s: float = 20.0) -> int:
        """SIGTERM, and the exit status."""
        self.told_to_end = True
        self.popen.terminate()
        return self.popen.wait(timeout_s)


class Cluster:
    """A server, gateways, workers and control.

    Args:
        folder: for logs and data.
        binary: the server's program; the default is what `up` would start.
        tcp: the server listens on a port of loopback instead of a socket file.
        settings: RTS_* without the prefix, for all processes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        binary: ServerBinary | None = None,
        tcp: bool = False,
        **settings: str | int | float,
    ) -> None:
        self.folder = folder
        self._binary = binary
        self._tcp = tcp
        self.settings = {"engine": "echo", "echo_step_ms": 2, "log_format": "json", **settings}
        self.processes: list[Process] = []
        self._lifeline = Lifeline()
        self.redis: RedisServer
        self.ports: list[int] = []

    def __enter__(self) -> Cluster:
        binary = self._binary or find_binary()[0]
        self.redis = RedisServer.start(binary, self.folder / "redis", tcp=self._tcp)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            if process.popen.poll() is None:
                process.signal(signal.SIGCONT)
                process.kill()
        self.redis.stop()
        self._lifeline.close()
        if kind is not None:
            for process in self.processes:
                print(f"--- {process.role}-{process.index}\n{process.log.read_text()[-3000:]}")

    @property
    def url(self) -> str:
        """The first gateway."""
        return f"http://127.0.0.1:{self.ports[0]}"

    def start(
        self,
        role: str,
        *,
        env: Mapping[str, str] | None = None,
        launcher: Sequence[str] = ("-m", "realtime_serve.cli"),
        **settings: str | int | float,
    ) -> Process:
        """Starts one process; a gateway gets a port of its own.

        Args:
            role: gateway, worker or control.
            env: further environment variables.
            launcher: what Python runs; the role and its index follow.
            settings: RTS_* without the prefix, for this process.
        """
        index = sum(process.role == role for process in self.processes)
        if role == "gateway":
            settings = {"port": free_port(), **settings}
            if settings["port"] not in self.ports:
                self.ports.append(int(settings["port"]))
        values = {**self.settings, "redis_url": self.redis.url, **settings}
        base = {key: value for key, value in os.environ.items() if not key.startswith("RTS_")}
        base |= {f"RTS_{key.upper()}": str(value) for key, value in values.items()}
        base["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        base |= env or {}
        log = self.folder / f"{role}-{index}.log"
        command = [sys.executable, *launcher, role, "--index", str(index)]
        with log.open("wb") as out:
            popen = subprocess.Popen(
                self._lifeline.command(command),
                pass_fds=self._lifeline.fds,
                cwd=ROOT,
                env=base,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        process = Process(role, index, log, popen, settings)
        self.processes.append(process)
        return process

    def up(self, *, gateways: int = 1, workers: int = 1, control: bool = True) -> Cluster:
        """Starts a whole cluster and waits until it serves."""
        for role, count in (("gateway", gateways), ("worker", workers), ("control", int(control))):
            for _ in range(count):
                self.start(role)
        self.wait(workers)
        return self

    def wait(self, workers: int = 1) -> None:
        """Until every gateway is ready and knows so many workers."""
        deadline = time.monotonic() + READY_S
        for port in self.ports:
            while True:
                status, body = self.get("/status", port)
                ready, _ = self.get("/readyz", port)
                if status == ready == 200 and len(body["workers"]) >= workers:
                    break
                assert time.monotonic() < deadline, (status, ready, body)
                for process in self.processes:
                    assert process.popen.poll() is None, process.log.read_text()
                time.sleep(0.02)

    def get(self, path: str, port: int | None = None) -> tuple[int, Any]:
        """A GET on a gateway: status and body; (0, None) when nobody answers."""
        try:
            url = f"http://127.0.0.1:{port or self.ports[0]}{path}"
            with urllib.request.urlopen(url, timeout=5) as reply:
                data = reply.read()
                is_json = "json" in reply.headers["Content-Type"]
                return reply.status, json.loads(data) if is_json else data.decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, None
