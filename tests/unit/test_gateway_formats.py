"""The bytes of events and replies."""

from __future__ import annotations

import json

import pytest

from gateway import sse
from gateway.formats import ChatFormat, Outcome, Subject, format_of
from shared import messages
from shared.messages import Token

RID = "0" * 32
OUTCOME = Outcome("stop", 3, queue_ms=10.0, ttft_ms=30.0, total_ms=1010.0)
NASTY = 'a"\\\n\r\x00\u2028 é \U0001f600'


def subject(api: str, *, include_usage: bool = False) -> Subject:
    view = messages.View(1, api, "m", "v1", True, "", 1_700_000_000, include_usage)
    return Subject(RID, view, 5)


def blocks(data: bytes) -> list[tuple[bytes, object]]:
    """The first line and the data of each event."""
    found = []
    for block in data.split(b"\n\n")[:-1]:
        number, text = block.split(b"\n")
        found.append((number, json.loads(text.removeprefix(b"data: "))))
    return found


def test_infer_events() -> None:
    form = format_of(subject("infer_stream"))
    assert form.begin() == b""
    data = form.tokens(4, [Token(0, 7, "x"), Token(0, 8, "")])
    assert data == (
        b'id: 4\ndata: {"request_id":"' + RID.encode() + b'","index":3,"token":"x","text":"x"}\n\n'
        b'id: 5\ndata: {"request_id":"' + RID.encode() + b'","index":4,"token":"","text":""}\n\n'
    )
    assert blocks(form.end(OUTCOME)) == [
        (
            b"id: 3",
            {
                "request_id": RID,
                "finish_reason": "stop",
                "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
                "metrics": {
                    "queue_ms": 10.0,
                    "ttft_ms": 30.0,
                    "total_ms": 1010.0,
                    "tokens_per_s": 3.0,
                },
            },
        )
    ]


def test_chat_chunks() -> None:
    form = format_of(subject("chat", include_usage=True))
    ((number, role),) = blocks(form.begin())
    assert number == b"id: 0"
    common = {
        "object": "chat.completion.chunk",
        "id": f"chatcmpl-{RID}",
        "created": 1_700_000_000,
        "model": "m",
        "system_fingerprint": "v1",
    }

    def chunk(delta: object, reason: object = None) -> object:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**common, "usage": None, "choices": [choice]}

    assert role == chunk({"role": "assistant", "content": ""})
    tokens = [Token(0, 1, ""), Token(0, 2, "hi")]
    assert blocks(form.tokens(1, tokens)) == [(b"id: 2", chunk({"content": "hi"}))]
    last, counted = blocks(form.end(OUTCOME))
    assert last == (b"id: 3", chunk({}, "stop"))
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert counted == (b"id: 3", {**common, "choices": [], "usage": usage})


def test_without_include_usage_no_chunk_has_one() -> None:
    for api in ("chat", "completions"):
        form = format_of(subject(api))
        data = form.begin() + form.tokens(1, [Token(0, 1, "x")]) + form.end(OUTCOME)
        assert b"usage" not in data


def test_completion_chunks_and_replies() -> None:
    form = format_of(subject("completions"))
    assert form.begin() == b""
    ((_, chunk),) = blocks(form.tokens(1, [Token(0, 1, "x")]))
    assert chunk["object"] == "text_completion"  # type: ignore[index]
    assert chunk["choices"][0]["text"] == "x"  # type: ignore[index]
    reply = form.reply(["a", "b"], OUTCOME)
    assert reply["choices"] == [
        {"index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop"}
    ]
    chat = ChatFormat(subject("chat")).reply(["a", "b"], OUTCOME)
    assert chat["choices"][0]["message"] == {
        "role": "assistant",
        "content": "ab",
        "refusal": None,
    }


@pytest.mark.parametrize("api", ["infer_stream", "chat", "completions"])
def test_no_text_breaks_an_event(api: str) -> None:
    form = format_of(subject(api))
    data = form.tokens(1, [Token(0, 1, NASTY)])
    assert data.count(b"\n") == 3
    assert b"\r" not in data
    ((_, value),) = blocks(data)
    assert json.dumps(NASTY)[1:-1] in json.dumps(value)


def test_the_workers_timings_win() -> None:
    timings = {"queue": 5.0, "prefill": 7.0, "decode": 100.0}
    end = messages.End(1, "stop", timings=timings)
    assert Outcome.of(end, 3, 1.0, 2.0) == Outcome("stop", 3, 5.0, 12.0, 112.0)
    assert Outcome.of(messages.End(1, "stop"), 3, 1.0, 2.0) == Outcome("stop", 3, 0.0, 1.0, 2.0)


def test_the_keep_alive_is_no_block() -> None:
    assert sse.KEEP_ALIVE == b": keep-alive\n"
    assert sse.json_event(3, {"a": 1}) == b'id: 3\ndata: {"a":1}\n\n'
