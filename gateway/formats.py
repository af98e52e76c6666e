"""How tokens and ends look to a client, for each api. Events are put together from bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gateway import sse
from shared import messages


@dataclass(frozen=True, slots=True)
class Subject:
    """The request that an answer is about."""

    rid: str
    view: messages.View
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended well.

    Attributes:
        reason: stop or length. tokens: how many were generated. The others are milliseconds.
    """

    reason: str
    tokens: int
    queue_ms: float
    ttft_ms: float
    total_ms: float

    @classmethod
    def of(cls, end: messages.End, tokens: int, ttft_ms: float, total_ms: float) -> Outcome:
        """From the worker's timings; from this gateway's where the worker gave none."""
        timings = end.timings
        queue_ms = timings.get("queue", 0.0)
        if "prefill" in timings:
            ttft_ms = queue_ms + timings["prefill"]
            total_ms = ttft_ms + timings.get("decode", 0.0)
        return cls(end.reason, tokens, round(queue_ms, 3), round(ttft_ms, 3), round(total_ms, 3))

    def metrics(self) -> dict[str, float]:
        """What /infer calls metrics."""
        busy_s = (self.total_ms - self.queue_ms) / 1000
        return {
            "queue_ms": self.queue_ms,
            "ttft_ms": self.ttft_ms,
            "total_ms": self.total_ms,
            "tokens_per_s": round(self.tokens / busy_s, 3) if busy_s > 0 else 0.0,
        }


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }


class Format(Protocol):
    """The events of one stream, or the one reply."""

    def begin(self) -> bytes:
        """What goes in front of the first tokens of a stream that starts at its start."""

    def tokens(self, first: int, tokens: Sequence[messages.Token]) -> bytes:
        """Events of consecutive tokens; the first has this number."""

    def end(self, outcome: Outcome) -> bytes:
        """The last events."""

    def reply(self, tokens: Sequence[str], outcome: Outcome) -> dict[str, Any]:
        """All in one piece."""


class InferFormat:
    """/infer and /infer_stream."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._head = b'data: {"request_id":%b,"index":' % sse.encode(subject.rid)

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def tokens(self, first: int, tokens: Sequence[messages.Token]) -> bytes:
        """One event a token, also for one whose text is empty: indexes have no gaps."""
        encode, head = sse.encode, self._head
        found = []
        for number, token in enumerate(tokens, first):
            text = encode(token.text)
            found.append(
                b'id: %d\n%b%d,"token":%b,"text":%b}\n\n' % (number, head, number - 1, text, text)
            )
        return b"".join(found)

    def end(self, outcome: Outcome) -> bytes:
        """The summary."""
        summary = {
            "request_id": self._subject.rid,
            "finish_reason": outcome.reason,
            "usage": usage(self._subject.prompt_tokens, outcome.tokens),
            "metrics": outcome.metrics(),
        }
        return sse.json_event(outcome.tokens, summary)

    def reply(self, tokens: Sequence[str], outcome: Outcome) -> dict[str, Any]:
        """The reply of /infer."""
        return {
            "request_id": self._subject.rid,
            "model": self._subject.view.model,
            "tokens": list(tokens),
            "text": "".join(tokens),
            "finish_reason": outcome.reason,
            "usage": usage(self._subject.prompt_tokens, outcome.tokens),
            "metrics": outcome.metrics(),
        }


class _OpenAIFormat:
    """What chat.completion.chunk and text_completion have in common.

    Attributes:
        inside: a chunk's own part; %b is its text. last_inside: that of the finish reason's chunk.
    """

    object_name = ""
    chunk_name = ""
    inside = b"%b"
    id_prefix = ""
    last_inside = b""

    def __init__(self, subject: Subject) -> None:
        view = subject.view
        self._subject = subject
        self._common = {
            "id": self.id_prefix + subject.rid,
            "created": view.created,
            "model": view.model,
            "system_fingerprint": view.version,
        }
        # {"object":...,"id":...  up to the place of the choices; with include_usage every chunk
        # but the last has a usage that is null.
        opened = sse.encode({"object": self.chunk_name, **self._common})[:-1]
        null_usage = b',"usage":null' if view.include_usage else b""
        self._head = b"data: " + opened + null_usage + b',"choices":[{"index":0,'

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def tokens(self, first: int, tokens: Sequence[messages.Token]) -> bytes:
        """One chunk a token with text."""
        encode, inside = sse.encode, self.inside
        return b"".join(
            [
                self._chunk(number, inside % encode(token.text))
                for number, token in enumerate(tokens, first)
                if token.text
            ]
        )

    def end(self, outcome: Outcome) -> bytes:
        """The chunk with the finish reason, then the usage if it was asked for."""
        last = self._chunk(outcome.tokens, self.last_inside, sse.encode(outcome.reason))
        return last + self._usage_chunk(outcome)

    def _chunk(self, number: int, inside: bytes, finish_reason: bytes = b"null") -> bytes:
        return b'id: %d\n%b%b,"logprobs":null,"finish_reason":%b}]}\n\n' % (
            number,
            self._head,
            inside,
            finish_reason,
        )

    def _usage_chunk(self, outcome: Outcome) -> bytes:
        if not self._subject.view.include_usage:
            return b""
        counted = usage(self._subject.prompt_tokens, outcome.tokens)
        chunk = {"object": self.chunk_name, **self._common, "choices": [], "usage": counted}
        return sse.json_event(outcome.tokens, chunk)

    def _reply(self, choice: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
        choice = {
            "index": 0,
            **choice,
            "logprobs": None,
            "finish_reason": outcome.reason,
        }
        return {
            "object": self.object_name,
            **self._common,
            "choices": [choice],
            "usage": usage(self._subject.prompt_tokens, outcome.tokens),
        }


class ChatFormat(_OpenAIFormat):
    """/v1/chat/completions."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl-"
    inside = b'"delta":{"content":%b}'
    last_inside = b'"delta":{}'

    def begin(self) -> bytes:
        """The chunk with the role."""
        return self._chunk(0, b'"delta":{"role":"assistant","content":""}')

    def reply(self, tokens: Sequence[str], outcome: Outcome) -> dict[str, Any]:
        """chat.completion."""
        message = {"role": "assistant", "content": "".join(tokens), "refusal": None}
        return self._reply({"message": message}, outcome)


class CompletionFormat(_OpenAIFormat):
    """/v1/completions."""

    object_name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl-"
    inside = b'"text":%b'
    last_inside = b'"text":""'

    def reply(self, tokens: Sequence[str], outcome: Outcome) -> dict[str, Any]:
        """text_completion."""
        return self._reply({"text": "".join(tokens)}, outcome)


def format_of(subject: Subject) -> Format:
    """The format that the request was made in."""
    if subject.view.api == "chat":
        return ChatFormat(subject)
    if subject.view.api == "completions":
        return CompletionFormat(subject)
    return InferFormat(subject)


ID_PREFIXES = (ChatFormat.id_prefix, CompletionFormat.id_prefix)
"""What stands in front of a request id in OpenAI's objects."""
