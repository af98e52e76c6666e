"""Starts a program that must not outlive its parent: `child.py NICE PARENT FD PROGRAM [ARGS]`.

On Linux the kernel does it: this script asks for SIGKILL at the parent's death and becomes the
program. Elsewhere it stays as a small wrapper that kills the program when the pipe FD, whose other
end only the parent holds, is closed. Only the standard library, so that it starts in milliseconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Run the program and give back its exit status, unless this process becomes the program."""
    nice, parent, pipe = (int(text) for text in argv[:3])
    program = argv[3:]
    os.nice(nice)
    if pipe < 0:
        _die_with(parent)
        os.execvp(program[0], program)
    return _watch(pipe, program)


def _die_with(parent: int) -> None:
    # ctypes.CDLL(None) finds prctl in glibc and in musl alike.
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # It died before the call above.
        os._exit(1)


def _watch(pipe: int, program: list[str]) -> int:
    child = subprocess.Popen(program, close_fds=False)

    def kill_at_end_of_file() -> None:
        os.read(pipe, 1)
        child.kill()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: child.send_signal(received))
    threading.Thread(target=kill_at_end_of_file, daemon=True).start()
    status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
