"""Everything a request handler works with, in one place."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import web

from gateway.callers import Callers
from gateway.census import Census
from gateway.flows import Flows
from gateway.hub import Hub
from gateway.metrics import Metrics
from gateway.models import Models
from gateway.queue_status import QueueStatus
from shared import keys, tasks
from shared.errors import StoreUnavailable
from shared.settings import Settings
from shared.store import Store, unavailable

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often models, counts and deadlines are looked at."""
MOST_EXPIRED = 256
"""Ended by one call, so that Redis is not held up."""
WITHDRAW_TRIES = 4
LEAVE_TRIES = 3
ERRANDS_S = 2.0
"""What is on its way when the gateway stops gets this long."""


class Edge:
    """One gateway's parts and its state.

    Attributes:
        leaving: it is not ready any more and keeps no connection for another request.
        draining: it takes no requests any more, either.
        connections: how many client connections are open; set by the server.
    """

    def __init__(self, settings: Settings, store: Store, hub: Hub) -> None:
        self.settings = settings
        self.store = store
        self.hub = hub
        self.models = Models(store, lambda: self.healthy)
        self.census = Census(store)
        self.callers = Callers(settings.trusted_proxies)
        self.flows = Flows(store, hub, settings)
        self.metrics = Metrics(self.models, self.census, hub)
        self.leaving = False
        self.draining = False
        self.connections: Callable[[], int] = lambda: 0
        self.metrics.connections = lambda: self.connections()
        self.metrics.streams = lambda: len(self.flows)
        self._store_answers = False
        self._identity = b""
        self._loops: list[asyncio.Task[None]] = []
        self._errands: set[asyncio.Task[None]] = set()

    @property
    def healthy(self) -> bool:
        """Whether Redis can be reached, for commands and for messages."""
        return self._store_answers and self.hub.healthy

    async def start(self) -> None:
        """Starts what runs beside the requests; does not wait for Redis."""
        await self.hub.start()
        self._loops = [
            asyncio.create_task(self._look_around(), name="look around"),
            asyncio.create_task(self._expire(), name="deadlines"),
            asyncio.create_task(self.flows.watch(), name="watch streams"),
            asyncio.create_task(
                QueueStatus(self.store, self.census, self.flows).watch(), name="queue status"
            ),
        ]

    async def close(self) -> None:
        """Stops all that `start` started, and waits for errands on the way."""
        await tasks.end(*self._loops)
        if self._errands:
            await asyncio.wait(self._errands, timeout=ERRANDS_S)
        await tasks.end(*self._errands)
        await self.models.close()
        await self.hub.close()
        await self.store.close()

    def send(self, errand: Coroutine[Any, Any, object]) -> None:
        """Runs something that the request at hand does not wait for."""
        task = asyncio.create_task(_logged(errand))
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def withdraw(self, rid: str, caller: str, run: bytes) -> str:
        """Cancels a request that nobody waits for, in spite of a short outage.

        Returns what Store.cancel does, or "" where it failed: then the request ends by its
        deadline, or because nobody listens.
        """
        for _ in range(WITHDRAW_TRIES):
            with contextlib.suppress(StoreUnavailable):
                return await self.store.cancel(rid, caller, run=run)
            await asyncio.sleep(0.5)
        return ""

    async def leave(self, rid: str, caller: str) -> None:
        """Starts a kept request's grace time, unless somebody else listens to it."""
        for _ in range(LEAVE_TRIES):
            with contextlib.suppress(StoreUnavailable):
                if await self.store.leave(rid, caller):
                    return
            # Redis may have yet to read that we unsubscribed, on another connection.
            await asyncio.sleep(0.25)

    async def is_first(self, rid: str) -> bool:
        """Whether nobody has counted the end of a request that several gateways may relay."""
        name, client = keys.request(rid), self.store.client
        async with unavailable(), client.pipeline(transaction=False) as pipe:
            pipe.hsetnx(name, "ct", "1")
            # If it expired just now, what was set here shall not stay.
            pipe.expire(name, 1, nx=True)
            return bool((await pipe.execute())[0])

    async def _look_around(self) -> None:
        while True:
            try:
                await self.models.refresh()
                await self.census.refresh([model.mv for model in self.models.served()])
                await self._look_for_loss()
                self._note(True)
            except StoreUnavailable as error:
                self._note(False, error)
            except Exception:
                log.exception("reading models and counts failed")
            # While Redis is away its return is looked for more often.
            await asyncio.sleep(LOOK_S if self._store_answers else LOOK_S / 5)

    async def _look_for_loss(self) -> None:
        """Looks now, not when it is due, for streams whose requests Redis does not know."""
        identity = await self.store.identity()
        if self._identity not in (b"", identity):
            log.error("redis has lost its data")
            await self.hub.check()
        self._identity = identity

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                while len(await self.store.expire(MOST_EXPIRED)) == MOST_EXPIRED:
                    pass
            except StoreUnavailable:
                # _look_around has logged it.
                continue
            except Exception:
                log.exception("ending requests at their deadlines failed")

    def _note(self, answers: bool, error: StoreUnavailable | None = None) -> None:
        if answers != self._store_answers:
            self._store_answers = answers
            if error is None:
                log.info("redis answers")
            else:
                log.warning("redis is away", extra={"error": error.reason})


async def _logged(errand: Coroutine[Any, Any, object]) -> None:
    try:
        await errand
    except Exception:
        log.exception("an errand failed")


EDGE: web.AppKey[Edge] = web.AppKey("edge", Edge)
"""Where an application keeps it."""
