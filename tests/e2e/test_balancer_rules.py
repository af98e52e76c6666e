"""What the shipped haproxy and nginx do to slow and greedy clients, and to busy gateways."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import aiohttp
import pytest
from balancers import BALANCERS, Balancer
from cluster import Cluster, Process, free_port
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

    kind: str
    cluster: Cluster
    url: str
    port: int
    second: Process | None = None

    async def start_second(self) -> Process:
        if self.second is None or self.second.popen.poll() is not None:
            self.second = self.cluster.start("gateway", port=self.port, drain_delay_s=30)
            await until(lambda: self.cluster.get("/readyz", self.port)[0] == 200, 30)
        return self.second

    def count(self, what: str) -> list[int]:
        """A gauge of each gateway that runs."""
        pages = (self.cluster.get("/metrics", port)[1] for port in self.cluster.ports)
        found = (re.findall(f"(?m)^{what} (.*)", page) for page in pages if page is not None)
        return [int(float(value)) for (value,) in found]

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

    async def both_serve(self) -> None:
        """Until the balancer sends streams to both."""
        async with asyncio.timeout(20):
            while True:
                await until(self.is_idle)
                async with opened(self.url, 2):
                    if self.count("rts_streams") == [1, 1]:
                        break
        await until(self.is_idle)


@pytest.fixture(params=BALANCERS, scope="module")
def front(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    needs(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    texts = TEXTS[request.param]
    with Cluster(folder, echo_step_ms=50, max_connections=30) as cluster, Lifeline() as lifeline:
        cluster.up(control=False)
        port = free_port()
        ports = [*cluster.ports, port]
        with Balancer(request.param, folder, ports, lifeline, texts) as balancer:
            yield Front(request.param, cluster, f"http://127.0.0.1:{balancer.port}", port)


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
        await front.start_second()
        # Longer than haproxy takes to see that it is there.
        await asyncio.sleep(1)
        async with opened(front.url, 6):
            # By turns the new one would have half of the new ones.
            assert front.count("rts_streams") in ([6, 6], [7, 5])


async def test_what_a_full_gateway_refuses_another_one_takes(front: Front) -> None:
    await front.start_second()
    await until(front.is_idle)
    full = f"http://127.0.0.1:{front.cluster.ports[0]}"
    async with opened(full, 100) as count:
        assert 0 < count < 100
        async with aiohttp.ClientSession() as http, http.get(f"{full}/models") as reply:
            assert (await reply.json())["error"]["code"] == "too_many_connections"
        assert {await front.ask() for _ in range(10)} == {200}


async def test_a_dead_gateway_costs_no_request_that_has_not_begun(front: Front) -> None:
    for _ in range(3):
        victim = await front.start_second()
        await front.both_serve()
        victim.kill()
        assert {await front.ask() for _ in range(10)} == {200}


async def test_who_leaves_gets_nothing_new_from_who_asks(front: Front) -> None:
    leaving = await front.start_second()
    await front.both_serve()
    leaving.signal(signal.SIGTERM)
    await until(lambda: front.cluster.get("/readyz", front.port)[0] == 503)
    # Longer than haproxy takes to ask twice; the delay is much longer.
    await asyncio.sleep(2)
    async with opened(front.url, 6) as count:
        assert count == 6
        # nginx does not ask: it goes on until it is refused, and then elsewhere.
        assert front.count("rts_streams") == ([6, 0] if front.kind == "haproxy" else [3, 3])
    leaving.kill()


async def test_an_address_has_so_many_connections_and_no_more(front: Front) -> None:
    await front.start_second()
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
