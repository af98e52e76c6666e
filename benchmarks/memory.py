"""What a stream costs in memory: the gateway's while it is open, Redis's until it is forgotten.

Each figure is a difference, between few and many streams, or short and long ones: what a process
takes anyway is in neither.

`python -m benchmarks.memory` writes benchmarks/results/memory.md.
"""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import redis

from benchmarks.cluster import Cluster
from benchmarks.figures import BenchError
from realtime_serve.redis_server import RedisServer, find_binary

RESULTS = Path(__file__).parent / "results" / "memory.md"
FEW, MANY = 100, 1000
"""Streams at once."""
SHORT, LONG = 20, 120
"""Tokens of a stream."""
STEP_MS = 250
KIB = 1024
WORKERS, MOST_ROWS = 4, 256


@dataclass
class Used:
    """Bytes in use with all streams open, and how many tokens they had by then, all together."""

    gateway: int
    redis: int
    tokens: int


async def hold(url: str, streams: int, tokens: int) -> AsyncExitStack:
    """So many open streams, each read until it has so many tokens; they end with what returns."""
    body = {"model": "echo", "prompt": "a short prompt", "max_tokens": tokens + 500}
    opened = AsyncExitStack()
    connector = aiohttp.TCPConnector(limit=0)
    http = await opened.enter_async_context(aiohttp.ClientSession(connector=connector))
    gate = asyncio.Semaphore(50)

    async def one() -> None:
        async with gate:
            reply = await opened.enter_async_context(http.post(f"{url}/infer_stream", json=body))
        if reply.status != 200:
            raise BenchError(await reply.text())
        seen = 0
        while seen < tokens:
            seen += (await reply.content.readline()).startswith(b"data: ")

    try:
        await asyncio.gather(*(one() for _ in range(streams)))
    except BaseException:
        await opened.aclose()
        raise
    return opened


def measure(server: RedisServer, streams: int, tokens: int) -> Used:
    """A cluster of its own for each: what one has allocated it hardly gives back."""
    client: Any = redis.Redis.from_url(server.url)
    client.flushall()

    async def run(cluster: Cluster) -> Used:
        gone = await hold(cluster.url, 1, 1)
        idle_gateway, idle_redis = cluster.role_memory("gateway"), _used(client)
        await gone.aclose()
        held = await hold(cluster.url, streams, tokens)
        used = Used(
            cluster.role_memory("gateway") - idle_gateway,
            _used(client) - idle_redis,
            _tokens(client),
        )
        await held.aclose()
        return used

    with (
        tempfile.TemporaryDirectory() as folder,
        Cluster(
            Path(folder),
            redis_url=server.url,
            engine="echo",
            echo_step_ms=STEP_MS,
            workers=WORKERS,
            queue_limit=2 * MANY,
            max_batch_size=MOST_ROWS,
        ) as cluster,
    ):
        return asyncio.run(run(cluster))


def _used(client: Any) -> int:
    """By the requests and their logs."""
    names = client.scan_iter("rts:[rl]:*", count=1000)
    return sum(client.memory_usage(name) or 0 for name in names)


def _tokens(client: Any) -> int:
    """More than were read: the worker does not wait for readers."""
    return sum(
        int(client.hget(name, "seq") or 0) for name in client.scan_iter("rts:r:*", count=1000)
    )


def main() -> None:
    """Measures few and many, short and long, and writes the table."""
    binary, _ = find_binary()
    with tempfile.TemporaryDirectory() as folder, RedisServer.start(binary, Path(folder)) as server:
        few, many, long = (
            measure(server, streams, tokens)
            for streams, tokens in ((FEW, SHORT), (MANY, SHORT), (MANY, LONG))
        )
    rows = []
    for name, a, b, c in (
        ("gateway", few.gateway, many.gateway, long.gateway),
        ("Redis", few.redis, many.redis, long.redis),
    ):
        token = (c - b) / (long.tokens - many.tokens)
        stream = (b - a - token * (many.tokens - few.tokens)) / (MANY - FEW)
        rows.append((name, stream / KIB, token))
    text = "\n".join(
        [
            "# What a stream costs in memory",
            "",
            f"Written by `python -m benchmarks.memory`: {binary}, one gateway, the echo engine.",
            f"A stream: {MANY:,} open ones in place of {FEW}; a token: {LONG} of each in place of",
            f"{SHORT}, {STEP_MS} ms apart, so that each is an entry of its log; one letter each.",
            "Resident memory of the gateway, MEMORY USAGE of requests and logs in Redis.",
            "",
            "| | a stream (KiB) | a token (bytes) |",
            "|---|---|---|",
            *(f"| {name} | {stream:.1f} | {token:.0f} |" for name, stream, token in rows),
        ]
    )
    RESULTS.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
