"""Tables in Markdown, and how figures are written in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks.figures import Rounds


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; "" without rows."""
    lines = [list(head), ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    if len(lines) == 2:
        return ""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed(rounds: Rounds) -> str:
    """Tokens a second: the median round, with the slowest and the fastest."""
    low, high = rounds.spread
    middle = f"{rounds.tokens_per_s:,.0f}"
    return middle if len(rounds.runs) == 1 else f"{middle} ({low:,.0f}-{high:,.0f})"


def number(value: float) -> str:
    """Three digits; "" for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def machine_words(machine: dict[str, object]) -> str:
    """What `benchmarks.machine` found out, as a sentence."""
    packages = machine["packages"]
    load = machine["load_before"]
    assert isinstance(packages, dict)
    assert isinstance(load, list)
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GiB, "
        f"{machine['system']}; load before the start {load[0]:.2f}. "
        f"Python {machine['python']}, {machine['server']}, {versions}."
    )
