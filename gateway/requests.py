"""Bodies of requests: read within bounds, decoded strictly, turned into an Order."""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta

from shared.errors import InvalidRequest

BODY_READ_S = 30.0
"""Longest time a client may take to send its body."""
MAX_INT = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_STOPS = 4
MOST_SHOWN = 64
"""Characters of what a client sent that an error repeats."""
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""Content codings, and what zlib calls them."""
PRIORITIES = ("high", "normal", "low")

Count = Annotated[int, Meta(ge=1, le=MAX_INT)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=MAX_INT, description="0 or -1: all tokens")]
MinP = Annotated[float, Meta(ge=0, le=1, description="a share of the largest probability")]
Penalty = Annotated[float, Meta(ge=-2, le=2, description="over generated tokens")]
Repetition = Annotated[
    float, Meta(ge=0.01, le=100, description="over prompt and generated tokens; 1: none")
]
Seed = Annotated[int, Meta(ge=0, le=MAX_SEED)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
Stop = StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)]
Seconds = Annotated[float, Meta(gt=0)]
ClientId = Annotated[str, Meta(min_length=1, max_length=128)]
ModelName = Annotated[str, Meta(min_length=1, max_length=256)]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a client wants generated, whichever endpoint it used.

    Attributes:
        api: the format of the answer: infer, infer_stream, chat, completions.
        prompt: text or token ids; or None and `chat` is a conversation.
        max_tokens: None: the default. max_tokens_param: what the client called it.
        temperature, top_p, top_k, min_p, repetition_penalty: None: the model's default.
        seed: None: any. cls: the priority class. timeout_s: None: the longest.
    """

    api: str
    model: str
    prompt: str | list[int] | None = None
    chat: list[dict[str, str]] = field(default_factory=list)
    max_tokens: int | None = None
    max_tokens_param: str = "max_tokens"
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    ignore_eos: bool = False
    cls: str = "normal"
    timeout_s: float | None = None
    stream: bool = False
    include_usage: bool = False
    client_id: str | None = None


class SamplingFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of every body that say how tokens are chosen. null counts as left out."""

    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    seed: Seed | None = None
    stop: Stop | None = None

    def chosen(self) -> dict[str, Any]:
        """The fields of an Order, but max_tokens."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "seed": self.seed,
            "stop": stop_list(self.stop),
        }


class InferRequest(SamplingFields, kw_only=True):
    """Body of /infer and /infer_stream. A field that is null counts as left out."""

    model: ModelName
    prompt: str
    priority: str | None = None
    client_id: ClientId | None = None
    timeout_s: Seconds | None = None
    stream: bool | None = None

    def order(self, *, stream: bool) -> Order:
        """The order; `stream` is what the endpoint does by itself.

        Raises:
            InvalidRequest: a field has a value that its type does not rule out.
        """
        if stream and self.stream is False:
            raise InvalidRequest("/infer_stream always streams; use /infer", "stream")
        stream = stream or bool(self.stream)
        return Order(
            api="infer_stream" if stream else "infer",
            model=self.model,
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            cls=priority_class(self.priority),
            timeout_s=self.timeout_s,
            stream=stream,
            client_id=self.client_id,
            **self.chosen(),
        )


def stop_list(stop: str | list[str] | None) -> list[str]:
    """The stop strings as a list."""
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else stop


def priority_class(name: str | None) -> str:
    """The class of a priority in any case.

    Raises:
        InvalidRequest: there is no such class.
    """
    cls = "normal" if name is None else name.lower()
    if cls not in PRIORITIES:
        raise InvalidRequest(f"priority must be high, normal or low, not {_cut(cls)!r}", "priority")
    return cls


async def read_json(request: web.Request, decoder: msgspec.json.Decoder[T]) -> T:
    """The body as the decoder's type.

    Raises:
        InvalidRequest: it is no JSON, too large, too slow, or does not fit the type.
    """
    _check_content_type(request)
    coding = _content_coding(request)
    try:
        async with asyncio.timeout(BODY_READ_S):
            body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(request.client_max_size) from None
    except TimeoutError:
        raise InvalidRequest(
            f"The body did not arrive within {BODY_READ_S:.0f} s", None, "request_timeout"
        ) from None
    except web.RequestPayloadError:
        raise InvalidRequest("The body is not what the headers say", None, "invalid_body") from None
    if coding:
        body = inflate(body, coding, request.client_max_size)
    return decode(body, decoder)


def inflate(body: bytes, coding: str, most: int) -> bytes:
    """The body behind its Content-Encoding.

    Raises:
        InvalidRequest: it is larger than `most` bytes, or not whole.
    """
    inflater = zlib.decompressobj(_WINDOW_BITS[coding])
    try:
        plain = inflater.decompress(body, most + 1)
    except zlib.error:
        plain = b""
    if len(plain) > most:
        raise _too_large(most)
    if not inflater.eof or inflater.unused_data:
        raise InvalidRequest(f"The body is not whole and valid {coding}", None, "invalid_body")
    return plain


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """The decoded body.

    Raises:
        InvalidRequest: naming the field at fault.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _named(str(error)) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        if name := _not_finite(body):
            raise InvalidRequest(f"{name} is not a finite number", name, "invalid_json") from None
        raise InvalidRequest(f"The body is not valid JSON: {error}", None, "invalid_json") from None


def _not_finite(body: bytes) -> str:
    """The field of a body that is NaN or Infinity, which Python's json takes; "" if none is."""
    found: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        found.extend(name for name, value in pairs if value is not_finite)

    not_finite = object()
    with suppress(ValueError, RecursionError):
        json.loads(body, parse_constant=lambda _: not_finite, object_pairs_hook=look)
    return _cut(found[0]) if found else ""


def _too_large(most: int) -> InvalidRequest:
    return InvalidRequest(f"The body is larger than {most} bytes", None, "body_too_large")


def _cut(text: str, most: int = MOST_SHOWN) -> str:
    return text if len(text) <= most else text[:most] + "..."


def _content_coding(request: web.Request) -> str:
    """How the body is compressed, or "".

    Raises:
        InvalidRequest: in a way that is not known here.
    """
    coding = request.headers.get("Content-Encoding", "").strip().lower()
    if coding in ("", "identity"):
        return ""
    if coding not in _WINDOW_BITS:
        raise InvalidRequest(
            f"Content-Encoding must be gzip, deflate or identity, not {_cut(coding)!r}",
            "Content-Encoding",
            "unsupported_media_type",
        )
    return coding


def _check_content_type(request: web.Request) -> None:
    if "Content-Type" not in request.headers:
        return
    kind = request.content_type
    if kind != "application/json" and not (kind.startswith("application/") and "+json" in kind):
        raise InvalidRequest(
            f"Content-Type must be application/json, not {kind}",
            "Content-Type",
            "unsupported_media_type",
        )
    if (charset := request.charset) and charset.lower().replace("-", "") != "utf8":
        raise InvalidRequest(
            f"the charset must be utf-8, not {charset}", "Content-Type", "unsupported_media_type"
        )


_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_FIELD = re.compile(r"^Object (?P<kind>contains unknown|missing required) field `(?P<name>.*)`$")


def _named(problem: str) -> InvalidRequest:
    """The sentence of msgspec, with its path turned into the name of the parameter."""
    found = _AT.match(problem)
    what = found["what"] if found else problem
    path = (found["path"] or "$") if found else "$"
    # A key that is not the name of a field appears as [...].
    path = path.removeprefix("$").removeprefix(".")
    code = "invalid_value"
    if field_found := _FIELD.match(what):
        name = _cut(field_found["name"])
        path = f"{path}.{name}" if path else name
        unknown = field_found["kind"] == "contains unknown"
        code = "unknown_parameter" if unknown else "missing_required_parameter"
        what = f"Unknown parameter: {path!r}" if unknown else f"Missing parameter: {path!r}"
    elif what.startswith("Expected") and "got" in what:
        code = "invalid_type"
    if path and path not in what:
        what = f"Invalid {path!r}: {what}"
    what = _cut(what, 8 * MOST_SHOWN)
    return InvalidRequest(what, path or None, code)
