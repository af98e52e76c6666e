"""Request headers with a meaning of their own, checked as strictly as the body."""

from __future__ import annotations

import re
from dataclasses import dataclass

from aiohttp import web

from shared.errors import InvalidRequest
from shared.settings import Settings

ALLOWED = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "Last-Event-ID",
    "traceparent",
    "X-Client-Id",
    "X-Queue-Status",
    "X-Request-Id",
    "X-Resumable",
    "X-Stream-Run",
    "X-Timeout-S",
)
"""What browsers of other origins may send."""

_LABEL = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}", re.ASCII)
_KEY = re.compile(r"[\x21-\x7e]{1,256}", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?", re.ASCII)
_RUN = re.compile(r"[0-9A-Za-z-]{1,64}", re.ASCII)
_EVENT_ID = re.compile(r"[0-9]{1,15}", re.ASCII)
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Terms:
    """How a request is to be treated, beside what its body says.

    Attributes:
        grace_s: how long it outlives its connection; None: it does not.
        timeout_s: None: as in the body.
        queue_status: the stream tells what the request waits for.
    """

    grace_s: float | None
    timeout_s: float | None
    idempotency_key: str | None
    traceparent: str
    queue_status: bool


def read_terms(request: web.Request, settings: Settings) -> Terms:
    """The headers of a request that is to be queued.

    Raises:
        InvalidRequest: naming the header.
    """
    grace_s = _seconds(request, "X-Resumable", settings.max_grace_s)
    timeout_s = _seconds(request, "X-Timeout-S", settings.timeout_s)
    key = request.headers.get("Idempotency-Key")
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidRequest(
            "Idempotency-Key must be 1 to 256 visible ASCII characters", "Idempotency-Key"
        )
    trace = request.headers.get("traceparent", "")
    # A broken trace context is started anew, as W3C says.
    trace = trace if _TRACEPARENT.fullmatch(trace) else ""
    return Terms(grace_s, timeout_s, key, trace, wants_queue_status(request))


def read_label(request: web.Request) -> str:
    """The client's own name for this request, or "" when it gave none that is fit for a log."""
    label = request.headers.get("X-Request-Id", "")
    return label if _LABEL.fullmatch(label) else ""


def read_last_event_id(request: web.Request) -> int | None:
    """Number of the last token the client has; None without the header.

    Raises:
        InvalidRequest: it is not an id that this server gave.
    """
    text = request.headers.get("Last-Event-ID")
    if text is None or text == "":
        return None
    if not _EVENT_ID.fullmatch(text):
        raise InvalidRequest(
            f"Last-Event-ID must be the id of an event of this stream, not {text[:64]!r}",
            "Last-Event-ID",
        )
    return int(text)


def read_stream_run(request: web.Request) -> bytes:
    """Which run of a request the client is about, as X-Stream-Run told it; b"": whichever is there.

    Raises:
        InvalidRequest: this server did not tell it that.
    """
    text = request.headers.get("X-Stream-Run", "")
    if text and not _RUN.fullmatch(text):
        raise InvalidRequest(
            f"X-Stream-Run must be that of a response, not {text[:64]!r}", "X-Stream-Run"
        )
    return text.encode()


def wants_queue_status(request: web.Request) -> bool:
    """Whether a stream shall tell what its request waits for.

    Raises:
        InvalidRequest: the header says neither 1 nor 0.
    """
    text = request.headers.get("X-Queue-Status", "0")
    if text not in ("0", "1"):
        raise InvalidRequest(f"X-Queue-Status must be 1 or 0, not {text[:64]!r}", "X-Queue-Status")
    return text == "1"


def _seconds(request: web.Request, name: str, most: float) -> float | None:
    text = request.headers.get(name)
    if text is None:
        return None
    value = float(text) if _NUMBER.fullmatch(text) else 0.0
    if not 0 < value <= most:
        raise InvalidRequest(
            f"{name} must be a number of seconds above 0 and up to {most:g}, not {text[:64]!r}",
            name,
        )
    return value
