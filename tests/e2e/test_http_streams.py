"""What holds a stream up: silence, slow clients, a gateway that goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from gateway_site import (
    Site,
    deaf_client,
    letters,
    model_card,
    open_site,
    raw_request,
    read_events,
    until,
)

from realtime_serve import probe

BODY = {"model": "echo", "prompt": "hello", "max_tokens": 10, "seed": 5}


async def test_the_bytes_of_a_stream(redis_url: str) -> None:
    async with open_site(redis_url, keep_alive_s=0.05) as site:
        site.worker.room = 0
        reader, writer = await raw_post(site, {**BODY, "max_tokens": 2})
        await reader.readuntil(b"\r\n\r\n")
        assert await read_chunk(reader) == b": keep-alive\n"
        assert await read_chunk(reader) == b": keep-alive\n"
        site.worker.room = 8
        text = b""
        while not text.endswith(b"[DONE]\n\n"):
            text += await read_chunk(reader)
        assert await read_chunk(reader) == b""
        writer.close()
        lines = [line for line in text.split(b"\n") if line != b": keep-alive"]
        assert lines[:2] == [b"retry: 1000", b"id: 1"]
        assert lines[2].startswith(b'data: {"request_id":"')
        assert lines[3:5] == [b"", b"id: 2"]
        assert text.count(b"retry:") == 1
        # No block without data.
        blocks = text.split(b"\n\n")
        assert blocks.pop() == b""
        assert all(b"data: " in block for block in blocks)


async def test_a_stream_waits_for_the_first_worker_of_its_model(redis_url: str) -> None:
    """Scaled to nothing: it hears signs of life, can be asked for, is served or told in time."""
    async with open_site(redis_url, keep_alive_s=0.05) as site:
        worker = site.worker
        worker.room, worker.beating = 0, False
        await site.store.depart(worker.mv, worker.engine)
        await until(lambda: _has_no_workers(site))
        reader, writer = await raw_post(site, {**BODY, "max_tokens": 3})
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(2):
            assert await read_chunk(reader) == b": keep-alive\n"
        (flow,) = site.edge.flows
        _, status, _ = await site.get(f"/requests/{flow.rid}")
        assert (status["status"], status["position"]) == ("queued", 1)
        late = await site.post("/infer_stream", {**BODY, "timeout_s": 0.2})
        assert late[1][-1].data["error"]["code"] == "queue_timeout"
        worker.room, worker.beating = 8, True
        text = b""
        while not text.endswith(b"[DONE]\n\n"):
            text += await read_chunk(reader)
        events = read_events(text.decode().replace(": keep-alive\n", ""))
        assert "".join(event.data["text"] for event in events[:3]) == letters(5, 3)
        writer.close()


async def _has_no_workers(site: Site) -> bool:
    return (await site.get("/status"))[1]["workers"] == []


async def test_a_client_that_does_not_read_is_cut(redis_url: str) -> None:
    card = model_card(context=200_000)
    async with open_site(redis_url, card=card, slow_client_s=0.3, slow_client_events=16) as site:
        site.worker.burst = 500
        # More than what the kernel takes for a client that does not read.
        long = {**BODY, "max_tokens": 100_000}
        readers = [await deaf_client(site.server.port, long) for _ in range(3)]
        # A client that reads is not held up by them.
        _, events, _ = await site.post("/infer_stream", {**BODY, "max_tokens": 4000})
        assert events[-1].data == "[DONE]"
        await until(lambda: len(site.edge.flows) == 0)
        await until(lambda: _idle(site))
        _, text, _ = await site.get("/metrics")
        assert 'finished_reason="slow_client",model_name="echo",priority="normal"} 3.0' in text
        for sock in readers:
            sock.close()
        assert (await site.post("/infer", BODY))[0] == 200


async def test_the_watch_does_not_wait_for_a_client(redis_url: str) -> None:
    async with open_site(redis_url, keep_alive_s=0.05) as site:
        site.worker.frozen = True
        _, deaf = await raw_post(site, BODY)
        await until(lambda: len(site.edge.flows) == 1)
        (flow,) = site.edge.flows
        await until(lambda: flow.response is not None)
        response: Any = flow.response
        # As if the client had been sent more than it reads, by many small writes.
        flow.request.transport.write(b" " * 20_000_000)  # type: ignore[union-attr]
        response._payload_writer.buffer_size = 10**6
        reader, writer = await raw_post(site, BODY)
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        for _ in range(5):
            assert await asyncio.wait_for(read_chunk(reader), 5) == b": keep-alive\n"
        writer.close()
        deaf.transport.abort()
        await until(lambda: _idle(site))


async def test_every_stream_ends_by_one_terminal_event(redis_url: str) -> None:
    """[DONE], an error, or a connection that is cut: one of them, once, however it ends."""
    async with open_site(redis_url, slow_client_s=0.5) as site:
        seen: dict[str, tuple[str, ...]] = {}

        async def follow(name: str, body: Any, headers: dict[str, str] | None = None) -> None:
            url = site.url("/infer_stream")
            async with site.http.post(url, json={**BODY, **body}, headers=headers) as reply:
                events = read_events(await reply.text())
            ends = [event.data for event in events if "text" not in event.data]
            ends = [data if data == "[DONE]" else next(iter(data)) for data in ends]
            seen[name] = tuple(end for end in ends if end != "request_id")

        await follow("normal", {})
        site.worker.room = 0
        await follow("timeout in the queue", {"timeout_s": 0.1})
        waiting = asyncio.create_task(follow("deleted in the queue", {}))
        await until(lambda: len(site.edge.flows) == 1)
        await _delete(site)
        await waiting
        site.worker.frozen, site.worker.room = True, 8
        await follow("timeout while running", {"timeout_s": 0.2})
        await until(lambda: not len(site.edge.flows))
        running = asyncio.create_task(follow("deleted while running", {}))
        await until(lambda: len(site.edge.flows) == 1)
        await _delete(site)
        await running
        plain = asyncio.create_task(follow("plain in a drain", {}))
        kept = asyncio.create_task(follow("kept in a drain", {}, {"X-Resumable": "60"}))
        await until(lambda: len(site.edge.flows) == 2)
        await until(lambda: all(flow.response is not None for flow in site.edge.flows))
        await site.server.drain(0.2)
        await asyncio.gather(plain, kept)
        assert seen == {
            "normal": ("[DONE]",),
            "timeout in the queue": ("error",),
            "deleted in the queue": ("error",),
            "timeout while running": ("error",),
            "deleted while running": ("error",),
            "plain in a drain": ("error",),
            # It has not ended: it goes on elsewhere.
            "kept in a drain": (),
        }


async def test_a_slow_client_gets_no_end_or_one_error(redis_url: str) -> None:
    card = model_card(context=200_000)
    async with open_site(redis_url, card=card, slow_client_s=0.3, slow_client_events=16) as site:
        site.worker.burst = 500
        reader, writer = await asyncio.open_connection("127.0.0.1", site.server.port, limit=2**30)
        writer.transport.pause_reading()
        writer.write(raw_request({**BODY, "max_tokens": 100_000}))
        await until(lambda: len(site.edge.flows) == 1)
        await until(lambda: len(site.edge.flows) == 0)
        writer.transport.resume_reading()
        text = b""
        with contextlib.suppress(ConnectionError):
            while data := await asyncio.wait_for(reader.read(2**20), 5):
                text += data
        assert b"[DONE]" not in text
        # A cut connection is an end, too: it is not the one of a whole reply.
        assert text.count(b'data: {"error"') + (not text.endswith(b"0\r\n\r\n")) == 1
        writer.close()


async def test_nothing_comes_behind_the_end(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, held = web.StreamResponse.write, asyncio.Event()

    async def write_and_wait(response: web.StreamResponse, data: bytes) -> None:
        # As for a client that reads no more, when all is in a buffer.
        await write(response, data)
        if b"[DONE]" in data:
            held.set()
            await asyncio.sleep(60)

    monkeypatch.setattr(web.StreamResponse, "write", write_and_wait)
    async with open_site(redis_url, slow_client_s=0.2) as site:
        _, events, _ = await site.post("/infer_stream", BODY)
        assert held.is_set()
        assert events[-1].data == "[DONE]"
        assert [event.id for event in events[:-2]] == list(range(1, 11))


async def test_a_worker_that_falls_silent(redis_url: str) -> None:
    async with open_site(redis_url, stream_idle_s=0.4) as site:
        site.worker.room = 0
        post = asyncio.create_task(site.post("/infer_stream", BODY))
        whole = asyncio.create_task(site.post("/infer", BODY))
        # In the queue there is nothing to be heard.
        await until(lambda: len(site.edge.flows) == 2)
        flows = list(site.edge.flows)
        begun = [flow.heard_at for flow in flows]
        await until(lambda: all(f.heard_at > b + 0.5 for f, b in zip(flows, begun, strict=True)))
        assert not post.done()
        site.worker.frozen = True
        site.worker.room = 8
        _, events, _ = await post
        assert [event.data["error"]["code"] for event in events] == ["stream_idle"]
        status, reply, _ = await whole
        assert (status, reply["error"]["code"]) == (504, "stream_idle")
        await until(lambda: _idle(site))


async def test_a_resumable_stream_that_idles_is_cancelled_too(redis_url: str) -> None:
    async with open_site(redis_url, stream_idle_s=0.2) as site:
        site.worker.frozen = True
        _, events, _ = await site.post("/infer_stream", BODY, {"X-Resumable": "60"})
        assert events[-1].data["error"]["code"] == "stream_idle"
        await until(lambda: _idle(site))


async def test_a_stream_that_waits_for_room_in_its_engine_is_not_idle(redis_url: str) -> None:
    async with open_site(redis_url, stream_idle_s=0.4) as site:
        site.worker.step_s = 0.01
        post = asyncio.create_task(site.post("/infer_stream", {**BODY, "max_tokens": 50}))
        await until(lambda: [r for r in site.worker.running.values() if r.seq > 3])
        site.worker.preempts = True
        await asyncio.sleep(1.5)
        assert not post.done()
        site.worker.preempts = False
        _, events, _ = await post
        assert "".join(event.data["text"] for event in events[:-2]) == letters(5, 50)


async def test_a_stream_that_waits_for_another_engine_is_not_idle(redis_url: str) -> None:
    async with open_site(redis_url, stream_idle_s=0.4) as site:
        site.worker.step_s = 0.01
        post = asyncio.create_task(site.post("/infer_stream", {**BODY, "max_tokens": 50}))
        await until(lambda: [r for r in site.worker.running.values() if r.seq > 3])
        # It drains, and nobody has room.
        site.worker.frozen, site.worker.room = True, 0
        owned = [(rid, state.epoch) for rid, state in site.worker.running.items()]
        await site.edge.store.release(site.worker.mv, site.worker.engine, owned)
        site.worker.running.clear()
        (flow,) = site.edge.flows
        before = flow.heard_at
        await until(lambda: flow.heard_at > before + 1)
        site.worker.frozen, site.worker.room = False, 8
        _, events, _ = await post
        assert "".join(event.data.get("token", "") for event in events[:-1]) == letters(5, 50)


async def test_a_drain(site: Site) -> None:
    site.worker.step_s = 0.01
    long = {**BODY, "max_tokens": 40}
    plain = asyncio.create_task(site.post("/infer_stream", long))
    whole = asyncio.create_task(site.post("/infer", long))
    kept = asyncio.create_task(site.post("/infer_stream", long, {"X-Resumable": "60"}))
    await until(lambda: len(site.worker.running) == 3)
    draining = asyncio.create_task(site.server.drain(10))
    await until(lambda: site.edge.draining)
    status, reply, headers = await site.get("/readyz")
    assert (status, reply["status"]) == (503, "draining")
    assert (await site.get("/livez"))[0] == 200
    for path in ("/infer", "/v1/chat/completions"):
        status, reply, headers = await site.post(path, BODY)
        assert (status, reply["error"]["code"]) == (503, "gateway_draining")
        assert headers["Connection"] == "close"
        assert headers["Retry-After"] == "1"
    _, events, _ = await kept
    # Whole events, no end, no error: the client goes on elsewhere.
    assert all("error" not in event.data and "text" in event.data for event in events)
    assert len(events) < 40
    assert not plain.done()
    await draining
    assert (await plain)[1][-1].data == "[DONE]"
    assert (await whole)[1]["text"] == letters(5, 40)
    client: Any = site.store.client
    await until(lambda: _idle(site))
    assert len(await client.keys("rts:l:*")) == 3


async def test_what_a_drain_does_not_wait_for(site: Site) -> None:
    site.worker.frozen = True
    plain = asyncio.create_task(site.post("/infer_stream", BODY))
    whole = asyncio.create_task(site.post("/infer", BODY))
    await until(lambda: len(site.worker.running) == 2)
    await site.server.drain(0.1)
    _, events, _ = await plain
    assert [event.data["error"]["code"] for event in events] == ["gateway_draining"]
    status, reply, _ = await whole
    assert (status, reply["error"]["code"]) == (503, "gateway_draining")
    await until(lambda: _idle(site))


async def test_a_drain_without_grace_hands_over(site: Site) -> None:
    site.worker.frozen = True
    kept = asyncio.create_task(site.post("/infer_stream", BODY, {"X-Resumable": "60"}))
    await until(lambda: any(flow.response is not None for flow in site.edge.flows))
    await site.server.drain(0)
    assert (await kept)[1] == []
    assert await site.counts() == (0, 1)


async def test_a_drain_in_a_hurry(site: Site) -> None:
    site.worker.frozen = True
    plain = asyncio.create_task(site.post("/infer_stream", BODY))
    await until(lambda: len(site.worker.running) == 1)
    hurry = asyncio.Event()
    draining = asyncio.create_task(site.server.drain(600, hurry))
    await until(lambda: site.edge.draining)
    hurry.set()
    await draining
    assert (await plain)[1][-1].data["error"]["code"] == "gateway_draining"


@pytest.mark.e2e
@pytest.mark.parametrize("signals", [1, 2])
async def test_a_real_process_ends_by_signals(site: Site, redis_url: str, signals: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "realtime_serve.cli", "gateway", "--redis-url", redis_url),
        *("--port", str(port), "--drain-grace-s", "20", "--log-format", "json"),
        cwd=Path(__file__).parents[2],
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        await until(lambda: _is_ready(port))
        site.worker.step_s = 0.01
        site.worker.frozen = signals == 2
        url = f"http://127.0.0.1:{port}/infer_stream"
        reply = await site.http.post(url, json={**BODY, "max_tokens": 50})
        await until(lambda: site.worker.running)
        process.send_signal(signal.SIGTERM)
        await until(lambda: _is_draining(port))
        if signals == 2:
            process.send_signal(signal.SIGTERM)
        events = read_events(await reply.text())
        if signals == 2:
            assert events[-1].data["error"]["code"] == "gateway_draining"
        else:
            assert events[-1].data == "[DONE]"
        _, log = await asyncio.wait_for(process.communicate(), 10)
        assert process.returncode == 0, log.decode()
        lines = [json.loads(line) for line in log.decode().splitlines()]
        (line,) = [line for line in lines if line.get("path") == "/infer_stream"]
        assert line["status"] == 200
        assert line["model"] == "echo"
        assert "hello" not in log.decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def raw_post(site: Site, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.server.port)
    writer.write(raw_request(body))
    return reader, writer


async def read_chunk(reader: asyncio.StreamReader) -> bytes:
    size = int(await reader.readline(), 16)
    chunk = await reader.readexactly(size)
    assert await reader.readline() == b"\r\n"
    return chunk


async def _delete(site: Site) -> None:
    (flow,) = site.edge.flows
    await until(lambda: flow.response is not None)
    assert (await site.send("DELETE", f"/requests/{flow.rid}"))[0] == 200


async def _idle(site: Site) -> bool:
    return await site.counts() == (0, 0)


async def _is_ready(port: int) -> bool:
    return (await probe.get("127.0.0.1", port, "/readyz"))[0] == 200


async def _is_draining(port: int) -> bool:
    return (await probe.get("127.0.0.1", port, "/readyz"))[0] == 503
