"""The parent's side of realtime_serve/child.py: commands whose process ends when this one does."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from realtime_serve import child


class Lifeline:
    """Ties child processes to the life of this process, however it ends.

    Args:
        use_pipe: by a pipe instead of by the kernel; the default is what the system offers.
    """

    def __init__(self, use_pipe: bool = sys.platform != "linux") -> None:
        # Python opens pipes so that they close on exec: nobody else ever holds the writing end.
        self._read, self._write = os.pipe() if use_pipe else (-1, -1)

    def command(self, argv: Sequence[str], nice: int = 0) -> list[str]:
        """The command to start instead of `argv`, with `pass_fds=lifeline.fds`.

        It must be started from this process, on Linux from a thread that lives as long.
        """
        script = str(Path(child.__file__))
        facts = [str(nice), str(os.getpid()), str(self._read)]
        return [sys.executable, "-I", "-S", script, *facts, *argv]

    @property
    def fds(self) -> tuple[int, ...]:
        """The files that a started command needs."""
        return (self._read,) if self._read >= 0 else ()

    def close(self) -> None:
        """End whatever still runs and hangs on the pipe; without a pipe this does nothing."""
        for descriptor in (self._write, self._read):
            if descriptor >= 0:
                os.close(descriptor)
        self._read = self._write = -1

    def __enter__(self) -> Lifeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
