"""The client against a gateway that plays a script: what no real one does on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from realtime_serve.client import (
    APIConnectionError,
    AsyncClient,
    AsyncStream,
    Client,
    RateLimitError,
    ServerError,
    StreamLostError,
    Token,
)

USAGE = {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}
DONE = b"data: [DONE]\n\n"


def event(number: int, **fields: Any) -> bytes:
    return b"id: %d\ndata: %b\n\n" % (number, json.dumps(fields).encode())


def token(number: int) -> bytes:
    return event(number, request_id="r", index=number - 1, token=str(number), text=str(number))


def tokens(first: int, last: int) -> bytes:
    return b"".join(token(number) for number in range(first, last + 1))


def end(number: int = 4) -> bytes:
    return event(number, request_id="r", finish_reason="stop", usage=USAGE, metrics={})


def problem(code: str) -> bytes:
    return event(0, error={"message": code, "type": "server_error", "code": code})


def stream(body: bytes) -> bytes:
    """A whole response; it ends with its connection, so its end may be missing."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    return head + b"X-Request-Id: r\r\nConnection: close\r\n\r\n" + body


def refusal(status: int, code: str, **headers: str) -> bytes:
    body = json.dumps(
        {"error": {"message": code, "code": code, "param": headers.pop("param", None)}}
    )
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return (
        f"HTTP/1.1 {status} No\r\nContent-Type: application/json\r\n{lines}"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    ).encode()


WHOLE = stream(tokens(1, 4) + end() + DONE)


@asynccontextmanager
async def gateway(*script: bytes) -> AsyncIterator[tuple[str, list[str]]]:
    """One that gives these answers in turn: its URL, and the requests that came."""
    left, seen = list(script), []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            after = [line[15:] for line in head.split("\r\n") if line.startswith("Last-Event-ID:")]
            seen.append(" ".join([*head.split(" ", 2)[:2], *after]))
            writer.write(left.pop(0) if left else refusal(500, "script_is_over"))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen
    server.close()
    await server.wait_closed()


@asynccontextmanager
async def play(*script: bytes, **settings: Any) -> AsyncIterator[tuple[AsyncClient, list[str]]]:
    """A client of one such gateway; and the requests that came."""
    async with gateway(*script) as (url, seen), AsyncClient(url, **settings) as client:
        yield client, seen


async def read(of: AsyncStream) -> tuple[str, Exception | None]:
    """The text, and the error it ended with."""
    found: list[Token] = []
    try:
        async for one in of:
            found.append(one)
    except Exception as error:
        return "".join(one.text for one in found), error
    return "".join(one.text for one in found), None


@pytest.mark.parametrize("code", ["store_unavailable", "gateway_draining", "slow_client"])
async def test_tokens_in_front_of_a_passing_error_are_kept(code: str) -> None:
    script = stream(tokens(1, 2) + problem(code) + token(3)), stream(tokens(3, 4) + end() + DONE)
    async with play(*script) as (client, seen):
        it = client.stream("x", model="m")
        assert await read(it) == ("1234", None)
        assert it.answer.text == "1234"
    assert seen == ["POST /infer_stream", "GET /requests/r/stream 2"]


async def test_tokens_in_front_of_a_final_error_are_given() -> None:
    async with play(stream(tokens(1, 3) + problem("engine_failed"))) as (client, seen):
        it = client.stream("x", model="m")
        text, error = await read(it)
        assert text == "123"
        assert type(error) is ServerError
        assert (error.code, error.request_id, it.last) == ("engine_failed", "r", 3)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "body", [tokens(1, 2) + token(4), tokens(1, 2) + end(4), tokens(1, 2) + end(1) + DONE]
)
async def test_a_gap_is_never_silent(body: bytes) -> None:
    async with play(stream(body)) as (client, seen):
        text, error = await read(client.stream("x", model="m"))
        assert text == "12"
        assert type(error) is StreamLostError
        assert error.code == "stream_gap"
    assert len(seen) == 1


async def test_what_comes_twice_is_given_once() -> None:
    script = stream(tokens(1, 3)), stream(tokens(1, 4) + tokens(2, 3) + end() + DONE)
    async with play(*script) as (client, _):
        assert await read(client.stream("x", model="m")) == ("1234", None)


@pytest.mark.parametrize("cut", range(0, len(tokens(1, 4) + end() + DONE), 7))
async def test_a_cut_anywhere(cut: int) -> None:
    body = tokens(1, 4) + end() + DONE
    whole = body[:cut].count(b"\n\n")
    last = min(whole, 4)
    script = stream(body[:cut]), stream(tokens(last + 1, 4) + end() + DONE)
    async with play(*script) as (client, seen):
        it = client.stream("x", model="m")
        assert await read(it) == ("1234", None)
        assert it.answer.usage is not None
    assert seen == ["POST /infer_stream", f"GET /requests/r/stream {last}"]


@pytest.mark.parametrize(
    "answer",
    [
        refusal(404, "request_not_found"),
        refusal(410, "request_gone"),
        refusal(400, "invalid_value", param="Last-Event-ID"),
    ],
)
async def test_a_stream_that_the_server_lost(answer: bytes) -> None:
    async with play(stream(tokens(1, 2)), answer) as (client, seen):
        text, error = await read(client.stream("x", model="m"))
        assert text == "12"
        assert type(error) is StreamLostError
        assert error.status in (400, 404, 410)
        assert error.request_id == "r"
    assert len(seen) == 2


async def test_a_busy_server_is_asked_again_when_it_says() -> None:
    busy = refusal(503, "queue_full", Retry_After="0.2")
    async with play(busy, busy, WHOLE) as (client, seen):
        began = asyncio.get_running_loop().time()
        assert await read(client.stream("x", model="m")) == ("1234", None)
        assert 0.4 <= asyncio.get_running_loop().time() - began < 2
    assert seen == ["POST /infer_stream"] * 3


async def test_a_server_that_stays_busy(caplog: pytest.LogCaptureFixture) -> None:
    busy = refusal(503, "queue_full")
    with caplog.at_level(logging.WARNING, "realtime_serve.client"):
        async with play(*[busy] * 50, patience_s=0.3) as (client, seen):
            _, error = await read(client.stream("x", model="m"))
    assert type(error) is ServerError
    assert (error.code, error.status) == ("queue_full", 503)
    assert 3 <= len(seen) < 10
    assert [record.message for record in caplog.records] == [
        "queue_full; trying again for up to 0 s"
    ]


async def test_an_accepted_stream_that_is_always_cut_is_given_up() -> None:
    async with play(*[stream(b"")] * 50, patience_s=0.3) as (client, seen):
        text, error = await read(client.stream("x", model="m"))
    assert (text, type(error)) == ("", APIConnectionError)
    assert 3 <= len(seen) < 10


@pytest.mark.parametrize(
    ("status", "code"),
    [(429, "rate_limit_exceeded"), (502, "engine_failed"), (504, "queue_timeout"), (500, "x")],
)
async def test_what_is_not_asked_again(status: int, code: str) -> None:
    refused = refusal(status, code, retry_after_ms="1500")
    async with play(refused, WHOLE) as (client, seen):
        text, error = await read(client.stream("x", model="m"))
        assert isinstance(error, RateLimitError | ServerError) or code == "queue_timeout"
        assert getattr(error, "retry_after_s", None) == 1.5
    assert (text, len(seen)) == ("", 1)


async def test_questions_are_asked_again_too() -> None:
    reply = b'{"models": {"m": {}}, "total_models": 1}'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    good = head % len(reply) + reply
    async with play(good[:-5], refusal(502, "x"), b"", good) as (client, seen):
        assert await client.models() == {"m": {}}
    assert seen == ["GET /models"] * 4


async def test_signs_of_life_are_progress() -> None:
    script = [stream(b": keep-alive\n")] * 12
    async with play(*script, WHOLE, patience_s=0.3) as (client, seen):
        assert await read(client.stream("x", model="m")) == ("1234", None)
    assert len(seen) == 13


async def test_streams_that_notice_the_same_death_move_on_together() -> None:
    async with (
        gateway(b"", b"", b"") as (dead, asked),
        gateway(WHOLE, WHOLE, WHOLE) as (good, answered),
        gateway() as (other, spared),
        AsyncClient([dead, good, other]) as client,
    ):
        found = await asyncio.gather(*[read(client.stream("x", model="m")) for _ in range(3)])
    assert found == [("1234", None)] * 3
    assert (len(asked), len(answered), len(spared)) == (3, 3, 0)


async def test_a_connection_whose_end_comes_late_is_used_again() -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = next(line[15:] for line in head.split(b"\r\n") if b"Content-Length:" in line)
                await reader.readexactly(int(size))
                body = tokens(1, 4) + end() + DONE
                answer = stream(b"%x\r\n%b\r\n" % (len(body), body))
                writer.write(answer.replace(b"Connection: close", b"Transfer-Encoding: chunked"))
                await asyncio.sleep(0.05)
                writer.write(b"0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with AsyncClient(f"http://127.0.0.1:{port}") as client:
        for _ in range(3):
            assert await read(client.stream("x", model="m")) == ("1234", None)
    assert connections == 1
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("reply", [b"", stream(b"")])
async def test_threads_that_wait_when_the_client_is_closed(reply: bytes) -> None:
    """Between two attempts, too: nobody waits for ever."""
    async with gateway(*[reply] * 50) as (url, seen):
        client = Client(url)

        def wait() -> None:
            with pytest.raises(RuntimeError, match="closed"):
                client.infer("x", model="m")

        waiting = [asyncio.create_task(asyncio.to_thread(wait)) for _ in range(3)]
        while len(seen) < 9:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(client.close)
        async with asyncio.timeout(1):
            await asyncio.gather(*waiting)
