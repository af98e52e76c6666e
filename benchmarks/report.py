"""The report: tables in Markdown for people, all figures in JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.figures import Rounds
from benchmarks.tables import machine_words, number, speed, table

_PROCESSES = ("server", "gateway", "worker loop", "worker engine", "control", "client")


@dataclass(slots=True)
class Report:
    """Everything that one run found out.

    Attributes:
        machine: see `benchmarks.machine`. model: the engine and what it ran, in words.
        load: what was asked, in words.
        alone: the engine alone, by streams. cluster: the whole of it over HTTP, by streams.
        transport: the cluster with the echo engine, by step in ms and streams.
        starts_s: how long each part took to start.
    """

    machine: dict[str, Any]
    model: str
    load: str
    alone: dict[int, Rounds] = field(default_factory=dict)
    cluster: dict[int, Rounds] = field(default_factory=dict)
    transport: dict[tuple[float, int], Rounds] = field(default_factory=dict)
    starts_s: dict[str, float] = field(default_factory=dict)

    def markdown(self) -> str:
        """The page."""
        parts = [
            "# What the cluster costs",
            "Written by `make bench`. " + machine_words(self.machine),
            f"{self.model} {self.load}".strip(),
        ]
        if self.cluster:
            parts += [
                "## The engine alone, and the cluster over HTTP",
                "Measured in turns; medians of the rounds, with the slowest and the fastest.",
                self._tax(),
                "Time to the first token, and between tokens, as the client sees it (ms):",
                _latency_table(("streams",), (((n,), r) for n, r in self.cluster.items())),
                "CPU time for each token (us):",
                _cpu_table(("streams",), [((n,), r) for n, r in self.cluster.items()]),
            ]
        if self.transport:
            rows = [((f"{step:g} ms", n), r) for (step, n), r in self.transport.items()]
            parts += [
                "## The transport alone: the echo engine",
                "A step of the engine costs its sleep and nothing else; with 0 ms it is what the "
                "transport carries when nothing but itself holds it back.",
                _latency_table(("step", "streams"), rows),
                "CPU time for each token (us):",
                _cpu_table(("step", "streams"), rows),
            ]
        starts = ", ".join(f"{name} {s:.1f} s" for name, s in self.starts_s.items())
        parts.append(f"Start until ready: {starts}.")
        return "\n\n".join(part for part in parts if part) + "\n"

    def json(self) -> str:
        """All of it."""
        return json.dumps(
            {
                "machine": self.machine,
                "model": self.model,
                "load": self.load,
                "alone": [{"streams": n, **raw(r)} for n, r in self.alone.items()],
                "cluster": [{"streams": n, **raw(r)} for n, r in self.cluster.items()],
                "transport": [
                    {"step_ms": step, "streams": n, **raw(r)}
                    for (step, n), r in self.transport.items()
                ],
                "starts_s": self.starts_s,
            },
            indent=1,
        )

    def _tax(self) -> str:
        rows = []
        for streams, cluster in self.cluster.items():
            alone = self.alone[streams]
            pairs = zip(alone.runs, cluster.runs, strict=True)
            ratios = [ours.tokens_per_s / bare.tokens_per_s for bare, ours in pairs]
            rows.append(
                (
                    streams,
                    speed(alone),
                    speed(cluster),
                    f"{cluster.tokens_per_s / alone.tokens_per_s:.2f} "
                    f"({min(ratios):.2f}-{max(ratios):.2f})",
                )
            )
        return table(
            ("streams", "engine alone, tokens/s", "cluster, tokens/s", "cluster / alone"), rows
        )


def _latency_table(keys: Sequence[str], rows: Iterable[tuple[tuple[object, ...], Rounds]]) -> str:
    head = (
        *keys,
        "tokens/s",
        *(f"ttft {p}" for p in ("p50", "p95", "p99")),
        *(f"gap {p}" for p in ("p50", "p95", "p99")),
        "requests",
    )
    return table(
        head,
        [
            (
                *key,
                speed(rounds),
                *map(number, (*rounds.ttft_ms(), *rounds.gap_ms())),
                rounds.requests,
            )
            for key, rounds in rows
        ],
    )


def _cpu_table(keys: Sequence[str], rows: Sequence[tuple[tuple[object, ...], Rounds]]) -> str:
    lines = []
    for key, rounds in rows:
        cpu = rounds.cpu_us_a_token()
        lines.append((*key, *(number(cpu.get(name, math.nan)) for name in _PROCESSES)))
    return table((*keys, *_PROCESSES), lines)


def raw(rounds: Rounds) -> dict[str, Any]:
    """All figures of some rounds, for JSON."""
    names = ("p50", "p95", "p99")
    ttft, gap = (
        {k: None if math.isnan(v) else v for k, v in zip(names, values, strict=True)}
        for values in (rounds.ttft_ms(), rounds.gap_ms())
    )
    return {
        "tokens_per_s": rounds.tokens_per_s,
        "ttft_ms": ttft,
        "gap_ms": gap,
        "requests": rounds.requests,
        "cpu_us_a_token": rounds.cpu_us_a_token(),
        "rounds": [
            {key: value for key, value in dataclasses.asdict(run).items() if key != "gap_ms"}
            for run in rounds.runs
        ],
    }
