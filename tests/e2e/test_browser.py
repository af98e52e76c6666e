"""The browser example in a real browser, watched over its debugging protocol."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import redis
from cluster import ROOT, Cluster, free_port
from gateway_site import letters

from shared import keys

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--remote-debugging-port=0"
)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


HELD = ": still here\n\n"
"""A stream that is held for a while, and then cut."""


class Pages(BaseHTTPRequestHandler):
    """A load balancer in front of a gateway: it answers some requests with pages of its own.

    Args:
        posts: what becomes of each further POST: a status and a body; then all are streams.
        asked: gets the Idempotency-Key of each POST that came.
    """

    def __init__(self, posts: list[tuple[int, str]], asked: list[str], *args: Any) -> None:
        self._posts = posts
        self._asked = asked
        super().__init__(*args)

    def log_message(self, *args: object) -> None:
        pass

    def do_OPTIONS(self) -> None:
        self._answer(204, "")

    def do_GET(self) -> None:
        self._answer(200, json.dumps({"data": [{"id": "m"}]}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._asked.append(self.headers["Idempotency-Key"])
        chunk = {"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}]}
        stream = f"id: 1\ndata: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        self._answer(*self._posts.pop(0) if self._posts else (200, stream))

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        for name in ("Origin", "Headers"):
            self.send_header(f"Access-Control-Allow-{name}", "*")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body == HELD:
            self.wfile.flush()
            time.sleep(1.5)
        self.wfile.write(body.encode())


@contextmanager
def serve(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def page() -> Iterator[str]:
    """The address of the examples folder on a web server of its own: another origin."""
    with serve(functools.partial(Quiet, directory=str(ROOT / "examples"))) as url:
        yield f"{url}/browser.html"


class Tab:
    """A page in the browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket

    async def text(self, element: str) -> str:
        expression = f"document.getElementById('{element}')?.textContent ?? ''"
        await self._socket.send_json(
            {"id": 1, "method": "Runtime.evaluate", "params": {"expression": expression}}
        )
        reply: dict[str, Any] = await self._socket.receive_json()
        return str(reply["result"]["result"]["value"])

    async def until(self, element: str, word: str) -> None:
        async with asyncio.timeout(30):
            while word not in await self.text(element):
                await asyncio.sleep(0.05)


@asynccontextmanager
async def browse(url: str, profile: Path) -> AsyncIterator[Tab]:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on PATH")
    command = [browser, *FLAGS.split(), f"--user-data-dir={profile}", url]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        chosen = profile / "DevToolsActivePort"
        async with asyncio.timeout(20):
            while not chosen.exists() or len(chosen.read_text().splitlines()) < 2:
                await asyncio.sleep(0.05)
        port = chosen.read_text().splitlines()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as reply:
                tabs = await reply.json()
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(address) as socket:
                yield Tab(socket)
    finally:
        # A folder for its socket that it leaves behind when it is ended.
        link = profile / "SingletonSocket"
        own = link.readlink().parent if link.is_symlink() else None
        process.terminate()
        process.wait()
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)


async def check(cluster: Cluster, tab: Tab) -> None:
    """The page has every token of the one request that ran."""
    await tab.until("state", "done, 256 tokens")
    with redis.Redis.from_url(cluster.redis.url) as client:
        facts: Any = client.xrange(keys.ENDED)
    ((_, fields),) = facts
    # The seed of a request that names none.
    seed = int(fields[b"rid"][:16], 16) >> 1
    assert await tab.text("answer") == letters(seed, 256)


async def test_the_page_streams_an_answer(page: str, tmp_path: Path) -> None:
    with Cluster(tmp_path, cors_origins=page.rpartition("/")[0]) as cluster:
        cluster.up(control=False)
        async with browse(f"{page}?url={cluster.url}&ask=hello", tmp_path / "profile") as tab:
            await check(cluster, tab)


async def test_the_page_goes_on_after_its_gateway_died(page: str, tmp_path: Path) -> None:
    with Cluster(tmp_path, cors_origins="*", echo_step_ms=10) as cluster:
        cluster.up(control=False)
        async with browse(f"{page}?url={cluster.url}&ask=hello", tmp_path / "profile") as tab:
            await tab.until("state", "tokens")
            cluster.processes[0].kill()
            cluster.start("gateway", port=cluster.ports[0])
            await check(cluster, tab)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_the_page_goes_on_at_another_gateway(
    page: str, tmp_path: Path, number: signal.Signals
) -> None:
    with Cluster(tmp_path, cors_origins="*", echo_step_ms=10) as cluster:
        cluster.up(gateways=2, control=False)
        urls = ",".join(f"http://127.0.0.1:{port}" for port in cluster.ports)
        async with browse(f"{page}?url={urls}&ask=hello", tmp_path / "profile") as tab:
            await tab.until("state", "tokens")
            cluster.processes[0].signal(number)
            await asyncio.to_thread(cluster.processes[0].popen.wait, 10)
            # It was not over before.
            assert "done" not in await tab.text("state")
            await check(cluster, tab)


async def test_the_page_asks_once_of_a_gateway_that_is_away(page: str, tmp_path: Path) -> None:
    with Cluster(tmp_path, cors_origins="*") as cluster:
        cluster.up(control=False)
        urls = f"http://127.0.0.1:{free_port()},{cluster.url}"
        async with browse(f"{page}?url={urls}&ask=hello", tmp_path / "profile") as tab:
            await check(cluster, tab)


async def test_the_page_tells_what_it_waits_for(page: str, tmp_path: Path) -> None:
    with Cluster(tmp_path, cors_origins="*") as cluster:
        cluster.up(control=False)
        # Scaled to zero, and back.
        cluster.processes[1].signal(signal.SIGTERM)
        await asyncio.to_thread(cluster.processes[1].popen.wait, 10)
        async with browse(f"{page}?url={cluster.url}&ask=hello", tmp_path / "profile") as tab:
            await tab.until("state", "waiting for a worker to start")
            cluster.start("worker")
            await check(cluster, tab)


async def test_another_origin_is_not_allowed(page: str, tmp_path: Path) -> None:
    with Cluster(tmp_path, cors_origins="http://example.invalid") as cluster:
        cluster.up(control=False)
        async with browse(f"{page}?url={cluster.url}&ask=hello", tmp_path / "profile") as tab:
            await tab.until("state", "error:")


PAGE = "<html><h1>Oops</h1></html>"


def problem(code: str) -> str:
    return json.dumps({"error": {"message": f"It was {code}.", "code": code}})


@pytest.mark.parametrize(
    ("answers", "state"),
    [
        ([(404, PAGE)], "error: the server answered with status 404"),
        ([(403, "")], "error: the server answered with status 403"),
        ([(400, problem("invalid_value"))], "error: It was invalid_value."),
        # Asked again with its key, it would run again.
        ([(502, problem("engine_failed"))], "error: It was engine_failed."),
        ([(502, PAGE), (500, PAGE), (503, problem("queue_full"))], "done, 1 tokens"),
        ([(408, PAGE), (425, PAGE), (429, problem("rate_limit_exceeded"))], "done, 1 tokens"),
    ],
)
async def test_the_status_says_whether_the_page_asks_again(
    page: str, tmp_path: Path, answers: list[tuple[int, str]], state: str
) -> None:
    asked: list[str] = []
    with serve(functools.partial(Pages, list(answers), asked)) as url:
        async with browse(f"{page}?url={url}&ask=hello", tmp_path / "profile") as tab:
            await tab.until("state", state)
    assert len(asked) == len(answers) + state.startswith("done")
    assert len(set(asked)) == 1


async def test_a_connection_that_is_held_is_a_sign_of_life(page: str, tmp_path: Path) -> None:
    answers = [(502, PAGE), (200, HELD), (200, HELD), (200, HELD)]
    with serve(functools.partial(Pages, answers, [])) as url:
        address = f"{page}?url={url}&ask=hello&patience=3"
        async with browse(address, tmp_path / "profile") as tab:
            await tab.until("state", "done, 1 tokens")
