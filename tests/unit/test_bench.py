"""The benchmark's own parts: what it reads out of responses, and what it reports."""

from __future__ import annotations

import asyncio
import json
import math
import time

import pytest

from benchmarks.client import play
from benchmarks.engine_loop import closed_loop
from benchmarks.figures import BenchError, Figures, Rounds, percentiles
from benchmarks.load import Prompts
from benchmarks.report import Report
from benchmarks.transcript import BadResponse, read_response
from worker.engine import EngineOptions, create_engine
from worker.engine.echo_tokenizer import tokenizer_json

# It ends in what, in the body, would end the response.
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Request-Id: a0\r\n\r\n"


def chunk(text: str) -> bytes:
    data = text.encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str = "", **more: object) -> str:
    return f"id: 1\ndata: {json.dumps({'choices': [{'text': text}], **more})}\n\n"


DONE = chunk("data: [DONE]\n\n")
END = b"0\r\n\r\n"


def test_tokens_and_times() -> None:
    usage = {"completion_tokens": 4}
    parts = [
        HEAD,
        chunk("retry: 1000\n" + event("a")),
        chunk(event("b") + event("c")),
        chunk(event("", usage=usage)) + DONE,
        END,
    ]
    timing = read_response(parts, [1.0, 2.0, 2.5, 3.0, 3.0], sent_at=0.5)
    assert timing.tokens == 4
    assert timing.ttft_s == 1.5
    assert timing.gaps_s == [0.5, 0.0]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_an_event_counts_when_its_last_byte_came(size: int) -> None:
    raw = HEAD + chunk(event("a")) + chunk(event("b")) + DONE + END
    parts = [raw[i : i + size] for i in range(0, len(raw), size)]
    times = [float(min(i + size, len(raw))) for i in range(0, len(raw), size)]
    timing = read_response(parts, times, sent_at=0.0)
    # The line's end completes an event's data.
    first = raw.index(b"}\n\n") + 2
    second = raw.index(b"}\n\n", first) + 2
    assert first <= timing.ttft_s < first + size
    assert second <= timing.ttft_s + timing.gaps_s[0] < second + size


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n{}", "not a 200"),
        (b"", "not a 200"),
        (HEAD + chunk('data: {"error": {"message": "no"}}\n\n') + END, "an error in the stream"),
        (HEAD + chunk(event("a")) + END, "without an end"),
        (HEAD + DONE + END, "no text"),
        (HEAD + chunk(event("a"))[:-9], "cut off"),
    ],
)
def test_what_is_not_a_stream_of_tokens(raw: bytes, why: str) -> None:
    with pytest.raises(BadResponse, match=why):
        read_response([raw], [1.0], sent_at=0.0)


async def serve(pieces: list[bytes], jobs: int) -> dict[str, object]:
    """The client's result against a server that answers each request with these pieces."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(2)
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        job = {
            "host": "127.0.0.1",
            "port": server.sockets[0].getsockname()[1],
            "path": "/",
            "warm_up": [["{}"], ["{}"]],
            "lanes": [["{}"] * jobs, ["{}"] * jobs],
            "no_start_after_s": 10.0,
            "limit_s": 10.0,
        }
        return await play(job)


@pytest.mark.parametrize("split", [0, 1, 3])
async def test_client_sends_one_request_after_the_other(split: int) -> None:
    body = chunk(event("a")) + chunk(event("b")) + DONE + END
    cut = len(body) - split
    result = await serve([HEAD, body[:cut], body[cut:]], jobs=5)
    assert result["errors"] == []
    assert result["tokens"] == [2] * 10


async def test_client_counts_what_failed() -> None:
    result = await serve([HEAD + chunk('data: {"error": {}}\n\n') + END], jobs=2)
    assert len(result["errors"]) == 4  # type: ignore[arg-type]


def test_closed_loop_runs_every_prompt() -> None:
    engine, _ = create_engine(EngineOptions(engine="echo", max_batch_size=4))
    lanes = [[[lane, i] for i in range(3)] for lane in range(4)]
    figures = closed_loop(engine, lanes, 5, no_start_after_s=10.0, limit_s=10.0)
    assert figures.tokens == 4 * 3 * 5


def test_closed_loop_ends_in_time() -> None:
    engine, _ = create_engine(EngineOptions(engine="echo", echo_step_ms=20.0))
    began = time.monotonic()
    with pytest.raises(BenchError, match="took more than"):
        closed_loop(engine, [[[1]]], 1000, no_start_after_s=1.0, limit_s=0.05)
    assert time.monotonic() - began < 2.0


def test_prompts_have_their_length_and_differ() -> None:
    prompts = Prompts(tokenizer_json())
    ids = [tuple(prompts.ids(64)) for _ in range(20)]
    assert {len(each) for each in ids} == {64}
    assert len(set(ids)) == 20


def test_percentiles_are_values_that_occurred() -> None:
    assert percentiles([5.0]) == (5.0, 5.0, 5.0)
    assert percentiles([float(i) for i in range(100, 0, -1)]) == (50.0, 95.0, 99.0)
    assert all(map(math.isnan, percentiles([])))


def test_report_names_the_ratio() -> None:
    machine = {
        "cpu": "a CPU",
        "cores": 2,
        "memory_gb": 8.0,
        "load_before": [0.25, 0.0, 0.0],
        "system": "Linux 6",
        "python": "3.11",
        "server": "redis 7.2",
        "packages": {"uvloop": "1"},
    }
    report = Report(machine, "Engine echo", "A load.")
    slow = Figures(50, 1.0, {"gateway": 0.001, "client": 0.0005}, [10.0], [1.0, 2.0])
    report.alone[8] = Rounds([Figures(100, 1.0)])
    report.cluster[8] = Rounds([slow])
    page = report.markdown()
    assert "| 8 | 100 | 50 | 0.50 (0.50-0.50) |" in page
    assert json.loads(report.json())["cluster"][0]["cpu_us_a_token"]["gateway"] == 20.0


async def test_client_does_not_wait_for_more_of_a_refusal() -> None:
    refusal = b'HTTP/1.1 503 Service Unavailable\r\nContent-Length: 9\r\n\r\n{"no": 1}'
    began = time.monotonic()
    result = await serve([refusal], jobs=3)
    assert time.monotonic() - began < 5.0
    assert "refused: b'HTTP/1.1 503" in result["errors"][0]  # type: ignore[index]
