"""Bytes of server-sent events, in the form that the official OpenAI clients survive.

No block without `data:`; a keep-alive is one comment line without a blank line behind it; `id:` and
`retry:` ride on data events.
"""

from __future__ import annotations

from typing import Any

import msgspec

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
KEEP_ALIVE = b": keep-alive\n"
RETRY = b"retry: 1000\n"
"""How long a browser waits before it connects again; once a stream, with its first tokens."""
DONE = b"data: [DONE]\n\n"

encode = msgspec.json.Encoder().encode
"""JSON in one line: a line break inside a text is escaped."""


def event(number: int, data: bytes) -> bytes:
    """One event; `number` is that of the last token the client has when it has read it."""
    return b"id: %d\ndata: %b\n\n" % (number, data)


def json_event(number: int, value: Any) -> bytes:
    """One event whose data is a JSON value."""
    return event(number, encode(value))
