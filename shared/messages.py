"""Everything that goes through Redis, msgpack-encoded. Each message starts with its version.

A reader ignores fields that a newer writer appended and fills those that an older one lacks with
their defaults; what cannot be read raises the one typed DecodeError. Where a field must not be
ignored, a message that uses it has a higher version, which an older reader refuses; one that does
not use it keeps its version, and older readers go on with it.
"""

from __future__ import annotations

import hashlib
from typing import ClassVar, Final, TypeVar

import msgspec

from shared.errors import DecodeError

VERSION = 1
WAITS = -1
"""In place of a number of rows that an engine has computed: it waits for room,
before its first row or having given all up."""


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of all messages: an array whose first item is the version.

    Attributes:
        NEWEST: the highest version of this message that this program knows; the lowest is VERSION.
    """

    NEWEST: ClassVar[int] = VERSION

    v: int


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How tokens are chosen: the engine interface's SamplingParams, and stop strings.

    Fields are appended, with neutral defaults, and with a version in `_SINCE` of the first
    Request whose readers act on them.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: list[str] = []
    stop_ids: list[int] = []
    ignore_eos: bool = False
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def version(self) -> int:
        """The version that a Request with this must have, so that no worker runs it without."""
        return max((_SINCE[name] for name, _ in self._later()), default=VERSION)

    def work(self) -> tuple[object, ...]:
        """Equal for equal sampling, also as a release knew it that lacks some of the fields."""
        fields = msgspec.structs.astuple(self)
        return (*fields[: len(fields) - len(_SINCE)], *self._later())

    def _later(self) -> list[tuple[str, object]]:
        """The fields that the first version lacks and that change anything here."""
        values = {name: getattr(self, name) for name in _SINCE}
        return [(name, value) for name, value in values.items() if value != _NEUTRAL[name]]


_SINCE: Final = {
    "min_p": 2,
    "presence_penalty": 2,
    "frequency_penalty": 2,
    "repetition_penalty": 2,
}
"""Sampling's last fields, those that version 1 of a Request lacks."""

_NEUTRAL: Final = {f.name: f.default for f in msgspec.structs.fields(Sampling) if f.name in _SINCE}


class Request(Message, frozen=True):
    """The body of a request: what a worker needs to run it, and a gateway to relay it.

    Its version is that of its sampling.

    Attributes:
        rid: request id. model, version: what it runs on. caller: whose it is.
        prompt: token ids.
        api: the format the client asked for: infer, infer_stream, chat, completions.
        stream: the client asked for server-sent events.
        label: the client's X-Request-Id.
        traceparent: W3C trace context or "".
        created: Unix time in seconds when it was accepted.
        include_usage: OpenAI's stream_options.include_usage.
    """

    NEWEST: ClassVar[int] = 2

    rid: str
    model: str
    version: str
    caller: str
    prompt: list[int]
    sampling: Sampling
    api: str = "infer"
    stream: bool = False
    label: str = ""
    traceparent: str = ""
    created: int = 0
    include_usage: bool = False

    def digest(self) -> str:
        """Equal for equal work: what may attach to this request under the same Idempotency-Key."""
        sampling = self.sampling.work()
        same = (self.model, self.caller, self.prompt, sampling, self.api, self.stream)
        return hashlib.blake2b(msgspec.msgpack.encode(same), digest_size=16).hexdigest()

    def view(self, *, resumable: bool) -> View:
        """The part that outlives the body."""
        return View(
            VERSION,
            self.api,
            self.model,
            self.version,
            self.stream,
            self.label,
            self.created,
            self.include_usage,
            resumable,
        )


class View(Message, frozen=True):
    """How a request is shown to its client: what a gateway needs to resume it, also after its end.

    Attributes:
        resumable: it outlives its connection. The others are fields of Request.
    """

    api: str
    model: str
    version: str
    stream: bool = False
    label: str = ""
    created: int = 0
    include_usage: bool = False
    resumable: bool = False


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One generated token. `text` is empty while a character or a stop string may be unfinished."""

    choice: int
    id: int
    text: str


class Tokens(Message, frozen=True):
    """Consecutive tokens; the first has number `first`, numbers start at 1."""

    first: int
    tokens: list[Token]


class End(Message, frozen=True):
    """How a request ended. Scripts write it too (common.lua, end_blob), with the reason alone.

    Attributes:
        reason: stop, length; cancelled, abandoned, timeout, queue_timeout, engine_failed, error.
        code, message: more about an error, for the client.
        timings: milliseconds: queue (waited), prefill (taken to first token), decode (to the last).
    """

    reason: str
    code: str = ""
    message: str = ""
    timings: dict[str, float] = {}

    @property
    def answered(self) -> bool:
        """Whether its answer is whole."""
        return self.reason in ("stop", "length")


class EngineCard(Message, frozen=True):
    """What a live engine says of itself each second.

    Attributes:
        prefix_queries, prefix_hits: tokens looked for and found in its prefix cache. fenced:
            sequences that it dropped because another engine owned them. Engines of older releases
            tell 0. draining: an engine of release 0.1 that is; later ones send no
            card any more then. The others are fields of the engine's info and stats.
    """

    engine: str
    kind: str
    device: str
    dtype: str
    host: str
    pid: int
    max_batch_size: int
    running: int
    waiting: int
    kv_usage: float
    draining: bool
    started: float
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    program: str = ""
    prefix_queries: int = 0
    prefix_hits: int = 0
    fenced: int = 0


class ModelCard(Message, frozen=True):
    """What a gateway needs to turn text into ids for a model version, published by its workers.

    Attributes:
        tokenizer: tokenizer.json as text. chat_template: Jinja source, or "" when there is none.
        context_length: most tokens of prompt and output together.
        bos_token, eos_token: as strings, for the template.
        sampling: Sampling's fields that the model's authors advise; for requests without them.
    """

    model: str
    version: str
    tokenizer: str
    chat_template: str
    context_length: int
    vocab_size: int
    bos_token: str = ""
    eos_token: str = ""
    eos_ids: list[int] = []
    created: int = 0
    sampling: dict[str, float] = {}


M = TypeVar("M", bound=Message)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """The bytes of a message."""
    return _encoder.encode(message)


def decode(data: bytes, kind: type[M]) -> M:
    """Reads a message.

    Raises:
        DecodeError: not msgpack, fields of wrong types, or a version this program does not know.
    """
    try:
        message = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise DecodeError(kind.__name__, str(error)) from error
    if not VERSION <= message.v <= kind.NEWEST:
        raise DecodeError(kind.__name__, f"version {message.v}, this program knows {kind.NEWEST}")
    return message


class Entry(msgspec.Struct, frozen=True):
    """One entry of a request's log, or one message on its channel: tokens or the end.

    Attributes:
        seq: number of the last token up to and including this entry.
    """

    seq: int
    event: Tokens | End


def read_entry(entry_id: bytes, data: bytes) -> Entry:
    """Reads a log entry: id `<seq>-0` carries tokens, `<seq>-1` is the end.

    Raises:
        DecodeError: the id or the data is not of this form.
    """
    seq, _, kind = entry_id.partition(b"-")
    # A number in Redis has at most 20 digits.
    if not seq.isdigit() or len(seq) > 20 or kind not in (b"0", b"1"):
        raise DecodeError("Entry", f"id {entry_id!r}")
    return Entry(int(seq), decode(data, End) if kind == b"1" else decode(data, Tokens))


def read_frame(frame: bytes) -> Entry:
    """Reads a message of a request's channel: the entry's id, a space, its data.

    Raises:
        DecodeError: the frame is not of this form.
    """
    entry_id, _, data = frame.partition(b" ")
    return read_entry(entry_id, data)
