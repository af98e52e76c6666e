"""What the shipped haproxy and nginx do to slow and greedy clients, and to busy gateways."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import aiohttp
import pytest
from balancers import BALANCERS, Balancer
from cluster import Cluster, free_port
from gateway_site import until
from required import needs

from realtime_serve.lifeline import Lifeline

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]

MOST = 14
"""Connections of an address; 1,000 as shipped."""
SLOW_S = 1
"""Time for a request; 10 s as shipped."""
TEXTS = {
    "haproxy": {
        "timeout http-request 10s": f"timeout http-request {SLOW_S}s",
        "sc0_conn_cur gt 1000": f"sc0_conn_cur gt {MOST}",
    },
    "nginx": {
        "client_header_timeout 10s": f"client_header_timeout {SLOW_S}s",
        "client_body_timeout 10s": f"client_body_timeout {SLOW_S}s",
        "limit_conn addresses 1000": f"limit_conn addresses {MOST}",
    },
}
LONG = {"model": "echo", "prompt": "a", "max_tokens": 2000}
SHORT = {**LONG, "max_tokens": 1}


@dataclass
class Front:
    """Two gateways behind a balancer; the second one starts when it is told to."""

    cluster: Cluster
    url: str
    second: int

    def start_second(self) -> None:
        if self.second not in self.cluster.ports:
            self.cluster.start("gateway", port=self.second)
            self.cluster.wait()

    def count(self, what: str) -> list[int]:
        """A gauge of each gateway."""
        pages = [self.cluster.get("/metrics", port)[1] for port in self.cluster.ports]
        return [int(float(re.findall(f"(?m)^{what} (.*)", page)[0])) for page in pages]

    def is_idle(self) -> bool:
        return not any(self.count("rts_streams"))

    async def ask(self) -> int:
        """The status of a request on a connection of its own; 0: the connection was refused."""
        async with aiohttp.ClientSession() as http:
            try:
                async with http.post(f"{self.url}/infer", json=SHORT) as reply:
                    return reply.status
            except aiohttp.ClientConnectionError:
                return 0

    async def is_served(self) -> bool:
        return await self.ask() == 200


@pytest.fixture(params=BALANCERS, scope="module")
def front(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    needs(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    texts = TEXTS[request.param]
    with Cluster(folder, echo_step_ms=50, max_connections=30) as cluster, Lifeline() as lifeline:
        cluster.up(control=False)
        second = free_port()
        ports = [*cluster.ports, second]
        with Balancer(request.param, folder, ports, lifeline, texts) as balancer:
            yield Front(cluster, f"http://127.0.0.1:{balancer.port}", second)


@asynccontextmanager
async def opened(url: str, most: int) -> AsyncIterator[int]:
    """Streams that go on, until none is taken or there are so many; they end with this."""
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession())
        count, refused = 0, 0
        while count < most and refused < 2:
            asking = http.post(f"{url}/infer_stream", json=LONG)
            if (await stack.enter_async_context(asking)).status == 200:
                count, refused = count + 1, 0
            else:
                # The place may be a question's of a moment ago: a balancer's check, or /metrics.
                refused += 1
                await asyncio.sleep(0.3)
        yield count


async def test_new_streams_go_to_the_gateway_that_has_least(front: Front) -> None:
    await until(front.is_served)
    async with opened(front.url, 6):
        front.start_second()
        # Longer than haproxy takes to see that it is there.
        await asyncio.sleep(1)
        async with opened(front.url, 6):
            # By turns the new one would have half of the new ones.
            assert front.count("rts_streams") in ([6, 6], [7, 5])


async def test_what_a_full_gateway_refuses_another_one_takes(front: Front) -> None:
    front.start_second()
    await until(front.is_idle)
    full = f"http://127.0.0.1:{front.cluster.ports[0]}"
    async with opened(full, 100) as count:
        assert 0 < count < 100
        async with aiohttp.ClientSession() as http, http.get(f"{full}/models") as reply:
            assert (await reply.json())["error"]["code"] == "too_many_connections"
        assert {await front.ask() for _ in range(10)} == {200}


async def test_an_address_has_so_many_connections_and_no_more(front: Front) -> None:
    front.start_second()
    await until(front.is_idle)
    async with opened(front.url, MOST) as count:
        assert count == MOST
        assert await front.ask() in (0, 429)
    await until(front.is_served)


HALF_A_HEAD = b"POST /infer HTTP/1.1\r\nHost: x\r\n"
HALF_A_BODY = HALF_A_HEAD + b'Content-Length: 100\r\n\r\n{"model": "echo"'


async def test_who_sends_slowly_is_cut_off(front: Front) -> None:
    port = int(front.url.rpartition(":")[2])

    async def send(sent: bytes) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.monotonic()
        writer.write(sent)
        answer = b""
        with suppress(ConnectionResetError):
            answer = await asyncio.wait_for(reader.read(), SLOW_S + 4)
        assert answer == b"" or b" 408 " in answer.partition(b"\r\n")[0]
        writer.close()
        return time.monotonic() - began

    waited = await asyncio.gather(send(HALF_A_HEAD), send(HALF_A_BODY))
    assert min(waited) > 0.9 * SLOW_S
