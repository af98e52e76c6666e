"""A gateway that is told to stop: first not ready, then refusing, then gone; real processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from cluster import Cluster
from gateway_site import letters, read_events, until

from realtime_serve import probe

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]

BODY = {"model": "echo", "prompt": "hi", "seed": 3}
LONG = {**BODY, "max_tokens": 400}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A server and a worker; each test starts a gateway of its own."""
    with Cluster(tmp_path_factory.mktemp("drain"), echo_step_ms=10) as found:
        found.start("worker")
        yield found


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def test_not_ready_comes_before_refusing(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    gateway, port, url = await _gateway(cluster, drain_delay_s=1.5, drain_grace_s=20)
    plain = await http.post(f"{url}/infer_stream", json=LONG)
    kept = await http.post(f"{url}/infer_stream", json=LONG, headers={"X-Resumable": "30"})
    # Its request outlives it, and its client has not said that it would look for it elsewhere.
    keyed = await http.post(f"{url}/infer_stream", json=LONG, headers={"Idempotency-Key": "k"})
    async with http.post(f"{url}/infer", json={**BODY, "max_tokens": 2}) as reply:
        assert "Connection" not in reply.headers
    gateway.signal(15)
    told = time.monotonic()
    await until(lambda: _status(port, "/readyz", 503))
    served = 0
    while True:
        async with http.post(f"{url}/infer", json={**BODY, "max_tokens": 2}) as reply:
            body = await reply.json()
            assert reply.headers["Connection"] == "close"
            if reply.status != 200:
                break
            assert body["text"] == letters(3, 2)
            served += 1
        # A stream that has begun is not handed over yet, and new ones are taken.
        assert not kept.content.at_eof()
    assert time.monotonic() - told >= 1.5
    assert served > 1
    assert (reply.status, body["error"]["code"]) == (503, "gateway_draining")
    assert reply.headers["Retry-After"] == "1"
    assert await _status(port, "/livez", 200)
    events = read_events(await kept.text())
    assert 0 < len(events) < 400
    assert all("text" in event.data for event in events)
    for whole in (plain, keyed):
        events = read_events(await whole.text())
        assert "".join(event.data["text"] for event in events[:-2]) == letters(3, 400)
        assert events[-1].data == "[DONE]"
    assert await asyncio.to_thread(gateway.popen.wait, 10) == 0


async def test_a_second_signal_hurries(cluster: Cluster, http: aiohttp.ClientSession) -> None:
    gateway, port, url = await _gateway(cluster, drain_delay_s=600, drain_grace_s=600)
    plain = await http.post(f"{url}/infer_stream", json={**LONG, "max_tokens": 30_000})
    gateway.signal(15)
    await until(lambda: _status(port, "/readyz", 503))
    gateway.signal(15)
    events = read_events(await plain.text())
    assert events[-1].data["error"]["code"] == "gateway_draining"
    assert await asyncio.to_thread(gateway.popen.wait, 5) == 0


async def _gateway(cluster: Cluster, **settings: Any) -> tuple[Any, int, str]:
    gateway = cluster.start("gateway", **settings)
    port = cluster.ports.pop()
    await until(lambda: _serves(port), 30)
    return gateway, port, f"http://127.0.0.1:{port}"


async def _serves(port: int) -> bool:
    status, body = await probe.get("127.0.0.1", port, "/status")
    return status == 200 and b'"workers":[{' in body.replace(b" ", b"")


async def _status(port: int, path: str, expected: int) -> bool:
    return (await probe.get("127.0.0.1", port, path))[0] == expected
