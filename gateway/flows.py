"""The open streams of this gateway, and the one task that watches over all of them.

A timer for each token would cost more than the token. Here a token only writes down times; the
watch looks at them a few times a second and steps in where a stream is silent, slow or idle.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

from aiohttp import web

from gateway.hub import Hub, Subscription
from gateway.protocol import Protocol
from gateway.sse import KEEP_ALIVE
from shared import keys, messages
from shared.errors import StoreUnavailable
from shared.settings import Settings
from shared.store import Store, unavailable

log = logging.getLogger(__name__)

_WAITS = str(messages.WAITS).encode()
HANDOVER = "handover"
"""Verdict on a resumable stream when the gateway drains: its client goes on elsewhere."""


class Flow:
    """One client that waits for one request's tokens, streaming or not.

    Attributes:
        moves: its client has said that it goes on elsewhere where it is cut off.
        request: the client's. response: where events go; None before it opened, and for a reply
            in one piece.
        heard_at: time of the last entry. wrote_at: of the last bytes sent.
        progress: rows the engine had computed when the stream was last found silent.
        blocked_at: since when a write waits for the client; 0: none does.
        behind_at: since when more entries wait for the client than may; 0: not so.
        queue_status: the client asked for such events.
        verdict: why the flow was stopped from outside: a reason of StreamFailed, or HANDOVER.
    """

    def __init__(
        self,
        request: web.Request,
        rid: str,
        caller: str,
        subscription: Subscription,
        *,
        moves: bool,
        queue_status: bool,
        now: float,
    ) -> None:
        self.request = request
        self.rid = rid
        self.caller = caller
        self.subscription = subscription
        self.moves = moves
        self.response: web.StreamResponse | None = None
        self.heard_at = now
        self.wrote_at = now
        self.blocked_at = 0.0
        self.behind_at = 0.0
        self.progress: bytes | None = None
        self.queue_status = queue_status
        self.verdict = ""
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._over = False

    def stop(self, verdict: str) -> None:
        """Interrupts the task that runs this flow; it finds the verdict and ends by it."""
        if not self._over and not self.verdict:
            self.verdict = verdict
            self._task.cancel()

    def interrupted(self) -> bool:
        """Whether the cancellation just caught was `stop`; it is then taken back."""
        if not self.verdict:
            return False
        self._task.uncancel()
        return True

    def look_for_end(self) -> None:
        """Notices a client's leaving behind what it sent ahead."""
        if isinstance(self.request.protocol, Protocol):
            self.request.protocol.look_for_end()

    def over(self) -> None:
        """From now on nothing interrupts the task."""
        self._over = True

    async def write(self, data: bytes) -> bool:
        """Sends what is no token; False: something is being written or has yet to be read."""
        response, transport = self.response, self.request.transport
        if response is None or transport is None or self.blocked_at or self._over:
            return False
        self.wrote_at = asyncio.get_running_loop().time()
        # So this never waits for the client, which all other streams' watch would wait for, too.
        if transport.get_write_buffer_size():
            return False
        try:
            await response.write(data)
        except ConnectionError:
            # aiohttp cancels the flow's own task for it.
            return False
        return True


class Flows:
    """All open flows."""

    def __init__(self, store: Store, hub: Hub, settings: Settings) -> None:
        self._store = store
        self._hub = hub
        self._settings = settings
        self._flows: set[Flow] = set()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._flows)

    def __iter__(self) -> Iterator[Flow]:
        return iter(list(self._flows))

    def open(
        self,
        request: web.Request,
        rid: str,
        caller: str,
        subscription: Subscription,
        *,
        moves: bool,
        queue_status: bool,
    ) -> Flow:
        """A new flow, run by the current task."""
        now = asyncio.get_running_loop().time()
        flow = Flow(
            request, rid, caller, subscription, moves=moves, queue_status=queue_status, now=now
        )
        self._flows.add(flow)
        return flow

    def close(self, flow: Flow) -> None:
        """The flow has ended. Idempotent."""
        flow.over()
        flow.subscription.close()
        self._flows.discard(flow)
        self._changed.set()

    async def empty(self, timeout_s: float) -> bool:
        """Waits until there is no flow left; False if the time ran out before."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._flows:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def watch(self) -> None:
        """Looks after all flows, for ever."""
        s = self._settings
        shortest = min(s.keep_alive_s, s.slow_client_s, s.stream_idle_s)
        while True:
            await asyncio.sleep(min(1.0, max(0.02, shortest / 4)))
            try:
                await self._look()
            except Exception:
                # Whatever one stream's connection came up with, the others need their watch.
                log.exception("watching the streams failed")

    async def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        silent = []
        for flow in self:
            flow.look_for_end()
            if self._is_slow(flow, now):
                flow.stop("slow_client")
                continue
            if now - flow.wrote_at >= self._settings.keep_alive_s:
                await flow.write(KEEP_ALIVE)
            # Looked at from half of the time on, so that progress without tokens is seen.
            if now - flow.heard_at >= self._settings.stream_idle_s / 2:
                silent.append(flow)
        if silent:
            await self._end_idle(silent, now)

    def _is_slow(self, flow: Flow, now: float) -> bool:
        limit_s = self._settings.slow_client_s
        if flow.blocked_at and now - flow.blocked_at >= limit_s:
            return True
        # A client may read just fast enough to get every single write through.
        lagging = flow.subscription.lagging
        if lagging > self._settings.slow_client_events:
            flow.behind_at = flow.behind_at or now
        elif not lagging and not flow.blocked_at:
            flow.behind_at = 0.0
        return bool(flow.behind_at) and now - flow.behind_at >= limit_s

    async def _end_idle(self, flows: list[Flow], now: float) -> None:
        """Stops flows of which a live engine gives nothing.

        Elsewhere there is nothing to be heard: in the queue, while its engine has no room for it,
        while Redis is away or refuses what engines write, and until another engine has what a dead
        one left.
        """
        try:
            async with unavailable():
                rows, live = await self._owners(flows)
        except StoreUnavailable:
            rows, live = [(None,) * 4] * len(flows), {}
        for flow, (state, progress, owner, mv) in zip(flows, rows, strict=True):
            is_owned = state == b"r" and owner.split(b":", 1)[1] in live[mv]
            if not is_owned or progress == _WAITS or progress != (flow.progress or progress):
                flow.heard_at = now
            elif now - flow.heard_at >= self._settings.stream_idle_s:
                flow.stop("stream_idle")
            flow.progress = progress

    async def _owners(self, flows: list[Flow]) -> tuple[list[Any], dict[bytes, set[bytes]]]:
        """(state, progress, owner, version) of each; the engines heard of late, by version."""
        async with self._store.client.pipeline(transaction=False) as pipe:
            for flow in flows:
                pipe.hmget(keys.request(flow.rid), ["st", "pr", "own", "mv"])
            pipe.time()
            *rows, (seconds, micros) = await pipe.execute()
            # Its lease is of its last step, which may have taken some time.
            heard_s = self._settings.stream_idle_s / 2
            since = int((seconds + micros / 1e6 - heard_s) * 1000)
            versions = sorted({row[3] for row in rows if row[3]})
            for mv in versions:
                pipe.zrangebyscore(keys.leases(mv.decode()), since, "+inf")
            return rows, dict(zip(versions, map(set, await pipe.execute()), strict=True))
