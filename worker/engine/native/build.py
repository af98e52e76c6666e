"""Compiles the native backend with the system's compiler, once for each source and processor."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).parent / "source"

BUILT: Final = Path(__file__).parent / "built"
"""Libraries that an image brings along, where there is no compiler; else it is not there."""

_COMMON: Final = [
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]
_AVX512: Final = [
    *("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
]

LEVELS: Final = {
    "amx": [*_AVX512, "-mamx-tile", "-mamx-bf16"],
    "avx512_bf16": _AVX512,
    "avx2": ["-mavx2", "-mfma"],
}
"""What the processor must have, best first, and what tells the compiler so."""

_NEEDS: Final = {
    "amx": {"amx_tile", "amx_bf16", "avx512_bf16", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512_bf16", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma"},
}
"""Names in /proc/cpuinfo."""

_TIMEOUT_S: Final = 300


class NativeUnavailable(Exception):
    """The native backend cannot be used here; the message says why."""


def best_level(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The best of LEVELS that this processor has.

    Raises:
        NativeUnavailable: it has none, or this is no Linux on x86-64.
    """
    _refuse_other_machines()
    try:
        found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError as error:
        raise NativeUnavailable(f"{cpuinfo} cannot be read") from error
    flags = set(found[1].split()) if found else set()
    for level in LEVELS:
        if _NEEDS[level] <= flags:
            return level
    raise NativeUnavailable("this processor has no AVX2")


def _refuse_other_machines() -> None:
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise NativeUnavailable(f"it is for Linux on x86-64, not {platform.platform(terse=True)}")


def library(level: str, folder: Path, extra: Sequence[Path] = ()) -> Path:
    """The compiled backend for a level, from the folder, or compiled into it.

    Args:
        level: one of LEVELS.
        folder: for compiled libraries. Their names hold a hash of the sources and the flags, so
            several versions can share it. What is in BUILT is taken from there.
        extra: sources that are compiled with it.

    Raises:
        NativeUnavailable: there is no compiler, or it fails.
    """
    name = _name(level, extra)
    path = folder / name
    for there in (BUILT / name, path):
        if there.is_file():
            return there
    sources = [*sorted(SOURCE.glob("*.cpp")), *extra]
    _compile(_compiler(), [*_COMMON, *LEVELS[level], f"-I{SOURCE}", *map(str, sources)], path)
    return path


def _name(level: str, extra: Sequence[Path]) -> str:
    digest = hashlib.sha256(" ".join([*_COMMON, *LEVELS[level]]).encode())
    for path in [*sorted(SOURCE.iterdir()), *extra]:
        digest.update(path.name.encode() + path.read_bytes())
    return f"native-{level}-{digest.hexdigest()[:16]}.so"


def _compiler() -> str:
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise NativeUnavailable(
        f"there is no C++ compiler: {f'CXX is {chosen}' if chosen else 'apt install g++'}"
    )


def _compile(compiler: str, arguments: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Workers that start together compile side by side; the last one wins, all are the same.
    with tempfile.TemporaryDirectory(prefix="native-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *arguments, "-o", str(made)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeUnavailable(f"{compiler} does not run: {error}") from error
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            why = (lines or done.stderr.splitlines() or ["no message"])[0]
            raise NativeUnavailable(f"{compiler} failed: {why}")
        made.replace(path)


def main(folder: str) -> None:
    """Compile every level into a folder, for an image that runs on any processor.

    On machines that the backend is not for the folder stays empty: workers take the reference.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        _refuse_other_machines()
    except NativeUnavailable as why:
        sys.stdout.write(f"no native backend: {why}\n")
        return
    for level in LEVELS:
        library(level, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
