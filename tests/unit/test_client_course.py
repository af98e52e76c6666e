"""The client against a gateway that plays a script: what no real one does on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
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
    course,
    wire,
)

Script = bytes | Sequence[bytes | float]
"""An answer, or its parts and the seconds between them."""

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


TOLD = ("Last-Event-ID", "X-Stream-Run")
WHOLE = stream(tokens(1, 4) + end() + DONE)
LATE = (0.3, WHOLE)
CANCELLED = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"


@asynccontextmanager
async def gateway(*script: Script) -> AsyncIterator[tuple[str, list[str]]]:
    """One that gives these answers in turn: its URL, and the requests that came."""
    left, seen, gone = list(script), [], asyncio.Event()
    busy: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        busy.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            headers = [line.partition(": ") for line in head.split("\r\n")]
            told = [value for name, _, value in headers if name in TOLD]
            seen.append(" ".join([*head.split(" ", 2)[:2], *told]))
            answer = left.pop(0) if left else refusal(500, "script_is_over")
            for part in [answer] if isinstance(answer, bytes) else answer:
                if isinstance(part, float):
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(gone.wait(), part)
                else:
                    writer.write(part)
                    await writer.drain()
        writer.close()
        busy.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen
    finally:
        gone.set()
        server.close()
        await server.wait_closed()
        if busy:
            await asyncio.wait(busy)


@asynccontextmanager
async def play(*script: Script, **settings: Any) -> AsyncIterator[tuple[AsyncClient, list[str]]]:
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


async def test_signs_of_life_of_a_connection_that_lasts_are_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(course, "LASTING_S", 0.04)
    script: Script = [stream(b": keep-alive\n"), 0.05, b": keep-alive\n"]
    async with play(*[script] * 12, WHOLE, patience_s=0.3) as (client, seen):
        assert await read(client.stream("x", model="m")) == ("1234", None)
    assert len(seen) == 13


async def test_a_sign_of_life_and_a_cut_again_and_again_are_given_up() -> None:
    async with play(*[stream(b": keep-alive\n")] * 50, patience_s=0.3) as (client, seen):
        text, error = await read(client.stream("x", model="m"))
    assert (text, type(error)) == ("", APIConnectionError)
    assert 3 <= len(seen) < 10


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


# A task that is cancelled before the gateway has answered.


async def _infer(client: AsyncClient) -> None:
    await client.infer("x", model="m")


async def _enter(client: AsyncClient) -> None:
    async with client.stream("x", model="m"):
        pass


async def _iterate(client: AsyncClient) -> None:
    async for _ in client.stream("x", model="m"):
        pass


async def timed_out(work: Awaitable[object]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.1):
            await work
        raise AssertionError("it was not cancelled")


async def until_count(seen: list[str], count: int) -> None:
    async with asyncio.timeout(2):
        while len(seen) < count:
            await asyncio.sleep(0.005)


async def test_what_others_may_have_the_key_of_is_not_cancelled() -> None:
    async with play(LATE) as (client, seen):
        await timed_out(client.infer("x", model="m", idempotency_key="k"))
    async with (
        play(stream(tokens(1, 2))) as (client, more),
        client.stream("x", model="m", idempotency_key="k") as it,
    ):
        await anext(it)
    assert seen == more == ["POST /infer_stream"]


async def test_it_goes_on_with_the_run_that_it_read() -> None:
    def run(body: bytes) -> bytes:
        return stream(body).replace(b"\r\n\r\n", b"\r\nX-Stream-Run: 7f\r\n\r\n", 1)

    async with (
        play(run(tokens(1, 2)), run(tokens(3, 4)), CANCELLED) as (client, seen),
        client.stream("x", model="m") as it,
    ):
        assert [(await anext(it)).text for _ in range(3)] == ["1", "2", "3"]
    assert seen == ["POST /infer_stream", "GET /requests/r/stream 2 7f", "DELETE /requests/r 7f"]


@pytest.mark.parametrize("ask", [_infer, _enter, _iterate])
@pytest.mark.parametrize("close", [False, True])
async def test_a_task_cancelled_before_an_answer_cancels_its_request(
    ask: Callable[[AsyncClient], Awaitable[None]], close: bool
) -> None:
    async with play(LATE, CANCELLED) as (client, seen):
        began = time.monotonic()
        await timed_out(ask(client))
        assert time.monotonic() - began < 0.25
        if close:
            await client.close()
        else:
            await until_count(seen, 2)
    assert seen == ["POST /infer_stream", "DELETE /requests/r"]


async def test_closing_the_client_cancels_what_no_gateway_has_answered() -> None:
    async with play(LATE, CANCELLED) as (client, seen):
        reading = asyncio.create_task(read(client.stream("x", model="m")))
        await until_count(seen, 1)
        await client.close()
        assert seen == ["POST /infer_stream", "DELETE /requests/r"]
        text, error = await reading
        assert (text, type(error)) == ("", RuntimeError)


async def test_ctrl_c_before_an_answer_cancels_the_request() -> None:
    async with gateway((0.5, WHOLE), CANCELLED) as (url, seen):
        # Tests that run in the background hand an ignored SIGINT on.
        code = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"from realtime_serve import Client; Client({url!r}).infer('x', model='m')"
        )
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stderr=asyncio.subprocess.DEVNULL
        )
        async with asyncio.timeout(20):
            while not seen:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            program.send_signal(signal.SIGINT)
            assert await program.wait() == -signal.SIGINT
    assert seen == ["POST /infer_stream", "DELETE /requests/r"]


async def test_an_error_names_the_stream_and_not_the_attempt_to_resume_it() -> None:
    busy = refusal(503, "queue_full", X_Request_Id="f" * 32)
    async with play(stream(tokens(1, 2)), *[busy] * 50, patience_s=0.3) as (client, _):
        text, error = await read(client.stream("x", model="m"))
    assert text == "12"
    assert isinstance(error, ServerError)
    assert error.request_id == "r"


async def test_ctrl_c_when_tokens_have_come_loses_none_of_them() -> None:
    def use(url: str) -> list[str]:
        with Client(url) as client, client.stream("x", model="m") as stream:
            call = stream._thread.call

            def interrupted(coroutine: Any) -> None:
                call(coroutine)
                raise KeyboardInterrupt

            stream._thread.call = interrupted
            with pytest.raises(KeyboardInterrupt):
                next(stream)
            stream._thread.call = call
            return [token.text for token in stream]

    async with gateway(WHOLE) as (url, _):
        assert "".join(await asyncio.to_thread(use, url)) == "1234"


async def test_a_stream_detached_before_an_answer_is_made_and_not_cancelled() -> None:
    async with play(LATE, CANCELLED) as (client, seen):
        it = client.stream("x", model="m")
        await timed_out(anext(it))
        await it.detach()
    assert seen == ["POST /infer_stream"]


async def test_waiting_for_a_token_can_be_given_up_and_taken_up_again() -> None:
    async with play(LATE) as (client, seen):
        it = client.stream("x", model="m")
        await timed_out(anext(it))
        assert await read(it) == ("1234", None)
    assert seen == ["POST /infer_stream"]


@pytest.mark.parametrize("answer", [refusal(429, "rate_limit_exceeded"), b"", refusal(200, "")])
async def test_nothing_is_cancelled_where_nothing_was_accepted(
    answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with play((0.3, answer), CANCELLED) as (client, seen):
        await timed_out(_infer(client))
        await client.close()
    assert seen == ["POST /infer_stream"]
    # Of a background task whose exception nobody looked at.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_gateway_that_never_answers_does_not_keep_the_client_open(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wire, "LAST_WORDS_S", 0.2)
    async with play((30.0, WHOLE), (30.0, WHOLE)) as (client, seen):
        reading = asyncio.create_task(read(client.stream("x", model="m")))
        await until_count(seen, 1)
        await timed_out(_infer(client))
        async with asyncio.timeout(1):
            await client.close()
            text, error = await reading
        assert (text, type(error)) == ("", RuntimeError)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
