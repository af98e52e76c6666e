"""The report: tables in Markdown for people, all figures in JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.figures import Rounds

_PROCESSES = ("server", "gateway", "worker loop", "worker engine", "control", "client")


@dataclass(slots=True)
class Report:
    """Everything that one run found out.

    Attributes:
        machine: see `benchmarks.machine`. model: the engine and what it ran, in words.
        load: what was asked, in words.
        alone: the engine alone, by streams. cluster: the whole of it over HTTP, by streams.
        transport: the cluster with the echo engine, by step in ms and streams.
        rivals: by name and streams. skipped: by name, why.
        starts_s: how long each part took to start.
    """

    machine: dict[str, Any]
    model: str
    load: str
    alone: dict[int, Rounds] = field(default_factory=dict)
    cluster: dict[int, Rounds] = field(default_factory=dict)
    transport: dict[tuple[float, int], Rounds] = field(default_factory=dict)
    rivals: dict[tuple[str, int], Rounds] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    starts_s: dict[str, float] = field(default_factory=dict)

    def markdown(self) -> str:
        """The page."""
        parts = [
            "# What the cluster costs",
            "Written by `make bench`. " + self._machine(),
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
        if self.rivals or self.skipped:
            parts += ["## Others, same model, same client, same load, same run", self._others()]
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
                "alone": [{"streams": n, **_raw(r)} for n, r in self.alone.items()],
                "cluster": [{"streams": n, **_raw(r)} for n, r in self.cluster.items()],
                "transport": [
                    {"step_ms": step, "streams": n, **_raw(r)}
                    for (step, n), r in self.transport.items()
                ],
                "rivals": [
                    {"server": name, "streams": n, **_raw(r)}
                    for (name, n), r in self.rivals.items()
                ],
                "skipped": self.skipped,
                "starts_s": self.starts_s,
            },
            indent=1,
        )

    def _machine(self) -> str:
        m = self.machine
        packages = ", ".join(f"{name} {version}" for name, version in m["packages"].items())
        return (
            f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']} GiB, {m['system']}; "
            f"load before the start {m['load_before'][0]:.2f}. Python {m['python']}, "
            f"{m['server']}, {packages}."
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
                    _speed(alone),
                    _speed(cluster),
                    f"{cluster.tokens_per_s / alone.tokens_per_s:.2f} "
                    f"({min(ratios):.2f}-{max(ratios):.2f})",
                )
            )
        return _table(
            ("streams", "engine alone, tokens/s", "cluster, tokens/s", "cluster / alone"), rows
        )

    def _others(self) -> str:
        head = ("server", "streams", "tokens/s", "ttft p50 ms", "gap p50 ms", "ours / theirs")
        rows = []
        for (name, streams), rounds in self.rivals.items():
            ours = self.cluster.get(streams)
            ratio = f"{ours.tokens_per_s / rounds.tokens_per_s:.2f}" if ours else ""
            times = (_number(rounds.ttft_ms()[0]), _number(rounds.gap_ms()[0]))
            rows.append((name, streams, _speed(rounds), *times, ratio))
        skipped = [f"- {name}: not measured, {why}" for name, why in self.skipped.items()]
        return "\n\n".join(part for part in (_table(head, rows), "\n".join(skipped)) if part)


def _latency_table(keys: Sequence[str], rows: Iterable[tuple[tuple[object, ...], Rounds]]) -> str:
    head = (
        *keys,
        "tokens/s",
        *(f"ttft {p}" for p in ("p50", "p95", "p99")),
        *(f"gap {p}" for p in ("p50", "p95", "p99")),
        "requests",
    )
    return _table(
        head,
        [
            (
                *key,
                _speed(rounds),
                *map(_number, (*rounds.ttft_ms(), *rounds.gap_ms())),
                rounds.requests,
            )
            for key, rounds in rows
        ],
    )


def _cpu_table(keys: Sequence[str], rows: Sequence[tuple[tuple[object, ...], Rounds]]) -> str:
    lines = []
    for key, rounds in rows:
        cpu = rounds.cpu_us_a_token()
        lines.append((*key, *(_number(cpu.get(name, math.nan)) for name in _PROCESSES)))
    return _table((*keys, *_PROCESSES), lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [list(head), ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    if len(lines) == 2:
        return ""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _speed(rounds: Rounds) -> str:
    low, high = rounds.spread
    middle = f"{rounds.tokens_per_s:,.0f}"
    return middle if len(rounds.runs) == 1 else f"{middle} ({low:,.0f}-{high:,.0f})"


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _raw(rounds: Rounds) -> dict[str, Any]:
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
