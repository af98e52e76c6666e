"""Seeded clients that know what they must be told, token by token."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from gateway_site import letters

from chaos.ledger import Ledger
from chaos.owners import SIGNED
from chaos.world import World

GROUP = 20
"""Streams of one caller, started together."""
PATIENCE_S = 40.0
"""A client that comes again gives up after so long without anything new."""
SURVIVING = ("keyed", "key", "chat", "stop", "infer", "flaky")
"""Kinds of streams that must survive everything."""
FROM_THE_START = ("infer", "key")
"""Kinds that ask anew with their key where they are cut off, and are told all once more."""
ALL = (*SURVIVING, "plain", "plain", "vanish", "cancel")
"""The same, with clients that ask for nothing special, leave, and cancel."""


@dataclass
class Stream:
    """One request of one client, and what came of it.

    Attributes:
        kind: keyed (infer_stream, resumable), key (with an Idempotency-Key alone: it asks again
            and is told all from the start), chat, stop (ends at a stop string), infer (in one
            piece), flaky (hangs up in the middle and resumes), double (a second reader),
            slow (reads slower than it comes), plain (nothing special), refusable (plain, and may
            be refused), vanish (leaves for good in the middle), cancel (DELETE in the middle).
        expected: its whole text. tokens: how many make it.
        signed: its tokens say who wrote them instead, see `owners`.
        arrivals: time.monotonic() of each token when it first came.
        had: what came before the last time that it was told all from the start.
        wrong: what may never be. broken: it was told that it failed.
        refused_s: how long each refusal took. unanswered: POSTs that broke without an answer.
    """

    name: str
    caller: str
    kind: str
    seed: int
    max_tokens: int
    prompt: str
    expected: str
    tokens: int
    stop: str = ""
    pause_at: int = 0
    priority: str = "normal"
    rid: str = ""
    run: str = ""
    text: str = ""
    seen: int = 0
    had: str = ""
    arrivals: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    broken: str = ""
    refused_s: list[float] = field(default_factory=list)
    unanswered: int = 0
    resumes: int = 0
    moves: int = 0
    reason: str = ""
    started: float = 0.0
    closed: bool = False
    signed: bool = False

    @property
    def ended(self) -> bool:
        return bool(self.reason or self.broken or self.wrong)

    @property
    def comes_again(self) -> bool:
        return self.kind not in ("plain", "vanish", "cancel", "slow", "refusable")

    @property
    def complete(self) -> bool:
        return self.reason in ("stop", "length")

    def stall(self, mark: float, until: float, *, clip: bool, first: bool) -> float | None:
        """The longest wait for a token that goes on at `mark` or begins between it and `until`.

        None for a stream that was not under way then. `clip` counts from the mark on only; `first`
        takes in who waited for a first token then, from the mark on.
        """
        times = self.arrivals
        if first and times and self.started < mark < times[0]:
            return times[0] - mark
        if not times or times[0] > mark or times[-1] <= mark:
            return None
        gaps = [
            b - (max(a, mark) if clip else a)
            for a, b in itertools.pairwise(times)
            if b > mark and a < until
        ]
        return max(gaps, default=None)


class Again(Exception):
    """The connection or the gateway failed: a client of a surviving stream comes again."""


class Load:
    """Clients in a closed loop: groups of streams, one after the other in each lane.

    Args:
        world: where they go. rng: one draw decides all about them. ledger: what they check against.
        kinds: of streams, in equal parts. tokens: shortest and longest stream.
        breaks: a stream may be told that it failed. name: of callers and streams.
        limit_s: longest time for one stream. narrow: what is not read yet stays with the gateway.
    """

    def __init__(
        self,
        world: World,
        rng: random.Random,
        ledger: Ledger,
        *,
        kinds: tuple[str, ...] = SURVIVING,
        tokens: tuple[int, int] = (40, 110),
        breaks: bool = False,
        name: str = "caller",
        limit_s: float = 60.0,
        narrow: bool = False,
    ) -> None:
        self.world = world
        self._name = name
        self._limit_s = limit_s
        self._narrow = narrow
        self._signed = str(world.settings["engine"]) == SIGNED
        self._seed = rng.getrandbits(62)
        # Of its own, drawn from in the order of time; who decides about faults is left alone.
        self._chance = random.Random(self._seed)
        self.ledger = ledger
        self.kinds = kinds
        self.tokens = tokens
        self.breaks = breaks
        self.streams: list[Stream] = []
        self._groups = 0
        self._numbers = itertools.count()
        self._stopping = False
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def running(self, lanes: int = 2, least: int = 0) -> AsyncIterator[None]:
        """Keeps lanes * GROUP streams under way while the body runs, and `least` in all."""
        async with self.connected(), asyncio.TaskGroup() as tasks:
            self._stopping = False
            for _ in range(lanes):
                tasks.create_task(self._lane(least))
            try:
                yield
            finally:
                self._stopping = True

    async def play(self, streams: list[Stream]) -> None:
        """These streams, all at once, to their ends."""
        async with self.connected(), asyncio.TaskGroup() as tasks:
            for stream in streams:
                tasks.create_task(self.one(stream))

    async def under_way(self, count: int = GROUP) -> None:
        """Until so many streams are in the middle of their tokens."""
        async with asyncio.timeout(60):
            while sum(not s.ended and s.seen > 5 for s in self.streams) < count:
                await asyncio.sleep(0.005)

    def make(self, caller: str, kind: str, **fields: Any) -> Stream:
        """A stream by chance."""
        number = next(self._numbers)
        # Its own: what one stream is does not hang on how fast others were.
        rng = random.Random(f"{self._seed} {self._name} {number}")
        seed = rng.getrandbits(62)
        most = rng.randint(*self.tokens)
        expected = letters(seed, most)
        stop, tokens = "", most
        if kind == "stop":
            at = rng.randint(most // 2, most - 5)
            stop = expected[at : at + 5]
            end = expected.find(stop)
            expected, tokens = expected[:end], end + len(stop)
        stream = Stream(
            name=f"{self._name}-{number}",
            caller=caller,
            kind=kind,
            seed=seed,
            max_tokens=most,
            prompt=fields.pop("prompt", "x" * rng.randint(1, 12)),
            expected=expected,
            tokens=tokens,
            stop=stop,
            pause_at=rng.randint(3, most // 2),
            priority=rng.choice(("high", "normal", "low")),
            signed=self._signed,
            **fields,
        )
        self.streams.append(stream)
        return stream

    async def one(self, stream: Stream) -> None:
        """Plays a stream to its end and checks it against the log."""
        stream.started = time.monotonic()
        try:
            async with asyncio.timeout(self._limit_s):
                await (self._surviving(stream) if stream.comes_again else self._once(stream))
        except Exception as error:
            stream.wrong.append(f"client: {error!r}")
        is_right = stream.signed or stream.text == stream.expected
        if stream.complete and not (is_right and stream.seen == stream.tokens):
            stream.wrong.append(f"{stream.seen} of {stream.tokens} tokens, {stream.text!r}")
        if stream.rid:
            await self.ledger.check_log(stream)
        if not stream.complete and not stream.wrong and stream.reason != "left":
            stream.broken = stream.broken or "no end"
            if not self._may_break(stream):
                stream.wrong.append(f"broken: {stream.broken}")

    def _may_break(self, stream: Stream) -> bool:
        """Whether it is right that this stream has no answer, and that it was told so."""
        if stream.refused_s and (stream.kind == "refusable" or self.breaks):
            return True
        if stream.kind == "cancel" and '"cancelled"' in stream.broken:
            # Its DELETE was heard, and the reply to that was lost.
            return True
        # Silence says nothing: that is what is left of a connection whose gateway went.
        told = stream.broken.startswith("{") or self.world.was_cut(stream.started, stream.rid)
        return self.breaks and told

    # -- lanes --

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=1, sock_read=3)
        connector = aiohttp.TCPConnector(
            limit=0, force_close=True, socket_factory=_narrow_socket if self._narrow else None
        )
        bufsize = 256 if self._narrow else 1 << 16
        async with aiohttp.ClientSession(
            timeout=timeout, connector=connector, read_bufsize=bufsize
        ) as self._session:
            yield

    async def _lane(self, least: int) -> None:
        # Not all lanes at the same pace: some streams begin while others are in the middle.
        await asyncio.sleep(self._chance.random() * 0.5)
        while not self._stopping or len(self.streams) < least:
            self._groups += 1
            caller = f"{self._name}{self._groups}"
            order = random.Random(f"{self._seed} {caller}").sample(range(GROUP), GROUP)
            streams = [self.make(caller, self.kinds[i % len(self.kinds)]) for i in order]
            async with asyncio.TaskGroup() as tasks:
                for stream in streams:
                    tasks.create_task(self.one(stream))
            await self.ledger.check_budget(caller, streams)

    # -- one client --

    def _url(self) -> str:
        return self._chance.choice(self.world.urls())

    def _headers(self, stream: Stream) -> dict[str, str]:
        headers = {"X-Client-Id": stream.caller}
        if stream.comes_again:
            headers["Idempotency-Key"] = stream.name
            if stream.kind not in FROM_THE_START:
                headers["X-Resumable"] = "30"
        return headers

    def _post(self, stream: Stream) -> tuple[str, dict[str, Any]]:
        common: dict[str, Any] = {
            "model": "echo",
            "seed": stream.seed,
            "max_tokens": stream.max_tokens,
            "priority": stream.priority,
            "temperature": 0,
        }
        if stream.stop:
            common["stop"] = [stream.stop]
        if stream.kind == "chat":
            del common["priority"]
            return "/v1/chat/completions", {
                **common,
                "messages": [{"role": "user", "content": stream.prompt}],
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        path = "/infer" if stream.kind == "infer" else "/infer_stream"
        return path, {**common, "prompt": stream.prompt, "client_id": stream.caller}

    async def _once(self, stream: Stream) -> None:
        """A client that does not come again."""
        try:
            await self._ask(stream, self._url())
        except Again as failure:
            stream.broken = str(failure)

    async def _surviving(self, stream: Stream) -> None:
        """A client that comes again until it has it all."""
        last, progress_at, pause = -1, time.monotonic(), 0.0
        while not stream.ended:
            try:
                if stream.rid and stream.kind not in FROM_THE_START:
                    stream.resumes += 1
                    await self._resume(stream, self._url())
                else:
                    if stream.seen:
                        stream.resumes += 1
                        stream.had = max(stream.had, stream.text, key=len)
                        stream.text, stream.seen = "", 0
                    await self._ask(stream, self._url())
            except Again as failure:
                now = time.monotonic()
                if stream.seen > last:
                    last, progress_at, pause = stream.seen, now, 0.0
                if now - progress_at > PATIENCE_S:
                    stream.broken = f"gave up: {failure}"
                    return
                await asyncio.sleep(pause)
                pause = min(0.25, pause + 0.02 + self._chance.random() * 0.02)

    async def _ask(self, stream: Stream, url: str) -> None:
        path, body = self._post(stream)
        await self._read(stream, "POST", f"{url}{path}", json=body)

    async def _resume(self, stream: Stream, url: str) -> None:
        await self._read(
            stream,
            "GET",
            f"{url}/requests/{stream.rid}/stream",
            headers={"Last-Event-ID": str(stream.seen), "X-Stream-Run": stream.run},
        )

    async def _read(self, stream: Stream, method: str, url: str, **fields: Any) -> None:
        assert self._session is not None
        asked = time.monotonic()
        fields["headers"] = self._headers(stream) | fields.get("headers", {})
        if method == "GET":
            fields["headers"].pop("Idempotency-Key", None)
            fields["headers"].pop("X-Resumable", None)
        try:
            async with self._session.request(method, url, **fields) as reply:
                if reply.status != 200:
                    self._refused(stream, reply, await reply.text(), time.monotonic() - asked)
                stream.rid = stream.rid or reply.headers["X-Stream-Id"]
                stream.run = reply.headers.get("X-Stream-Run") or stream.run
                if stream.kind == "infer":
                    self._whole(stream, await reply.json())
                    return
                if stream.kind == "double" and method == "POST":
                    second = asyncio.create_task(self._read_again(stream))
                    try:
                        await self._events(stream, reply)
                    finally:
                        await second
                else:
                    await self._events(stream, reply)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            stream.unanswered += not stream.rid
            raise Again(repr(error)) from error
        if not stream.ended:
            raise Again("the stream stopped without its end")

    async def _read_again(self, stream: Stream) -> None:
        """A second reader, from the start: the same tokens."""
        second = dataclasses.replace(
            stream, text="", seen=0, arrivals=[], wrong=[], broken="", reason="", pause_at=0
        )
        await self._surviving(second)
        stream.wrong += [f"second reader: {what}" for what in second.wrong]
        if second.text != stream.expected:
            stream.wrong.append(f"second reader: {second.broken or second.text!r}")

    def _refused(
        self, stream: Stream, reply: aiohttp.ClientResponse, text: str, took_s: float
    ) -> None:
        if reply.status in (502, 503, 504):
            stream.refused_s.append(took_s)
            if reply.status == 503 and "Retry-After" not in reply.headers and not self.world.proxy:
                stream.wrong.append("503 without Retry-After")
            raise Again(f"{reply.status} {text[:200]}")
        if reply.status == 429:
            raise Again(f"429 {text[:200]}")
        stream.wrong.append(f"status {reply.status}: {text[:200]}")
        raise Again("wrong")

    def _whole(self, stream: Stream, body: dict[str, Any]) -> None:
        stream.text = body["text"]
        stream.seen = body["usage"]["completion_tokens"]
        stream.reason = body["finish_reason"]

    async def _events(self, stream: Stream, reply: aiohttp.ClientResponse) -> None:
        buffer, done = b"", False
        while chunk := await self._chunk(stream, reply):
            buffer += chunk
            *blocks, buffer = buffer.split(b"\n\n")
            for block in blocks:
                if done:
                    stream.wrong.append(f"after [DONE]: {block[:80]!r}")
                done = self._event(stream, block)
            if stream.broken or stream.wrong:
                return
            if await self._misbehave(stream):
                return
        if stream.reason and not done:
            stream.wrong.append("no [DONE]")

    async def _chunk(self, stream: Stream, reply: aiohttp.ClientResponse) -> bytes:
        if stream.kind != "slow":
            return await reply.content.readany()
        # Some seventy tokens a second, and buffers that hold little more than that.
        await asyncio.sleep(0.02)
        return await reply.content.read(200)

    def _event(self, stream: Stream, block: bytes) -> bool:
        """Takes an event in; True for the last one."""
        number, data = -1, b""
        for line in block.split(b"\n"):
            if line.startswith(b"id: "):
                number = int(line[4:])
            elif line.startswith(b"data: "):
                data = line[6:]
        if not data:
            if not block.startswith(b":"):
                stream.wrong.append(f"an event without data: {block[:80]!r}")
            return False
        if data == b"[DONE]":
            return True
        body = json.loads(data)
        if "error" in body:
            stream.broken = json.dumps(body["error"])
            return False
        token, reason = _content(stream.kind, body)
        if token is not None:
            self._token(stream, number, token)
        usage = body.get("usage")
        if usage and usage["completion_tokens"] != number:
            stream.wrong.append(f"usage {usage} at {number}")
        if reason:
            stream.reason = reason
            if number != stream.seen and stream.kind != "stop":
                stream.wrong.append(f"ended at {number}, {stream.seen} tokens came")
            # A stop string's last tokens have no text: OpenAI's chunks leave them out.
            stream.seen = number
        return False

    def _token(self, stream: Stream, number: int, text: str) -> None:
        if stream.complete:
            stream.wrong.append(f"token {number} after the end")
        if number != stream.seen + 1 and not (stream.kind == "stop" and number > stream.seen):
            stream.wrong.append(f"token {number} after {stream.seen}")
        stream.seen = number
        stream.text += text
        if len(stream.text) > len(stream.had):
            stream.arrivals.append(time.monotonic())
        if stream.signed:
            right = stream.had.startswith(stream.text[: len(stream.had)])
        else:
            right = stream.expected.startswith(stream.text)
        if not right:
            stream.wrong.append(f"token {number} is {text!r}")

    async def _misbehave(self, stream: Stream) -> bool:
        """What some clients do in the middle; True when they hang up."""
        if stream.seen < stream.pause_at or not stream.pause_at or stream.reason:
            return False
        kind = stream.kind
        if kind == "flaky" or kind == "vanish":
            stream.pause_at = 0
            if kind == "vanish":
                stream.reason = "left"
            return True
        if kind == "cancel":
            stream.pause_at = 0
            await self._cancel(stream)
            return stream.reason == "left"
        return False

    async def _cancel(self, stream: Stream) -> None:
        assert self._session is not None
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self._session.delete(
                f"{self._url()}/requests/{stream.rid}", headers={"X-Client-Id": stream.caller}
            ) as reply:
                if reply.status == 200 and (await reply.json())["status"] == "cancelled":
                    stream.reason = "left"


def _narrow_socket(info: Any) -> socket.socket:
    family, kind, proto, _, _ = info
    narrow = socket.socket(family, kind, proto)
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return narrow


def _content(kind: str, body: dict[str, Any]) -> tuple[str | None, str]:
    """(text of a token or None, finish reason or "")."""
    if kind == "chat":
        if not body["choices"]:
            return None, ""
        choice = body["choices"][0]
        if choice["finish_reason"]:
            return None, choice["finish_reason"]
        delta = choice["delta"]
        return (None, "") if "role" in delta else (delta["content"], "")
    if "finish_reason" in body:
        return None, body["finish_reason"]
    return body["token"], ""


def tally(streams: list[Stream]) -> Counter[str]:
    """How the streams ended."""
    counts: Counter[str] = Counter()
    for s in streams:
        if s.wrong:
            counts["wrong"] += 1
        elif s.broken:
            counts["broken"] += 1
        else:
            counts["complete" if s.complete else "left"] += 1
    return counts
