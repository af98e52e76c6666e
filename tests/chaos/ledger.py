"""The accounts after a scenario: clients, logs, counters, budgets and keys must agree."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import redis
import redis.asyncio as aioredis

from chaos.owners import wrong_owner
from chaos.world import KEEP_S
from shared import keys, messages

if TYPE_CHECKING:
    from chaos.load import Stream
    from chaos.world import World

SETTLED_S = 12.0
"""Longest time until all that is left of a scenario has ended by itself: graces and leases here."""
BUDGET_SLACK_US = 240_000
"""A bucket's time may differ by what passes between a charge and the request's own time."""
OPEN_END = {"cancelled", "abandoned"}
"""How a request may end of which no client was told that it was accepted."""
STAYS = {
    *("models", "m", "f", "open", "engines", "cards", "server", "id", "secret", "wake"),
    *("q", "count", "ended", "dead", "arq"),
}
"""Kinds of keys that are not of one request; what they hold is checked, or is capped."""
LIFETIMES_S = {"r": KEEP_S + 5, "l": KEEP_S, "charge": 60, "settled": 3600, "b": 61}
"""Longest time that the other kinds stay after the end."""
_BUCKET_EPOCH_US = 1_700_000_000_000_000


class Ledger:
    """What was found while a scenario ran, and what is checked after it.

    Attributes:
        wrong: what must not be. groups: how many callers there were whose requests were all
            accepted. budgets: how many of these were checked.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._clients: list[Any] = []
        self._client: Any = self._connect()
        self._began: dict[str, int] = {}
        # What was charged for no request so far: since when, and how many tokens.
        self._charges_seen: dict[bytes, tuple[float, int]] = {}
        self.wrong: list[str] = []
        self.checks_budgets = True
        self.hears_cancels = True
        self.loses_data = False
        self.groups = 0
        self.budgets = 0
        # Microseconds of a caller's bucket a token.
        self._step_us = 60e6 / max(1, int(world.settings["tokens_per_minute"]))

    def _connect(self) -> Any:
        client: Any = aioredis.Redis.from_url(self._world.data_url, socket_timeout=5)
        self._clients.append(client)
        return client

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()

    async def check_log(self, stream: Stream) -> None:
        """What a client saw is what the log says, and is what was to be generated."""
        while True:
            client = self._client
            found, entries = await self._read(stream)
            if client is self._client:
                break
        if found[0] is None:
            if stream.complete:
                stream.wrong.append("its request is gone before its time")
            return
        stream.moves = max(0, int(found[1]) - 1)
        self._began[stream.caller] = min(
            self._began.get(stream.caller, 1 << 62), int(found[3]) * 1000 - _BUCKET_EPOCH_US
        )
        read = [messages.read_entry(entry_id, fields[b"d"]) for entry_id, fields in entries]
        tokens = [t for e in read if isinstance(e.event, messages.Tokens) for t in e.event.tokens]
        ends = [e for e in read if isinstance(e.event, messages.End)]
        text = "".join(token.text for token in tokens)
        if not stream.complete:
            # As far as it came, which a client that left may have seen less of.
            if not stream.signed and not stream.expected.startswith(text):
                stream.wrong.append("its log holds another text, as far as it goes")
            if len(ends) > 1:
                stream.wrong.append(f"{len(ends)} ends in its log")
            return
        if text != (stream.text if stream.signed else stream.expected):
            stream.wrong.append("its log holds another text")
        if stream.signed and (what := wrong_owner(stream.seed, text, int(found[1]))):
            stream.wrong.append(what)
        if len(tokens) != stream.tokens or int(found[0]) != stream.tokens:
            stream.wrong.append(f"its log holds {len(tokens)} tokens, seq is {found[0]!r}")
        if len(ends) != 1 or read[-1] is not ends[0]:
            stream.wrong.append(f"{len(ends)} ends in its log")

    async def _read(self, stream: Stream) -> tuple[list[Any], list[Any]]:
        """What there is of a request: some fields, and its log."""
        name = keys.request(stream.rid)
        if self._world.pair is not None and stream.complete:
            # A failover may have taken an end back that a client has seen; it is written again.
            deadline = time.monotonic() + SETTLED_S
            while await self._ask(lambda: self._client.hget(name, "st")) not in (b"e", None):
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.05)
        found = await self._ask(lambda: self._client.hmget(name, "seq", "ep", "reason", "t0"))
        entries = await self._ask(lambda: self._client.xrange(keys.log(stream.rid)))
        return found, entries

    async def check_budget(self, caller: str, streams: list[Stream]) -> None:
        """A caller has paid for what it used, not more and not less.

        Its bucket is a time: that of its first charge and 60 s / limit for each token since. All
        was charged at once when its streams began, so it never was full in between.
        """
        if not self.checks_budgets or any(s.refused_s or not s.rid for s in streams):
            return
        self.groups += 1
        first = self._began.get(caller)
        if first is None:
            return
        key = keys.bucket(f"id:{caller}")
        deadline = time.monotonic() + 8
        while True:
            used = 0
            for stream in streams:
                row = await self._ask(
                    lambda s=stream: self._client.hmget(keys.request(s.rid), "pt", "seq", "st")
                )
                if row[0] is None:
                    return
                used += int(row[0]) + int(row[1])
            tat = await self._ask(lambda: self._client.hget(key, "t"))
            if tat is None:
                full_at = (first + used * self._step_us + _BUCKET_EPOCH_US) / 1e6
                if full_at > time.time() + 1:
                    self.wrong.append(f"{caller} has no bucket, and used {used} tokens")
                return
            paid = (float(tat) - first) / self._step_us
            over = paid - used
            if over > 0 and self._world.killed_gateways:
                # One that died between charging and queueing: its charge stays.
                over = max(0, over - sum(tokens for _, tokens in self._charges_seen.values()))
            if abs(over) * self._step_us <= BUDGET_SLACK_US:
                self.budgets += 1
                return
            if time.monotonic() > deadline:
                self.wrong.append(f"{caller} paid {paid:.1f} tokens and used {used}")
                return
            await asyncio.sleep(0.25)

    async def watch_charges(self) -> None:
        """Notes, for ever, what was charged and then never queued: after a minute it is gone."""
        while True:
            found = await self._ask(self._charges)
            now = time.monotonic()
            for name, tokens in found.items():
                self._charges_seen.setdefault(name, (now, tokens))
            for name, (since, _) in list(self._charges_seen.items()):
                if name not in found and now - since < LIFETIMES_S["charge"] - 5:
                    # It became a request's, or was given back.
                    del self._charges_seen[name]
            await asyncio.sleep(1)

    async def _charges(self) -> dict[bytes, int]:
        names = [name async for name in self._client.scan_iter("rts:charge:*", count=1000)]
        values = await self._client.mget(names) if names else []
        return {name: int(value or 0) for name, value in zip(names, values, strict=True)}

    async def close_accounts(self, streams: list[Stream]) -> None:
        """Once all is over: nothing is left, and every request ended exactly once."""
        deadline = time.monotonic() + SETTLED_S
        while True:
            left = await self._ask(self._left_open)
            if not left:
                break
            if time.monotonic() > deadline:
                self.wrong += left
                break
            await asyncio.sleep(0.1)
        await self._check_ends(streams)
        await self._check_lifetimes()
        self._check_processes()

    async def _left_open(self) -> list[str]:
        """What a cluster without requests must not hold."""
        left = []
        empty = ("q", "lane", "turn", "leases", "owns", "due")
        async for name in self._client.scan_iter("rts:*", count=1000):
            kind = name.decode().split(":")[1]
            if kind == "count":
                counts = await self._client.hgetall(name)
                for what in (b"waiting", b"running", b"bytes"):
                    if int(counts.get(what, 0)):
                        left.append(f"{name.decode()} {what.decode()}={counts[what].decode()}")
            elif kind == "q":
                if length := await self._client.xlen(name):
                    left.append(f"{name.decode()} holds {length}")
                for group in await self._client.xinfo_groups(name):
                    if group["pending"]:
                        left.append(f"{name.decode()} has {group['pending']} pending")
            elif kind in empty:
                left.append(name.decode())
        return left

    async def _check_ends(self, streams: list[Stream]) -> None:
        facts: dict[str, list[dict[bytes, bytes]]] = defaultdict(list)
        for _, fact in await self._ask(lambda: self._client.xrange(keys.ENDED)):
            facts[fact[b"rid"].decode()].append(fact)
        known = {s.rid: s for s in streams if s.rid and not s.closed}
        for rid, stream in known.items():
            ends = facts.pop(rid, [])
            if len(ends) > 1 and self._taken_back(stream, ends[:-1]):
                # The last one is the client's.
                ends = ends[-1:]
            if len(ends) != 1:
                stream.wrong.append(f"ended {len(ends)} times: {[e[b'reason'] for e in ends]}")
                continue
            has_left = stream.reason == "left" and self.hears_cancels
            if has_left and ends[0][b"reason"].decode() not in OPEN_END:
                stream.wrong.append(f"its client left, and it ended as {ends[0][b'reason']!r}")
            if stream.complete:
                if int(ends[0][b"tokens"]) != stream.seen:
                    stream.wrong.append(
                        f"{stream.seen} tokens seen, {ends[0][b'tokens']!r} counted"
                    )
                if ends[0][b"reason"].decode() != stream.reason:
                    stream.wrong.append(f"{stream.reason} seen, {ends[0][b'reason']!r} noted")
        closed = {s.rid for s in streams if s.closed}
        untold = _untold(streams)
        for rid, ends in facts.items():
            if rid in closed:
                continue
            reasons = [end[b"reason"].decode() for end in ends]
            if len(ends) == 1 and reasons[0] in OPEN_END:
                continue
            run = (ends[0][b"caller"].decode(), int(ends[0][b"tokens"]))
            if reasons == ["length"] and untold[run]:
                untold[run] -= 1
                continue
            self.wrong.append(f"{rid}, which no client knows, ended as {reasons}")

    def _taken_back(self, stream: Stream, earlier: list[dict[bytes, bytes]]) -> bool:
        """Whether these ends are of attempts that no client was told of, and that came again."""
        if len(earlier) <= len(stream.refused_s) and self.loses_data:
            # The end that was lost may have been any.
            return True
        # A load balancer comes again by itself after a 503, and tells nobody.
        untold = stream.refused_s or stream.unanswered or self._world.proxy
        by_itself = stream.kind != "plain" and untold
        return bool(by_itself) and all(e[b"reason"].decode() in OPEN_END for e in earlier)

    async def _check_lifetimes(self) -> None:
        """Whatever is of one request goes away by itself."""
        async for name in self._client.scan_iter("rts:*", count=1000):
            kind = name.decode().split(":")[1]
            if kind in STAYS:
                continue
            left_ms = await self._client.pttl(name)
            if left_ms == -1 or left_ms > LIFETIMES_S.get(kind, 0) * 1000:
                self.wrong.append(f"{name.decode()} stays for {left_ms} ms")

    def _check_processes(self) -> None:
        for process in self._world.processes:
            if process.popen.poll() is not None and not process.told_to_end:
                self.wrong.append(f"{process.role}-{process.index} ended by itself")
        for gateway in self._world.of("gateway"):
            status, body = self._world.get("/health", gateway.port)
            # A 503 says that it has no Redis just now, which is another question.
            health = json.loads(body) if isinstance(body, str) else body
            if not status or health["active_streams"]:
                self.wrong.append(f"gateway {gateway.port} says {body}")

    async def _requests_and_logs(self) -> list[bytes]:
        return [name async for name in self._client.scan_iter("rts:[rl]:*", count=1000)]

    async def nothing_left(self) -> None:
        """Waits until every request and log is gone."""
        deadline = time.monotonic() + KEEP_S + 8
        while time.monotonic() < deadline:
            names = await self._ask(self._requests_and_logs)
            if not names:
                return
            await asyncio.sleep(0.2)
        self.wrong += [f"{name.decode()} is still there" for name in names[:5]]

    def follow(self) -> None:
        """After a failover: what the old server says now does not count."""
        self._client = self._connect()

    async def _ask(self, what: Callable[[], Awaitable[Any]]) -> Any:
        """Asks a server that may be away just now, or be replaced."""
        deadline = time.monotonic() + 30
        while True:
            client = self._client
            try:
                answer = await what()
                if client is self._client:
                    return answer
            except (redis.RedisError, OSError, AttributeError):
                # AttributeError: redis-py on a connection that is closed while it connects.
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)


def _untold(streams: list[Stream]) -> Counter[tuple[str, int]]:
    """Runs, as (caller, tokens), that may be queued though no client knows: how many of each.

    The gateway went before it answered, or Redis before it answered the gateway; and the client
    does not come again. Whoever takes such a run back, or ends it unheard, may find it over: it
    is one of half a second.
    """
    return Counter(
        (f"id:{s.caller}", s.tokens)
        for s in streams
        if (s.unanswered or "store_unavailable" in s.broken) and not (s.rid or s.comes_again)
    )
