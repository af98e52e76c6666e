"""The demo model through the whole cluster: sensible text, and each stream equal to its own run."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
import redis
from cluster import ROOT, Cluster

from shared import keys
from shared.messages import Tokens, read_entry

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.model,
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.timeout(240),
]

TOPICS = ("the sea", "a robot", "prime numbers", "Paris", "bread", "the moon", "rain", "a friend")
FORMS = (
    "Tell me about {}.",
    "Write one sentence about {}.",
    "Why do people like {}? Give two reasons and an example for each of them.",
    "{}",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path) -> Iterator[Cluster]:
    """float32, so that what is right does not depend on what else is in the batch."""
    with Cluster(
        tmp_path_factory.mktemp("demo"),
        engine="torch",
        model=f"smollm2-135m={demo_model_path}",
        dtype="float32",
        retention_s=120,
        max_batch_size=32,
        # A second thread spins while it waits, and the other processes of the test need a core.
        threads=1,
    ) as found:
        yield found.up()


def test_it_really_chats(cluster: Cluster) -> None:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:
        messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(
            model="smollm2-135m", messages=messages, temperature=0
        )
        assert "Paris" in (answer.choices[0].message.content or "")
        assert answer.choices[0].finish_reason == "stop"
        chunks = client.chat.completions.create(
            model="smollm2-135m", messages=messages, temperature=0, stream=True
        )
        streamed = "".join(c.choices[0].delta.content or "" for c in chunks)
        assert streamed == answer.choices[0].message.content


async def test_the_same_seed_gives_the_same_text(cluster: Cluster) -> None:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:

        async def sample(seed: int) -> str:
            done = await client.completions.create(
                model="smollm2-135m", prompt="Once upon a time", max_tokens=12, seed=seed, top_p=0.9
            )
            return done.choices[0].text

        one, two, other = await asyncio.gather(sample(1), sample(1), sample(2))
    assert one == two
    assert one != other


async def test_sixty_four_streams_equal_their_single_runs(
    cluster: Cluster, demo_model_path: Path, tmp_path: Path
) -> None:
    """All at once, of all lengths and priorities; then every token is looked at alone.

    A greedy run of one prompt alone gives, by induction, the same ids if each of them is the best
    choice after those before it: one forward pass of transformers' own model for each stream shows
    that, and how close the second best choice was.
    """
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def one(i: int) -> dict[str, Any]:
            body = {
                "model": "smollm2-135m",
                "prompt": FORMS[i % 4].format(TOPICS[i // 8]),
                "max_tokens": 4 + i % 23,
                "temperature": 0,
                "priority": ("high", "normal", "low")[i % 3],
                "client_id": f"caller{i % 7}",
            }
            async with session.post(f"{cluster.url}/infer", json=body) as reply:
                assert reply.status == 200, await reply.text()
                return {**await reply.json(), "prompt": body["prompt"]}

        answers = await asyncio.gather(*(one(i) for i in range(64)))
    with redis.Redis.from_url(cluster.redis.url) as client:
        runs = []
        for answer in answers:
            ids: list[int] = []
            for entry_id, fields in client.xrange(keys.log(answer["request_id"])):
                event = read_entry(entry_id, fields[b"d"]).event
                if isinstance(event, Tokens):
                    ids += [token.id for token in event.tokens]
            assert len(ids) == answer["usage"]["completion_tokens"] == len(answer["tokens"])
            assert "".join(answer["tokens"]) == answer["text"]
            runs.append({"prompt": answer["prompt"], "ids": ids, "text": answer["text"]})
    # In a process of its own: this one's threads are asyncio's.
    job = tmp_path / "runs.json"
    job.write_bytes(msgspec.json.encode(runs))
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, ROOT / "tests" / "greedy_oracle.py", demo_model_path, job],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.startswith("64 streams")
