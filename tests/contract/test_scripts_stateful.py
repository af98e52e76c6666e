"""Any sequence of calls leaves the server as the model in script_model.py says.

HYPOTHESIS_PROFILE=long runs many more sequences, and other ones each time.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from script_model import (
    MODEL,
    MV,
    VERSION,
    Clock,
    Job,
    Model,
    assert_consistent,
    make_end,
    make_request,
    make_tokens,
)

from shared import keys, messages
from shared.store import ENGINE_TTL_MS, Departed, Emission, Store, connect

if TYPE_CHECKING:
    from servers import Server

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
PROFILE = settings(
    max_examples=2000 if LONG else 80,
    stateful_step_count=150 if LONG else 70,
    derandomize=not LONG,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
LEASE_MS = 500
AGING_MS = 1000
QUEUE_LIMIT = 8
FOREVER_MS = 10**8
T = TypeVar("T")

callers = st.sampled_from(["alice", "bob", "carol"])
classes = st.integers(0, 2)
lifetimes = st.sampled_from([1000, 3000, FOREVER_MS, FOREVER_MS, FOREVER_MS])
engines = st.sampled_from(["a", "b", "c"])
bursts = st.lists(st.tuples(callers, classes, lifetimes, st.booleans()), min_size=1, max_size=6)
# What an engine may think it owns, and what it says of it, is picked by position.
picks = st.integers(0, 10**6)
kinds = st.sampled_from(["next", "next", "next", "end", "idle", "again", "gap", "overlap"])
# Just below, at and above what the scripts compare: doubt, lease, aging, grace, engine ttl.
delays = st.sampled_from([1, 50, 150, 151, 500, 501, 1000, 2000, 5001])


class Machine(RuleBasedStateMachine):
    """The scripts on one side, the model on the other."""

    url: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.store = Store(connect(self.url, timeout_s=5))
        self.do(self.store.client.flushall())
        self.clock = self.do(Clock.stop(self.store))
        self.model = Model(self.clock.now_ms, LEASE_MS, AGING_MS, QUEUE_LIMIT)
        self.pubsub = self.store.client.pubsub()
        # What each engine was told that it owns, and everything that any was ever told.
        self.held: dict[str, dict[str, int]] = {"a": {}, "b": {}, "c": {}}
        self.told: list[tuple[str, str, int]] = []
        self.requests: dict[str, messages.Request] = {}
        # Every request that was queued, and the attempt that did it.
        self.attempts: list[tuple[str, str]] = []
        for engine in self.held:
            self.heartbeat(engine)
            self.control_connection(engine)

    def do(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def teardown(self) -> None:
        try:
            self.finish_everything()
        finally:
            self.do(self.pubsub.aclose())
            self.do(self.store.close())
            self.runner.close()

    # -- gateways --

    def _put(
        self,
        request: messages.Request,
        cls: int,
        timeout_ms: int,
        had: list[str] | None = None,
        attempt: str = "",
        grace_ms: int = 1000,
        t0: int | None = None,
    ) -> str:
        t0 = self.model.now if t0 is None else t0
        attempt = attempt or secrets.token_hex(8)
        answer = self.do(
            self.store.enqueue(
                request,
                cls=keys.CLASSES[cls],
                timeout_ms=timeout_ms,
                grace_ms=grace_ms,
                keep_ms=600_000,
                attempt=attempt,
                queue_limit=QUEUE_LIMIT,
                queue_bytes=10**6,
                resumable=False,
                had=None if had is None else [messages.Token(0, 1, text) for text in had],
                t0=t0,
            )
        )
        job = Job(
            rid=request.rid,
            caller=request.caller,
            cls=cls,
            digest=request.digest(),
            size=len(messages.encode(request)),
            t0=self.model.now,
            deadline=self.model.now + timeout_ms,
            grace=grace_ms,
            prompt=len(request.prompt),
            attempt=attempt,
            tokens=list(had or []),
        )
        before = len(self.model.waiting(cls))
        accepted_at = None if had is None else t0
        assert answer.outcome == self.model.enqueue(job, accepted_at=accepted_at)
        if answer.outcome == "full":
            assert answer.waiting == before
        if answer.outcome == "accepted":
            self.attempts.append((request.rid, attempt))
        return answer.outcome

    @rule(
        burst=st.lists(
            st.tuples(callers, classes, lifetimes, st.booleans()), min_size=1, max_size=6
        )
    )
    def enqueue(self, burst: list[tuple[str, int, int, bool]]) -> None:
        for caller, cls, timeout_ms, heard in burst:
            request = make_request(f"r{len(self.requests)}", caller, 1 + len(self.requests) % 3)
            if self._put(request, cls, timeout_ms) == "accepted":
                self.requests[request.rid] = request
                if heard:
                    self.listener(len(self.requests) - 1)

    @rule(caller=callers, cls=classes, timeout_ms=lifetimes, tokens=st.integers(0, 3))
    def enqueue_lost(self, caller: str, cls: int, timeout_ms: int, tokens: int) -> None:
        """A gateway puts back what Redis has lost."""
        request = make_request(f"r{len(self.requests)}", caller, 1 + len(self.requests) % 3)
        had = [f"before.{number}" for number in range(tokens)]
        assert self._put(request, cls, timeout_ms, had) == "accepted"
        self.requests[request.rid] = request

    @precondition(lambda self: self.requests)
    @rule(pick=picks, tokens=st.integers(0, 3), ago_ms=st.sampled_from([0, 1, 2000]))
    def enqueue_lost_again(self, pick: int, tokens: int, ago_ms: int) -> None:
        """It puts back a run in whose place there may be another one, of before or after it."""
        old = self.requests[self._rid(pick)]
        self.time_passes(1, janitor=False)
        had = [f"before.{number}" for number in range(tokens)]
        t0 = self.model.now - ago_ms
        assert self._put(old, 1, FOREVER_MS, had, t0=t0) in ("accepted", "conflict")

    def _rid(self, pick: int) -> str:
        return list(self.requests)[pick % len(self.requests)]

    @precondition(lambda self: self.requests)
    @rule(
        pick=picks,
        what=st.sampled_from(["same", "other caller", "other body"]),
        grace_ms=st.sampled_from([500, 1000, 2000]),
    )
    def enqueue_again(self, pick: int, what: str, grace_ms: int) -> None:
        old = self.requests[self._rid(pick)]
        caller = "mallory" if what == "other caller" else old.caller
        request = make_request(old.rid, caller, len(old.prompt) + (what == "other body"))
        # One that failed runs again, at another time than before.
        self.time_passes(1, janitor=False)
        there = self.do(self.store.attach(request, grace_ms=grace_ms))
        outcome = self._put(request, 1, FOREVER_MS, grace_ms=grace_ms)
        assert outcome == (there.outcome if there else outcome)
        assert (outcome == "conflict") == (what != "same")
        assert there or outcome in ("accepted", "full")

    @precondition(lambda self: self.attempts)
    @rule(pick=picks)
    def attempt_again(self, pick: int) -> None:
        """A gateway that got no answer asks once more."""
        rid, attempt = self.attempts[pick % len(self.attempts)]
        self.time_passes(1, janitor=False)
        self._put(self.requests[rid], 1, FOREVER_MS, attempt=attempt)

    @precondition(lambda self: self.attempts)
    @rule(pick=picks)
    def refund(self, pick: int) -> None:
        """A gateway takes back what it had no answer about, however late."""
        rid, attempt = self.attempts[pick % len(self.attempts)]
        taken_back = self.do(self.store.refund(rid, self.requests[rid].caller, attempt))
        assert taken_back == self.model.refund(rid, attempt)

    @precondition(lambda self: self.requests)
    @rule(pick=picks, foreign=st.sampled_from([False, False, False, True]))
    def cancel(self, pick: int, foreign: bool) -> None:
        rid = self._rid(pick)
        caller = "mallory" if foreign else self.requests[rid].caller
        assert self.do(self.store.cancel(rid, caller)) == self.model.cancel(rid, caller)

    @precondition(lambda self: self.requests)
    @rule(pick=picks)
    def listener(self, pick: int) -> None:
        """Somebody begins to listen to a request, or goes."""
        self._toggle(self.model.listened, rid := self._rid(pick), keys.log(rid))

    # -- engines --

    @precondition(lambda self: self.requests)
    @rule(pick=picks, foreign=st.sampled_from([False, False, False, True]))
    def leave(self, pick: int, foreign: bool) -> None:
        """The client of a request went."""
        rid = self._rid(pick)
        caller = "mallory" if foreign else self.requests[rid].caller
        assert self.do(self.store.leave(rid, caller)) == self.model.leave(rid, caller)

    @rule(engine=engines, what=st.sampled_from(["heartbeat", "heartbeat", "depart", "connection"]))
    def membership(self, engine: str, what: str) -> None:
        """An engine announces itself, goes, or loses or regains its control connection."""
        if what == "heartbeat":
            self.heartbeat(engine)
        elif what == "depart":
            answer = self.do(self.store.depart(MV, engine))
            assert answer == Departed(self.model.depart(engine), False)
        else:
            self.control_connection(engine)

    def heartbeat(self, engine: str) -> None:
        card = messages.EngineCard(
            messages.VERSION, engine, "echo", "", "", "", 1, 8, 0, 0, 0.0, False, 0.0
        )
        assert self.do(self.store.heartbeat(MODEL, VERSION, engine, card)) == VERSION
        self.model.heartbeat(engine, ENGINE_TTL_MS)

    @precondition(lambda self: self.model.all_waiting or self.model.leases)
    @rule(
        engine=engines,
        room=st.sampled_from([0, 1, 1, 2, 3, 8]),
        lost=st.sampled_from([False, False, True]),
        knows=st.sampled_from([False, False, True]),
        calm=st.sampled_from([False, True, True]),
    )
    def take(self, engine: str, room: int, lost: bool, knows: bool, calm: bool = True) -> None:
        known = list(self.held[engine]) if knows else None
        answer = self.do(
            self.store.take(
                MV,
                engine,
                room,
                lease_ms=LEASE_MS,
                aging_ms=AGING_MS,
                calm=calm,
                known=known,
            )
        )
        expected = self.model.take(
            engine, room, ENGINE_TTL_MS, calm, None if known is None else {*known}
        )
        assert [(t.rid, t.epoch) for t in answer.requests] == expected
        for taken in answer.requests:
            job = self.model.jobs[taken.rid]
            assert taken.body == messages.encode(self.requests[taken.rid])
            assert (taken.seq, taken.cls, taken.deaths) == (len(job.tokens), job.cls, job.deaths)
            assert (taken.waited_ms, taken.progress) == (self.model.now - job.t0, job.best)
            self.told.append((engine, taken.rid, taken.epoch))
            if not lost:
                self.held[engine][taken.rid] = taken.epoch
        assert answer.waiting == self.model.all_waiting

    def _emission(self, engine: str, rid: str, epoch: int, kind: str, n: int) -> Emission:
        seq = len(self.model.jobs[rid].tokens)
        first, n = {
            "next": (seq + 1, n),
            "end": (seq + 1, n - 1),
            "idle": (seq + 1, 0),
            "again": (max(1, seq - n + 1), min(n, seq)),
            "gap": (seq + 2, n - 1),
            "overlap": (max(1, seq), 2),
        }[kind]
        # Whoever wrote a token can be told from it.
        texts = [f"{engine}.{epoch}.{number}" for number in range(first, first + n)]
        reason = "stop" if kind == "end" else ""
        return Emission(
            rid,
            epoch,
            first,
            first + n - 1,
            make_tokens(first, texts) if n else b"",
            # Small, so that some deaths are without progress.
            (seq + n) // 2,
            reason,
            make_end(reason) if reason else b"",
        )

    def _emit(self, engine: str, owned: list[tuple[str, int]], said: list[tuple[str, int]]) -> None:
        step = [
            self._emission(engine, rid, epoch, *what)
            for (rid, epoch), what in zip(owned, said, strict=False)
        ]
        handed_back = [
            j for pending in self.model.pending for j in pending if j.owner == keys.NOBODY
        ]
        waiting = self.model.all_waiting + len(handed_back)
        number, answers = self.do(self.store.emit(MV, engine, step))
        assert number == waiting
        for e, answer in zip(step, answers, strict=True):
            tokens = messages.decode(e.tokens, messages.Tokens).tokens if e.tokens else []
            texts = [token.text for token in tokens]
            outcome, detail = self.model.emit(
                engine, e.rid, e.epoch, e.first, texts, e.progress, e.reason
            )
            assert answer.outcome == outcome, e
            assert (answer.seq or answer.reason or None) == (detail or None)
            if outcome == "fenced" or outcome == "ended" or e.reason:
                self.held[engine].pop(e.rid, None)

    def _busy(self) -> list[str]:
        return [engine for engine, held in self.held.items() if held]

    @precondition(lambda self: self._busy())
    @rule(pick=picks, said=st.lists(st.tuples(kinds, st.integers(1, 3)), min_size=2, max_size=6))
    def step(self, pick: int, said: list[tuple[str, int]]) -> None:
        """A step of an engine over what it believes it owns."""
        engine = self._busy()[pick % len(self._busy())]
        self._emit(engine, list(self.held[engine].items()), said)

    @precondition(lambda self: self._busy())
    @rule(n=st.integers(0, 2), times=st.integers(1, 3))
    def undisturbed_steps(self, n: int, times: int) -> None:
        """All busy engines go on, with or without tokens."""
        for engine in self._busy() * times:
            self._emit(engine, list(self.held[engine].items()), [("next", n)] * 9)

    @precondition(lambda self: self.told)
    @rule(pick=picks, kind=kinds, n=st.integers(1, 3))
    def zombie_step(self, pick: int, kind: str, n: int) -> None:
        """An engine wakes up and speaks of what it once owned."""
        engine, rid, epoch = self.told[pick % len(self.told)]
        self._emit(engine, [(rid, epoch)], [(kind, n)])

    @precondition(lambda self: self._busy())
    @rule(engine=engines)
    def release(self, engine: str) -> None:
        owned = list(self.held[engine].items())
        answer = self.do(self.store.release(MV, engine, owned))
        assert answer == self.model.release(engine, owned)
        self.held[engine].clear()

    @precondition(lambda self: self.told)
    @rule(pick=picks)
    def zombie_release(self, pick: int) -> None:
        engine, rid, epoch = self.told[pick % len(self.told)]
        answer = self.do(self.store.release(MV, engine, [(rid, epoch)]))
        assert answer == self.model.release(engine, [(rid, epoch)])
        if self.held[engine].get(rid) == epoch:
            del self.held[engine][rid]

    @precondition(lambda self: self.model.leases)
    @rule(engine=engines)
    def crash(self, engine: str) -> None:
        """It says nothing for longer than its lease, and comes back knowing nothing."""
        self.held[engine].clear()
        if engine in self.model.leases:
            self.model.leases[engine] = self.model.now - 10 * LEASE_MS
            lease = {engine: self.model.leases[engine]}
            self.do(self.store.client.zadd(keys.leases(MV), lease))

    @precondition(lambda self: self._busy())
    @rule(
        pick=picks,
        other=engines,
        deaths=st.sampled_from([1, 1, 2, 3, 4]),
        progress=st.sampled_from([False, False, False, True]),
    )
    def crashes_in_a_row(self, pick: int, other: str, deaths: int, progress: bool) -> None:
        """Whoever takes over dies of it too."""
        engine = self._busy()[pick % len(self._busy())]
        for _ in range(deaths):
            if progress:
                self._emit(engine, list(self.held[engine].items()), [("next", 2)] * 9)
            self.crash(engine)
            if engine == other:
                other = "abc"["abc".index(engine) - 1]
            self.take(other, 8, False, False)
            engine, other = other, engine

    @precondition(lambda self: self._busy())
    @rule(pick=picks, ms=delays, other=engines)
    def slow_step(self, pick: int, ms: int, other: str) -> None:
        """Another engine looks while one computes for long."""
        engine = self._busy()[pick % len(self._busy())]
        self._emit(engine, list(self.held[engine].items()), [("next", 1)] * 9)
        self.time_passes(ms, janitor=False)
        self.take(other, 3, False, False)
        self._emit(engine, list(self.held[engine].items()), [("next", 1)] * 9)

    def control_connection(self, engine: str) -> None:
        self._toggle(self.model.subscribed, engine, keys.control_channel(engine))
        if engine in self.model.subscribed:
            self.do(self.store.greet())
            self.model.greet()

    def _toggle(self, there: set[str], name: str, channel: str) -> None:
        there ^= {name}
        self._subscribe(channel, name in there)

    def _subscribe(self, channel: str, on: bool) -> None:
        async def call() -> None:
            kind = "subscribe" if on else "unsubscribe"
            await (self.pubsub.subscribe if on else self.pubsub.unsubscribe)(channel)
            async with asyncio.timeout(5):
                while True:
                    message = await self.pubsub.get_message(timeout=5)
                    if message and (message["type"], message["channel"]) == (
                        kind,
                        channel.encode(),
                    ):
                        return

        self.do(call())

    # -- the world --

    @rule(ms=delays, janitor=st.booleans())
    def time_passes(self, ms: int, janitor: bool) -> None:
        self.do(self.clock.advance(ms))
        self.model.now = self.clock.now_ms
        if janitor:
            assert set(self.do(self.store.expire())) == self.model.expire()

    @precondition(lambda self: len(self.told) % 8 == 5)
    @rule(lost=st.sets(engines))
    def failover(self, lost: set[str]) -> None:
        """Another server takes over; some engines have not come back to it yet."""
        self.model.server += "a"
        self.do(self.clock.set_server(self.model.server, 10**6))
        for engine in sorted(lost & self.model.subscribed):
            self.control_connection(engine)

    @precondition(lambda self: len(self.told) % 8 == 7)
    @rule()
    def scripts_are_flushed(self) -> None:
        self.do(self.store.client.script_flush())

    @invariant()
    def same(self) -> None:
        self.model.assert_same(self.do(assert_consistent(self.store.client)))

    def finish_everything(self) -> None:
        """Whatever happened, at the last deadline all requests end and leave nothing behind."""
        self.time_passes(FOREVER_MS, janitor=True)
        self.same()
        assert all(job.state == "e" for job in self.model.jobs.values())
        self.do(self._assert_empty())

    async def _assert_empty(self) -> None:
        client = self.store.client
        letters = [fields[b"rid"].decode() for _, fields in await client.xrange(keys.DEAD)]
        assert letters == self.model.dead_letters
        for cls in keys.CLASSES:
            count = await client.hgetall(keys.count(MV, cls))
            open_counts = [int(count.get(name, 0)) for name in (b"waiting", b"running", b"bytes")]
            assert open_counts == [0, 0, 0]
            assert await client.xlen(keys.queue(MV, cls)) == 0
        stays = {keys.MODELS, keys.ENDED, keys.DEAD, keys.is_open(MV), keys.model(MODEL)}
        stays |= {keys.SERVER, keys.wake(MV), keys.engines(MV), keys.cards(MV)}
        stays |= {keys.count(MV, cls) for cls in keys.CLASSES}
        stays |= {keys.queue(MV, cls) for cls in keys.CLASSES}
        for name in [key.decode() async for key in client.scan_iter("rts:*", count=1000)]:
            if name.startswith((keys.request(""), keys.log(""))):
                assert 0 < await client.pttl(name) <= 605_000, name
            else:
                assert name in stays


@pytest.mark.timeout(3600 if LONG else 120)
def test_any_sequence_of_calls(server: Server) -> None:
    machine = type("ScriptMachine", (Machine,), {"url": server.url})
    run_state_machine_as_test(machine, settings=PROFILE)
