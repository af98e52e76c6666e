"""How full the queues are and which workers live: read once a second for status and metrics."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shared import keys, messages
from shared.errors import DecodeError
from shared.store import ENGINE_TTL_MS, Store, unavailable

_RATE_WINDOW_S = 30.0
_MOST_REMEMBERED = 1024
"""Engines of one model whose counters are remembered, for those that come back."""

COUNTERS = ("prefix_queries", "prefix_hits", "preemptions", "fenced")
"""What every engine counts since its start, by its name in messages.EngineCard."""
_QUEUE_FIELDS = ["waiting", "running", "bytes", "head", "redelivered", "dead"]

_Row = tuple[list[list[bytes | None]], list[tuple[bytes, float]], dict[bytes, bytes]]
"""Replies for a version: counts of each class, engines with their heartbeats, cards."""


@dataclass(frozen=True, slots=True)
class QueueCount:
    """One queue's counters, as the scripts keep them; `oldest_s` is the age of its first entry.

    Of all versions that were live: requests redelivered, taken over from another engine, and
    dead_letters.
    """

    waiting: int = 0
    running: int = 0
    waiting_bytes: int = 0
    head: int = 0
    redelivered: int = 0
    dead_letters: int = 0
    oldest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class VersionCount:
    """What is known of one model version.

    Attributes:
        queues: by class. engines: that live.
        totals: of the engines' counters, by name in COUNTERS, since this gateway saw each engine
            first: never less than before.
    """

    queues: dict[str, QueueCount] = field(default_factory=dict)
    engines: list[messages.EngineCard] = field(default_factory=list)
    totals: Mapping[str, int] = field(default_factory=Counter)

    @property
    def kv_usage(self) -> float:
        """Mean share of the engines' caches that is in use."""
        if not self.engines:
            return 0.0
        return sum(engine.kv_usage for engine in self.engines) / len(self.engines)


class Tally:
    """Sums of others' counters that do not fall when one of these is gone, as counters must."""

    def __init__(self) -> None:
        """Nothing is counted yet."""
        self.totals: Counter[str] = Counter()
        self._known: dict[str, Mapping[str, int]] = {}

    def count(self, counters: Mapping[str, Mapping[str, int]]) -> None:
        """Adds what the counters have grown by; they are by name, by who counted."""
        for who, now in counters.items():
            before = self._known.pop(who, {})
            for name, value in now.items():
                self.totals[name] += max(0, value - before.get(name, 0))
            self._known[who] = now
        while len(self._known) > max(_MOST_REMEMBERED, len(counters)):
            del self._known[next(iter(self._known))]


class Census:
    """The latest counts, and how fast each queue has moved of late."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._versions: dict[str, VersionCount] = {}
        self._heads: dict[tuple[str, str], deque[tuple[float, int]]] = {}
        # By model, and by queue of a model: a version that was live before may come back.
        self._engines: dict[str, Tally] = {}
        self._queues: dict[tuple[str, str], Tally] = {}

    def of(self, mv: str) -> VersionCount:
        """The latest counts of a model version."""
        return self._versions.get(mv, _UNKNOWN)

    def eta_s(self, mv: str, cls: str, position: int) -> float | None:
        """When a waiting request will be taken, if its queue goes on as of late."""
        heads = self._heads.get((mv, cls))
        if not heads or heads[-1][1] <= heads[0][1]:
            return None
        taken_per_s = (heads[-1][1] - heads[0][1]) / (heads[-1][0] - heads[0][0])
        return position / taken_per_s

    def place(self, mv: str, cls: str, ticket: int, head: int) -> tuple[int, float | None]:
        """A waiting request's place, 1 is next, and in how many seconds it will be taken.

        Between callers it goes round, so the place is an estimate, too.
        """
        position = max(1, ticket - head)
        eta_s = self.eta_s(mv, cls, position)
        return position, None if eta_s is None else round(eta_s, 3)

    async def refresh(self, mvs: Sequence[str]) -> None:
        """Reads the counts of these versions, in one round trip and a second for the oldest.

        Raises:
            StoreUnavailable: what is known stays as it is.
        """
        rows, now_s = await self._read(mvs)
        oldest = await self._oldest(
            [
                (mv, cls)
                for mv, (counts, _, _) in zip(mvs, rows, strict=True)
                for cls, count in zip(keys.CLASSES, counts, strict=True)
                if _number(count[0]) > 0
            ],
            now_s,
        )
        self._versions = {}
        self._heads = {queue: heads for queue, heads in self._heads.items() if queue[0] in mvs}
        for mv, (counts, scores, cards) in zip(mvs, rows, strict=True):
            model = mv.rpartition("@")[0]
            queues = {
                cls: self._read_count(model, mv, cls, count, oldest.get((mv, cls), 0.0))
                for cls, count in zip(keys.CLASSES, counts, strict=True)
            }
            live = [name for name, score in scores if score > now_s * 1000 - ENGINE_TTL_MS]
            engines = _read_cards(live, cards)
            tally = self._engines.setdefault(model, Tally())
            tally.count({e.engine: {name: getattr(e, name) for name in COUNTERS} for e in engines})
            self._versions[mv] = VersionCount(queues, engines, Counter(tally.totals))
            self._note_heads(mv, queues)

    async def _read(self, mvs: Sequence[str]) -> tuple[list[_Row], float]:
        async with unavailable(), self._store.client.pipeline(transaction=False) as pipe:
            pipe.time()
            for mv in mvs:
                for cls in keys.CLASSES:
                    pipe.hmget(keys.count(mv, cls), _QUEUE_FIELDS)
                pipe.zrange(keys.engines(mv), 0, -1, withscores=True)
                pipe.hgetall(keys.cards(mv))
            replies = await pipe.execute()
        seconds, micros = replies[0]
        step = len(keys.CLASSES) + 2
        rows = [
            (replies[i : i + step - 2], replies[i + step - 2], replies[i + step - 1])
            for i in range(1, len(replies), step)
        ]
        return rows, int(seconds) + int(micros) / 1e6

    async def _oldest(
        self, queues: list[tuple[str, str]], now_s: float
    ) -> dict[tuple[str, str], float]:
        """Age of the first undelivered entry of each queue."""
        if not queues:
            return {}
        client = self._store.client
        async with unavailable():
            async with client.pipeline(transaction=False) as pipe:
                for mv, cls in queues:
                    pipe.xinfo_groups(keys.queue(mv, cls))
                groups = await pipe.execute(raise_on_error=False)
            async with client.pipeline(transaction=False) as pipe:
                for (mv, cls), group in zip(queues, groups, strict=True):
                    # Before the first take there is no group, and all entries are undelivered.
                    known = isinstance(group, list) and group
                    after = group[0]["last-delivered-id"].decode() if known else "0-0"
                    pipe.xrange(keys.queue(mv, cls), min=f"({after}", count=1)
                entries = await pipe.execute(raise_on_error=False)
        ages = {}
        for queue, found in zip(queues, entries, strict=True):
            if isinstance(found, list) and found:
                ages[queue] = max(0.0, now_s - int(found[0][1][b"t"]) / 1000)
        return ages

    def _read_count(
        self, model: str, mv: str, cls: str, values: list[bytes | None], oldest_s: float
    ) -> QueueCount:
        waiting, running, size, head, again, dead = (max(0, _number(value)) for value in values)
        tally = self._queues.setdefault((model, cls), Tally())
        tally.count({mv: {"again": again, "dead": dead}})
        totals = tally.totals
        return QueueCount(waiting, running, size, head, totals["again"], totals["dead"], oldest_s)

    def _note_heads(self, mv: str, queues: dict[str, QueueCount]) -> None:
        now = asyncio.get_running_loop().time()
        for cls, count in queues.items():
            heads = self._heads.setdefault((mv, cls), deque())
            heads.append((now, count.head))
            while now - heads[0][0] > _RATE_WINDOW_S:
                heads.popleft()


_UNKNOWN = VersionCount()


def _number(value: bytes | None) -> int:
    return int(value or 0)


def _read_cards(live: Sequence[bytes], cards: dict[bytes, bytes]) -> list[messages.EngineCard]:
    found = []
    for name in live:
        try:
            found.append(messages.decode(cards[name], messages.EngineCard))
        except (KeyError, DecodeError):
            # A worker of a newer release; it is still alive, but nothing is known of it here.
            continue
    return found
