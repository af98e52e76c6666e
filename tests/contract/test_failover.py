"""Sentinel and strict, over real servers: whoever is the master is used, and nobody else."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import uvloop
from gateway_site import letters, model_card, open_site
from script_model import MODEL, VERSION, make_request
from sentinel import NAME, PASSWORD, Member, Replicated
from servers import binary

import shared.sentinel
from gateway.hub import Hub
from realtime_serve.redis_server import ServerError, check_server
from shared import keys, messages, tasks
from shared.errors import NotReplicated, StoreUnavailable
from shared.store import REPLICA_MS, Enqueued, Store, connect
from worker.presence import listen

FAILOVER_S = 15.0
"""Sentinels need two to three seconds to agree; a loaded machine needs more."""
FOLLOW_S = 3 * (shared.sentinel.WATCH_S + shared.sentinel.ASK_S)
"""After that, everybody follows within this."""
ENGINE = "engine-0"
RID = "r1"
BODY = {"model": "echo", "prompt": "hello", "max_tokens": 10, "seed": 5}

pytestmark = pytest.mark.timeout(120)


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """As gateways and workers run; it is the stricter one with connections that were cut."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(test(**fixtures))

    return run


@pytest.fixture(params=["valkey", "redis"])
def program(request: pytest.FixtureRequest) -> str:
    return binary(request.param)


@pytest.fixture
def watched(program: str, tmp_path: Path) -> Iterator[Replicated]:
    """A primary and a replica with three sentinels."""
    with Replicated(tmp_path, program) as servers:
        yield servers


@pytest.fixture
def pair(program: str, tmp_path: Path) -> Iterator[Replicated]:
    """A primary and a replica that nobody watches."""
    with Replicated(tmp_path, program, sentinels=0) as servers:
        yield servers


async def until(condition: Callable[[], Any], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.02)


async def put(store: Store, rid: str, attempt: str = "", *, strict: bool = True) -> Enqueued:
    return await store.enqueue(
        make_request(rid, "alice", 3),
        cls="normal",
        timeout_ms=60_000,
        grace_ms=60_000,
        keep_ms=30_000,
        attempt=attempt or secrets.token_hex(8),
        queue_limit=1000,
        queue_bytes=10**9,
        resumable=False,
        strict=strict,
    )


@asynccontextmanager
async def store_at(url: str, connections: int = 16) -> AsyncIterator[Store]:
    store = Store(connect(url, timeout_s=5.0, connections=connections))
    try:
        yield store
    finally:
        await store.close()


class Everyone:
    """All kinds of connections that the cluster has, in use the whole time."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = Store(connect(url, timeout_s=5.0))
        self.hub = Hub(url, self.store)
        self.heard = asyncio.Event()
        self.failures = 0
        self.writes = 0

    async def write(self) -> None:
        """A script a moment, as an outbox does, and never two at once."""
        while True:
            try:
                # A charge that nobody made: it writes nothing, and a replica refuses it like all.
                await self.store.limit("alice", 10**6, 0, 1)
                self.writes += 1
            except StoreUnavailable:
                self.failures += 1
            await asyncio.sleep(0.02)

    async def block(self) -> None:
        """A blocking read, as an idle worker has it."""
        while True:
            try:
                await self.store.wait_for_work("none", 1.0)
            except StoreUnavailable:
                await asyncio.sleep(0.02)

    async def is_on(self, member: Member) -> bool:
        """Whether commands, messages and the control channel are all on this server."""
        before = self.writes
        await asyncio.sleep(0.1)
        client = member.client
        heard: Any = await asyncio.to_thread(
            client.pubsub_numsub, keys.control_channel(ENGINE), keys.log(RID)
        )
        return self.writes > before and dict(heard) == {
            keys.control_channel(ENGINE): 1,
            keys.log(RID): 1,
        }


@asynccontextmanager
async def everyone(url: str) -> AsyncIterator[Everyone]:
    it = Everyone(url)
    await it.hub.start()
    running = [
        asyncio.create_task(listen(it.store, url, ENGINE, it.heard)),
        asyncio.create_task(it.write()),
        asyncio.create_task(it.block()),
    ]
    try:
        await until(lambda: it.hub.healthy and it.heard.is_set())
        yield it
    finally:
        await tasks.end(*running)
        await it.hub.close()
        await it.store.close()


def tokens(number: int) -> bytes:
    token = messages.Token(0, number, str(number))
    return messages.encode(messages.Tokens(messages.VERSION, number, [token]))


async def test_a_killed_primary(watched: Replicated) -> None:
    async with everyone(watched.url) as all_of_us:
        reader = await all_of_us.hub.subscribe(RID)
        old = watched.primary()
        await until(lambda: all_of_us.is_on(old))
        started = time.monotonic()
        old.kill()
        new = await asyncio.to_thread(watched.wait_for_failover, old)
        await until(lambda: all_of_us.is_on(new), FOLLOW_S)
        assert time.monotonic() - started < FAILOVER_S
        assert await put(all_of_us.store, "r2", strict=False) == Enqueued("closed")
        # The stream goes on: what is published at the new one is read.
        await all_of_us.store.client.publish(keys.log(RID), b"1-0 " + tokens(1))
        async with asyncio.timeout(5):
            assert (await reader.next()).seq == 1
        reader.close()


async def test_a_primary_that_stood_still_and_wakes_up(watched: Replicated) -> None:
    async with everyone(watched.url) as all_of_us:
        await all_of_us.hub.subscribe(RID)
        old = watched.primary()
        old.pause()
        try:
            new = await asyncio.to_thread(watched.wait_for_failover, old)
            # Nobody waits for the timeout of a command that is on its way.
            await until(lambda: all_of_us.is_on(new), FOLLOW_S)
        finally:
            old.go_on()
        # It still takes itself for the master, but nobody uses it.
        await until(lambda: not old.clients())
        began, failures = time.monotonic(), all_of_us.failures
        while time.monotonic() - began < 2.0:
            clients, role = old.clients(), old.role()
            assert role == "slave" or clients == []
            await asyncio.sleep(0.05)
        await until(lambda: all_of_us.is_on(new))
        assert all_of_us.failures == failures


async def test_a_sentinel_that_missed_the_failover_is_not_believed(watched: Replicated) -> None:
    watched.first.kill()
    new = await asyncio.to_thread(watched.wait_for_failover, watched.first)
    with watched.stray_sentinel() as stray:
        address: Any = stray.client.sentinel_get_master_addr_by_name(NAME)
        assert int(address[1]) == watched.first.port
        async with everyone(watched.url.replace("@", f"@127.0.0.1:{stray.port},")) as all_of_us:
            await all_of_us.hub.subscribe(RID)
            await asyncio.sleep(2 * shared.sentinel.WATCH_S)
            await until(lambda: all_of_us.is_on(new))
            assert all_of_us.failures == 0


async def test_a_former_master_that_lives_is_left(program: str, tmp_path: Path) -> None:
    with Replicated(tmp_path, program, sentinels=1) as watched:
        async with everyone(watched.url) as all_of_us:
            await all_of_us.hub.subscribe(RID)
            await until(lambda: all_of_us.is_on(watched.first))
            sentinel: Any = watched.sentinels[0].client
            # By hand, so that no sentinel speaks to the servers: the first notices nothing.
            watched.second.client.replicaof("NO", "ONE")
            sentinel.sentinel_remove(NAME)
            sentinel.sentinel_monitor(NAME, "127.0.0.1", watched.second.port, 1)
            sentinel.sentinel_set(NAME, "auth-pass", PASSWORD)
            await until(lambda: all_of_us.is_on(watched.second), FOLLOW_S)
            assert watched.first.clients() == []
            assert watched.first.role() == "master"


@on_uvloop
async def test_a_connection_that_was_cut_is_an_outage(watched: Replicated) -> None:
    client = connect(watched.url, timeout_s=5.0)
    pubsub = client.pubsub()
    await pubsub.subscribe("channel")
    pool: Any = client.connection_pool
    connection: Any = pubsub.connection
    try:
        pool._cut_others(("nowhere", 1))
        await until(connection._reader.at_eof)
        with pytest.raises(redis.ConnectionError):
            await pubsub.ping()
    finally:
        await pubsub.aclose()  # type: ignore[no-untyped-call]
        await client.aclose(close_connection_pool=True)


async def test_without_sentinels_the_last_known_master_stays(watched: Replicated) -> None:
    async with everyone(watched.url) as all_of_us:
        await all_of_us.hub.subscribe(RID)
        for sentinel in watched.sentinels:
            sentinel.kill()
        await asyncio.sleep(FOLLOW_S)
        await until(lambda: all_of_us.is_on(watched.first))
        assert all_of_us.failures == 0
    async with store_at(watched.url) as store:
        with pytest.raises(StoreUnavailable, match=r"no sentinel knows 'main': .*onnect"):
            await store.expire()


async def test_a_connection_to_a_demoted_server_is_not_used_again(pair: Replicated) -> None:
    async with store_at(pair.url, connections=1) as store:
        await store.limit("alice", 1, 0, 1)
        before = await store.client.client_id()
        pair.first.client.replicaof("127.0.0.1", "1")
        with pytest.raises(StoreUnavailable):
            await store.limit("alice", 1, 0, 1)
        assert await store.client.client_id() > before


def test_the_check_at_the_start(watched: Replicated) -> None:
    assert check_server(watched.url) == []
    with pytest.raises(ServerError, match=r"no sentinel knows 'other': .*No such master"):
        check_server(watched.url.replace(f"/{NAME}?", "/other?"))
    with pytest.raises(ServerError, match="no sentinel"):
        check_server(watched.url.replace("sentinel_username=", "sentinel_username=not-"))
    sentinel = f"redis://:p%40ss%2Fword@127.0.0.1:{watched.sentinels[0].port}"
    with pytest.raises(ServerError, match="that is a sentinel") as caught:
        check_server(sentinel)
    assert PASSWORD not in str(caught.value)


async def test_strict_is_on_the_replica_when_it_is_accepted(pair: Replicated) -> None:
    async with store_at(pair.url) as store:
        await _open(store)
        for number in range(50):
            rid = f"r{number}"
            if number == 25:
                # The whole script is sent then.
                await store.client.script_flush()
            assert (await put(store, rid)).outcome == "accepted"
            # Not to wait for: it must be there now.
            assert pair.second.client.hget(keys.request(rid), "st") == "w"


async def test_strict_without_a_replica_is_refused_each_time(pair: Replicated) -> None:
    async with store_at(pair.url) as store:
        await _open(store)
        assert (await put(store, "r0")).outcome == "accepted"
        for leave in (pair.second.pause, pair.second.kill):
            leave()
            attempt, rid = secrets.token_hex(8), secrets.token_hex(4)
            # The second one, on a connection of its own, writes nothing more; the first one did.
            async with store_at(pair.url) as again:
                for through in (store, again):
                    started = time.monotonic()
                    with pytest.raises(NotReplicated):
                        await put(through, rid, attempt)
                    assert REPLICA_MS / 1000 * 0.9 < time.monotonic() - started < 1.0
            rid = secrets.token_hex(4)
            assert (await put(store, rid, strict=False)).outcome == "accepted"


async def _open(store: Store) -> None:
    """The version takes requests."""
    await store.client.set(keys.is_open(keys.model_version(MODEL, VERSION)), "1")


async def test_the_gateway_refuses_what_no_replica_has(pair: Replicated) -> None:
    async with (
        open_site(pair.url, strict=True, tokens_per_minute=3000) as strict,
        open_site(pair.url, card=model_card("other")) as lax,
    ):
        assert (await strict.post("/infer", BODY))[1]["text"] == letters(5, 10)
        pair.second.kill()
        strict.worker.room = 0

        async def refused() -> None:
            started = time.monotonic()
            status, reply, headers = await strict.post("/infer", BODY)
            assert (status, reply["error"]["code"]) in (
                (503, "not_replicated"),
                (503, "store_unavailable"),
            )
            assert headers["Retry-After"] == "1"
            assert time.monotonic() - started < 1.5

        status, reply, _ = await strict.post("/infer", BODY)
        assert (status, reply["error"]["code"]) == (503, "not_replicated")
        assert "No replica" in reply["error"]["message"]
        # Many at once do not take all connections away from the others. A machine that stands still
        # for a moment looks the same, but not three times.
        longest = [await _longest_ping(strict, refused)]
        while longest[-1] > REPLICA_MS / 1000 / 2 and len(longest) < 3:
            longest.append(await _longest_ping(strict, refused))
        assert longest[-1] < REPLICA_MS / 1000 / 2, longest
        assert strict.edge.healthy
        # Nothing of it stays in the queue; control, which this site lacks, settles the charges.
        await until(lambda: _is_empty(strict))
        other = {**BODY, "model": "other"}
        assert (await lax.post("/infer", other))[1]["text"] == letters(5, 10)
        pair.second.start()
        strict.worker.room = 64
        await until(lambda: _is_accepted(strict), 10)


async def _longest_ping(site: Any, ask: Callable[[], Coroutine[Any, Any, None]]) -> float:
    """The longest time of a command while many ask, in s."""
    burst, took = asyncio.gather(*(ask() for _ in range(40))), []
    while not burst.done():
        started = time.monotonic()
        await site.edge.store.client.ping()
        took.append(time.monotonic() - started)
        await asyncio.sleep(0.01)
    await burst
    return max(took)


async def _is_empty(site: Any) -> bool:
    return bool(await site.counts() == (0, 0))


async def _is_accepted(site: Any) -> bool:
    return bool((await site.post("/infer", BODY))[0] == 200)
