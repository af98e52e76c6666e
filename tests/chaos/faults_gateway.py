"""What happens to gateways, and to everything at once."""

from __future__ import annotations

import asyncio
import signal

from chaos.load import Load
from chaos.play import Scenario, Stage
from chaos.world import old_release


async def kill(stage: Stage) -> None:
    """SIGKILL behind a load balancer; clients resume through it."""
    world, load = stage.world, stage.load
    async with load.running():
        for _ in range(stage.rounds):
            await load.under_way()
            victim = stage.rng.choice(world.of("gateway"))
            world.mark()
            victim.kill()
            await asyncio.sleep(0.8)
            world.again(victim)
            await world.ready(2)
            await asyncio.sleep(0.3)


async def drain(stage: Stage) -> None:
    """SIGTERM of every gateway in turn; plain streams finish, resumable ones move."""
    world, load = stage.world, stage.load
    async with load.running():
        for _ in range(stage.rounds):
            await load.under_way()
            victim = stage.rng.choice(world.of("gateway"))
            world.mark()
            victim.signal(signal.SIGTERM)
            status = await asyncio.to_thread(victim.popen.wait, 30)
            if status:
                stage.ledger.wrong.append(f"a drained gateway exited with {status}")
            world.again(victim)
            await world.ready(2)
            await asyncio.sleep(0.3)


async def roll(stage: Stage) -> None:
    """A rolling restart of everything under load breaks nothing, not even plain streams."""
    world, load = stage.world, stage.load
    async with load.running():
        for _ in range(stage.rounds):
            for role in ("worker", "gateway", "control"):
                for process in world.of(role):
                    await load.under_way(5)
                    world.mark()
                    if role == "worker":
                        # The new one first, as a rolling update does.
                        world.again(process)
                        await world.ready(len(world.of("worker")))
                    process.signal(signal.SIGTERM)
                    await asyncio.to_thread(process.popen.wait, 60)
                    if process.popen.returncode:
                        stage.ledger.wrong.append(f"{role} exited with {process.popen.returncode}")
                    if role != "worker":
                        world.again(process)
                        await world.ready(2)
                        await asyncio.sleep(0.3)


async def mixed_releases(stage: Stage) -> None:
    """Workers of the last release beside new ones, all behind new gateways; each kind dies once."""
    world, load = stage.world, stage.load
    env = old_release(world.folder)
    old = world.start("worker", env=env)
    await world.ready(2)
    async with load.running():
        for _ in range(stage.rounds):
            await load.under_way()
            new = next(p for p in world.of("worker") if p is not old)
            world.mark()
            new.kill()
            await asyncio.sleep(1.0)
            world.again(new)
            await world.ready(2)
            await load.under_way()
            world.mark()
            old.kill()
            await asyncio.sleep(1.0)
            old = world.start("worker", env=env)
            await world.ready(2)


async def soak(stage: Stage) -> None:
    """Everything, mixed by chance, then the wait until every key is gone."""
    world, load = stage.world, stage.load
    other = Load(
        world,
        stage.rng,
        stage.ledger,
        kinds=("plain", "vanish", "cancel", "double"),
        breaks=True,
        name="other",
    )
    async with load.running(), other.running(lanes=1):
        for _ in range(stage.rounds):
            await load.under_way()
            what = stage.rng.choice(("worker", "zombie", "gateway", "server", "pause", "scripts"))
            world.mark()
            if what == "worker":
                victim = stage.rng.choice(world.of("worker"))
                victim.kill()
                await asyncio.sleep(stage.rng.random() * 2)
                world.again(victim)
            elif what == "zombie":
                victim = stage.rng.choice(world.of("worker"))
                victim.signal(signal.SIGSTOP)
                await asyncio.sleep(1 + stage.rng.random() * 2)
                victim.signal(signal.SIGCONT)
            elif what == "gateway":
                victim = stage.rng.choice(world.of("gateway"))
                victim.kill()
                await asyncio.sleep(stage.rng.random())
                world.again(victim)
            elif what == "server":
                world.redis.kill()
                await asyncio.sleep(stage.rng.random())
                await asyncio.to_thread(world.redis.restart)
            elif what == "pause":
                world.pause_server()
                await asyncio.sleep(stage.rng.random() * 2)
                world.resume_server()
            else:
                world.client.script_flush()
            await world.ready(2)
    load.streams += other.streams
    await stage.ledger.close_accounts(load.streams)
    await stage.ledger.nothing_left()


SCENARIOS = (
    Scenario(
        "gateway SIGKILL behind haproxy",
        kill,
        fast=True,
        gateways=2,
        balanced=True,
        stalls="resumed",
        programs=("haproxy",),
    ),
    Scenario(
        "gateway SIGTERM (drain) behind haproxy",
        drain,
        gateways=2,
        balanced=True,
        kinds=("keyed", "chat", "plain", "stop", "infer", "plain"),
        stalls="resumed",
        programs=("haproxy",),
        settings={"drain_delay_s": 0.5},
    ),
    Scenario(
        "rolling restart of everything",
        roll,
        gateways=2,
        balanced=True,
        kinds=("keyed", "chat", "plain", "stop", "infer", "plain"),
        programs=("haproxy",),
        settings={"drain_delay_s": 0.5, "drain_grace_s": 1},
    ),
    Scenario("old worker, new gateway", mixed_releases, workers=1, stalls="moved"),
    Scenario("soak: all mixed", soak, gateways=2, budgets=False, breaks=False),
)
