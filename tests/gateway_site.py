"""A gateway in this process, on a real Redis, with a worker that gives the echo engine's text."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from gateway.app import Server, create_app
from gateway.edge import EDGE, Edge
from shared import keys, messages, tasks
from shared.errors import StoreUnavailable
from shared.settings import Settings
from shared.store import Emission, Store, connect
from worker.engine.echo import echo_token
from worker.engine.echo_tokenizer import byte_files, byte_id

CONTEXT = 4096
LETTERS = {byte_id(code): chr(code) for code in (*range(ord("a"), ord("z") + 1), ord(" "))}


def letters(seed: int, count: int) -> str:
    """What the worker generates for a seed."""
    return "".join(LETTERS[echo_token(seed, 0, i)] for i in range(count))


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    """Waits until something holds that this process can see."""
    async with asyncio.timeout(timeout_s):
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.005)


def model_card(
    name: str = "echo",
    context: int = CONTEXT,
    template: str | None = None,
    sampling: dict[str, float] | None = None,
) -> Any:
    files = byte_files("echo", context)
    return messages.ModelCard(
        messages.VERSION,
        name,
        files.version,
        files.tokenizer_json,
        (files.chat_template or "") if template is None else template,
        files.context_length,
        files.vocab_size,
        files.bos_token,
        files.eos_token,
        list(files.eos_ids),
        1_700_000_000,
        sampling or {},
    )


@dataclass
class _Running:
    epoch: int
    request: messages.Request
    seq: int
    taken_at: float = field(default_factory=time.monotonic)


class FakeWorker:
    """Takes and emits as a worker does, one letter a step.

    Attributes:
        step_s: time of a step. room: most requests at once; 0: it takes nothing.
        frozen: it lives, holds what it has and gives nothing of it. preempts: it says
            that it has no room for what it has begun. burst: letters a step.
        beating: it sends heartbeats, which open its version.
        finish: how a request ends that has all its letters.
        end: (reason, code, message) to end requests with instead of letters.
        seen: every request it took.
    """

    def __init__(self, store: Store, card: messages.ModelCard, engine: str = "fake-0") -> None:
        self.store = store
        self.card = card
        self.mv = keys.model_version(card.model, card.version)
        self.engine = engine
        self.step_s = 0.001
        self.room = 64
        self.burst = 1
        self.frozen = self.preempts = False
        self.beating = True
        self.finish = "length"
        self.end: tuple[str, str, str] | None = None
        self.running: dict[str, _Running] = {}
        self.seen: list[messages.Request] = []

    async def announce(self) -> None:
        await self.store.publish_model(self.card)
        await self._heartbeat()

    async def run(self) -> None:
        beat_at = 0.0
        while True:
            with contextlib.suppress(StoreUnavailable):
                if self.beating and time.monotonic() - beat_at > 1:
                    await self._heartbeat()
                    beat_at = time.monotonic()
                await self.step()
            await asyncio.sleep(self.step_s)

    async def step(self) -> None:
        if self.room > len(self.running):
            await self._take()
        if not self.running:
            return
        given = {} if self.frozen else self.running
        step = [self._emission(rid, state) for rid, state in given.items()]
        _, answers = await self.store.emit(self.mv, self.engine, step)
        for emission, answer in zip(step, answers, strict=True):
            if answer.outcome == "gap":
                # Its letters come from their numbers.
                self.running[emission.rid].seq = answer.seq
            elif answer.outcome in ("ended", "lost", "fenced") or emission.reason:
                del self.running[emission.rid]
            else:
                self.running[emission.rid].seq = emission.last

    async def _take(self) -> None:
        room = self.room - len(self.running)
        take = await self.store.take(self.mv, self.engine, room, lease_ms=60_000, aging_ms=60_000)
        for taken in take.requests:
            request = messages.decode(taken.body, messages.Request)
            self.seen.append(request)
            self.running[taken.rid] = _Running(taken.epoch, request, taken.seq)

    def _emission(self, rid: str, state: _Running) -> Emission:
        sampling = state.request.sampling
        first = state.seq + 1
        if self.preempts:
            return Emission(rid, state.epoch, first, state.seq, b"", messages.WAITS)
        if self.end is not None:
            reason, code, message = self.end
            return self._last(rid, state, first, b"", first - 1, reason, code, message)
        count = min(self.burst, sampling.max_tokens - state.seq)
        ids = [echo_token(sampling.seed, 0, state.seq + i) for i in range(count)]
        tokens = messages.encode(
            messages.Tokens(
                messages.VERSION, first, [messages.Token(0, i, LETTERS[i]) for i in ids]
            )
        )
        last = state.seq + count
        if last >= sampling.max_tokens:
            return self._last(rid, state, first, tokens, last, self.finish, "", "")
        return Emission(rid, state.epoch, first, last, tokens, last)

    def _last(
        self,
        rid: str,
        state: _Running,
        first: int,
        tokens: bytes,
        last: int,
        reason: str,
        code: str,
        message: str,
    ) -> Emission:
        decode = (time.monotonic() - state.taken_at) * 1000
        timings = {"queue": 1.5, "prefill": 2.5, "decode": decode}
        end = messages.encode(messages.End(messages.VERSION, reason, code, message, timings))
        return Emission(rid, state.epoch, first, last, tokens, last, reason, end)

    async def _heartbeat(self) -> None:
        card = messages.EngineCard(
            messages.VERSION,
            self.engine,
            "fake",
            "none",
            "none",
            "here",
            1,
            64,
            len(self.running),
            0,
            0.25,
            False,
            time.time(),
            prefix_queries=80,
            prefix_hits=64,
            preemptions=3,
            fenced=2,
        )
        await self.store.heartbeat(self.card.model, self.card.version, self.engine, card)


@dataclass
class Event:
    """One server-sent event."""

    id: int | None
    data: Any


def read_events(text: str) -> list[Event]:
    """The events of a stream; [DONE] is an event whose data is that text."""
    found = []
    for block in text.split("\n\n"):
        number, data = None, None
        for line in block.split("\n"):
            name, _, value = line.partition(": ")
            if name == "id":
                number = int(value)
            elif name == "data":
                data = value if value == "[DONE]" else json.loads(value)
        if data is not None:
            found.append(Event(number, data))
    return found


class Site:
    """A gateway, a worker, and a client for them."""

    def __init__(self, server: Server, edge: Edge, worker: FakeWorker, http: Any) -> None:
        self.server = server
        self.edge = edge
        self.worker = worker
        self.http = http
        self.store = worker.store
        self.base = f"http://127.0.0.1:{server.port}"

    def url(self, path: str) -> str:
        return self.base + path

    async def post(
        self, path: str, body: Any, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, Any]:
        """Status, JSON or events, headers."""
        return await self.send("POST", path, body, headers)

    async def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
        return await self.send("GET", path, None, headers)

    async def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, Any]:
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        data = None if raw is None else io.BytesIO(raw)
        sent = {"Content-Type": "application/json"} if data is not None else {}
        async with self.http.request(
            method, self.url(path), data=data, headers={**sent, **(headers or {})}
        ) as reply:
            text = await reply.text()
            if reply.content_type == "text/event-stream":
                return reply.status, read_events(text), reply.headers
            is_json = reply.content_type == "application/json"
            return reply.status, json.loads(text) if is_json and text else text, reply.headers

    async def counts(self, cls: str = "normal") -> tuple[int, int]:
        """Waiting and running in a queue."""
        client: Any = self.store.client
        row = await client.hmget(keys.count(self.worker.mv, cls), ["waiting", "running"])
        return int(row[0] or 0), int(row[1] or 0)


@asynccontextmanager
async def open_site(
    url: str, *, card: messages.ModelCard | None = None, **changed: Any
) -> AsyncIterator[Site]:
    """A site on the Redis at `url`, ready to serve."""
    settings = Settings(redis_url=url, **changed)
    store = Store(connect(url, timeout_s=2.0))
    worker = FakeWorker(store, card or model_card())
    await worker.announce()
    app = create_app(settings)
    server = Server(app)
    await server.start("127.0.0.1", 0)
    running = asyncio.create_task(worker.run())
    edge = app[EDGE]
    connector = aiohttp.TCPConnector(limit=0)
    try:
        async with aiohttp.ClientSession(connector=connector) as http:
            await until(lambda: edge.healthy and edge.models.served())
            yield Site(server, edge, worker, http)
    finally:
        await server.stop()
        await tasks.end(running)
        await store.close()


def raw_request(body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = (
        "POST /infer_stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def deaf_client(port: int, body: Any) -> socket.socket:
    """Asks for a stream, and reads nothing of it; as little as can be waits in its kernel."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await loop.sock_connect(sock, ("127.0.0.1", port))
    await loop.sock_sendall(sock, raw_request(body))
    return sock
