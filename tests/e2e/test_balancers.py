"""The shipped configurations of haproxy and nginx, in front of real gateways."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from balancers import BALANCERS, Balancer
from cluster import ROOT, Cluster
from gateway_site import Site, deaf_client, letters, model_card, open_site, until
from required import needs
from yarl import URL

from realtime_serve import AsyncClient
from realtime_serve.lifeline import Lifeline
from shared.settings import Settings

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]

BODY = {"model": "echo", "prompt": "hello", "max_tokens": 20, "seed": 5}


class Front:
    """A cluster behind a balancer."""

    def __init__(self, cluster: Cluster, balancer: Balancer) -> None:
        self.cluster = cluster
        self.url = f"http://127.0.0.1:{balancer.port}"

    async def post(self, http: aiohttp.ClientSession, **more: Any) -> tuple[int, Any]:
        async with http.post(f"{self.url}/infer", json={**BODY, **more}) as reply:
            return reply.status, await reply.json()


@pytest.fixture(params=BALANCERS, scope="module")
def front(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    needs(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    settings: dict[str, Any] = {"queue_limit": 1, "trusted_proxies": "127.0.0.0/8"}
    with Cluster(folder, echo_step_ms=50, **settings) as cluster, Lifeline() as lifeline:
        cluster.up(gateways=2)
        with Balancer(request.param, folder, cluster.ports, lifeline) as balancer:
            yield Front(cluster, balancer)


async def answers(front: Front, http: aiohttp.ClientSession) -> bool:
    try:
        return (await front.post(http))[0] == 200
    except aiohttp.ClientError:
        return False


async def test_events_come_at_once(front: Front) -> None:
    async with aiohttp.ClientSession() as http:
        await until(lambda: answers(front, http))
        async with http.post(f"{front.url}/infer_stream", json=BODY) as reply:
            times = [time.monotonic() async for line in reply.content if line.startswith(b"data")]
    # 20 tokens, 50 ms apart; held back, they would come in heaps.
    gaps = [after - before for before, after in itertools.pairwise(times[:20])]
    assert len(gaps) == 19
    assert sorted(gaps)[-3] < 0.15, gaps
    assert sorted(gaps)[2] > 0.02, gaps


async def test_what_is_not_for_everybody_is_not_found(front: Front) -> None:
    async with aiohttp.ClientSession() as http:
        await until(lambda: answers(front, http))
        for path in ("/metrics", "/status", "/%6detrics", "/metrics?x=1", "/st%61tus"):
            async with http.get(URL(front.url + path, encoded=True)) as reply:
                assert reply.status == 404, path
        async with http.get(f"{front.url}/models") as reply:
            assert reply.status == 200


async def test_nobody_chooses_an_address(front: Front) -> None:
    """Or limits would be for those who do not know better, and requests of others open to all."""
    async with aiohttp.ClientSession() as http:
        await until(lambda: answers(front, http))
        claim = {"X-Forwarded-For": "203.0.113.9"}
        async with http.post(f"{front.url}/infer", json=BODY, headers=claim) as reply:
            rid = (await reply.json())["request_id"]
        # Whoever it says it is, it is the same caller.
        async with http.get(f"{front.url}/requests/{rid}") as reply:
            assert reply.status == 200
        # With the gateways' trust in loopback, the balancer's word is what counts.
        for gateway in front.cluster.ports:
            url = f"http://127.0.0.1:{gateway}/requests/{rid}"
            async with http.get(url, headers=claim) as reply:
                assert reply.status == 404


async def test_one_full_queue_takes_nothing_from_others(front: Front) -> None:
    async with aiohttp.ClientSession() as http:
        await until(lambda: answers(front, http))
        (worker,) = (p for p in front.cluster.processes if p.role == "worker")
        # It stands still: what is queued stays there.
        worker.signal(19)
        low: dict[str, Any] = {"priority": "low", "client_id": "one"}
        waiting = [asyncio.create_task(front.post(http, **low)) for _ in range(8)]
        refused = []
        async with asyncio.timeout(20):
            while len(refused) < 4:
                await asyncio.sleep(0.05)
                refused = [task.result() for task in waiting if task.done()]
                waiting += [asyncio.create_task(front.post(http, **low))]
        assert {status for status, _ in refused} == {503}
        assert {body["error"]["code"] for _, body in refused} == {"queue_full"}
        high = asyncio.create_task(front.post(http, priority="high"))
        await asyncio.sleep(0.3)
        worker.signal(18)
        status, body = await high
        assert (status, body.get("text")) == (200, letters(5, 20)), body
        await asyncio.gather(*waiting)


async def test_without_a_gateway_it_says_so_as_one_would(front: Front) -> None:
    # The last test of each: there is none after it.
    async with aiohttp.ClientSession() as http:
        await until(lambda: answers(front, http))
        for process in front.cluster.processes:
            if process.role == "gateway":
                process.kill()
        async with http.post(f"{front.url}/infer", json=BODY) as reply:
            body = await reply.json()
            assert (reply.status, body["error"]["code"]) == (503, "no_gateway")
            assert reply.headers["Retry-After"] == "1"


@pytest.mark.parametrize("kind", BALANCERS)
async def test_a_gateway_killed_in_the_middle_of_200_streams(tmp_path: Path, kind: str) -> None:
    """Clients resume at the other one, and have every token once."""
    needs(kind)
    with Cluster(tmp_path, echo_step_ms=30, max_batch_size=256) as cluster, Lifeline() as lifeline:
        cluster.up(gateways=2, control=False)
        with Balancer(kind, tmp_path, cluster.ports, lifeline) as balancer:
            under_way: set[int] = set()

            async with AsyncClient(f"http://127.0.0.1:{balancer.port}") as client:

                async def one(seed: int) -> None:
                    text = ""
                    async with client.stream(
                        "a", model="echo", max_tokens=150, seed=seed
                    ) as stream:
                        async for token in stream:
                            text += token.text
                            if token.number > 10:
                                under_way.add(seed)
                    assert text == letters(seed, 150)

                async with asyncio.TaskGroup() as tasks:
                    for seed in range(200):
                        tasks.create_task(one(seed))
                    await until(lambda: len(under_way) == 200, 30)
                    cluster.processes[0].kill()
            _, text = cluster.get("/metrics", cluster.ports[1])
            # Half of them, more or less, came to the other one.
            (resumed,) = re.findall(r"^rts_stream_resumes_total (\d+)", text, re.MULTILINE)
            assert 50 <= int(resumed) <= 150


@pytest.mark.parametrize("kind", BALANCERS)
async def test_who_does_not_read_is_cut_off_and_holds_nobody_up(
    redis_url: str, tmp_path: Path, kind: str
) -> None:
    """It is the gateway that sees it, through all that the balancer and two kernels hold."""
    needs(kind)
    async with open_site(
        redis_url, card=model_card(context=600_000), slow_client_s=0.5, slow_client_events=16
    ) as site:
        site.worker.burst = 500
        with (
            Lifeline() as lifeline,
            Balancer(kind, tmp_path, [site.server.port], lifeline) as balancer,
        ):
            url = f"http://127.0.0.1:{balancer.port}"

            async def served() -> bool:
                async with site.http.post(f"{url}/infer", json=BODY) as reply:
                    return reply.status == 200

            await until(served)
            long = {**BODY, "max_tokens": 500_000}
            deaf = [await deaf_client(balancer.port, long) for _ in range(3)]
            # Others are served meanwhile, at once.
            async with asyncio.timeout(30):
                while not await cut_off(site, len(deaf)):
                    async with asyncio.timeout(2):
                        assert await served()
                    await asyncio.sleep(0.1)
            for sock in deaf:
                sock.close()
            assert await served()


async def cut_off(site: Site, count: int) -> bool:
    """Whether so many streams have ended because their clients did not read."""
    _, page, _ = await site.get("/metrics")
    return f'"slow_client",model_name="echo",priority="normal"}} {count}.0' in page


def test_the_longest_answer_in_one_piece_is_waited_for() -> None:
    haproxy = (ROOT / "deploy/haproxy/haproxy.cfg").read_text()
    nginx = (ROOT / "deploy/nginx/nginx.conf").read_text()
    found = [
        *re.findall(r"timeout (?:client|server) (\d+)s", haproxy),
        *re.findall(r"proxy_read_timeout (\d+)s", nginx),
    ]
    assert len(found) == 3
    assert all(int(seconds) > Settings().timeout_s for seconds in found)
