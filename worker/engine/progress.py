"""Progress of a slow start as log lines, few enough to read."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

_EVERY_S: Final = 1.0


class ProgressLog:
    """A progress callback that logs the start and the end of each thing, and once a second between.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._what = ""
        self._at = 0.0

    def __call__(self, what: str, share: float) -> None:
        """Logs what is being done and how much of it is done."""
        now = self._clock()
        if what == self._what and share < 1 and now - self._at < _EVERY_S:
            return
        self._what, self._at = what, now
        log.info(what, extra={"done": f"{share:.0%}"})
