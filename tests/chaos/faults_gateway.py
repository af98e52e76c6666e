"""What happens to gateways, and rolling restarts of everything."""

from __future__ import annotations

import asyncio
import signal

from balancers import BALANCERS
from cluster import Process

from chaos.play import Scenario, Stage, Stalls
from chaos.world import World, old_release

NOTICED_S = 1.2
"""Two turns of haproxy's questions, as shipped: by then it knows who drains and who is back. A
gateway that goes before that leaves it with nobody, which is another fault."""


async def _back(world: World, ended: Process) -> None:
    """Another process in its place, and the balancer knows."""
    world.again(ended)
    await world.ready(2)
    await asyncio.sleep(NOTICED_S)


async def kill(stage: Stage) -> None:
    """SIGKILL behind a load balancer; clients resume through it."""
    world, load = stage.world, stage.load
    async with load.running():
        async for _ in stage.each_round():
            victim = stage.rng.choice(world.of("gateway"))
            world.mark()
            victim.kill()
            stage.proof(victim.popen.returncode == -signal.SIGKILL, "death by SIGKILL")
            await asyncio.sleep(0.8)
            await _back(world, victim)


async def drain(stage: Stage) -> None:
    """SIGTERM of every gateway in turn; plain streams finish, resumable ones move."""
    world, load = stage.world, stage.load
    async with load.running():
        async for _ in stage.each_round():
            victim = stage.rng.choice(world.of("gateway"))
            world.mark()
            victim.signal(signal.SIGTERM)
            status = await asyncio.to_thread(victim.popen.wait, 30)
            stage.proof(status == 0, f"an orderly exit, not {status}")
            await _back(world, victim)


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
                    status = await asyncio.to_thread(process.popen.wait, 60)
                    stage.proof(status == 0, f"an orderly exit of {role}, not {status}")
                    if role != "worker":
                        await _back(world, process)


async def mixed_releases(stage: Stage) -> None:
    """Workers of the last release beside new ones, all behind new gateways; each kind dies once."""
    world, load = stage.world, stage.load
    env = old_release(world.folder)
    old = world.start("worker", env=env)
    await world.ready(2)
    async with load.running():
        async for _ in stage.each_round():
            new = next(p for p in world.of("worker") if p is not old)
            world.mark()
            new.kill()
            stage.proof(new.popen.returncode == -signal.SIGKILL, "death of a new worker")
            await asyncio.sleep(1.0)
            world.again(new)
            await world.ready(2)
            await load.under_way()
            world.mark()
            old.kill()
            stage.proof(old.popen.returncode == -signal.SIGKILL, "death of an old worker")
            await asyncio.sleep(1.0)
            old = world.start("worker", env=env)
            await world.ready(2)


SCENARIOS = (
    *(
        Scenario(
            f"gateway SIGKILL behind {balancer}",
            kill,
            fast=int(balancer == "haproxy"),
            gateways=2,
            balancer=balancer,
            stalls="resumed",
            most_stall=Stalls(p99=1.0),
            programs=(balancer,),
        )
        for balancer in BALANCERS
    ),
    *(
        Scenario(
            f"gateway SIGTERM (drain) behind {balancer}",
            drain,
            fast=int(balancer == "nginx"),
            gateways=2,
            balancer=balancer,
            kinds=("keyed", "chat", "plain", "stop", "infer", "plain", "key"),
            stalls="resumed",
            programs=(balancer,),
            # Long enough to be still under way after the delay.
            tokens=(150, 300),
            settings={"drain_delay_s": NOTICED_S, "tokens_per_minute": 10_000},
        )
        for balancer in BALANCERS
    ),
    Scenario(
        "rolling restart of everything",
        roll,
        gateways=2,
        balancer="haproxy",
        kinds=("keyed", "chat", "plain", "stop", "infer", "plain", "key"),
        programs=("haproxy",),
        settings={"drain_delay_s": NOTICED_S, "drain_grace_s": 3},
    ),
    Scenario("old worker, new gateway", mixed_releases, workers=1, stalls="moved"),
)
