"""What the scripts promise, in plain Python, and what a server really holds, to compare the two."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio as aioredis

from shared import keys, messages
from shared.store import DOUBT_MS, MAX_DEATHS, Store

MODEL, VERSION = "m", "1"
MV = keys.model_version(MODEL, VERSION)

# -- a stopped clock ----------------------------------------------------------------------------

_CLOCK_LUA = """
local server = redis
local redis = setmetatable({}, {__index = server})
redis.call = function(name, ...)
  if name == 'TIME' then
    local us = tonumber(server.call('HGET', 'test:clock', 'us'))
    return {string.format('%.0f', math.floor(us / 1e6)), string.format('%.0f', us % 1e6)}
  elseif name == 'INFO' then
    local v = server.call('HMGET', 'test:clock', 'run', 'uptime')
    return 'run_id:' .. v[1] .. '\\r\\nuptime_in_seconds:' .. v[2] .. '\\r\\n'
  end
  return server.call(name, ...)
end
"""


class Clock:
    """The scripts' time: it stands still until a test moves it; otherwise they are as shipped.

    The server itself goes on with its own clock: ids of queue entries, and when a key expires.
    """

    def __init__(self, client: aioredis.Redis, now_us: int) -> None:
        self._client = client
        self.now_us = now_us

    @classmethod
    async def stop(cls, store: Store) -> Clock:
        """Stops the clock of every script of a store at the server's present time."""
        for script in store._run.values():
            shebang, _, rest = script._source.partition("\n")
            script._source = f"{shebang}{_CLOCK_LUA}{rest}"
            script._sha = hashlib.sha1(script._source.encode()).hexdigest()
        seconds, _ = await store.client.time()
        clock = cls(store.client, seconds * 1_000_000)
        await clock.advance(0)
        await clock.set_server("a", 10**6)
        return clock

    @property
    def now_ms(self) -> int:
        return self.now_us // 1000

    async def advance(self, ms: float) -> None:
        self.now_us += round(ms * 1000)
        await self._client.hset("test:clock", "us", str(self.now_us))

    async def set_server(self, run: str, uptime_s: int) -> None:
        """Which server it seems to be, and for how long it seems to be up."""
        await self._client.hset("test:clock", mapping={"run": run, "uptime": uptime_s})


# -- requests and tokens ------------------------------------------------------------------------


def make_request(rid: str, caller: str = "alice", prompt: int = 3) -> messages.Request:
    """A request of `prompt` tokens."""
    return messages.Request(
        v=messages.VERSION,
        rid=rid,
        model=MODEL,
        version=VERSION,
        caller=caller,
        prompt=list(range(prompt)),
        sampling=messages.Sampling(max_tokens=8),
    )


def make_tokens(first: int, texts: list[str]) -> bytes:
    """An encoded messages.Tokens, one token a text."""
    tokens = [messages.Token(0, first + i, text) for i, text in enumerate(texts)]
    return messages.encode(messages.Tokens(messages.VERSION, first, tokens))


def make_end(reason: str) -> bytes:
    """An encoded messages.End as an engine writes it."""
    return messages.encode(messages.End(messages.VERSION, reason, timings={"queue": 1.5}))


# -- what is really there -----------------------------------------------------------------------


@dataclass
class Queue:
    """One class of one model version as it is stored."""

    count: dict[str, int]
    turn: dict[str, str]
    entries: list[tuple[bytes, str]]
    pending: list[tuple[bytes, str, str]]
    lanes: dict[str, list[str]]

    @property
    def undelivered(self) -> list[str]:
        owned = {entry_id for entry_id, _, _ in self.pending}
        return [rid for entry_id, rid in self.entries if entry_id not in owned]


@dataclass
class State:
    """Everything of this project that a server holds, read in one piece."""

    queues: dict[str, Queue] = field(default_factory=dict)
    requests: dict[str, dict[str, str]] = field(default_factory=dict)
    logs: dict[str, list[messages.Entry]] = field(default_factory=dict)
    owns: dict[str, int] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)
    engines: dict[str, int] = field(default_factory=dict)
    due: dict[str, int] = field(default_factory=dict)
    facts: list[dict[str, str]] = field(default_factory=list)
    wake: int = 0


def _text(values: dict[bytes, bytes]) -> dict[str, str]:
    # A body is msgpack, not text; only its length matters here.
    return {k.decode(): v.decode("latin-1") for k, v in values.items()}


def _scores(pairs: list[tuple[bytes, float]]) -> dict[str, int]:
    return {name.decode(): int(score) for name, score in pairs}


async def read_state(client: aioredis.Redis, mv: str = MV) -> State:
    """Reads one model version in two round trips."""
    names = sorted([name.decode() async for name in client.scan_iter("rts:*", count=5000)])
    lanes = [name for name in names if name.startswith("rts:lane:")]
    hashes = [name for name in names if name.startswith("rts:r:")]
    logs = [name for name in names if name.startswith("rts:l:")]
    streams = [name for name in names if name.startswith("rts:q:")]
    groups = {name for name in streams if await client.xinfo_groups(name)}
    async with client.pipeline(transaction=True) as pipe:
        for cls in keys.CLASSES:
            name = keys.queue(mv, cls)
            pipe.hgetall(keys.count(mv, cls)).hgetall(keys.turn(mv, cls)).xrange(name)
            if name in groups:
                pipe.xpending_range(name, keys.GROUP, "-", "+", 100_000)
            else:
                pipe.echo("no group")
        pipe.hgetall(keys.owns(mv)).zrange(keys.leases(mv), 0, -1, withscores=True)
        pipe.zrange(keys.engines(mv), 0, -1, withscores=True)
        pipe.zrange(keys.DUE, 0, -1, withscores=True).xrange(keys.ENDED).llen(keys.wake(mv))
        for name in lanes:
            pipe.lrange(name, 0, -1)
        for name in hashes:
            pipe.hgetall(name)
        for name in logs:
            pipe.xrange(name)
        replies = iter(await pipe.execute())
    state = State()
    for cls in keys.CLASSES:
        count, turn, entries, pending = (next(replies) for _ in range(4))
        owner = {} if pending == b"no group" else {p["message_id"]: p["consumer"] for p in pending}
        rids = {entry_id: fields[b"rid"].decode() for entry_id, fields in entries}
        state.queues[cls] = Queue(
            {k: int(v) for k, v in _text(count).items()},
            _text(turn),
            list(rids.items()),
            [(eid, rids.get(eid, "gone"), who.decode()) for eid, who in owner.items()],
            {},
        )
    state.owns = {k: int(v) for k, v in _text(next(replies)).items()}
    state.leases = _scores(next(replies))
    state.engines = _scores(next(replies))
    state.due = _scores(next(replies))
    state.facts = [_text(fields) for _, fields in next(replies)]
    state.wake = next(replies)
    for name in lanes:
        _, _, cls, caller = name.rsplit(":", 3)
        state.queues[cls].lanes[caller] = [rid.decode() for rid in next(replies)]
    for name in hashes:
        state.requests[name.removeprefix("rts:r:")] = _text(next(replies))
    for name in logs:
        entries = [messages.read_entry(eid, fields[b"d"]) for eid, fields in next(replies)]
        state.logs[name.removeprefix("rts:l:")] = entries
    return state


async def assert_consistent(client: aioredis.Redis, mv: str = MV) -> State:
    """Checks that counters, lanes, pending lists, leases and logs tell one story."""
    state = await read_state(client, mv)
    open_requests = {rid: r for rid, r in state.requests.items() if r.get("st") != "e"}
    for cls, queue in state.queues.items():
        mine = {rid: r for rid, r in open_requests.items() if r["cls"] == cls}
        waiting = {rid for rid, r in mine.items() if r["st"] == "w"}
        running = {rid for rid, r in mine.items() if r["st"] == "r"}
        laned = [rid for lane in queue.lanes.values() for rid in lane]
        assert sorted(queue.undelivered + laned) == sorted(waiting), cls
        assert sorted(rid for _, rid, _ in queue.pending) == sorted(running), cls
        for entry_id, rid, engine in queue.pending:
            assert mine[rid]["own"].partition(":")[2] == engine
            assert mine[rid]["eid"] == entry_id.decode()
        assert queue.turn == {mine[rid]["caller"]: rid for rid in queue.undelivered}
        assert set(queue.lanes) <= set(queue.turn)
        assert queue.count.get("waiting", 0) == len(waiting)
        assert queue.count.get("running", 0) == len(running)
        assert queue.count.get("bytes", 0) == sum(int(mine[rid]["size"]) for rid in waiting)
        left = queue.count.get("ticket", 0) - queue.count.get("head", 0)
        assert left == len(waiting)
    owned = Counter(engine for queue in state.queues.values() for _, _, engine in queue.pending)
    assert state.owns == dict(owned)
    assert set(state.leases) == set(owned)
    assert state.due == {rid: int(r["dl"]) for rid, r in open_requests.items()}
    assert state.wake <= 256
    # A request that failed may run again under its id, later.
    ended = Counter((fact["rid"], fact["t0"]) for fact in state.facts)
    assert all(times == 1 for times in ended.values()), ended
    for rid, r in state.requests.items():
        entries = state.logs.get(rid, [])
        ends = [i for i, entry in enumerate(entries) if isinstance(entry.event, messages.End)]
        assert ended[rid, r["t0"]] == (r["st"] == "e")
        if r["st"] == "e" and entries:
            assert ends == [len(entries) - 1]
            assert entries[-1].event.reason == r["reason"]
        else:
            assert ends == []
        if entries or r["seq"] == "0":
            tokens = [entry for entry in entries if isinstance(entry.event, messages.Tokens)]
            numbers = [t.event.first + i for t in tokens for i in range(len(t.event.tokens))]
            assert numbers == list(range(1, int(r["seq"]) + 1))
            assert all(t.seq == t.event.first + len(t.event.tokens) - 1 for t in tokens)
            assert all(entry.seq == int(r["seq"]) for entry in entries[-1:])
    return state


# -- the model ----------------------------------------------------------------------------------


@dataclass
class Job:
    """One request as the model sees it.

    Attributes:
        attempt: the call that queued it; "" once a client has attached to it. run: the same, for
            good.
        best: most rows of its prompt that any owner computed.
    """

    rid: str
    caller: str
    cls: int
    digest: str
    size: int
    t0: int
    deadline: int
    grace: int
    prompt: int
    attempt: str
    state: str = "w"
    entry: int = 0
    owner: str = ""
    epoch: int = 0
    progress: int = 0
    best: int = 0
    mark: int = 0
    deaths: int = 0
    unheard: int | None = None
    quiet: int = 0
    reason: str = ""
    tokens: list[str] = field(default_factory=list)
    run: str = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.attempt

    @property
    def done(self) -> int:
        return self.best + len(self.tokens)


@dataclass
class Model:
    """The queue of one model version. Its methods are the scripts, at a time that the test sets."""

    now: int
    lease: int
    aging: int
    limit: int
    jobs: dict[str, Job] = field(default_factory=dict)
    past: list[Job] = field(default_factory=list)
    heads: list[list[Job]] = field(default_factory=lambda: [[], [], []])
    lanes: list[dict[str, list[Job]]] = field(default_factory=lambda: [{}, {}, {}])
    pending: list[list[Job]] = field(default_factory=lambda: [[], [], []])
    engines: dict[str, int] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)
    server: str = "a"
    noted: str = ""
    since: float = 0
    subscribed: set[str] = field(default_factory=set)
    listened: set[str] = field(default_factory=set)
    dead_letters: list[str] = field(default_factory=list)
    entries: int = 0

    def waiting(self, cls: int) -> list[Job]:
        laned = [job for lane in self.lanes[cls].values() for job in lane]
        return self.heads[cls] + laned

    @property
    def all_waiting(self) -> int:
        return sum(len(self.waiting(cls)) for cls in range(3))

    def owned(self, engine: str) -> list[Job]:
        return [job for cls in range(3) for job in self.pending[cls] if job.owner == engine]

    def _append(self, job: Job) -> None:
        self.entries += 1
        job.entry = self.entries
        self.heads[job.cls].append(job)

    def _promote(self, cls: int, caller: str) -> None:
        lane = self.lanes[cls].get(caller)
        if lane:
            self._append(lane.pop(0))
            if not lane:
                del self.lanes[cls][caller]

    def _disown(self, engine: str) -> None:
        if not self.owned(engine):
            self.leases.pop(engine, None)

    def _finish(self, job: Job, reason: str) -> None:
        before, job.state, job.reason = job.state, "e", reason
        if before == "r":
            self.pending[job.cls].remove(job)
            self._disown(job.owner)
        elif job in self.heads[job.cls]:
            self.heads[job.cls].remove(job)
            self._promote(job.cls, job.caller)
        else:
            lane = self.lanes[job.cls][job.caller]
            lane.remove(job)
            if not lane:
                del self.lanes[job.cls][job.caller]

    def enqueue(self, job: Job, *, accepted_at: int | None = None) -> str:
        if job.rid in self.jobs:
            old = self.jobs[job.rid]
            if old.run == job.attempt:
                return "accepted"
            failed = old.state == "e" and old.reason not in ("stop", "length")
            if accepted_at is not None:
                if not failed or old.t0 >= accepted_at:
                    return "conflict"
            elif (old.caller, old.digest) != (job.caller, job.digest):
                return "conflict"
            elif not failed:
                old.attempt = ""
                old.grace = max(old.grace, job.grace)
                return "attached"
        waits = any(other.caller == job.caller for other in self.heads[job.cls])
        room = self.limit * (1 if waits else 2)
        if accepted_at is None and len(self.waiting(job.cls)) >= room:
            return "full"
        if job.rid in self.jobs:
            old = self.jobs.pop(job.rid)
            self.past.append(old)
            job.epoch = old.epoch
        self.jobs[job.rid] = job
        if waits:
            self.lanes[job.cls].setdefault(job.caller, []).append(job)
        else:
            self._append(job)
        return "accepted"

    def heartbeat(self, engine: str, ttl: int) -> None:
        self.engines[engine] = self.now
        gone = [e for e, at in self.engines.items() if at < self.now - ttl]
        for e in gone:
            del self.engines[e]

    def _own(self, job: Job, engine: str) -> tuple[str, int]:
        job.epoch += 1
        job.owner, job.state, job.mark = engine, "r", job.done
        if job not in self.pending[job.cls]:
            self.pending[job.cls].append(job)
            self.pending[job.cls].sort(key=lambda j: j.entry)
        self.leases[engine] = self.now
        return job.rid, job.epoch

    def greet(self) -> None:
        if self.noted != self.server:
            # The first server has been up for ever.
            self.since = self.now if self.noted else -math.inf
            self.noted = self.server

    def _dead_engines(self, engine: str) -> list[str]:
        stalest = sorted(self.leases, key=lambda e: (self.leases[e], e))
        ages = {other: self.now - self.leases[other] for other in stalest}
        dead = [keys.NOBODY] if keys.NOBODY in ages else []
        silent = [e for e in stalest if e not in (keys.NOBODY, engine) and ages[e] > DOUBT_MS]
        if not silent or ages.get(engine, 0) > self.lease:
            return dead
        self.greet()
        if self.now - self.since < 2 * self.lease:
            return dead
        return dead + [e for e in silent if ages[e] > self.lease or e not in self.subscribed]

    def _level(self, job: Job) -> int:
        return max(0, job.cls - (self.now - job.t0) // self.aging)

    def take(
        self, engine: str, room: int, ttl: int, calm: bool, known: set[str] | None = None
    ) -> list[tuple[str, int]]:
        out: list[tuple[str, int]] = []
        if known is not None:
            for cls in range(3):
                for job in [j for j in self.pending[cls] if j.owner == engine]:
                    if job.rid not in known:
                        out.append(self._own(job, engine))
                        room = 0 if job.deaths else room - 1
        orphans: list[list[Job]] = [[], [], []]
        dead = self._dead_engines(engine) if room > 0 else []
        each = math.ceil(room / max(1, len(dead))) + 32
        for other in dead:
            for cls in range(3):
                orphans[cls] += [j for j in self.pending[cls] if j.owner == other][:each]
        for cls in range(3):
            orphans[cls].sort(key=lambda j: j.entry)
        live = sum(1 for at in self.engines.values() if at >= self.now - ttl)
        share = min(room, math.ceil(self.all_waiting / max(1, live)))
        while room > 0:
            candidates = [
                (self._level(queue[0]), not orphan, queue[0].t0, cls, orphan)
                for orphan, queues in ((True, orphans), (False, self.heads))
                for cls, queue in enumerate(queues)
                if queue and (orphan or share > 0)
            ]
            if not candidates:
                break
            *_, cls, orphan = min(candidates)
            if orphan:
                job = orphans[cls][0]
                outcome = self._take_orphan(job, alone=calm and not out)
                orphans[cls].pop(0)
                if outcome == "suspect":
                    share = 0
                if outcome == "taken":
                    out.append(self._own(job, engine))
                    room = 0 if job.deaths else room - 1
            else:
                job = self.heads[cls][0]
                if job.deadline <= self.now:
                    self._finish(job, "queue_timeout")
                elif self._unheard_too_long(job):
                    self._finish(job, "abandoned")
                else:
                    self.heads[cls].pop(0)
                    out.append(self._own(job, engine))
                    self._promote(cls, job.caller)
                    room -= 1
                    share -= 1
        return out

    def _take_orphan(self, job: Job, alone: bool) -> str:
        if job.deadline <= self.now:
            self._finish(job, "timeout")
            return "ended"
        old = job.owner
        deaths = job.deaths + (old != keys.NOBODY) if job.done == job.mark else 0
        if deaths >= MAX_DEATHS:
            self.dead_letters.append(job.rid)
            self._finish(job, "engine_failed")
            return "ended"
        if deaths and not alone:
            return "suspect"
        job.deaths, job.owner = deaths, ""
        self._disown(old)
        return "taken"

    def _unheard_too_long(self, job: Job) -> bool:
        if job.rid in self.listened:
            job.unheard = None
        elif job.unheard is None:
            job.unheard, job.quiet = self.now, len(job.tokens)
        return self._outlasts(job)

    def _outlasts(self, job: Job) -> bool:
        """Whether nobody has listened to this server for longer than the grace time."""
        if job.unheard is None or self.now - job.unheard <= job.grace:
            return False
        self.greet()
        if self.since > job.unheard:
            job.unheard = self.now
            return False
        return True

    def leave(self, rid: str, caller: str) -> bool:
        job = self.jobs[rid]
        if job.state == "e" or job.caller != caller or rid in self.listened:
            return False
        job.unheard, job.quiet = self.now, len(job.tokens)
        return True

    def emit(
        self,
        engine: str,
        rid: str,
        epoch: int,
        first: int,
        texts: list[str],
        progress: int,
        reason: str = "",
    ) -> tuple[str, Any]:
        if engine in self.leases:
            self.leases[engine] = self.now
        job = self.jobs[rid]
        seq, last = len(job.tokens), first + len(texts) - 1
        if job.state == "e":
            own = (job.owner, job.epoch) == (engine, epoch)
            if own and reason and last <= seq and job.reason == reason:
                return "duplicate", None
            return "ended", job.reason
        if (job.owner, job.epoch) != (engine, epoch):
            return "fenced", None
        if last > seq and first != seq + 1:
            return "gap", seq
        fresh, ended = last >= first and last > seq, ""
        if fresh and not job.tokens:
            job.progress, job.best = progress, job.prompt
        elif not fresh:
            job.progress, job.best = progress, max(job.best, min(progress, job.prompt))
        if fresh:
            job.tokens += texts
            if rid not in self.listened:
                if job.unheard is None or job.quiet != seq:
                    job.unheard = self.now
                elif self._outlasts(job):
                    ended = "abandoned"
                job.quiet = last
        if reason:
            self._finish(job, reason)
            return "ok", None
        ended = "timeout" if job.deadline <= self.now else ended
        if ended:
            self._finish(job, ended)
            return "ended", ended
        return ("ok" if fresh or not texts else "duplicate"), None

    def cancel(self, rid: str, caller: str) -> str:
        job = self.jobs.get(rid)
        if job is None or job.caller != caller:
            return "unknown"
        if job.state == "e":
            return "ended"
        self._finish(job, "cancelled")
        return "cancelled"

    def refund(self, rid: str, attempt: str) -> bool:
        job = self.jobs[rid]
        if job.attempt != attempt:
            return False
        if job.state != "e":
            self._finish(job, "cancelled")
        return True

    def expire(self) -> set[str]:
        late = [j for j in self.jobs.values() if j.state != "e" and j.deadline <= self.now]
        for job in sorted(late, key=lambda j: (j.deadline, j.rid)):
            self._finish(job, "queue_timeout" if job.state == "w" else "timeout")
        return {job.rid for job in late}

    def release(self, engine: str, owned: list[tuple[str, int]]) -> int:
        n = 0
        for rid, epoch in owned:
            job = self.jobs[rid]
            if job.state == "r" and (job.owner, job.epoch) == (engine, epoch):
                job.owner, job.epoch = keys.NOBODY, epoch + 1
                self._disown(engine)
                self.leases[keys.NOBODY] = 0
                n += 1
        return n

    def depart(self, engine: str) -> bool:
        self.engines.pop(engine, None)
        return not self.owned(engine)

    def assert_same(self, state: State) -> None:
        """Compares everything that the server holds with this model."""
        for cls, name in enumerate(keys.CLASSES):
            queue = state.queues[name]
            assert queue.undelivered == [job.rid for job in self.heads[cls]]
            lanes = {c: [job.rid for job in lane] for c, lane in self.lanes[cls].items()}
            assert queue.lanes == lanes
            owned = [(job.rid, job.owner) for job in self.pending[cls]]
            assert [(rid, engine) for _, rid, engine in queue.pending] == owned
        assert state.leases == self.leases
        assert state.engines == self.engines
        assert set(state.requests) == set(self.jobs)
        for rid, job in self.jobs.items():
            real = state.requests[rid]
            assert real["st"] == job.state
            assert real["att"] == job.attempt
            assert real["run"] == job.run
            assert int(real["grace"]) == job.grace
            assert real["own"] == (f"{job.epoch}:{job.owner}" if job.owner else "0:")
            assert int(real["ep"]) == job.epoch
            assert [int(real[name]) for name in ("pr", "hw")] == [job.progress, job.best]
            assert int(real["mark"]) == job.mark
            assert int(real["deaths"]) == job.deaths
            assert int(real["seq"]) == len(job.tokens)
            assert real.get("unheard") == (None if job.unheard is None else str(job.unheard))
            assert int(real.get("quiet", 0)) == job.quiet
            tokens = [
                token.text
                for entry in state.logs.get(rid, [])
                if isinstance(entry.event, messages.Tokens)
                for token in entry.event.tokens
            ]
            assert tokens == job.tokens
        ended = [(fact["rid"], fact["reason"], int(fact["tokens"])) for fact in state.facts]
        jobs = [*self.past, *self.jobs.values()]
        expected = [(j.rid, j.reason, len(j.tokens)) for j in jobs if j.state == "e"]
        assert sorted(ended) == sorted(expected)
