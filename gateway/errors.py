"""What clients are told when something fails: the HTTP status table and OpenAI's error shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.errors import (
    InvalidRequest,
    LogExpired,
    NotReplicated,
    RtsError,
    StoreUnavailable,
    TemplateError,
)


class ModelNotFound(RtsError):
    """No such model is served.

    Attributes:
        model: what was asked for. known: the models there are.
    """

    def __init__(self, model: str, known: list[str]) -> None:
        super().__init__(f"The model {model!r} does not exist; there are: {', '.join(known)}")
        self.model = model
        self.known = known


class ModelNotReady(RtsError):
    """The model is known, but its files are not loaded here or its version takes no requests."""


class RequestNotFound(RtsError):
    """No such request, or it is another caller's."""

    def __init__(self, rid: str) -> None:
        super().__init__(f"No request {rid!r} of yours is known")


class RequestGone(RtsError):
    """The request was there, but its tokens are not kept any more."""


ANOTHER_RUN = "This run of the request ended, and the request was run again"
"""What RequestGone says of one that failed."""


class IdempotencyConflict(RtsError):
    """The Idempotency-Key was used for another request."""


class RateLimited(RtsError):
    """The caller's bucket does not hold enough.

    Attributes:
        kind: requests or tokens. retry_ms: when it will. headers: the rate-limit headers.
    """

    def __init__(self, kind: str, retry_ms: int, headers: Mapping[str, str]) -> None:
        super().__init__(
            f"Rate limit reached for {kind} per minute. "
            f"Please try again in {retry_ms / 1000:.3f} s."
        )
        self.kind = kind
        self.retry_ms = retry_ms
        self.headers = headers


class QueueFull(RtsError):
    """The model's queue holds as much as it may."""


class TooManyConnections(RtsError):
    """This gateway has as many connections as it may."""


class Draining(RtsError):
    """This gateway is going away."""


class StreamFailed(RtsError):
    """An accepted request ended otherwise than with its text.

    Attributes:
        reason: of messages.End, or one of this gateway's own: stream_idle, slow_client,
            gateway_draining. code: a more precise one from the worker, or "".
    """

    def __init__(self, reason: str, code: str = "", message: str = "") -> None:
        super().__init__(message or _SENTENCES.get(reason, f"The request ended: {reason}."))
        self.reason = reason
        self.code = code


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a client sees it.

    Attributes:
        status: of HTTP, where no stream has begun.
        headers: beside those of every response; closes the connection where it says so.
    """

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


_INVALID = "invalid_request_error"
_SERVER = "server_error"

_STATUS: dict[type[Exception], tuple[int, str, str]] = {
    InvalidRequest: (400, _INVALID, "invalid_value"),
    TemplateError: (400, _INVALID, "invalid_messages"),
    ModelNotFound: (404, _INVALID, "model_not_found"),
    RequestNotFound: (404, _INVALID, "request_not_found"),
    IdempotencyConflict: (409, _INVALID, "idempotency_conflict"),
    RequestGone: (410, _INVALID, "request_gone"),
    LogExpired: (503, _SERVER, "log_expired"),
    RateLimited: (429, "rate_limit_error", "rate_limit_exceeded"),
    ModelNotReady: (503, _SERVER, "model_not_ready"),
    QueueFull: (503, _SERVER, "queue_full"),
    TooManyConnections: (503, _SERVER, "too_many_connections"),
    Draining: (503, _SERVER, "gateway_draining"),
    StoreUnavailable: (503, _SERVER, "store_unavailable"),
    NotReplicated: (503, _SERVER, "not_replicated"),
}
"""Every error of this project that may reach a client: status, type, code."""

_STATUS_OF_CODE = {
    "request_timeout": 408,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "idempotency_conflict": 409,
}
"""Codes of InvalidRequest that are not a 400."""

_ENDINGS: dict[str, tuple[int, str, str]] = {
    "cancelled": (499, _INVALID, "request_cancelled"),
    "abandoned": (499, _INVALID, "request_cancelled"),
    "slow_client": (408, _INVALID, "slow_client"),
    "timeout": (504, "timeout_error", "timeout"),
    "queue_timeout": (504, "timeout_error", "queue_timeout"),
    "stream_idle": (504, _SERVER, "stream_idle"),
    "gateway_draining": (503, _SERVER, "gateway_draining"),
    "engine_failed": (502, _SERVER, "engine_failed"),
    "error": (500, _SERVER, "engine_error"),
}
"""Reasons of StreamFailed: status, type, code."""

_SENTENCES = {
    "cancelled": "The request was cancelled.",
    "abandoned": "The request was cancelled: nobody was listening.",
    "slow_client": "The client read too slowly.",
    "timeout": "The deadline passed while the request was running.",
    "queue_timeout": "The deadline passed while the request was waiting in the queue.",
    "stream_idle": "The worker gave nothing of this request for too long.",
    "gateway_draining": "This gateway is shutting down.",
    "engine_failed": "The engines that ran this request died without making progress.",
    "error": "The engine could not run this request.",
}

_RETRY_AFTER_S = {
    "queue_full": 1,
    "store_unavailable": 1,
    "not_replicated": 1,
    "model_not_ready": 1,
    "too_many_connections": 1,
    "gateway_draining": 1,
    "log_expired": 1,
}
_CLOSING = frozenset(
    {
        *("too_many_connections", "gateway_draining"),
        *("body_too_large", "request_timeout", "invalid_body"),
    }
)
"""After these the connection is closed: for another gateway, or because its body was not read."""


def describe(error: Exception) -> Problem:
    """What a client is told about an error; nothing of our insides for an unexpected one."""
    if isinstance(error, StreamFailed):
        status, kind, code = _ENDINGS.get(error.reason, _ENDINGS["error"])
        return _problem(status, kind, error.code or code, str(error))
    found = next((_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS), None)
    if found is None:
        return _problem(500, _SERVER, "internal_error", "The server failed; this was logged.")
    status, kind, code = found
    if isinstance(error, InvalidRequest):
        status = _STATUS_OF_CODE.get(error.code, status)
        return _problem(status, kind, error.code, error.message, error.param)
    if isinstance(error, TemplateError):
        return _problem(status, kind, code, str(error), "messages")
    if isinstance(error, ModelNotFound):
        return _problem(status, kind, code, str(error), "model")
    if isinstance(error, StoreUnavailable):
        # Its reason names addresses and paths: that is for the log.
        return _problem(status, kind, code, "The queue cannot be reached; try again in a moment")
    if isinstance(error, IdempotencyConflict):
        return _problem(status, kind, code, str(error), "Idempotency-Key")
    if isinstance(error, RateLimited):
        problem = _problem(status, error.kind, code, str(error))
        problem.headers.update(error.headers)
        problem.headers["Retry-After"] = str(max(1, math.ceil(error.retry_ms / 1000)))
        problem.headers["retry-after-ms"] = str(error.retry_ms)
        return problem
    return _problem(status, kind, code, str(error))


def http_problem(status: int, message: str) -> Problem:
    """What the HTTP server itself refuses."""
    codes = {
        404: "not_found",
        405: "method_not_allowed",
        413: "body_too_large",
        417: "expectation_failed",
    }
    if status >= 500:
        return _problem(status, _SERVER, "internal_error", message)
    return _problem(status, _INVALID, codes.get(status, "bad_request"), message)


def is_known(error: Exception) -> bool:
    """Whether the error is one of this project's, and not a defect."""
    return isinstance(error, (StreamFailed, *_STATUS))


def _problem(status: int, kind: str, code: str, message: str, param: str | None = None) -> Problem:
    headers: dict[str, str] = {}
    if status == 503:
        headers["Retry-After"] = str(_RETRY_AFTER_S.get(code, 1))
    if code in _CLOSING:
        headers["Connection"] = "close"
    return Problem(status, kind, code, message, param, headers)
