"""The machine under test, as far as it matters for the figures."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("torch", "transformers", "aiohttp", "uvloop", "redis", "hiredis", "msgspec")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Instructions that decide how fast a model runs on a CPU."""


def describe(server: str) -> dict[str, Any]:
    """CPU, cores, memory, load so far, and versions.

    Args:
        server: the Redis-compatible server in words.
    """
    return {
        "cpu": _cpu(),
        "cores": _cores(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "server": server,
        "packages": _versions(),
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        if named := re.search(r"^model name\s*:\s*(.*)$", text, re.M):
            flags = re.search(r"^flags\s*:\s*(.*)$", text, re.M)
            known = set(flags[1].split()) if flags else set()
            useful = [flag for flag in _FLAGS if flag in known]
            return f"{named[1]} ({', '.join(useful)})" if useful else named[1]
    return platform.processor() or platform.machine()


def _cores() -> int | None:
    """Those that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
