"""Takes requests for the room that the engine has."""

from __future__ import annotations

import asyncio
import logging
import math

from shared import keys, messages
from shared.errors import DecodeError, LogExpired, StoreUnavailable
from shared.store import Emission, Store, Taken
from worker.driver import Driver
from worker.outbox import Outbox
from worker.stream import Stream, name_of
from worker.text import Vocabulary

log = logging.getLogger(__name__)

LOOK_S = 0.25
"""How often to look for orphans of dead engines when nothing else is a reason to look."""
RETRY_S = 0.2
"""Pause after Redis did not answer."""
COMPARE_S = 5.0
"""How often Redis is asked what this engine owns and does not know: a call that was given up may
arrive later than the next one, and what it hands over is in nobody's hands."""
KNOWN_EPOCHS = 4096
"""Requests whose last epoch is remembered."""
NEVER = -math.inf
"""When it was last compared, if a comparison is due at once."""
NEVER_MS = 10**12
"""A lease so long that nobody is found dead."""


class Intake:
    """The way of a request from its queue into the engine.

    Args:
        store: Redis. model, version: whose queues. engine: this engine's id.
        vocabulary: of the model. driver, outbox: where requests and their tokens go.
        heard: set while Redis hears this engine's sign of life: whatever an engine owns that is not
            heard is taken from it.
        max_batch_size: most requests owned at once. max_wait_ms: how long an idle engine waits for
            more after the first. lease_ms, aging_ms: see take.lua.
    """

    def __init__(
        self,
        store: Store,
        *,
        model: str,
        version: str,
        engine: str,
        vocabulary: Vocabulary,
        heard: asyncio.Event,
        driver: Driver,
        outbox: Outbox,
        max_batch_size: int,
        max_wait_ms: float,
        lease_ms: int,
        aging_ms: int,
    ) -> None:
        self._store = store
        self._mv = keys.model_version(model, version)
        self._engine = engine
        self._vocabulary = vocabulary
        self._heard = heard
        self._driver = driver
        self._outbox = outbox
        self._max_batch_size = max_batch_size
        self._max_wait_s = max_wait_ms / 1000
        self._lease_ms = lease_ms
        self._aging_ms = aging_ms
        self._compared_at = NEVER
        self._judges_at = 0.0
        self._stopping = False
        self._finishing = False
        self._asked = 0
        self._left = 0
        # The last one of each request, the latest at the end.
        self._epochs: dict[str, int] = {}

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to take any more, and nothing in doubt; `run` ends then."""
        return not self._in_doubt and (self._stopping or (self._finishing and self._left <= 0))

    @property
    def _in_doubt(self) -> bool:
        """Whether Redis is to be asked what this engine owns."""
        return asyncio.get_running_loop().time() - self._compared_at > COMPARE_S

    def stop(self) -> None:
        """Makes `run` end by itself: cancelled, it could lose what was just handed over."""
        self._stopping, self._finishing = True, False

    def finish(self) -> None:
        """Takes until nothing is left for this version: nobody else can. Then `run` ends.

        Said again, it looks once more: what was dropped or replayed meanwhile comes back here.
        """
        self._stopping, self._finishing = False, True
        # Until a call that begins now has told, and found what an earlier one may have taken.
        self._asked += 1
        self._left = 1
        self._compared_at = NEVER

    async def run(self) -> None:
        """Takes whenever there is room and a reason, until it is over; all is in the outbox then.

        What this engine owns without knowing would stand still for as long as it drains.
        """
        while not self.is_over:
            try:
                if not self._stopping:
                    await self._wait_for_reason()
                await self._admit()
            except StoreUnavailable as error:
                log.warning("cannot take requests", extra={"error": error.reason})
                # A request may have been handed over in a reply that did not arrive.
                self._compared_at = NEVER
                # Others may have been kept from Redis, too: their old leases prove nothing.
                self._judges_at = asyncio.get_running_loop().time() + self._lease_ms / 1000
                await asyncio.sleep(RETRY_S)

    async def compare(self) -> None:
        """Asks Redis for what this engine owns and does not know, and opens that; takes no more.

        Raises:
            StoreUnavailable: Redis did not answer.
        """
        self.stop()
        self._compared_at = NEVER
        await self._admit()

    def _room(self) -> int:
        if self._outbox.on_trial or self._stopping or not self._heard.is_set():
            return 0
        if self._driver.step_s > self._lease_ms / 2000:
            # Each take renews the lease: an engine that hangs would keep what it owns for ever.
            return 0
        return min(self._driver.room, self._max_batch_size - len(self._outbox.streams))

    async def _wait_for_reason(self) -> None:
        """Returns when something may be there to take: news from a step, a wake token, or time."""
        if self._outbox.on_trial:
            while self._outbox.on_trial and not self._stopping and not self._in_doubt:
                await self._outbox.sent(LOOK_S)
            # The next suspect may have been waiting for this.
            return
        if not self._outbox.streams:
            await self._store.wait_for_work(self._mv, LOOK_S)
            return
        loop = asyncio.get_running_loop()
        until = loop.time() + LOOK_S
        while (left := until - loop.time()) > 0 and self._outbox.streams:
            await self._outbox.sent(left)
            if self._outbox.waiting and self._room() > 0:
                return

    async def _admit(self) -> None:
        room = self._room()
        in_doubt = self._in_doubt
        if room <= 0 and not in_doubt:
            return
        streams = self._outbox.streams.values()
        known = [stream.rid for stream in streams] if in_doubt else None
        idle = not streams
        taken = await self._take(max(0, room), calm=self._outbox.calm, known=known)
        alone = any(item.deaths for item in taken)
        if taken and idle and not alone and len(taken) < room and self._max_wait_s:
            await asyncio.sleep(self._max_wait_s)
            if (left := min(room, self._room()) - len(taken)) > 0:
                taken += await self._take(left, calm=False)
        for item in await self._unknown(taken):
            # To be computed at once: to read all that others have generated may outlast the lease,
            # which the first one's steps renew.
            if (stream := await self._open(item)) is not None:
                self._outbox.add(stream)
                if not stream.ended:
                    self._driver.add(stream.engine_request())

    async def _take(self, room: int, *, calm: bool, known: list[str] | None = None) -> list[Taken]:
        now = asyncio.get_running_loop().time()
        asked = self._asked
        take = await self._store.take(
            self._mv,
            self._engine,
            room,
            lease_ms=self._lease_ms if now >= self._judges_at else NEVER_MS,
            aging_ms=self._aging_ms,
            calm=calm,
            known=known,
        )
        self._outbox.waiting = take.waiting
        # Else it tells of a time before the last `finish`.
        if asked == self._asked:
            self._left = take.waiting + take.others
            if known is not None:
                self._compared_at = now
        return take.requests

    async def _unknown(self, taken: list[Taken]) -> list[Taken]:
        """Those whose ownership is a new one; the others are handed back, to come with a later one.

        Redis gives an epoch twice where it has lost that it gave it: what this engine may still say
        in the first one must be told from the second.
        """
        again = [item for item in taken if self._had(item)]
        if again:
            log.warning("redis lost what was taken", extra={"requests": len(again)})
            await self._store.release(self._mv, self._engine, [(t.rid, t.epoch) for t in again])
            # They come back here where there is nobody else.
            self._left += len(again)
        for item in taken:
            self._epochs[item.rid] = max(item.epoch, self._epochs.pop(item.rid, 0))
        while len(self._epochs) > KNOWN_EPOCHS:
            del self._epochs[next(iter(self._epochs))]
        return [item for item in taken if item not in again]

    def _had(self, taken: Taken) -> bool:
        # What runs may have been taken too long ago to be remembered.
        runs = name_of(taken.rid, taken.epoch) in self._outbox.streams
        return runs or taken.epoch <= self._epochs.get(taken.rid, 0)

    async def _open(self, taken: Taken) -> Stream | None:
        """Reads a body and what earlier owners generated; only now, as its owner."""
        try:
            request = messages.decode(taken.body, messages.Request)
            earlier = await self._read_earlier(taken)
        except (DecodeError, LogExpired) as error:
            await self._refuse(taken, str(error))
            return None
        return Stream(taken, request, earlier, self._vocabulary)

    async def _read_earlier(self, taken: Taken) -> list[messages.Token]:
        earlier: list[messages.Token] = []
        while len(earlier) < taken.seq:
            known = len(earlier)
            for entry in await self._store.read_log(taken.rid, known):
                if isinstance(entry.event, messages.Tokens):
                    earlier += entry.event.tokens
            if len(earlier) == known:
                # Gone, or another run's by now, which ended before it came so far.
                raise LogExpired(taken.rid)
        return earlier

    async def _refuse(self, taken: Taken, why: str) -> None:
        log.error("request cannot be run", extra={"request_id": taken.rid, "error": why})
        end = messages.End(messages.VERSION, "error", "worker_cannot_run", why)
        emission = Emission(
            taken.rid,
            taken.epoch,
            taken.seq + 1,
            taken.seq,
            b"",
            0,
            reason="error",
            end=messages.encode(end),
        )
        await self._store.emit(self._mv, self._engine, [emission])
