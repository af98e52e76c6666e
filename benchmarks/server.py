"""A server under test: started, waited for, its processes' CPU time read, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from benchmarks.figures import BenchError
from realtime_serve import ports, probe
from realtime_serve.lifeline import Lifeline

HOST = "127.0.0.1"
_STOP_S = 30.0
_POLL_S = 0.1


class Server:
    """A program that listens on a port, and everything it started.

    Args:
        argv: the command. env: of it. port: where it will listen.
        folder: its working directory; it must have what the command needs.
    """

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], port: int, folder: Path | None = None
    ) -> None:
        self.port = port
        self._lifeline = Lifeline()
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in stop)
        self._process = subprocess.Popen(
            self._lifeline.command(argv),
            pass_fds=self._lifeline.fds,
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def family(self) -> list[psutil.Process]:
        """The process and all that it started, directly or not."""
        return family(self._process.pid)

    def wait(self, is_ready: Callable[[], bool], within_s: float) -> float:
        """Waits until `is_ready`; the seconds that took.

        Raises:
            BenchError: it ended, or was not ready in time.
        """
        began = time.monotonic()
        while not is_ready():
            if self._process.poll() is not None or time.monotonic() - began > within_s:
                raise BenchError(f"it did not start:\n{self.log_tail()}")
            time.sleep(_POLL_S)
        return time.monotonic() - began

    def log_tail(self) -> str:
        """The last of what it printed."""
        self._log.seek(0)
        return self._log.read()[-3000:]

    def stop(self) -> None:
        """Asks it to end, and kills what is left."""
        processes = self.family()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        # A program that ended before us has no family any more, but what it left is of its group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._lifeline.close()
        self._log.close()


def free_port() -> int:
    """A port of this machine that nobody listens on, away from where people put their servers."""
    port = ports.next_free(HOST, 18_000 + os.getpid() % 1000, 1)
    if port is None:
        raise BenchError("found no free port")
    return port


def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body of a page of a server under test; status 0 for no answer."""
    return asyncio.run(probe.get(HOST, port, path))


def cpu_s(process: psutil.Process) -> float:
    """User and system time of a process so far, all its threads together."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    # That is rounded to 10 ms; the other account is not, but forgets threads that have ended.
    threads = Path(f"/proc/{process.pid}/task").glob("*/schedstat")
    return max(float(times.user + times.system), sum(map(_run_s, threads)))


def main_thread_cpu_s(process: psutil.Process) -> float:
    """The same of its main thread alone; 0 where the system does not tell."""
    return _run_s(Path(f"/proc/{process.pid}/task/{process.pid}/schedstat"))


def memory_mb(processes: Iterable[psutil.Process]) -> float:
    """Resident memory together in MiB; what several share counts once where the system tells."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            info = process.memory_full_info()
            total += getattr(info, "pss", info.rss)
    return total / 2**20


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started, directly or not."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _run_s(schedstat: Path) -> float:
    """The kernel's account of one thread; 0 where it keeps none."""
    with contextlib.suppress(OSError):
        return int(schedstat.read_text().split()[0]) / 1e9
    return 0.0
