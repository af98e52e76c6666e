"""Keeps processes running: each is started again after a crash, with a growing delay."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from realtime_serve.lifeline import Lifeline

CONFIG_ERROR = 2
"""Exit status of a process whose settings are wrong: starting it again would not help."""

_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 30.0
_STEADY_S = 60.0
_EARLY_CRASHES = 3


@dataclass(frozen=True, slots=True)
class Program:
    """What to run.

    Attributes:
        name: for people, as in "worker-0".
        argv: the command.
        env: its whole environment.
        nice: how far it steps back behind the engines' threads.
        keep_fds: open files to pass on.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    nice: int = 0
    keep_fds: tuple[int, ...] = ()


class Child:
    """One supervised process, in a session of its own so that Ctrl-C reaches only its parent.

    Args:
        program: what to run.
        lifeline: ties it to this process.
        report: is told of every crash.
        give_up: is told, once, why the process will not be started again.
    """

    def __init__(
        self,
        program: Program,
        lifeline: Lifeline,
        report: Callable[[str], None],
        give_up: Callable[[str], None],
    ) -> None:
        self.program = program
        self._lifeline = lifeline
        self._report = report
        self._give_up = give_up
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._settled = False
        self._crashes = 0

    def settle(self) -> None:
        """It has once been up: from now on a crash is never a reason to give up."""
        self._settled = True

    async def run(self) -> None:
        """Start the process and start it again, until `stop` or until it is given up."""
        delay_s = _FIRST_DELAY_S
        while not self._stopping.is_set():
            started = time.monotonic()
            status = await self._run_once()
            if self._stopping.is_set():
                return
            if reason := self._hopeless(status):
                self._give_up(f"{self.program.name} {reason}; its last lines above say why")
                return
            if time.monotonic() - started > _STEADY_S:
                delay_s = _FIRST_DELAY_S
            how = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with {status}"
            self._report(f"{self.program.name} {how}, starting it again in {delay_s:.0f} s")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._stopping.wait()
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

    async def stop(self, grace_s: float) -> bool:
        """Ask it to end, and kill it after the grace time; False if it had to be killed."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return True
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
            self.kill()
            await process.wait()
            return False
        return True

    def kill(self) -> None:
        """End the process and whatever it started, at once."""
        self._stopping.set()
        if self._process is not None and self._process.returncode is None:
            _kill_group(self._process.pid)

    async def _run_once(self) -> int:
        process = await asyncio.create_subprocess_exec(
            *self._lifeline.command(self.program.argv, self.program.nice),
            env=self.program.env,
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(*self._lifeline.fds, *self.program.keep_fds),
            start_new_session=True,
        )
        self._process = process
        try:
            # A stop that came while it was being started has not reached it.
            if self._stopping.is_set():
                process.send_signal(signal.SIGTERM)
            return await process.wait()
        finally:
            # Also what it left behind, and itself when this task is cancelled.
            _kill_group(process.pid)

    def _hopeless(self, status: int) -> str | None:
        if self._settled:
            return None
        self._crashes += 1
        if status == CONFIG_ERROR:
            return "cannot start"
        if self._crashes >= _EARLY_CRASHES:
            return f"crashed {self._crashes} times before it was ready"
        return None


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
