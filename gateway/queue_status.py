"""`event: queue_status`: what a silent stream waits for, told to the clients that asked for it.

A request has a place in the queue, then an engine that reads its prompt; both can take long, and a
model that was scaled to zero has no worker at all yet. Without an `id:`, so that a client resumes
where it was; only what has changed, so that keep-alives stay what a silent stream mostly sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from gateway import sse
from gateway.census import Census, QueueCount
from shared import keys
from shared.store import Store, unavailable

SILENT_S = 1.0
"""A stream that is silent for so long is told of, and again as often."""
_FIELDS = ("st", "mv", "cls", "tk", "pt", "pr")
_QUEUED, _RUNNING = b"w", b"r"


class Queued(msgspec.Struct, tag="queued", tag_field="status"):
    """The request waits for a worker.

    Attributes:
        position: its place in the queue, 1 is next; callers take turns, so it is an estimate.
        eta_s: how long it will wait, if that can be told.
        workers: how many serve the model; 0: one has yet to start.
    """

    request_id: str
    position: int
    eta_s: float | None
    workers: int


class Running(msgspec.Struct, tag="running", tag_field="status"):
    """A worker has the request, and is silent since it took it or since its last token.

    Attributes:
        computed_tokens: how many of the prompt's tokens it has read.
    """

    request_id: str
    prompt_tokens: int
    computed_tokens: int


Report = Queued | Running


def event(report: Report) -> bytes:
    """The report as a server-sent event."""
    return b"event: queue_status\ndata: %b\n\n" % sse.encode(report)


class QueueStatus:
    """Finds out what requests wait for."""

    def __init__(self, store: Store, census: Census) -> None:
        self._store = store
        self._census = census

    async def of(self, rids: Sequence[str]) -> list[Report | None]:
        """A report on each of these requests, by one call to Redis; None: it waits for nothing.

        Raises:
            StoreUnavailable: Redis cannot be asked.
        """
        async with unavailable(), self._store.client.pipeline(transaction=False) as pipe:
            for rid in rids:
                pipe.hmget(keys.request(rid), list(_FIELDS))
            rows = await pipe.execute()
        return [
            self._report(rid, dict(zip(_FIELDS, row, strict=True)))
            for rid, row in zip(rids, rows, strict=True)
        ]

    def _report(self, rid: str, row: dict[str, Any]) -> Report | None:
        if row["st"] == _QUEUED:
            mv, cls = row["mv"].decode(), row["cls"].decode()
            count = self._census.of(mv)
            head = count.queues.get(cls, QueueCount()).head
            position, eta_s = self._census.place(mv, cls, int(row["tk"]), head)
            return Queued(rid, position, eta_s, len(count.engines))
        if row["st"] == _RUNNING:
            prompt = int(row["pt"])
            return Running(rid, prompt, min(prompt, int(row["pr"] or 0)))
        return None
