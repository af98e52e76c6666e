"""What happens to workers."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cluster import Process

from chaos.engine import MOMENTS, POISON
from chaos.owners import BY_OWNER
from chaos.play import Scenario, Stage, Stalls
from chaos.world import World, is_stopped
from shared import keys
from shared.tasks import end


async def _settle(stage: Stage, longest_s: float = 0.4) -> None:
    await asyncio.sleep(stage.rng.random() * longest_s)


async def kill(stage: Stage) -> None:
    """SIGKILL in the middle of everything."""
    world, load = stage.world, stage.load
    async with load.running():
        async for _ in stage.each_round():
            await _settle(stage)
            victim = stage.rng.choice(world.of("worker"))
            world.mark()
            victim.kill()
            stage.proof(victim.popen.returncode == -signal.SIGKILL, "death by SIGKILL")
            await asyncio.sleep(1.0)
            world.again(victim)
            await world.ready(2)


def kill_at(moment: str) -> Scenario:
    """SIGKILL by the engine's own hand at a precise moment."""

    async def act(stage: Stage) -> None:
        world, load = stage.world, stage.load
        async with load.running():
            async for _ in stage.each_round():
                world.order(moment)
                ended = []
                while not ended:
                    await asyncio.sleep(0.002)
                    ended = world.workers_ended()
                world.mark()
                stage.proof(ended[0].popen.returncode == -signal.SIGKILL, "death by SIGKILL")
                await asyncio.sleep(1.0)
                world.again(ended[0])
                await world.ready(2)

    return Scenario(
        f"worker SIGKILL, {moment}",
        act,
        stalls="moved",
        most_stall=_KILLED_FIRST if moment == "prefill" else _KILLED,
        fast=int(moment == "emit"),
    )


async def zombie(stage: Stage) -> None:
    """SIGSTOP until another worker has its streams, then it wakes and goes on writing."""
    world, load = stage.world, stage.load
    async with load.running():
        async for _ in stage.each_round():
            victim = stage.rng.choice(world.of("worker"))
            world.mark()
            victim.signal(signal.SIGSTOP)
            await asyncio.sleep(0.1)
            stage.proof(is_stopped(victim.pid), "a worker that stands still")
            await asyncio.sleep(1.6 + stage.rng.random())
            victim.signal(signal.SIGCONT)
            await asyncio.sleep(0.5)


async def two_zombies(stage: Stage) -> None:
    """Two workers in turn: the first wakes while the one that took its requests stands still.

    The first generates again what its successor has written, comes past that, and writes.
    """
    world, load = stage.world, stage.load
    async with load.running():
        async for _ in stage.each_round():
            first, second = stage.rng.sample(world.of("worker"), 2)
            world.mark()
            first.signal(signal.SIGSTOP)
            await _second_owners(stage)
            # Some tokens only: the first has to come past them.
            await asyncio.sleep(0.05)
            second.signal(signal.SIGSTOP)
            await asyncio.sleep(0.05)
            stage.proof(is_stopped(second.pid), "a second worker that stands still")
            first.signal(signal.SIGCONT)
            # Now and then for longer than a lease: the first one owns them once more.
            await asyncio.sleep(1.2 + stage.rng.random())
            second.signal(signal.SIGCONT)
            await asyncio.sleep(0.5)


async def _second_owners(stage: Stage) -> None:
    """Until requests under way have been taken over."""
    client = stage.world.client
    async with asyncio.timeout(10):
        while True:
            under_way = [s for s in stage.load.streams if s.rid and not s.ended]
            if any(int(client.hget(keys.request(s.rid), "ep") or 0) > 1 for s in under_way):
                return
            await asyncio.sleep(0.02)


async def hang(stage: Stage) -> None:
    """The engine hangs while the event loop and the heartbeat live; later it comes back."""
    world, load = stage.world, stage.load
    async with load.running():
        async for _ in stage.each_round():
            world.mark()
            world.order("hang")
            hanging = await world.hanging()
            stage.proof(hanging, "an engine that hangs")
            await asyncio.sleep(1.6 + stage.rng.random() * 2)
            hanging.unlink()
            await asyncio.sleep(0.5)


async def drain(stage: Stage) -> None:
    """SIGTERM with no time for what runs: all is handed over."""
    world, load = stage.world, stage.load
    async with load.running():
        async for _ in stage.each_round():
            await _settle(stage)
            victim = stage.rng.choice(world.of("worker"))
            world.mark()
            victim.signal(signal.SIGTERM)
            world.again(victim)
            await asyncio.to_thread(victim.popen.wait, 20)
            status = victim.popen.returncode
            stage.proof(status == 0, f"an orderly exit, not {status}")
            await world.ready(2)


@asynccontextmanager
async def keeping_workers(
    stage: Stage, *, at_death: Callable[[], None] = lambda: None
) -> AsyncIterator[None]:
    """Two workers live, whoever dies; one that ends otherwise than by SIGKILL or order is wrong."""
    world = stage.world

    async def keep() -> None:
        while True:
            for ended in world.workers_ended():
                if not ended.told_to_end:
                    stage.ledger.wrong.append(f"a worker ended with {ended.popen.returncode}")
                at_death()
            while sum(not p.told_to_end for p in world.of("worker")) < 2:
                world.start("worker")
            await asyncio.sleep(0.1)

    keeper = asyncio.create_task(keep())
    try:
        yield
    finally:
        await end(keeper)


async def poison(stage: Stage) -> None:
    """A request that kills whoever computes it, among innocents."""
    world, load = stage.world, stage.load
    guilty = []
    async with keeping_workers(stage, at_death=world.mark), load.running():
        async for i in stage.each_round():
            one = load.make(f"guilty{i}", "refusable", prompt=POISON)
            load.streams.remove(one)
            guilty.append(one)
            await load.one(one)
    letters = world.client.xlen("rts:dead")
    if letters != stage.rounds:
        stage.ledger.wrong.append(f"{letters} dead letters for {stage.rounds} poisonous requests")
    for one in guilty:
        stage.proof("engine_failed" in one.broken, f"engine_failed, not {one.broken!r}")
        stage.load.streams.append(one)
        # To be told so is right for this one alone.
        one.wrong = [what for what in one.wrong if not what.startswith("broken: ")]


async def clock(stage: Stage) -> None:
    """One worker's clock jumps by hours, forth and back."""
    world, load = stage.world, stage.load
    worker, set_clock = start_with_clock(world)
    await world.ready(3)
    async with load.running():
        async for i in stage.each_round():
            world.mark()
            set_clock("-5h" if i % 2 else "+7h")
            await asyncio.sleep(1.5)
            stage.proof(clock_error_s(world, worker) > 4 * 3600, "an engine's clock hours off")


def start_with_clock(world: World) -> tuple[Process, Callable[[str], object]]:
    """A worker, and what sets its clock: "+7h", "-5h"."""
    file = world.folder / "clock"
    file.write_text("+0")
    (world.orders / "tell-time").touch()
    worker = world.start(
        "worker",
        env={
            "LD_PRELOAD": _faketime(),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        },
    )
    return worker, file.write_text


def clock_error_s(world: World, worker: Process) -> float:
    """How far off its clock was when it last told the time; 0 when it has not."""
    told = world.orders / f"time-{worker.pid}"
    return abs(float(told.read_text()) - time.time()) if told.exists() else 0.0


def _faketime() -> str:
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    return str(found[0]) if found else ""


_KILLED = Stalls(p50=0.5, most=3.0)
_KILLED_FIRST = Stalls(p50=0.8, most=3.0)
"""Those whose prefill may have killed it are suspects: they run one after the other, each until it
has made progress. No gap between tokens, but the wait for the first one."""

# Still running when the old owner comes back.
_LONG: Any = {"tokens": (150, 250), "settings": {"tokens_per_minute": 6000}}

SCENARIOS = (
    Scenario("worker SIGKILL", kill, stalls="moved", most_stall=_KILLED),
    *(kill_at(moment) for moment in MOMENTS),
    Scenario("worker SIGSTOP, wakes later (zombie)", zombie, fast=1, stalls="moved", **_LONG),
    Scenario(
        "two zombies in turn, tokens by owner",
        two_zombies,
        fast=1,
        stalls="moved",
        **BY_OWNER,
    ),
    Scenario("engine hangs, event loop lives", hang, stalls="moved", **_LONG),
    Scenario(
        "worker SIGTERM (drain)",
        drain,
        fast=1,
        stalls="moved",
        most_stall=Stalls(p99=0.3),
        settings={"drain_grace_s": 0},
    ),
    Scenario("poison among innocents", poison, fast=1, stalls="moved"),
    Scenario("clock of a worker jumps", clock, fast=2, programs=("faketime",)),
)
