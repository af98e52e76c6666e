"""`event: queue_status`: what a silent stream waits for, told to the clients that asked for it.

A request has a place in the queue, then an engine that reads its prompt; both can take long, and a
model that was scaled to zero has no worker at all yet. Without an `id:`, so that a client resumes
where it was; only what has changed, so that keep-alives stay what a silent stream mostly sends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gateway import sse
from gateway.census import Census
from gateway.flows import Flow, Flows
from shared import keys
from shared.errors import StoreUnavailable
from shared.store import ENGINE_TTL_MS, Store, unavailable

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""A stream without a token from one look to the next is silent."""
_FIELDS = ("st", "own", "mv", "cls", "tk", "pt", "pr")
_ENDED = b"e"


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits for a worker.

    Attributes:
        position: its place in the queue, 1 is next; callers take turns, so it is an estimate.
        workers: how many serve its version of the model; 0: one has yet to start, or the last is
            about to stop.
        eta_s: how long it will wait, if that can be told; another one alone is no news.
    """

    request_id: str
    position: int
    workers: int
    eta_s: float | None = field(compare=False)
    status: Literal["queued"] = "queued"


@dataclass(frozen=True, slots=True)
class Running:
    """A worker took the request, and nothing has been heard from it since, or since a token.

    Attributes:
        computed_tokens: how many of the prompt's tokens have been read.
    """

    request_id: str
    prompt_tokens: int
    computed_tokens: int
    status: Literal["running"] = "running"


Report = Queued | Running


def event(report: Report) -> bytes:
    """The report as a server-sent event."""
    return b"event: queue_status\ndata: %b\n\n" % sse.encode(report)


@dataclass(slots=True)
class _Told:
    """The last token of a flow at the last look, and what it was told last."""

    token: int
    report: Report | None = None


class QueueStatus:
    """Reports to the flows of a gateway whose clients asked for it."""

    def __init__(self, store: Store, census: Census, flows: Flows) -> None:
        self._store = store
        self._census = census
        self._flows = flows
        self._told: dict[Flow, _Told] = {}

    async def watch(self) -> None:
        """Looks for silent flows and tells them what they wait for, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._look()
            except StoreUnavailable:
                continue
            except Exception:
                log.exception("telling what streams wait for failed")

    async def _look(self) -> None:
        silent = {}
        before, self._told = self._told, {}
        for flow in self._flows:
            if flow.queue_status:
                token = flow.subscription.last
                told = self._told[flow] = before.get(flow, _Told(-1))
                if told.token == token:
                    silent[flow] = told
                told.token = token
        if not silent:
            return
        reports = await self._reports([flow.rid for flow in silent])
        for (flow, told), report in zip(silent.items(), reports, strict=True):
            # A token may have come while Redis was asked.
            if report in (None, told.report) or flow.subscription.last != told.token:
                continue
            if await flow.write(event(report)):
                told.report = report

    async def _reports(self, rids: Sequence[str]) -> list[Report | None]:
        """On each of these requests; None: it waits for nothing.

        Raises:
            StoreUnavailable: Redis cannot be asked.
        """
        async with unavailable(), self._store.client.pipeline(transaction=False) as pipe:
            pipe.time()
            for rid in rids:
                pipe.hmget(keys.request(rid), list(_FIELDS))
            (seconds, _), *values = await pipe.execute()
        rows: list[dict[str, Any]] = [dict(zip(_FIELDS, row, strict=True)) for row in values]
        queues = await self._queues(
            {(row["mv"], row["cls"]) for row in rows if _is_queued(row)}, int(seconds)
        )
        reports: list[Report | None] = []
        for rid, row in zip(rids, rows, strict=True):
            if _is_queued(row):
                head, workers = queues[row["mv"], row["cls"]]
                mv, cls = row["mv"].decode(), row["cls"].decode()
                position, eta_s = self._census.place(mv, cls, int(row["tk"]), head)
                reports.append(Queued(rid, position, workers, eta_s))
            elif row["st"] in (None, _ENDED):
                reports.append(None)
            else:
                prompt = int(row["pt"])
                # messages.WAITS is none.
                computed = max(0, int(row["pr"] or 0))
                reports.append(Running(rid, prompt, min(prompt, computed)))
        return reports

    async def _queues(
        self, queues: set[tuple[bytes, bytes]], now_s: int
    ) -> dict[tuple[bytes, bytes], tuple[int, int]]:
        """Head and workers of queues, which are (mv, class).

        Not from the census: it has live versions only, and others serve their queue to its end.
        """
        async with unavailable(), self._store.client.pipeline(transaction=False) as pipe:
            for mv, cls in queues:
                pipe.hget(keys.count(mv.decode(), cls.decode()), "head")
                pipe.zcount(keys.engines(mv.decode()), now_s * 1000 - ENGINE_TTL_MS, "+inf")
            found = await pipe.execute()
        heads = [int(head or 0) for head in found[::2]]
        return dict(zip(queues, zip(heads, found[1::2], strict=True), strict=True))


def _is_queued(row: dict[str, Any]) -> bool:
    """Whether it waits: for its turn, or handed back by a worker that stops."""
    handed_back = (row["own"] or b"").endswith(b":-")
    return row["st"] == b"w" or (row["st"] == b"r" and handed_back)
