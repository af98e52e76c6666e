"""What a worker does between the signal and its end: no stream breaks, nobody waits for nobody."""

from __future__ import annotations

import asyncio
import logging

from shared.errors import StoreUnavailable
from shared.store import Store
from shared.tasks import end
from worker.driver import Driver
from worker.intake import Intake
from worker.outbox import Outbox

log = logging.getLogger(__name__)

ASK_S = 1.0
"""How often Redis is told again that the engine goes, and asked whether it is the last one."""
RETRY_S = 0.2
PATIENCE_S = 3.0
"""How long a worker that owns nothing waits for a Redis that does not answer, and how long it tries
to hand over what it owns."""


class Drain:
    """Leaves the roster, finishes what fits in the grace time, and hands the rest over.

    Where the engine turns out to be the last one of a version that takes no more requests, it goes
    on to take who waits and what others hand over: nobody else could.

    Args:
        store: Redis. mv, engine: who leaves. driver, intake, outbox: its parts. beating, taking:
            the tasks of its heartbeat and of its intake, which have been told to stop.
        grace_s: longest time until the rest is handed over.
    """

    def __init__(
        self,
        store: Store,
        mv: str,
        engine: str,
        *,
        driver: Driver,
        intake: Intake,
        outbox: Outbox,
        beating: asyncio.Task[None],
        taking: asyncio.Task[None],
        grace_s: float,
    ) -> None:
        self._store = store
        self._mv = mv
        self._engine = engine
        self._driver = driver
        self._intake = intake
        self._outbox = outbox
        self._beating = beating
        self._taking = taking
        self._grace_s = grace_s
        self._clock = asyncio.get_running_loop().time
        self._signed_off = False
        self._answered_at = self._clock()

    async def run(self, failed: asyncio.Future[BaseException]) -> None:
        """Returns when nothing is left to do or to hand over, or at once when the engine `failed`.

        Then a death must be counted, or a request that kills engines would go round for as long as
        each is told to stop.
        """
        log.info("draining", extra={"streams": len(self._outbox.streams)})
        leaving = asyncio.create_task(self._leave())
        try:
            await self._finish(failed, leaving)
        finally:
            # Cancelled, an intake could lose what is being handed over: that is asked for below.
            await end(leaving, self._taking)
        if not failed.done():
            await self._hand_over(failed)

    async def _leave(self) -> None:
        """Signs off, again and again: whoever was taken for another engine may be dead."""
        # No heartbeat may come after it.
        await self._beating
        while True:
            try:
                closed = (await self._store.depart(self._mv, self._engine)).closed
            except StoreUnavailable as error:
                log.warning("cannot sign off", extra={"error": error.reason})
                await asyncio.sleep(RETRY_S)
                continue
            if closed:
                self._intake.finish()
            else:
                self._intake.stop()
            self._signed_off, self._answered_at = True, self._clock()
            await asyncio.sleep(ASK_S)

    async def _finish(
        self, failed: asyncio.Future[BaseException], leaving: asyncio.Task[None]
    ) -> None:
        until = self._clock() + self._grace_s
        while (left := until - self._clock()) > 0 and not failed.done():
            for task in (leaving, self._taking):
                if task.done():
                    task.result()
            if self._taking.done() and not self._intake.is_over:
                self._taking = asyncio.create_task(self._intake.run())
            if not self._outbox.streams and self._may_go():
                return
            await self._outbox.sent(min(left, 0.1))

    def _may_go(self) -> bool:
        """Whether a worker without streams has nothing else to do, or no Redis to do it with."""
        is_over = self._signed_off and self._taking.done() and self._intake.is_over
        return is_over or self._clock() - self._answered_at > PATIENCE_S

    async def _hand_over(self, failed: asyncio.Future[BaseException]) -> None:
        until = self._clock() + PATIENCE_S
        streams = self._outbox.streams
        while True:
            try:
                await self._intake.compare()
                if failed.done():
                    return
                owned = [(stream.rid, stream.epoch) for stream in streams.values()]
                for name in streams:
                    self._driver.abort(name)
                if owned:
                    released = await self._store.release(self._mv, self._engine, owned)
                    log.info("handed back", extra={"streams": released})
                break
            except StoreUnavailable as error:
                if self._clock() > until:
                    extra = {"streams": len(streams), "error": error.reason}
                    log.warning("cannot ask what is left to hand back", extra=extra)
                    break
                await asyncio.sleep(RETRY_S)
        streams.clear()
