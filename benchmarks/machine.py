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


def describe(server: str) -> dict[str, Any]:
    """CPU, cores, memory, load so far, and versions.

    Args:
        server: the Redis-compatible server in words.
    """
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
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
            useful = [
                flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in known
            ]
            return f"{named[1]} ({', '.join(useful)})" if useful else named[1]
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
