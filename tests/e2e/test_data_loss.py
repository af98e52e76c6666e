"""All data in Redis is lost under a running cluster: what a gateway relays goes on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
import redis
from cluster import Cluster
from gateway_site import letters, read_events, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]

PLACES = 4
"""Of the engine: as many run, the others wait."""
TOKENS = 300
"""Three seconds of a stream."""
NOTICED_S = 5.5
"""A gateway looks once a second, and gives others three to queue it again."""


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("loss"), max_batch_size=PLACES, echo_step_ms=10) as found:
        yield found.up()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


@pytest.mark.parametrize("again", range(2))
async def test_every_stream_goes_on_and_new_requests_are_served(
    cluster: Cluster, http: aiohttp.ClientSession, again: int
) -> None:
    running = [asyncio.create_task(ask(http, cluster.url, kind)) for kind in KINDS]
    await queued(cluster, 0, PLACES)
    waiting = [asyncio.create_task(ask(http, cluster.url, kind)) for kind in KINDS]
    await queued(cluster, len(KINDS), PLACES)
    # Its client came back: this gateway knows no order of it, as no other one would.
    path, body, headers = KINDS["resumable"]
    async with http.post(cluster.url + path, json=body, headers=headers) as reply:
        rid = reply.headers["X-Request-Id"]
    resumed = await http.get(f"{cluster.url}/requests/{rid}/stream")
    await asyncio.sleep(0.5)
    with redis.Redis.from_url(cluster.redis.url) as client:
        client.flushall()
        lost_at = time.monotonic()
        (event,) = read_events(await resumed.text())
        assert event.data["error"]["code"] == "log_expired"
        assert time.monotonic() - lost_at < NOTICED_S
        reply = await http.post(f"{cluster.url}/infer", json={**BODY, "max_tokens": 20})
        assert (await reply.json())["text"] == letters(7, 20)
        for kind, task in zip([*KINDS, *KINDS], running + waiting, strict=True):
            assert await task == letters(7, TOKENS), kind
        text = await (await http.get(f"{cluster.url}/metrics")).text()
        assert f"rts_stream_recoveries_total {2.0 * len(KINDS)}" in text
        # All of its places, one after the other: nothing that was lost holds one.
        begun = time.monotonic()
        replies = await asyncio.gather(
            *(
                http.post(f"{cluster.url}/infer", json={**BODY, "max_tokens": 50})
                for _ in range(3 * PLACES)
            )
        )
        assert [reply.status for reply in replies] == [200] * 3 * PLACES
        assert time.monotonic() - begun < 5
        await until(lambda: is_idle(cluster))
        await until(lambda: counts(client) == {b"waiting": 0, b"running": 0, b"bytes": 0})
        assert not client.keys("rts:lane:*")
        assert not client.keys("rts:owns:*")
        assert not client.keys("rts:leases:*")
        assert not client.exists("rts:due")
    for process in cluster.processes:
        assert process.popen.poll() is None
        assert "Traceback" not in process.log.read_text()


BODY = {"model": "echo", "prompt": "hi", "seed": 7, "max_tokens": TOKENS}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "plain": ("/infer_stream", BODY, {}),
    "chat": (
        "/v1/chat/completions",
        {
            "model": "echo",
            "messages": [{"role": "user", "content": "hi"}],
            "seed": 7,
            "max_tokens": TOKENS,
            "stream": True,
        },
        {},
    ),
    "resumable": ("/infer_stream", BODY, {"X-Resumable": "60"}),
    "whole": ("/infer", BODY, {}),
}


async def ask(http: aiohttp.ClientSession, url: str, kind: str) -> str:
    """Its text, each token once and in order."""
    path, body, headers = KINDS[kind]
    async with http.post(url + path, json=body, headers=headers) as reply:
        text = await reply.text()
        assert reply.status == 200, text
    if kind == "whole":
        return str(json.loads(text)["text"])
    events = read_events(text)
    assert events[-1].data == "[DONE]", events[-1]
    if kind == "chat":
        return "".join(
            event.data["choices"][0]["delta"].get("content", "") for event in events[:-1]
        )
    return "".join(event.data["text"] for event in events[:-2])


async def queued(cluster: Cluster, waiting: int, running: int) -> None:
    with redis.Redis.from_url(cluster.redis.url) as client:

        def there() -> bool:
            found = counts(client)
            return found[b"waiting"] == waiting and found[b"running"] == running

        await until(there)


def counts(client: Any) -> dict[bytes, int]:
    """The counters of all queues together; none is ever negative."""
    total = {b"waiting": 0, b"running": 0, b"bytes": 0}
    for key in client.keys("rts:count:*"):
        for name in total:
            value = int(client.hget(key, name) or 0)
            assert value >= 0, (key, name, value)
            total[name] += value
    return total


async def is_idle(cluster: Cluster) -> bool:
    _, body = await asyncio.to_thread(cluster.get, "/status")
    return [engine["running"] for engine in body["workers"]] == [0]
