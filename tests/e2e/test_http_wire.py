"""Bytes that no ordinary client sends: our error shape, and nothing runs on behind them."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import struct
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

import pytest
from gateway_site import Site, until

BODY = b'{"model":"echo","prompt":"hi","max_tokens":2}'
JSON = b"Content-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
POST = b"POST /infer HTTP/1.1\r\nHost: x\r\n" + JSON


async def exchange(site: Site, data: bytes) -> tuple[int, dict[str, str], Any]:
    """Status, headers in lower case, and JSON of the one reply."""
    reader, writer = await asyncio.open_connection("127.0.0.1", site.server.port)
    writer.write(data)
    raw = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, json.loads(body)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (POST.replace(b"/infer", b"/" + b"s3cret" * 2000) + LENGTH + b"\r\n" + BODY, 400),
        (POST + LENGTH + b"X-A: " + b"s3cret" * 2000 + b"\r\n\r\n" + BODY, 400),
        (POST.replace(b"POST", b"S3CRET") + LENGTH + b"\r\n" + BODY, 400),
        (POST + LENGTH + b"X-Request-Id: s3cret\x0bb\r\n\r\n" + BODY, 400),
        (POST + LENGTH + b"Content-Length: 3\r\n\r\n" + BODY, 400),
        (POST + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + BODY, 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\ns3cret\r\nxx", 400),
        (POST + LENGTH + b"Expect: s3cret\r\n\r\n" + BODY, 417),
    ],
)
async def test_what_the_parser_refuses(
    site: Site, caplog: pytest.LogCaptureFixture, data: bytes, status: int
) -> None:
    with caplog.at_level(logging.INFO):
        found, headers, reply = await exchange(site, data)
    assert found == status
    assert reply["error"]["type"] == "invalid_request_error"
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert headers["content-type"] == "application/json"
    assert headers["server"] == "realtime-ai-serve"
    assert len(headers["x-request-id"]) == 32
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.exc_info is None
    shown = (json.dumps(reply) + caplog.text + repr(record.__dict__)).lower()
    assert "s3cret" not in shown
    assert (await site.get("/livez"))[0] == 200


async def test_compressed_bodies(site: Site) -> None:
    packed = gzip.compress(BODY)
    status, reply, _ = await site.send("POST", "/infer", packed, {"Content-Encoding": "gzip"})
    assert (status, reply["usage"]["completion_tokens"]) == (200, 2)
    status, reply, _ = await site.send("POST", "/infer", packed[:-6], {"Content-Encoding": "gzip"})
    assert (status, reply["error"]["code"]) == (400, "invalid_body")
    status, reply, _ = await site.send("POST", "/infer", packed, {"Content-Encoding": "banana"})
    assert (status, reply["error"]["param"]) == (415, "Content-Encoding")
    bomb = gzip.compress(b" " * 50_000_000)
    status, reply, _ = await site.send("POST", "/infer", bomb, {"Content-Encoding": "gzip"})
    assert (status, reply["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("path", [b"/infer", b"/infer_stream"])
@pytest.mark.parametrize("ahead", ["body", "requests"])
@pytest.mark.parametrize("reset", [False, True])
async def test_a_client_that_sent_ahead_and_left(
    site: Site, path: bytes, ahead: str, reset: bool
) -> None:
    site.worker.frozen = True
    _reader, writer = await asyncio.open_connection("127.0.0.1", site.server.port)
    writer.write(POST.replace(b"/infer", path) + LENGTH + b"\r\n" + BODY)
    await until(lambda: site.worker.running)
    if ahead == "body":
        writer.write(POST + b"Content-Length: 900000\r\n\r\n" + b" " * 900_000)
    else:
        writer.write((b"GET /livez HTTP/1.1\r\nHost: x\r\nX-A: %b\r\n\r\n" % (b"a" * 8000)) * 99)
    await asyncio.sleep(0.1)  # Into the gateway's buffers, while it is there.
    if reset:
        option = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, option)
    writer.close()
    await until(lambda: len(site.edge.flows) == 0, 5)
    await until(lambda: _idle(site), 5)


async def test_what_was_sent_ahead_in_small_is_answered(site: Site) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.server.port)
    writer.write((POST + LENGTH + b"\r\n" + BODY) * 2)
    raw = b""
    while raw.count(b"finish_reason") < 2:
        data = await asyncio.wait_for(reader.read(65536), 5)
        assert data
        raw += data
    writer.close()


async def _idle(site: Site) -> bool:
    return await site.counts() == (0, 0)
