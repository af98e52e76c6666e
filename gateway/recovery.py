"""Queues a request again that Redis has lost, with the tokens that its client already has.

A server that is killed while it syncs its append-only file, a failover to a replica that lags, a
FLUSHALL: each takes away the newest that Redis said it had. What was accepted here and is still
relayed here, this gateway knows: the order, and every token of it that was handed on. The request
goes on after these, as after the death of a worker; its client sees a pause.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

import msgspec

from gateway.errors import ANOTHER_RUN, RequestGone
from shared import messages
from shared.errors import LogExpired, StoreUnavailable
from shared.store import Enqueued

log = logging.getLogger(__name__)

RETRY_S = 0.2
"""Pause between attempts, of readers, too, while Redis is away."""


class Enqueue(Protocol):
    """Queues the request once more."""

    async def __call__(
        self,
        request: messages.Request,
        *,
        timeout_ms: int,
        had: Sequence[messages.Token],
        t0: int,
        strict: bool,
    ) -> Enqueued:
        """As Store.enqueue, which says the errors, too."""
        ...


class Recovery:
    """What it takes to queue one request again. About 17 bytes a token, beside the prompt's.

    Args:
        request: as it was accepted. enqueue: queues it again. t0: as Enqueued.t0.
        ends_at: its deadline, in the event loop's time.
        keep_s: how long Redis knows a request after its end.
    """

    def __init__(
        self,
        request: messages.Request,
        enqueue: Enqueue,
        *,
        t0: int,
        ends_at: float,
        keep_s: float,
    ) -> None:
        self._rid = request.rid
        # Encoded, it is a tenth of what a list of ids takes.
        self._request = messages.encode(request)
        self._enqueue = enqueue
        self._t0 = t0
        self._ends_at = ends_at
        self._keep_s = keep_s
        self._tokens = bytearray()
        self._count = 0

    def add(self, tokens: messages.Tokens) -> None:
        """Tokens that are handed on, one after the other from the first on."""
        self._tokens += messages.encode(tokens)
        self._count += 1

    async def run(self, known_at: float, slots: asyncio.Semaphore) -> None:
        """Queues it again; waits for a Redis that is away.

        Args:
            known_at: when it last waited or ran in Redis, in the event loop's time.
            slots: how many may be queued at once.

        Raises:
            LogExpired: it may have ended and been forgotten since then, or its deadline has passed.
            RequestGone: another run of it is there by now.
        """
        clock = asyncio.get_running_loop().time
        if clock() - known_at > self._keep_s:
            raise LogExpired(self._rid)
        told = False
        while (left := self._ends_at - clock()) > 0:
            try:
                async with slots:
                    await self._once(int(left * 1000) + 1)
            except StoreUnavailable as error:
                if not told:
                    log.warning(
                        "a lost request waits to be queued again",
                        extra={"request_id": self._rid, "error": error.reason},
                    )
                    told = True
                await asyncio.sleep(RETRY_S)
                continue
            log.warning(
                "redis lost a request: queued again",
                extra={"request_id": self._rid, "entries": self._count},
            )
            return
        raise LogExpired(self._rid)

    async def _once(self, timeout_ms: int) -> None:
        # Not strict: it stands in the queue although no replica has it, and can be put back again.
        request = messages.decode(self._request, messages.Request)
        call = self._enqueue(
            request, timeout_ms=timeout_ms, had=self._had(), t0=self._t0, strict=False
        )
        attempt = asyncio.ensure_future(call)
        try:
            answer = await asyncio.shield(attempt)
            if answer.outcome == "conflict":
                raise RequestGone(ANOTHER_RUN)
            self._t0 = answer.t0
        except asyncio.CancelledError:
            # Its client went. What takes the request back must not come before it.
            await asyncio.wait([attempt])
            if not attempt.cancelled():
                # Asked for, or asyncio would report it as forgotten.
                attempt.exception()
            raise

    def _had(self) -> list[messages.Token]:
        # An array of the messages, which stand one behind the other.
        array = b"\xdd" + self._count.to_bytes(4, "big") + self._tokens
        found = msgspec.msgpack.decode(array, type=list[messages.Tokens])
        return [token for event in found for token in event.tokens]
