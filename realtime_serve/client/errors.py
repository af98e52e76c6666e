"""What goes wrong, as a user of the client sees it: one small tree of exceptions."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class APIError(Exception):
    """Something that the server refused, or that ended otherwise than with its answer.

    Attributes:
        message: one sentence. code: the machine-readable reason, as in docs/api.md, or "".
        status: of HTTP; None when it came inside a stream or without any answer.
        param: the field or header at fault, or None.
        request_id: which request it was, as the server calls it, or "" without an answer.
        retry_after_s: when the server wants to be asked again, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        status: int | None = None,
        param: str | None = None,
        request_id: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class BadRequestError(APIError):
    """The request can never work as it is; `param` says what to change."""


class AuthenticationError(APIError):
    """The API key is missing, wrong, or not allowed to do this."""


class NotFoundError(APIError):
    """There is no such model or request of yours, or its tokens are not kept any more."""


class ConflictError(APIError):
    """The idempotency key was used for another request."""


class RateLimitError(APIError):
    """Over the caller's limit; `retry_after_s` says when it will be accepted."""


class ServerError(APIError):
    """The server or its engines failed, or its queue stayed full."""


class DeadlineError(APIError):
    """The request's own deadline, `timeout_s`, passed before it had ended."""


class RequestCancelledError(APIError):
    """Somebody cancelled the request."""


class StreamLostError(APIError):
    """The rest of a stream cannot be had: the server lost its tokens, or left some out."""


class APIConnectionError(APIError):
    """No gateway answered for as long as the client is patient."""


class Problem(msgspec.Struct):
    """The server's error object."""

    message: str = ""
    type: str | None = None
    code: str | int | None = None
    param: str | None = None


class _Body(msgspec.Struct):
    error: Problem


_OF_CODE: dict[str, type[APIError]] = {
    "request_cancelled": RequestCancelledError,
    "timeout": DeadlineError,
    "queue_timeout": DeadlineError,
    "log_expired": StreamLostError,
    "slow_client": ServerError,
}
_OF_STATUS: dict[int, type[APIError]] = {
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFoundError,
    409: ConflictError,
    410: NotFoundError,
    429: RateLimitError,
}
_PASSING_STATUS = frozenset({502, 503, 504})
_PASSING_CODES = frozenset({"gateway_draining", "store_unavailable", "slow_client"})
"""In a stream: this connection ends, the request does not."""
_FINAL_CODES = frozenset({"engine_failed", "timeout", "queue_timeout", "stream_idle"})
"""What became of the request itself, whatever the status: asking again changes nothing."""

_decoder = msgspec.json.Decoder(_Body)


def request_id_of(headers: Mapping[str, str]) -> str:
    """Which request a response is about, or ""."""
    # Gateways up to release 0.1 say it in X-Request-Id alone, which a proxy may have set.
    return headers.get("X-Stream-Id") or headers.get("X-Request-Id", "")


def of_response(status: int, headers: Mapping[str, str], body: bytes) -> APIError:
    """The error that a response with a status of 400 or more means."""
    try:
        problem = _decoder.decode(body).error
    except msgspec.DecodeError:
        # A load balancer's own page.
        problem = Problem(code=f"http_{status}")
    code = str(problem.code or "")
    default = BadRequestError if status < 500 else ServerError
    cls = _OF_CODE.get(code) or _OF_STATUS.get(status, default)
    return cls(
        problem.message or f"The server answered with status {status}",
        code=code,
        status=status,
        param=problem.param,
        request_id=request_id_of(headers),
        retry_after_s=_retry_after_s(headers),
    )


def of_event(problem: Problem, request_id: str) -> APIError:
    """The error that an event of a stream tells."""
    code = str(problem.code or "")
    default = BadRequestError if problem.type == "invalid_request_error" else ServerError
    # What was under way is lost; in reply to a request it means that there is none.
    cls = StreamLostError if code == "request_gone" else _OF_CODE.get(code, default)
    return cls(problem.message, code=code, param=problem.param, request_id=request_id)


def is_passing(error: APIError) -> bool:
    """Whether the same may go well on another connection, with the request as it is."""
    if isinstance(error, APIConnectionError) or error.code in _PASSING_CODES:
        return True
    return error.status in _PASSING_STATUS and error.code not in _FINAL_CODES


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    for name, unit_s in (("retry-after-ms", 0.001), ("Retry-After", 1.0)):
        try:
            found = float(headers[name]) * unit_s
        except (KeyError, ValueError):
            continue
        # A date, which HTTP allows too, is not what our gateways send.
        if 0 <= found < float("inf"):
            return found
    return None
