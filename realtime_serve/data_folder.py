"""The server's data folder, which only one `up` at a time may use."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path


class FolderInUse(Exception):
    """Another process works in the folder; the message names it and the way out."""


class FolderUnusable(Exception):
    """A folder cannot be written; the message names it and the way out."""


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Whatever goes wrong with files in the block is said of `folder`, in one sentence.

    Raises:
        FolderUnusable: it cannot be made or written.
    """
    try:
        yield
    except OSError as error:
        raise FolderUnusable(
            f"{folder} cannot be used ({error.strerror or error}): "
            "set RTS_DATA_DIR to a folder that you can write"
        ) from error


class DataFolder:
    """A server's folder, locked by this process and by the server it starts, whichever ends last.

    Raises:
        FolderInUse: another process holds it.
        FolderUnusable: it cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writable(path):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._take_lock()
        except BaseException:
            os.close(self._lock)
            raise
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    @property
    def fds(self) -> tuple[int, ...]:
        """The lock, to be passed on to the server."""
        return (self._lock,)

    def close(self) -> None:
        """Give up this process's hold."""
        os.close(self._lock)

    def _take_lock(self) -> None:
        # A server whose `up` was killed a moment ago may still be on its way out.
        deadline = time.monotonic() + 2
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip()
                if time.monotonic() > deadline or _is_alive(holder):
                    raise FolderInUse(
                        f"{self.path} is in use by another `up` (pid {holder or 'unknown'}): "
                        "stop that one, or set RTS_DATA_DIR to another folder"
                    ) from None
                time.sleep(0.05)


def _is_alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
