"""The page of `benchmarks.engine`: who reached what, ours against theirs, and the limit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.contenders import ALONE, CLUSTER
from benchmarks.figures import Rounds
from benchmarks.limits import Machine, Shape, serving_limit
from benchmarks.load import Load
from benchmarks.report import raw
from benchmarks.tables import machine_words, number, speed, table


@dataclass(slots=True)
class Start:
    """How one contender came up.

    Attributes:
        first_token_s: from the start of its process to its first token.
        says: prompt and greedy answer: whether it computes the model at all.
        dtype: that it computes in; "none" where it does not tell.
        memory_mb: the most that was resident after a load.
    """

    first_token_s: float
    says: str
    dtype: str = "none"
    memory_mb: float = 0.0


@dataclass(slots=True)
class EngineReport:
    """Everything that one run found out.

    Attributes:
        machine: see `benchmarks.machine`. model: its name. count: of rounds.
        http: by contender, whether it is asked over HTTP.
        rounds: by load and contender. starts: by contender. skipped: by contender, why.
        versions: of the rivals' packages. limit, shape: of the machine and the model, if there is.
    """

    machine: dict[str, Any]
    model: str
    count: int
    http: dict[str, bool]
    rounds: dict[tuple[Load, str], Rounds] = field(default_factory=dict)
    starts: dict[str, Start] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    limit: Machine | None = None
    shape: Shape | None = None

    def markdown(self) -> str:
        """The page."""
        parts = [
            "# What the engine reaches",
            "Written by `python -m benchmarks.engine`. " + machine_words(self.machine),
            self._limits(),
            f"Model {self.model}. Each stream is a client that sends its next request when the "
            "last has been answered; prompts of exact lengths, no two alike; every answer has its "
            f"full length. Rounds: {self.count}, in each of which all are measured in turn; "
            "medians of them, with the slowest and the fastest. Ours / theirs is the median of "
            "the rounds' ratios, with the least and the greatest: the cluster against servers, "
            "the engine alone against what runs in process.",
        ]
        for title, loads in self._groups():
            parts += [f"## {title}", self._table(loads)]
        if cost := self._sampling_cost():
            parts += ["## What sampling costs", cost]
        parts += [
            "## Start and memory",
            "From the start of the process to its first token; of the second start, when caches "
            "are warm, but for runs with --one-start. Resident memory, the most after a load, "
            "shared pages counted once.",
            table(
                ("", "dtype", "first token after, s", "memory, MiB", "greedy, it says"),
                [
                    (
                        name,
                        s.dtype.replace("none", ""),
                        f"{s.first_token_s:.1f}",
                        number(s.memory_mb),
                        repr(s.says),
                    )
                    for name, s in self.starts.items()
                ],
            ),
            "\n".join(f"- {name}: {why}" for name, why in self.skipped.items()),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def json(self) -> str:
        """All of it."""
        return json.dumps(
            {
                "machine": self.machine,
                "limit": dataclasses.asdict(self.limit) if self.limit else None,
                "model": self.model,
                "versions": self.versions,
                "starts": {name: dataclasses.asdict(s) for name, s in self.starts.items()},
                "skipped": self.skipped,
                "measured": [
                    {
                        "name": name,
                        "load": dataclasses.asdict(load),
                        "limit_tokens_per_s": self.limit_of(load),
                        **raw(rounds),
                    }
                    for (load, name), rounds in self.rounds.items()
                ],
            },
            indent=1,
        )

    def limit_of(self, load: Load) -> float | None:
        """Tokens a second that the machine allows under a load, if it was measured."""
        if self.limit is None or self.shape is None:
            return None
        return serving_limit(self.limit, self.shape, load)

    def of_load(self, load: Load) -> dict[str, Rounds]:
        """By contender, in the order in which they were measured."""
        return {name: rounds for (each, name), rounds in self.rounds.items() if each == load}

    def _limits(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        words = f"Others: {versions}. " if versions else ""
        if self.limit is None:
            return words
        return (
            f"{words}Measured between the loads, the best of each: "
            f"{self.limit.bytes_per_s / 1e9:.1f} GB/s read by torch.sum, "
            f"{self.limit.flops / 1e12:.2f} TFLOP/s of matrix products. The limit of a load is "
            "what these allow: each step reads the weights and every stream's keys and values "
            "once, and every prompt is computed."
        )

    def _groups(self) -> Iterator[tuple[str, list[Load]]]:
        groups: dict[str, list[Load]] = {}
        for load, _ in self.rounds:
            how = (
                f"temperature {load.temperature:g}, top_p {load.top_p:g}"
                if load.temperature
                else "greedy"
            )
            title = f"Prompt {load.prompt_tokens}, output {load.output_tokens}, {how}"
            loads = groups.setdefault(title, [])
            if load not in loads:
                loads.append(load)
        yield from groups.items()

    def _table(self, loads: list[Load]) -> str:
        head = ["streams", "", "tokens/s", "of the limit", "ttft p50 ms"]
        head += ["gap p50 ms", "gap p95", "gap p99", "ours / theirs"]
        rows: list[tuple[object, ...]] = []
        for load in loads:
            limit, measured = self.limit_of(load), self.of_load(load)
            for name, rounds in measured.items():
                rows.append(
                    (
                        load.streams,
                        name if self.http[name] else f"{name}, in process",
                        speed(rounds),
                        f"{rounds.tokens_per_s / limit:.0%}" if limit else "",
                        number(rounds.ttft_ms()[0]),
                        *map(number, rounds.gap_ms()),
                        self._ratio(name, measured),
                    )
                )
            if limit:
                rows.append((load.streams, "*the machine's limit*", f"{limit:,.0f}", *[""] * 6))
        return table(head, rows)

    def _ratio(self, name: str, measured: dict[str, Rounds]) -> str:
        if name in (ALONE, CLUSTER):
            return ""
        ours = measured.get(CLUSTER if self.http[name] else ALONE)
        return _ratios(ours, measured[name]) if ours else ""

    def _sampling_cost(self) -> str:
        rows = []
        for (load, name), sampled in self.rounds.items():
            greedy = dataclasses.replace(load, temperature=0.0, top_p=1.0)
            if load.temperature and (base := self.rounds.get((greedy, name))):
                rows.append((load.streams, name, _ratios(sampled, base)))
        return table(("streams", "", "sampled / greedy, tokens/s"), rows)


def _ratios(ours: Rounds, theirs: Rounds) -> str:
    """Pair by pair; a contender that failed in a later round has fewer."""
    pairs = zip(ours.runs, theirs.runs, strict=False)
    found = [one.tokens_per_s / other.tokens_per_s for one, other in pairs]
    middle = f"{median(found):.2f}"
    return middle if len(found) == 1 else f"{middle} ({min(found):.2f}-{max(found):.2f})"
