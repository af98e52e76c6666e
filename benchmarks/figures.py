"""What is measured, as plain data: one run of a load, and rounds of it taken together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median


class BenchError(Exception):
    """A measurement failed; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One run of a load.

    Attributes:
        tokens: generated in all counted requests.
        seconds: from the first request to the last answer.
        cpu_s: CPU time in these seconds, by process.
        ttft_ms: one for each request. gap_ms: one for each token after the first.
    """

    tokens: int
    seconds: float
    cpu_s: dict[str, float] = field(default_factory=dict)
    ttft_ms: list[float] = field(default_factory=list)
    gap_ms: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second."""
        return self.tokens / self.seconds


@dataclass(slots=True)
class Rounds:
    """The same load several times."""

    runs: list[Figures] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """The median round."""
        return median(run.tokens_per_s for run in self.runs)

    @property
    def spread(self) -> tuple[float, float]:
        """The slowest and the fastest round."""
        speeds = [run.tokens_per_s for run in self.runs]
        return min(speeds), max(speeds)

    @property
    def requests(self) -> int:
        """Counted requests of all rounds."""
        return sum(len(run.ttft_ms) for run in self.runs)

    def ttft_ms(self) -> tuple[float, float, float]:
        """p50, p95, p99 over all rounds."""
        return percentiles([value for run in self.runs for value in run.ttft_ms])

    def gap_ms(self) -> tuple[float, float, float]:
        """p50, p95, p99 over all rounds."""
        return percentiles([value for run in self.runs for value in run.gap_ms])

    def cpu_us_a_token(self) -> dict[str, float]:
        """By process: microseconds of CPU time for each token, over all rounds."""
        tokens = sum(run.tokens for run in self.runs)
        names = {name: None for run in self.runs for name in run.cpu_s}
        return {
            name: 1e6 * sum(run.cpu_s.get(name, 0.0) for run in self.runs) / tokens
            for name in names
        }


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p50, p95 and p99, each a value that occurred; NaN without values."""
    if not values:
        return math.nan, math.nan, math.nan
    ordered = sorted(values)
    p50, p95, p99 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95, 0.99))
    return p50, p95, p99
