"""Every error that crosses a module's border. HTTP statuses live in the gateway only."""

from __future__ import annotations


class RtsError(Exception):
    """The root of this project's errors."""


class DecodeError(RtsError):
    """A message is not what this version of the program understands.

    Attributes:
        kind: the class that was expected.
        reason: what is wrong with the bytes.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"cannot read a {kind}: {reason}")
        self.kind = kind
        self.reason = reason


class StoreUnavailable(RtsError):
    """Redis did not answer in time, is full, or refuses writes.

    Attributes:
        reason: what the client library said.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"redis is not available: {reason}")
        self.reason = reason


class NotReplicated(RtsError):
    """No replica of Redis confirmed a request in time, and none is accepted without."""

    def __init__(self) -> None:
        super().__init__("No replica of the queue confirmed the request; try again in a moment")


class LogExpired(RtsError):
    """A request's token log is gone: it ended too long ago, or Redis lost its data.

    Attributes:
        rid: the request.
    """

    def __init__(self, rid: str) -> None:
        super().__init__(f"the token log of {rid} is gone")
        self.rid = rid


class InvalidRequest(RtsError):
    """A request that can never be served as it is.

    Attributes:
        param: the field or header at fault, or None.
        code: the machine-readable reason.
    """

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class TemplateError(RtsError):
    """A model's chat template refused the messages, or is itself broken."""
