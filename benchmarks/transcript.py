"""What one recorded streaming response says: checked and timed after the load has ended."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any


class BadResponse(Exception):
    """The response is not a complete stream of tokens; the message says how."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One response in numbers.

    Attributes:
        tokens: as the server counts them in `usage`, else the events with text.
        ttft_s: from the request to the first event with text.
        gaps_s: between consecutive events with text; events that arrived together have 0.
    """

    tokens: int
    ttft_s: float
    gaps_s: list[float]


def read_response(parts: Sequence[bytes], times: Sequence[float], sent_at: float) -> Timing:
    """Reads a response from the pieces in which it arrived.

    Args:
        parts: the pieces, from the status line to the end.
        times: when each arrived.
        sent_at: when its request was sent.

    Raises:
        BadResponse: another status than 200, an error event, neither [DONE] nor a finish reason,
            or no text.
    """
    raw = b"".join(parts)
    ends = list(accumulate(map(len, parts)))
    arrived: list[float] = []
    counted, done = 0, False
    for payload, end in _events(raw):
        if payload == b"[DONE]":
            done = True
            continue
        event = json.loads(payload)
        if "error" in event:
            raise BadResponse(f"an error in the stream: {payload[:300]!r}")
        if text_of(event):
            arrived.append(times[bisect_left(ends, end)])
        done = done or any(choice.get("finish_reason") for choice in event.get("choices") or ())
        counted = (event.get("usage") or {}).get("completion_tokens", counted)
    if not done:
        raise BadResponse(f"the stream ended without an end: {raw[-300:]!r}")
    if not arrived:
        raise BadResponse(f"the stream has no text: {raw[-300:]!r}")
    gaps = [later - earlier for earlier, later in pairwise(arrived)]
    return Timing(counted or len(arrived), arrived[0] - sent_at, gaps)


def _events(raw: bytes) -> list[tuple[bytes, int]]:
    """Each event's data, and the offset in `raw` at which the event was complete."""
    head, separator, _ = raw.partition(b"\r\n\r\n")
    if not separator or not head.startswith(b"HTTP/1.1 200"):
        raise BadResponse(f"not a 200: {raw[:600]!r}")
    start = len(head) + 4
    if b"transfer-encoding: chunked" in head.lower():
        body, chunks = _unchunked(raw, start)
    else:
        body, chunks = raw[start:], [(0, start)]
    events: list[tuple[bytes, int]] = []
    at, offset = 0, 0
    for line in body.split(b"\n"):
        at += len(line) + 1
        if line.startswith(b"data:"):
            while offset + 1 < len(chunks) and chunks[offset + 1][0] < at:
                offset += 1
            inside, place = chunks[offset]
            events.append((line[5:].strip(), min(place + at - inside, len(raw))))
    return events


def _unchunked(raw: bytes, start: int) -> tuple[bytes, list[tuple[int, int]]]:
    """The body, and for each chunk where it begins in the body and in `raw`."""
    pieces: list[bytes] = []
    places: list[tuple[int, int]] = []
    length = 0
    while True:
        line_end = raw.find(b"\r\n", start)
        if line_end < 0:
            raise BadResponse("the response was cut off inside a chunk")
        size = int(raw[start:line_end].partition(b";")[0], 16)
        if size == 0:
            return b"".join(pieces), places
        start = line_end + 2
        pieces.append(raw[start : start + size])
        places.append((length, start))
        length += size
        start += size + 2


def text_of(event: dict[str, Any]) -> str:
    """The text that an event carries, in any of the formats that are measured."""
    choices = event.get("choices") or [{}]
    choice = choices[0]
    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    return str(text or event.get("token") or "")
