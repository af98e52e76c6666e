"""From a subscription to a client: as server-sent events, or in one piece."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from gateway import sse
from gateway.edge import Edge
from gateway.errors import StreamFailed, describe, is_known
from gateway.flows import HANDOVER
from gateway.formats import Outcome, Subject, format_of
from gateway.hub import Subscription
from gateway.metrics import Meter
from shared import messages
from shared.errors import StoreUnavailable

log = logging.getLogger(__name__)

LAST_WORDS_S = 0.2
"""How long a client that is cut gets for the event that says why."""
_GOOD = ("stop", "length")


@dataclass(frozen=True, slots=True)
class Listening:
    """One client's interest in a request.

    Attributes:
        after: number of the last token it has; None: it has not even seen the beginning.
        kept: the request goes on when this client leaves, so several readers, on several gateways,
            may come to see its end.
        moves: this client has said that it goes on elsewhere where it is cut off.
        started: when the client asked, in the event loop's time.
        meter: None: this request is measured elsewhere.
        queue_status: the client asked to be told what its request waits for.
    """

    request: web.Request
    subject: Subject
    caller: str
    subscription: Subscription
    kept: bool
    moves: bool
    after: int | None
    started: float
    meter: Meter | None
    queue_status: bool


class Relay:
    """One client's way through one request: its tokens, and what becomes of both at the end."""

    def __init__(self, edge: Edge, listening: Listening) -> None:
        self._edge = edge
        self._meter = listening.meter
        self._request = listening.request
        self._clock = asyncio.get_running_loop().time
        self._started = listening.started
        self._after = listening.after
        self._first_at = 0.0
        self._next = listening.subscription.next
        self._kept = listening.kept
        self._settled = False
        self._said_end = False
        self.reason = ""
        self.format = format_of(listening.subject)
        self.flow = edge.flows.open(
            listening.request,
            listening.subject.rid,
            listening.caller,
            listening.subscription,
            moves=listening.moves,
            queue_status=listening.queue_status,
        )

    async def collect(self) -> dict[str, Any]:
        """The whole answer in one piece.

        Raises:
            StreamFailed: it ended otherwise than with its text.
            LogExpired: its tokens are gone.
        """
        texts: list[str] = []
        try:
            while True:
                entry = await self._entry()
                event = entry.event
                if isinstance(event, messages.End):
                    return self.format.reply(texts, self._outcome(event, entry.seq))
                texts.extend(token.text for token in event.tokens)
        except asyncio.CancelledError:
            if not self.flow.interrupted():
                self._leave("cancelled")
                raise
            self._leave(self.flow.verdict)
            raise StreamFailed(self.flow.verdict) from None
        except Exception:
            self._leave("error")
            raise
        finally:
            self._close()

    async def stream(self, headers: dict[str, str]) -> web.StreamResponse:
        """The answer as server-sent events; what goes wrong from here on is an event, too."""
        response = web.StreamResponse(headers={**sse.HEADERS, **headers})
        try:
            await response.prepare(self._request)
            self.flow.response = response
            error: Exception | None = None
            try:
                await self._pump(response)
            except asyncio.CancelledError:
                if not self.flow.interrupted():
                    raise
                error = StreamFailed(self.flow.verdict)
            except ConnectionError:
                raise
            except Exception as failure:
                error = failure
            self.flow.over()
            if error is not None:
                await self._fail(response, error)
        except (asyncio.CancelledError, ConnectionError):
            self._leave("cancelled")
            raise
        finally:
            self._close()
        return response

    async def _pump(self, response: web.StreamResponse) -> None:
        """All events. Per token: one wait, one write, three times written down."""
        flow, clock, write, events = self.flow, self._clock, response.write, self.format.tokens
        opening = sse.RETRY + (self.format.begin() if self._after is None else b"")
        while True:
            entry = await self._entry()
            event = entry.event
            if isinstance(event, messages.End):
                break
            data = events(event.first, event.tokens)
            if data:
                if opening:
                    data, opening = opening + data, b""
                flow.wrote_at = flow.blocked_at = clock()
                await write(data)
                flow.blocked_at = 0.0
        data = opening + self.format.end(self._outcome(event, entry.seq)) + sse.DONE
        flow.blocked_at = clock()
        # It may wait for the client with all of it in a buffer: nothing may come behind.
        self._said_end = True
        await write(data)
        await response.write_eof()

    async def _entry(self) -> messages.Entry:
        entry = await self._next()
        now = self._clock()
        self.flow.heard_at = now
        event = entry.event
        if isinstance(event, messages.Tokens):
            self._first_at = self._first_at or now
            if self._meter is not None:
                self._meter.count(now, len(event.tokens))
        else:
            # The request is over: nothing is left to withdraw or to leave.
            self._settled = True
            self._end_meter(event, entry.seq)
        return entry

    def _outcome(self, end: messages.End, tokens: int) -> Outcome:
        self.reason = end.reason
        if end.reason not in _GOOD:
            raise StreamFailed(end.reason, end.code, end.message)
        now = self._clock()
        first_at = self._first_at or now
        return Outcome.of(
            end, tokens, (first_at - self._started) * 1000, (now - self._started) * 1000
        )

    async def _fail(self, response: web.StreamResponse, error: Exception) -> None:
        """Tells the client in the stream; without [DONE], so that it knows it is incomplete."""
        verdict = self.flow.verdict
        if verdict != HANDOVER:
            if not is_known(error):
                log.exception(
                    "a stream failed", extra={"request_id": self.flow.rid}, exc_info=error
                )
            elif isinstance(error, StoreUnavailable):
                log.warning(
                    "a stream failed", extra={"request_id": self.flow.rid, "why": error.reason}
                )
            self._leave(verdict or "error")
        data = b""
        if verdict != HANDOVER and not self._said_end:
            data = sse.json_event(self.flow.subscription.last, describe(error).body())
        cut = verdict == "slow_client"
        try:
            async with asyncio.timeout(LAST_WORDS_S if cut else self._edge.settings.slow_client_s):
                await response.write(data)
                await response.write_eof()
        except (TimeoutError, ConnectionError):
            cut = True
        if cut and self._request.transport is not None:
            self._request.transport.abort()

    def _leave(self, reason: str) -> None:
        """This client gets no more of it; a request that nobody else waits for is cancelled."""
        self.reason = self.reason or reason
        if not self._settled and (not self._kept or reason == "stream_idle"):
            self._settled = True
            run = self.flow.subscription.run
            self._edge.send(self._edge.withdraw(self.flow.rid, self.flow.caller, run))
            end = messages.End(messages.VERSION, reason)
            self._end_meter(end, self.flow.subscription.last)

    def _close(self) -> None:
        self._edge.flows.close(self.flow)
        if self._kept and not self._settled:
            self._edge.send(self._edge.leave(self.flow.rid, self.flow.caller))

    def _end_meter(self, end: messages.End, tokens: int) -> None:
        meter, self._meter = self._meter, None
        if meter is None:
            return
        if self._kept:
            self._edge.send(self._end_if_first(meter, self._clock(), end, tokens))
        else:
            meter.end(self._clock(), end, tokens)

    async def _end_if_first(self, meter: Meter, now: float, end: messages.End, tokens: int) -> None:
        with contextlib.suppress(StoreUnavailable):
            if await self._edge.is_first(self.flow.rid):
                meter.end(now, end, tokens)
