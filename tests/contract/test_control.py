"""Janitor and settling over a real server."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from servers import Server

import control.main
from control.janitor import sweep
from control.settling import settle
from shared import keys, messages
from shared.errors import StoreUnavailable
from shared.messages import Request, Sampling
from shared.settings import Settings
from shared.store import Emission, Store, connect

MV = "echo@1"


@pytest.fixture
async def opened(store: Store) -> Store:
    await store.client.set(keys.is_open(MV), "1")
    await heartbeat(store, "e1")
    return store


async def heartbeat(store: Store, engine: str) -> None:
    card = messages.EngineCard(1, engine, "echo", "none", "none", "h", 1, 8, 0, 0, 0.0, False, 0.0)
    await store.heartbeat("echo", "1", engine, card)


async def submit(store: Store, rid: str, *, attempt: str = "", timeout_ms: int = 60_000) -> None:
    request = Request(1, rid, "echo", "1", "ann", [1, 2, 3], Sampling(40))
    answer = await store.enqueue(
        request,
        cls="normal",
        timeout_ms=timeout_ms,
        grace_ms=1000,
        keep_ms=1000,
        attempt=attempt,
        queue_limit=100,
        queue_bytes=10**6,
        resumable=False,
    )
    assert answer.outcome == "accepted"


async def generate(store: Store, rid: str, tokens: int) -> None:
    take = await store.take(MV, "e1", 8, lease_ms=3000, aging_ms=30_000)
    taken = next(t for t in take.requests if t.rid == rid)
    body = messages.encode(
        messages.Tokens(1, 1, [messages.Token(0, i, "x") for i in range(tokens)])
    )
    end = messages.encode(messages.End(1, "stop"))
    emission = Emission(rid, taken.epoch, 1, tokens, body, tokens, "stop", end)
    await store.emit(MV, "e1", [emission])


async def tokens_left(store: Store) -> int:
    return (await store.limit("ann", 100, 100, 0)).tokens_left


async def test_what_was_not_used_comes_back_once(opened: Store) -> None:
    assert (await opened.limit("ann", 100, 100, 43, "a")).refused == ""
    await submit(opened, "r", attempt="a")
    await generate(opened, "r", 7)
    assert await tokens_left(opened) <= 58
    assert await settle(opened, "c1") == 1
    # 43 were charged, 3 + 7 used.
    assert 90 <= await tokens_left(opened) <= 91
    assert await settle(opened, "c1") == 0
    assert 90 <= await tokens_left(opened) <= 91


async def test_a_control_process_that_died_repeats_and_loses_nothing(
    opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await opened.limit("ann", 100, 100, 43, "a")
    await submit(opened, "r", attempt="a")
    await generate(opened, "r", 7)

    async def killed(*args: Any, **options: Any) -> int:
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        # It settled, and died before it could say so.
        patch.setattr(opened.client, "xack", killed)
        with pytest.raises(asyncio.CancelledError):
            await settle(opened, "dead")
    assert 90 <= await tokens_left(opened) <= 91
    monkeypatch.setattr("control.settling.STALE_MS", 0)
    assert await settle(opened, "c2") == 1
    assert 90 <= await tokens_left(opened) <= 91


async def test_names_of_control_processes_that_are_gone_go(
    opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def names() -> set[bytes]:
        found = await opened.client.xinfo_consumers(keys.ENDED, keys.CONTROL_GROUP)
        return {each["name"] for each in found}

    await submit(opened, "r", attempt="a")
    await generate(opened, "r", 7)
    for name in ("c1", "c2"):
        await settle(opened, name)
    await submit(opened, "r2", attempt="b")
    await generate(opened, "r2", 7)
    # It has read a fact and not acknowledged it.
    await opened.client.xreadgroup(keys.CONTROL_GROUP, "c3", {keys.ENDED: ">"})
    await settle(opened, "c4")
    assert await names() == {b"c1", b"c2", b"c3", b"c4"}
    monkeypatch.setattr("control.settling.GONE_MS", -1)
    await settle(opened, "c4")
    assert await names() == {b"c3", b"c4"}


async def test_what_a_round_did_not_get_to_is_settled_in_the_next(
    opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await opened.limit("ann", 100, 100, 43, "a")
    await submit(opened, "r", attempt="a")
    await generate(opened, "r", 7)

    async def away(*args: Any) -> bool:
        raise StoreUnavailable("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(opened, "settle", away)
        with pytest.raises(StoreUnavailable):
            await settle(opened, "c1")
    assert await settle(opened, "c1") == 1
    assert 90 <= await tokens_left(opened) <= 91


async def test_requests_without_a_charge_need_no_budget(opened: Store) -> None:
    await submit(opened, "r")
    await generate(opened, "r", 2)
    assert await settle(opened, "c1") == 1
    assert await opened.client.keys("rts:settled:*") == []
    assert not await opened.client.exists(keys.bucket("ann"))


async def test_each_run_of_a_repeated_key_is_settled(opened: Store) -> None:
    for run in ("1", "2"):
        assert (await opened.limit("ann", 100, 100, 43, run)).refused == ""
        await submit(opened, "r", attempt=run)
        await generate(opened, "r", 7)
        assert await settle(opened, "c1") == 1
        # Its retention is over.
        await opened.client.delete(keys.request("r"), keys.log("r"))
    assert 80 <= await tokens_left(opened) <= 82


async def test_overdue_requests_are_ended_without_any_worker(opened: Store) -> None:
    for i in range(5):
        await submit(opened, f"r{i}", timeout_ms=1)
    await submit(opened, "later")
    await asyncio.sleep(0.01)
    assert (await sweep(opened))["ended"] == 5
    (entry,) = await opened.read_log("r3", 0)
    assert isinstance(entry.event, messages.End)
    assert entry.event.reason == "queue_timeout"
    await opened.cancel("later", "")


async def test_engines_that_are_gone_are_forgotten_once_they_own_nothing(opened: Store) -> None:
    await submit(opened, "r")
    await opened.take(MV, "e1", 8, lease_ms=3000, aging_ms=30_000)
    await opened.client.zrem(keys.engines(MV), "e1")
    assert (await sweep(opened))["forgotten"] == 0
    await opened.release(MV, "e1", [("r", 1)])
    assert (await sweep(opened))["forgotten"] == 1
    names = [
        consumer["name"]
        for consumer in await opened.client.xinfo_consumers(keys.queue(MV, "normal"), keys.GROUP)
    ]
    assert names == [b"-"]
    await opened.cancel("r", "")


async def test_an_engine_killed_when_it_was_the_last_is_forgotten(opened: Store) -> None:
    """No heartbeat of another one clears up behind it, and it signed off nowhere."""
    card = messages.EngineCard(1, "e1", "echo", "", "", "", 1, 8, 0, 0, 0.0, False, 0.0)
    await submit(opened, "r")
    await generate(opened, "r", 1)
    await opened.heartbeat("echo", "1", "e1", card)
    await opened.heartbeat("echo", "1", "e2", card)
    assert (await sweep(opened))["forgotten"] == 0
    seconds, _ = await opened.client.time()
    for engine in ("e1", "e2"):
        await opened.client.zadd(keys.engines(MV), {engine: (seconds - 7) * 1000})
    assert (await sweep(opened))["forgotten"] == 2
    assert await opened.client.exists(keys.engines(MV), keys.cards(MV)) == 0
    queue = keys.queue(MV, "normal")
    assert await opened.client.xinfo_consumers(queue, keys.GROUP) == []


async def test_control_outlives_a_server_that_stands_still(
    own_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its jobs are cut off in the middle; that is not the end of the process."""
    monkeypatch.setattr(control.main, "REDIS_TIMEOUT_S", 0.2)
    monkeypatch.setattr(control.main, "RETRY_S", 0.1)
    running = asyncio.create_task(control.main._run(Settings(redis_url=own_server.url)))
    for _ in range(3):
        await asyncio.sleep(1.0)
        own_server.pause()
        await asyncio.sleep(1.5)
        own_server.go_on()
        assert not running.done()
    store = Store(connect(own_server.url, timeout_s=5))
    await store.client.set(keys.is_open(MV), "1")
    await submit(store, "late", timeout_ms=1)
    async with asyncio.timeout(5):
        while await store.client.zcard(keys.DUE):
            await asyncio.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    await store.close()


async def test_a_file_shows_that_control_works(
    own_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control.main, "REDIS_TIMEOUT_S", 0.2)
    monkeypatch.setattr(control.main, "RETRY_S", 0.1)
    file = tmp_path / "heartbeat"

    async def touched() -> bool:
        """Whether it is, within a few rounds."""
        os.utime(file, (1.0, 1.0))
        with suppress(TimeoutError):
            async with asyncio.timeout(3):
                while file.stat().st_mtime == 1.0:
                    await asyncio.sleep(0.02)
                return True
        return False

    settings = Settings(redis_url=own_server.url, heartbeat_file=str(file))
    running = asyncio.create_task(control.main._run(settings))
    await asyncio.sleep(0.5)
    assert await touched()
    own_server.pause()
    assert await touched()
    assert await touched()
    own_server.go_on()
    assert await touched()
    # Its loop turns, but it looks for nothing: as if a call to Redis never returned.
    monkeypatch.setattr(control.main._Beating, "_poll_iteration", lambda worker: asyncio.sleep(60))
    await asyncio.sleep(2.0)
    assert not await touched()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0


async def test_a_job_whose_data_are_lost_is_no_failure(
    own_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """As after FLUSHALL between the reading of a job's name and of the job."""
    running = asyncio.create_task(control.main._run(Settings(redis_url=own_server.url)))
    store = Store(connect(own_server.url, timeout_s=5))
    await store.client.zadd(control.main.QUEUE, {"lost": 1})
    async with asyncio.timeout(10):
        while await store.client.zscore(control.main.QUEUE, "lost") is not None:
            await asyncio.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    await store.close()
    assert "lost expired" in caplog.text
    assert [record for record in caplog.records if record.exc_info] == []


async def test_old_dead_letters_go(opened: Store) -> None:
    for _ in range(300):
        await opened.client.xadd(keys.DEAD, {"rid": "x"}, id="1-*")
    await opened.client.xadd(keys.DEAD, {"rid": "new"})
    await sweep(opened)
    assert await opened.client.xlen(keys.DEAD) < 150
