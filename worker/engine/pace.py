"""How much of a long prompt a step may read while others generate.

Those who generate wait for every step. A step of a full budget takes several times as long as one
that only generates, and a prompt of thousands of tokens needs dozens of them. So a long prompt is
read in pieces that make a step take about twice as long, by what steps have cost of late.
"""

from __future__ import annotations

from typing import Final

LONG_ROWS: Final = 768
"""A prompt with more rows to compute is long. What takes a few full steps is over before a
pace would matter, and a slower start would cost tokens where many short prompts come and go."""

_SHARE: Final = 0.7
"""Of a step that only generates: what a piece may add to it. Not 1, as costs vary from step to step
and the slowest of a hundred steps is to stay below twice its time without the prompt."""

_TILE: Final = 16
"""Matrices are multiplied by so many rows at once, so a step's rows fill whole tiles. Beside one
stream, at the end of 4,000 tokens, 15 rows took 38 ms and 8 took 33."""

_LEAST: Final = 8
"""Rows of a piece at least, or a long prompt would take forever beside a fast model."""

_DECODE_WEIGHT: Final = 0.1
_MUCH_FASTER_WEIGHT: Final = 0.5
"""Of a step that only generates. The first ones are slow, or another process went away."""

_ROW_WEIGHT: Final = 0.25
_FULL_PIECE: Final = 16
"""From so many rows on a step tells all it can about the cost of one."""

_CREDIBLE: Final = 2.0
"""A cost counts as at most so many times the known one: another process had the processor."""


class Pace:
    """What steps cost, and what follows for long prompts. Fed with times; has no clock itself."""

    def __init__(self) -> None:
        """Knows nothing, so limits nothing."""
        # Seconds of a step that only generates, by the bit length of how many.
        self._decode_s: dict[int, float] = {}
        self._row_s = 0.0

    def observe(self, generating: int, rows: int, seconds: float) -> None:
        """Learns from a step.

        Args:
            generating: sequences with a single row.
            rows: of prompts, beside those.
            seconds: that the step took.
        """
        if rows == 0:
            size = generating.bit_length()
            known = self._decode_s.get(size)
            is_much_faster = known is not None and seconds < known / _CREDIBLE
            weight = _MUCH_FASTER_WEIGHT if is_much_faster else _DECODE_WEIGHT
            self._decode_s[size] = _mixed(known, seconds, weight)
            return
        row_s = max(0.0, seconds - (self._decode(generating) or 0.0)) / rows
        weight = _ROW_WEIGHT * min(1.0, rows / _FULL_PIECE)
        self._row_s = _mixed(self._row_s or None, row_s, weight)

    def rows(self, generating: int, budget: int) -> int:
        """Most rows of long prompts in a step beside so many sequences that generate.

        Args:
            generating: how many.
            budget: the answer while nobody waits, or nothing is known yet.
        """
        decode_s = self._decode(generating)
        if not generating or decode_s is None or not self._row_s:
            return budget
        tiles = (generating + int(_SHARE * decode_s / self._row_s)) // _TILE
        return max(tiles, -(-(generating + _LEAST) // _TILE)) * _TILE - generating

    def _decode(self, generating: int) -> float | None:
        """Seconds of a step that only generates, from those of the most similar size."""
        if not self._decode_s:
            return None
        size = generating.bit_length()
        return self._decode_s[min(self._decode_s, key=lambda known: (abs(known - size), known))]


def _mixed(known: float | None, fresh: float, weight: float) -> float:
    """An exponentially weighted mean."""
    if known is None:
        return fresh
    return known + weight * (min(fresh, _CREDIBLE * known) - known)
