"""What happens to gateways, and to everything at once."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import redis
from balancers import BALANCERS
from cluster import Process

from chaos.load import Load
from chaos.play import Scenario, Stage, Stalls
from chaos.world import World, is_stopped, old_release

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


SOAK = (
    *("worker", "zombie", "hang", "drain", "gateway", "gateway drain"),
    *("server", "pause", "scripts", "clients", "full", "read-only"),
)


async def soak(stage: Stage) -> None:
    """Everything, mixed by chance, two at a time; then the wait until every key is gone."""
    world, load = stage.world, stage.load
    other = Load(
        world,
        stage.rng,
        stage.ledger,
        kinds=("plain", "vanish", "cancel", "double"),
        breaks=True,
        name="other",
    )
    faults = [kind for _ in range(max(1, stage.rounds // 2)) for kind in stage.rng.sample(SOAK, 12)]
    async with load.running(), other.running(lanes=1):
        for pair in zip(faults[::2], faults[1::2], strict=True):
            await load.under_way(10)
            world.mark()
            async with asyncio.TaskGroup() as tasks:
                for kind in pair:
                    tasks.create_task(_one_of_many(stage, kind))
            await world.ready(2)
            world.all_back()
    load.streams += other.streams
    await stage.ledger.close_accounts(load.streams)
    await stage.ledger.nothing_left()


async def _one_of_many(stage: Stage, kind: str) -> None:
    world, rng = stage.world, stage.chance()
    await asyncio.sleep(rng.random())
    match kind:
        case "worker" | "gateway":
            victim = rng.choice(world.of(kind))
            if kind == "gateway":
                world.outage(killed=True)
            victim.kill()
            stage.proof(victim.popen.returncode == -signal.SIGKILL, f"death of a {kind}")
            await asyncio.sleep(rng.random() * 2)
            world.again(victim)
        case "drain" | "gateway drain":
            victim = rng.choice(world.of("worker" if kind == "drain" else "gateway"))
            if kind == "gateway drain":
                world.outage(killed=False)
            victim.signal(signal.SIGTERM)
            status = await asyncio.to_thread(victim.popen.wait, 60)
            # A gateway or worker that was killed meanwhile ended otherwise.
            stage.proof(status in (0, -signal.SIGKILL), f"an orderly exit, not {status}")
            world.again(victim)
        case "zombie":
            victim = rng.choice(world.of("worker"))
            victim.signal(signal.SIGSTOP)
            await asyncio.sleep(1 + rng.random() * 2)
            stage.proof(
                victim.popen.poll() is not None or is_stopped(victim.pid), "a worker that stands"
            )
            victim.signal(signal.SIGCONT)
        case "hang":
            world.order("hang")
            await asyncio.sleep(1 + rng.random() * 2)
            found = list(world.orders.glob("hang*"))
            stage.proof(found, "an engine that hangs, or is about to")
            for hanging in found:
                hanging.unlink(missing_ok=True)
        case "server":
            before = world.redis.pid
            world.redis.kill()
            await asyncio.sleep(rng.random())
            # In this thread: the server ends with the one that started it.
            world.redis.restart()
            stage.proof(world.redis.pid != before, "another server")
        case "pause":
            pid = world.redis.pid
            world.pause_server()
            await asyncio.sleep(0.05 + rng.random() * 2)
            # Unless the other fault was its death.
            stage.proof(pid != world.redis.pid or is_stopped(pid), "a server that stands still")
            world.resume_server()
        case "scripts":
            stage.proof(await _tell(world, "SCRIPT", "FLUSH"), "scripts flushed")
        case "clients":
            kind = rng.choice(("normal", "pubsub"))
            while not (killed := await _tell(world, "CLIENT", "KILL", "TYPE", kind)):
                await asyncio.sleep(0.05)
            stage.proof(killed, f"connections killed: {kind}")
        case "full":
            stage.proof(await _tell(world, "CONFIG", "SET", "maxmemory", "1"), "a full memory")
            await asyncio.sleep(rng.random() * 2)
            await _tell(world, "CONFIG", "SET", "maxmemory", "0")
        case "read-only":
            stage.proof(
                await _tell(world, "CONFIG", "SET", "min-replicas-to-write", "1"), "read-only"
            )
            await asyncio.sleep(rng.random() * 2)
            await _tell(world, "CONFIG", "SET", "min-replicas-to-write", "0")


async def _tell(world: World, *command: str) -> Any:
    """Tells a server that may be away just now."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await asyncio.to_thread(world.client.execute_command, *command)
            except redis.RedisError:
                await asyncio.sleep(0.05)


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
            gateways=2,
            balancer=balancer,
            kinds=("keyed", "chat", "plain", "stop", "infer", "plain"),
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
        kinds=("keyed", "chat", "plain", "stop", "infer", "plain"),
        programs=("haproxy",),
        settings={"drain_delay_s": NOTICED_S, "drain_grace_s": 3},
    ),
    Scenario("old worker, new gateway", mixed_releases, workers=1, stalls="moved"),
    Scenario("soak: all mixed", soak, gateways=2, hears_cancels=False),
)
