"""A real model's worker is killed in the middle of its answers."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import redis
from cluster import Cluster

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.model,
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.timeout(240),
]

PROMPTS = (
    "Tell me about the sea.",
    "Write one sentence about bread.",
    "What is a prime number?",
    "Why do people like the moon?",
)
TOKENS = 40
KILL_AT = 12


@pytest.fixture
def cluster(tmp_path: Path, demo_model_path: Path) -> Iterator[Cluster]:
    """float32, where a text does not depend on what else is in the batch."""
    with Cluster(
        tmp_path,
        engine="torch",
        model=f"smollm2-135m={demo_model_path}",
        dtype="float32",
        threads=1,
    ) as found:
        yield found.up(workers=2)


async def stream(session: aiohttp.ClientSession, url: str, prompt: str, seen: list[str]) -> None:
    """One chat, greedy; appends each piece of text as it comes."""
    body: Any = {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
    }
    reason = None
    async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                choice = event["choices"][0]
                reason = reason or choice["finish_reason"]
                if choice["delta"].get("content"):
                    seen.append(choice["delta"]["content"])
    assert reason in ("stop", "length")


async def test_the_text_equals_the_unbroken_greedy_answer(cluster: Cluster) -> None:
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        unbroken = []
        for prompt in PROMPTS:
            seen: list[str] = []
            await stream(session, cluster.url, prompt, seen)
            unbroken.append("".join(seen))
        pieces: list[list[str]] = [[] for _ in PROMPTS]
        async with asyncio.TaskGroup() as tasks:
            for prompt, found in zip(PROMPTS, pieces, strict=True):
                tasks.create_task(stream(session, cluster.url, prompt, found))
            while not all(len(found) >= KILL_AT for found in pieces):
                await asyncio.sleep(0.01)
            victim = owner_of_most(cluster)
            next(p for p in cluster.processes if p.pid == victim).kill()
        assert ["".join(found) for found in pieces] == unbroken
        assert moved(cluster), "all was over before another worker had anything to go on with"


def owner_of_most(cluster: Cluster) -> int:
    """The worker that runs most of what runs now; a heartbeat's word would be a second old."""
    pids: Counter[int] = Counter()
    with redis.Redis.from_url(cluster.redis.url) as client:
        for name in client.scan_iter("rts:r:*"):
            state, owner = client.hmget(name, "st", "own")
            if state == b"r":
                pids[int(owner.decode().rsplit("-", 2)[1])] += 1
    assert pids, "all was over before anything was killed"
    return pids.most_common(1)[0][0]


def moved(cluster: Cluster) -> int:
    """How many requests another worker has gone on with."""
    with redis.Redis.from_url(cluster.redis.url) as client:
        return sum(int(client.hget(name, "ep") or 0) > 1 for name in client.scan_iter("rts:r:*"))
