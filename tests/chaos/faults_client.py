"""What clients do: leave, dawdle, cancel, overload."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter

import aiohttp

from chaos.load import ALL, Load, Stream
from chaos.play import Scenario, Stage
from shared import keys


async def leave(stage: Stage) -> None:
    """Clients that vanish and cancel among others that stay."""
    async with stage.load.running():
        for _ in range(stage.rounds):
            await stage.load.under_way()
            stage.world.mark()
            before = _left(stage.load)
            await asyncio.sleep(1.0)
            new = _left(stage.load) - before
            stage.proof(new["vanish"] and new["cancel"], f"clients that left: {new}")


def _left(load: Load) -> Counter[str]:
    return Counter(stream.kind for stream in load.streams if stream.reason == "left")


async def dawdle(stage: Stage) -> None:
    """Clients that read a seventh of what comes get all of it, and delay nobody."""
    world, load = stage.world, stage.load
    slow = Load(
        world, stage.rng, stage.ledger, kinds=("slow",), tokens=(500, 600), name="slow", narrow=True
    )
    for number in range(stage.rounds):
        late = [slow.make(f"slow{number}", "slow") for _ in range(8)]
        began = time.monotonic()
        playing = asyncio.create_task(slow.play(late))
        async with load.running():
            await load.under_way(10)
            world.mark()
            await asyncio.sleep(2.0)
        await playing
        await stage.ledger.check_budget(f"slow{number}", late)
        took = min(stream.arrivals[-1] for stream in late) - began
        needed = 600 * int(world.settings["echo_step_ms"]) / 1000
        stage.proof(took > 2 * needed, f"clients slower than the engine ({took:.1f} s)")
    for stream in load.streams:
        gaps = [b - a for a, b in itertools.pairwise(stream.arrivals)]
        if max(gaps, default=0) > 1.0:
            stream.wrong.append(f"held up for {max(gaps):.2f} s by others that read slowly")
    load.streams += slow.streams


UNDER_WAY = 10
"""So many of those that are spared must have a token when the others are cancelled."""


async def storm(stage: Stage) -> None:
    """A thousand cancels at once: they hit whom they name, and nobody else's can be named."""
    world, load = stage.world, stage.load
    for number in range(stage.rounds):
        doomed = [load.make(f"doomed{number}-{i % 10}", "vanish") for i in range(1000)]
        for stream in doomed:
            stream.pause_at = 0
        spared = [load.make(f"spared{number}-{i % 4}", "plain") for i in range(40)]
        async with asyncio.TaskGroup() as tasks:
            # First those: others that began with them would be over before the last was posted.
            await _post_all(world.urls(), doomed)
            tasks.create_task(load.play(spared))
            while sum(bool(stream.arrivals) for stream in spared) < UNDER_WAY:
                await asyncio.sleep(0.01)
            world.mark()
            statuses = await _cancel_all(world.urls(), doomed, spared)
            if statuses["foreign"] != {404}:
                stage.ledger.wrong.append(f"a foreign caller's cancel: {statuses['foreign']}")
            stage.proof(statuses["own"] == {200}, f"own cancels: {statuses['own']}")
        for stream in doomed:
            stream.reason = "cancelled by name"
        reasons = {
            f[b"rid"].decode(): f[b"reason"].decode() for _, f in world.client.xrange(keys.ENDED)
        }
        for stream in doomed:
            if reasons.get(stream.rid) not in ("cancelled", "length"):
                stream.wrong.append(f"cancelled, and ended as {reasons.get(stream.rid)}")
            await stage.ledger.check_log(stream)
        everybody = doomed + spared
        for caller in {stream.caller for stream in everybody}:
            await stage.ledger.check_budget(caller, [s for s in everybody if s.caller == caller])


async def _post_all(urls: list[str], streams: list[Stream]) -> None:
    """Posts streams that outlive their connections, and hangs up at once."""
    gate = asyncio.Semaphore(100)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def post(stream: Stream) -> None:
            body = {
                "model": "echo",
                "prompt": "x",
                "max_tokens": stream.max_tokens,
                "seed": stream.seed,
                "client_id": stream.caller,
            }
            headers = {"X-Resumable": "60"}
            # An overloaded gateway says so, and is asked again.
            for _ in range(20):
                async with (
                    gate,
                    session.post(f"{urls[0]}/infer_stream", json=body, headers=headers) as reply,
                ):
                    if reply.status == 200:
                        stream.rid = reply.headers["X-Stream-Id"]
                        reply.close()
                        return
                    text = f"{reply.status} {await reply.text()}"
                    if reply.status != 503:
                        break
            stream.wrong.append(f"not accepted: {text}")

        await asyncio.gather(*map(post, streams))


async def _cancel_all(
    urls: list[str], own: list[Stream], foreign: list[Stream]
) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {"own": set(), "foreign": set()}
    gate = asyncio.Semaphore(100)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def cancel(kind: str, rid: str, caller: str) -> None:
            headers = {"X-Client-Id": caller}
            async with gate:
                # An overloaded gateway says so, and is asked again.
                for _ in range(20):
                    async with session.delete(
                        f"{urls[0]}/requests/{rid}", headers=headers
                    ) as reply:
                        status = reply.status
                    if status != 503:
                        break
                found[kind].add(status)
                if kind == "foreign":
                    async with session.get(
                        f"{urls[0]}/requests/{rid}/stream", headers=headers
                    ) as reply:
                        found[kind].add(reply.status)

        await asyncio.gather(
            *(cancel("own", s.rid, s.caller) for s in own if s.rid),
            *(cancel("foreign", s.rid, own[0].caller) for s in foreign if s.rid),
        )
    return found


async def overload(stage: Stage) -> None:
    """Twice what the queue and the workers hold: refused at once or served whole."""
    world, load = stage.world, stage.load
    for number in range(stage.rounds):
        streams = [load.make(f"crowd{number}-{i}", "refusable") for i in range(304)]
        world.mark()
        await load.play(streams)
        refused = [s for s in streams if s.refused_s]
        for stream in streams:
            await stage.ledger.check_budget(stream.caller, [stream])
        for stream in refused:
            load.streams.remove(stream)
            stage.ledger.wrong += [f"{stream.name}: {what}" for what in stream.wrong]
            if stream.refused_s[0] > 1.5:
                stage.ledger.wrong.append(f"refused after {stream.refused_s[0]:.2f} s")
        stage.proof(len(refused) > 100, f"refused: {len(refused)}")


SCENARIOS = (
    Scenario(
        "clients vanish and cancel",
        leave,
        fast=1,
        kinds=ALL,
        settings={"drain_grace_s": 1},
    ),
    Scenario(
        "slow clients",
        dawdle,
        kinds=("keyed", "plain", "chat"),
        settings={"echo_step_ms": 2, "tokens_per_minute": 9000},
    ),
    Scenario(
        "1,000 cancels at once",
        storm,
        # What a caller's hundred may need all at once; what they used before the cancels is seen
        # in its bucket for some seconds.
        settings={"tokens_per_minute": 12_000, "queue_limit": 2000},
    ),
    Scenario(
        "overload, twice the capacity",
        overload,
        # Little enough for a bucket still to show what was used when all have ended.
        settings={"queue_limit": 20, "max_batch_size": 16, "tokens_per_minute": 150},
        # Those who are refused were not under way; how fast they are is checked above.
        stalls="none",
    ),
)
