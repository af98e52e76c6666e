"""Rate limits, bad input that changes nothing, too many connections."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from gateway_site import Site, model_card, open_site, until

from control.settling import settle
from shared import keys
from shared.errors import StoreUnavailable

BODY = {"model": "echo", "prompt": "hello", "max_tokens": 5, "seed": 5}


async def test_requests_a_minute(redis_url: str) -> None:
    async with open_site(redis_url, requests_per_minute=2) as site:
        for left in (1, 0):
            status, _, headers = await site.post("/infer", BODY)
            assert status == 200
            assert headers["x-ratelimit-limit-requests"] == "2"
            assert headers["x-ratelimit-remaining-requests"] == str(left)
            assert headers["x-ratelimit-reset-requests"].endswith("s")
            assert "x-ratelimit-limit-tokens" not in headers
            assert headers["RateLimit-Policy"] == '"requests";q=2;w=60'
            assert headers["RateLimit"].startswith(f'"requests";r={left};t=')
        status, reply, headers = await site.post("/infer_stream", BODY)
        assert status == 429
        assert reply["error"]["code"] == "rate_limit_exceeded"
        assert reply["error"]["type"] == "requests"
        assert 28 <= int(headers["Retry-After"]) <= 30
        assert 28_000 <= int(headers["retry-after-ms"]) <= 30_000
        assert headers["x-ratelimit-remaining-requests"] == "0"
        # Others have their own bucket.
        assert (await site.post("/infer", {**BODY, "client_id": "other"}))[0] == 200
        _, text, _ = await site.get("/metrics")
        assert 'rts_rate_limited_total{model_name="echo",priority="normal"} 1.0' in text


async def test_tokens_a_minute(redis_url: str) -> None:
    async with open_site(redis_url, tokens_per_minute=25) as site:
        _, _, headers = await site.post("/infer_stream", BODY)
        assert headers["x-ratelimit-limit-tokens"] == "25"
        assert headers["x-ratelimit-remaining-tokens"] == "15"
        await site.post("/infer", BODY)
        status, reply, _ = await site.post("/infer", BODY)
        assert (status, reply["error"]["type"]) == (429, "tokens")
        status, reply, _ = await site.post("/infer", {**BODY, "max_tokens": 50})
        assert (status, reply["error"]["code"]) == (400, "request_too_large")
        assert reply["error"]["param"] == "max_tokens"


async def test_what_the_queue_refuses_is_given_back(redis_url: str) -> None:
    async with open_site(redis_url, queue_limit=1, tokens_per_minute=20) as site:
        site.worker.room = 0
        held = await site.http.post(site.url("/infer_stream"), json=BODY)
        for _ in range(5):
            assert (await site.post("/infer", BODY))[0] == 503
        held.close()
        site.worker.room = 8
        await until(lambda: _tokens_left(site, 10))
        assert (await site.post("/infer", BODY))[0] == 200


async def test_an_attached_request_is_charged_once(redis_url: str) -> None:
    async with open_site(redis_url, tokens_per_minute=20) as site:
        key = {"Idempotency-Key": "k"}
        for _ in range(5):
            assert (await site.post("/infer", BODY, key))[0] == 200
            await until(lambda: _tokens_left(site, 10))


async def test_who_comes_again_gets_in_at_the_limit(redis_url: str) -> None:
    async with open_site(redis_url, tokens_per_minute=10) as site:
        key = {"Idempotency-Key": "k"}
        _, first, _ = await site.post("/infer", BODY, key)
        assert (await site.post("/infer", BODY))[0] == 429
        status, again, _ = await site.post("/infer", BODY, key)
        assert (status, again) == (200, first)
        status, reply, _ = await site.post("/infer", {**BODY, "seed": 6}, key)
        assert (status, reply["error"]["code"]) == (409, "idempotency_conflict")


async def test_each_run_of_a_repeated_key_is_settled(redis_url: str) -> None:
    async with open_site(redis_url, tokens_per_minute=1000) as site:
        client: Any = site.store.client
        site.worker.end = ("stop", "", "")
        for _ in range(2):
            key = {"Idempotency-Key": "k"}
            _, reply, _ = await site.post("/infer", {**BODY, "max_tokens": 900}, key)
            rid = reply["request_id"]
            assert await settle(site.store, "control") == 1
            assert await _tokens_left(site, 980)
            # Its retention is over.
            await client.delete(keys.request(rid), keys.log(rid))


async def test_refusals_leave_nothing_behind(redis_url: str) -> None:
    async with open_site(redis_url, tokens_per_minute=1000, queue_limit=1) as site:
        site.worker.room = 0
        held = await site.http.post(site.url("/infer_stream"), json=BODY)
        for _ in range(10):
            assert (await site.post("/infer", BODY))[0] == 503
        await until(lambda: _tokens_left(site, 990))
        client: Any = site.store.client
        await until(lambda: _none(client, "rts:charge:*"))
        assert await client.keys("rts:settled:*") == []
        held.close()


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "k"}])
@pytest.mark.parametrize("reached", [True, False])
async def test_a_failed_enqueue_is_undone(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], reached: bool
) -> None:
    async with open_site(redis_url, tokens_per_minute=1000) as site:
        site.worker.room = 0
        enqueue = site.edge.store.enqueue

        async def lost(*args: Any, **options: Any) -> Any:
            if reached:
                await enqueue(*args, **options)
            raise StoreUnavailable("lost")

        monkeypatch.setattr(site.edge.store, "enqueue", lost)
        status, _, _ = await site.post("/infer", {**BODY, "max_tokens": 900}, headers)
        assert status == 503
        if reached:
            # The request was charged, and settles it by its end.
            await until(lambda: _ended(site))
            await settle(site.store, "control")
        await until(lambda: _tokens_left(site, 990))
        assert await site.counts() == (0, 0)
        monkeypatch.undo()
        site.worker.room = 8
        status, _, _ = await site.post("/infer", {**BODY, "max_tokens": 900}, headers)
        assert status == 200


async def test_a_failed_attempt_does_not_end_the_request_of_another(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_site(redis_url, tokens_per_minute=1000) as site:
        site.worker.frozen = True
        key = {"Idempotency-Key": "k"}
        first = asyncio.create_task(site.post("/infer", BODY, key))
        await until(lambda: site.worker.running)

        async def nothing(*args: Any, **options: Any) -> None:
            return None

        async def lost(*args: Any, **options: Any) -> Any:
            raise StoreUnavailable("lost")

        with monkeypatch.context() as patch:
            patch.setattr(site.edge.store, "attach", nothing)
            patch.setattr(site.edge.store, "enqueue", lost)
            assert (await site.post("/infer", BODY, key))[0] == 503
        await until(lambda: _tokens_left(site, 990))
        site.worker.frozen = False
        assert (await first)[0] == 200


async def test_who_leaves_while_being_charged_gets_it_back(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_site(redis_url, tokens_per_minute=1000) as site:
        limit, charged = site.edge.store.limit, asyncio.Event()

        async def slow(*args: Any) -> Any:
            await limit(*args)
            charged.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(site.edge.store, "limit", slow)
        post = asyncio.create_task(site.post("/infer", {**BODY, "max_tokens": 900}))
        await charged.wait()
        post.cancel()
        await until(lambda: _tokens_left(site, 990))


BAD: list[tuple[str, Any, int, str | None]] = [
    ("/infer", b"{", 400, None),
    ("/infer", b"[]", 400, None),
    ("/infer", b'{"model":"echo","prompt":"\xff"}', 400, None),
    ("/infer", b'{"model":"echo","prompt":"\\ud800"}', 400, None),
    ("/infer", b'{"model":"echo","prompt":"x","temperature":NaN}', 400, "temperature"),
    ("/infer", {"prompt": "x"}, 400, "model"),
    ("/infer", {"model": "echo"}, 400, "prompt"),
    ("/infer", {"model": "echo", "prompt": ""}, 400, "prompt"),
    ("/infer", {"model": "other", "prompt": "x"}, 404, "model"),
    ("/infer", {"model": "echo", "prompt": "x", "client_id": "a\nb"}, 400, "client_id"),
    ("/infer", {"model": "echo", "prompt": "x", "timeout_s": 601}, 400, "timeout_s"),
    ("/infer", {"model": "echo", "prompt": "x" * 4096}, 400, "prompt"),
    ("/infer", {"model": "echo", "prompt": "x", "max_tokens": 4096}, 400, "max_tokens"),
    ("/infer", {"model": "echo", "prompt": "x" * 1_048_577}, 413, None),
    ("/infer_stream", {"model": "echo", "prompt": "x", "stream": False}, 400, "stream"),
    ("/v1/completions", {"model": "echo", "prompt": []}, 400, "prompt"),
    ("/v1/completions", {"model": "echo", "prompt": [""]}, 400, "prompt"),
    ("/v1/completions", {"model": "echo", "prompt": [1, 257]}, 400, "prompt[1]"),
    ("/v1/chat/completions", {"model": "echo", "messages": []}, 400, "messages"),
    (
        "/v1/chat/completions",
        {"model": "echo", "messages": [{"role": "user", "content": "x" * 5000}]},
        400,
        "messages",
    ),
]


@pytest.fixture
async def limited(redis_url: str) -> Any:
    async with open_site(redis_url, requests_per_minute=100, tokens_per_minute=10_000) as site:
        yield site


async def test_bad_input_changes_nothing(limited: Site) -> None:
    for path, body, expected, param in BAD:
        status, reply, headers = await limited.post(path, body)
        shown = str(body)[:80]
        assert status == expected, shown
        assert set(reply["error"]) == {"message", "type", "param", "code"}, shown
        assert reply["error"]["param"] == param, shown
        assert headers["X-Request-Id"]
    client: Any = limited.store.client
    assert await client.keys("rts:b:*") == []
    assert await client.keys("rts:r:*") == []
    assert limited.worker.seen == []


@pytest.mark.parametrize(
    ("headers", "status", "param"),
    [
        ({"Content-Type": "text/plain"}, 415, "Content-Type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "Content-Type"),
        ({"Content-Type": "application/json; charset=utf-16"}, 415, "Content-Type"),
        ({"X-Timeout-S": "601"}, 400, "X-Timeout-S"),
        ({"X-Timeout-S": "soon"}, 400, "X-Timeout-S"),
        ({"X-Client-Id": "x" * 129}, 400, "X-Client-Id"),
        ({"Content-Encoding": "gzip"}, 400, None),
    ],
)
async def test_bad_headers(
    limited: Site, headers: dict[str, str], status: int, param: str | None
) -> None:
    body = json.dumps(BODY).encode()
    found, reply, _ = await limited.post("/infer", body, headers)
    assert (found, reply["error"]["param"]) == (status, param)
    assert limited.worker.seen == []


async def test_a_body_that_does_not_come(limited: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.requests.BODY_READ_S", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", limited.server.port)
    writer.write(b"POST /infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"Connection: close" in head
    assert b"request_timeout" in await reader.readuntil(b"}")
    writer.close()


async def test_the_numbers_of_a_prompt_that_is_too_long(site: Site) -> None:
    _, reply, _ = await site.post("/infer", {**BODY, "prompt": "x" * 4096})
    assert reply["error"]["code"] == "context_length_exceeded"
    assert "4096 tokens" in reply["error"]["message"]
    _, reply, _ = await site.post("/infer", {**BODY, "prompt": "x" * 4000, "max_tokens": 97})
    assert reply["error"]["code"] == "context_length_exceeded"
    for number in ("4096", "4097", "4000", "97"):
        assert number in reply["error"]["message"]
    assert (await site.post("/infer", {**BODY, "prompt": "x" * 4000, "max_tokens": 96}))[0] == 200


async def test_what_does_not_exist(site: Site) -> None:
    for method, path, status, code in (
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/infer", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ):
        found, reply, _ = await site.send(method, path)
        assert (found, reply["error"]["code"]) == (status, code)


async def test_a_model_without_a_template_cannot_chat(redis_url: str) -> None:
    async with open_site(redis_url, card=model_card(template="")) as site:
        chat = {"model": "echo", "messages": [{"role": "user", "content": "x"}]}
        status, reply, _ = await site.post("/v1/chat/completions", chat)
        assert (status, reply["error"]["code"]) == (400, "no_chat_template")


async def test_a_template_that_refuses(redis_url: str) -> None:
    card = model_card(template="{{ raise_exception('roles must alternate') }}")
    async with open_site(redis_url, card=card) as site:
        chat = {"model": "echo", "messages": [{"role": "user", "content": "x"}]}
        status, reply, _ = await site.post("/v1/chat/completions", chat)
        assert (status, reply["error"]["param"]) == (400, "messages")
        assert reply["error"]["message"] == "roles must alternate"


async def test_a_version_that_is_closed(site: Site) -> None:
    client: Any = site.store.client
    site.worker.beating = False
    await client.delete(keys.is_open(site.worker.mv))
    status, reply, headers = await site.post("/infer", BODY)
    assert (status, reply["error"]["code"]) == (503, "model_not_ready")
    assert headers["Retry-After"] == "1"


async def test_too_many_connections(redis_url: str) -> None:
    async with open_site(redis_url, max_connections=3) as site:
        await until(lambda: site.edge.connections() <= 1)
        streams = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", site.server.port)
            streams.append(writer)
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
        status, reply, headers = await site.post("/infer", BODY)
        assert (status, reply["error"]["code"]) == (503, "too_many_connections")
        assert headers["Connection"] == "close"
        assert headers["Retry-After"] == "1"
        for path in ("/livez", "/readyz", "/metrics"):
            assert (await site.get(path))[0] == 200
        for writer in streams:
            writer.close()
        await until(lambda: site.edge.connections() <= 1)
        assert (await site.post("/infer", BODY))[0] == 200


async def _tokens_left(site: Site, expected: int) -> bool:
    """Asks without charging: a charge of nothing."""
    size = site.edge.settings.tokens_per_minute
    limited = await site.store.limit("ip:127.0.0.1", 0, size, 0)
    return limited.tokens_left >= expected


async def _none(client: Any, pattern: str) -> bool:
    return await client.keys(pattern) == []


async def _ended(site: Site) -> bool:
    return await site.store.client.xlen(keys.ENDED) > 0
