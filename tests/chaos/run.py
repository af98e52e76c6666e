"""`make chaos`: plays every scenario on both servers and writes benchmarks/results/chaos.md."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.synchronize import Semaphore
from pathlib import Path

from cluster import ROOT
from required import REQUIRED

from chaos.catalogue import SCENARIOS
from chaos.play import Row, Scenario, is_excused, play, quantile, seed_of
from chaos.world import LEASE_MS, SERVERS, STEP_MS, find_server

RESULTS = ROOT / "benchmarks" / "results" / "chaos.md"
STREAMS = 10_000
"""Of a run of all scenarios, at least."""
_HEAD = """\
# Chaos

Faults made to happen in a whole cluster of real processes under load; every token of every stream
is compared with what the echo engine must generate, with the log, and with the accounts. Written by
`make chaos`; one row again, with the same streams and faults, if not in the same order of what
runs at once: `make chaos CHAOS_ARGS='--only "gateway SIGKILL" --seed {seed}'`.

- wrong: streams with a token lost, repeated, changed or out of order, without an end or with two;
  requests that ended more or less than once; counters, budgets, leases or keys left over: each play
  ends when every request and log is gone from Redis.
- told: streams that ended with an explicit error where that is the right answer.
- stall: the longest wait for a token of a stream that the fault hit ({hit});
  for faults of Redis counted from when it was back. Replies in one piece have no tokens to time.
  Leases are {lease} ms here, a step of the engine {step} ms.
- recomputed: tokens of prompts and answers that another worker computed again.

{machine}

| fault | times | streams | wrong | told | hit | stall p50 | p99 | max (s) | recomputed |
|---|---|---|---|---|---|---|---|---|---|
"""

_turns: Semaphore
_AGAIN = "Played again later, each on a cluster of its own like all:"


def main() -> int:
    """Exit status 0 when no stream was wrong or too slow and the negative controls found some."""
    given = _parser().parse_args()
    servers = [server for server in given.servers if not _missing(server)]
    for server in set(given.servers) - set(servers):
        print(f"not run: {_missing(server)}")
    chosen = [s for s in SCENARIOS if given.only in s.name]
    rows: dict[str, list[Row]] = {s.name: [] for s in chosen}
    skipped = {s.name: s.missing() for s in chosen if s.missing()}
    began = time.monotonic()
    plays = [(s, server) for s in chosen if s.name not in skipped for server in servers]
    context = get_context("spawn")
    with ProcessPoolExecutor(
        # As many again wait until their keys are gone.
        2 * given.jobs,
        mp_context=context,
        initializer=_share,
        initargs=(context.Semaphore(given.jobs),),
    ) as pool:
        played = pool.map(
            _play,
            [scenario.name for scenario, _ in plays],
            [server for _, server in plays],
            [given.seed] * len(plays),
            [given.rounds] * len(plays),
        )
        for (scenario, server), row in zip(plays, played, strict=True):
            rows[scenario.name].append(row)
            print(_line(scenario, [row]), server, flush=True)
    table = [
        _line(s, rows[s.name])
        if rows[s.name]
        else f"| {s.name} | not run: {skipped[s.name]} | | | | | | | | |"
        for s in chosen
    ]
    good = [r for s in chosen if not s.expect_wrong for r in rows[s.name]]
    wrong = sum(len(row.wrong) for row in good)
    blind = [
        s.name
        for s in chosen
        if s.expect_wrong and not (rows[s.name] and all(row.as_expected for row in rows[s.name]))
    ]
    slow = [
        f"{s.name}: {missed}"
        for s in chosen
        if (missed := s.most_stall.missed([x for row in rows[s.name] for x in row.stalls_s]))
    ]
    streams = sum(row.streams for row in good)
    few = not given.only and streams < STREAMS
    total = (
        f"\n{streams:,} streams outside the controls, {wrong} wrong; {given.rounds} rounds, "
        f"{given.jobs} at once, {(time.monotonic() - began) / 60:.0f} minutes.\n"
    )
    text = _head(given.seed, servers) + "\n".join(table) + "\n" + total
    print(text)
    if given.update:
        RESULTS.write_text(updated(RESULTS.read_text(), table, given.rounds))
    elif not (given.only or few):
        RESULTS.write_text(text)
    for name in blind:
        print(f"the negative control found nothing: {name}")
    for what in slow:
        print(f"too slow: {what}")
    if few:
        print(f"too few streams: {streams:,}, not {STREAMS:,}")
    left_out = [reason for reason in skipped.values() if not is_excused(reason)]
    lacking = left_out or set(given.servers) - set(servers)
    return 1 if wrong or blind or slow or few or (os.environ.get(REQUIRED) and lacking) else 0


def updated(text: str, rows: list[str], rounds: int) -> str:
    """A table with some of its rows played again; says which and how, and counts anew.

    Raises:
        ValueError: there is no such row in it.
    """
    lines = text.splitlines()
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    notes = []
    for name, row in zip(names, rows, strict=True):
        place = [i for i, line in enumerate(lines) if line.startswith(f"| {name} | ")]
        if len(place) != 1:
            raise ValueError(f"the table has no row {name}")
        before = lines[place[0]].split(" | ")
        notes.append(f"{name} ({rounds} rounds; {before[3] if before[3:] else '?'} wrong before)")
        lines[place[0]] = row
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    good = [c for c in cells if c[1].isdigit() and "must be" not in c[3]]
    streams, wrong = (sum(int(c[i]) for c in good) for i in (2, 3))
    total = next(i for i, line in enumerate(lines) if " streams outside the controls, " in line)
    _, rest = lines[total].split(" wrong; ")
    lines[total] = f"{streams:,} streams outside the controls, {wrong} wrong; {rest}"
    again = next((i for i, line in enumerate(lines) if line.startswith(_AGAIN)), None)
    if again is None:
        lines += ["", _AGAIN, *(f"- {note}" for note in notes)]
    else:
        lines += [f"- {note}" for note in notes]
    return "\n".join(lines) + "\n"


def _missing(server: str) -> str:
    try:
        find_server(server)
    except FileNotFoundError as error:
        return str(error)
    return ""


def _share(turns: Semaphore) -> None:
    """Gives a process of the pool what counts the plays that are not at rest."""
    global _turns
    _turns = turns


def _play(name: str, server: str, base: int, rounds: int) -> Row:
    scenario = next(s for s in SCENARIOS if s.name == name)
    seed = seed_of(base, name, server)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, ExitStack() as turn:
        turn.enter_context(_turns)
        try:
            return asyncio.run(
                play(
                    scenario,
                    Path(folder),
                    server=server,
                    seed=seed,
                    rounds=rounds,
                    at_rest=turn.close,
                )
            )
        except Exception as error:
            # The others are still worth playing.
            traceback.print_exc()
            return Row(name, server, seed, wrong=[f"not played to its end: {error!r}"])


def _line(scenario: Scenario, rows: list[Row]) -> str:
    stalls = sorted(s for row in rows for s in row.stalls_s)
    figures = ["", "", ""]
    if stalls and scenario.stalls != "none":
        figures = [f"{quantile(stalls, q):.2f}" for q in (0.5, 0.99, 1.0)]
    wrong = sum(row.as_expected if scenario.expect_wrong else len(row.wrong) for row in rows)
    cells = [
        scenario.name,
        sum(row.faults for row in rows),
        sum(row.streams for row in rows),
        f"{wrong} (must be)" if scenario.expect_wrong else wrong,
        sum(row.told for row in rows),
        len(stalls),
        *figures,
        sum(row.recomputed for row in rows),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _head(seed: int, servers: list[str]) -> str:
    found = [str(find_server(server)) for server in servers]
    machine = (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {platform.system()}, Python "
        f"{platform.python_version()}, {' and '.join(found)}, seed {seed}."
    )
    hit = "moved to another worker, resumed at another gateway, or all that ran"
    return _HEAD.format(seed=seed, hit=hit, lease=LEASE_MS, step=STEP_MS, machine=machine)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--only", default="", help="scenarios whose names contain this")
    parser.add_argument(
        "--update", action="store_true", help="put these rows into the table that is there"
    )
    parser.add_argument("--rounds", type=int, default=5, help="times each fault happens in a play")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="plays at once, beside those that wait for keys to go; they slow each other",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    return parser


if __name__ == "__main__":
    sys.exit(main())
