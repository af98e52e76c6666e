"""The whole cluster with real processes and the echo engine."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from cluster import ROOT, Cluster
from gateway_site import letters

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), keep_alive_s=0.2) as found:
        yield found.up(gateways=2, workers=2)


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{cluster.url}/v1", api_key="none", max_retries=0
    ) as found:
        yield found


async def infer(url: str, **fields: Any) -> dict[str, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/infer", json={"model": "echo", "prompt": "hi", **fields}) as reply,
    ):
        assert reply.status == 200, await reply.text()
        body: dict[str, Any] = await reply.json()
        return body


async def test_openai_chat_in_one_piece_and_as_a_stream(client: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    whole = await client.chat.completions.create(
        model="echo", messages=messages, max_tokens=20, seed=11
    )
    assert whole.choices[0].message.content == letters(11, 20)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    stream = await client.chat.completions.create(
        model="echo",
        messages=messages,
        max_tokens=20,
        seed=11,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == letters(11, 20)
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_openai_completions_and_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["echo"]
    assert (await client.models.retrieve("echo")).id == "echo"
    done = await client.completions.create(model="echo", prompt="x", max_tokens=7, seed=3)
    assert done.choices[0].text == letters(3, 7)
    stream = await client.completions.create(
        model="echo", prompt="x", max_tokens=7, seed=3, stream=True
    )
    assert "".join([c.choices[0].text async for c in stream]) == letters(3, 7)


async def test_openai_errors_are_its_own_classes(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model="echo", prompt="x", temperature=3)
    assert bad.value.param == "temperature"


async def test_sixty_four_streams_each_get_their_own_tokens(cluster: Cluster) -> None:
    async def one(i: int) -> None:
        url = f"http://127.0.0.1:{cluster.ports[i % 2]}"
        fields = {"seed": i, "max_tokens": 5 + 3 * i, "priority": ("high", "normal", "low")[i % 3]}
        body = await infer(url, **fields, client_id=f"caller{i % 5}")
        assert body["text"] == letters(i, 5 + 3 * i)
        assert body["usage"]["completion_tokens"] == 5 + 3 * i

    async with asyncio.TaskGroup() as group:
        for i in range(64):
            group.create_task(one(i))
    await idle(cluster)
    status, body = cluster.get("/status")
    assert status == 200
    assert {engine["running"] for engine in body["workers"]} == {0}


async def idle(cluster: Cluster) -> None:
    """Until nothing waits or runs."""
    async with asyncio.timeout(10):
        while True:
            _, body = await asyncio.to_thread(cluster.get, "/status")
            queues = body["queues"]["echo"].values()
            if all(q["waiting"] == q["running"] == 0 for q in queues) and all(
                engine["running"] == 0 for engine in body["workers"]
            ):
                return
            await asyncio.sleep(0.05)


async def test_a_stream_resumes_on_the_other_gateway(cluster: Cluster) -> None:
    body = {"model": "echo", "prompt": "hi", "max_tokens": 120, "seed": 5}
    async with aiohttp.ClientSession() as session:
        first: list[tuple[int, str]] = []
        async with session.post(
            f"{cluster.url}/infer_stream", json=body, headers={"X-Resumable": "20"}
        ) as reply:
            rid = reply.headers["X-Request-Id"]
            async for event in events(reply):
                first.append(event)
                if len(first) == 30:
                    break
        second: list[tuple[int, str]] = []
        async with session.get(
            f"http://127.0.0.1:{cluster.ports[1]}/requests/{rid}/stream",
            headers={"Last-Event-ID": str(first[-1][0])},
        ) as reply:
            assert reply.status == 200, await reply.text()
            async for event in events(reply):
                second.append(event)
    numbers = [n for n, _ in first + second]
    assert numbers == list(range(1, 121))
    assert "".join(text for _, text in first + second) == letters(5, 120)


async def events(reply: aiohttp.ClientResponse) -> AsyncIterator[tuple[int, str]]:
    """(id, token) of each token event of /infer_stream."""
    number = 0
    async for line in reply.content:
        if line.startswith(b"id: "):
            number = int(line[4:])
        elif line.startswith(b"data: {"):
            event = json.loads(line[6:])
            assert "error" not in event, event
            if "token" in event:
                yield number, event["token"]


async def test_the_example_client(cluster: Cluster) -> None:
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "examples/stream.py", "hello"],
        cwd=ROOT,
        env={**os.environ, "RTS_URL": cluster.url},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip("\n")) == 256


def test_an_engine_of_your_own(tmp_path: Path) -> None:
    source = ROOT / "examples" / "custom_engine.py"
    assert len(source.read_text().splitlines()) < 60
    with Cluster(tmp_path, engine="examples.custom_engine:Backwards") as found:
        found.up(control=False)
        body = asyncio.run(infer(found.url, model="backwards", prompt="stressed"))
        assert body["text"] == "desserts"
        assert body["finish_reason"] == "stop"
        body = asyncio.run(infer(found.url, model="backwards", prompt="stressed", max_tokens=3))
        assert (body["text"], body["finish_reason"]) == ("des", "length")


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Cluster]:
    """One worker that runs one request at a time."""
    with Cluster(
        tmp_path, max_batch_size=1, echo_step_ms=10, aging_s=2, keep_alive_s=0.1, drain_grace_s=10
    ) as found:
        yield found.up(workers=1)


async def finished_in_order(url: str, jobs: list[dict[str, Any]]) -> list[str]:
    """Sends the jobs one after the other while a long one runs; their names as they finish."""
    order: list[str] = []

    async def one(name: str, fields: dict[str, Any]) -> None:
        await infer(url, **fields)
        order.append(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(one("first", {"max_tokens": 40, "client_id": "warm"}))
        await asyncio.sleep(0.1)
        for job in jobs:
            group.create_task(one(job.pop("name"), job))
            await asyncio.sleep(0.004)
    return order[1:]


async def test_high_is_served_before_normal_before_low(narrow: Cluster) -> None:
    jobs: list[dict[str, Any]] = [
        {"name": cls, "priority": cls, "max_tokens": 2, "client_id": f"{cls}{i}"}
        for i in range(4)
        for cls in ("low", "normal", "high")
    ]
    order = await finished_in_order(narrow.url, jobs)
    assert order == ["high"] * 4 + ["normal"] * 4 + ["low"] * 4


async def test_low_is_not_starved_by_a_steady_stream_of_high(narrow: Cluster) -> None:
    stop = asyncio.Event()
    served = Counter[str]()

    async def flood(i: int) -> None:
        while not stop.is_set():
            await infer(narrow.url, priority="high", max_tokens=10, client_id=f"flood{i}")
            served["high"] += 1

    async with asyncio.TaskGroup() as group:
        for i in range(6):
            group.create_task(flood(i))
        await asyncio.sleep(0.3)
        began = time.monotonic()
        await infer(narrow.url, priority="low", max_tokens=1, client_id="patient")
        waited = time.monotonic() - began
        stop.set()
    # Two periods of aging make it equal to high; then its age counts.
    assert 2.0 < waited < 8.0
    assert served["high"] > 10


async def test_a_caller_with_many_waiting_does_not_delay_another(narrow: Cluster) -> None:
    """At the default limit: the greedy thousand fill the queue, the modest one is served next."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        greedy_done = 0

        async def greedy(max_tokens: int = 2) -> int:
            nonlocal greedy_done
            body = {"model": "echo", "prompt": "x", "max_tokens": max_tokens}
            body["client_id"] = "greedy"
            async with session.post(f"{narrow.url}/infer", json=body) as reply:
                greedy_done += reply.status == 200
                return reply.status

        async def waiting(number: int) -> None:
            async with asyncio.timeout(30):
                while True:
                    _, body = await asyncio.to_thread(narrow.get, "/status")
                    if body["queues"]["echo"]["normal"]["waiting"] >= number:
                        return
                    await asyncio.sleep(0.02)

        # It keeps the worker busy until everything is in place.
        first = asyncio.create_task(greedy(3000))
        await asyncio.sleep(0.3)
        tasks = [asyncio.create_task(greedy()) for _ in range(1000)]
        await waiting(1000)
        assert await greedy() == 503
        modest = asyncio.create_task(infer(narrow.url, max_tokens=2, client_id="modest"))
        await waiting(1001)
        first.cancel()
        await modest
        # One has its turn first, one more runs; two that finished are on their way to us.
        assert greedy_done <= 4
        for task in tasks:
            task.cancel()
        await asyncio.gather(first, *tasks, return_exceptions=True)
    await idle(narrow)


async def test_the_openai_client_waits_in_the_queue(narrow: Cluster) -> None:
    """Keep-alives come while it waits; nothing that the client's parser trips over."""
    async with openai.AsyncOpenAI(
        base_url=f"{narrow.url}/v1", api_key="none", max_retries=0
    ) as client:
        first = asyncio.create_task(infer(narrow.url, max_tokens=150, client_id="first"))
        await asyncio.sleep(0.1)
        stream = await client.chat.completions.create(
            model="echo",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=20,
            seed=2,
            stream=True,
        )
        assert not first.done()
        text = "".join([c.choices[0].delta.content or "" async for c in stream])
        assert text == letters(2, 20)
        await first


async def test_a_killed_workers_streams_go_on_elsewhere(tmp_path: Path) -> None:
    with Cluster(tmp_path, echo_step_ms=10) as found:
        found.up(workers=2, control=False)
        # The scripts declare nobody dead in the first two leases after a start of Redis.
        await asyncio.sleep(6.5)
        tasks = [
            asyncio.create_task(infer(found.url, max_tokens=200, seed=i, client_id=str(i)))
            for i in range(8)
        ]
        await asyncio.sleep(0.5)
        found.processes[1].kill()
        for i, task in enumerate(tasks):
            assert (await task)["text"] == letters(i, 200)
