"""Carries what the engine generates to Redis: one script call a step, for all sequences."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress

from shared.errors import StoreUnavailable
from shared.store import Emission, Emitted, Store
from worker.driver import Driver
from worker.engine.interface import StepOutput
from worker.stream import Stream, name_of

log = logging.getLogger(__name__)

RETRY_S = 0.1
"""Pause between attempts while Redis is away; the engine stops when it is too far ahead."""


class Outbox:
    """The streams this worker owns, and their way out.

    While one call is under way further steps pile up and go out together with the next.

    Args:
        store: Redis. mv: model@version. engine: this engine's id, half of the fence.

    Attributes:
        streams: by the name of the ownership.
        waiting: requests waiting for this version, as the last call told.
        fenced: sequences dropped because another engine owned them.
    """

    def __init__(self, store: Store, mv: str, engine: str) -> None:
        self.streams: dict[str, Stream] = {}
        self.waiting = 0
        self.fenced = 0
        self._store = store
        self._mv = mv
        self._engine = engine
        self._driver: Driver | None = None
        self._steps = 0
        self._stepped = asyncio.Event()
        self._sent = asyncio.Event()

    def attach(self, driver: Driver) -> None:
        """Says which engine thread to tell of streams that ended elsewhere."""
        self._driver = driver

    def add(self, stream: Stream) -> None:
        """A stream that this worker took."""
        self.streams[stream.name] = stream
        if stream.ended:
            # No step of it will wake `run`.
            self._stepped.set()

    @property
    def calm(self) -> bool:
        """Whether every stream has made progress here: then a death now is held against none."""
        return all(stream.proven for stream in self.streams.values())

    @property
    def on_trial(self) -> bool:
        """Whether there is a suspect that has made no progress here: nothing may join it."""
        return any(stream.suspect and not stream.proven for stream in self.streams.values())

    def on_step(self, outputs: list[StepOutput]) -> None:
        """What the engine generated."""
        for output in outputs:
            stream = self.streams.get(output.rid)
            if stream is None or stream.ended:
                continue
            try:
                surplus = stream.advance(output)
            except Exception as error:
                # An engine's nonsense about one sequence is no reason to lose the others' tokens.
                log.exception("cannot use an output", extra={"request_id": stream.rid})
                stream.end("error", code="engine_error", message=f"the engine's output: {error}")
                surplus = True
            if surplus:
                self._abort(stream.name)
        self._steps += 1
        self._stepped.set()

    async def sent(self, timeout_s: float) -> None:
        """Returns after the next call to Redis, or after the time."""
        self._sent.clear()
        # Not wait_for: until Python 3.12 it loses a cancellation that comes with the event.
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._sent.wait()

    async def run(self) -> None:
        """Sends step after step, for ever."""
        while True:
            await self._stepped.wait()
            self._stepped.clear()
            steps, self._steps = self._steps, 0
            await self._send()
            for _ in range(steps):
                if self._driver is not None:
                    self._driver.handled()

    async def _send(self) -> None:
        """Sends until Redis has answered for every stream there is now."""
        todo: Iterable[Stream] = list(self.streams.values())
        while todo:
            step = [stream.emission() for stream in todo]
            try:
                self.waiting, answers = await self._store.emit(self._mv, self._engine, step)
            except StoreUnavailable as error:
                log.warning("tokens wait for Redis", extra={"error": error.reason})
                await asyncio.sleep(RETRY_S)
                todo = list(self.streams.values())
                continue
            pairs = zip(step, answers, strict=True)
            todo = [stream for e, a in pairs if (stream := self._settle(e, a)) is not None]
        self._sent.set()

    def _settle(self, emission: Emission, answer: Emitted) -> Stream | None:
        """Acts on the answer for one stream; returns it when it has to be sent again."""
        name = name_of(emission.rid, emission.epoch)
        stream = self.streams.get(name)
        if stream is None:
            return None
        if answer.outcome in ("ok", "duplicate"):
            stream.acknowledge(emission)
            if emission.reason:
                del self.streams[name]
            return None
        if answer.outcome == "gap":
            stream.rewind(answer.seq)
            return stream
        if answer.outcome == "fenced":
            self.fenced += 1
        log.info(
            "stream left",
            extra={"request_id": emission.rid, "outcome": answer.outcome, "why": answer.reason},
        )
        del self.streams[name]
        self._abort(name)
        return None

    def _abort(self, name: str) -> None:
        if self._driver is not None:
            self._driver.abort(name)
