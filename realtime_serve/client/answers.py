"""What the client gives back."""

from __future__ import annotations

import msgspec


class Token(msgspec.Struct, frozen=True):
    """One token of a stream.

    Attributes:
        index: 0 is the first. text: what it adds to the answer; of a chat never empty.
    """

    index: int
    text: str

    @property
    def number(self) -> int:
        """How many tokens the stream has up to here: `after` to go on behind this one."""
        return self.index + 1


class Usage(msgspec.Struct, frozen=True):
    """How many tokens it took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(msgspec.Struct, frozen=True):
    """A complete answer.

    Attributes:
        request_id: its name at the server, for `request` and `resume`.
        text: all of it; of a resumed stream, from where it was resumed.
        tokens: the texts of its tokens. finish_reason: stop or length.
        usage: None only for a resumed stream that OpenAI's API started without `include_usage`.
        metrics: queue_ms, ttft_ms, total_ms, tokens_per_s; empty for a chat.
    """

    request_id: str
    text: str
    tokens: list[str]
    finish_reason: str
    usage: Usage | None
    metrics: dict[str, float]


class RequestState(msgspec.Struct, frozen=True):
    """Where a request is.

    Attributes:
        status: queued, running, completed, cancelled or failed.
        created: Unix time. deadline: Unix time at which it is ended.
        resumable: whether it outlives its connection.
        completion_tokens: how many it has so far.
        position: its place in the queue while it waits there; 1 is next.
        eta_s: how long it will wait there, if that can be told.
        queue_ms, ttft_ms, total_ms: time from its acceptance until it was taken by an engine, had
            its first token, had ended; None before that.
    """

    request_id: str
    status: str
    model: str
    version: str
    priority: str
    created: int
    deadline: float
    resumable: bool
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None = None
    position: int | None = None
    eta_s: float | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None
    total_ms: float | None = None
