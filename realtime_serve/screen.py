"""What `up` and its helpers tell the person in front of the terminal: one plain line a step."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Screen:
    """Prints steps with the seconds since the start; a growing number is redrawn on terminals only.

    Args:
        stream: where to print; stdout by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._redraws = self._stream.isatty()
        self._started = time.monotonic()
        self._width = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since this screen was made."""
        return time.monotonic() - self._started

    def step(self, text: str) -> None:
        """One line that stays."""
        self._print(f"[{self.elapsed_s:5.1f} s] {text}", end="\n")

    def text(self, text: str) -> None:
        """Lines without a time."""
        self._print(text, end="\n")

    def update(self, text: str) -> None:
        """A line that the next one replaces; on anything but a terminal it is left out."""
        if self._redraws:
            self._print(f"[{self.elapsed_s:5.1f} s] {text}", end="\r")

    def _print(self, text: str, end: str) -> None:
        padding = " " * max(0, self._width - len(text)) if self._redraws else ""
        self._width = len(text) if end == "\r" else 0
        # A terminal that is gone, or a closed pipe behind us, must not keep us from stopping well.
        try:
            self._stream.write(text + padding + end)
            self._stream.flush()
        except OSError:
            self._redraws = False
