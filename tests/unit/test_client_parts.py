"""The parts of the client that do no input or output."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import realtime_serve
from realtime_serve.client import errors
from realtime_serve.client.answers import Usage
from realtime_serve.client.transcript import MAX_EVENT_BYTES, Event, EventReader, Transcript
from realtime_serve.client.wire import Limits, Patience, Wire

ROOT = Path(__file__).parents[2]
USAGE = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
DONE = Event(None, b"[DONE]")


def event(number: int, **fields: Any) -> Event:
    return Event(number, json.dumps(fields).encode())


def infer_token(number: int, text: str) -> Event:
    return event(number, request_id="r", index=number - 1, token=text, text=text)


def infer_end(number: int) -> Event:
    return event(
        number, request_id="r", finish_reason="stop", usage=USAGE, metrics={"queue_ms": 1.5}
    )


def chunk(number: int, content: str = "", reason: str | None = None) -> Event:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": reason}
    return event(number, id="chatcmpl-r", choices=[choice], usage=None)


def test_events_however_the_bytes_are_cut() -> None:
    events = [
        Event(i, json.dumps({"text": "é" * i}, ensure_ascii=False).encode()) for i in range(9)
    ]
    raw = b": hello\nretry: 1000\n"
    for i, one in enumerate(events):
        raw += b": keep-alive\n" * (i % 2) + b"id: %d\ndata: %b\n\n" % (i, one.data)
    raw += b"data: a\r\ndata:b\r\n\r\n"
    chance = random.Random(5)
    for _ in range(200):
        reader, found, rest = EventReader(), [], raw
        while rest:
            cut = chance.randint(1, 40)
            found += reader.feed(rest[:cut])
            rest = rest[cut:]
        assert found == [*events, Event(None, b"a\nb")]
        assert reader.comments == 5
    # What was cut off is no event.
    assert EventReader().feed(raw[: len(b": hello\nretry: 1000\nid: 0\ndata: {")]) == []


def test_a_line_without_end_is_refused() -> None:
    reader = EventReader()
    with pytest.raises(errors.APIError) as caught:
        reader.feed(b"x" * (MAX_EVENT_BYTES + 1))
    assert caught.value.code == "bad_event"


def test_an_answer_of_infer() -> None:
    transcript = Transcript()
    found = [transcript.take(infer_token(i, text)) for i, text in enumerate(("a", "", "b"), 1)]
    assert [(token.index, token.number, token.text) for token in found if token] == [
        (0, 1, "a"),
        (1, 2, ""),
        (2, 3, "b"),
    ]
    assert transcript.take(infer_end(3)) is None
    assert not transcript.done
    transcript.take(DONE)
    answer = transcript.answer()
    assert transcript.done
    assert (answer.request_id, answer.text, answer.tokens) == ("r", "ab", ["a", "", "b"])
    assert (answer.finish_reason, answer.usage) == ("stop", Usage(2, 3, 5))
    assert answer.metrics == {"queue_ms": 1.5}


def test_what_came_before_is_dropped() -> None:
    transcript = Transcript(after=2)
    found = [transcript.take(infer_token(i, str(i))) for i in (1, 2, 3, 2, 3, 4)]
    assert [token.text for token in found if token] == ["3", "4"]
    chat = Transcript()
    found = [chat.take(chunk(i, str(i))) for i in (1, 3, 1, 3, 4)]
    assert [token.text for token in found if token] == ["1", "3", "4"]


@pytest.mark.parametrize(
    "events",
    [
        [infer_token(2, "b")],
        [infer_token(1, "a"), infer_token(3, "c")],
        # The last tokens are missing, or the end is of an earlier time.
        [infer_token(1, "a"), infer_end(2)],
        [infer_token(1, "a"), infer_token(2, "b"), infer_end(1)],
        [chunk(1, "a"), chunk(2, "b"), chunk(1, reason="stop")],
    ],
)
def test_a_gap_is_an_error(events: list[Event]) -> None:
    transcript = Transcript()
    for good in events[:-1]:
        transcript.take(good)
    last = transcript.last
    with pytest.raises(errors.StreamLostError) as caught:
        transcript.take(events[-1])
    assert caught.value.code == "stream_gap"
    assert (transcript.last, transcript.done) == (last, False)


def test_an_answer_of_a_chat() -> None:
    transcript = Transcript()
    # Number 2 had no text of its own.
    for one in (chunk(0), chunk(1, "a"), chunk(3, "b"), chunk(4, reason="length")):
        transcript.take(one)
    transcript.take(event(4, id="chatcmpl-r", choices=[], usage=USAGE))
    transcript.take(DONE)
    answer = transcript.answer()
    assert (answer.text, answer.finish_reason, answer.usage) == ("ab", "length", Usage(2, 3, 5))


@pytest.mark.parametrize(
    "bad",
    [
        DONE,
        Event(1, b"{"),
        Event(1, b"[]"),
        Event(1, b'"x"'),
        Event(1, b'{"text": 1}'),
        Event(1, b"{}"),
        Event(None, b'{"index": 0, "text": "a"}'),
        Event(1, b'{"error": 5}'),
    ],
)
def test_events_that_make_no_sense(bad: Event) -> None:
    with pytest.raises(errors.APIError) as caught:
        Transcript().take(bad)
    assert caught.value.code == "bad_event"
    assert not errors.is_passing(caught.value)


@pytest.mark.parametrize(
    ("code", "kind", "cls", "passing"),
    [
        ("timeout", "timeout_error", errors.DeadlineError, False),
        ("queue_timeout", "timeout_error", errors.DeadlineError, False),
        ("request_cancelled", "invalid_request_error", errors.RequestCancelledError, False),
        ("log_expired", "invalid_request_error", errors.StreamLostError, False),
        ("request_gone", "invalid_request_error", errors.StreamLostError, False),
        ("engine_failed", "server_error", errors.ServerError, False),
        ("stream_idle", "server_error", errors.ServerError, False),
        ("context", "invalid_request_error", errors.BadRequestError, False),
        ("gateway_draining", "server_error", errors.ServerError, True),
        ("store_unavailable", "server_error", errors.ServerError, True),
        ("slow_client", "invalid_request_error", errors.ServerError, True),
    ],
)
def test_errors_in_a_stream(
    code: str, kind: str, cls: type[errors.APIError], passing: bool
) -> None:
    transcript = Transcript()
    transcript.take(infer_token(1, "a"))
    problem = {"message": "no", "type": kind, "code": code, "param": None}
    with pytest.raises(cls) as caught:
        transcript.take(event(1, error=problem))
    found = caught.value
    assert type(found) is cls
    assert (found.message, found.code, found.status, found.request_id) == ("no", code, None, "r")
    assert errors.is_passing(found) is passing


@pytest.mark.parametrize(
    ("status", "code", "cls", "passing"),
    [
        (400, "invalid_value", errors.BadRequestError, False),
        (401, "invalid_api_key", errors.AuthenticationError, False),
        (403, "forbidden", errors.AuthenticationError, False),
        (404, "model_not_found", errors.NotFoundError, False),
        (409, "idempotency_conflict", errors.ConflictError, False),
        (410, "request_gone", errors.NotFoundError, False),
        (413, "body_too_large", errors.BadRequestError, False),
        (429, "rate_limit_exceeded", errors.RateLimitError, False),
        (500, "internal_error", errors.ServerError, False),
        (502, "engine_failed", errors.ServerError, False),
        (504, "timeout", errors.DeadlineError, False),
        (502, "http_502", errors.ServerError, True),
        (503, "queue_full", errors.ServerError, True),
        (504, "http_504", errors.ServerError, True),
    ],
)
def test_errors_of_a_status(
    status: int, code: str, cls: type[errors.APIError], passing: bool
) -> None:
    body: bytes = json.dumps({"error": {"message": "m", "code": code, "param": "p"}}).encode()
    if code.startswith("http_"):
        body = b"<html>Bad gateway</html>"
    found = errors.of_response(status, {"X-Request-Id": "r"}, body)
    assert type(found) is cls
    assert (found.status, found.code, found.request_id) == (status, code, "r")
    assert found.param == (None if code.startswith("http_") else "p")
    assert errors.is_passing(found) is passing


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "2"}, 2.0),
        ({"Retry-After": "2", "retry-after-ms": "1250"}, 1.25),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": "-1"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert errors.of_response(429, headers, b"").retry_after_s == seconds


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pauses(patience: Patience, clock: Clock, error: errors.APIError) -> list[float]:
    found = []
    while (pause_s := patience.pause_s(error)) is not None:
        found.append(pause_s)
        clock.now += pause_s
    return found


CUT = errors.APIConnectionError("cut")


def test_the_first_retries_come_at_once_and_then_ever_later() -> None:
    for gateways, expected in ((1, [0, 0.1, 0.2, 0.4, 0.8, 1.6, 2, 2]), (2, [0, 0, 0.1, 0.1, 0.2])):
        clock = Clock()
        found = pauses(Patience(10, gateways, clock, lambda: 1.0), clock, CUT)
        assert found[: len(expected)] == pytest.approx(expected)
        assert 8 < sum(found) <= 10


def test_progress_starts_it_anew() -> None:
    clock = Clock()
    patience = Patience(1, 1, clock, lambda: 1.0)
    for _ in range(5):
        assert [patience.pause_s(CUT) for _ in range(2)] == [0, 0.1]
        clock.now += 0.9
        patience.progress()
    clock.now += 1000
    # What the user did between two tokens does not count.
    assert patience.pause_s(CUT) == 0


def test_retry_after_is_honoured_once_all_gateways_were_asked() -> None:
    busy = errors.ServerError("busy", status=503, retry_after_s=1)
    clock = Clock()
    patience = Patience(10, 2, clock, lambda: 1.0)
    assert [patience.pause_s(busy) for _ in range(3)] == [0, 1, 1]
    long = errors.ServerError("busy", status=503, retry_after_s=1e9)
    assert Patience(60, 1, clock).pause_s(long) == 5
    assert Patience(4, 1, clock).pause_s(long) is None
    assert Patience(60, 1, clock).pause_s(errors.RateLimitError("no", status=429)) is None


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://x?a=b"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        Wire([url], {}, Limits(1, 1, 1, 1))


def test_bad_limits() -> None:
    with pytest.raises(ValueError, match="patience_s"):
        Limits(1, 1, float("nan"), 1)
    with pytest.raises(ValueError, match="at least one"):
        Wire([], {}, Limits(1, 1, 1, 1))


def test_the_package_is_cheap_to_import() -> None:
    code = """
import sys
import realtime_serve
heavy = {"aiohttp", "asyncio", "msgspec", "redis", "torch", "shared"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from realtime_serve import Client
assert "aiohttp" in sys.modules
assert not {"redis", "torch", "shared", "gateway"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)


def test_without_aiohttp_the_error_names_the_extra() -> None:
    code = """
import sys
sys.modules["aiohttp"] = None
try:
    from realtime_serve import Client
except ImportError as error:
    assert "realtime-ai-serve[client]" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError):
        _ = realtime_serve.Klient
