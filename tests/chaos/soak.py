"""Every kind of fault, two at a time, mixed by chance."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import redis
from cluster import Process
from sentinel import Member

from chaos.engine import MOMENTS, POISON
from chaos.faults_network import behind_proxy, gateway_behind, through
from chaos.faults_redis import fill
from chaos.faults_worker import clock_error_s, keeping_workers, start_with_clock
from chaos.load import Load
from chaos.netproxy import NetProxy
from chaos.play import Scenario, Stage, Stalls
from chaos.world import World, is_stopped, old_release


@dataclass
class Scene:
    """What one fault has: the stage, its own chance, a number of its own.

    Attributes:
        proxy: between one of the gateways and the server.
    """

    stage: Stage
    rng: random.Random
    number: int
    proxy: NetProxy | None

    @property
    def world(self) -> World:
        return self.stage.world

    async def pause(self, least_s: float = 0.0, most_s: float = 2.0) -> None:
        await asyncio.sleep(self.rng.uniform(least_s, most_s))

    async def victim(self, role: str) -> Process:
        """A process that serves, and that no other fault has chosen."""
        while True:
            serve = [
                process
                for process in self.world.of(role)
                if not process.told_to_end and (role != "worker" or self.world.serves(process))
            ]
            if serve:
                return self.rng.choice(serve)
            await asyncio.sleep(0.02)

    async def tell(self, *command: str) -> Any:
        """Tells a server that may be away just now."""
        async with asyncio.timeout(60):
            while True:
                try:
                    return await asyncio.to_thread(self.world.client.execute_command, *command)
                except redis.RedisError:
                    await asyncio.sleep(0.05)

    async def until(self, what: Callable[[], Any], timeout_s: float = 20) -> Any:
        """Waits for something true, and gives what there is of it by then."""
        ends_at = asyncio.get_running_loop().time() + timeout_s
        while not (found := what()) and asyncio.get_running_loop().time() < ends_at:
            await asyncio.sleep(0.02)
        return found

    async def play(self, kind: str, count: int, tokens: tuple[int, int], **more: Any) -> Load:
        """Streams beside all others, which may be told that they failed; to their ends."""
        load = Load(
            self.world,
            self.rng,
            self.stage.ledger,
            kinds=(kind,),
            tokens=tokens,
            breaks=True,
            name=f"{kind}{self.number}",
            narrow=kind == "slow",
        )
        await load.play(
            [load.make(f"{kind}{self.number}-{i % 20}", kind, **more) for i in range(count)]
        )
        self.stage.load.streams += load.streams
        return load

    @asynccontextmanager
    async def another_worker(self, worker: Process) -> AsyncIterator[Process]:
        """A worker that serves, and goes in the end; other faults may be its end before."""
        try:
            await self.until(lambda: self.world.serves(worker) or worker.popen.poll() is not None)
            yield worker
        finally:
            if worker.popen.poll() is None:
                worker.signal(signal.SIGTERM)
                await asyncio.to_thread(worker.popen.wait, 60)


Kind = Callable[[Scene], Awaitable[None]]

# -- processes --


async def kill_worker(scene: Scene) -> None:
    victim = await scene.victim("worker")
    victim.kill()
    scene.stage.proof(victim.popen.returncode == -signal.SIGKILL, "death of a worker")
    await scene.pause()


def kill_worker_at(moment: str) -> Kind:
    async def kill(scene: Scene) -> None:
        order = scene.world.orders / moment
        order.touch()
        await scene.until(lambda: not order.exists())
        scene.stage.proof(not order.exists(), f"death of a worker at {moment}")
        await scene.pause()

    return kill


async def stop_worker(scene: Scene) -> None:
    victim = await scene.victim("worker")
    victim.signal(signal.SIGSTOP)
    await scene.pause(1, 3)
    dead = victim.popen.poll() is not None
    scene.stage.proof(dead or is_stopped(victim.pid), "a worker that stands still")
    victim.signal(signal.SIGCONT)


async def hang_engine(scene: Scene) -> None:
    world = scene.world
    world.order("hang")
    try:
        found = await scene.until(lambda: list(world.orders.glob("hanging-*")))
        scene.stage.proof(found, "an engine that hangs")
        await scene.pause(1, 3)
    finally:
        # First the order: who took it meanwhile hangs by now.
        for path in (world.orders / "hang", *world.orders.glob("hanging-*")):
            path.unlink(missing_ok=True)


async def drain_worker(scene: Scene) -> None:
    await _drain(scene, await scene.victim("worker"))


async def kill_gateway(scene: Scene) -> None:
    world = scene.world
    victim = await scene.victim("gateway")
    world.outage(killed=True)
    victim.kill()
    scene.stage.proof(victim.popen.returncode == -signal.SIGKILL, "death of a gateway")
    await scene.pause()
    world.again(victim)


async def drain_gateway(scene: Scene) -> None:
    world = scene.world
    victim = await scene.victim("gateway")
    world.outage(killed=False)
    await _drain(scene, victim)
    world.again(victim)


async def _drain(scene: Scene, victim: Process) -> None:
    victim.signal(signal.SIGTERM)
    status = await asyncio.to_thread(victim.popen.wait, 60)
    # One that was killed meanwhile ended otherwise.
    scene.stage.proof(status in (0, -signal.SIGKILL), f"an orderly exit, not {status}")


async def poison(scene: Scene) -> None:
    while True:
        load = await scene.play("refusable", 1, (40, 110), prompt=POISON)
        (guilty,) = load.streams
        if not guilty.refused_s:
            break
        await asyncio.sleep(0.1)
    told = "engine_failed" in guilty.broken
    # Its gateway may be gone by then, and say nothing.
    silent = guilty.broken and not guilty.broken.startswith("{")
    scene.stage.proof(told or silent, f"poison: {guilty.broken!r}")


async def turn_clock(scene: Scene) -> None:
    worker, set_clock = start_with_clock(scene.world)
    async with scene.another_worker(worker):
        for jump in ("+7h", "-5h"):
            set_clock(jump)
            await asyncio.sleep(1.0)
        found = await scene.until(
            lambda: clock_error_s(scene.world, worker) > 4 * 3600 or worker.popen.poll() is not None
        )
        scene.stage.proof(found, "an engine's clock hours off")


async def old_worker(scene: Scene) -> None:
    world = scene.world
    async with scene.another_worker(world.start("worker", env=old_release(world.folder))) as old:
        await scene.pause(1, 2)
        if old.popen.poll() is None:
            old.kill()
        status = old.popen.returncode
        # Unless another fault was its end.
        scene.stage.proof(status in (0, -signal.SIGKILL), f"death of an old worker: {status}")


# -- clients --


async def cancel_many(scene: Scene) -> None:
    load = await scene.play("cancel", 100, (60, 110))
    heard = sum(s.reason == "left" or '"cancelled"' in s.broken for s in load.streams)
    scene.stage.proof(heard, f"cancels that were heard: {heard}")


async def read_slowly(scene: Scene) -> None:
    load = await scene.play("slow", 8, (150, 250))
    scene.stage.proof(any(s.seen for s in load.streams), "clients that read slowly")


async def overload(scene: Scene) -> None:
    load = await scene.play("refusable", 300, (40, 80))
    refused = [s for s in load.streams if s.refused_s]
    scene.stage.proof(refused, "an overload")


# -- the way to the server --


async def lose_messages(scene: Scene) -> None:
    proxy = scene.proxy
    before, proxy.loss = proxy.lost, 0.1
    await asyncio.sleep(1.5)
    lost = await scene.until(lambda: proxy.lost - before)
    proxy.loss = 0.0
    scene.stage.proof(lost, "messages lost")


async def cut_connections(scene: Scene) -> None:
    scene.stage.proof(await scene.until(scene.proxy.cut), "connections cut")
    await scene.pause()


async def silence_gateway(scene: Scene) -> None:
    scene.stage.proof(await scene.until(scene.proxy.silence), "connections gone silent")
    await asyncio.sleep(0.4)
    scene.proxy.heal()
    await asyncio.sleep(2.0)


async def silence_worker(scene: Scene) -> None:
    world = scene.world
    proxy = await behind_proxy(scene.stage)
    url = through(world.redis.url, proxy.port)
    async with scene.another_worker(world.start("worker", redis_url=url)) as worker:
        await scene.pause(0.5, 1)
        silent = await scene.until(lambda: proxy.silence() or worker.popen.poll() is not None)
        scene.stage.proof(silent, "connections gone silent")
        await asyncio.sleep(2.5)
        proxy.heal()
        await asyncio.sleep(1.0)


async def kill_connections(scene: Scene) -> None:
    kind = scene.rng.choice(("normal", "pubsub"))
    async with asyncio.timeout(60):
        while not (killed := await scene.tell("CLIENT", "KILL", "TYPE", kind)):
            await asyncio.sleep(0.05)
    scene.stage.proof(killed, f"connections killed: {kind}")


# -- the server --


async def kill_server(scene: Scene) -> None:
    server = scene.world.redis
    before = server.pid
    server.kill()
    await scene.pause(0, 1)
    # In this thread: the server ends with the one that started it.
    server.restart()
    scene.stage.proof(server.pid != before, "another server")


async def pause_server(scene: Scene) -> None:
    world = scene.world
    pid = world.redis.pid
    world.pause_server()
    await scene.pause(0.05, 2)
    # Unless the other fault was its death.
    scene.stage.proof(pid != world.redis.pid or is_stopped(pid), "a server that stands still")
    world.resume_server()


async def flush_scripts(scene: Scene) -> None:
    scene.stage.proof(await scene.tell("SCRIPT", "FLUSH"), "scripts flushed")


async def fill_memory(scene: Scene) -> None:
    scene.stage.proof(await scene.tell("CONFIG", "SET", "maxmemory", "1"), "a full memory")
    await scene.pause()
    await scene.tell("CONFIG", "SET", "maxmemory", "0")


async def refuse_writes(scene: Scene) -> None:
    setting = "min-replicas-to-write"
    scene.stage.proof(await scene.tell("CONFIG", "SET", setting, "1"), "read-only")
    await scene.pause()
    await scene.tell("CONFIG", "SET", setting, "0")


async def fill_disk(scene: Scene) -> None:
    ballast = await asyncio.to_thread(fill, scene.world.disk)
    try:
        async with asyncio.timeout(20):
            while (await scene.tell("INFO", "persistence"))["aof_last_write_status"] == "ok":
                await asyncio.sleep(0.05)
        scene.stage.proof(True, "a full disk")
        await scene.pause()
    finally:
        ballast.unlink()


# -- the server among several --


async def fail_over(scene: Scene) -> None:
    await _fail_over(scene, Member.kill, Member.start)


async def fail_over_paused(scene: Scene) -> None:
    await _fail_over(scene, Member.pause, Member.go_on)


async def _fail_over(
    scene: Scene, strike: Callable[[Member], None], mend: Callable[[Member], None]
) -> None:
    pair = scene.world.pair
    assert pair is not None
    old = pair.primary()
    strike(old)
    new = await asyncio.to_thread(pair.wait_for_failover, old)
    scene.stage.proof(new is not old, "another primary")
    scene.stage.ledger.follow()
    await asyncio.sleep(1.0)
    # In this thread: a server ends with the one that started it.
    mend(old)
    await asyncio.to_thread(pair.wait_until_replicated)


async def flush_all(scene: Scene) -> None:
    scene.stage.proof(await scene.tell("FLUSHALL"), "keys that are lost")


# -- all of it --

KINDS: Mapping[str, Kind] = {
    "worker killed": kill_worker,
    **{f"worker killed, {moment}": kill_worker_at(moment) for moment in MOMENTS},
    "worker stands still": stop_worker,
    "engine hangs": hang_engine,
    "worker drains": drain_worker,
    "gateway killed": kill_gateway,
    "gateway drains": drain_gateway,
    "poison": poison,
    "clock": turn_clock,
    "old worker": old_worker,
    "cancels": cancel_many,
    "slow clients": read_slowly,
    "overload": overload,
    "messages lost": lose_messages,
    "connections cut": cut_connections,
    "gateway half-open": silence_gateway,
    "worker half-open": silence_worker,
    "connections killed": kill_connections,
    "server killed": kill_server,
    "server paused": pause_server,
    "scripts flushed": flush_scripts,
    "memory full": fill_memory,
    "read-only": refuse_writes,
    "disk full": fill_disk,
}
NOT_TOGETHER = (
    # It could not start.
    {"disk full", "server killed"},
    # Which of its lives stands still?
    {"server paused", "server killed"},
    # Each undoes the other.
    {"messages lost", "gateway half-open"},
    {"gateway half-open", "connections cut"},
    {"disk full", "read-only"},
)
ON_A_PAIR: Mapping[str, Kind] = {
    "primary killed": fail_over,
    "primary paused": fail_over_paused,
    "all keys lost": flush_all,
}
BESIDE = (
    *("worker killed", "worker killed, emit", "worker stands still", "engine hangs"),
    *("worker drains", "scripts flushed", "connections killed"),
)
"""What goes with a loss of data. No gateway's death: what Redis lost, only gateways still have."""


def pairs(rng: random.Random, kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Each kind once, or one of them twice, two at a time."""
    even = [*kinds, rng.choice(kinds)] if len(kinds) % 2 else list(kinds)
    while True:
        order = rng.sample(even, len(even))
        drawn = list(zip(order[::2], order[1::2], strict=True))
        if all(a != b and {a, b} not in NOT_TOGETHER for a, b in drawn):
            return drawn


async def soak(stage: Stage) -> None:
    """One server: nothing that was acknowledged may be lost."""
    world, load = stage.world, stage.load
    other = Load(
        world,
        stage.rng,
        stage.ledger,
        kinds=("plain", "vanish", "cancel", "double"),
        breaks=True,
        name="other",
    )
    proxy = await behind_proxy(stage)
    await gateway_behind(stage, proxy)
    names = [name for name in KINDS if world.has_small_disk or name != "disk full"]
    drawn = [pair for _ in range(max(1, stage.rounds // 2)) for pair in pairs(stage.rng, names)]
    async with keeping_workers(stage), load.running(), other.running(lanes=1):
        for pair in drawn:
            await load.under_way(10)
            await _together(stage, pair, KINDS, proxy)
            world.all_back()
    load.streams += other.streams


async def soak_pair(stage: Stage) -> None:
    """A primary and a replica: failovers and lost data, each beside a fault of another kind."""
    load = stage.load
    async with keeping_workers(stage):
        for number in range(stage.rounds):
            for name in ON_A_PAIR:
                # None ends before the data are lost: of such ends nothing would be known. And who
                # is not connected when all keys are lost is told so when it comes again.
                kinds = ("keyed", "chat") if name == "all keys lost" else load.kinds
                streams = [load.make(f"{name} {number}", kinds[i % len(kinds)]) for i in range(40)]
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(load.play(streams))
                    await load.under_way(10)
                    pair = (name, stage.rng.choice(BESIDE))
                    await _together(stage, pair, {**ON_A_PAIR, **KINDS}, None)
                # The next round takes the facts away.
                await stage.ledger.close_accounts(load.streams)
                for stream in streams:
                    stream.closed = True


async def _together(
    stage: Stage, pair: tuple[str, str], kinds: Mapping[str, Kind], proxy: NetProxy | None
) -> None:
    """Makes two faults happen, and waits until all is well again."""
    world = stage.world
    scenes = [Scene(stage, stage.chance(), 2 * len(world.marks) + i, proxy) for i in range(2)]
    world.mark()

    async def one(name: str, scene: Scene) -> None:
        await scene.pause(0, 1)
        await kinds[name](scene)

    async with asyncio.TaskGroup() as tasks:
        for name, scene in zip(pair, scenes, strict=True):
            tasks.create_task(one(name, scene))
    await world.ready(2)


# A pause of up to 3 s, and then another fault's.
_BOTH = Stalls(p99=8.0, most=8.0)

SCENARIOS = (
    Scenario(
        "soak: all mixed",
        soak,
        # One of two: the other is behind a proxy.
        gateways=1,
        tcp=True,
        disk_mb=256,
        hears_cancels=False,
        most_stall=_BOTH,
        programs=("faketime",),
        settings={"queue_limit": 40},
    ),
    Scenario(
        "soak: failovers and lost data",
        soak_pair,
        gateways=2,
        kinds=("keyed", "keyed", "chat", "flaky", "infer"),
        tokens=(250, 300),
        replicated=True,
        most_stall=_BOTH,
        budgets=False,
        loses_data=True,
        settings={"strict": 1, "tokens_per_minute": 0},
    ),
)
