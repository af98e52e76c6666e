"""The hub over a real server: whatever is dropped or repeated, readers get each token once."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

import gateway.hub
from gateway.errors import RequestGone
from gateway.hub import Hub, Subscription
from gateway.recovery import Recovery
from shared import keys, messages
from shared.errors import LogExpired, StoreUnavailable
from shared.messages import Entry, Token, Tokens
from shared.store import State, Store, connect

RID = "r1"


@pytest.fixture
async def hub(server: Any, store: Store) -> AsyncIterator[Hub]:
    it = Hub(server.url, store, backlog=8)
    await it.start()
    await until(lambda: it.healthy)
    yield it
    await it.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def blob(first: int, count: int = 1) -> bytes:
    return messages.encode(
        Tokens(1, first, [Token(0, n, str(n)) for n in range(first, first + count)])
    )


async def write(
    store: Store, first: int, count: int = 1, *, log: bool = True, live: bool = True
) -> None:
    """What emit does for one sequence, with a way to lose either half."""
    entry_id = f"{first + count - 1}-0"
    await store.client.hset(keys.request(RID), mapping={"st": "r", "seq": first + count - 1})
    if log:
        await store.client.xadd(keys.log(RID), {"d": blob(first, count)}, id=entry_id)
    if live:
        await store.client.publish(keys.log(RID), entry_id.encode() + b" " + blob(first, count))


async def end(store: Store, seq: int, *, live: bool = True, reason: str = "stop") -> None:
    data = messages.encode(messages.End(1, reason))
    await store.client.hset(keys.request(RID), mapping={"st": "e", "seq": seq})
    await store.client.xadd(keys.log(RID), {"d": data}, id=f"{seq}-1")
    if live:
        await store.client.publish(keys.log(RID), f"{seq}-1 ".encode() + data)


async def read_all(reader: Subscription) -> tuple[list[int], str]:
    numbers: list[int] = []
    async with asyncio.timeout(8):
        while True:
            entry: Entry = await reader.next()
            if isinstance(entry.event, messages.End):
                reader.close()
                return numbers, entry.event.reason
            assert entry.event.first == (numbers[-1] + 1 if numbers else entry.event.first)
            numbers += [token.id for token in entry.event.tokens]


async def clean(store: Store) -> None:
    await store.client.delete(keys.log(RID), keys.request(RID))


async def test_live_tokens_in_order(hub: Hub, store: Store) -> None:
    reader = await hub.subscribe(RID)
    for n in range(1, 6):
        await write(store, n)
    await end(store, 5)
    assert await read_all(reader) == ([1, 2, 3, 4, 5], "stop")
    assert hub.gaps == 0
    await clean(store)


async def test_duplicates_are_dropped_and_overlaps_cut(hub: Hub, store: Store) -> None:
    reader = await hub.subscribe(RID)
    await write(store, 1, 3)
    await store.client.publish(keys.log(RID), b"3-0 " + blob(1, 3))
    await write(store, 2, 3)
    await end(store, 4)
    assert await read_all(reader) == ([1, 2, 3, 4], "stop")
    await clean(store)


async def test_a_lost_message_is_read_from_the_log(hub: Hub, store: Store) -> None:
    reader = await hub.subscribe(RID)
    await write(store, 1)
    await write(store, 2, live=False)
    await write(store, 3)
    await end(store, 3)
    assert await read_all(reader) == ([1, 2, 3], "stop")
    assert hub.gaps == 1
    await clean(store)


async def test_the_end_of_an_attempt_that_was_taken_back_ends_nothing(
    hub: Hub, store: Store
) -> None:
    """A repeated Idempotency-Key is subscribed before the attempt that broke is taken back."""
    reader = await hub.subscribe(RID)
    before = messages.encode(messages.End(1, "cancelled"))
    await store.client.publish(keys.log(RID), b"0-1 " + before)
    await write(store, 1)
    await end(store, 1)
    assert await read_all(reader) == ([1], "stop")
    await clean(store)


async def test_an_end_without_an_answer_is_told(hub: Hub, store: Store) -> None:
    reader = await hub.subscribe(RID)
    await write(store, 1)
    await end(store, 1, reason="cancelled")
    assert await read_all(reader) == ([1], "cancelled")
    await clean(store)


async def run_anew(store: Store, *, live: bool) -> None:
    """The request failed, its client came again with its key, and its next run has five tokens."""
    await end(store, 3, live=live, reason="cancelled")
    await clean(store)
    await store.client.hset(keys.request(RID), "run", "b")
    for n in range(1, 6):
        await write(store, n, live=live)


@pytest.mark.parametrize("live", [True, False])
async def test_tokens_of_the_next_run_are_not_mixed_in(
    watchful: Hub, store: Store, live: bool
) -> None:
    reader = await watchful.subscribe(RID, run=b"a")
    await store.client.hset(keys.request(RID), "run", "a")
    await write(store, 1, 3)
    assert (await reader.next()).seq == 3
    await run_anew(store, live=live)
    with pytest.raises(RequestGone):
        await read_all(reader)
    reader.close()
    await clean(store)


@pytest.mark.parametrize("count", [1, 5])
async def test_a_run_whose_end_was_not_heard_ends_where_the_next_one_begins(
    hub: Hub, store: Store, count: int
) -> None:
    reader = await hub.subscribe(RID, run=b"a")
    await store.client.hset(keys.request(RID), "run", "a")
    await write(store, 1, 3)
    assert (await reader.next()).seq == 3
    await end(store, 3, live=False, reason="cancelled")
    await clean(store)
    await store.client.hset(keys.request(RID), "run", "b")
    for n in range(1, 6, count):
        await write(store, n, count)
    with pytest.raises(RequestGone):
        await reader.next()
    reader.close()
    await clean(store)


async def test_a_gap_that_the_log_cannot_fill_is_an_error(hub: Hub, store: Store) -> None:
    reader = await hub.subscribe(RID)
    await write(store, 1)
    await write(store, 2, log=False, live=False)
    await write(store, 3)
    with pytest.raises(LogExpired):
        await read_all(reader)
    reader.close()
    await clean(store)


async def test_a_slow_reader_gets_everything_after_an_overflow(hub: Hub, store: Store) -> None:
    reader = await hub.subscribe(RID)
    for n in range(1, 101):
        await write(store, n)
        assert reader.lagging <= 8
    await end(store, 100)
    assert await read_all(reader) == (list(range(1, 101)), "stop")
    await clean(store)


async def test_a_late_reader_replays_and_joins(hub: Hub, store: Store) -> None:
    await write(store, 1, 4)
    early = await hub.subscribe(RID, replay=True)
    late = await hub.subscribe(RID, after=2, replay=True)
    await write(store, 5)
    await end(store, 5)
    assert await read_all(early) == ([1, 2, 3, 4, 5], "stop")
    assert await read_all(late) == ([3, 4, 5], "stop")
    await clean(store)


async def test_a_replay_longer_than_a_page(hub: Hub, store: Store) -> None:
    pipe = store.client.pipeline()
    for n in range(1, 1101):
        pipe.xadd(keys.log(RID), {"d": blob(n)}, id=f"{n}-0")
    await pipe.execute()
    await end(store, 1100)
    reader = await hub.subscribe(RID, replay=True)
    assert await read_all(reader) == (list(range(1, 1101)), "stop")
    await clean(store)


async def test_a_killed_connection_comes_back_and_refills(hub: Hub, store: Store) -> None:
    reader = await hub.subscribe(RID)
    await write(store, 1)
    assert (await reader.next()).seq == 1
    await store.client.client_kill_filter(_type="pubsub")
    await write(store, 2)
    await write(store, 3)
    await until(lambda: hub.healthy)
    await end(store, 3)
    assert await read_all(reader) == ([2, 3], "stop")
    await clean(store)


async def test_a_connection_that_is_killed_again_and_again_comes_back_at_once(
    hub: Hub, store: Store
) -> None:
    reader = await hub.subscribe(RID)
    gone_s = []
    for _ in range(7):
        # So long that it has answered.
        await asyncio.sleep(0.3)
        await store.client.client_kill_filter(_type="pubsub")
        await until(lambda: not hub.healthy)
        killed = asyncio.get_running_loop().time()
        await until(lambda: hub.healthy)
        gone_s.append(asyncio.get_running_loop().time() - killed)
    # Pauses that double would be 0.8 s and more by then.
    assert min(gone_s[-3:]) < 0.4
    reader.close()


@pytest.fixture
async def watchful(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Compares silent streams with their logs twenty times a second."""
    monkeypatch.setattr(gateway.hub, "SILENT_S", 0.05)
    monkeypatch.setattr(gateway.hub, "CHECK_S", 0.05)
    await hub.close()
    await hub.start()
    await until(lambda: hub.healthy)
    return hub


async def test_a_lost_last_message_is_noticed(watchful: Hub, store: Store) -> None:
    reader = await watchful.subscribe(RID)
    await write(store, 1)
    await write(store, 2, live=False)
    await end(store, 2, live=False)
    assert await read_all(reader) == ([1, 2], "stop")
    await clean(store)


async def test_a_silent_stream_is_looked_at_again(watchful: Hub, store: Store) -> None:
    reader = await watchful.subscribe(RID)
    await write(store, 1)
    waiting = asyncio.create_task(read_all(reader))
    # It was looked at, and nothing was missing; what is lost after that is found, too.
    await until(lambda: reader.checked_at > reader.heard_at)
    await write(store, 2, live=False)
    await end(store, 2, live=False)
    assert await waiting == ([1, 2], "stop")
    await clean(store)


async def test_a_request_that_vanished_ends_with_an_error(watchful: Hub, store: Store) -> None:
    reader = await watchful.subscribe(RID)
    await write(store, 1)
    assert (await reader.next()).seq == 1
    await store.client.flushall()
    with pytest.raises(LogExpired):
        await read_all(reader)
    reader.close()


async def recoverable(
    hub: Hub,
    store: Store,
    rid: str = RID,
    before: Callable[[Subscription], Awaitable[None]] | None = None,
    **changed: Any,
) -> Subscription:
    """A reader whose request the gateway can queue again; `before` comes before each attempt."""
    reader = await hub.subscribe(rid)

    async def enqueue(*args: Any, **options: Any) -> Any:
        if before is not None:
            await before(reader)
        return await store.enqueue(*args, **options)

    reader.recovery = Recovery(
        messages.Request(1, rid, "echo", "1", "someone", [1, 2], messages.Sampling(9)),
        functools.partial(
            enqueue,
            cls="normal",
            grace_ms=5000,
            keep_ms=5000,
            # As `write` has it, which names no run.
            attempt="",
            queue_limit=0,
            queue_bytes=0,
            resumable=False,
            # There is no replica: for what had been accepted that is no reason to wait.
            strict=True,
        ),
        **{"ends_at": asyncio.get_running_loop().time() + 30, "keep_s": 5, "t0": 0, **changed},
    )
    return reader


async def test_a_request_that_redis_lost_is_queued_again(watchful: Hub, store: Store) -> None:
    reader = await recoverable(watchful, store)
    await write(store, 1)
    await write(store, 2, 2)
    assert [(await reader.next()).seq for _ in range(2)] == [1, 3]
    reading = asyncio.create_task(read_all(reader))
    await store.client.flushall()
    await until(lambda: watchful.recoveries)
    take = await store.take("echo@1", "e1", 4, lease_ms=3000, aging_ms=30_000)
    assert [(taken.rid, taken.seq) for taken in take.requests] == [(RID, 3)]
    (entry,) = await store.read_log(RID, 0)
    assert entry == Entry(3, Tokens(1, 1, [Token(0, n, str(n)) for n in (1, 2, 3)]))
    ttl = await store.client.pttl(keys.log(RID))
    assert 300_000 < ttl <= 330_001
    await write(store, 4)
    await end(store, 4)
    assert await reading == ([4], "stop")
    assert watchful.recoveries == 1
    await store.client.flushall()


@pytest.mark.parametrize("late", [{"ends_at": 0.0}, {"keep_s": 0.0}])
async def test_what_may_have_ended_since_is_not_queued_again(
    watchful: Hub, store: Store, late: dict[str, float]
) -> None:
    reader = await recoverable(watchful, store, **late)
    await write(store, 1)
    assert (await reader.next()).seq == 1
    await store.client.flushall()
    with pytest.raises(LogExpired):
        await read_all(reader)
    assert await store.client.exists(keys.request(RID)) == 0
    reader.close()


async def test_a_run_that_redis_has_gone_back_to_before_is_queued_again(
    watchful: Hub, store: Store
) -> None:
    order = messages.Request(1, RID, "echo", "1", "someone", [1, 2], messages.Sampling(9))
    terms: Any = {"cls": "normal", "timeout_ms": 30_000, "grace_ms": 5000, "keep_ms": 5000}
    limits: Any = {"queue_limit": 9, "queue_bytes": 10**6, "resumable": True}
    await store.client.set(keys.is_open("echo@1"), 1)
    await store.enqueue(order, attempt="a0", **terms, **limits)
    await store.cancel(RID, "someone")
    reader = await recoverable(watchful, store, t0=await now_ms(store) + 1)
    other = await watchful.subscribe(RID)
    # What its reader has of it, Redis has not.
    await store.client.publish(keys.log(RID), b"2-0 " + blob(1, 2))
    assert (await reader.next()).seq == (await other.next()).seq == 2
    # The one that cannot put it back waits for the one that can.
    waiting = asyncio.create_task(read_all(other))
    await asyncio.sleep(0.5)
    reading = asyncio.create_task(read_all(reader))
    await until(lambda: watchful.recoveries)
    take = await store.take("echo@1", "e1", 4, lease_ms=3000, aging_ms=30_000)
    assert [(taken.rid, taken.seq) for taken in take.requests] == [(RID, 2)]
    await write(store, 3)
    await end(store, 3)
    assert await reading == await waiting == ([3], "stop")
    await store.client.flushall()


async def now_ms(store: Store) -> int:
    seconds, micros = await store.client.time()
    return int(seconds * 1000 + micros // 1000)


async def test_a_run_after_which_another_one_failed_is_not_put_back(
    watchful: Hub, store: Store
) -> None:
    """Nothing was lost: its gateway was cut off while it was cancelled and asked for anew."""
    reader = await recoverable(watchful, store, t0=await now_ms(store))
    await write(store, 1)
    assert (await reader.next()).seq == 1
    await clean(store)
    failed = {"st": "e", "reason": "cancelled", "seq": 0, "run": "b", "t0": await now_ms(store) + 1}
    await store.client.hset(keys.request(RID), mapping=failed)
    with pytest.raises(RequestGone):
        await read_all(reader)
    assert not watchful.recoveries
    reader.close()
    await clean(store)


async def test_a_run_in_whose_place_another_one_is_ends(watchful: Hub, store: Store) -> None:
    reader = await recoverable(watchful, store)
    await write(store, 1)
    assert (await reader.next()).seq == 1
    await clean(store)
    another = {"st": "r", "seq": 0, "run": "b", "t0": 1}
    await store.client.hset(keys.request(RID), mapping=another)
    with pytest.raises(RequestGone):
        await reader.recovery.run(reader.known_at, asyncio.Semaphore())  # type: ignore[union-attr]
    with pytest.raises(RequestGone):
        await read_all(reader)
    reader.close()
    await clean(store)


async def test_what_ended_and_lost_its_log_is_not_queued_again(watchful: Hub, store: Store) -> None:
    reader = await recoverable(watchful, store)
    await write(store, 1)
    assert (await reader.next()).seq == 1
    await end(store, 1, live=False)
    await store.client.delete(keys.log(RID))
    with pytest.raises(LogExpired):
        await read_all(reader)
    reader.close()
    await clean(store)


@pytest.mark.parametrize("how", ["heard", "read", "compared"])
async def test_what_ended_before_it_was_lost_is_not_queued_again(
    hub: Hub, store: Store, how: str
) -> None:
    reader = await recoverable(hub, store)
    await write(store, 1)
    assert (await reader.next()).seq == 1
    if how == "heard":
        # It waits in the queue of a slow reader.
        await end(store, 1, reason="cancelled")
        await until(lambda: reader.lagging == 1)
    else:
        # The end is not on the first page of the log.
        for n in range(gateway.hub.PAGE):
            await write(store, 2 + n, live=False)
        await end(store, 1 + gateway.hub.PAGE, live=False, reason="cancelled")
        if how == "compared":
            await store.client.delete(keys.log(RID))
            reader.compared(State(ended=True, seq=0, run=b""))
        else:
            reader.resync()
            assert (await reader.next()).seq == 2
    await store.client.flushall()
    reader.resync()
    with pytest.raises(LogExpired):
        await read_all(reader)
    assert await store.client.exists(keys.request(RID)) == 0
    reader.close()


async def test_a_message_says_that_it_is_not_lost(hub: Hub, store: Store) -> None:
    reader = await recoverable(hub, store)
    reader.lost()
    await write(store, 1)
    await until(lambda: reader.lagging == 1)
    await end(store, 1)
    assert await read_all(reader) == ([1], "stop")
    assert hub.recoveries == 0
    await clean(store)


async def test_who_cannot_queue_it_again_waits_for_who_can(watchful: Hub, store: Store) -> None:
    reader = await watchful.subscribe(RID)
    other = await recoverable(watchful, store)
    await write(store, 1)
    for one in (reader, other):
        assert (await one.next()).seq == 1
    reading = [asyncio.create_task(read_all(one)) for one in (reader, other)]
    await store.client.flushall()
    await until(lambda: watchful.recoveries)
    await write(store, 2)
    await end(store, 2)
    for one in reading:
        assert await one == ([2], "stop")
    await store.client.flushall()


async def test_tokens_of_before_that_come_late_are_not_handed_on(hub: Hub, store: Store) -> None:
    async def late(reader: Subscription) -> None:
        reader.feed(b"2-0 " + messages.encode(Tokens(1, 2, [Token(0, 99, "another")])))

    reader = await recoverable(hub, store, before=late)
    await write(store, 1)
    assert (await reader.next()).seq == 1
    await store.client.flushall()
    reader.lost()
    reading = asyncio.create_task(read_all(reader))
    await until(lambda: hub.recoveries)
    await write(store, 2)
    await end(store, 2)
    assert await reading == ([2], "stop")
    await store.client.flushall()


async def test_who_waits_for_its_turn_is_recovered_after_a_long_outage(
    hub: Hub, store: Store
) -> None:
    hub.recovering = asyncio.Semaphore(1)
    loop = asyncio.get_running_loop()
    back_at = loop.time() + 1

    async def away(_: Subscription) -> None:
        if loop.time() < back_at:
            raise StoreUnavailable("no writes yet")

    rids = ("r1", "r2", "r3")
    readers = [await recoverable(hub, store, rid, away, keep_s=0.3) for rid in rids]
    for reader in readers:
        reader.lost()
    reading = [asyncio.create_task(reader.next()) for reader in readers]
    await until(lambda: hub.recoveries == 3)
    for rid in rids:
        assert await store.client.hget(keys.request(rid), "st") == b"w"
        await store.cancel(rid, "someone")
    for entry in await asyncio.gather(*reading):
        assert isinstance(entry.event, messages.End)
    await store.client.flushall()


async def test_an_end_before_what_was_handed_out_is_found(hub: Hub, store: Store) -> None:
    reader = await hub.subscribe(RID)
    await write(store, 1, 3)
    assert (await reader.next()).seq == 3
    # Redis lost two of them, and it ended before they came again.
    await store.client.flushall()
    await write(store, 1, live=False)
    await end(store, 1, live=False, reason="cancelled")
    reader.resync()
    assert await read_all(reader) == ([], "cancelled")
    await clean(store)


async def test_a_client_that_goes_while_redis_fails_leaves_no_error(hub: Hub, store: Store) -> None:
    begun, reported = asyncio.Event(), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    async def fails(_: Subscription) -> None:
        begun.set()
        await asyncio.sleep(0.05)
        raise StoreUnavailable("gone again")

    reader = await recoverable(hub, store, before=fails)
    reader.lost()
    reading = asyncio.create_task(reader.next())
    await begun.wait()
    reading.cancel()
    # Not raised here: its traceback would keep the call, and the report comes when that goes.
    await asyncio.wait([reading])
    assert reading.cancelled()
    del reading
    gc.collect()
    assert not reported
    reader.close()


async def test_whose_client_goes_is_queued_before_it_is_taken_back(hub: Hub, store: Store) -> None:
    begun = asyncio.Event()

    async def slow(_: Subscription) -> None:
        begun.set()
        await asyncio.sleep(0.1)

    reader = await recoverable(hub, store, before=slow)
    reader.lost()
    reading = asyncio.create_task(reader.next())
    await begun.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await store.cancel(RID, "someone") == "cancelled"
    reader.close()
    await store.client.flushall()


async def test_a_request_that_ended_and_whose_log_is_gone_is_an_error_at_once(
    hub: Hub, store: Store
) -> None:
    await write(store, 1)
    await end(store, 1)
    reader = await hub.subscribe(RID, 1, replay=True)
    assert await read_all(reader) == ([], "stop")
    await store.client.delete(keys.log(RID))
    reader = await hub.subscribe(RID, replay=True)
    with pytest.raises(LogExpired):
        async with asyncio.timeout(1):
            await reader.next()
    reader.close()
    await clean(store)


async def test_closing_the_last_reader_unsubscribes(hub: Hub, store: Store) -> None:
    one, two = await hub.subscribe(RID), await hub.subscribe(RID)
    one.close()
    one.close()
    assert await store.client.publish(keys.log(RID), b"1-0 " + blob(1)) == 1
    two.close()
    async with asyncio.timeout(2):
        while await store.client.publish(keys.log(RID), b"2-0 " + blob(2)) != 0:
            await asyncio.sleep(0.005)


async def test_a_silent_server_is_noticed_and_refuses_subscriptions(own_server: Any) -> None:
    store = Store(connect(own_server.url, timeout_s=0.3))
    hub = Hub(own_server.url, store)
    await hub.start()
    await until(lambda: hub.healthy)
    own_server.pause()
    try:
        async with asyncio.timeout(2):
            with pytest.raises(StoreUnavailable):
                await hub.subscribe("other")
        await until(lambda: not hub.healthy)
    finally:
        own_server.go_on()
    await until(lambda: hub.healthy)
    reader = await hub.subscribe("other")
    reader.close()
    await hub.close()
    await store.close()


async def test_a_check_finds_what_is_lost_at_once(store: Store, hub: Hub) -> None:
    await write(store, 1)
    reads, waits_not = await hub.subscribe(RID, replay=True), await hub.subscribe("soon queued")
    assert (await reads.next()).seq == 1
    reading = asyncio.create_task(reads.next())
    await until(lambda: reads.waits)
    await hub.check()
    assert not reading.done()
    await store.client.flushall()
    await hub.check()
    with pytest.raises(LogExpired):
        await reading
    # It was between subscribing and queueing, and is queued now.
    later = asyncio.create_task(waits_not.next())
    await store.client.publish(keys.log("soon queued"), b"1-0 " + blob(1))
    assert (await later).seq == 1
    for reader in (reads, waits_not):
        reader.close()


async def test_a_check_says_when_it_could_not_be_made(own_server: Any) -> None:
    store = Store(connect(own_server.url, timeout_s=0.2))
    hub = Hub(own_server.url, store)
    await hub.start()
    await until(lambda: hub.healthy)
    reader = await hub.subscribe(RID)
    reading = asyncio.create_task(reader.next())
    await until(lambda: reader.waits)
    own_server.pause()
    with pytest.raises(StoreUnavailable):
        await hub.check()
    reading.cancel()
    reader.close()
    await hub.close()
    await store.close()
