"""No script does more work because more engines live or more requests are open."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest
from redis.asyncio.client import PubSub
from script_model import (
    MODEL,
    MV,
    VERSION,
    Clock,
    make_end,
    make_request,
    make_tokens,
    read_state,
)

from shared import keys, messages
from shared.store import Emission, Store

LEASE_MS = 1000
NEVER = 10**9
SMALL, LARGE = 24, 1000
OPEN_PER_ENGINE = 10
LANE = 3


def card(engine: str) -> messages.EngineCard:
    return messages.EngineCard(
        messages.VERSION, engine, "echo", "", "", "", 1, 8, 0, 0, 0.0, False, 0.0
    )


async def put(store: Store, rid: str, caller: str) -> None:
    answer = await store.enqueue(
        make_request(rid, caller),
        cls="normal",
        timeout_ms=600_000,
        grace_ms=600_000,
        keep_ms=10_000,
        attempt=rid,
        queue_limit=10**6,
        queue_bytes=10**9,
        resumable=False,
    )
    assert answer.outcome == "accepted"


async def take(
    store: Store, engine: str, room: int, known: list[str] | None = None
) -> list[tuple[str, int]]:
    answer = await store.take(MV, engine, room, lease_ms=LEASE_MS, aging_ms=NEVER, known=known)
    return [(taken.rid, taken.epoch) for taken in answer.requests]


async def emit(
    store: Store, engine: str, owned: Iterable[tuple[str, int]], first: int = 1, reason: str = ""
) -> None:
    end = make_end(reason) if reason else b""
    tokens = make_tokens(first, ["x"])
    step = [Emission(rid, epoch, first, first, tokens, 1, reason, end) for rid, epoch in owned]
    _, answers = await store.emit(MV, engine, step)
    assert {answer.outcome for answer in answers} == {"ok"}


async def populate(store: Store, engines: int) -> PubSub:
    """So many live engines that own one request each; nine times as many requests wait in lanes."""
    channels = store.client.pubsub()
    names = [*(f"e{i}" for i in range(engines)), "mine"]
    await channels.subscribe(*map(keys.control_channel, names))
    for _ in names:
        assert await channels.get_message(timeout=5)
    for i in range(engines):
        await store.heartbeat(MODEL, VERSION, f"e{i}", card(f"e{i}"))
    for i in range(engines):
        await put(store, f"run{i}", f"runner{i}")
        await emit(store, f"e{i}", await take(store, f"e{i}", 1))
    for i in range(engines * (OPEN_PER_ENGINE - 1)):
        await put(store, f"wait{i}", f"caller{i // LANE}")
    return channels


async def measure(store: Store, clock: Clock, engines: int) -> dict[str, dict[str, int]]:
    """Commands that each kind of call made the server run."""
    client = store.client
    await client.flushall()
    await clock.advance(0)
    await clock.set_server("a", 10**6)
    channels = await populate(store, engines)
    state = await read_state(client)
    assert len(state.engines) == len(state.leases) == engines
    assert len(state.due) == engines * OPEN_PER_ENGINE
    costs: dict[str, dict[str, int]] = {}

    async def cost(name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        await client.config_resetstat()
        answer = await call()
        stats = await client.info("commandstats")
        # Loading a script for the first time is no part of what it costs.
        skip = {"evalsha", "eval", "config|resetstat", "info"}
        calls = {name.removeprefix("cmdstat_"): value["calls"] for name, value in stats.items()}
        costs[name] = {name: n for name, n in sorted(calls.items()) if name not in skip}
        return answer

    last = f"e{engines - 1}"
    await cost("enqueue first", lambda: put(store, "new0", "new"))
    await cost("enqueue more", lambda: put(store, "new1", "new"))
    await cost("heartbeat", lambda: store.heartbeat(MODEL, VERSION, "e0", card("e0")))
    await cost("limit", lambda: store.limit("new", 60, 1000, 10, "a1"))
    await cost("leave", lambda: store.leave("new0", "new"))
    await cost("greet", store.greet)
    await cost("attach", lambda: store.attach(make_request("new0", "new"), grace_ms=0))
    await cost("refund", lambda: store.refund("x", "new", "a1"))
    await cost("refund queued", lambda: store.refund("new1", "new", "new1"))
    await cost("settle", lambda: store.settle("new", "1-0", 5))
    await cost("expire nothing", store.expire)
    mine = await cost("take", lambda: take(store, "mine", 4))
    assert len(mine) == 4
    again = await cost("take known", lambda: take(store, "mine", 4, [rid for rid, _ in mine[:2]]))
    mine = mine[:2] + again
    assert len(mine) == 6
    await cost("emit", lambda: emit(store, "mine", mine))
    await cost("emit more", lambda: emit(store, "mine", mine, 2))
    await cost("emit end", lambda: emit(store, "mine", [mine.pop()], 3, "stop"))
    await cost("release", lambda: store.release(MV, "mine", mine[:2]))
    assert len(await cost("take released", lambda: take(store, "mine", 2))) == 2
    for name, rid in (
        ("cancel running", mine[2][0]),
        ("cancel head", f"wait{15 * LANE}"),
        ("cancel laned", f"wait{16 * LANE + 1}"),
    ):
        assert await cost(name, lambda rid=rid: store.cancel(rid, "")) == "cancelled"
    await cost("depart with requests", lambda: store.depart(MV, last))
    await cost("depart", lambda: store.depart(MV, "never"))
    await cost("forget", lambda: store.forget(MV, "never"))
    await clock.advance(200)
    assert len(await cost("take, all stale", lambda: take(store, "other", 4))) == 4
    await clock.advance(6000)
    await cost("heartbeat, all gone", lambda: store.heartbeat(MODEL, VERSION, "e0", card("e0")))
    orphans = await cost("take, all dead", lambda: take(store, "third", 4))
    assert len(orphans) == 4
    await clock.advance(10**6)
    assert len(await cost("expire 16", lambda: store.expire(16))) == 16
    await channels.unsubscribe()
    await channels.aclose()
    return costs


@pytest.mark.timeout(120)
async def test_a_crowd_costs_no_command_more(store: Store, clock: Clock) -> None:
    small = await measure(store, clock, SMALL)
    large = await measure(store, clock, LARGE)
    assert small.keys() == large.keys()
    for name, commands in small.items():
        assert large[name] == commands, name
    # One sequence of a step is an HMGET, an XADD, an HSET and a PUBLISH; unheard, two more.
    assert sum(small["emit more"].values()) <= 9 + 6 * 6
    await store.client.flushall()
