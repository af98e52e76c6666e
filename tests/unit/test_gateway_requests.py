"""Bodies: what is accepted, and every bad input refused by the name of its parameter."""

from __future__ import annotations

import json
import zlib
from typing import Any

import msgspec
import pytest

from gateway.openai import ChatRequest, CompletionRequest
from gateway.requests import InferRequest, Order, decode, inflate
from shared.errors import InvalidRequest

INFER = {"model": "m", "prompt": "hello"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
COMPLETION = {"model": "m", "prompt": "hello"}
HUGE = 10**30


def infer(body: Any) -> Order:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return decode(raw, msgspec.json.Decoder(InferRequest)).order(stream=False)


def chat(body: Any) -> Order:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return decode(raw, msgspec.json.Decoder(ChatRequest)).order()


def completion(body: Any) -> Order:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return decode(raw, msgspec.json.Decoder(CompletionRequest)).order()


COMMON_BAD: list[tuple[str, Any, str]] = [
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", -1, "max_tokens"),
    ("max_tokens", 1.0, "max_tokens"),
    ("max_tokens", True, "max_tokens"),
    ("max_tokens", "5", "max_tokens"),
    ("max_tokens", HUGE, "max_tokens"),
    ("max_tokens", [5], "max_tokens"),
    ("temperature", -0.1, "temperature"),
    ("temperature", 2.1, "temperature"),
    ("temperature", True, "temperature"),
    ("temperature", "1", "temperature"),
    ("temperature", HUGE, "temperature"),
    ("top_p", 0, "top_p"),
    ("top_p", 1.01, "top_p"),
    ("top_p", False, "top_p"),
    ("top_k", -2, "top_k"),
    ("top_k", 1.5, "top_k"),
    ("min_p", -0.1, "min_p"),
    ("min_p", 1.1, "min_p"),
    ("min_p", True, "min_p"),
    ("presence_penalty", 2.1, "presence_penalty"),
    ("presence_penalty", "1", "presence_penalty"),
    ("frequency_penalty", -2.1, "frequency_penalty"),
    ("frequency_penalty", [0], "frequency_penalty"),
    ("repetition_penalty", 0, "repetition_penalty"),
    ("repetition_penalty", -1, "repetition_penalty"),
    ("repetition_penalty", 101, "repetition_penalty"),
    ("repetition_penalty", False, "repetition_penalty"),
    ("seed", -1, "seed"),
    ("seed", 2**63, "seed"),
    ("seed", True, "seed"),
    ("stop", "", "stop"),
    ("stop", [""], "stop[0]"),
    ("stop", ["a", None], "stop[1]"),
    ("stop", ["a", "b", "c", "d", "e"], "stop"),
    ("stop", 5, "stop"),
    ("stop", {"a": 1}, "stop"),
    ("priority", "urgent", "priority"),
    ("priority", "", "priority"),
    ("priority", 1, "priority"),
    ("timeout_s", 0, "timeout_s"),
    ("timeout_s", -1, "timeout_s"),
    ("timeout_s", "10", "timeout_s"),
    ("stream", 1, "stream"),
    ("stream", "true", "stream"),
    ("model", None, "model"),
    ("model", "", "model"),
    ("model", 1, "model"),
    ("surprise", 1, "surprise"),
    ("Model", "m", "Model"),
]
INFER_BAD: list[tuple[str, Any, str]] = [
    ("prompt", None, "prompt"),
    ("prompt", 5, "prompt"),
    ("prompt", ["a"], "prompt"),
    ("client_id", "", "client_id"),
    ("client_id", "x" * 129, "client_id"),
    ("client_id", 7, "client_id"),
    ("messages", [], "messages"),
]
OPENAI_BAD: list[tuple[str, Any, str]] = [
    ("n", 2, "n"),
    ("n", True, "n"),
    ("n", "1", "n"),
    ("logprobs", True, "logprobs"),
    ("logprobs", 0, "logprobs"),
    ("logit_bias", {"5": 1}, "logit_bias"),
    ("store", True, "store"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("stream_options", {"include_usage": 1}, "stream_options.include_usage"),
    ("stream_options", {"other": True}, "stream_options.other"),
    ("service_tier", "scale", "service_tier"),
    ("ignore_eos", 1, "ignore_eos"),
    ("user", 5, "user"),
    ("metadata", {"a": "b"}, "metadata"),
    ("client_id", "x", "client_id"),
]
CHAT_BAD: list[tuple[str, Any, str]] = [
    ("messages", None, "messages"),
    ("messages", [], "messages"),
    ("messages", "hi", "messages"),
    ("messages", [{"role": "user"}], "messages[0].content"),
    ("messages", [{"content": "x"}], "messages[0].role"),
    ("messages", [{"role": "tool", "content": "x"}], "messages[0].role"),
    ("messages", [{"role": "user", "content": None}], "messages[0].content"),
    ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
    ("messages", [{"role": "user", "content": "x", "foo": 1}], "messages[0].foo"),
    (
        "messages",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "messages[0].content[0].type",
    ),
    (
        "messages",
        [{"role": "user", "content": [{"type": "text"}]}],
        "messages[0].content[0].text",
    ),
    (
        "messages",
        [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
        "messages[0].tool_calls",
    ),
    ("response_format", {"type": "json_object"}, "response_format"),
    ("tools", [{"type": "function"}], "tools"),
    ("tool_choice", "required", "tool_choice"),
    ("functions", [{}], "functions"),
    ("modalities", ["text", "audio"], "modalities"),
    ("audio", {}, "audio"),
    ("prediction", {"type": "content"}, "prediction"),
    ("reasoning_effort", "high", "reasoning_effort"),
    ("top_logprobs", 3, "top_logprobs"),
    ("max_completion_tokens", 0, "max_completion_tokens"),
    ("prompt", "x", "prompt"),
]
COMPLETION_BAD: list[tuple[str, Any, str]] = [
    ("prompt", None, "prompt"),
    ("prompt", {}, "prompt"),
    ("prompt", ["a", "b"], "prompt"),
    ("prompt", ["a", 1], "prompt"),
    ("prompt", [[1, 2]], "prompt[0]"),
    ("prompt", [-1], "prompt[0]"),
    ("prompt", [True], "prompt[0]"),
    ("prompt", [HUGE], "prompt[0]"),
    ("best_of", 2, "best_of"),
    ("echo", True, "echo"),
    ("suffix", "x", "suffix"),
]
CASES = [
    *((infer, INFER, *case) for case in COMMON_BAD + INFER_BAD),
    *((chat, CHAT, *case) for case in COMMON_BAD + OPENAI_BAD + CHAT_BAD),
    *((completion, COMPLETION, *case) for case in COMMON_BAD + OPENAI_BAD + COMPLETION_BAD),
]


@pytest.mark.parametrize(
    ("read", "good", "name", "value", "param"),
    CASES,
    ids=[f"{read.__name__}-{name}-{str(value)[:30]}" for read, _, name, value, _ in CASES],
)
def test_bad_field_is_refused_by_name(
    read: Any, good: dict[str, Any], name: str, value: Any, param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read({**good, name: value})
    assert caught.value.param == param
    assert param.split("[...]")[0] in caught.value.message


@pytest.mark.parametrize("read", [infer, chat, completion])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"5",
        b'{"model": "m"} x',
        b'{"model": "\xff"}',
        b'{"model": "\xed\xa0\x80"}',
        b'{"model": "\\ud800"}',
        b'{"model": "\\udc00 x"}',
        b'{"model": "\\ud800\\u0041"}',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": -Infinity}',
        b'{"temperature": 1e999}',
        b'{"n": ' + b"[" * 100_000,
        b'{"logit_bias": ' + b'{"a":' * 100_000,
    ],
    ids=lambda body: str(body[:30]),
)
def test_what_is_no_object_of_json_is_refused(read: Any, body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read(body)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_not_finite_is_named(number: str) -> None:
    body = f'{{"model": "m", "prompt": "x", "top_p": {number}}}'
    with pytest.raises(InvalidRequest) as caught:
        infer(body.encode())
    assert caught.value.param == "top_p"


@pytest.mark.parametrize(
    ("read", "good", "name"),
    [(infer, INFER, "prompt"), (chat, CHAT, "messages"), (completion, COMPLETION, "model")],
)
def test_a_missing_field_is_named(read: Any, good: dict[str, Any], name: str) -> None:
    body = {key: value for key, value in good.items() if key != name}
    with pytest.raises(InvalidRequest, match=name) as caught:
        read(body)
    assert caught.value.param == name
    assert caught.value.code == "missing_required_parameter"


def test_codes_tell_the_kinds_of_refusals_apart() -> None:
    for body, code in (
        ({**CHAT, "surprise": 1}, "unknown_parameter"),
        ({**CHAT, "max_tokens": "x"}, "invalid_type"),
        ({**CHAT, "max_tokens": 0}, "invalid_value"),
        ({**CHAT, "n": 2}, "unsupported_value"),
        ({**CHAT, "audio": {}}, "unsupported_parameter"),
        (b"{", "invalid_json"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            chat(body)
        assert caught.value.code == code


def test_defaults_and_null_mean_the_same() -> None:
    nothing = {"max_tokens": None, "temperature": None, "seed": None, "stop": None, "top_p": None}
    assert infer(INFER) == infer({**INFER, **nothing})
    order = infer(INFER)
    assert order.cls == "normal"
    # The model's, which a body does not know.
    assert {order.temperature, order.top_p, order.top_k, order.min_p} == {None}
    assert order.repetition_penalty is None
    assert infer({**INFER, "top_k": -1}).top_k == 0
    assert order.seed is None
    assert order.max_tokens is None


def test_all_of_infers_fields() -> None:
    order = infer(
        {
            "model": "m",
            "prompt": "p",
            "max_tokens": 5,
            "temperature": 0,
            "top_p": 0.5,
            "top_k": 3,
            "min_p": 0.1,
            "presence_penalty": -1,
            "frequency_penalty": 0.5,
            "repetition_penalty": 1.2,
            "seed": 2**63 - 1,
            "stop": "x",
            "priority": "HIGH",
            "client_id": "me",
            "timeout_s": 1.5,
            "stream": True,
        }
    )
    assert order == Order(
        api="infer_stream",
        model="m",
        prompt="p",
        max_tokens=5,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        presence_penalty=-1.0,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
        seed=2**63 - 1,
        stop=["x"],
        cls="high",
        client_id="me",
        timeout_s=1.5,
        stream=True,
    )


@pytest.mark.parametrize(("read", "good"), [(infer, INFER), (chat, CHAT), (completion, COMPLETION)])
def test_every_endpoint_takes_all_of_sampling(read: Any, good: dict[str, Any]) -> None:
    asked = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.1,
        "repetition_penalty": 1.3,
        "seed": 5,
        "stop": ["x"],
    }
    order = read({**good, **asked})
    assert {name: getattr(order, name) for name in asked} == asked
    left_out = dict.fromkeys(asked)
    assert read({**good, **left_out}) == read(good)


def test_infer_stream_cannot_be_told_not_to() -> None:
    body = decode(b'{"model":"m","prompt":"p","stream":false}', msgspec.json.Decoder(InferRequest))
    with pytest.raises(InvalidRequest, match="infer_stream"):
        body.order(stream=True)


def test_neutral_values_of_what_is_not_supported_are_accepted() -> None:
    neutral = {
        "n": 1,
        "logprobs": False,
        "top_logprobs": None,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "store": False,
        "audio": None,
        "metadata": {},
        "user": "u",
        "safety_identifier": "s",
        "service_tier": "auto",
        "modalities": ["text"],
    }
    assert chat({**CHAT, **neutral}) == chat(CHAT)


@pytest.mark.parametrize(
    ("fields", "cls"),
    [
        ({"service_tier": "priority"}, "high"),
        ({"service_tier": "default"}, "normal"),
        ({"service_tier": "flex"}, "low"),
        ({"priority": "Low"}, "low"),
        ({"priority": "high", "service_tier": "flex"}, "high"),
        ({}, "normal"),
    ],
)
def test_priority_and_service_tier(fields: dict[str, str], cls: str) -> None:
    assert chat({**CHAT, **fields}).cls == cls


def test_messages_become_what_templates_know() -> None:
    order = chat(
        {
            "model": "m",
            "messages": [
                {"role": "developer", "content": "be kind"},
                {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]},
                # As the openai client gives an answer back.
                {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
                {"role": "user", "content": "", "name": None},
            ],
            "max_completion_tokens": 7,
        }
    )
    assert order.chat == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": ""},
    ]
    assert (order.max_tokens, order.max_tokens_param) == (7, "max_completion_tokens")


def test_a_name_of_a_speaker_is_refused_not_dropped() -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat({"model": "m", "messages": [{"role": "user", "content": "", "name": "n"}]})
    assert (caught.value.param, caught.value.code) == ("messages[0].name", "unsupported_parameter")


@pytest.mark.parametrize(
    "body",
    [
        {"k" * 100_000: 1},
        {"priority": "k" * 100_000},
        {"service_tier": "k" * 100_000},
        {"messages": [{"role": "k" * 100_000, "content": ""}]},
    ],
)
def test_an_error_repeats_little_of_what_was_sent(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat({**CHAT, **body})
    assert len(caught.value.message) < 600
    assert len(caught.value.param or "") < 100


def test_compressed_bodies() -> None:
    plain = b"x" * 1000
    for coding, bits in (("gzip", 31), ("deflate", 15)):
        packer = zlib.compressobj(wbits=bits)
        packed = packer.compress(plain) + packer.flush()
        assert inflate(packed, coding, 1000) == plain
        for bad in (packed[:-1], packed + b"x", b"x" + packed, b""):
            with pytest.raises(InvalidRequest) as caught:
                inflate(bad, coding, 1000)
            assert caught.value.code == "invalid_body"
        with pytest.raises(InvalidRequest) as caught:
            inflate(packed, coding, 999)
        assert caught.value.code == "body_too_large"


def test_max_tokens_twice_must_agree() -> None:
    assert chat({**CHAT, "max_tokens": 3, "max_completion_tokens": 3}).max_tokens == 3
    with pytest.raises(InvalidRequest, match="max_completion_tokens"):
        chat({**CHAT, "max_tokens": 3, "max_completion_tokens": 4})


@pytest.mark.parametrize(
    ("prompt", "expected"), [("a", "a"), (["a"], "a"), ([1, 2], [1, 2]), ([], [])]
)
def test_the_prompts_of_completions(prompt: Any, expected: Any) -> None:
    assert completion({"model": "m", "prompt": prompt}).prompt == expected
