"""Native libraries for tests: compiled once, kept between runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from worker.engine.native.build import LEVELS as _ALL
from worker.engine.native.build import NativeUnavailable, best_level, library

DATA_DIR = Path(__file__).parents[2] / "build"
FOLDER = DATA_DIR / "native"
"""Where an engine with that data_dir keeps its libraries, too."""


def _levels() -> list[str]:
    try:
        best = best_level()
    except NativeUnavailable:
        return []
    names = list(_ALL)
    return names[names.index(best) :]


LEVELS = _levels()
"""What this processor has, best first."""


def share_libraries(data: Path) -> None:
    """Makes a data folder whose engines find what is compiled here, and compile into it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    data.mkdir()
    (data / "native").symlink_to(FOLDER)


def native_library(level: str, extra: Sequence[Path] = ()) -> Path:
    """The library of a level."""
    return library(level, FOLDER, extra)
