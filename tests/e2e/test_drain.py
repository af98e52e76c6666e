"""What a process does between SIGTERM and its end: no stream breaks, nothing waits for nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from cluster import Cluster, Process
from gateway_site import letters

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]


async def infer(url: str, seed: int, tokens: int, model: str = "echo") -> None:
    """One request, and every letter of its answer."""
    body = {"model": model, "prompt": "hi", "seed": seed, "max_tokens": tokens}
    body["client_id"] = f"caller{seed}"
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/infer", json=body) as reply,
    ):
        assert reply.status == 200, await reply.text()
        assert (await reply.json())["text"] == letters(seed, tokens)


async def exit_status(process: Process) -> int:
    return await asyncio.to_thread(process.popen.wait, 15)


async def until_ready(worker: Process) -> None:
    async with asyncio.timeout(20):
        while '"message": "ready"' not in worker.log.read_text():
            await asyncio.sleep(0.02)


def status(cluster: Cluster) -> dict[str, Any]:
    code, body = cluster.get("/status")
    assert code == 200
    return dict(body)


def version(cluster: Cluster) -> str:
    return str(status(cluster)["models"]["echo"]["version"])


async def test_a_gateway_finishes_its_plain_streams(tmp_path: Path) -> None:
    with Cluster(tmp_path, echo_step_ms=10, drain_grace_s=10) as found:
        found.up(workers=1, control=False)
        gateway = found.processes[0]
        async with openai.AsyncOpenAI(
            base_url=f"{found.url}/v1", api_key="none", max_retries=0
        ) as client:
            stream = await client.chat.completions.create(
                model="echo",
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=100,
                seed=4,
                stream=True,
            )
            text = ""
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if len(text) == 10:
                    gateway.signal(15)
            assert text == letters(4, 100)
        assert await exit_status(gateway) == 0


async def test_a_worker_hands_its_streams_to_another(tmp_path: Path) -> None:
    with Cluster(tmp_path, echo_step_ms=10, drain_grace_s=0.2) as found:
        found.up(workers=1, control=False)
        old = found.processes[1]
        task = asyncio.create_task(infer(found.url, 6, 600))
        await asyncio.sleep(0.4)
        await until_ready(found.start("worker"))
        old.signal(15)
        assert await exit_status(old) == 0
        assert '"handed back", "streams": 1' in old.log.read_text()
        await task


async def test_new_requests_go_to_a_new_version_at_once(tmp_path: Path) -> None:
    """All through the SIGTERM of the old version's last worker, which has a long stream left."""
    with Cluster(tmp_path, echo_step_ms=5, drain_grace_s=60) as found:
        found.up(workers=1, control=False)
        old = found.processes[1]
        before = version(found)
        # The same name, other files.
        new = found.start("worker", engine="other_version:Other", model="echo")
        await until_ready(new)
        long = asyncio.create_task(infer(found.url, 6, 1600))
        stop = asyncio.Event()
        answered = 0
        slowest = 0.0

        async def keep_asking(seed: int) -> None:
            nonlocal answered, slowest
            while not stop.is_set():
                began = time.monotonic()
                await infer(found.url, seed, 4)
                answered += 1
                slowest = max(slowest, time.monotonic() - began)

        async with asyncio.TaskGroup() as tasks:
            for seed in range(10, 16):
                tasks.create_task(keep_asking(seed))
            await asyncio.sleep(0.5)
            assert version(found) == before
            old.signal(15)
            await asyncio.sleep(2)
            stop.set()
        assert version(found) != before
        assert not long.done(), "the old one was still at it"
        assert answered > 70
        assert slowest < 2
        await long
        assert await exit_status(old) == 0


async def test_who_waits_for_an_old_version_is_served_before_its_last_worker_goes(
    tmp_path: Path,
) -> None:
    with Cluster(tmp_path, echo_step_ms=5, drain_grace_s=20, max_batch_size=1) as found:
        found.up(workers=1, control=False)
        old = found.processes[1]
        waiting = [asyncio.create_task(infer(found.url, seed, 150)) for seed in range(12)]
        async with asyncio.timeout(10):
            while status(found)["queues"]["echo"]["normal"]["waiting"] < 8:
                await asyncio.sleep(0.02)
        await until_ready(found.start("worker", engine="other_version:Other", model="echo"))
        assert not all(task.done() for task in waiting)
        old.signal(15)
        async with asyncio.timeout(15):
            await asyncio.gather(*waiting)
            assert await exit_status(old) == 0
        # The old one answered them: nobody of the new version could read its queue.
        assert '"message": "handed back"' not in old.log.read_text()


async def test_the_last_of_two_that_drain_serves_what_the_other_hands_back(
    tmp_path: Path,
) -> None:
    """An old version of two workers ends: the second one has nothing of its own left."""
    with Cluster(tmp_path, echo_step_ms=5) as found:
        first = found.start("worker", drain_grace_s=1)
        found.start("gateway")
        await asyncio.to_thread(found.wait, 1)
        tasks = [asyncio.create_task(infer(found.url, seed, 1200)) for seed in range(4)]
        await asyncio.sleep(0.5)
        second = found.start("worker", drain_grace_s=30)
        await until_ready(second)
        await until_ready(found.start("worker", engine="other_version:Other", model="echo"))
        first.signal(15)
        await asyncio.sleep(0.2)
        second.signal(15)
        assert await exit_status(first) == 0
        assert '"handed back", "streams": 4' in first.log.read_text()
        async with asyncio.timeout(25):
            await asyncio.gather(*tasks)
            assert await exit_status(second) == 0


async def test_who_queued_before_the_next_version_was_there_is_served(tmp_path: Path) -> None:
    with Cluster(tmp_path, echo_step_ms=5, drain_grace_s=60, max_batch_size=1) as found:
        found.up(workers=1, control=False)
        old = found.processes[1]
        long = asyncio.create_task(infer(found.url, 6, 1200))
        await asyncio.sleep(0.3)
        old.signal(15)
        await asyncio.sleep(0.3)
        # It drains, and nobody else is there yet: they wait.
        late = [asyncio.create_task(infer(found.url, seed, 20)) for seed in range(3)]
        await asyncio.sleep(0.3)
        await until_ready(found.start("worker", engine="other_version:Other", model="echo"))
        async with asyncio.timeout(25):
            await asyncio.gather(long, *late)
            assert await exit_status(old) == 0


@asynccontextmanager
async def doomed(
    folder: Path, engine: str, tokens: int, **settings: float
) -> AsyncIterator[tuple[Cluster, Process, Path, asyncio.Task[None]]]:
    """A worker in the middle of a stream, the file that makes its engine fail, and the client."""
    trigger = folder / "failing"
    model = engine.lower()
    with Cluster(
        folder, echo_step_ms=10, engine=f"failing_engine:{engine}", model=model, **settings
    ) as found:
        found.start("gateway")
        worker = found.start("worker", env={"FAILING": str(trigger)})
        await asyncio.to_thread(found.wait, 1)
        task = asyncio.create_task(infer(found.url, 6, tokens, model))
        await asyncio.sleep(0.4)
        yield found, worker, trigger, task


async def start_sound_one(cluster: Cluster) -> None:
    """Another worker beside it, whose engine does not fail."""
    await until_ready(cluster.start("worker", env={"FAILING": str(cluster.folder / "never")}))


async def test_an_engine_that_fails_in_a_drain_is_a_failure(tmp_path: Path) -> None:
    """Its streams go on elsewhere before its grace time is over."""
    settings = {"drain_grace_s": 20, "lease_ms": 1500}
    async with doomed(tmp_path, "Failing", 500, **settings) as (found, old, trigger, task):
        await start_sound_one(found)
        old.signal(15)
        await asyncio.sleep(0.3)
        trigger.touch()
        assert await exit_status(old) == 1
        assert "engine failed" in old.log.read_text()
        await task


async def test_a_worker_whose_engine_hangs_ends_itself(tmp_path: Path) -> None:
    """Whoever started it starts another: the device is of use again."""
    settings = {"engine_iteration_timeout_s": 1, "lease_ms": 500}
    async with doomed(tmp_path, "Hanging", 100, **settings) as (found, old, trigger, task):
        trigger.touch()
        await start_sound_one(found)
        assert await exit_status(old) == 1
        assert "a step has not ended in 1 s" in old.log.read_text()
        await task


async def test_a_worker_whose_engine_hangs_in_a_drain_ends(tmp_path: Path) -> None:
    """It has handed its streams over and does not wait for the step."""
    async with doomed(tmp_path, "Hanging", 300, drain_grace_s=0.5) as (found, old, trigger, task):
        trigger.touch()
        await start_sound_one(found)
        old.signal(15)
        await task
        assert await asyncio.to_thread(old.popen.wait, 30) == 1
        assert "it has not ended in 15 s" in old.log.read_text()


async def test_an_idle_worker_does_not_wait_for_a_redis_that_is_away(tmp_path: Path) -> None:
    with Cluster(tmp_path, drain_grace_s=30) as found:
        found.up(workers=1, control=False)
        found.redis.kill()
        await asyncio.sleep(0.5)
        began = time.monotonic()
        found.processes[1].signal(15)
        assert await exit_status(found.processes[1]) == 0
        assert time.monotonic() - began < 12
