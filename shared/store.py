"""Redis as this project uses it: one method for each script, typed in and out.

No call is retried by the client library: a hidden retry would hide an outage. Callers decide; the
scripts are idempotent, so that they may.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import msgspec
import redis.asyncio as aioredis
from redis.exceptions import NoScriptError, RedisError

from shared import keys, messages
from shared.connection import make_cancellable
from shared.errors import NotReplicated, StoreUnavailable
from shared.redis_url import is_sentinel, parse_sentinel, parse_tls
from shared.sentinel import SentinelPool

SCRIPTS = (
    "enqueue",
    "take",
    "emit",
    "cancel",
    "expire",
    "release",
    "heartbeat",
    "depart",
    "forget",
    "greet",
    "leave",
    "limit",
    "attach",
    "refund",
    "settle",
)
ENGINE_TTL_MS = 5000
"""An engine without a heartbeat for this long is not counted any more."""
MAX_DEATHS = 3
"""Deaths without progress after which a request is a dead letter."""
DOUBT_MS = 150
"""A lease older than this makes take ask whether the engine's control channel is listened to."""
REPLICA_MS = 500
"""Longest wait for a replica to have what was enqueued."""
REPLICA_WAITS = 8
"""Most such waits at once: without a replica they hold their connections, others need some, too."""
TAKE_BYTES = 4 * 1024 * 1024
"""take stops once it has handed over this many bytes of bodies."""
_pack = msgspec.msgpack.Encoder().encode
_head_of_string = struct.Struct(">BI").pack


@dataclass(frozen=True, slots=True)
class Enqueued:
    """Answer of enqueue.

    Attributes:
        outcome: accepted, attached (the same request is there), conflict (the id is taken by
            another), closed (the version takes no requests), full.
        view: of the request that is there when attached. run: its State.run. waiting: how many wait
            when full. t0: when it was accepted, in ms of Redis' clock.
    """

    outcome: str
    view: messages.View | None = None
    run: bytes = b""
    waiting: int = 0
    t0: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class State:
    """Where a request is.

    Attributes:
        ended: nothing will follow. seq: number of its last token.
        run: another one each time that a request which failed runs anew, named by the attempt that
            queued it; b"": release 0.1 did.
    """

    ended: bool
    seq: int
    run: bytes


@dataclass(frozen=True, slots=True)
class Taken:
    """One request handed to an engine. `epoch` and the engine's id are the fence.

    Attributes:
        deaths: of earlier owners, one after the other without progress; above 0 it is a suspect.
        progress: most rows of the prompt that any of them computed.
    """

    rid: str
    epoch: int
    body: bytes
    seq: int
    cls: int
    waited_ms: int
    deaths: int
    progress: int


@dataclass(frozen=True, slots=True)
class Take:
    """Answer of take: requests, how many still wait, and how many other engines own some."""

    requests: list[Taken]
    waiting: int
    others: int = 0


@dataclass(frozen=True, slots=True)
class Emission:
    """What one step says of one sequence.

    Attributes:
        first: number of the first token. last: of the last; first - 1 when there is none.
        tokens: encoded messages.Tokens or b"". progress: rows computed so far, or WAITS.
        reason: b"" or how it ended, then with `end`, an encoded messages.End.
    """

    rid: str
    epoch: int
    first: int
    last: int
    tokens: bytes
    progress: int
    reason: str = ""
    end: bytes = b""


@dataclass(frozen=True, slots=True)
class Emitted:
    """Answer for one sequence: ok, duplicate, fenced, gap (seq), ended (reason), lost."""

    outcome: str
    seq: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Limited:
    """Answer of limit. `refused` is "" or requests, tokens, size (can never fit the bucket)."""

    refused: str
    requests_left: int
    tokens_left: int
    retry_ms: int
    requests_reset_ms: int
    tokens_reset_ms: int


@dataclass(frozen=True, slots=True)
class Departed:
    """Answer of depart.

    Attributes:
        forgotten: nothing of the engine is left; else it owns requests, which others take over.
        closed: its version takes no requests any more: the model has engines of another one only.
    """

    forgotten: bool
    closed: bool


_ENTRY_TOKENS = 512
"""In one entry of a log that is written again."""
_STATE = ["st", "seq", "run"]
_ENQUEUED = ("accepted", "attached", "conflict", "closed", "full")
_EMITTED = ("ok", "duplicate", "fenced", "gap", "ended", "lost")
_DONE = Emitted("ok")
_LIMITED = ("", "requests", "tokens", "size")


def _enqueued(reply: list[Any]) -> Enqueued:
    outcome = _ENQUEUED[reply[0]]
    if outcome == "attached":
        return Enqueued(outcome, messages.decode(reply[1], messages.View), reply[2])
    if outcome == "accepted":
        return Enqueued(outcome, t0=reply[1])
    return Enqueued(outcome, waiting=reply[1])


def _state(row: list[Any]) -> State | None:
    state, seq, run = row
    return None if state is None else State(state == b"e", int(seq or 0), run or b"")


def _xrange(client: Any, rid: str, after: int, most: int) -> Any:
    return client.xrange(keys.log(rid), f"({after}-0" if after else "-", "+", most)


def _entries(reply: list[Any]) -> list[messages.Entry]:
    return [messages.read_entry(entry_id, fields[b"d"]) for entry_id, fields in reply]


def _raw(data: bytes) -> msgspec.Raw:
    """Bytes in the MessagePack of the servers' Lua, which knows strings of bytes and no others."""
    return msgspec.Raw(_head_of_string(0xDB, len(data)) + data)


class Script:
    """One Lua script, sent by its hash, and whole when the server does not know it.

    Its first line says whether it writes, and stays the first one: common.lua comes after it.
    """

    def __init__(self, client: aioredis.Redis, name: str) -> None:
        folder = resources.files("shared").joinpath("scripts")
        common = folder.joinpath("common.lua").read_text()
        shebang, _, body = folder.joinpath(f"{name}.lua").read_text().partition("\n")
        self._source = f"{shebang}\n{common}\n{body}"
        self._sha = hashlib.sha1(self._source.encode(), usedforsecurity=False).hexdigest()
        self._client = client
        self._execute: Any = client.execute_command

    async def __call__(self, *args: str | bytes | int | float) -> Any:
        """Runs it with ARGV = args.

        Raises:
            StoreUnavailable: Redis did not answer, or refused the write.
        """
        async with unavailable():
            try:
                return await self._execute("EVALSHA", self._sha, 0, *args)
            except NoScriptError:
                # The server was restarted or its scripts were flushed.
                return await self._execute("EVAL", self._source, 0, *args)

    async def replicated(self, *args: str | bytes | int | float) -> Any:
        """Runs it, and waits until a replica has what it wrote, now or by an earlier call.

        Raises:
            StoreUnavailable: as above.
            NotReplicated: no replica has it; the server may.
        """
        async with unavailable():
            answer = await self._and_wait("EVALSHA", self._sha, 0, *args)
            if isinstance(answer, NoScriptError):
                answer = await self._and_wait("EVAL", self._source, 0, *args)
            if isinstance(answer, Exception):
                raise answer
        return answer

    async def _and_wait(self, *command: str | bytes | int | float) -> Any:
        # On one connection: after a failover the next one may be to another server.
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.execute_command(*command)
            # WAIT is about what its own connection wrote, and a repeated call writes nothing.
            pipe.publish(keys.MARK, b"")
            pipe.execute_command("WAIT", 1, REPLICA_MS)
            answer, _, replicas = await pipe.execute(raise_on_error=False)
        if isinstance(replicas, Exception):
            raise replicas
        if replicas < 1:
            raise NotReplicated
        return answer


@asynccontextmanager
async def unavailable() -> AsyncIterator[None]:
    """Turns what redis-py raises into StoreUnavailable."""
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        raise StoreUnavailable(f"{type(error).__name__}: {error}") from error


def connect(url: str, *, timeout_s: float, connections: int = 16) -> aioredis.Redis:
    """A client that answers or fails within `timeout_s`, and never retries by itself."""
    options: dict[str, Any] = {
        "max_connections": connections,
        "timeout": timeout_s,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": None,
        "retry_on_error": [],
        # Redis 7.0 has no name to grant the right to tell them.
        "lib_name": None,
        "lib_version": None,
    }
    if is_sentinel(url):
        return aioredis.Redis(connection_pool=SentinelPool(parse_sentinel(url), **options))
    if tls := parse_tls(url):
        options["tls"] = tls
    pool = aioredis.BlockingConnectionPool.from_url(url, **options)
    make_cancellable(pool)
    return aioredis.Redis(connection_pool=pool)


class Store:
    """The scripts and the plain reads of one shard."""

    def __init__(self, client: aioredis.Redis) -> None:
        self.client = client
        self._run = {name: Script(client, name) for name in SCRIPTS}
        self._replica_waits = asyncio.Semaphore(REPLICA_WAITS)

    async def close(self) -> None:
        """Closes the client's connections."""
        await self.client.aclose(close_connection_pool=True)

    async def identity(self) -> bytes:
        """The name of these data: another one means that they were lost."""
        async with unavailable():
            found = await self.client.get(keys.IDENTITY)
            if found is None:
                mine = secrets.token_hex(16).encode()
                found = await self.client.set(keys.IDENTITY, mine, nx=True, get=True) or mine
        return bytes(found)

    # -- gateways --

    async def limit(
        self,
        caller: str,
        requests_per_minute: int,
        tokens_per_minute: int,
        tokens: int,
        attempt: str = "",
    ) -> Limited:
        """Charges one request and `tokens` to the caller's buckets, or nothing.

        Args:
            caller: whose buckets.
            requests_per_minute: size of one bucket; 0: no limit.
            tokens_per_minute: size of the other; 0: no limit.
            tokens: how many.
            attempt: what `enqueue` or `refund` find the charge by; "" for one that stays.
        """
        reply = await self._run["limit"](
            caller, requests_per_minute, tokens_per_minute, tokens, attempt
        )
        return Limited(_LIMITED[reply[0]], *reply[1:])

    async def refund(self, rid: str, caller: str, attempt: str) -> bool:
        """Takes an attempt to enqueue back: its request ends, or its charge is given back.

        Returns whether there was either. Once or often is the same.
        """
        return bool(await self._run["refund"](rid, caller, attempt))

    async def settle(self, caller: str, fact: str, tokens: int) -> bool:
        """Gives back what was charged and not used, once for each entry of `ended`."""
        return bool(await self._run["settle"](caller, fact, tokens))

    async def attach(
        self, request: messages.Request, *, grace_ms: int, strict: bool = False
    ) -> Enqueued | None:
        """The answer of `enqueue` if it would be attached or conflict, without queueing.

        The request's grace time is at least `grace_ms` from now on.

        Raises:
            NotReplicated: `strict`, and no replica has it.
        """
        args = (request.rid, request.caller, request.digest(), grace_ms)
        reply = await self._call("attach", args, strict=strict)
        return _enqueued(reply) if reply[0] else None

    async def enqueue(
        self,
        request: messages.Request,
        *,
        cls: str,
        timeout_ms: int,
        grace_ms: int,
        keep_ms: int,
        attempt: str,
        queue_limit: int,
        queue_bytes: int,
        resumable: bool,
        strict: bool = False,
        had: Sequence[messages.Token] | None = None,
        t0: int = 0,
    ) -> Enqueued:
        """Puts a request on its queue, or says why not. The same one again is `attached`.

        A repeated call of the same `attempt` is `accepted` as the first one was. With `had` it is
        one that was accepted at `t0` and that Redis has lost since: it goes on after these tokens
        of it; a conflict is then another run of it, which is no earlier one that failed.

        Raises:
            NotReplicated: `strict`, and no replica has it. It may be queued nevertheless.
        """
        args: tuple[str | bytes | int, ...] = (
            request.rid,
            keys.model_version(request.model, request.version),
            cls,
            request.caller,
            request.digest(),
            messages.encode(request),
            timeout_ms,
            grace_ms,
            keep_ms,
            len(request.prompt),
            attempt,
            queue_limit,
            queue_bytes,
            messages.encode(request.view(resumable=resumable)),
        )
        if had is not None:
            args += (len(had), t0)
            for first in range(0, len(had), _ENTRY_TOKENS):
                some = had[first : first + _ENTRY_TOKENS]
                tokens = messages.Tokens(messages.VERSION, first + 1, list(some))
                args += (first + len(some), messages.encode(tokens))
        return _enqueued(await self._call("enqueue", args, strict=strict))

    async def _call(self, name: str, args: tuple[str | bytes | int, ...], *, strict: bool) -> Any:
        if not strict:
            return await self._run[name](*args)
        async with self._replica_waits:
            return await self._run[name].replicated(*args)

    async def cancel(
        self, rid: str, caller: str, reason: str = "cancelled", run: bytes = b""
    ) -> str:
        """Ends a request: unknown (or another caller's), cancelled, or ended (before).

        With `run` that run only: said twice it does not end the next one.
        """
        code = await self._run["cancel"](rid, caller, reason, run)
        return ("unknown", "cancelled", "ended")[code]

    async def heard(self, rid: str) -> None:
        """Somebody listens again: no time of silence goes on from an earlier `leave`."""
        client: Any = self.client
        async with unavailable():
            await client.hdel(keys.request(rid), "unheard")

    async def leave(self, rid: str, caller: str) -> bool:
        """Notes that nobody listens to a kept request any more; False where that is not so.

        To be called once the channel is unsubscribed. Its grace time runs from then on.
        """
        return int(await self._run["leave"](rid, caller)) == 1

    async def expire(self, most: int = 256) -> list[str]:
        """Ends requests whose deadline has passed; returns their ids."""
        return [rid.decode() for rid in await self._run["expire"](most)]

    async def read_log(self, rid: str, after: int, most: int = 512) -> list[messages.Entry]:
        """Log entries with tokens numbered above `after`, and the end, in order; at most `most`.

        The first entry may begin at or before `after`: the caller cuts it.
        """
        async with unavailable():
            return _entries(await _xrange(self.client, rid, after, most))

    async def state(self, rid: str) -> State | None:
        """Where the request is; None: Redis does not know it, any more."""
        return (await self.states([rid]))[0]

    async def states(self, rids: Iterable[str]) -> list[State | None]:
        """As `state`, of many in one round trip."""
        async with unavailable(), self.client.pipeline(transaction=False) as pipe:
            for rid in rids:
                pipe.hmget(keys.request(rid), _STATE)
            return [_state(row) for row in await pipe.execute()]

    async def read_stream(
        self, rid: str, after: int, most: int
    ) -> tuple[State | None, list[messages.Entry]]:
        """`state` and `read_log`, of the same run. What has ended has its end in the log."""
        start = after
        while True:
            async with unavailable(), self.client.pipeline(transaction=False) as pipe:
                pipe.hmget(keys.request(rid), _STATE)
                _xrange(pipe, rid, start, most)
                pipe.hget(keys.request(rid), "run")
                row, entries, run = await pipe.execute()
            state = _state(row)
            if row[2] != run:
                # Run anew in between: what was read may be of either.
                continue
            if state is not None and state.ended and state.seq < start:
                # Tokens were lost: its end comes before what was read of it.
                start = state.seq
                continue
            return state, _entries(entries)

    # -- workers --

    async def take(
        self,
        mv: str,
        engine: str,
        room: int,
        *,
        lease_ms: int,
        aging_ms: int,
        calm: bool = True,
        known: Sequence[str] | None = None,
    ) -> Take:
        """Hands over up to `room` requests; with `known`, also those of a lost reply.

        A suspect comes alone, and only to an engine that is `calm`: each of its requests, if it
        has any, has made progress there.
        """
        reply = await self._run["take"](
            mv,
            engine,
            room,
            lease_ms,
            aging_ms,
            TAKE_BYTES,
            ENGINE_TTL_MS,
            MAX_DEATHS,
            DOUBT_MS,
            int(calm),
            -1 if known is None else len(known),
            *(known or ()),
        )
        taken = [Taken(item[0].decode(), *item[1:]) for item in reply[0]]
        return Take(taken, reply[1], reply[2])

    async def wait_for_work(self, mv: str, timeout_s: float) -> None:
        """Returns when a request was enqueued that nobody was woken for, or after the time."""
        pop: Any = self.client.blpop
        async with unavailable():
            await pop([keys.wake(mv)], timeout=timeout_s)

    async def emit(
        self, mv: str, engine: str, step: Sequence[Emission]
    ) -> tuple[int, list[Emitted]]:
        """Appends a step to the logs and publishes it; (how many could be taken, answers)."""
        flat: list[str | msgspec.Raw] = []
        for e in step:
            flat += (e.rid, str(e.epoch), str(e.first - 1), str(e.last))
            flat += (_raw(e.tokens), str(e.progress), e.reason, _raw(e.end))
        reply = await self._run["emit"](mv, engine, _pack(flat))
        answers = [_DONE] * len(step)
        for at, code, detail in zip(reply[1::3], reply[2::3], reply[3::3], strict=True):
            outcome = _EMITTED[code]
            if outcome == "gap":
                answers[at] = Emitted(outcome, seq=detail)
            elif outcome == "ended":
                answers[at] = Emitted(outcome, reason=detail.decode())
            else:
                answers[at] = Emitted(outcome)
        return reply[0], answers

    async def release(self, mv: str, engine: str, owned: Iterable[tuple[str, int]]) -> int:
        """Hands (rid, epoch) back to be taken by others at once; returns how many were ours."""
        args = [value for pair in owned for value in pair]
        return int(await self._run["release"](mv, engine, *args))

    async def heartbeat(
        self, model: str, version: str, engine: str, card: messages.EngineCard
    ) -> str:
        """Announces a live engine; returns the model's live version."""
        reply = await self._run["heartbeat"](
            model, version, engine, messages.encode(card), ENGINE_TTL_MS
        )
        return str(reply.decode())

    async def greet(self) -> None:
        """Notes which server this is; for an engine whose control channel is subscribed."""
        await self._run["greet"]()

    async def depart(self, mv: str, engine: str) -> Departed:
        """Signs an engine off; its version is closed where the model has engines of others only."""
        forgotten, closed = await self._run["depart"](mv, engine, ENGINE_TTL_MS)
        return Departed(bool(forgotten), bool(closed))

    async def forget(self, mv: str, engine: str) -> bool:
        """Removes what is left of an engine that is not heard; False while it owns requests."""
        return bool(await self._run["forget"](mv, engine, ENGINE_TTL_MS))

    async def publish_model(self, card: messages.ModelCard) -> None:
        """Makes tokenizer and template of a version readable for the gateways."""
        mv = keys.model_version(card.model, card.version)
        async with unavailable():
            await self.client.set(keys.files(mv), messages.encode(card))
