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
from realtime_serve.redis_server import RedisServer, find_binary

RESULTS = Path(__file__).parent / "results" / "memory.md"
FEW, MANY = 100, 1000
"""Streams at once."""
SHORT, LONG = 20, 320
"""Tokens of a stream."""
STEP_MS = 60
KIB = 1024


@dataclass
class Used:
    """Bytes in use: the gateway's with all streams open and read to so many tokens, Redis's."""

    gateway: float
    redis: float


async def hold(url: str, streams: int, tokens: int) -> AsyncExitStack:
    """So many open streams, each read until it has so many tokens; they end with what returns."""
    body = {"model": "echo", "prompt": "a short prompt", "max_tokens": tokens + 500}
    async with AsyncExitStack() as opening:
        connector = aiohttp.TCPConnector(limit=0)
        http = await opening.enter_async_context(aiohttp.ClientSession(connector=connector))

        async def one() -> None:
            reply = await opening.enter_async_context(http.post(f"{url}/infer_stream", json=body))
            reply.raise_for_status()
            seen = 0
            while seen < tokens:
                seen += (await reply.content.readline()).startswith(b"data: ")

        await asyncio.gather(*(one() for _ in range(streams)))
        return opening.pop_all()
    raise AssertionError


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
            cluster.role_memory("gateway") - idle_gateway, float(_used(client) - idle_redis)
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
            max_batch_size=MANY + 10,
        ) as cluster,
    ):
        return asyncio.run(run(cluster))


def _used(client: Any) -> int:
    return int(client.info("memory")["used_memory"])


def main() -> None:
    """Measures few and many, short and long, and writes the table."""
    binary, _ = find_binary()
    with tempfile.TemporaryDirectory() as folder, RedisServer.start(binary, Path(folder)) as server:
        few, many, long = (
            measure(server, streams, tokens)
            for streams, tokens in ((FEW, SHORT), (MANY, SHORT), (MANY, LONG))
        )
    more_streams, more_tokens = MANY - FEW, MANY * (LONG - SHORT)
    rows = [
        (name, (b - a) / more_streams / KIB, (c - b) / more_tokens)
        for name, a, b, c in (
            ("gateway", few.gateway, many.gateway, long.gateway),
            ("Redis", few.redis, many.redis, long.redis),
        )
    ]
    text = "\n".join(
        [
            "# What a stream costs in memory",
            "",
            f"Written by `python -m benchmarks.memory`: {binary}, one gateway, the echo engine.",
            f"A stream: from {FEW} to {MANY:,} open ones of {SHORT} tokens each; a token: from",
            f"{SHORT} to {LONG} tokens of {MANY:,} streams. Resident memory of the gateway,",
            "used_memory of Redis.",
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
