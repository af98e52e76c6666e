"""Modules of the benchmark that run in a process of their own: lines of text in, lines out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.figures import BenchError
from realtime_serve.lifeline import Lifeline

T = TypeVar("T")


class Companion:
    """A module of ours in a process of its own: a line of JSON in, lines out.

    Args:
        module: to run.
        nice: how far it steps back.
        python: interpreter to run it with; one of another environment has other packages.
        env: of the process; None: this one's.
    """

    def __init__(
        self,
        module: str,
        *,
        nice: int = 0,
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._module = module
        self._lifeline = Lifeline()
        self._process = subprocess.Popen(
            self._lifeline.command([python, "-m", module], nice),
            env=env,
            pass_fds=self._lifeline.fds,
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        """Of the process, or of what wraps it."""
        return self._process.pid

    def say(self, value: Any) -> None:
        """Sends a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def hear(self, within_s: float, read: Callable[[str], T]) -> T:
        """The next line, read by `read` at once when it comes.

        Raises:
            BenchError: none came in time, or one that says what failed.
        """
        assert self._process.stdout is not None
        timer = threading.Timer(within_s, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
            whole = line.endswith("\n")
            failed = line.startswith('{"failed"')
            if whole and not failed:
                return read(line)
        finally:
            timer.cancel()
        if whole:
            raise BenchError(f"{self._module}: {json.loads(line)['failed']}")
        self._process.kill()
        status = self._process.wait()
        raise BenchError(f"{self._module} ended with {status} or was silent for {within_s:.0f} s")

    def __enter__(self) -> Companion:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._lifeline.close()


def answer(line: str) -> None:
    """The other side: a line for the process that started this one."""
    data = memoryview(line.encode() + b"\n")
    # Python's own stream, when it is unbuffered, loses what a single write does not take.
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]
