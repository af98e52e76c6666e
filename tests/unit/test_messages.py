"""Messages survive the way through Redis, newer and older writers, and garbage."""

from __future__ import annotations

import string
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import messages
from shared.errors import DecodeError
from shared.messages import (
    VERSION,
    End,
    EngineCard,
    Entry,
    Message,
    ModelCard,
    Request,
    Sampling,
    Token,
    Tokens,
    decode,
    encode,
    read_entry,
    read_frame,
)

ROOT = Path(__file__).parents[2]
PROFILE = settings(max_examples=100, derandomize=True, database=None, deadline=None)
KINDS: list[type[Message]] = sorted(Message.__subclasses__(), key=lambda kind: kind.__name__)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.integers(0, 2**63 - 1)
floats = st.floats(allow_nan=False)


def _values(kind: Any) -> st.SearchStrategy[Any]:
    if kind in (str, int, float, bool):
        return {str: texts, int: numbers, float: floats, bool: st.booleans()}[kind]
    if msgspec.inspect.is_struct_type(kind):
        return _structs(kind)
    if kind.__origin__ is list:
        return st.lists(_values(kind.__args__[0]), max_size=5)
    return st.dictionaries(texts, _values(kind.__args__[1]), max_size=3)


def _structs(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    fields = {f.name: _values(f.type) for f in msgspec.structs.fields(kind)}
    if issubclass(kind, Message):
        fields["v"] = st.just(VERSION)
    return st.builds(kind, **fields)


def plain(message: Message) -> list[Any]:
    """The array that is on the wire."""
    return msgspec.msgpack.decode(encode(message))


def required(kind: type[Message]) -> int:
    return sum(
        f.default is msgspec.NODEFAULT and f.default_factory is msgspec.NODEFAULT
        for f in msgspec.structs.fields(kind)
    )


def example(kind: type[Message]) -> Message:
    """The smallest message: required fields alone."""
    simple = {str: "x", int: 1, float: 1.0, bool: True}
    values = []
    for f in msgspec.structs.fields(kind)[: required(kind)]:
        if f.type is Sampling:
            values.append(Sampling(max_tokens=1))
        else:
            values.append(simple.get(f.type, []))
    return kind(*values)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_round_trip(kind: type[Message]) -> None:
    @PROFILE
    @given(_structs(kind))
    def check(message: Message) -> None:
        assert decode(encode(message), kind) == message
        assert plain(message)[0] == VERSION

    check()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_newer_writer_may_append_fields(kind: type[Message]) -> None:
    longer = [*plain(example(kind)), "new", {"and": ["more", 1, None]}]
    full = len(msgspec.structs.fields(kind))
    assert len(longer) > full
    assert decode(msgspec.msgpack.encode(longer), kind) == example(kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_older_writer_may_lack_fields(kind: type[Message]) -> None:
    values = plain(example(kind))
    for n in range(required(kind), len(values) + 1):
        assert decode(msgspec.msgpack.encode(values[:n]), kind) == example(kind)
    for n in range(required(kind)):
        with pytest.raises(DecodeError) as caught:
            decode(msgspec.msgpack.encode(values[:n]), kind)
        assert caught.value.kind == kind.__name__


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("version", [0, "one more", -1, 2**63])
def test_an_unknown_version(kind: type[Message], version: Any) -> None:
    version = kind.NEWEST + 1 if version == "one more" else version
    values = [version, *plain(example(kind))[1:]]
    with pytest.raises(DecodeError, match="version"):
        decode(msgspec.msgpack.encode(values), kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_garbage_is_one_error(kind: type[Message]) -> None:
    @PROFILE
    @given(st.binary(max_size=64))
    def check(data: bytes) -> None:
        try:
            message = decode(data, kind)
        except DecodeError:
            return
        # By chance it is a message; then it is one of this version.
        assert message.v == VERSION

    check()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_cut_and_changed_bytes_are_one_error(kind: type[Message]) -> None:
    whole = encode(example(kind))

    @PROFILE
    @given(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=3))
    def check(at: int, other: bytes) -> None:
        with pytest.raises(DecodeError):
            decode(whole[:at], kind)
        with pytest.raises(DecodeError):
            decode(whole + other, kind)
        try:
            changed = decode(whole[:at] + other + whole[at + 1 :], kind)
        except DecodeError:
            return
        assert isinstance(changed, kind)

    check()


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc0", b"\x80", b"\x01", b"\x90", b"\x92\x01\x01", b"\x92\x01\xa1\xff", b"\x92\x01"],
)
def test_what_is_no_message(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(data, End)


def test_numbers_are_not_truth_values() -> None:
    for values in ([True, "stop"], [1.0, "stop"], ["1", "stop"], [1, b"stop"], [None, "stop"]):
        with pytest.raises(DecodeError):
            decode(msgspec.msgpack.encode(values), End)


def test_the_end_that_scripts_write() -> None:
    for length in range(1, 32):
        reason = string.ascii_letters[:length]
        # common.lua, end_blob
        blob = b"\x95\x01" + bytes([160 + length]) + reason.encode() + b"\xa0\xa0\x80"
        assert decode(blob, End) == End(VERSION, reason)
        assert encode(End(VERSION, reason)) == blob


# -- digest and view ------------------------------------------------------------------------------

REQUEST = Request(
    VERSION, "r1", "m", "1", "alice", [1, 2], Sampling(max_tokens=5), label="x", created=7
)


def test_the_digest_is_that_of_the_work() -> None:
    same = msgspec.structs.replace(
        REQUEST, rid="r2", version="2", label="y", traceparent="z", created=8
    )
    assert same.digest() == REQUEST.digest()
    assert decode(encode(REQUEST), Request).digest() == REQUEST.digest()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"caller": "bob"},
        {"prompt": [1, 2, 3]},
        {"sampling": Sampling(max_tokens=6)},
        {"sampling": Sampling(max_tokens=5, seed=1)},
        {"sampling": Sampling(max_tokens=5, stop=["."])},
        {"sampling": Sampling(max_tokens=5, min_p=0.5)},
        {"sampling": Sampling(max_tokens=5, presence_penalty=0.5)},
        {"sampling": Sampling(max_tokens=5, frequency_penalty=0.5)},
        {"api": "chat"},
        {"stream": True},
    ],
    ids=str,
)
def test_other_work_has_another_digest(change: dict[str, Any]) -> None:
    assert msgspec.structs.replace(REQUEST, **change).digest() != REQUEST.digest()


def test_a_view_keeps_what_a_client_needs() -> None:
    for resumable in (True, False):
        view = REQUEST.view(resumable=resumable)
        assert view.resumable is resumable
        for name in ("api", "model", "version", "stream", "label", "created", "include_usage"):
            assert getattr(view, name) == getattr(REQUEST, name)


# -- releases -------------------------------------------------------------------------------------

LATER = {
    "min_p": 0.5,
    "presence_penalty": 1.0,
    "frequency_penalty": -1.0,
    "repetition_penalty": 1.1,
}
OLD = """
import sys
from shared import messages
for line in sys.stdin:
    try:
        request = messages.decode(bytes.fromhex(line), messages.Request)
        print(request.rid, request.sampling.temperature, request.digest())
    except messages.DecodeError as error:
        print(error)
"""


def request_of(**sampling: Any) -> Request:
    chosen = Sampling(max_tokens=5, temperature=0.5, **sampling)
    return msgspec.structs.replace(REQUEST, v=chosen.version, sampling=chosen)


def test_an_old_worker_refuses_what_it_would_ignore_and_runs_the_rest(tmp_path: Path) -> None:
    with tarfile.open(ROOT / "tests" / "chaos" / "release-0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    neutral = request_of(min_p=0.0, presence_penalty=0.0, repetition_penalty=1.0)
    uses = [request_of(**{name: value}) for name, value in LATER.items()]
    told = subprocess.run(
        [sys.executable, "-c", OLD],
        input="\n".join(encode(request).hex() for request in (neutral, *uses)),
        env={"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout.splitlines()
    # The digest is the old one's: a repeated Idempotency-Key attaches across an upgrade.
    assert told[0].split() == ["r1", "0.5", neutral.digest()]
    assert len(told) == 5
    assert all("version 2" in line for line in told[1:])


def test_a_request_has_the_version_that_its_sampling_needs() -> None:
    assert request_of().v == VERSION
    for name, value in LATER.items():
        request = request_of(**{name: value})
        assert request.v == 2
        assert decode(encode(request), Request) == request
        # What outlives it says nothing of its sampling: any gateway may relay it.
        assert request.view(resumable=True).v == VERSION


def test_later_fields_of_sampling_are_its_last_and_neutral() -> None:
    fields = msgspec.structs.fields(Sampling)[-len(LATER) :]
    assert [f.name for f in fields] == list(LATER)
    assert Sampling(max_tokens=1).version == VERSION


# -- log entries ----------------------------------------------------------------------------------

TOKENS = Tokens(VERSION, 4, [Token(0, 17, "a"), Token(0, 18, "")])
END = End(VERSION, "stop", timings={"queue": 0.5})


def test_entries_and_frames() -> None:
    for entry_id, event, seq in ((b"5-0", TOKENS, 5), (b"5-1", END, 5), (b"0-1", END, 0)):
        data = encode(event)
        assert read_entry(entry_id, data) == Entry(seq, event)
        assert read_frame(entry_id + b" " + data) == Entry(seq, event)


def test_a_frame_whose_data_holds_spaces() -> None:
    event = Tokens(VERSION, 1, [Token(0, 32, "  x ")])
    assert read_frame(b"1-0 " + encode(event)).event == event


@pytest.mark.parametrize(
    ("entry_id", "data"),
    [
        (b"", encode(TOKENS)),
        (b"-", encode(TOKENS)),
        (b"-0", encode(TOKENS)),
        (b"x-0", encode(TOKENS)),
        (b"\xff-0", encode(TOKENS)),
        (b"9" * 5000 + b"-0", encode(TOKENS)),
        (b"5-0", encode(END)),
        (b"5-1", encode(TOKENS)),
        (b"5-0", b""),
    ],
    ids=lambda value: repr(value[:8]),
)
def test_what_is_no_entry(entry_id: bytes, data: bytes) -> None:
    with pytest.raises(DecodeError):
        read_entry(entry_id, data)
    with pytest.raises(DecodeError):
        read_frame(entry_id + b" " + data)


@PROFILE
@given(st.binary(max_size=64))
def test_garbage_on_a_channel_is_one_error(frame: bytes) -> None:
    with pytest.raises(DecodeError):
        read_frame(frame)


def test_all_messages_are_tested() -> None:
    assert {End, EngineCard, ModelCard, Request, Tokens, messages.View} <= {*KINDS}


def test_a_message_nested_beyond_reason_is_a_decode_error() -> None:
    nested = b"\x91" * 100_000 + b"\x90"
    with pytest.raises(DecodeError):
        decode(b"\x93\x01\x01" + nested, Tokens)
    with pytest.raises(DecodeError):
        # A field that this version does not know is skipped, however deep it goes.
        decode(b"\x94\x01\x01\x90" + nested, Tokens)


@pytest.mark.parametrize("entry_id", [b"5-7", b"5", b"", b"-0", b"-1-0", b"x-0", b"5-"])
def test_an_id_that_no_script_writes_is_a_decode_error(entry_id: bytes) -> None:
    with pytest.raises(DecodeError):
        read_entry(entry_id, encode(Tokens(VERSION, 1, [])))


def test_a_card_of_an_engine_that_has_no_prefix_cache() -> None:
    card = ["e", "torch", "cpu", "bfloat16", "h", 7, 32, 1, 0, 0.5, False, 2.5, 9, 8, 7, 6]
    old = decode(msgspec.msgpack.encode([VERSION, *card]), EngineCard)
    assert (old.preemptions, old.prefix_queries, old.prefix_hits) == (6, 0, 0)
    fresh = msgspec.structs.replace(old, prefix_queries=80, prefix_hits=64)
    assert decode(encode(fresh), EngineCard) == fresh
