"""Routes token streams from Redis to the open requests of this gateway.

One connection for all (gateway/pubsub.py). A subscription hands out entries in order, each token
once: duplicates are dropped; whatever may be missing - a gap, a reconnect, a reader too slow for
its bounded queue - is read again from the request's log.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress

import msgspec

from gateway.errors import ANOTHER_RUN, RequestGone
from gateway.pubsub import PubSubConnection
from gateway.recovery import RETRY_S, Recovery
from shared import keys, messages
from shared.errors import LogExpired, StoreUnavailable
from shared.store import State, Store
from shared.tasks import end

CONFIRM_S = 0.9
"""Longest wait for Redis to confirm a subscription."""
SILENT_S = 1.0
"""A stream that has been silent for so long is compared with its log: a lost last message leaves no
gap."""
CHECK_S = 5.0
"""How often it is compared after that."""
COME_BACK_S = 3.0
"""A request that Redis lost is queued again by whoever accepted it, within about a second."""
RECOVERING = 8
"""Requests queued again at once: after the loss of all data there may be thousands."""
PAGE = 512
"""Entries read from a log at once."""


class Subscription:
    """One reader of one request's stream.

    Attributes:
        last: number of the last token handed out.
        run: which run of the request it reads, as State.run.
        recovery: queues the request again where Redis has lost it; None: somebody else may.
        heard_at: when a message came. checked_at: when its log was asked for.
        known_at: when Redis said that the request waits or runs. All in the event loop's time.
    """

    def __init__(
        self,
        rid: str,
        after: int,
        hub: Hub,
        *,
        replay: bool,
        run: bytes,
        close: Callable[[Subscription], None],
    ) -> None:
        self.rid = rid
        self.last = after
        self._hub = hub
        self._close = close
        self._live: deque[bytes] = deque()
        self._page: deque[messages.Entry] = deque()
        self._stale = replay
        # Redis does not know it; has ended, as was last heard; and there is nothing more to read.
        self._lost = self._over = self._gone = False
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self.run = run
        self.recovery: Recovery | None = None
        self.heard_at = self.known_at = self._loop.time()
        self.checked_at = 0.0

    def is_due(self, now: float) -> bool:
        """Whether it has been silent for so long that its log should be looked at, again."""
        if self.checked_at < self.heard_at:
            return now - self.heard_at > SILENT_S
        return now - self.checked_at > CHECK_S

    @property
    def lagging(self) -> int:
        """Entries that came and were not read yet."""
        return len(self._live) + len(self._page)

    @property
    def waits(self) -> bool:
        """Whether its reader has had all there is and waits for more."""
        return self._waiter is not None

    def feed(self, frame: bytes) -> None:
        """A live message. When the queue is full it is emptied: the log has it all."""
        if len(self._live) >= self._hub.backlog:
            self._live.clear()
            self._stale = True
        self._live.append(frame)
        self._lost = False
        self.heard_at = self._loop.time()
        self._wake()

    def forget(self) -> None:
        """What came so far may be of an earlier run of this id: the log has this one's."""
        self._live.clear()
        self.resync()

    def resync(self) -> None:
        """Something may have been missed: read the log before going on."""
        self._stale = True
        self._wake()

    def lost(self) -> None:
        """The request is not in Redis any more."""
        self._lost = True
        self._wake()

    def close(self) -> None:
        """Ends the subscription. Idempotent."""
        if not self._closed:
            self._closed = True
            self._close(self)

    async def next(self) -> messages.Entry:
        """The next entry: tokens above those handed out before, or the end, which is the last.

        Raises:
            LogExpired: tokens are missing and the log that had them is gone; or the request is,
                and cannot be queued again.
            RequestGone: it ended, and runs anew for who repeated its Idempotency-Key.
        """
        while True:
            if self._stale and not self._page:
                await self._read_log()
            if self._page:
                entry = self._page.popleft()
                from_log = True
            elif self._live:
                entry = messages.read_frame(self._live.popleft())
                from_log = False
                if isinstance(entry.event, messages.End) and not entry.event.answered:
                    # Not this one's, perhaps: a repeated Idempotency-Key is subscribed before the
                    # attempt that broke is taken back. The log is of the one that was queued last.
                    self._over = self._stale = True
                    continue
            elif self._gone:
                raise LogExpired(self.rid)
            elif self._lost:
                await self._recover()
                continue
            else:
                self._waiter = self._loop.create_future()
                await self._waiter
                continue
            if not from_log and self.last and self._begins(entry):
                # Of the next run, unless Redis lost the tokens that were handed on.
                self._stale = True
                continue
            fresh = self._accept(entry)
            if fresh is not None:
                if self.recovery is not None and isinstance(fresh.event, messages.Tokens):
                    self.recovery.add(fresh.event)
                return fresh
            if self._missing(entry):
                if from_log:
                    raise LogExpired(self.rid)
                self._hub.gaps += 1
                self._stale = True

    def _accept(self, entry: messages.Entry) -> messages.Entry | None:
        event = entry.event
        if isinstance(event, messages.End):
            return entry if entry.seq <= self.last else None
        if entry.seq <= self.last or event.first > self.last + 1:
            return None
        if event.first <= self.last:
            event = msgspec.structs.replace(
                event, first=self.last + 1, tokens=event.tokens[self.last + 1 - event.first :]
            )
            entry = messages.Entry(entry.seq, event)
        self.last = entry.seq
        return entry

    def _missing(self, entry: messages.Entry) -> bool:
        event = entry.event
        if isinstance(event, messages.End):
            return entry.seq > self.last
        return event.first > self.last + 1

    def _begins(self, entry: messages.Entry) -> bool:
        return isinstance(entry.event, messages.Tokens) and entry.event.first == 1

    async def _recover(self) -> None:
        if self._over:
            # How, Redis does not know any more.
            raise LogExpired(self.rid)
        if self.recovery is None:
            await self._come_back()
        else:
            await self.recovery.run(max(self.heard_at, self.known_at), self._hub.recovering)
            self._hub.recoveries += 1
            # Tokens of before that came meanwhile: it goes on after those that were handed on.
            self._live.clear()
        self.known_at = self._loop.time()
        self._lost, self._stale = False, True

    async def _come_back(self) -> None:
        """Waits for somebody who knows the request to queue it again."""
        waited_s, found = 0.0, None
        while waited_s < COME_BACK_S:
            await asyncio.sleep(RETRY_S)
            with suppress(StoreUnavailable):
                found = await self._hub.store.state(self.rid)
                if found is not None and found.run == self.run:
                    return
                # While Redis is away nobody can.
                waited_s += RETRY_S
        if found is not None:
            raise RequestGone(ANOTHER_RUN)
        raise LogExpired(self.rid)

    def compared(self, state: State | None) -> None:
        """What Redis says of its request."""
        if state is None:
            self.lost()
            return
        if state.run != self.run:
            self.resync()
            return
        self._note(state)
        if self._over or state.seq > self.last:
            self.resync()

    def _note(self, state: State) -> None:
        self._over = state.ended
        if not self._over:
            self.known_at = self._loop.time()

    async def _read_log(self) -> None:
        # Before the read: what is missed while it runs makes it stale again.
        self._stale = False
        try:
            while True:
                try:
                    state, entries = await self._hub.store.read_stream(self.rid, self.last, PAGE)
                    break
                except StoreUnavailable:
                    await asyncio.sleep(RETRY_S)
        except asyncio.CancelledError:
            self._stale = True
            raise
        if state is not None:
            if state.run != self.run:
                if not state.ended:
                    raise RequestGone(ANOTHER_RUN)
                # The next one, or Redis has gone back to the one before: who queued it knows.
                self._lost = True
                return
            self._note(state)
        self._lost = state is None and not entries
        self._gone = self._over and not entries
        self._page.extend(entries)
        if len(entries) == PAGE:
            self._stale = True

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._waiter = None


class _Channel:
    """The readers of one channel, and whether Redis has confirmed it."""

    def __init__(self) -> None:
        self.readers: list[Subscription] = []
        self.confirmed = False
        self.waiters: list[asyncio.Future[None]] = []


class Hub:
    """All subscriptions of this process.

    Args:
        url: where Redis is. store: its scripts and reads.
        backlog: entries kept for a reader that is not reading, before its log is used instead.

    Attributes:
        gaps: messages that were missing and read from a log.
        recoveries: requests that Redis had lost and that were queued again.
        recovering: how many may be at once.
    """

    def __init__(self, url: str, store: Store, *, backlog: int = 1024) -> None:
        self.store = store
        self.backlog = backlog
        self.gaps = 0
        self.recoveries = 0
        self.recovering = asyncio.Semaphore(RECOVERING)
        self._channels: dict[bytes, _Channel] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._connection = PubSubConnection(
            url,
            on_message=self._on_message,
            on_subscribed=self._on_subscribed,
            channels=lambda: self._channels,
        )

    @property
    def healthy(self) -> bool:
        """Whether the pub/sub connection is up."""
        return self._connection.up

    async def start(self) -> None:
        """Starts connecting; does not wait for Redis."""
        self._tasks = [
            asyncio.create_task(self._connection.run(), name="hub connection"),
            asyncio.create_task(self._check_silent(), name="hub check"),
        ]

    async def close(self) -> None:
        """Stops, leaving no task behind."""
        await end(*self._tasks)

    async def subscribe(
        self, rid: str, after: int = 0, *, replay: bool = False, run: bytes = b""
    ) -> Subscription:
        """Opens a reader; returns once Redis has confirmed that messages will come.

        Args:
            rid: the request.
            after: number of the last token the reader already has.
            replay: read what the log holds first; for a request that may be running already.
            run: which run of it; may be said later, before anything is read.

        Raises:
            StoreUnavailable: there is no connection, or no confirmation in time.
        """
        name = keys.log(rid).encode()
        channel = self._channels.get(name)
        if channel is None:
            channel = self._channels[name] = _Channel()
            self._connection.subscribe(name)
        reader = Subscription(rid, after, self, replay=replay, run=run, close=self._forget)
        channel.readers.append(reader)
        if not channel.confirmed:
            waiter = asyncio.get_running_loop().create_future()
            channel.waiters.append(waiter)
            try:
                async with asyncio.timeout(CONFIRM_S if self.healthy else 0):
                    await waiter
            except TimeoutError:
                reader.close()
                raise StoreUnavailable("no confirmation of a subscription") from None
            except BaseException:
                reader.close()
                raise
        return reader

    async def check(self) -> None:
        """Compares all readers with their logs now: Redis has lost data.

        Those that nobody waits on yet are left out: their requests may have yet to be queued.

        Raises:
            StoreUnavailable: some were not compared.
        """
        await self._compare([reader for reader in self._readers() if reader.waits])

    def _readers(self) -> Iterator[Subscription]:
        for channel in self._channels.values():
            yield from channel.readers

    def _forget(self, reader: Subscription) -> None:
        name = keys.log(reader.rid).encode()
        channel = self._channels.get(name)
        if channel is not None and reader in channel.readers:
            channel.readers.remove(reader)
            if not channel.readers:
                del self._channels[name]
                self._connection.unsubscribe(name)

    def _on_message(self, name: bytes, payload: bytes) -> None:
        channel = self._channels.get(name)
        if channel is not None:
            for reader in channel.readers:
                reader.feed(payload)

    def _on_subscribed(self, name: bytes) -> None:
        channel = self._channels.get(name)
        if channel is None:
            return
        if channel.confirmed:
            # A second confirmation: the connection was lost in between.
            for reader in channel.readers:
                reader.resync()
        channel.confirmed = True
        for waiter in channel.waiters:
            if not waiter.done():
                waiter.set_result(None)
        channel.waiters.clear()

    async def _check_silent(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(SILENT_S, CHECK_S))
            now = loop.time()
            quiet = [r for r in self._readers() if r.waits and r.is_due(now)]
            with suppress(StoreUnavailable):
                await self._compare(quiet)
                for reader in quiet:
                    reader.checked_at = now

    async def _compare(self, readers: list[Subscription]) -> None:
        """What does Redis say about their requests? One round trip for many."""
        for start in range(0, len(readers), PAGE):
            await self._compare_page(readers[start : start + PAGE])

    async def _compare_page(self, readers: list[Subscription]) -> None:
        states = await self.store.states([reader.rid for reader in readers])
        for reader, state in zip(readers, states, strict=True):
            reader.compared(state)
