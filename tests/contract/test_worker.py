"""Intake, engine thread and outbox together, over a real server, with the echo engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from tokenizers import Tokenizer

from shared import keys, messages
from shared.errors import StoreUnavailable
from shared.messages import Request, Sampling
from shared.store import Emission, Store, Taken, connect
from shared.tasks import end
from worker.drain import Drain
from worker.driver import STEPS_AHEAD, Driver, EngineThread
from worker.engine import EngineOptions, create_engine
from worker.engine.echo import echo_token
from worker.engine.interface import EngineRequest, SamplingParams, StepOutput
from worker.intake import NEVER_MS, Intake
from worker.outbox import Outbox
from worker.presence import listen
from worker.stream import Stream
from worker.text import Vocabulary

MV = "echo@1"


class Rig:
    """A worker without its process: what main.py puts together, with a way to break it."""

    def __init__(self, store: Store, name: str, batch: int, step_ms: float) -> None:
        engine, files = create_engine(
            EngineOptions(engine="echo", max_batch_size=batch, echo_step_ms=step_ms)
        )
        self.store = store
        self.name = name
        self.failures: list[BaseException] = []
        self.tokenizer = Tokenizer.from_str(files.tokenizer_json)
        self.taking: asyncio.Task[None] | None = None
        self.heard = asyncio.Event()
        self.heard.set()
        self.outbox = Outbox(store, MV, name)
        self.driver = Driver(
            engine, EngineThread(), on_step=self.outbox.on_step, on_failure=self.failures.append
        )
        self.outbox.attach(self.driver)
        self.intake = Intake(
            store,
            model="echo",
            version="1",
            engine=name,
            vocabulary=Vocabulary(self.tokenizer),
            heard=self.heard,
            driver=self.driver,
            outbox=self.outbox,
            max_batch_size=batch,
            max_wait_ms=1,
            lease_ms=3000,
            aging_ms=30_000,
        )


@asynccontextmanager
async def worker(
    store: Store, name: str = "e1", *, batch: int = 8, step_ms: float = 1.0
) -> AsyncIterator[Rig]:
    rig = Rig(store, name, batch, step_ms)
    pubsub = store.client.pubsub()
    await pubsub.subscribe(keys.control_channel(name))
    rig.driver.start()
    rig.taking = asyncio.create_task(rig.intake.run())
    tasks = [rig.taking, asyncio.create_task(rig.outbox.run())]
    try:
        yield rig
        assert not rig.failures
    finally:
        await end(*tasks)
        await rig.driver.stop()
        await pubsub.aclose()


@pytest.fixture
async def opened(store: Store) -> Store:
    await store.client.set(keys.is_open(MV), "1")
    return store


async def submit(store: Store, rid: str, tokens: int = 5, **options: Any) -> None:
    sampling = Sampling(tokens, seed=options.pop("seed", 7), stop=options.pop("stop", []))
    await enqueue(store, Request(1, rid, "echo", "1", "someone", [1, 2, 3], sampling), **options)


async def enqueue(store: Store, request: Request, **options: Any) -> None:
    answer = await store.enqueue(
        request,
        cls=options.pop("cls", "normal"),
        timeout_ms=options.pop("timeout_ms", 20_000),
        grace_ms=options.pop("grace_ms", 60_000),
        keep_ms=5_000,
        attempt="",
        queue_limit=10_000,
        queue_bytes=10**9,
        resumable=False,
        had=options.pop("had", None),
    )
    assert answer.outcome == "accepted"


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(8):
        while not condition():
            await asyncio.sleep(0.002)


async def until_state(store: Store, rid: str, state: bytes, timeout_s: float = 5) -> None:
    async with asyncio.timeout(timeout_s):
        while (await store.client.hget(keys.request(rid), "st")) != state:
            await asyncio.sleep(0.002)


async def result(store: Store, rid: str) -> tuple[list[int], str, messages.End]:
    """Ids, text and end of a request, once it has ended; checks the numbering on the way."""
    await until_state(store, rid, b"e", 15)
    ids: list[int] = []
    text = ""
    ends = []
    for entry in await store.read_log(rid, 0, 10_000):
        if isinstance(entry.event, messages.End):
            ends.append(entry.event)
            continue
        assert entry.event.first == len(ids) + 1
        ids += [token.id for token in entry.event.tokens]
        text += "".join(token.text for token in entry.event.tokens)
        assert entry.seq == len(ids)
    assert len(ends) == 1
    return ids, text, ends[0]


def expected(count: int, seed: int = 7) -> list[int]:
    return [echo_token(seed, 0, position) for position in range(count)]


async def test_every_token_once_and_one_end(opened: Store) -> None:
    async with worker(opened) as rig:
        for i in range(30):
            await submit(opened, f"r{i}", tokens=1 + i, seed=i)
        for i in range(30):
            ids, text, end = await result(opened, f"r{i}")
            assert ids == expected(1 + i, seed=i)
            assert text == rig.tokenizer.decode(ids)
            assert end.reason == "length"
            assert set(end.timings) == {"queue", "prefill", "decode"}
        await until(lambda: not rig.outbox.streams)


async def test_a_step_of_all_sequences_is_one_call(
    opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker(opened, step_ms=3) as rig:
        calls: list[int] = []
        emit = rig.store.emit

        async def counted(mv: str, engine: str, step: Sequence[Emission]) -> Any:
            calls.append(len(step))
            return await emit(mv, engine, step)

        monkeypatch.setattr(rig.store, "emit", counted)
        for i in range(8):
            await submit(opened, f"r{i}", tokens=60, seed=i)
        for i in range(8):
            await result(opened, f"r{i}")
        await until(lambda: not rig.outbox.streams)
        # Several steps may share one. At worst no two sequences were ever in the same step.
        assert 0 < len(calls) <= rig.driver.stats.steps <= 8 * 60
        assert max(calls) == 8


async def test_a_stop_string_ends_the_stream_before_it(opened: Store) -> None:
    async with worker(opened) as rig:
        await submit(opened, "whole", tokens=60)
        _, whole, _ = await result(opened, "whole")
        stop = whole[20:23]
        await submit(opened, "cut", tokens=60, stop=[stop])
        _, text, end = await result(opened, "cut")
        assert text == whole[: whole.find(stop)]
        assert end.reason == "stop"
        await until(lambda: rig.driver.stats.running == 0)


async def test_requests_join_a_running_batch(opened: Store) -> None:
    async with worker(opened, step_ms=3) as rig:
        await submit(opened, "long", tokens=300)
        await until(lambda: rig.outbox.streams)
        await submit(opened, "short", tokens=3)
        await result(opened, "short")
        assert (await opened.client.hget(keys.request("long"), "st")) == b"r"
        await opened.cancel("long", "")
        await until(lambda: not rig.outbox.streams)


async def test_a_cancelled_stream_frees_the_engine(opened: Store) -> None:
    async with worker(opened, batch=1) as rig:
        await submit(opened, "long", tokens=4000)
        await until(lambda: rig.outbox.streams)
        assert await opened.cancel("long", "") == "cancelled"
        await submit(opened, "next", tokens=4)
        assert (await result(opened, "next"))[0] == expected(4)
        assert (await result(opened, "long"))[2].reason == "cancelled"


async def test_a_deadline_ends_a_running_stream(opened: Store) -> None:
    async with worker(opened):
        await submit(opened, "late", tokens=8000, timeout_ms=150)
        ids, _, end = await result(opened, "late")
        assert end.reason == "timeout"
        assert ids == expected(len(ids))


async def test_a_fenced_engine_drops_the_stream(opened: Store) -> None:
    async with worker(opened) as rig:
        await submit(opened, "taken", tokens=8000)
        await until(lambda: rig.outbox.streams)
        before = await opened.client.hget(keys.request("taken"), "own")
        await opened.client.hset(keys.request("taken"), "own", "9:other")
        await until(lambda: not rig.outbox.streams)
        assert rig.outbox.fenced == 1
        await until(lambda: rig.driver.stats.running == 0)
        await opened.client.hset(keys.request("taken"), "own", before)
        await opened.cancel("taken", "")


async def test_another_engine_goes_on_where_a_dead_one_stopped(opened: Store) -> None:
    await submit(opened, "orphan", tokens=40)
    take = await opened.take(MV, "dead", 1, lease_ms=3000, aging_ms=30_000)
    assert [t.rid for t in take.requests] == ["orphan"]
    tokens = [messages.Token(0, i, "") for i in expected(10)]
    body = messages.encode(messages.Tokens(1, 1, tokens))
    await opened.emit(MV, "dead", [Emission("orphan", 1, 1, 10, body, 13)])
    await opened.client.zadd(keys.leases(MV), {"dead": 1})
    async with worker(opened, "alive"):
        # A fresh server declares nobody dead; the take-over itself is proved over released streams.
        await opened.release(MV, "dead", [("orphan", 1)])
        ids, _, end = await result(opened, "orphan")
    assert ids == expected(40)
    assert end.reason == "length"


async def test_tokens_of_an_earlier_owner_that_a_failover_lost_are_sent_again(
    opened: Store,
) -> None:
    await submit(opened, "moved", tokens=300)
    await opened.take(MV, "first", 1, lease_ms=3000, aging_ms=30_000)
    earlier = [messages.Token(0, i, f"<{i}>") for i in expected(10)]
    for first, last in ((1, 4), (5, 10)):
        body = messages.encode(messages.Tokens(1, first, earlier[first - 1 : last]))
        await opened.emit(MV, "first", [Emission("moved", 1, first, last, body, last)])
    await opened.release(MV, "first", [("moved", 1)])
    log = keys.log("moved")
    (entry_id, fields), *_ = await opened.client.xrange(log)
    async with worker(opened, "second", step_ms=5):
        async with asyncio.timeout(5):
            while int(await opened.client.hget(keys.request("moved"), "seq")) < 20:
                await asyncio.sleep(0.002)
        async with opened.client.pipeline(transaction=True) as pipe:
            pipe.delete(log).xadd(log, fields, id=entry_id)
            pipe.hset(keys.request("moved"), "seq", 4)
            await pipe.execute()
        ids, text, _ = await result(opened, "moved")
    assert ids == expected(300)
    assert text.startswith("".join(token.text for token in earlier))


async def leave_suspects(store: Store, rids: list[str], tokens: int = 5) -> None:
    """An engine died right after it took these."""
    for rid in rids:
        await submit(store, rid, tokens)
    take = await store.take(MV, "dead", len(rids), lease_ms=3000, aging_ms=30_000)
    assert [taken.rid for taken in take.requests] == rids
    await store.client.zadd(keys.leases(MV), {"dead": 1})
    await store.greet()
    await store.client.hset(keys.SERVER, "since", 1)
    await store.client.delete(keys.wake(MV))


async def test_nothing_joins_a_suspect_until_it_makes_progress(opened: Store) -> None:
    await leave_suspects(opened, ["suspect"])
    await submit(opened, "next")
    rig = Rig(opened, "e1", 8, 1.0)
    task = asyncio.create_task(rig.intake.run())
    await until(lambda: rig.outbox.streams)
    (stream,) = rig.outbox.streams.values()
    assert (stream.rid, rig.outbox.on_trial, rig.outbox.calm) == ("suspect", True, False)
    for rows, tried in ((0, False), (1, True)):
        assert rig.intake._room() == 0
        rig.outbox.on_step([StepOutput(stream.name, [], prefilled=rows)])
        # That it was computed is not enough: nobody knows of it if the engine dies now.
        assert not stream.proven
        await rig.outbox._send()
        assert (rig.outbox.calm, rig.outbox.on_trial) == (tried, not tried)
    await until(lambda: len(rig.outbox.streams) == 2)
    assert not rig.outbox.calm
    rig.intake.stop()
    await task
    for rid in ("suspect", "next"):
        await opened.cancel(rid, "")


@pytest.mark.parametrize("tokens", [1, 8000])
async def test_suspects_follow_each_other_at_once(
    opened: Store, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr("worker.intake.LOOK_S", 4)
    suspects = [f"r{i}" for i in range(6)]
    await leave_suspects(opened, suspects, tokens)
    await opened.client.lpush(keys.wake(MV), "1")
    async with worker(opened), asyncio.timeout(4):
        for rid in suspects:
            while not await opened.client.hget(keys.request(rid), "t2"):
                await asyncio.sleep(0.002)
    for rid in suspects:
        await opened.cancel(rid, "")


async def test_a_drained_stream_goes_on_elsewhere(opened: Store) -> None:
    async with worker(opened, "first", step_ms=2) as first:
        await submit(opened, "moved", tokens=200)
        await until(lambda: first.outbox.streams)
        await asyncio.sleep(0.05)
    owned = [(s.rid, s.epoch) for s in first.outbox.streams.values()]
    assert await opened.release(MV, "first", owned) == 1
    async with worker(opened, "second"):
        ids, text, _ = await result(opened, "moved")
    assert ids == expected(200)
    assert text == first.tokenizer.decode(ids)


async def test_an_unreadable_body_is_refused_with_one_end(opened: Store) -> None:
    async with worker(opened):
        await submit(opened, "newer", tokens=4)
        await result(opened, "newer")
    version = Request.NEWEST + 1
    request = Request(version, "later", "echo", "1", "someone", [1], Sampling(3))
    await enqueue(opened, request)
    async with worker(opened):
        _, _, end = await result(opened, "later")
    assert end.reason == "error"
    assert f"version {version}" in end.message


async def test_what_the_engine_refuses_ends_with_its_reason(opened: Store) -> None:
    request = Request(1, "bad", "echo", "1", "someone", [999_999], Sampling(3))
    await enqueue(opened, request)
    async with worker(opened):
        _, _, end = await result(opened, "bad")
        assert end.reason == "error"
        assert end.message


class Flaky(Store):
    """Loses replies: the script ran, its answer did not arrive."""

    lose: set[str]
    away: int = 0
    """So many takes after a lost reply fail, too."""

    async def take(self, *args: Any, **options: Any) -> Any:
        if "take" not in self.lose and self.away:
            self.away -= 1
            raise StoreUnavailable("no answer")
        reply = await super().take(*args, **options)
        if "take" in self.lose and reply.requests:
            self.lose.discard("take")
            raise StoreUnavailable("lost reply")
        return reply

    async def emit(self, *args: Any, **options: Any) -> Any:
        reply = await super().emit(*args, **options)
        if "emit" in self.lose:
            self.lose.discard("emit")
            raise StoreUnavailable("lost reply")
        return reply


async def test_an_epoch_is_new_if_it_is_higher_than_all_before(opened: Store) -> None:
    rig = Rig(opened, "e1", 8, 1.0)

    async def is_new(epoch: int) -> bool:
        return bool(await rig.intake._unknown([Taken("R", epoch, b"", 0, 1, 0, 0, 0)]))

    assert [await is_new(epoch) for epoch in (3, 1, 3, 4)] == [True, False, False, True]
    # What runs for long may have been forgotten.
    owned(rig, 7)
    rig.intake._epochs.clear()
    assert [await is_new(epoch) for epoch in (7, 8)] == [False, True]


async def test_the_last_engine_waits_for_what_it_handed_back(opened: Store) -> None:
    """Its epoch had come before; nobody else would take it."""
    rig = Rig(opened, "e1", 8, 1.0)
    rig.intake._epochs["r"] = 1
    await submit(opened, "r")
    rig.intake.finish()
    await rig.intake.run()
    assert [stream.name for stream in rig.outbox.streams.values()] == ["r:3"]
    await opened.cancel("r", "")


async def test_what_is_taken_over_runs_before_all_of_it_was_read(
    opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read what others generated takes its time, and the lease is renewed by steps alone."""
    for number in range(4):
        had = [messages.Token(0, 5, "x")] * 3
        request = Request(1, f"r{number}", "echo", "1", "someone", [1, 2, 3], Sampling(5, seed=7))
        await enqueue(opened, request, had=had)
    read, seen = opened.read_log, []

    async def read_slowly(rid: str, after: int, *rest: Any) -> Any:
        seen.append(await opened.client.hget(keys.request("r0"), "st"))
        await asyncio.sleep(0.05)
        return await read(rid, after, *rest)

    monkeypatch.setattr(opened, "read_log", read_slowly)
    async with worker(opened):
        await until_state(opened, "r3", b"e")
    # It ends in two steps: before the last one was read.
    assert (len(seen), seen[-1]) == (4, b"e")


async def test_a_log_that_is_another_runs_by_now_holds_nobody_up(opened: Store) -> None:
    """Taken over after three tokens; then it was cancelled, run anew, and cancelled again."""
    async with worker(opened) as rig:
        await opened.client.xadd(
            keys.log("r"), {"d": messages.encode(messages.End(1, "cancelled"))}, id="0-1"
        )
        async with asyncio.timeout(5):
            assert await rig.intake._open(Taken("r", 2, request_body(), 3, 1, 0, 0, 0)) is None


def request_body() -> bytes:
    return messages.encode(Request(1, "r", "echo", "1", "someone", [1, 2, 3], Sampling(9)))


async def test_an_end_that_redis_lost_is_said_again(opened: Store) -> None:
    """Its last tokens are there: nothing is left to be generated."""
    async with worker(opened) as rig:
        text = "".join(t.text for t in (await tokens_of(opened, "whole", 12)))
        stop = text[3:7]
        had = await tokens_of(opened, "stopped", 12, stop=[stop])
        await opened.client.flushall()
        await opened.client.set(keys.is_open(MV), "1")
        sampling = Sampling(12, seed=7, stop=[stop])
        request = Request(1, "stopped", "echo", "1", "someone", [1, 2, 3], sampling)
        await enqueue(opened, request, had=had)
        ids, _, end = await result(opened, "stopped")
        assert (ids, end.reason) == ([t.id for t in had], "stop")
        assert not rig.outbox.streams


async def tokens_of(store: Store, rid: str, count: int, **options: Any) -> list[messages.Token]:
    await submit(store, rid, tokens=count, **options)
    await until_state(store, rid, b"e")
    entries = await store.read_log(rid, 0)
    return [t for e in entries if isinstance(e.event, messages.Tokens) for t in e.event.tokens]


@pytest.mark.parametrize("call", ["take", "emit"])
async def test_a_lost_reply_loses_and_repeats_nothing(
    opened: Store, server: Any, call: str
) -> None:
    flaky = Flaky(connect(server.url, timeout_s=5))
    flaky.lose = {call}
    async with worker(flaky):
        await submit(opened, "r", tokens=20)
        ids, _, _ = await result(opened, "r")
        assert ids == expected(20)
        assert not flaky.lose
    await flaky.close()


async def test_an_epoch_that_redis_gives_twice_is_handed_back(opened: Store) -> None:
    """It lost that it gave it: what was computed in the first must not pass for the second's."""
    async with worker(opened, step_ms=20) as rig:
        await submit(opened, "r", tokens=40)
        await until(lambda: any(s.emission().last > 5 for s in rig.outbox.streams.values()))
        await opened.client.flushall()
        await opened.client.set(keys.is_open(MV), "1")
        await submit(opened, "r", tokens=40)
        ids, _, _ = await result(opened, "r")
        assert ids == expected(40)
        assert await opened.client.hget(keys.request("r"), "own") == b"3:e1"


async def test_while_redis_is_away_tokens_wait_and_memory_is_bounded(own_server: Any) -> None:
    store = Store(connect(own_server.url, timeout_s=0.2))
    patient = Store(connect(own_server.url, timeout_s=5))
    await store.client.set(keys.is_open(MV), "1")
    async with worker(store, step_ms=0) as rig:
        await submit(patient, "r", tokens=2000)
        await until(lambda: rig.outbox.streams)
        own_server.pause()
        await asyncio.sleep(0.5)
        steps = rig.driver.stats.steps
        await asyncio.sleep(0.3)
        # One step may be under way when the last permit is given.
        assert rig.driver.stats.steps <= steps + 1
        assert STEPS_AHEAD < 2000
        own_server.go_on()
        ids, _, _ = await result(patient, "r")
        assert ids == expected(2000)
    with suppress(StoreUnavailable):
        await store.close()
    await patient.close()


def owned(rig: Rig, epoch: int, tokens: int = 3) -> Stream:
    """A stream as if it had been taken under this epoch."""
    request = Request(1, "R", "echo", "1", "someone", [1], Sampling(tokens))
    stream = Stream(Taken("R", epoch, b"", 0, 1, 0, 0, 0), request, [], Vocabulary(rig.tokenizer))
    rig.outbox.add(stream)
    return stream


async def test_a_step_of_a_lost_ownership_does_not_reach_the_next_one(opened: Store) -> None:
    """The abort of the old one waits behind a running step while the request is taken again."""
    rig = Rig(opened, "e1", 8, 1.0)
    before = owned(rig, 1)
    del rig.outbox.streams[before.name]
    after = owned(rig, 3)
    rig.outbox.on_step([StepOutput(before.name, [40])])
    rig.outbox.on_step([StepOutput(after.name, [41])])
    emission = after.emission()
    assert (emission.first, emission.last) == (1, 1)
    tokens = messages.decode(emission.tokens, messages.Tokens)
    assert [token.id for token in tokens.tokens] == [41]


async def test_nonsense_about_one_sequence_does_not_lose_the_others(opened: Store) -> None:
    rig = Rig(opened, "e1", 8, 1.0)
    bad, good = owned(rig, 1), owned(rig, 2)
    rig.outbox.on_step([StepOutput(bad.name, [-1]), StepOutput(good.name, [5])])
    assert bad.emission().reason == "error"
    assert good.emission().last == 1


async def test_what_was_just_taken_is_handed_back_by_a_stop(opened: Store) -> None:
    rig = Rig(opened, "e1", 8, 1.0)
    # It never gets further than the wait for more.
    rig.intake._max_wait_s = 0.3
    await submit(opened, "r")
    task = asyncio.create_task(rig.intake.run())
    await until_state(opened, "r", b"r")
    rig.intake.stop()
    await task
    assert [stream.rid for stream in rig.outbox.streams.values()] == ["r"]
    await opened.cancel("r", "")


async def test_a_reply_lost_at_the_stop_is_asked_for_again(opened: Store, server: Any) -> None:
    flaky = Flaky(connect(server.url, timeout_s=5))
    flaky.lose = {"take"}
    flaky.away = 3
    rig = Rig(flaky, "e1", 8, 1.0)
    await submit(opened, "r")
    task = asyncio.create_task(rig.intake.run())
    await until(lambda: not flaky.lose)
    rig.intake.stop()
    await task
    assert [stream.rid for stream in rig.outbox.streams.values()] == ["r"]
    await opened.cancel("r", "")
    await flaky.close()


async def test_the_last_engine_serves_all_who_wait_and_what_others_hand_over(
    opened: Store,
) -> None:
    """One place in its batch: it comes back for each, and does not end before the last."""
    for i in range(4):
        await submit(opened, f"r{i}", seed=i)
    # Another engine that drains, and is heard: it is not dead.
    pubsub = opened.client.pubsub()
    await pubsub.subscribe(keys.control_channel("x"))
    handed = (await opened.take(MV, "x", 3, lease_ms=3000, aging_ms=30_000)).requests
    rig = Rig(opened, "e1", 1, 1.0)
    rig.driver.start()
    sending = asyncio.create_task(rig.outbox.run())
    rig.intake.stop()
    await rig.intake.run()
    rig.intake.finish()
    assert not rig.intake.is_over
    serving = asyncio.create_task(rig.intake.run())
    # The other engine still owns three of them; then it hands them back.
    assert (await result(opened, "r3"))[0] == expected(5, seed=3)
    await asyncio.sleep(0.6)
    assert not serving.done()
    await opened.release(MV, "x", [(taken.rid, taken.epoch) for taken in handed])
    for i in range(3):
        assert (await result(opened, f"r{i}"))[0] == expected(5, seed=i)
    async with asyncio.timeout(5):
        await serving
    assert rig.intake.is_over
    await pubsub.aclose()
    await end(sending)
    await rig.driver.stop()


@pytest.mark.parametrize("times", [1, 2])
async def test_a_reply_from_before_does_not_end_the_last_engines_work(
    opened: Store, server: Any, times: int
) -> None:
    """A call that told of an empty queue was under way when the engine learned that it is last."""

    class Slow(Store):
        held = asyncio.Event()
        hold = True

        async def take(self, *args: Any, **options: Any) -> Any:
            reply = await super().take(*args, **options)
            if self.hold:
                self.hold = False
                await self.held.wait()
            return reply

    slow = Slow(connect(server.url, timeout_s=5))
    rig = Rig(slow, "e1", 8, 1.0)
    for _ in range(times - 1):
        rig.intake.finish()
    task = asyncio.create_task(rig.intake.run())
    await until(lambda: not slow.hold)
    await submit(opened, "r")
    rig.intake.finish()
    slow.held.set()
    await until(lambda: rig.outbox.streams)
    rig.intake.stop()
    await task
    assert [stream.rid for stream in rig.outbox.streams.values()] == ["r"]
    await opened.cancel("r", "")
    await slow.close()


async def test_what_a_late_take_handed_over_is_found_before_a_release(
    opened: Store, server: Any
) -> None:
    flaky = Flaky(connect(server.url, timeout_s=5))
    flaky.lose = {"take"}
    rig = Rig(flaky, "e1", 8, 1.0)
    await submit(opened, "r")
    with pytest.raises(StoreUnavailable):
        await flaky.take(MV, "e1", 1, lease_ms=3000, aging_ms=30_000)
    rig.intake.finish()
    await submit(opened, "waiting")
    assert not rig.outbox.streams
    # Nothing else is taken, to be handed back at once.
    await rig.intake.compare()
    assert [stream.rid for stream in rig.outbox.streams.values()] == ["r"]
    assert (await opened.client.hget(keys.request("waiting"), "st")) == b"w"
    for rid in ("r", "waiting"):
        await opened.cancel(rid, "")
    await flaky.close()


def drain(rig: Rig, grace_s: float) -> Drain:
    """As main.py makes it, of a worker that was told to stop."""
    rig.intake.stop()
    assert rig.taking is not None
    return Drain(
        rig.store,
        MV,
        rig.name,
        driver=rig.driver,
        intake=rig.intake,
        outbox=rig.outbox,
        beating=asyncio.create_task(asyncio.sleep(0)),
        taking=rig.taking,
        grace_s=grace_s,
    )


async def test_a_draining_engine_runs_what_a_late_take_handed_over(
    opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still for no longer than elsewhere, however long the grace time."""
    monkeypatch.setattr("worker.intake.COMPARE_S", 0.2)
    async with worker(opened, "e1") as rig:
        await submit(opened, "long", tokens=8000)
        await until(lambda: rig.outbox.streams)
        draining = asyncio.create_task(drain(rig, 60).run(asyncio.Future()))
        await asyncio.sleep(0.5)
        await submit(opened, "late", 3)
        await opened.take(MV, "e1", 1, lease_ms=3000, aging_ms=30_000)
        ids, _, end_of_it = await result(opened, "late")
        assert (len(ids), end_of_it.reason) == (3, "length")
        assert not draining.done()
        await opened.cancel("long", "")
        async with asyncio.timeout(5):
            await draining


async def test_an_engine_that_fails_at_the_last_moment_hands_nothing_over(
    opened: Store, server: Any
) -> None:
    """Or a request that kills engines would go round, and none of its deaths would count."""
    failed: asyncio.Future[BaseException] = asyncio.Future()

    class Ominous(Store):
        async def take(self, *args: Any, **options: Any) -> Any:
            if options["known"] is not None and ending and not failed.done():
                failed.set_result(RuntimeError("the device is gone"))
            return await super().take(*args, **options)

    ending = False
    async with worker(Ominous(connect(server.url, timeout_s=5)), "e1") as rig:
        await submit(opened, "r", tokens=8000)
        await until(lambda: rig.outbox.streams)
        ending = True
        await drain(rig, 0).run(failed)
        assert (await opened.client.hget(keys.request("r"), "own")) == b"1:e1"
        await opened.cancel("r", "")
    await rig.store.close()


@pytest.mark.parametrize("call", ["depart", "take"])
async def test_what_breaks_in_a_drain_is_seen(
    opened: Store, server: Any, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr("worker.intake.COMPARE_S", 0.2)

    class Broken(Store):
        broken = False

        async def depart(self, *args: Any) -> Any:
            if call == "depart":
                raise ValueError("no such field")
            return await super().depart(*args)

        async def take(self, *args: Any, **options: Any) -> Any:
            if call == "take" and self.broken:
                raise ValueError("no such field")
            return await super().take(*args, **options)

    broken = Broken(connect(server.url, timeout_s=5))
    async with worker(broken, "e1") as rig:
        await submit(opened, "r", tokens=8000)
        await until(lambda: rig.outbox.streams)
        # One that may break: not the rig's.
        assert rig.taking is not None
        await end(rig.taking)
        rig.taking = asyncio.create_task(rig.intake.run())
        broken.broken = True
        draining = asyncio.create_task(drain(rig, 60).run(asyncio.Future()))
        await asyncio.wait([draining], timeout=5)
        assert isinstance(draining.exception(), ValueError)
        await opened.cancel("r", "")
    await rig.store.close()


async def test_the_last_engine_serves_who_comes_after_all_were_served(opened: Store) -> None:
    """It is told again and again that it is the last one."""
    async with worker(opened, "e1") as rig:
        rig.intake.finish()
        await until(lambda: rig.intake.is_over)
        await submit(opened, "again")
        rig.intake.finish()
        assert not rig.intake.is_over
        serving = asyncio.create_task(rig.intake.run())
        assert (await result(opened, "again"))[0] == expected(5)
        async with asyncio.timeout(5):
            await serving


async def test_a_stop_while_it_waits_for_more_takes_no_more(opened: Store) -> None:
    rig = Rig(opened, "e1", 8, 1.0)
    rig.intake._max_wait_s = 2
    await submit(opened, "first")
    task = asyncio.create_task(rig.intake.run())
    await until_state(opened, "first", b"r")
    await submit(opened, "second")
    rig.intake.stop()
    await task
    assert (await opened.client.hget(keys.request("second"), "st")) == b"w"
    for rid in ("first", "second"):
        await opened.cancel(rid, "")


async def test_a_stop_ends_an_engine_whose_steps_nobody_handles() -> None:
    """It waits for them twice, for a refusal and for a step, before it reads that it shall stop."""
    engine, _ = create_engine(EngineOptions(engine="echo", max_batch_size=1, echo_step_ms=0))
    driver = Driver(
        engine, EngineThread(), on_step=lambda outputs: None, on_failure=lambda error: None
    )
    for _ in range(STEPS_AHEAD):
        driver._ahead.acquire()
    driver.add(EngineRequest("runs", [1], SamplingParams(max_tokens=8000)))
    driver.add(EngineRequest("refused", [999_999], SamplingParams(max_tokens=3)))
    driver.start()
    await asyncio.sleep(0.1)
    await driver.stop(2)


async def test_an_engine_that_hangs_takes_no_more(
    opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each take renews its lease: with a flow of requests it would never be found dead."""
    go_on = threading.Event()
    async with worker(opened) as rig:
        rig.intake._lease_ms = 400
        engine = rig.driver._engine
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: (go_on.wait(), step())[1])
        await submit(opened, "first")
        await until(lambda: rig.outbox.streams)
        await asyncio.sleep(0.3)
        await submit(opened, "second")
        await asyncio.sleep(0.8)
        assert (await opened.client.hget(keys.request("second"), "st")) == b"w"
        go_on.set()
        for rid in ("first", "second"):
            assert (await result(opened, rid))[0] == expected(5)


async def test_an_engine_that_is_not_heard_takes_nothing(opened: Store) -> None:
    async with worker(opened) as rig:
        rig.heard.clear()
        await asyncio.sleep(0.3)
        await submit(opened, "r")
        await asyncio.sleep(0.4)
        assert (await opened.client.hget(keys.request("r"), "st")) == b"w"
        rig.heard.set()
        assert (await result(opened, "r"))[0] == expected(5)


async def test_a_corrupt_log_refuses_its_request_alone(opened: Store) -> None:
    await submit(opened, "broken")
    await opened.take(MV, "dead", 1, lease_ms=3000, aging_ms=30_000)
    body = messages.encode(messages.Tokens(1, 1, [messages.Token(0, 1, "")]))
    await opened.emit(MV, "dead", [Emission("broken", 1, 1, 1, body, 1)])
    await opened.client.delete(keys.log("broken"))
    await opened.client.xadd(keys.log("broken"), {"d": b"nonsense"}, id="1-0")
    await opened.release(MV, "dead", [("broken", 1)])
    async with worker(opened) as rig:
        await until_state(opened, "broken", b"e")
        assert (await opened.client.hget(keys.request("broken"), "reason")) == b"error"
        await submit(opened, "next")
        assert (await result(opened, "next"))[0] == expected(5)
        await until(lambda: not rig.outbox.streams)
    await opened.client.delete(keys.log("broken"), keys.request("broken"))


async def test_a_control_channel_that_went_silent_is_opened_again(own_server: Any) -> None:
    heard = asyncio.Event()
    store = Store(connect(own_server.url, timeout_s=2))
    task = asyncio.create_task(listen(store, own_server.url, "e1", heard))
    await until(heard.is_set)
    # By then the server was greeted, again after each time that it was away.
    assert await store.client.delete(keys.SERVER)
    own_server.pause()
    await until(lambda: not heard.is_set())
    own_server.go_on()
    await until(heard.is_set)
    assert await store.client.exists(keys.SERVER)
    assert await store.client.publish(keys.control_channel("e1"), "x") >= 1
    await store.client.client_kill_filter(_type="pubsub")
    await until(lambda: not heard.is_set())
    await until(heard.is_set)
    await end(task)
    await store.close()


async def test_what_a_late_take_handed_over_is_run(
    opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network delivers a call that was given up, after the next one: nobody read its reply."""
    monkeypatch.setattr("worker.intake.COMPARE_S", 0.2)
    async with worker(opened, "e1") as rig:
        rig.heard.clear()
        await submit(opened, "late", 3)
        await opened.take(MV, "e1", 1, lease_ms=3000, aging_ms=30_000)
        rig.heard.set()
        ids, _, end_of_it = await result(opened, "late")
        assert (len(ids), end_of_it.reason) == (3, "length")


async def test_after_an_outage_nobody_is_found_dead_for_a_lease(
    opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases: list[int] = []
    async with worker(opened, "e1") as rig:
        rig.intake._lease_ms = 2000
        take = rig.store.take

        async def recorded(*args: Any, **options: Any) -> Any:
            leases.append(options["lease_ms"])
            if len(leases) == 1:
                raise StoreUnavailable("away")
            return await take(*args, **options)

        monkeypatch.setattr(rig.store, "take", recorded)
        await until(lambda: len(leases) > 3)
        assert leases[0] == 2000
        assert set(leases[1:4]) == {NEVER_MS}
        await until(lambda: leases[-1] == 2000)
