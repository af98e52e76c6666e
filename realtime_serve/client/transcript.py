"""A stream as the client understands it: bytes to events, events to tokens. No input or output."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from realtime_serve.client import errors
from realtime_serve.client.answers import Answer, Token, Usage

MAX_EVENT_BYTES = 1 << 20
_DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event. number: its id, that of the last token it covers; None without."""

    number: int | None
    data: bytes


class EventReader:
    """Cuts the bytes of one connection into events; what has no end is never an event.

    Attributes:
        comments: how many comment lines came; the server sends one when it has nothing to say.
    """

    def __init__(self) -> None:
        self.comments = 0
        self._rest = b""
        self._number: int | None = None
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[Event]:
        """The events that these bytes complete.

        Raises:
            APIError: it is no stream of events, or one event is too large.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        found = [event for line in lines if (event := self._line(line.removesuffix(b"\r")))]
        if len(self._rest) > MAX_EVENT_BYTES:
            raise errors.APIError("An event of the stream is too large", code="bad_event")
        return found

    def _line(self, line: bytes) -> Event | None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            number, data, self._number, self._data = self._number, self._data, None, []
            return Event(number, b"\n".join(data)) if data else None
        if not name:
            self.comments += 1
        elif name == b"data":
            self._data.append(value)
        elif name == b"id":
            self._number = int(value) if value.isdigit() else None
        return None


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    text: str | None = None
    finish_reason: str | None = None


class _Payload(msgspec.Struct):
    """Every kind of event: a token or the end of /infer_stream, a chunk of OpenAI's, an error."""

    request_id: str = ""
    id: str = ""
    text: str | None = None
    choices: list[_Choice] | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    metrics: dict[str, float] | None = None
    error: errors.Problem | None = None


_decoder = msgspec.json.Decoder(_Payload)


class Transcript:
    """What has come of one answer, over however many connections.

    Args:
        after: number of the last token the user has.

    Attributes:
        last: number of the last token that came: where a new connection goes on.
        request_id: as the events call it, or "" before the first.
        done: it is complete.
    """

    def __init__(self, after: int = 0) -> None:
        self.last = after
        self.request_id = ""
        self.done = False
        self._texts: list[str] = []
        self._finish_reason = ""
        self._usage: Usage | None = None
        self._metrics: dict[str, float] = {}

    def answer(self) -> Answer:
        """The whole, once it is done."""
        return Answer(
            self.request_id,
            "".join(self._texts),
            list(self._texts),
            self._finish_reason,
            self._usage,
            dict(self._metrics),
        )

    def take(self, event: Event) -> Token | None:
        """The token that an event brings; None when it brings none, or one that came before.

        Changes nothing when it raises.

        Raises:
            StreamLostError: tokens are missing in front of it.
            APIError: what the server says in the stream, or an event that makes no sense.
        """
        if event.data == _DONE:
            if not self._finish_reason:
                raise self._bad(event)
            self.done = True
            return None
        try:
            payload = _decoder.decode(event.data)
        except msgspec.DecodeError:
            raise self._bad(event) from None
        if payload.error is not None:
            raise errors.of_event(payload.error, self.request_id)
        if event.number is None:
            raise self._bad(event)
        if payload.choices is None:
            token = self._take_infer(event.number, payload, event)
        else:
            token = self._take_chunk(event.number, payload, payload.choices)
        self.request_id = self.request_id or payload.request_id or payload.id
        return token

    def _take_infer(self, number: int, payload: _Payload, event: Event) -> Token | None:
        """Every token has an event, so numbers have no gaps."""
        if payload.finish_reason is not None:
            if number != self.last:
                raise self._gap(number)
            self._end(payload.finish_reason, payload)
            return None
        if payload.text is None:
            raise self._bad(event)
        if number > self.last + 1:
            raise self._gap(number - 1)
        return self._add(number, payload.text)

    def _take_chunk(self, number: int, payload: _Payload, choices: list[_Choice]) -> Token | None:
        """Tokens without text have no chunk, so numbers only grow."""
        text = ""
        for choice in choices:
            text += choice.delta.content or choice.text or ""
            if choice.finish_reason is not None:
                if number < self.last:
                    raise self._gap(number)
                self._end(choice.finish_reason, payload)
        self._usage = payload.usage or self._usage
        return self._add(number, text) if text else None

    def _add(self, number: int, text: str) -> Token | None:
        if number <= self.last:
            return None
        self.last = number
        self._texts.append(text)
        return Token(number - 1, text)

    def _end(self, reason: str, payload: _Payload) -> None:
        self._finish_reason = reason
        self._usage = payload.usage or self._usage
        self._metrics = payload.metrics or self._metrics

    def _gap(self, number: int) -> errors.StreamLostError:
        return errors.StreamLostError(
            f"The stream is not whole: it is at token {number}, and {self.last} came before",
            code="stream_gap",
            request_id=self.request_id,
        )

    def _bad(self, event: Event) -> errors.APIError:
        return errors.APIError(
            f"The server sent an event that makes no sense: {event.data[:64]!r}",
            code="bad_event",
            request_id=self.request_id,
        )
