"""Redis away, hanging, restarted: 503 within a second, never a hang; streams survive it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
import redis
from gateway_site import Site, letters, open_site, until
from lost_writes import LostWrites
from redis.exceptions import RedisError

from gateway.app import Server, create_app
from gateway.models import LOOK_AGAIN_S
from realtime_serve import probe
from realtime_serve.redis_server import RedisServer, ServerPlan, find_binary
from shared.settings import Settings

BODY = {"model": "echo", "prompt": "hello", "max_tokens": 10, "seed": 5}


@pytest.fixture
async def own(tmp_path: Path) -> AsyncIterator[RedisServer]:
    """A server that this test may stop."""
    binary, _ = find_binary()
    with RedisServer.start(binary, tmp_path) as server:
        yield server


async def test_redis_is_killed_and_comes_back(own: RedisServer) -> None:
    async with open_site(own.url) as site:
        own.kill()
        for _ in range(3):
            await _is_refused(site)
        await until(lambda: not site.edge.healthy)
        assert (await site.get("/readyz"))[0] == 503
        assert (await site.get("/health"))[1]["status"] == "redis_unavailable"
        assert (await site.get("/livez"))[0] == 200
        assert (await site.get("/requests/" + "0" * 32))[0] == 503
        await until(lambda: _is_old(site))
        await _is_refused(site, "other")
        own.restart()
        await until(lambda: site.edge.healthy)
        _, reply, _ = await site.post("/infer", BODY)
        assert reply["text"] == letters(5, 10)


@pytest.mark.parametrize("outage", ["away", "full"])
async def test_an_outage_longer_than_a_stream_may_idle(own: RedisServer, outage: str) -> None:
    async with open_site(own.url, stream_idle_s=0.6) as site:
        site.worker.step_s = 0.01
        post = asyncio.create_task(site.post("/infer_stream", {**BODY, "max_tokens": 60}))
        await until(lambda: [r for r in site.worker.running.values() if r.seq > 3])
        (flow,) = site.edge.flows
        before = flow.heard_at
        client = redis.Redis.from_url(own.url)
        own.kill() if outage == "away" else client.config_set("maxmemory", 1)
        # The time stands still: it does not wait for the first look after the outage.
        await until(lambda: flow.heard_at > before + 1.5 or post.done())
        own.restart() if outage == "away" else client.config_set("maxmemory", 0)
        client.close()
        _, events, _ = await post
        assert "".join(event.data.get("token", "") for event in events[:-1]) == letters(5, 60)


async def test_redis_hangs(own: RedisServer) -> None:
    async with open_site(own.url) as site:
        os.kill(own.pid, signal.SIGSTOP)
        try:
            await until(lambda: _is_old(site))
            await _is_refused(site, "other", at_once=12)
            for at_once in (1, 20):
                await _is_refused(site, at_once=at_once)
                await _is_refused(site, "other", at_once=at_once)
        finally:
            os.kill(own.pid, signal.SIGCONT)
        await until(lambda: site.edge.healthy)
        assert (await site.post("/infer", BODY))[1]["text"] == letters(5, 10)
        # What may have got into the queue after all was withdrawn.
        await until(lambda: _idle(site))


@pytest.mark.parametrize("at_once", [1, 20])
@pytest.mark.parametrize(
    ("harm", "mend"),
    [
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
    ],
    ids=["full", "read-only"],
)
async def test_redis_takes_no_writes(own: RedisServer, harm: str, mend: str, at_once: int) -> None:
    async with open_site(own.url) as site:
        site.worker.step_s = 0.02
        post = asyncio.create_task(site.post("/infer_stream", {**BODY, "max_tokens": 60}))
        await until(lambda: any(running.seq > 10 for running in site.worker.running.values()))
        with redis.Redis.from_url(own.url) as admin:
            admin.execute_command(*harm.split())
            await _is_refused(site, at_once=at_once)
            admin.execute_command(*mend.split())
        _, events, _ = await post
        assert "".join(e.data["text"] for e in events[:-2]) == letters(5, 60)
        await until(lambda: site.edge.healthy)
        assert (await site.post("/infer", BODY))[1]["text"] == letters(5, 10)
        await until(lambda: _idle(site))


@pytest.mark.parametrize("at_once", [1, 20])
async def test_redis_hangs_before_anybody_knows(own: RedisServer, at_once: int) -> None:
    async with open_site(own.url) as site:
        os.kill(own.pid, signal.SIGSTOP)
        try:
            assert site.edge.healthy
            await _is_refused(site, at_once=at_once)
        finally:
            os.kill(own.pid, signal.SIGCONT)
        await until(lambda: site.edge.healthy)
        await until(lambda: _idle(site))


async def test_a_stream_survives_a_restart(own: RedisServer) -> None:
    async with open_site(own.url) as site:
        site.worker.step_s = 0.02
        post = asyncio.create_task(site.post("/infer_stream", {**BODY, "max_tokens": 60}))
        await until(lambda: any(running.seq > 10 for running in site.worker.running.values()))
        own.kill()
        own.restart()
        _, events, _ = await post
        assert "".join(e.data["text"] for e in events[:-2]) == letters(5, 60)
        assert events[-1].data == "[DONE]"


@pytest.mark.parametrize("path", ["/infer_stream", "/infer"])
@pytest.mark.parametrize("lost", ["request", "ownership", "tokens"])
async def test_what_redis_acknowledged_and_lost_goes_on(
    own: RedisServer, lost: str, path: str
) -> None:
    async with open_site(own.url) as site:
        worker = site.worker
        worker.step_s = 0.02
        await asyncio.sleep(0.1)
        before = LostWrites(own)
        worker.room = 0 if lost == "ownership" else 64
        post = asyncio.create_task(site.post(path, {**BODY, "max_tokens": 60}))
        if lost == "ownership":
            await until(lambda: _counts(site, 1, 0))
            await asyncio.sleep(0.1)
            before = LostWrites(own)
            worker.room = 64
        if lost == "tokens":
            await until(lambda: any(running.seq > 5 for running in worker.running.values()))
            before = LostWrites(own)
        await until(lambda: any(running.seq > 10 for running in worker.running.values()))
        assert before.kill() > 0
        own.restart()
        status, reply, _ = await post
        assert status == 200
        if path == "/infer":
            assert reply["text"] == letters(5, 60)
        else:
            assert "".join(e.data["text"] for e in reply[:-2]) == letters(5, 60)
            assert [e.id for e in reply[:-2]] == list(range(1, 61))
            assert reply[-1].data == "[DONE]"
        assert site.edge.hub.recoveries == (1 if lost == "request" else 0)
        await until(lambda: _idle(site))


async def test_a_gateway_starts_without_redis(tmp_path: Path) -> None:
    binary, _ = find_binary()
    plan = ServerPlan.make(binary, tmp_path)
    server = Server(create_app(Settings(redis_url=plan.url)))
    await server.start("127.0.0.1", 0)
    try:
        for path, expected in (("/livez", 200), ("/readyz", 503), ("/metrics", 200)):
            status, _ = await probe.get("127.0.0.1", server.port, path)
            assert status == expected
        with RedisServer(plan) as redis:
            redis.restart()
            await until(lambda: _is_ready(server.port))
    finally:
        await server.stop()


async def _is_refused(site: Site, model: str = "echo", at_once: int = 1) -> None:
    async def ask(path: str, headers: dict[str, str]) -> None:
        started = time.monotonic()
        status, reply, headers = await site.post(path, {**BODY, "model": model}, headers)
        assert (status, reply["error"]["code"]) == (503, "store_unavailable")
        assert headers["Retry-After"] == "1"
        assert "rror" not in reply["error"]["message"]
        assert time.monotonic() - started < 1.0

    asks: list[Coroutine[Any, Any, None]] = []
    for path in ("/infer", "/infer_stream"):
        for i in range(at_once):
            asks += [ask(path, {}), ask(path, {"Idempotency-Key": f"key-{i}"})]
    await asyncio.gather(*asks)


def _is_old(site: Site) -> bool:
    """Whether what is known of models has to be asked for again."""
    known_at = site.edge.models._refreshed_at
    return asyncio.get_running_loop().time() - known_at > LOOK_AGAIN_S


async def _is_ready(port: int) -> bool:
    return (await probe.get("127.0.0.1", port, "/readyz"))[0] == 200


async def _idle(site: Site) -> bool:
    return await _counts(site, 0, 0)


async def _counts(site: Site, waiting: int, running: int) -> bool:
    try:
        return await site.counts() == (waiting, running)
    except RedisError:
        # It has just been started again.
        return False


async def test_a_cancelled_call_always_comes_back(site: Site) -> None:
    # On Python 3.11 redis-py alone loses some of these cancellations.
    async def call_for_ever() -> None:
        while True:
            await site.store.cancel("0" * 32, "nobody")

    for i in range(400):
        task = asyncio.create_task(call_for_ever())
        for _ in range(i % 17):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=1.0)
        assert done
