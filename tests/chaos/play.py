"""Scenarios: what each needs, how one is played, and what came of it."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.ledger import Ledger
from chaos.load import SURVIVING, Load, Stream, tally
from chaos.world import LEASE_MS, World
from shared.tasks import end

ROOTLESS = "CHAOS_ROOTLESS"
"""Environment variable: only faults that need root may be left out all the same."""
NOT_ALLOWED = "it needs root that may mount disks and filter packets"
TOKENS_WRONG = r"token \d+ |\d+ of \d+ tokens|its log holds|ended at \d+"
"""What is said of a stream with a token lost, repeated, changed or out of order."""
WINDOW_S = 20.0
"""A stall belongs to a fault when it begins at most so long after it."""


@dataclass
class Stage:
    """What a scenario plays on.

    Attributes:
        rounds: how often it makes its fault happen.
        stack: closes what a scenario opened, after the accounts.
        struck: what shows that the faults really happened.
    """

    world: World
    load: Load
    ledger: Ledger
    rng: random.Random
    rounds: int
    stack: AsyncExitStack
    struck: list[str] = field(default_factory=list)

    def chance(self) -> random.Random:
        """Another one, for what draws in an order that hangs on time."""
        return random.Random(self.rng.getrandbits(62))

    async def each_round(self) -> AsyncIterator[int]:
        """The rounds, by number; each begins with streams under way."""
        for i in range(self.rounds):
            await self.load.under_way()
            yield i

    def proof(self, value: object, what: str) -> None:
        """Says that a fault happened, and how that is known; it is wrong if it did not."""
        self.struck.append(what)
        if not value:
            self.ledger.wrong.append(f"the fault did not happen: {what} is {value!r}")


Act = Callable[[Stage], Awaitable[None]]


@dataclass(frozen=True)
class Stalls:
    """How long the streams that a fault hit may wait for a token, in seconds."""

    p50: float = 4.0
    p99: float = 4.0
    most: float = 4.0

    def missed(self, found: Sequence[float], slack: float = 1.0) -> str:
        """Which of the bounds, each `slack` times as long, does not hold; "" when all do."""
        ordered = sorted(found)
        for name, bound, q in (
            ("p50", self.p50, 0.5),
            ("p99", self.p99, 0.99),
            ("max", self.most, 1.0),
        ):
            if ordered and quantile(ordered, q) > bound * slack:
                return f"stall {name} {quantile(ordered, q):.2f} s, not {bound * slack:g}"
        return ""


def quantile(ordered: Sequence[float], q: float) -> float:
    """Of what is sorted and not empty."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


@dataclass(frozen=True)
class Scenario:
    """One kind of fault.

    Attributes:
        name: as it stands in the table. act: makes it happen.
        fast: how many rounds `make test` plays; 0: it does not. One but where kinds of the fault
            take turns, or something must be found.
        gateways, workers, replicas: processes. balancer: in front of the gateways.
        kinds: of streams. breaks: plain streams may be told that they failed.
        stalls: whose stalls count: moved (to another worker), resumed, all, none.
        most_stall: how long they may be.
        hits_few: it is no wonder if a fault hits none of them.
        clip: a stall is counted from the mark on, not from the token before it.
        disk_mb: the server's data is on a small disk of its own, where that is allowed.
        replicated: there are a replica and sentinels.
        limit_s: longest time for one stream.
        hears_cancels: who leaves ends its request; not where Redis or the gateway that saw it is
            away at that moment.
        programs: that it needs beside the Python packages. root: whether it must be root.
        settings: RTS_* without the prefix.
        expect_wrong: a negative control: it must find streams of which this is said, a pattern.
        loses_data: acknowledged writes are lost on purpose.
        launcher: what Python runs for gateways and workers.
    """

    name: str
    act: Act
    fast: int = 0
    gateways: int = 1
    workers: int = 2
    balancer: str = ""
    tcp: bool = False
    kinds: tuple[str, ...] = SURVIVING
    tokens: tuple[int, int] = (40, 110)
    breaks: bool = False
    budgets: bool = True
    stalls: str = "all"
    most_stall: Stalls = Stalls()
    hits_few: bool = False
    clip: bool = False
    disk_mb: int = 0
    replicated: bool = False
    limit_s: float = 60.0
    hears_cancels: bool = True
    programs: tuple[str, ...] = ()
    root: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    expect_wrong: str = ""
    loses_data: bool = False
    launcher: tuple[str, ...] = ("-m", "realtime_serve.cli")

    def missing(self) -> str:
        """What keeps it from being played here; "" when nothing does."""
        for program in self.programs:
            if not (shutil.which(program) or Path(program).exists()):
                return f"{program} is not installed"
        if self.root and not is_allowed():
            return NOT_ALLOWED
        return ""


@dataclass
class Row:
    """What came of a scenario.

    Attributes:
        faults: how often it happened. wrong: wrong_streams streams, and accounts that do not agree.
        as_expected: of a negative control: wrong streams of the kind that it must find.
        stalls_s: of the streams that it hit. recomputed: tokens that another worker computed again.
    """

    name: str
    server: str
    seed: int
    faults: int = 0
    streams: int = 0
    complete: int = 0
    told: int = 0
    wrong: list[str] = field(default_factory=list)
    wrong_streams: int = 0
    as_expected: int = 0
    stalls_s: list[float] = field(default_factory=list)
    recomputed: int = 0
    moved: int = 0
    resumed: int = 0


def is_excused(reason: str) -> bool:
    """Whether what cannot be played for this reason is no failure, even where all is REQUIRED."""
    return reason == NOT_ALLOWED and bool(os.environ.get(ROOTLESS))


def seed_of(base: int, name: str, server: str) -> int:
    """A scenario's own seed: one row alone is played as it was among all."""
    return zlib.crc32(f"{base} {name} {server}".encode())


async def play(
    scenario: Scenario,
    folder: Path,
    *,
    server: str,
    seed: int,
    rounds: int,
    at_rest: Callable[[], None] | None = None,
) -> Row:
    """Plays a scenario on a cluster of its own.

    Where `at_rest` is given it is called when the cluster does nothing any more; then it is waited
    until every request and log is gone. Without it their lifetimes are looked at alone.
    """
    rng = random.Random(seed)
    row = Row(scenario.name, server, seed)
    with World(
        folder,
        server=server,
        tcp=scenario.tcp,
        launcher=scenario.launcher,
        disk_mb=scenario.disk_mb if scenario.disk_mb and is_allowed() else 0,
        replicated=scenario.replicated,
        **scenario.settings,
    ) as world:
        ledger = Ledger(world)
        ledger.checks_budgets = scenario.budgets
        ledger.hears_cancels = scenario.hears_cancels
        ledger.loses_data = scenario.loses_data
        load = Load(
            world,
            rng,
            ledger,
            kinds=scenario.kinds,
            tokens=scenario.tokens,
            breaks=scenario.breaks,
            limit_s=scenario.limit_s,
        )
        for role, count in (
            ("gateway", scenario.gateways),
            ("worker", scenario.workers),
            ("control", 1),
        ):
            for _ in range(count):
                world.start(role)
        await world.ready(scenario.workers)
        if scenario.balancer:
            world.balance(scenario.balancer)
        # A server that has just started declares nobody dead: faults come to one that runs.
        await asyncio.sleep(2 * LEASE_MS / 1000)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(ledger.close)
            stage = Stage(world, load, ledger, rng, rounds, stack)
            watch = asyncio.create_task(ledger.watch_charges())
            try:
                await scenario.act(stage)
                await ledger.close_accounts(load.streams)
                if at_rest is not None:
                    at_rest()
                    await ledger.nothing_left()
            finally:
                await end(watch)
            if len(stage.struck) < rounds:
                ledger.wrong.append(f"{len(stage.struck)} proofs for {rounds} faults")
            if scenario.budgets and not 0 < ledger.groups <= 2 * ledger.budgets:
                ledger.wrong.append(f"{ledger.budgets} of {ledger.groups} budgets were checked")
        _sum_up(row, scenario, world, load.streams, ledger)
        if row.wrong and not scenario.expect_wrong:
            print("\n".join(row.wrong[:40]))
            show_logs(world)
    return row


def is_allowed() -> bool:
    """Whether this process may mount disks and filter packets: root in a container may not."""
    if os.geteuid() != 0 or not shutil.which("nft"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        for command in (["nft", "list", "tables"], ["mount", "-t", "tmpfs", "tmpfs", folder]):
            if subprocess.run(command, capture_output=True, check=False).returncode:
                return False
        subprocess.run(["umount", folder], check=True)
    return True


def show_logs(world: World) -> None:
    """Shows what the processes found remarkable."""
    for process in world.processes:
        lines = process.log.read_text().splitlines()
        found = [line[:3000] for line in lines if '"level": "info"' not in line]
        print(f"--- {process.role}-{process.index}", *found[-12:], sep="\n")


def _sum_up(
    row: Row, scenario: Scenario, world: World, streams: list[Stream], ledger: Ledger
) -> None:
    counts = tally(streams)
    row.faults = len(world.marks)
    row.streams, row.complete, row.told = len(streams), counts["complete"], counts["broken"]
    row.wrong = [f"{s.name} {s.kind} {s.rid}: {'; '.join(s.wrong[:3])}" for s in streams if s.wrong]
    row.wrong_streams = len(row.wrong)
    if scenario.expect_wrong:
        pattern = re.compile(scenario.expect_wrong)
        row.as_expected = sum(any(map(pattern.search, stream.wrong)) for stream in streams)
    row.wrong += ledger.wrong
    row.moved = sum(s.moves > 0 for s in streams)
    row.resumed = sum(s.resumes > 0 for s in streams)
    marks = [*world.marks, float("inf")]
    for stream in streams:
        if scenario.stalls == "moved" and not stream.moves:
            continue
        if scenario.stalls == "resumed" and not (stream.resumes and stream.kind != "flaky"):
            continue
        found = []
        for mark, following in itertools.pairwise(marks):
            until = min(following, mark + WINDOW_S)
            stall = stream.stall(mark, until, clip=scenario.clip, first=scenario.stalls == "moved")
            if stall is not None:
                found.append((stall, mark))
        if scenario.stalls == "moved":
            # It was under way at other faults, too, which hit another worker.
            found = sorted(found)[-stream.moves :]
        row.stalls_s += [stall for stall, _ in found]
        if stream.moves:
            row.recomputed += sum(
                len(stream.prompt) + sum(t <= mark for t in stream.arrivals) for _, mark in found
            )
    hit = {"moved": row.moved, "resumed": row.resumed}.get(scenario.stalls, len(row.stalls_s))
    if hit < row.faults and not scenario.hits_few and scenario.stalls != "none":
        row.wrong.append(f"{row.faults} faults hit {hit} streams")
