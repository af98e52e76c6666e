"""Whether a TCP port is free, and who holds it if not."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now.

    Raises:
        OSError: for another reason: the host has no such address, or the port needs root.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as sock:
        # As servers do, so that connections of an earlier one that are still closing do not count.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            sock.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def next_free(host: str, port: int, count: int) -> int | None:
    """The first port above `port` from which on `count` are free, within the next hundred."""
    for first in range(port + 1, min(port + 100, 65536 - count)):
        if all(is_free(host, first + offset) for offset in range(count)):
            return first
    return None


def holder(port: int) -> str:
    """Who listens on `port`, for people: process id and command line as far as can be seen."""
    pid = _pid_from_proc(port) or _pid_from_lsof(port)
    if pid is None:
        return "a process that this user cannot see"
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        command = b" ".join(words).decode(errors="replace").strip()
        return f"pid {pid}: {command[:200]}"
    told = _output("ps", "-o", "command=", "-p", str(pid)).strip()
    return f"pid {pid}: {told[:200]}" if told else f"pid {pid}"


def _pid_from_proc(port: int) -> int | None:
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not sockets:
        return None
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if str(link.readlink()) in sockets:
                return int(link.parts[2])
    return None


def _listening_inodes(port: int) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == _LISTEN and int(words[1].rpartition(":")[2], 16) == port:
                    yield words[9]


def _pid_from_lsof(port: int) -> int | None:
    told = re.search(
        r"^p(\d+)$", _output("lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fp"), re.M
    )
    return int(told[1]) if told else None


def _output(program: str, *args: str) -> str:
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        asked = subprocess.run(
            [path, *args], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return asked.stdout
