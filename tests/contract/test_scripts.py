"""Every script and every return code, on real servers."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio.client import PubSub
from script_model import (
    MODEL,
    MV,
    VERSION,
    Clock,
    assert_consistent,
    make_end,
    make_request,
    make_tokens,
    read_state,
)

from shared import keys, messages
from shared.errors import StoreUnavailable
from shared.store import (
    MAX_DEATHS,
    TAKE_BYTES,
    Departed,
    Emission,
    Emitted,
    Enqueued,
    Limited,
    Store,
    Take,
    Taken,
    connect,
)

SCRIPTS = Path(__file__).parents[2] / "shared" / "scripts"
LEASE_MS = 500
NEVER = 10**9
MINUTE = 60_000

# -- short forms ----------------------------------------------------------------------------------


async def beat(store: Store, engine: str, version: str = VERSION) -> str:
    card = messages.EngineCard(
        v=messages.VERSION,
        engine=engine,
        kind="echo",
        device="cpu",
        dtype="float32",
        host="here",
        pid=1,
        max_batch_size=8,
        running=0,
        waiting=0,
        kv_usage=0.0,
        draining=False,
        started=0.0,
    )
    return await store.heartbeat(MODEL, version, engine, card)


@pytest.fixture(autouse=True)
async def _open(store: Store) -> None:
    """The version takes requests, and one engine called a lives."""
    await beat(store, "a")


async def put(
    store: Store,
    rid: str,
    caller: str = "alice",
    cls: str = "normal",
    *,
    prompt: int = 3,
    timeout_ms: int = MINUTE,
    grace_ms: int = MINUTE,
    keep_ms: int = 30_000,
    queue_limit: int = 100_000,
    queue_bytes: int = 10**9,
    resumable: bool = False,
    attempt: str = "",
) -> Enqueued:
    return await store.enqueue(
        make_request(rid, caller, prompt),
        cls=cls,
        timeout_ms=timeout_ms,
        grace_ms=grace_ms,
        keep_ms=keep_ms,
        attempt=attempt or secrets.token_hex(8),
        queue_limit=queue_limit,
        queue_bytes=queue_bytes,
        resumable=resumable,
    )


async def take(
    store: Store,
    engine: str = "a",
    room: int = 1,
    *,
    lease_ms: int = LEASE_MS,
    aging_ms: int = NEVER,
    calm: bool = True,
    known: list[str] | None = None,
) -> Take:
    return await store.take(
        MV, engine, room, lease_ms=lease_ms, aging_ms=aging_ms, calm=calm, known=known
    )


async def take_ids(store: Store, engine: str = "a", room: int = 1, **more: int) -> list[str]:
    return [taken.rid for taken in (await take(store, engine, room, **more)).requests]


async def begin(store: Store, engine: str = "a", room: int = 1) -> list[Taken]:
    """Takes, and says the next token of each: nothing of it is a suspect if the engine dies."""
    taken = (await take(store, engine, room)).requests
    step = [emission(t.rid, t.epoch, t.seq + 1) for t in taken]
    assert set(await emit(store, *step, engine=engine)) <= {Emitted("ok")}
    return taken


def emission(
    rid: str, epoch: int = 1, first: int = 1, n: int = 1, reason: str = "", progress: int = -1
) -> Emission:
    last = first + n - 1
    texts = [f"{rid}{i}" for i in range(first, last + 1)]
    return Emission(
        rid,
        epoch,
        first,
        last,
        make_tokens(first, texts) if n else b"",
        last if progress < 0 else progress,
        reason,
        make_end(reason) if reason else b"",
    )


async def emit(store: Store, *step: Emission, engine: str = "a") -> list[Emitted]:
    return (await store.emit(MV, engine, step))[1]


async def end_of(store: Store, rid: str) -> messages.End:
    ends = [e.event for e in await store.read_log(rid, 0) if isinstance(e.event, messages.End)]
    assert len(ends) == 1
    return ends[0]


async def field(store: Store, rid: str, name: str) -> str | None:
    value = await store.client.hget(keys.request(rid), name)
    return None if value is None else value.decode()


async def counts(store: Store, cls: str = "normal") -> dict[str, int]:
    found = await store.client.hgetall(keys.count(MV, cls))
    return {name.decode(): int(value) for name, value in found.items()}


async def _answer(pubsub: PubSub, kind: str) -> None:
    async with asyncio.timeout(5):
        while True:
            message = await pubsub.get_message(timeout=5)
            if message is not None and message["type"] == kind:
                return


@asynccontextmanager
async def listening(store: Store, channel: str) -> AsyncIterator[PubSub]:
    """Subscribed to a channel inside, and certainly not any more after it."""
    pubsub = store.client.pubsub()
    await pubsub.subscribe(channel)
    await _answer(pubsub, "subscribe")
    try:
        yield pubsub
    finally:
        await pubsub.unsubscribe()
        await _answer(pubsub, "unsubscribe")
        await pubsub.aclose()


# -- enqueue --------------------------------------------------------------------------------------


async def test_enqueue_accepts_and_numbers(store: Store) -> None:
    for rid, caller, cls, ticket in (
        ("r1", "alice", "normal", "1"),
        ("r2", "alice", "normal", "2"),
        ("r3", "bob", "normal", "3"),
        ("r4", "bob", "high", "1"),
    ):
        assert await put(store, rid, caller, cls) == Enqueued("accepted")
        assert await field(store, rid, "tk") == ticket


async def test_enqueue_is_idempotent_in_every_state(store: Store) -> None:
    await put(store, "r1", attempt="a1")
    there = Enqueued("attached", view=make_request("r1").view(resumable=False), run=b"a1")
    assert await put(store, "r1") == there
    await take(store)
    await emit(store, emission("r1", n=3))
    assert await put(store, "r1") == there
    await emit(store, emission("r1", first=4, reason="stop"))
    assert await put(store, "r1") == there
    assert await store.attach(make_request("r1"), grace_ms=0) == there
    assert (await counts(store))["ticket"] == 1
    assert await store.client.xlen(keys.queue(MV, "normal")) == 0


async def test_enqueue_refuses_the_id_of_another_body_or_caller(store: Store) -> None:
    await put(store, "r1")
    assert await put(store, "r1", prompt=4) == Enqueued("conflict")
    assert await put(store, "r1", "bob") == Enqueued("conflict")
    assert (await counts(store))["ticket"] == 1


async def test_enqueue_refuses_a_closed_version_but_still_attaches(store: Store) -> None:
    await put(store, "r1")
    await store.client.delete(keys.is_open(MV))
    assert await put(store, "r2") == Enqueued("closed")
    assert (await put(store, "r1")).outcome == "attached"
    assert await store.client.exists(keys.request("r2")) == 0


async def test_enqueue_refuses_beyond_the_count(store: Store) -> None:
    await put(store, "r1", queue_limit=2)
    await put(store, "r2", "bob", queue_limit=2)
    assert await put(store, "r3", queue_limit=2) == Enqueued("full", waiting=2)
    assert (await put(store, "r2", "bob", queue_limit=2)).outcome == "attached"
    assert await put(store, "r4", cls="low", queue_limit=2) == Enqueued("accepted")
    await take(store)
    await put(store, "r3", queue_limit=2)
    assert await put(store, "r5", queue_limit=2) == Enqueued("full", waiting=2)


async def test_beyond_the_limit_whoever_has_nothing_waiting_gets_in(store: Store) -> None:
    for i in range(3):
        await put(store, f"a{i}", queue_limit=3)
    assert await put(store, "a3", queue_limit=3) == Enqueued("full", waiting=3)
    for i, caller in enumerate(("bob", "carol", "dave")):
        assert await put(store, f"b{i}", caller, queue_limit=3) == Enqueued("accepted")
        assert await put(store, f"c{i}", caller, queue_limit=3) == Enqueued("full", waiting=4 + i)
    # Twice the limit is the end, also for the next stranger.
    assert await put(store, "b3", "eve", queue_limit=3) == Enqueued("full", waiting=6)


async def test_beyond_the_bytes_whoever_has_nothing_waiting_gets_in(store: Store) -> None:
    size = len(messages.encode(make_request("r1")))
    await put(store, "r1", queue_bytes=size)
    assert await put(store, "r2", queue_bytes=size) == Enqueued("full", waiting=1)
    assert await put(store, "r3", "bob01", queue_bytes=size) == Enqueued("accepted")
    assert await put(store, "r4", "carol", queue_bytes=size) == Enqueued("full", waiting=2)


@pytest.mark.parametrize("reason", ["cancelled", "timeout", "queue_timeout", "error", "abandoned"])
async def test_a_repeated_id_whose_request_failed_runs_anew(
    store: Store, clock: Clock, reason: str
) -> None:
    await put(store, "r1")
    await take(store)
    await emit(store, emission("r1", n=2))
    await store.cancel("r1", "alice", reason)
    assert await put(store, "r1", prompt=4) == Enqueued("conflict")
    assert await store.attach(make_request("r1"), grace_ms=0) is None
    await clock.advance(1)
    assert await put(store, "r1") == Enqueued("accepted")
    for name in ("reason", "t1", "t2", "t3", "unheard"):
        assert await field(store, "r1", name) is None
    assert await store.read_log("r1", 0) == []
    await assert_consistent(store.client)
    # The same engine owns it again; what it says of the first run does not count.
    (taken,) = (await take(store)).requests
    assert (taken.rid, taken.epoch, taken.seq) == ("r1", 2, 0)
    assert await emit(store, emission("r1", 1, first=3)) == [Emitted("fenced")]
    assert await emit(store, emission("r1", 2, reason="stop")) == [Emitted("ok")]
    assert (await put(store, "r1")).outcome == "attached"
    facts = [fields for _, fields in await store.client.xrange(keys.ENDED)]
    assert [fact[b"reason"].decode() for fact in facts] == [reason, "stop"]


async def test_a_repeated_id_whose_log_is_gone_runs_anew(store: Store, clock: Clock) -> None:
    await put(store, "r1")
    await take(store)
    await emit(store, emission("r1", reason="stop"))
    assert (await put(store, "r1")).outcome == "attached"
    await store.client.delete(keys.log("r1"))
    await clock.advance(1)
    assert await store.attach(make_request("r1"), grace_ms=0) is None
    assert await put(store, "r1") == Enqueued("accepted")


async def test_attach_queues_nothing(store: Store) -> None:
    assert await store.attach(make_request("r1"), grace_ms=0) is None
    await put(store, "r1", resumable=True, attempt="a1")
    before = await read_state(store.client)
    there = Enqueued("attached", view=make_request("r1").view(resumable=True), run=b"a1")
    assert await store.attach(make_request("r1"), grace_ms=0) == there
    assert await store.attach(make_request("r1", "bob"), grace_ms=0) == Enqueued("conflict")
    assert await store.attach(make_request("r1", prompt=4), grace_ms=0) == Enqueued("conflict")
    after = await read_state(store.client)
    # Who attached made it its own.
    before.requests["r1"]["att"] = ""
    assert after == before


async def test_an_attempt_again_is_accepted_again_whatever_has_become_of_it(store: Store) -> None:
    assert await put(store, "r1", attempt="a1") == Enqueued("accepted")
    assert await put(store, "r1", attempt="a1") == Enqueued("accepted")
    await store.cancel("r1", "alice")
    assert await put(store, "r1", attempt="a1") == Enqueued("accepted")
    assert (await counts(store))["ticket"] == 1


async def test_enqueue_refuses_beyond_the_bytes(store: Store) -> None:
    size = len(messages.encode(make_request("r1")))
    assert (await put(store, "r1", queue_bytes=size * 2)).outcome == "accepted"
    assert (await put(store, "r2", queue_bytes=size * 2)).outcome == "accepted"
    assert await put(store, "r3", queue_bytes=size * 2) == Enqueued("full", waiting=2)
    await store.cancel("r1", "alice")
    assert (await put(store, "r3", queue_bytes=size * 2)).outcome == "accepted"
    # Nothing is accepted that is larger than twice the limit, whoever sends it.
    too_small = size // 2 - 1
    assert await put(store, "r4", cls="low", queue_bytes=too_small) == Enqueued("full", waiting=0)


async def test_enqueue_sets_deadline_and_lifetime(store: Store, clock: Clock) -> None:
    await put(store, "r1", timeout_ms=7000)
    assert await store.client.zscore(keys.DUE, "r1") == clock.now_ms + 7000
    expires = await store.client.execute_command("PEXPIRETIME", keys.request("r1"))
    assert expires == clock.now_ms + 7000 + 300_000


async def test_enqueue_forgets_a_log_that_outlived_its_request(store: Store) -> None:
    await store.client.xadd(keys.log("r1"), {"d": make_tokens(1, ["old"])}, id="9-0")
    await put(store, "r1")
    await take(store)
    assert await emit(store, emission("r1", reason="stop")) == [Emitted("ok")]


async def test_wake_tokens_are_capped(store: Store) -> None:
    for i in range(300):
        await put(store, f"r{i}")
    assert await store.client.llen(keys.wake(MV)) == 256
    taken = (await take(store, room=300)).requests
    assert len(taken) == 300
    assert await store.release(MV, "a", [(t.rid, t.epoch) for t in taken]) == 300
    assert await store.client.llen(keys.wake(MV)) == 256


# -- lanes ----------------------------------------------------------------------------------------


async def test_a_crowd_of_one_caller_delays_another_by_one_round(store: Store) -> None:
    for i in range(1000):
        await put(store, f"r{i}")
    await put(store, "bobs", "bob")
    assert await take_ids(store, room=2) == ["r0", "bobs"]
    await put(store, "bobs2", "bob")
    assert await take_ids(store, room=2) == ["r1", "bobs2"]
    for number in range(998):
        await store.cancel(f"r{number + 2}", "alice")


async def test_callers_take_exact_turns(store: Store) -> None:
    for caller, n in (("alice", 5), ("bob", 3), ("carol", 1)):
        for i in range(n):
            await put(store, f"{caller[0]}{i}", caller)
    order = [rid for _ in range(9) for rid in await take_ids(store)]
    assert order == ["a0", "b0", "c0", "a1", "b1", "a2", "b2", "a3", "a4"]


async def test_turns_are_the_same_in_one_call(store: Store) -> None:
    for caller, n in (("alice", 5), ("bob", 3), ("carol", 1)):
        for i in range(n):
            await put(store, f"{caller[0]}{i}", caller)
    order = await take_ids(store, room=9)
    assert order == ["a0", "b0", "c0", "a1", "b1", "a2", "b2", "a3", "a4"]


async def test_a_caller_has_a_lane_in_each_class(store: Store) -> None:
    for cls in keys.CLASSES:
        await put(store, f"{cls}0", cls=cls)
        await put(store, f"{cls}1", cls=cls)
    order = await take_ids(store, room=6)
    assert order == ["high0", "high1", "normal0", "normal1", "low0", "low1"]


async def test_a_lane_whose_next_request_vanished_goes_on(store: Store) -> None:
    for i in range(4):
        await put(store, f"r{i}")
    await store.client.delete(keys.request("r1"), keys.request("r2"))
    assert await take_ids(store, room=4) == ["r0", "r3"]
    await store.expire()
    await store.client.zrem(keys.DUE, "r1", "r2")
    assert (await counts(store))["waiting"] == 0


async def test_a_head_that_vanished_makes_room_for_the_next(store: Store) -> None:
    for i in range(3):
        await put(store, f"r{i}")
    await store.client.delete(keys.request("r0"))
    assert await take_ids(store, room=3) == ["r1", "r2"]
    await store.client.zrem(keys.DUE, "r0")


async def test_an_id_that_vanished_and_came_again_runs_once(store: Store) -> None:
    for rid in ("r0", "r1"):
        await put(store, rid)
    for rid in ("r0", "r1"):
        await store.client.delete(keys.request(rid))
        assert (await put(store, rid)).outcome == "accepted"
    assert sorted(await take_ids(store, room=9)) == ["r0", "r1"]
    assert await take_ids(store, room=9) == []
    await emit(store, emission("r0", reason="stop"), emission("r1", reason="stop"))
    assert await counts(store) | {"bytes": 0} == {
        "waiting": 0,
        "running": 0,
        "bytes": 0,
        "ticket": 4,
        "head": 4,
    }


# -- order ----------------------------------------------------------------------------------------


async def test_classes_in_order_then_age(store: Store) -> None:
    for i, cls in enumerate(["low", "normal", "high", "low", "high", "normal"]):
        await put(store, f"{cls}{i}", f"caller{i}", cls)
    order = [rid for _ in range(6) for rid in await take_ids(store)]
    assert order == ["high2", "high4", "normal1", "normal5", "low0", "low3"]


async def test_take_tells_how_many_still_wait(store: Store) -> None:
    assert await take(store) == Take([], 0)
    await put(store, "l", cls="low")
    await put(store, "n", cls="normal")
    await put(store, "h", cls="high")
    assert await take(store, room=0) == Take([], 3)
    assert [(await take(store)).waiting for _ in range(3)] == [2, 1, 0]


async def test_each_aging_period_lifts_by_one_class(store: Store, clock: Clock) -> None:
    await put(store, "low", "bob", "low")
    await clock.advance(999)
    await put(store, "normal", "carol", "normal")
    assert await take_ids(store, aging_ms=1000) == ["normal"]
    await clock.advance(1)
    await put(store, "normal2", "carol", "normal")
    await put(store, "high", "dave", "high")
    assert await take_ids(store, aging_ms=1000) == ["high"]
    # Both count as normal now, and low is the older one.
    assert await take_ids(store, aging_ms=1000) == ["low"]
    assert await take_ids(store, aging_ms=1000) == ["normal2"]


async def test_two_periods_lift_low_over_a_younger_high(store: Store, clock: Clock) -> None:
    await put(store, "low", "bob", "low")
    await clock.advance(2000)
    await put(store, "high", "dave", "high")
    assert await take_ids(store, aging_ms=1000, room=2) == ["low", "high"]


async def test_low_is_not_starved_by_a_stream_of_high(store: Store, clock: Clock) -> None:
    await put(store, "low", "bob", "low")
    order = []
    for i in range(30):
        await put(store, f"high{i}", f"caller{i}", "high")
        order += await take_ids(store, aging_ms=1000)
        await clock.advance(250)
    assert order.index("low") == 8


async def test_an_orphan_is_not_starved_by_a_stream_of_high(store: Store, clock: Clock) -> None:
    await put(store, "low", "bob", "low")
    taken = (await take(store)).requests[0]
    await store.release(MV, "a", [(taken.rid, taken.epoch)])
    order = []
    for i in range(30):
        await put(store, f"high{i}", f"caller{i}", "high")
        order += await take_ids(store, aging_ms=1000)
        await clock.advance(250)
    assert order.index("low") == 8


async def test_waited_and_times(store: Store, clock: Clock) -> None:
    start = clock.now_ms
    await store.limit("alice", 10, 100, 11, "a1")
    await put(store, "r1", attempt="a1")
    await clock.advance(40)
    taken = (await take(store)).requests[0]
    assert (taken.waited_ms, taken.cls, taken.seq, taken.deaths) == (40, 1, 0, 0)
    await clock.advance(30)
    await emit(store, emission("r1"))
    await clock.advance(30)
    await store.release(MV, "a", [("r1", 1)])
    await take(store, "b")
    await emit(store, emission("r1", 3, 2, reason="stop"), engine="b")
    fact = (await read_state(store.client)).facts[0]
    # Taken first at 40, whoever took it again later.
    times = [int(fact[name]) - start for name in ("t0", "t1", "t2", "t3")]
    assert times == [0, 40, 70, 100]
    assert {name: fact[name] for name in ("caller", "mv", "cls", "reason")} == {
        "caller": "alice",
        "mv": MV,
        "cls": "normal",
        "reason": "stop",
    }
    assert (fact["prompt"], fact["tokens"], fact["charge"]) == ("3", "2", "11")


async def test_another_group_on_the_queue_does_not_confuse_take(store: Store) -> None:
    await put(store, "r1")
    await put(store, "r2", "bob")
    await store.client.xgroup_create(keys.queue(MV, "normal"), "a-monitor", "$")
    assert await take_ids(store, room=2) == ["r1", "r2"]


# -- share, room, bytes ---------------------------------------------------------------------------


async def test_a_burst_is_shared_by_the_live_engines(store: Store) -> None:
    await beat(store, "b")
    await beat(store, "c")
    for i in range(10):
        await put(store, f"r{i}")
    assert [len(await take_ids(store, e, 8)) for e in "abcabc"] == [4, 2, 2, 1, 1, 0]


async def test_a_silent_engine_has_no_share(store: Store, clock: Clock) -> None:
    await beat(store, "a")
    await beat(store, "b")
    await clock.advance(5001)
    await beat(store, "a")
    for i in range(10):
        await put(store, f"r{i}")
    assert len(await take_ids(store, "a", 10)) == 10


async def test_room_bounds_a_take(store: Store) -> None:
    for i in range(5):
        await put(store, f"r{i}")
    assert await take_ids(store, room=0) == []
    assert await take_ids(store, room=2) == ["r0", "r1"]
    assert await take_ids(store, room=8) == ["r2", "r3", "r4"]


async def test_bytes_bound_a_take(store: Store) -> None:
    prompt = 250_000
    size = len(messages.encode(make_request("r0", prompt=prompt)))
    for i in range(8):
        await put(store, f"r{i}", prompt=prompt)
    fits = -(-TAKE_BYTES // size)
    assert 1 < fits < 8
    answer = await take(store, room=8)
    assert [len(t.body) for t in answer.requests] == [size] * fits
    assert len(await take_ids(store, room=8)) == 8 - fits


async def test_what_is_taken_decodes(store: Store) -> None:
    await put(store, "r1")
    taken = (await take(store)).requests[0]
    assert messages.decode(taken.body, messages.Request) == make_request("r1")
    assert taken.epoch == 1


# -- who is dead ----------------------------------------------------------------------------------


async def test_an_expired_lease_is_taken_over(store: Store, clock: Clock) -> None:
    async with listening(store, keys.control_channel("a")):
        await put(store, "r1")
        await take(store, "a")
        await emit(store, emission("r1", n=2))
        await clock.advance(LEASE_MS)
        assert await take_ids(store, "b", 4) == []
        await clock.advance(1)
        assert await take_ids(store, "a", 4) == []
        taken = (await take(store, "b", 4)).requests
        assert [(t.rid, t.epoch, t.seq) for t in taken] == [("r1", 2, 2)]
    assert await emit(store, emission("r1", 1, 3), engine="a") == [Emitted("fenced")]
    assert await emit(store, emission("r1", 2, 3), engine="b") == [Emitted("ok")]
    state = await read_state(store.client)
    assert (state.owns, set(state.leases)) == ({"b": 1}, {"b"})


async def test_nobody_on_the_control_channel_is_dead_at_once(store: Store, clock: Clock) -> None:
    await put(store, "r1")
    await take(store, "a")
    async with listening(store, keys.control_channel("a")):
        await clock.advance(151)
        assert await take_ids(store, "b", 4) == []
    await emit(store, emission("r1", n=0), engine="a")
    await clock.advance(150)
    assert await take_ids(store, "b", 4) == []
    await clock.advance(1)
    assert await take_ids(store, "b", 4) == ["r1"]


async def test_emit_renews_the_lease_and_only_an_existing_one(store: Store, clock: Clock) -> None:
    await put(store, "r1")
    await take(store, "a")
    for _ in range(4):
        await clock.advance(140)
        await emit(store, emission("r1", n=0), engine="a")
        assert await take_ids(store, "b", 4) == []
    await emit(store, engine="b")
    assert set((await read_state(store.client)).leases) == {"a"}


@pytest.mark.parametrize("uptime_s", [0, 10**6], ids=["restart", "failover"])
@pytest.mark.parametrize("greeted", [False, True])
async def test_nobody_is_dead_just_after_a_change_of_server(
    store: Store, clock: Clock, uptime_s: int, greeted: bool
) -> None:
    await store.greet()
    await put(store, "r1")
    await take(store, "a", lease_ms=1000)
    await clock.advance(10_000)
    await clock.set_server("another", uptime_s)
    if greeted:
        # The time to come back counts from the first who did.
        await store.greet()
        await clock.advance(500)
    assert await take_ids(store, "b", 4, lease_ms=1000) == []
    await clock.advance(1499 if greeted else 1999)
    await store.greet()
    assert await take_ids(store, "b", 4, lease_ms=1000) == []
    await clock.advance(1)
    assert await take_ids(store, "b", 4, lease_ms=1000) == ["r1"]


async def test_where_the_data_are_new_the_start_of_the_server_counts(
    store: Store, clock: Clock
) -> None:
    await clock.set_server("new", 1)
    await store.greet()
    await put(store, "r1")
    await take(store, "a", lease_ms=1000)
    await clock.advance(999)
    assert await take_ids(store, "b", 4, lease_ms=1000) == []
    await clock.advance(1)
    assert await take_ids(store, "b", 4, lease_ms=1000) == ["r1"]


async def test_nobody_is_dead_on_a_server_that_has_just_started(own_server) -> None:
    store = Store(connect(own_server.url, timeout_s=5))
    try:
        await beat(store, "a")
        await put(store, "r1")
        await take(store, "a")
        await store.client.zadd(keys.leases(MV), {"a": 1})
        assert await take_ids(store, "b", 4, lease_ms=MINUTE) == []
        # Two leases of no time have passed since.
        assert await take_ids(store, "b", 4, lease_ms=0) == ["r1"]
    finally:
        await store.close()


async def test_the_stalest_engines_are_looked_at_first(store: Store, clock: Clock) -> None:
    engines = [f"e{number:02}" for number in range(20)]
    for number, engine in enumerate(engines):
        await put(store, f"r{number:02}", f"caller{number}")
        await begin(store, engine)
        await clock.advance(1)
    await clock.advance(LEASE_MS)
    assert await take_ids(store, "a", 99) == [f"r{number:02}" for number in range(16)]
    assert await take_ids(store, "a", 99) == [f"r{number:02}" for number in range(16, 20)]


async def test_suspects_of_many_engines_hide_no_streams_of_another(
    store: Store, clock: Clock
) -> None:
    for engine in "cdefgh":
        await put(store, f"suspect-{engine}", f"caller-{engine}")
        await take(store, engine)
    await put(store, "under way")
    await begin(store, "z")
    await clock.advance(LEASE_MS + 1)
    assert await take_ids(store, "a", 9, calm=False) == ["under way"]


async def test_whose_own_lease_ran_out_judges_nobody(store: Store, clock: Clock) -> None:
    """Redis stood still, and this call came before it did: the others had no time to talk."""
    await put(store, "r1")
    await begin(store, "b")
    await put(store, "r2")
    await begin(store, "c")
    await clock.advance(LEASE_MS + 1)
    assert await take_ids(store, "c", 9) == []
    await emit(store, emission("r2", first=2), engine="c")
    assert await take_ids(store, "c", 9) == ["r1"]


async def test_orphans_come_first_in_their_class_and_by_age(store: Store, clock: Clock) -> None:
    for i, engine in enumerate("dcdc"):
        await put(store, f"r{i}", f"caller{i}")
        await begin(store, engine)
    await put(store, "high", "eve", "high")
    await put(store, "young", "frank")
    await clock.advance(LEASE_MS + 1)
    assert await take_ids(store, "a", 9) == ["high", "r0", "r1", "r2", "r3", "young"]


async def test_room_bounds_a_take_over(store: Store, clock: Clock) -> None:
    for i in range(5):
        await put(store, f"r{i}")
    await begin(store, "z", 5)
    await clock.advance(LEASE_MS + 1)
    assert await take_ids(store, "a", 2) == ["r0", "r1"]
    # What is left to the old owner stays its own while it lives.
    assert await emit(store, emission("r4", first=2), emission("r0", first=2), engine="z") == [
        Emitted("ok"),
        Emitted("fenced"),
    ]
    await clock.advance(LEASE_MS + 1)
    await emit(store, engine="a")
    assert await take_ids(store, "a", 9) == ["r2", "r3", "r4"]


async def test_a_lease_without_requests_goes(store: Store, clock: Clock) -> None:
    await store.client.zadd(keys.leases(MV), {"ghost": clock.now_ms - MINUTE})
    await store.client.hset(keys.owns(MV), "ghost", 3)
    assert await take_ids(store) == []


async def test_an_orphan_past_its_deadline_ends(store: Store, clock: Clock) -> None:
    await put(store, "r1", timeout_ms=1000)
    await take(store, "z")
    await clock.advance(1000)
    assert await take_ids(store) == []
    assert (await end_of(store, "r1")).reason == "timeout"


async def test_an_orphan_that_vanished_leaves_nothing(store: Store, clock: Clock) -> None:
    await put(store, "r1")
    await put(store, "r2")
    await take(store, "z", 2)
    await store.client.delete(keys.request("r1"))
    await store.client.zrem(keys.DUE, "r1")
    await clock.advance(LEASE_MS + 1)
    assert await take_ids(store, "a", 4) == ["r2"]
    assert (await counts(store))["running"] == 1


# -- what a lost reply handed over ----------------------------------------------------------------


async def test_known_recovers_a_lost_reply(store: Store, clock: Clock) -> None:
    for i in range(3):
        await put(store, f"r{i}")
    await take(store, room=1)
    await take(store, room=2)
    assert await take_ids(store, room=4) == []
    answer = await take(store, room=0, known=["r0"])
    assert [(t.rid, t.epoch, t.deaths) for t in answer.requests] == [("r1", 2, 0), ("r2", 2, 0)]
    assert [t.rid for t in (await take(store, known=["r0", "r1", "r2"])).requests] == []
    assert await emit(store, emission("r1", 1), emission("r1", 2)) == [
        Emitted("fenced"),
        Emitted("ok"),
    ]


async def test_known_counts_against_the_room(store: Store) -> None:
    for i in range(4):
        await put(store, f"r{i}")
    await take(store, room=2)
    answer = await take(store, room=3, known=[])
    assert [t.rid for t in answer.requests] == ["r0", "r1", "r2"]


async def test_known_lets_go_of_what_vanished(store: Store) -> None:
    await put(store, "r1")
    await take(store)
    await store.client.delete(keys.request("r1"))
    await store.client.zrem(keys.DUE, "r1")
    assert (await take(store, known=[])).requests == []
    assert (await counts(store))["running"] == 0


# -- emit -----------------------------------------------------------------------------------------


async def test_the_fence_compares_epoch_and_engine(store: Store) -> None:
    await put(store, "r1")
    await take(store)
    assert await emit(store, emission("r1", 1), engine="b") == [Emitted("fenced")]
    assert await emit(store, emission("r1", 0)) == [Emitted("fenced")]
    assert await emit(store, emission("r1", 2)) == [Emitted("fenced")]
    assert await emit(store, emission("r1", 1)) == [Emitted("ok")]
    assert await emit(store, emission("r1", 2, 2, reason="stop"), engine="b") == [Emitted("fenced")]


async def test_a_waiting_request_has_no_owner(store: Store) -> None:
    await put(store, "r1")
    assert await emit(store, emission("r1", 0)) == [Emitted("fenced")]
    assert await emit(store, emission("r1", 1)) == [Emitted("fenced")]


async def test_emit_answers(store: Store) -> None:
    await put(store, "r1")
    await take(store)
    for step, answer in (
        (emission("r1", n=3), Emitted("ok")),
        (emission("r1", n=3), Emitted("duplicate")),
        (emission("r1", first=2, n=1), Emitted("duplicate")),
        (emission("r1", first=5), Emitted("gap", seq=3)),
        (emission("r1", first=2, n=4), Emitted("gap", seq=3)),
        (emission("r1", first=5, n=0), Emitted("gap", seq=3)),
        (emission("r1", first=5, n=0, reason="stop"), Emitted("gap", seq=3)),
        (emission("r1", first=4, n=0), Emitted("ok")),
        (emission("r1", first=4, n=2), Emitted("ok")),
        (emission("nothing"), Emitted("lost")),
    ):
        assert await emit(store, step) == [answer], step
    log = await store.read_log("r1", 0)
    assert [t.text for e in log for t in e.event.tokens] == [f"r1{i}" for i in range(1, 6)]


async def test_the_end_comes_once(store: Store) -> None:
    await put(store, "r1")
    await take(store)
    last = emission("r1", n=2, reason="length")
    assert await emit(store, last) == [Emitted("ok")]
    assert await emit(store, last) == [Emitted("duplicate")]
    assert await emit(store, emission("r1", first=3, reason="length")) == [
        Emitted("ended", reason="length")
    ]
    assert await emit(store, emission("r1", n=2, reason="stop")) == [
        Emitted("ended", reason="length")
    ]
    assert await emit(store, emission("r1", n=0, first=3)) == [Emitted("ended", reason="length")]
    assert await emit(store, last, engine="b") == [Emitted("ended", reason="length")]
    assert await store.cancel("r1", "alice") == "ended"
    assert await end_of(store, "r1") == messages.decode(make_end("length"), messages.End)


async def test_an_end_without_tokens_and_after_a_duplicate(store: Store) -> None:
    await put(store, "r1")
    await put(store, "r2")
    await take(store, room=2)
    assert await emit(store, emission("r1", n=0, reason="stop")) == [Emitted("ok")]
    await emit(store, emission("r2", n=2))
    assert await emit(store, emission("r2", n=2, reason="stop")) == [Emitted("ok")]
    assert await store.client.xrange(keys.log("r1")) == [(b"0-1", {b"d": make_end("stop")})]
    assert [e[0] for e in await store.client.xrange(keys.log("r2"))] == [b"2-0", b"2-1"]


async def test_one_step_of_many_sequences(store: Store) -> None:
    for i in range(3):
        await put(store, f"r{i}")
    await put(store, "more")
    await take(store, room=3)
    waiting, answers = await store.emit(
        MV,
        "a",
        [emission("r0"), emission("nothing"), emission("r1", first=2), emission("r2", n=0)],
    )
    assert waiting == 1
    assert [a.outcome for a in answers] == ["ok", "lost", "gap", "ok"]


async def test_the_log_and_the_channel_carry_the_same_bytes(store: Store) -> None:
    await put(store, "r1")
    await take(store)
    async with listening(store, keys.log("r1")) as channel:
        await emit(store, emission("r1", n=3))
        await emit(store, emission("r1", n=3))
        await emit(store, emission("r1", first=4, n=0))
        await emit(store, emission("r1", first=4, n=2))
        await store.cancel("r1", "alice")
        log = await store.client.xrange(keys.log("r1"))
        assert [entry_id for entry_id, _ in log] == [b"3-0", b"5-0", b"5-1"]
        for entry_id, fields in log:
            message = await channel.get_message(timeout=5)
            assert message is not None
            assert message["data"] == entry_id + b" " + fields[b"d"]
            entry = messages.read_entry(entry_id, fields[b"d"])
            assert messages.read_frame(message["data"]) == entry
        assert await channel.get_message(timeout=0) is None


async def test_read_log_continues_after_any_token(store: Store) -> None:
    await put(store, "r1")
    await take(store)
    await emit(store, emission("r1", n=3))
    await emit(store, emission("r1", first=4, n=2, reason="stop"))
    seqs = [[e.seq for e in await store.read_log("r1", after)] for after in range(7)]
    assert seqs == [[3, 5, 5], [3, 5, 5], [3, 5, 5], [5, 5], [5, 5], [5], []]
    assert [e.seq for e in await store.read_log("r1", 0, most=1)] == [3]


async def test_lifetimes(store: Store) -> None:
    await put(store, "r1", timeout_ms=7000, keep_ms=20_000)
    await take(store)
    await emit(store, emission("r1"))
    client = store.client
    lives = await client.execute_command("PEXPIRETIME", keys.request("r1"))
    assert await client.execute_command("PEXPIRETIME", keys.log("r1")) == lives
    await emit(store, emission("r1", first=2, reason="stop"))
    assert 15_000 < await client.pttl(keys.log("r1")) <= 20_000
    assert 20_000 < await client.pttl(keys.request("r1")) <= 25_000
    assert await field(store, "r1", "body") is None


async def test_the_end_of_a_request_without_tokens_expires_too(store: Store) -> None:
    await put(store, "r1", keep_ms=20_000)
    await store.cancel("r1", "alice")
    assert 15_000 < await store.client.pttl(keys.log("r1")) <= 20_000


async def test_the_deadline_ends_a_running_request(store: Store, clock: Clock) -> None:
    await put(store, "r1", timeout_ms=1000)
    await put(store, "r2", timeout_ms=1000)
    await take(store, room=2)
    await clock.advance(999)
    assert await emit(store, emission("r1")) == [Emitted("ok")]
    await clock.advance(1)
    assert await emit(store, emission("r1", first=2), emission("r2", reason="stop")) == [
        Emitted("ended", reason="timeout"),
        Emitted("ok"),
    ]
    assert (await end_of(store, "r1")).reason == "timeout"
    assert await field(store, "r1", "seq") == "2"


async def test_abandoned_when_nobody_listens_for_the_grace_time(store: Store, clock: Clock) -> None:
    await put(store, "r1", grace_ms=1000)
    await take(store)
    assert await emit(store, emission("r1", first=1)) == [Emitted("ok")]
    await clock.advance(1000)
    assert await emit(store, emission("r1", first=2)) == [Emitted("ok")]
    await clock.advance(1)
    assert await emit(store, emission("r1", first=3, n=0)) == [Emitted("ok")]
    assert await emit(store, emission("r1", first=3)) == [Emitted("ended", reason="abandoned")]
    assert (await end_of(store, "r1")).reason == "abandoned"


async def test_a_listener_who_comes_back_starts_the_grace_time_anew(
    store: Store, clock: Clock
) -> None:
    await put(store, "r1", grace_ms=1000)
    await take(store)
    await emit(store, emission("r1", first=1))
    await clock.advance(2000)
    async with listening(store, keys.log("r1")):
        assert await emit(store, emission("r1", first=2)) == [Emitted("ok")]
    assert await emit(store, emission("r1", first=3)) == [Emitted("ok")]
    await clock.advance(1000)
    assert await emit(store, emission("r1", first=4)) == [Emitted("ok")]
    await clock.advance(1)
    assert await emit(store, emission("r1", first=5)) == [Emitted("ended", reason="abandoned")]


async def test_to_a_server_that_was_not_there_nobody_can_have_listened(
    store: Store, clock: Clock
) -> None:
    await store.greet()
    await put(store, "r1", grace_ms=1000)
    await put(store, "r2", grace_ms=1000)
    await take(store)
    await emit(store, emission("r1"))
    await store.leave("r2", "alice")
    await clock.advance(1001)
    # The worker is back before the gateway.
    await clock.set_server("another", 0)
    assert await emit(store, emission("r1", first=2)) == [Emitted("ok")]
    assert await take_ids(store) == ["r2"]
    await clock.advance(1000)
    assert await emit(store, emission("r1", first=3)) == [Emitted("ok")]
    await clock.advance(1)
    assert await emit(store, emission("r1", first=4)) == [Emitted("ended", reason="abandoned")]


async def test_what_ends_unheard_is_not_abandoned(store: Store, clock: Clock) -> None:
    await put(store, "r1", grace_ms=1000)
    await take(store)
    await emit(store, emission("r1"))
    await clock.advance(1001)
    assert await emit(store, emission("r1", first=2, reason="stop")) == [Emitted("ok")]
    assert (await end_of(store, "r1")).reason == "stop"


async def test_the_grace_time_runs_on_where_no_token_was_heard(store: Store, clock: Clock) -> None:
    await put(store, "r1", grace_ms=1000)
    await take(store)
    await emit(store, emission("r1"))
    await clock.advance(600)
    async with listening(store, keys.log("r1")):
        assert await emit(store, emission("r1", first=2, n=0)) == [Emitted("ok")]
    await clock.advance(401)
    assert await emit(store, emission("r1", first=2)) == [Emitted("ended", reason="abandoned")]


async def test_the_grace_time_of_who_left_while_nothing_came_runs_on(
    store: Store, clock: Clock
) -> None:
    await put(store, "r1", grace_ms=1000)
    await take(store)
    async with listening(store, keys.log("r1")):
        await emit(store, emission("r1"))
    assert await store.leave("r1", "alice")
    await clock.advance(1001)
    assert await emit(store, emission("r1", first=2)) == [Emitted("ended", reason="abandoned")]


async def test_what_waited_unheard_for_its_grace_is_not_taken(store: Store, clock: Clock) -> None:
    for rid in ("r0", "r1", "r2"):
        await put(store, rid, grace_ms=1000)
        assert await store.leave(rid, "alice")
    await put(store, "r3")
    await clock.advance(1000)
    assert await take_ids(store) == ["r0"]
    await clock.advance(1)
    async with listening(store, keys.log("r2")):
        assert await take_ids(store, room=4) == ["r2", "r3"]
    assert (await end_of(store, "r1")).reason == "abandoned"
    # From its first token on r0 goes the way of any other.
    assert await emit(store, emission("r0")) == [Emitted("ended", reason="abandoned")]
    assert [await field(store, rid, "unheard") for rid in ("r2", "r3")] == [
        None,
        str(clock.now_ms),
    ]


async def test_a_request_that_nobody_listens_to_begins_its_grace_when_it_is_taken(
    store: Store, clock: Clock
) -> None:
    await put(store, "r1", grace_ms=1000)
    await clock.advance(5000)
    assert await take_ids(store) == ["r1"]
    await clock.advance(1000)
    assert await emit(store, emission("r1")) == [Emitted("ok")]
    await clock.advance(1)
    assert await emit(store, emission("r1", first=2)) == [Emitted("ended", reason="abandoned")]


async def test_the_grace_time_counts_from_the_last_who_left(store: Store, clock: Clock) -> None:
    await put(store, "r1", grace_ms=1000)
    async with listening(store, keys.log("r1")):
        assert not await store.leave("r1", "alice")
    assert await field(store, "r1", "unheard") is None
    assert await store.leave("r1", "alice")
    await clock.advance(900)
    # Somebody came back, and left.
    assert await store.leave("r1", "alice")
    await clock.advance(1000)
    assert await take_ids(store) == ["r1"]


async def test_only_an_open_request_of_the_caller_is_left(store: Store) -> None:
    assert not await store.leave("r1", "alice")
    assert await store.client.exists(keys.request("r1")) == 0
    await put(store, "r1")
    assert not await store.leave("r1", "bob")
    await store.cancel("r1", "alice")
    assert not await store.leave("r1", "alice")
    assert await field(store, "r1", "unheard") is None


# -- enqueue of what was lost ---------------------------------------------------------------------


def had(count: int) -> list[messages.Token]:
    return [messages.Token(0, n, f"t{n}") for n in range(1, count + 1)]


async def put_again(
    store: Store, rid: str, count: int, attempt: str = "first", t0: int = 0
) -> Enqueued:
    return await store.enqueue(
        make_request(rid, "alice", 3),
        cls="normal",
        timeout_ms=MINUTE,
        grace_ms=MINUTE,
        keep_ms=30_000,
        attempt=attempt,
        queue_limit=0,
        queue_bytes=0,
        resumable=False,
        had=had(count),
        t0=t0,
    )


@pytest.mark.parametrize("count", [0, 1, 512, 1025])
async def test_what_was_lost_goes_on_after_its_tokens(store: Store, count: int) -> None:
    # However full the queue is, and whether its version is open: it had been accepted.
    await store.client.delete(keys.is_open(MV))
    assert await put_again(store, "r1", count) == Enqueued("accepted")
    entries = await store.read_log("r1", 0)
    assert [t for e in entries for t in e.event.tokens] == had(count)
    assert [e.seq for e in entries] == [min(n + 512, count) for n in range(0, count, 512)]
    (taken,) = (await take(store)).requests
    assert (taken.epoch, taken.seq) == (1, count)
    assert await emit(store, emission("r1", first=count + 1, reason="stop")) == [Emitted("ok")]
    assert (await end_of(store, "r1")).reason == "stop"
    assert await field(store, "r1", "seq") == str(count + 1)


async def test_what_was_not_lost_is_left_as_it_is(store: Store) -> None:
    await put(store, "r1", attempt="first")
    await begin(store)
    before = await read_state(store.client)
    assert await put_again(store, "r1", 5) == Enqueued("accepted")
    # Of another run: its own is lost, and will not come again.
    assert await put_again(store, "r1", 5, "other") == Enqueued("conflict")
    assert await read_state(store.client) == before
    await store.cancel("r1", "alice")
    assert await put_again(store, "r1", 5) == Enqueued("accepted")
    assert await field(store, "r1", "st") == "e"
    assert (await counts(store))["waiting"] == 0


async def test_a_run_is_put_back_in_the_place_of_one_that_failed_before(
    store: Store, clock: Clock
) -> None:
    """Redis has lost it, and knows the one before: that is where it has gone back to."""
    await put(store, "r1", attempt="before")
    await begin(store)
    await store.cancel("r1", "alice")
    t0 = int(await field(store, "r1", "t0") or 0)
    # A run that was accepted before it has ended, and was not lost.
    assert await put_again(store, "r1", 5, t0=t0) == Enqueued("conflict")
    await clock.advance(2)
    assert await put_again(store, "r1", 5, t0=t0 + 1) == Enqueued("accepted")
    (taken,) = (await take(store)).requests
    assert (taken.epoch, taken.seq) == (2, 5)
    assert await field(store, "r1", "run") == "first"


async def test_an_attempt_again_after_another_attached_is_no_other_run(store: Store) -> None:
    """Its answer was lost; a client attached to it, and it failed."""
    await put(store, "r1", attempt="a1")
    await put(store, "r1", attempt="a2")
    await store.cancel("r1", "alice")
    assert await put(store, "r1", attempt="a1") == Enqueued("accepted")
    assert await field(store, "r1", "st") == "e"


async def test_a_cancel_of_one_run_leaves_the_next_one(store: Store, clock: Clock) -> None:
    await put(store, "r1", attempt="a1")
    assert await store.cancel("r1", "alice", run=b"a1") == "cancelled"
    await clock.advance(1)
    await put(store, "r1", attempt="a2")
    assert await store.cancel("r1", "alice", run=b"a1") == "ended"
    assert await field(store, "r1", "st") == "w"
    assert await store.cancel("r1", "alice", run=b"a2") == "cancelled"


async def test_an_owner_of_what_was_lost_is_fenced(store: Store) -> None:
    await put(store, "r1", attempt="first")
    await begin(store)
    await store.client.flushall()
    await put_again(store, "r1", 1)
    assert await emit(store, emission("r1", first=2)) == [Emitted("fenced")]


# -- cancel, expire, release, depart --------------------------------------------------------------


async def test_cancel_the_waiting_head(store: Store) -> None:
    for i in range(3):
        await put(store, f"r{i}")
    async with listening(store, keys.log("r0")) as channel:
        assert await store.cancel("r0", "alice") == "cancelled"
        message = await channel.get_message(timeout=5)
    assert message is not None
    assert messages.read_frame(message["data"]).event == messages.End(1, "cancelled")
    assert await store.cancel("r0", "alice") == "ended"
    assert await take_ids(store, room=4) == ["r1", "r2"]


async def test_cancel_in_the_lane(store: Store) -> None:
    for i in range(4):
        await put(store, f"r{i}")
    assert await store.cancel("r3", "alice") == "cancelled"
    assert await store.cancel("r1", "alice") == "cancelled"
    assert (await counts(store))["waiting"] == 2
    assert await take_ids(store, room=4) == ["r0", "r2"]


async def test_cancel_a_running_one(store: Store) -> None:
    await put(store, "r1")
    await take(store)
    await emit(store, emission("r1"))
    assert await store.cancel("r1", "alice") == "cancelled"
    assert await emit(store, emission("r1", first=2)) == [Emitted("ended", reason="cancelled")]
    state = await read_state(store.client)
    assert (state.owns, state.leases, state.due) == ({}, {}, {})


async def test_cancel_is_for_the_caller_alone(store: Store) -> None:
    await put(store, "r1")
    assert await store.cancel("r1", "bob") == "unknown"
    assert await store.cancel("r2", "alice") == "unknown"
    assert (await counts(store))["waiting"] == 1
    assert await store.cancel("r1", "", "abandoned") == "cancelled"
    assert (await end_of(store, "r1")).reason == "abandoned"


async def test_expire(store: Store, clock: Clock) -> None:
    for i in range(4):
        await put(store, f"r{i}", timeout_ms=1000 + i)
    await put(store, "late", "bob", timeout_ms=5000)
    await take(store)
    assert await store.expire() == []
    await clock.advance(1001)
    assert await store.expire() == ["r0", "r1"]
    await clock.advance(10)
    assert await store.expire(most=1) == ["r2"]
    assert await store.expire() == ["r3"]
    reasons = [(await end_of(store, f"r{i}")).reason for i in range(4)]
    assert reasons == ["timeout"] + ["queue_timeout"] * 3
    assert await emit(store, emission("r0")) == [Emitted("ended", reason="timeout")]
    assert await take_ids(store, room=4) == ["late"]


async def test_expire_forgets_what_vanished(store: Store, clock: Clock) -> None:
    await store.client.zadd(keys.DUE, {"gone": clock.now_ms - 1})
    assert await store.expire() == []


async def test_take_ends_what_waited_too_long(store: Store, clock: Clock) -> None:
    await put(store, "r0", timeout_ms=1000)
    await put(store, "r1", timeout_ms=1000)
    await put(store, "r2")
    await clock.advance(1000)
    assert await take_ids(store) == ["r2"]
    assert (await end_of(store, "r0")).reason == "queue_timeout"


async def test_one_take_does_not_end_a_whole_queue(store: Store, clock: Clock) -> None:
    for i in range(2000):
        await put(store, f"r{i}", timeout_ms=1000)
    await put(store, "good")
    await clock.advance(1000)
    first = await take(store)
    assert first.waiting > 1000
    for _ in range(20):
        taken = await take_ids(store)
        if taken:
            break
    assert taken == ["good"]
    await store.client.delete(*[keys.log(f"r{i}") for i in range(2000)])


async def test_release_hands_back_at_once(store: Store) -> None:
    for i in range(3):
        await put(store, f"r{i}")
    await take(store, room=3)
    await emit(store, emission("r0", n=2))
    await store.client.delete(keys.wake(MV))
    assert await store.release(MV, "a", [("r0", 1), ("r1", 1), ("r2", 9), ("nothing", 1)]) == 2
    assert await store.client.llen(keys.wake(MV)) == 2
    assert await store.release(MV, "a", [("r0", 1)]) == 0
    assert await emit(store, emission("r0", first=3)) == [Emitted("fenced")]
    await put(store, "r3")
    taken = (await take(store, "b", 8)).requests
    assert [(t.rid, t.epoch, t.seq, t.deaths) for t in taken] == [
        ("r0", 3, 2, 0),
        ("r1", 3, 0, 0),
        ("r3", 1, 0, 0),
    ]
    state = await read_state(store.client)
    assert (state.owns, set(state.leases)) == ({"a": 1, "b": 3}, {"a", "b"})


async def test_what_was_released_may_come_back_or_be_cancelled(store: Store) -> None:
    await put(store, "r0")
    await put(store, "r1")
    await take(store, room=2)
    assert await store.release(MV, "a", [("r0", 1), ("r1", 1)]) == 2
    assert await store.cancel("r0", "alice") == "cancelled"
    assert await take_ids(store, "a", 4) == ["r1"]


async def test_depart(store: Store) -> None:
    await put(store, "r1")
    await take(store)
    assert await store.depart(MV, "a") == Departed(False, False)
    await emit(store, emission("r1", reason="stop"))
    assert await store.depart(MV, "a") == Departed(True, False)
    assert await store.depart(MV, "a") == Departed(True, False)
    assert await store.client.exists(keys.engines(MV), keys.cards(MV)) == 0
    assert await store.client.xinfo_consumers(keys.queue(MV, "normal"), keys.GROUP) == []


async def test_depart_from_queues_that_were_never_used(store: Store) -> None:
    assert await store.depart(MV, "never-there") == Departed(True, False)


async def test_what_a_departed_engine_owns_is_taken_over(store: Store, clock: Clock) -> None:
    await put(store, "r1")
    await take(store)
    await store.depart(MV, "a")
    await clock.advance(151)
    assert await take_ids(store, "b") == ["r1"]


async def consumers(store: Store) -> set[str]:
    found = await store.client.xinfo_consumers(keys.queue(MV, "normal"), keys.GROUP)
    return {consumer["name"].decode() for consumer in found}


async def test_consumers_of_dead_engines_go(store: Store, clock: Clock) -> None:
    for i in range(3):
        await put(store, f"r{i}")
    await take(store, "dead", 2)
    await beat(store, "idle")
    await take(store, "idle")
    await emit(store, emission("r2", reason="stop"), engine="idle")
    await clock.advance(LEASE_MS + 1)
    assert await take_ids(store, "a", 1) == ["r0"]
    assert await consumers(store) == {"a", "dead", "idle"}
    assert await take_ids(store, "a", 1) == ["r1"]
    assert await consumers(store) == {"a", "idle"}
    # It owned nothing, so nobody took anything over; its heartbeat is missed.
    await clock.advance(5001)
    await beat(store, "a")
    assert await consumers(store) == {"a"}


# -- heartbeat ------------------------------------------------------------------------------------


async def test_the_live_version_changes_only_when_the_old_one_has_no_engine(
    store: Store, clock: Clock
) -> None:
    assert await beat(store, "a", "1") == "1"
    assert await beat(store, "b", "2") == "1"
    await clock.advance(5000)
    assert await beat(store, "b", "2") == "1"
    await clock.advance(1)
    assert await beat(store, "b", "2") == "2"
    assert await beat(store, "a", "1") == "2"
    assert await store.client.hget(keys.model(MODEL), "live") == b"2"
    assert await store.client.smembers(keys.MODELS) == {MODEL.encode()}
    assert await store.client.exists(keys.is_open("m@1"), keys.is_open("m@2")) == 2


async def is_open(store: Store, mv: str) -> bool:
    return bool(await store.client.exists(keys.is_open(mv)))


async def test_with_its_last_engine_a_version_goes_when_there_is_another(store: Store) -> None:
    """At once: what would be queued for it from now on had nobody to run it."""
    await beat(store, "a2", "1")
    assert await beat(store, "b", "2") == "1"
    assert await store.depart(MV, "a") == Departed(True, False)
    assert await store.client.hget(keys.model(MODEL), "live") == b"1"
    assert await is_open(store, "m@1")
    # Said again after a lost reply, it is answered again.
    for _ in range(2):
        assert await store.depart(MV, "a2") == Departed(True, True)
        assert await store.client.hget(keys.model(MODEL), "live") == b"2"
        assert not await is_open(store, "m@1")
        assert await is_open(store, "m@2")
    assert (await put(store, "r1")).outcome == "closed"
    # It may come back, and the other goes: then it is as before.
    assert await beat(store, "a3", "1") == "2"
    assert await store.depart("m@2", "b") == Departed(True, True)
    assert await store.client.hget(keys.model(MODEL), "live") == b"1"
    assert (await put(store, "r1")).outcome == "accepted"


async def test_the_only_version_stays_open_without_an_engine(store: Store) -> None:
    """Requests wait for the next worker, as after scaling to zero."""
    assert await store.depart(MV, "a") == Departed(True, False)
    assert (await put(store, "r1")).outcome == "accepted"


async def test_a_version_whose_engines_are_gone_is_closed_for_the_next(
    store: Store, clock: Clock
) -> None:
    """They were killed, or are of a release that signs off without a word."""
    await beat(store, "a", "1")
    await beat(store, "b", "2")
    await clock.advance(4000)
    await beat(store, "b", "2")
    await clock.advance(1001)
    assert await beat(store, "b", "2") == "2"
    assert not await is_open(store, "m@1")
    await beat(store, "a", "1")
    assert await is_open(store, "m@1")


async def test_an_outage_makes_no_other_version_live(store: Store, clock: Clock) -> None:
    """All heartbeats are old then; who comes back first takes nobody's place."""
    await beat(store, "canary", "2")
    await clock.advance(60_000)
    assert await beat(store, "canary", "2") == "1"
    assert await store.forget(MV, "a") is True
    assert await is_open(store, "m@1")
    await clock.advance(500)
    assert await beat(store, "a", "1") == "1"
    await clock.advance(500)
    assert await beat(store, "canary", "2") == "1"
    assert await is_open(store, "m@1")


async def test_an_engine_that_is_heard_is_not_forgotten(store: Store, clock: Clock) -> None:
    await beat(store, "a")
    await clock.advance(5000)
    assert await store.forget(MV, "a") is False
    assert await store.client.hkeys(keys.cards(MV)) == [b"a"]
    await clock.advance(1)
    assert await store.forget(MV, "a") is True
    assert await store.client.hkeys(keys.cards(MV)) == []


async def test_forget_leaves_what_an_engine_owns(store: Store, clock: Clock) -> None:
    await beat(store, "a")
    await put(store, "r1")
    await take(store)
    await clock.advance(5001)
    assert await store.forget(MV, "a") is False
    assert await take_ids(store, "b") == ["r1"]
    assert await store.forget(MV, "a") is True


async def test_take_tells_whether_others_own_anything(store: Store) -> None:
    for i in range(3):
        await put(store, f"r{i}")
    assert (await take(store, "a")).others == 0
    assert (await take(store, "b")).others == 1
    await store.release(MV, "a", [("r0", 1)])
    assert (await take(store, "b", 0)).others == 1
    await take(store, "b", 8)
    assert (await take(store, "b", 0)).others == 0


async def test_a_version_whose_engines_are_silent_takes_nobodys_place(
    store: Store, clock: Clock
) -> None:
    await beat(store, "b", "2")
    await beat(store, "c", "3")
    assert await store.depart("m@3", "c") == Departed(True, True)
    await clock.advance(5001)
    await beat(store, "a", "1")
    assert await store.depart(MV, "a") == Departed(True, False)
    assert await is_open(store, "m@1")


async def test_engines_without_a_heartbeat_drop_out(store: Store, clock: Clock) -> None:
    await store.depart(MV, "a")
    await beat(store, "old")
    await clock.advance(5000)
    await beat(store, "b")
    assert await store.client.hkeys(keys.cards(MV)) == [b"old", b"b"]
    await clock.advance(1)
    await beat(store, "b")
    assert await store.client.hkeys(keys.cards(MV)) == [b"b"]
    assert await store.client.zrange(keys.engines(MV), 0, -1) == [b"b"]


# -- limit, settle --------------------------------------------------------------------------------


async def test_limit_of_requests_is_exact(store: Store, clock: Clock) -> None:
    for left in range(5, -1, -1):
        answer = await store.limit("alice", 6, 0, 10)
        assert answer == Limited("", left, 0, 0, (6 - left) * 10_000, 0)
    assert await store.limit("alice", 6, 0, 10) == Limited("requests", 0, 0, 10_000, MINUTE, 0)
    await clock.advance(9_999)
    assert (await store.limit("alice", 6, 0, 10)).retry_ms == 1
    await clock.advance(1)
    assert (await store.limit("alice", 6, 0, 10)).refused == ""
    assert (await store.limit("alice", 6, 0, 10)).refused == "requests"
    assert (await store.limit("bob", 6, 0, 10)).refused == ""


async def test_limit_of_tokens_is_exact(store: Store, clock: Clock) -> None:
    assert (await store.limit("alice", 0, 1000, 900)).tokens_left == 100
    refused = await store.limit("alice", 0, 1000, 101)
    assert refused == Limited("tokens", 0, 100, 60, 0, 54_000)
    await clock.advance(59)
    assert (await store.limit("alice", 0, 1000, 101)).refused == "tokens"
    await clock.advance(1)
    assert (await store.limit("alice", 0, 1000, 101)).refused == ""


async def test_limit_charges_both_or_nothing(store: Store, clock: Clock) -> None:
    await store.limit("alice", 10, 1000, 600)
    before = await store.client.hgetall(keys.bucket("alice"))
    assert (await store.limit("alice", 10, 1000, 600)).refused == "tokens"
    assert await store.client.hgetall(keys.bucket("alice")) == before
    answer = await store.limit("alice", 1, 1000, 100)
    assert (answer.refused, answer.tokens_left) == ("requests", 400)
    assert await store.client.hgetall(keys.bucket("alice")) == before


async def test_limit_refuses_what_never_fits(store: Store, clock: Clock) -> None:
    assert (await store.limit("alice", 10, 1000, 1001)).refused == "size"
    assert await store.client.exists(keys.bucket("alice")) == 0
    assert (await store.limit("alice", 10, 1000, 1000)).refused == ""


async def test_no_limits(store: Store) -> None:
    assert await store.limit("alice", 0, 0, 10**9) == Limited("", 0, 0, 0, 0, 0)
    assert await store.client.exists(keys.bucket("alice")) == 0


async def test_limit_lives_until_the_bucket_is_full(store: Store) -> None:
    await store.limit("alice", 60, 60, 30)
    assert 25_000 < await store.client.pttl(keys.bucket("alice")) <= 30_001


async def test_limit_holds_under_concurrent_calls(store: Store, clock: Clock) -> None:
    answers = await asyncio.gather(*[store.limit("alice", 50, 0, 1) for _ in range(200)])
    assert sum(a.refused == "" for a in answers) == 50
    answers = await asyncio.gather(*[store.limit("bob", 0, 1000, 37) for _ in range(200)])
    assert sum(a.refused == "" for a in answers) == 27


async def test_limit_holds_while_time_passes(store: Store) -> None:
    start = time.monotonic()
    answers = await asyncio.gather(*[store.limit("alice", 50, 0, 1) for _ in range(200)])
    allowed = sum(a.refused == "" for a in answers)
    assert 50 <= allowed <= 50 + (time.monotonic() - start) * 50 / 60 + 1


@pytest.mark.parametrize("rate", [7, 60, 130, 999, 21_000, 29_999])
async def test_limit_never_allows_more_than_the_bucket(
    store: Store, clock: Clock, rate: int
) -> None:
    # The tokens keep the bucket from expiring: the server's clock does not stand still.
    assert (await store.limit("alice", rate, 60, 30)).refused == ""
    sha = store._run["limit"]._sha
    async with store.client.pipeline(transaction=False) as pipe:
        for _ in range(rate + 5):
            pipe.execute_command("EVALSHA", sha, 0, "alice", rate, 60, 0, "")
        allowed = 1 + sum(reply[0] == 0 for reply in await pipe.execute())
    # Time stands still, so a rounded fraction of a microsecond may cost the last one.
    assert rate - 1 <= allowed <= rate


async def test_settle_gives_back_once(store: Store, clock: Clock) -> None:
    await store.limit("alice", 10, 1000, 900)
    assert await store.settle("alice", "1-0", 500) is True
    assert await store.settle("alice", "1-0", 500) is False
    answer = await store.limit("alice", 10, 1000, 600)
    assert (answer.refused, answer.requests_left, answer.tokens_left) == ("", 8, 0)
    assert await store.settle("alice", "2-0", 1) is True
    assert 3500 < await store.client.ttl(keys.settled("1-0")) <= 3600


async def test_settle_never_overfills(store: Store, clock: Clock) -> None:
    await store.limit("alice", 10, 1000, 100)
    await store.settle("alice", "1-0", 900)
    answer = await store.limit("alice", 10, 1000, 1)
    assert (answer.requests_left, answer.tokens_left) == (8, 999)
    assert await store.settle("nobody", "3-0", 1) is False


async def test_a_charge_is_taken_back_once_and_only_if_there_was_one(
    store: Store, clock: Clock
) -> None:
    await store.limit("alice", 10, 1000, 300)
    assert await store.refund("r1", "alice", "a1") is False
    await store.limit("alice", 10, 1000, 500, "a1")
    assert 59_000 < await store.client.pttl(keys.charge("a1")) <= 60_000
    assert await store.refund("r1", "alice", "a1") is True
    assert await store.refund("r1", "alice", "a1") is False
    answer = await store.limit("alice", 10, 1000, 0)
    assert (answer.requests_left, answer.tokens_left) == (8, 700)
    assert await store.client.keys("rts:charge:*") == []


async def test_what_was_refused_or_has_no_limit_leaves_no_charge(store: Store) -> None:
    await store.limit("alice", 0, 0, 10, "a1")
    assert (await store.limit("alice", 10, 100, 101, "a2")).refused == "size"
    assert await store.client.keys("rts:*alice*") == []
    assert await store.client.keys("rts:charge:*") == []


async def test_the_charge_goes_over_to_the_request(store: Store, clock: Clock) -> None:
    await store.limit("alice", 10, 1000, 500, "a1")
    await put(store, "r1", attempt="a1")
    assert await field(store, "r1", "charge") == "500"
    assert await store.client.keys("rts:charge:*") == []
    # Another attempt of the same id is refunded without it.
    await store.limit("alice", 10, 1000, 400, "a2")
    assert (await put(store, "r1", attempt="a2")).outcome == "attached"
    assert await store.refund("r1", "alice", "a2") is True
    assert await field(store, "r1", "st") == "w"
    # Its end settles the charge, and nothing else does.
    assert await store.cancel("r1", "alice") == "cancelled"
    assert (await end_of(store, "r1")).reason == "cancelled"
    assert (await store.limit("alice", 10, 1000, 0)).tokens_left == 500
    (_, fact), *more = await store.client.xrange(keys.ENDED)
    assert (fact[b"charge"], more) == (b"500", [])


@pytest.mark.parametrize("by", ["attach", "enqueue"])
async def test_an_attempt_cannot_take_back_what_another_one_attached_to(
    store: Store, by: str
) -> None:
    """Its gateway gave up and takes it back late; meanwhile the client came again."""
    await put(store, "r1", attempt="a1")
    if by == "attach":
        attached = await store.attach(make_request("r1"), grace_ms=0)
        assert attached is not None
        assert attached.outcome == "attached"
    else:
        assert (await put(store, "r1", attempt="a2")).outcome == "attached"
    assert await store.refund("r1", "alice", "a1") is False
    assert await store.refund("r1", "alice", "a2") is False
    assert await field(store, "r1", "st") == "w"


async def test_an_attempt_that_was_taken_back_before_it_came_is_not_charged(store: Store) -> None:
    await store.limit("alice", 10, 1000, 500, "a1")
    await store.refund("r1", "alice", "a1")
    await put(store, "r1", attempt="a1")
    assert await field(store, "r1", "charge") == "0"


# -- poison ---------------------------------------------------------------------------------------


async def test_three_deaths_without_progress_make_a_dead_letter(store: Store, clock: Clock) -> None:
    await put(store, "r1")
    await take(store, "e0")
    for death in (1, 2):
        await clock.advance(LEASE_MS + 1)
        taken = (await take(store, f"e{death}")).requests
        assert [(t.rid, t.deaths) for t in taken] == [("r1", death)]
    await clock.advance(LEASE_MS + 1)
    assert await take_ids(store, "e3") == []
    assert (await end_of(store, "r1")).reason == "engine_failed"
    letters = await store.client.xrange(keys.DEAD)
    assert len(letters) == 1
    letter = letters[0][1]
    assert (letter[b"rid"], letter[b"caller"], letter[b"engine"]) == (b"r1", b"alice", b"e2")
    assert (letter[b"mv"], letter[b"class"], letter[b"deaths"]) == (MV.encode(), b"normal", b"3")
    assert messages.decode(letter[b"body"], messages.Request) == make_request("r1")
    found = await counts(store)
    assert (found["redelivered"], found["dead"]) == (2, 1)


async def test_deaths_with_progress_never_make_one(store: Store, clock: Clock) -> None:
    await put(store, "r1", prompt=2000)
    await take(store, "e0")
    for death in range(1, 12):
        # First in prefill: no token, but rows.
        n = int(death > 5)
        first = max(1, death - 5)
        progress = emission("r1", death, first, n, progress=1000 + death)
        assert await emit(store, progress, engine=f"e{death - 1}") == [Emitted("ok")]
        await clock.advance(LEASE_MS + 1)
        taken = (await take(store, f"e{death}")).requests
        assert [(t.rid, t.deaths) for t in taken] == [("r1", 0)]
    assert await store.client.exists(keys.DEAD) == 0


async def test_progress_forgives_earlier_deaths(store: Store, clock: Clock) -> None:
    await put(store, "r1")
    await take(store, "e0")
    for death in (1, 2):
        await clock.advance(LEASE_MS + 1)
        await take(store, f"e{death}")
    await emit(store, emission("r1", 3), engine="e2")
    for death in (3, 4, 5):
        await clock.advance(LEASE_MS + 1)
        taken = (await take(store, f"e{death}")).requests
        assert [t.deaths for t in taken] == [death - 3]


async def test_progress_is_what_no_owner_did_before(store: Store, clock: Clock) -> None:
    async def rows() -> list[str | None]:
        return [await field(store, "r1", name) for name in ("pr", "hw", "mark")]

    await put(store, "r1", prompt=40)
    await take(store, "e0")
    await emit(store, emission("r1", n=0, progress=30), engine="e0")
    assert await rows() == ["30", "30", "0"]
    await store.release(MV, "e0", [("r1", 1)])
    (taken,) = (await take(store, "e1")).requests
    assert taken.progress == 30
    for progress, most in ((10, "30"), (30, "30"), (31, "31"), (5, "31")):
        # The last one: its rows were dropped for want of memory, and are computed again.
        await emit(store, emission("r1", 3, n=0, progress=progress), engine="e1")
        assert await rows() == [str(progress), most, "30"]
    # With a token the prompt is done, also where an engine cannot count.
    await emit(store, emission("r1", 3, progress=0), engine="e1")
    assert await rows() == ["0", "40", "30"]
    await store.release(MV, "e1", [("r1", 3)])
    (taken,) = (await take(store, "e2")).requests
    assert await rows() == ["0", "40", "41"]
    # What was generated before is computed again: rows beyond the prompt are none of its own.
    await emit(store, emission("r1", 5, 2, n=0, progress=41), engine="e2")
    assert await rows() == ["41", "40", "41"]


async def test_a_request_that_kills_at_the_same_token_every_time_is_a_dead_letter(
    store: Store, clock: Clock
) -> None:
    await put(store, "r1", prompt=3)
    deaths = 0
    while requests := (await take(store, f"e{deaths}")).requests:
        (taken,) = requests
        for rows in range(10, 3 + taken.seq, 10):
            step = emission("r1", taken.epoch, taken.seq + 1, 0, progress=rows)
            assert await emit(store, step, engine=f"e{deaths}") == [Emitted("ok")]
        for seq in range(taken.seq + 1, 50):
            step = emission("r1", taken.epoch, seq, progress=3 + seq - 1)
            assert await emit(store, step, engine=f"e{deaths}") == [Emitted("ok")]
        await clock.advance(LEASE_MS + 1)
        deaths += 1
    # The first one is forgiven: it made 49 tokens.
    assert deaths == 1 + MAX_DEATHS
    assert (await end_of(store, "r1")).reason == "engine_failed"


async def test_progress_in_release_0_1_counts(store: Store, clock: Clock) -> None:
    await put(store, "r1")
    await take(store, "old")
    await store.client.hdel(keys.request("r1"), "hw")
    await store.client.hset(keys.request("r1"), "pr", 2)
    await clock.advance(LEASE_MS + 1)
    (taken,) = (await take(store, "a", calm=False)).requests
    assert (taken.deaths, taken.progress) == (0, 2)
    assert await emit(store, emission("r1", 2, n=0, progress=1)) == [Emitted("ok")]
    assert await field(store, "r1", "hw") == "2"


async def test_a_suspect_is_taken_alone_and_by_a_calm_engine(store: Store, clock: Clock) -> None:
    for i in range(3):
        await put(store, f"r{i}")
    await take(store, "z", 2)
    await put(store, "high", "eve", "high")
    await put(store, "low", "eve", "low")
    await clock.advance(LEASE_MS + 1)
    # It comes after what is better, and holds up what is not.
    assert await take_ids(store, "a", 8) == ["high"]
    before = await read_state(store.client)
    assert await take_ids(store, "a", 8, calm=False) == []
    assert await read_state(store.client) == before
    async with listening(store, keys.control_channel("a")):
        assert [(t.rid, t.deaths) for t in (await take(store, "a", 8)).requests] == [("r0", 1)]
        assert [(t.rid, t.deaths) for t in (await take(store, "b", 8)).requests] == [("r1", 1)]
        async with listening(store, keys.control_channel("b")):
            assert await take_ids(store, "a", 8, calm=False) == ["r2", "low"]


async def test_a_suspect_that_was_handed_back_is_still_one(store: Store, clock: Clock) -> None:
    for i in range(3):
        await put(store, f"r{i}")
    await take(store, "z", 2)
    await clock.advance(LEASE_MS + 1)
    for engine in ("a", "b"):
        (taken,) = (await take(store, engine, 8)).requests
        assert (taken.rid, taken.deaths) == ("r0", 1)
        await store.release(MV, engine, [("r0", taken.epoch)])
    assert await take_ids(store, "a", 8, calm=False) == []
    (taken,) = await begin(store, "a", 8)
    assert (taken.rid, taken.deaths) == ("r0", 1)
    await store.release(MV, "a", [("r0", taken.epoch)])
    # It has made progress: nothing is held against it any more.
    taken, *more = (await take(store, "a", 8, calm=False)).requests
    assert (taken.rid, taken.deaths, more) == ("r0", 0, [])
    assert await field(store, "r0", "deaths") == "0"


async def test_a_suspect_in_a_lost_reply_is_alone_again(store: Store, clock: Clock) -> None:
    await put(store, "r0")
    await take(store, "z")
    for i in range(1, 4):
        await put(store, f"r{i}")
    await clock.advance(LEASE_MS + 1)
    assert await take_ids(store, "a", 8) == ["r0"]
    (taken,) = (await take(store, "a", 8, known=[])).requests
    assert (taken.rid, taken.deaths, taken.progress) == ("r0", 1, 0)


async def test_a_dead_letter_and_a_late_one_need_no_trial(store: Store, clock: Clock) -> None:
    await put(store, "late", timeout_ms=LEASE_MS * MAX_DEATHS)
    await put(store, "poison")
    await put(store, "good")
    await take(store, "z", 2)
    await clock.advance(LEASE_MS * MAX_DEATHS)
    await store.client.hset(keys.request("poison"), "deaths", MAX_DEATHS - 1)
    assert await take_ids(store, "a", 8, calm=False) == ["good"]
    assert (await end_of(store, "late")).reason == "timeout"
    assert (await end_of(store, "poison")).reason == "engine_failed"


@pytest.mark.parametrize("place", [0, 13, 31])
@pytest.mark.parametrize("engines", [1, 3])
async def test_poison_among_innocents_is_found_alone(
    store: Store, clock: Clock, place: int, engines: int
) -> None:
    rids = [f"r{i}" for i in range(32)]
    for i, rid in enumerate(rids):
        await put(store, rid, f"caller{i % 5}")
    order = [t.rid for t in (await take(store, "e0", 32)).requests]
    poison = order[place]
    await clock.advance(LEASE_MS + 1)
    died, finished = 1, []
    # By engine: each request's epoch and how many tokens it has said.
    boards: dict[str, dict[str, list[int]]] = {f"e{i}": {} for i in range(1, engines + 1)}
    for _ in range(200):
        for engine, board in list(boards.items()):
            calm = all(said for _, said in board.values())
            for taken in (await take(store, engine, 32, calm=calm)).requests:
                assert board.get(taken.rid) is None
                board[taken.rid] = [taken.epoch, taken.seq]
            if poison in board:
                # It dies of it before anything is said. What had made progress is innocent.
                del boards[engine]
                boards[f"e{engines + died}"] = {}
                died += 1
                continue
            step = []
            for rid, state in board.items():
                state[1] += 1
                reason = "stop" if state[1] == 3 else ""
                step.append(emission(rid, state[0], state[1], reason=reason))
            await emit(store, *step, engine=engine)
            finished += [rid for rid, (_, said) in board.items() if said == 3]
            boards[engine] = {rid: state for rid, state in board.items() if state[1] < 3}
        await clock.advance(LEASE_MS + 1)
        if len(finished) == 31 and await field(store, poison, "st") == "e":
            break
        for engine, board in boards.items():
            if board:
                await store.client.zadd(keys.leases(MV), {engine: clock.now_ms})
    assert died == MAX_DEATHS
    assert sorted(finished) == sorted(set(rids) - {poison})
    letters = await store.client.xrange(keys.DEAD)
    assert [fields[b"rid"].decode() for _, fields in letters] == [poison]


async def test_a_release_is_no_death(store: Store) -> None:
    await put(store, "r1")
    for i in range(5):
        taken = (await take(store, f"e{i}")).requests[0]
        assert (taken.deaths, taken.epoch) == (0, 2 * i + 1)
        assert await store.release(MV, f"e{i}", [("r1", taken.epoch)]) == 1


# -- the server -----------------------------------------------------------------------------------


async def test_scripts_come_back_after_a_flush(store: Store) -> None:
    async def all_of_them() -> None:
        await store.limit("alice", 60, 0, 1)
        await put(store, "r1")
        await put(store, "r2")
        await take(store, room=2)
        await emit(store, emission("r1"))
        await store.release(MV, "a", [("r2", 1)])
        await store.cancel("r1", "alice")
        await store.cancel("r2", "alice")
        await store.expire()
        await beat(store, "a")
        await store.depart(MV, "a")
        await beat(store, "a")
        await store.settle("alice", "1-0", 0)
        await store.attach(make_request("r1"), grace_ms=0)
        await store.refund("r1", "alice", "a1")
        await store.leave("r1", "alice")
        await store.greet()

    await all_of_them()
    await store.client.flushall()
    await beat(store, "a")
    await store.client.script_flush()
    await all_of_them()


def reasons_in_scripts() -> list[str]:
    """Every reason that a script may write itself, and those that gateways cancel with."""
    found = {"cancelled", "queue_timeout", "timeout"}
    for path in SCRIPTS.glob("*.lua"):
        found |= set(re.findall(r"(?:end_blob\(|ended = |reason = .*?)'(\w+)'", path.read_text()))
    return sorted(found)


def test_the_reasons_in_the_scripts_are_those_of_the_contract() -> None:
    documented = messages.End.__doc__ or ""
    assert {"abandoned", "engine_failed", "timeout"} <= set(reasons_in_scripts())
    for reason in reasons_in_scripts():
        assert reason in documented


async def test_an_end_written_by_a_script_is_a_message(store: Store) -> None:
    reasons = reasons_in_scripts() + ["x" * n for n in (1, 31)]
    for i, reason in enumerate(reasons):
        await put(store, f"r{i}")
        assert await store.cancel(f"r{i}", "alice", reason) == "cancelled"
        assert await end_of(store, f"r{i}") == messages.End(messages.VERSION, reason)
        data = (await store.client.xrange(keys.log(f"r{i}")))[0][1][b"d"]
        assert data == messages.encode(messages.End(messages.VERSION, reason))


async def test_a_server_that_does_not_answer(own_server) -> None:
    store = Store(connect(own_server.url, timeout_s=0.3))
    try:
        await beat(store, "a")
        await put(store, "before")
        own_server.pause()
        for call in (put(store, "r1"), take(store), store.read_log("before", 0)):
            start = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await call
            # Waiting for a connection, connecting and the answer have a time limit each.
            assert time.monotonic() - start < 3 * 0.3 + 0.5
        own_server.go_on()
        # No reply to an earlier call is taken for this one's. What was sent may have been done.
        assert (await put(store, "r1")).outcome in ("accepted", "attached")
        known = (await take(store, known=[])).requests + (await take(store, room=8)).requests
        assert {taken.rid for taken in known} == {"before", "r1"}
        await assert_consistent(store.client)
        own_server.process.kill()
        own_server.process.wait()
        with pytest.raises(StoreUnavailable):
            await put(store, "r2")
    finally:
        await store.close()


async def test_a_full_or_read_only_server_changes_nothing(own_server) -> None:
    store = Store(connect(own_server.url, timeout_s=5))
    try:
        await beat(store, "a")
        for i in range(4):
            await put(store, f"r{i}", f"caller{i}")
        await take(store, room=2)
        before = await read_state(store.client)
        for refuse, allow in (
            (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
            (
                ("CONFIG", "SET", "min-replicas-to-write", "1"),
                ("CONFIG", "SET", "min-replicas-to-write", "0"),
            ),
            (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
        ):
            await store.client.execute_command(*refuse)
            for call in (
                put(store, "new"),
                take(store),
                take(store, room=4, known=[]),
                emit(store, emission("r0")),
                emit(store, emission("r0", n=0)),
                store.limit("alice", 60, 0, 1),
                store.cancel("r1", "caller1"),
                store.expire(),
                store.release(MV, "a", [("r0", 1)]),
                store.leave("r2", "caller2"),
                store.depart(MV, "b"),
                store.greet(),
                beat(store, "a"),
                store.attach(make_request("r0", "caller0"), grace_ms=0),
            ):
                with pytest.raises(StoreUnavailable):
                    await call
            await store.client.execute_command(*allow)
            assert await read_state(store.client) == before
        assert await emit(store, emission("r0")) == [Emitted("ok")]
        assert await take_ids(store, room=4) == ["r2", "r3"]
        assert (await put(store, "new")).outcome == "accepted"
        await assert_consistent(store.client)
    finally:
        await store.close()


async def test_the_identity_stays_until_the_data_are_lost(store: Store) -> None:
    names = set(await asyncio.gather(*[store.identity() for _ in range(20)]))
    (name,) = names
    assert len(name) == 32
    assert await store.identity() == name
    await store.client.flushall()
    assert await store.identity() != name
    await beat(store, "a")


async def test_who_came_back_is_not_counted_as_away(store: Store, clock: Clock) -> None:
    """Left once, listens since; at the moment of the take its gateway reconnects."""
    await put(store, "r1", grace_ms=1000)
    assert await store.leave("r1", "alice")
    await clock.advance(500)
    await store.heard("r1")
    await clock.advance(10_000)
    assert await take_ids(store) == ["r1"]


async def test_a_clock_that_was_set_back_keeps_nobody_alive(store: Store, clock: Clock) -> None:
    await store.greet()
    await clock.set_server("b", 10**6)
    await store.greet()
    await clock.advance(-3_600_000)
    await put(store, "r1", timeout_ms=10**8)
    await take(store, "a")
    await clock.advance(60_000)
    await take(store, "b")
    await clock.advance(1_000_000)
    assert await take_ids(store, "b") == ["r1"]


async def test_a_suspect_does_not_hold_up_what_was_under_way(store: Store, clock: Clock) -> None:
    for i in range(4):
        await put(store, f"r{i}", f"caller{i}")
    taken = (await take(store, "z", 4)).requests
    # Every other one makes progress before the engine dies.
    for t in taken[1::2]:
        await emit(store, emission(t.rid, t.epoch), engine="z")
    await put(store, "new", "caller9")
    await clock.advance(LEASE_MS + 1)
    assert await take_ids(store, "a", 4, calm=False) == ["r1", "r3"]
    # What has yet to begin waits for the suspects; each of them is alone.
    assert await take_ids(store, "a", 4, calm=False) == []
    assert await take_ids(store, "a", 4) == ["r0"]
    await emit(store, emission("r0", 2))
    assert await take_ids(store, "a", 4) == ["r2"]
    await emit(store, emission("r2", 2))
    assert await take_ids(store, "a", 4) == ["new"]
