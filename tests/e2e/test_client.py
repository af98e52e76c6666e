"""The Python client against real processes that die, stop and lie."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from client_site import Proxy, Stand
from cluster import ROOT, free_port
from gateway_site import letters, until

from realtime_serve.client import (
    Answer,
    APIConnectionError,
    APIError,
    AsyncClient,
    AsyncStream,
    BadRequestError,
    Client,
    ConflictError,
    DeadlineError,
    NotFoundError,
    RateLimitError,
    RequestCancelledError,
    ServerError,
    StreamLostError,
    Token,
    Usage,
)
from shared import keys

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]

CHAT = [{"role": "user", "content": "hello"}]
TOKENS = 200
SOON_S = 1.0
"""Far below every timeout: what takes less than this was noticed, not waited for."""


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with Stand(tmp_path_factory.mktemp("client")) as found:
        yield found


@pytest.fixture
def stand(standing: Stand) -> Iterator[Stand]:
    yield standing
    standing.mend()


@pytest.fixture
async def client(stand: Stand) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(stand.urls, read_timeout_s=5) as found:
        yield found


@pytest.fixture
async def proxy(stand: Stand) -> AsyncIterator[Proxy]:
    async with Proxy(stand.cluster.ports[0]) as found:
        yield found


def check(tokens: list[Token], seed: int, count: int = TOKENS, after: int = 0) -> None:
    """Every token is there, once, in order."""
    assert [token.index for token in tokens] == list(range(after, count))
    assert "".join(token.text for token in tokens) == letters(seed, count)[after:]


def check_answer(answer: Answer, seed: int, count: int = TOKENS) -> None:
    assert answer.text == letters(seed, count)
    assert answer.tokens == list(letters(seed, count))
    assert answer.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == count


async def read(stream: AsyncStream, at: int, then: Callable[[], Any]) -> tuple[list[Token], float]:
    """All tokens, and the longest time between two of them; something happens at one of them."""
    tokens: list[Token] = []
    longest_s, before = 0.0, time.monotonic()
    async for token in stream:
        now = time.monotonic()
        longest_s, before = max(longest_s, now - before), now
        tokens.append(token)
        if len(tokens) == at:
            then()
    return tokens, longest_s


async def read_until_it_fails(
    stream: AsyncStream, at: int, then: Callable[[], Awaitable[Any]]
) -> tuple[list[Token], APIError]:
    """The tokens that came, and how it ended; something happens at one of them."""
    tokens: list[Token] = []
    try:
        async for token in stream:
            tokens.append(token)
            if len(tokens) == at:
                await then()
    except APIError as error:
        return tokens, error
    raise AssertionError("it did not fail")


async def status_is(client: AsyncClient, request_id: str, status: str) -> bool:
    return (await client.request(request_id)).status == status


# What it does when nothing goes wrong.


async def test_answers_in_one_piece(client: AsyncClient) -> None:
    answer = await client.infer("hi", model="echo", max_tokens=20, seed=7)
    check_answer(answer, 7, 20)
    assert answer.usage == Usage(2, 20, 22)
    assert answer.metrics["total_ms"] > 0
    state = await client.request(answer.request_id)
    assert (state.status, state.completion_tokens, state.priority) == ("completed", 20, "normal")
    answer = await client.chat(CHAT, model="echo", max_tokens=20, seed=7, priority="high")
    check_answer(answer, 7, 20)
    assert (await client.request(answer.request_id)).priority == "high"


async def test_streams(client: AsyncClient) -> None:
    stream = client.stream("hi", model="echo", max_tokens=20, seed=8)
    assert stream.request_id == ""
    check([token async for token in stream], 8, 20)
    check_answer(stream.answer, 8, 20)
    assert stream.answer.request_id == stream.request_id
    async with client.stream_chat(CHAT, model="echo", max_tokens=20, seed=8) as chat:
        assert chat.request_id
        with pytest.raises(RuntimeError, match="not read to its end"):
            _ = chat.answer
        check([token async for token in chat], 8, 20)
    check_answer(chat.answer, 8, 20)
    # It stays at its end.
    assert [token async for token in chat] == []


async def test_a_connection_is_used_again(proxy: Proxy) -> None:
    async with AsyncClient(proxy.url) as client:
        for _ in range(5):
            await client.infer("hi", model="echo", max_tokens=2)
            await client.models()
    assert proxy.connections == 1


async def test_what_the_cluster_says_of_itself(client: AsyncClient) -> None:
    assert (await client.models())["echo"]["chat"] is True
    assert (await client.status())["status"] == "healthy"


async def test_a_stream_that_has_ended_can_be_read_again(client: AsyncClient) -> None:
    answer = await client.infer("hi", model="echo", max_tokens=20, seed=9)
    check([token async for token in client.resume(answer.request_id)], 9, 20)
    rest = client.resume(answer.request_id, after=15)
    check([token async for token in rest], 9, 20, after=15)
    assert rest.answer.text == letters(9, 20)[15:]
    assert rest.answer.usage == answer.usage


async def test_the_synchronous_client(stand: Stand) -> None:
    def use() -> None:
        with Client(stand.urls) as client:
            check_answer(client.infer("hi", model="echo", max_tokens=20, seed=10), 10, 20)
            check_answer(client.chat(CHAT, model="echo", max_tokens=20, seed=10), 10, 20)
            stream = client.stream("hi", model="echo", max_tokens=20, seed=10)
            check(list(stream), 10, 20)
            check_answer(stream.answer, 10, 20)
            with client.stream_chat(CHAT, model="echo", max_tokens=20, seed=10) as chat:
                assert chat.request_id
                check(list(chat), 10, 20)
            check(list(client.resume(stream.request_id, after=5)), 10, 20, after=5)
            assert client.request(stream.request_id).status == "completed"
            assert client.cancel(stream.request_id).status == "completed"
            assert list(client.models()) == ["echo"]
            assert client.status()["status"] == "healthy"
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            client.models()

    await asyncio.to_thread(use)


# What it survives.


@pytest.mark.parametrize("kind", ["infer", "chat"])
async def test_the_gateway_is_killed(stand: Stand, client: AsyncClient, kind: str) -> None:
    if kind == "infer":
        stream = client.stream("hi", model="echo", max_tokens=TOKENS, seed=20)
    else:
        stream = client.stream_chat(CHAT, model="echo", max_tokens=TOKENS, seed=20)
    tokens, longest_s = await read(stream, 30, stand.gateways[0].kill)
    check(tokens, 20)
    check_answer(stream.answer, 20)
    assert longest_s < SOON_S
    # The next request does not begin with the dead one.
    began = time.monotonic()
    await client.infer("hi", model="echo", max_tokens=1)
    assert time.monotonic() - began < SOON_S


async def test_the_only_gateway_is_killed_and_comes_back(stand: Stand) -> None:
    async with AsyncClient(stand.urls[0]) as client:
        stream = client.stream("hi", model="echo", max_tokens=TOKENS, seed=21)

        def replace() -> None:
            stand.gateways[0].kill()
            port = stand.cluster.ports[0]
            stand.gateways[0] = stand.cluster.start("gateway", port=port)

        tokens, _ = await read(stream, 30, replace)
        check(tokens, 21)


async def test_a_worker_is_killed(stand: Stand, client: AsyncClient) -> None:
    count = 600
    streams = [client.stream("hi", model="echo", max_tokens=count, seed=i) for i in range(4)]
    reads = [asyncio.create_task(read(stream, 0, print)) for stream in streams]
    await until(lambda: all(stream.last > 10 for stream in streams))
    worker = await asyncio.to_thread(stand.busy_worker)
    worker.kill()
    assert not any(task.done() for task in reads)
    for seed, task in enumerate(reads):
        tokens, _ = await task
        check(tokens, seed, count)


async def test_the_connection_breaks_again_and_again(stand: Stand, proxy: Proxy) -> None:
    chance = random.Random(3)
    for seed, kind in ((22, "infer"), (23, "chat")):
        proxy.cuts = iter([chance.randint(1, 3000) for _ in range(30)])
        before = proxy.connections
        async with AsyncClient(proxy.url) as client:
            if kind == "infer":
                stream = client.stream("hi", model="echo", max_tokens=TOKENS, seed=seed)
            else:
                stream = client.stream_chat(CHAT, model="echo", max_tokens=TOKENS, seed=seed)
            check([token async for token in stream], seed)
        check_answer(stream.answer, seed)
        assert proxy.connections - before > 5
    assert len(set(proxy.keys)) == 2


async def test_a_proxy_that_names_requests(proxy: Proxy, client: AsyncClient) -> None:
    async with AsyncClient(proxy.url) as behind:
        # As an ingress does; the name comes back to the client.
        behind._wire._headers["X-Request-Id"] = "f" * 32
        proxy.cuts = iter([2000])
        stream = behind.stream("hi", model="echo", max_tokens=TOKENS, seed=24)
        check([token async for token in stream], 24)
        assert proxy.connections > 1
        async with behind.stream("hi", model="echo", max_tokens=500) as left:
            await anext(left)
        await until(lambda: status_is(client, left.request_id, "cancelled"), SOON_S)


async def test_a_gateway_that_hangs(stand: Stand) -> None:
    async with AsyncClient(stand.urls, read_timeout_s=0.5) as client:
        stream = client.stream("hi", model="echo", max_tokens=TOKENS, seed=24)
        tokens, longest_s = await read(stream, 30, lambda: stand.gateways[0].signal(signal.SIGSTOP))
        check(tokens, 24)
        assert 0.4 < longest_s < 0.5 + SOON_S


async def test_a_hanging_gateway_is_left_before_it_answered(stand: Stand) -> None:
    stand.gateways[0].signal(signal.SIGSTOP)
    async with AsyncClient(stand.urls, read_timeout_s=0.5) as client:
        answer = await client.infer("hi", model="echo", max_tokens=20, seed=25)
    check_answer(answer, 25, 20)


async def test_silence_with_signs_of_life_is_waited_for(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("slow")
    with Stand(folder, echo_step_ms=1500, lease_ms=10_000) as slow:
        async with (
            Proxy(slow.cluster.ports[0]) as proxy,
            AsyncClient(proxy.url, read_timeout_s=0.5, patience_s=0.5) as client,
        ):
            answer = await client.infer("hi", model="echo", max_tokens=2, seed=26)
            check_answer(answer, 26, 2)
            assert proxy.connections == 1


async def test_a_gateway_that_drains(stand: Stand, client: AsyncClient) -> None:
    stream = client.stream("hi", model="echo", max_tokens=TOKENS, seed=27)
    tokens, longest_s = await read(stream, 30, lambda: stand.gateways[0].signal(signal.SIGTERM))
    check(tokens, 27)
    assert longest_s < SOON_S
    assert await asyncio.to_thread(stand.gateways[0].popen.wait, 10) == 0


@pytest.mark.parametrize("kind", ["infer", "chat", "stream"])
async def test_a_request_whose_reply_is_lost_runs_once(
    stand: Stand, proxy: Proxy, kind: str
) -> None:
    before = len(stand.ended())
    proxy.swallow = 2
    async with AsyncClient(proxy.url) as client:
        if kind == "infer":
            answer = await client.infer("hi", model="echo", max_tokens=20, seed=28)
        elif kind == "chat":
            answer = await client.chat(CHAT, model="echo", max_tokens=20, seed=28)
        else:
            stream = client.stream("hi", model="echo", max_tokens=20, seed=28)
            check([token async for token in stream], 28, 20)
            answer = stream.answer
        check_answer(answer, 28, 20)
    assert [line.partition(" ")[0] for line in proxy.requests] == ["POST"] * 3
    assert len(set(proxy.keys)) == 1
    assert stand.ended()[before:] == [answer.request_id]


async def test_many_streams_and_a_gateway_dies(stand: Stand, client: AsyncClient) -> None:
    before, answered = len(stand.ended()), len(stand.ended("cancelled"))

    async def one(seed: int) -> None:
        count = 100 + seed
        if seed % 2:
            stream = client.stream("hi", model="echo", max_tokens=count, seed=seed)
        else:
            stream = client.stream_chat(CHAT, model="echo", max_tokens=count, seed=seed)
        streams.append(stream)
        check([token async for token in stream], seed, count)

    streams: list[AsyncStream] = []
    async with asyncio.TaskGroup() as group:
        for seed in range(100):
            group.create_task(one(seed))
        await until(lambda: sum(stream.last > 10 for stream in streams) > 30)
        stand.gateways[0].kill()
    # A gateway that takes too long to queue a request refuses it, and cancels what it queued.
    ids = stand.ended("cancelled")[answered:]
    assert sorted(ids) == sorted({stream.request_id for stream in streams})
    assert len(ids) == 100
    assert set(stand.ended()[before:]) == set(ids)


async def test_one_client_in_many_threads(stand: Stand) -> None:
    with Client(stand.urls) as client:

        def one(seed: int) -> None:
            count = 50 + seed
            if seed % 2:
                check(
                    list(client.stream("hi", model="echo", max_tokens=count, seed=seed)),
                    seed,
                    count,
                )
            else:
                check_answer(
                    client.chat(CHAT, model="echo", max_tokens=count, seed=seed), seed, count
                )

        def all_of_them() -> None:
            with ThreadPoolExecutor(8) as pool:
                done = [pool.submit(one, seed) for seed in range(24)]
                time.sleep(0.15)
                stand.gateways[0].kill()
                for future in done:
                    future.result()

        await asyncio.to_thread(all_of_them)


# How a stream is left.


async def _break(client: AsyncClient, ids: list[str]) -> None:
    stream = client.stream("hi", model="echo", max_tokens=2000)
    async for _ in stream:
        ids.append(stream.request_id)
        break
    del stream


async def _close(client: AsyncClient, ids: list[str]) -> None:
    async with client.stream("hi", model="echo", max_tokens=2000) as stream:
        await anext(stream)
        ids.append(stream.request_id)
    with pytest.raises(RuntimeError, match="closed"):
        await anext(stream)


async def _before_its_first_token(client: AsyncClient, ids: list[str]) -> None:
    async with client.stream_chat(CHAT, model="echo", max_tokens=2000) as stream:
        ids.append(stream.request_id)


async def _error(client: AsyncClient, ids: list[str]) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async with client.stream("hi", model="echo", max_tokens=2000) as stream:
            ids.append(stream.request_id)
            raise ZeroDivisionError


@pytest.mark.parametrize("leave", [_break, _close, _before_its_first_token, _error])
async def test_leaving_a_stream_cancels_its_request(
    client: AsyncClient, leave: Callable[[AsyncClient, list[str]], Awaitable[None]]
) -> None:
    ids: list[str] = []
    await leave(client, ids)
    gc.collect()
    await until(lambda: status_is(client, ids[0], "cancelled"), SOON_S)
    assert (await client.request(ids[0])).completion_tokens < 500


async def test_a_cancelled_task_cancels_its_request(stand: Stand, client: AsyncClient) -> None:
    before = len(stand.ended())
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await client.infer("hi", model="echo", max_tokens=2000)
    assert time.monotonic() - began < 0.2 + SOON_S
    await until(lambda: len(stand.ended()) > before, SOON_S)
    assert await status_is(client, stand.ended()[-1], "cancelled")


async def test_a_task_cancelled_before_the_gateway_answered_cancels_its_request(
    stand: Stand, client: AsyncClient
) -> None:
    before = len(stand.ended())
    stand.gateways[0].signal(signal.SIGSTOP)
    async with AsyncClient(stand.urls[0]) as other:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await other.infer("hi", model="echo", max_tokens=2000)
        stand.gateways[0].signal(signal.SIGCONT)
    await until(lambda: len(stand.ended()) > before, SOON_S)
    assert await status_is(client, stand.ended()[-1], "cancelled")


async def test_closing_the_client_leaves_its_streams(stand: Stand, client: AsyncClient) -> None:
    async with AsyncClient(stand.urls) as other:
        stream = other.stream("hi", model="echo", max_tokens=2000)
        await anext(stream)
    assert await status_is(client, stream.request_id, "cancelled")
    with pytest.raises(RuntimeError, match="closed"):
        [token async for token in stream]


async def test_leaving_in_the_synchronous_client(stand: Stand, client: AsyncClient) -> None:
    ids: list[str] = []

    def use() -> None:
        with Client(stand.urls) as it:
            with it.stream("hi", model="echo", max_tokens=2000) as stream:
                next(stream)
                ids.append(stream.request_id)
            with pytest.raises(RuntimeError, match="closed"):
                next(stream)
            for _ in (stream := it.stream("hi", model="echo", max_tokens=2000)):
                ids.append(stream.request_id)
                break
            del stream
            gc.collect()
            kept = it.stream("hi", model="echo", max_tokens=2000)
            next(kept)
            ids.append(kept.request_id)
        with pytest.raises(RuntimeError, match="closed"):
            list(kept)
        # A client that nobody closes goes with the last who holds it.
        forgotten = Client(stand.urls).stream("hi", model="echo", max_tokens=2000)
        next(forgotten)
        ids.append(forgotten.request_id)
        del forgotten
        gc.collect()

    await asyncio.to_thread(use)
    for request_id in ids:
        await until(lambda rid=request_id: status_is(client, rid, "cancelled"), SOON_S)
    await until(lambda: "realtime-serve-client" not in {t.name for t in threading.enumerate()})


async def test_the_end_of_a_program_leaves_its_streams(stand: Stand, client: AsyncClient) -> None:
    code = f"""
from realtime_serve import Client
client = Client({stand.urls!r})
stream = client.stream("hi", model="echo", max_tokens=2000)
next(stream)
print(stream.request_id)
"""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert await status_is(client, done.stdout.strip(), "cancelled")


async def test_a_thread_that_waits_when_the_client_is_closed(stand: Stand) -> None:
    def wait() -> None:
        with pytest.raises(RuntimeError, match="closed"):
            client.infer("hi", model="echo", max_tokens=2000)

    client = Client(stand.urls)
    waiting = asyncio.create_task(asyncio.to_thread(wait))
    await asyncio.sleep(0.2)
    await asyncio.to_thread(client.close)
    await asyncio.wait_for(waiting, SOON_S)


async def test_a_detached_stream_goes_on_by_itself(stand: Stand, client: AsyncClient) -> None:
    stream = client.stream("hi", model="echo", max_tokens=TOKENS, seed=30)
    first = []
    async for token in stream:
        first.append(token)
        if len(first) == 30:
            break
    await stream.detach()
    assert stream.last == 30
    # Nor does leaving a stream that another one started.
    async with AsyncClient(stand.urls[1]) as other:
        async with other.resume(stream.request_id, after=30) as second:
            await anext(second)
        rest = [token async for token in other.resume(stream.request_id, after=30)]
    check(first + rest, 30)


async def test_every_option_is_the_servers_own(client: AsyncClient) -> None:
    answer = await client.infer(
        "hi",
        model="echo",
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        seed=4,
        stop=["#"],
        priority="high",
        timeout_s=20,
    )
    assert answer.usage.completion_tokens == 3


# What it says when it cannot go on.


async def test_bad_input_names_the_parameter(client: AsyncClient) -> None:
    bad: Any
    for bad, param in (
        ({"temperature": 3}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 1.5}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"priority": "urgent"}, "priority"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"idempotency_key": "a b"}, "Idempotency-Key"),
    ):
        with pytest.raises(BadRequestError) as caught:
            await client.infer("hi", **{"model": "echo", **bad})
        assert (caught.value.status, caught.value.param) == (400, param)
        assert caught.value.message
    with pytest.raises(NotFoundError) as missing:
        await client.chat(CHAT, model="other")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    for call in (client.request, client.cancel):
        with pytest.raises(NotFoundError) as unknown:
            await call("0" * 32)
        assert unknown.value.code == "request_not_found"
    with pytest.raises(NotFoundError):
        await anext(client.resume("0" * 32))
    answer = await client.infer("hi", model="echo", max_tokens=2)
    with pytest.raises(BadRequestError) as beyond:
        await anext(client.resume(answer.request_id, after=3))
    assert beyond.value.param == "Last-Event-ID"


async def test_one_key_is_one_request(stand: Stand, client: AsyncClient) -> None:
    before = len(stand.ended())
    options: Any = {"model": "echo", "max_tokens": 20, "idempotency_key": "order-7"}
    one, two = await asyncio.gather(client.infer("hi", **options), client.infer("hi", **options))
    assert one == two
    assert stand.ended()[before:] == [one.request_id]
    with pytest.raises(ConflictError) as caught:
        await client.infer("ho", **options)
    assert caught.value.status == 409


@pytest.mark.parametrize("patience_s", [0.002, 0.2])
async def test_who_gives_up_and_asks_again_finds_it_running(
    stand: Stand, client: AsyncClient, patience_s: float
) -> None:
    before = len(stand.ended())
    options: Any = {"model": "echo", "max_tokens": 500, "seed": 7}
    options["idempotency_key"] = f"again-{patience_s}"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(patience_s):
            await client.infer("hi", **options)
    check_answer(await client.infer("hi", **options), 7, 500)
    assert len(stand.ended()) == before + 1


async def test_a_rate_limit_is_said_at_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Stand(tmp_path_factory.mktemp("limited"), requests_per_minute=1) as limited:
        async with Proxy(limited.cluster.ports[0]) as proxy, AsyncClient(proxy.url) as client:
            answer = await client.infer("hi", model="echo", max_tokens=20, seed=31)
            check_answer(answer, 31, 20)
            with pytest.raises(RateLimitError) as caught:
                await client.infer("hi", model="echo", max_tokens=20)
            assert caught.value.status == 429
            assert 1 < (caught.value.retry_after_s or 0) <= 60
            assert len(proxy.requests) == 2


async def test_the_deadline_and_a_cancel(client: AsyncClient) -> None:
    with pytest.raises(DeadlineError) as late:
        await client.infer("hi", model="echo", max_tokens=2000, timeout_s=0.3)
    assert (late.value.code, late.value.status) == ("timeout", None)
    stream = client.stream("hi", model="echo", max_tokens=2000, seed=32)
    tokens, error = await read_until_it_fails(stream, 20, lambda: client.cancel(stream.request_id))
    assert type(error) is RequestCancelledError
    assert error.request_id == stream.request_id
    # All that came in front of it was given; and it says so each time.
    check(tokens, 32, (await client.request(stream.request_id)).completion_tokens)
    with pytest.raises(RequestCancelledError):
        await anext(stream)


async def test_nobody_answers() -> None:
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    async with AsyncClient(urls, patience_s=0.5) as client:
        began = time.monotonic()
        with pytest.raises(APIConnectionError) as caught:
            await client.infer("hi", model="echo")
        assert 0.1 < time.monotonic() - began < 0.5 + SOON_S
        assert "127.0.0.1" in caught.value.message
        with pytest.raises(APIConnectionError):
            await client.models()


async def test_what_it_gave_up_can_be_resumed(stand: Stand) -> None:
    async with AsyncClient(stand.urls, patience_s=0.3) as client:
        stream = client.stream("hi", model="echo", max_tokens=TOKENS, seed=33)

        async def kill() -> None:
            for gateway in stand.gateways:
                gateway.kill()

        tokens, error = await read_until_it_fails(stream, 30, kill)
        assert type(error) is APIConnectionError
        assert error.request_id == stream.request_id
        assert stream.last == len(tokens)
        # Not in a thread of its own: processes end with the thread that started them.
        stand.mend()
        tokens += [token async for token in client.resume(stream.request_id, stream.last)]
        check(tokens, 33)


async def test_lost_data_is_said(stand: Stand, proxy: Proxy) -> None:
    async with AsyncClient(proxy.url) as client:
        stream = client.stream("hi", model="echo", max_tokens=2000, seed=34)

        async def lose() -> None:
            stand.redis.delete(keys.request(stream.request_id), keys.log(stream.request_id))
            proxy.cut()

        tokens, error = await read_until_it_fails(stream, 20, lose)
        assert type(error) is StreamLostError
        assert error.request_id == stream.request_id
        assert error.code in ("request_not_found", "log_expired")
        check(tokens, 34, len(tokens))
        assert len(tokens) >= 20


async def test_a_server_that_is_no_gateway() -> None:
    pages = itertools.cycle([b"200 OK", b"404 Not Found", b"500 Oops", b"503 Busy"])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 %b\r\nContent-Type: text/html\r\nContent-Length: 2\r\n" % next(pages)
        writer.write(head + b"Connection: close\r\n\r\nno")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with AsyncClient(url, patience_s=0.2) as client:
        for cls, code in (
            (APIError, "no_stream"),
            (NotFoundError, "http_404"),
            (ServerError, "http_500"),
            # It tries again, and then it is another page.
            (APIError, "no_stream"),
        ):
            with pytest.raises(cls) as caught:
                await client.infer("hi", model="echo")
            assert caught.value.code == code
    server.close()
    await server.wait_closed()
