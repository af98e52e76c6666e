"""How much memory a process on the CPU may still take."""

from __future__ import annotations

import os
import re
from pathlib import Path


def free_bytes(root: Path = Path("/")) -> int:
    """What the machine has left, or the container if that is less.

    Args:
        root: where proc and sys are.
    """
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        # No Linux: what is free is not told, half of it all is a guess.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    machine = int(found[1]) << 10 if found else 0
    group = root / "sys/fs/cgroup"
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        # Files that were read count as used, until somebody needs the memory.
        stat = (group / "memory.stat").read_text()
    except (OSError, ValueError):
        return machine  # No limit: there is no file, or it says "max".
    files = re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)
    return max(0, min(machine, limit - used + (int(files[1]) if files else 0)))
