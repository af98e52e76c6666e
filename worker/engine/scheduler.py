"""Which rows of which sequences the next step computes: continuous batching over a paged cache.

A row is one token of one sequence. A step takes one row of every sequence that is generating and
fills the rest of its budget with pieces of prompts. Ranks decide everything: a smaller priority
number goes first, then the earlier arrival; when blocks run out the worst rank gives its blocks up
and is computed again later. So the best rank always advances, and every sequence ends.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from worker.engine.blocks import BLOCK_SIZE, BlockPool, blocks_for
from worker.engine.pace import LONG_ROWS, Pace
from worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """Rows of one sequence in one step.

    Attributes:
        sequence: whose.
        first: position of the first row.
        count: rows, consecutive.
    """

    sequence: Sequence
    first: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the last row is the sequence's last token, so that a new one follows."""
        return self.first + self.count == len(self.sequence.tokens)


@dataclass(slots=True)
class _Step:
    """A step in the making: works by rid, and the rows that are left."""

    left: int
    works: dict[str, Work] = field(default_factory=dict)

    def add(self, work: Work) -> None:
        self.works[work.sequence.request.rid] = work
        self.left -= work.count

    def drop(self, rid: str) -> None:
        if work := self.works.pop(rid, None):
            self.left += work.count


class Scheduler:
    """The sequences of an engine: those with blocks (running) and those without (waiting).

    Attributes:
        pool: of the cache.
        max_batch_size: most sequences that run at once.
        budget: most rows of a step.
        running, waiting: by rid.
        pace: what steps cost; whoever runs them tells it.
        preemptions: sequences that had to give up their blocks.
        queried, hits: tokens of sequences that were looked for in the cache when they were first
            admitted, and how many of them were there.
    """

    def __init__(self, pool: BlockPool, max_batch_size: int, budget: int) -> None:
        """Makes an empty scheduler.

        Args:
            pool: of the cache.
            max_batch_size: most sequences that run at once.
            budget: most rows of a step; above `max_batch_size`, or a new prompt could not start.

        Raises:
            ValueError: a step could not hold a row of each sequence.
        """
        if not 1 <= max_batch_size < budget:
            raise ValueError(f"a step of {budget} rows cannot serve {max_batch_size} sequences")
        self.pool = pool
        self.max_batch_size = max_batch_size
        self.budget = budget
        self.running: dict[str, Sequence] = {}
        self.waiting: dict[str, Sequence] = {}
        self.pace = Pace()
        self._preempted: set[str] = set()
        self.forget_counts()

    def __contains__(self, rid: object) -> bool:
        """Whether the sequence is here."""
        return rid in self.running or rid in self.waiting

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence among the waiting.

        Raises:
            ValueError: its tokens would not fit an empty cache.
        """
        if blocks_for(len(sequence.tokens)) > self.pool.count:
            raise ValueError(f"{len(sequence.tokens)} tokens do not fit the KV cache")
        self.waiting[sequence.request.rid] = sequence

    def remove(self, rid: str) -> None:
        """Forgets a sequence and frees its blocks; an unknown one is ignored."""
        sequence = self.running.pop(rid, None) or self.waiting.pop(rid, None)
        if sequence is not None:
            self.pool.release(sequence.blocks)
            self._preempted.discard(rid)

    def publish(self, sequence: Sequence) -> None:
        """Lets others find the full blocks of a sequence; called once a token has come out of it.

        Not earlier: only then is it known that what was written is a number.
        """
        if not self.pool.caching:
            return
        while sequence.published < sequence.computed // BLOCK_SIZE:
            place = sequence.published
            self.pool.publish(sequence.blocks, place, sequence.digest(place))
            sequence.published += 1

    def forget_counts(self) -> None:
        """Starts counting anew."""
        self.preemptions = self.queried = self.hits = 0

    def room(self) -> int:
        """How many more sequences, of the size of those here, would start soon."""
        count = len(self.running) + len(self.waiting)
        wanted = sum(blocks_for(len(s.tokens)) for s in self.waiting.values())
        typical = max(1, (self.pool.count - self.pool.free + wanted) // max(1, count))
        by_memory = (self.pool.free - wanted - count) // typical
        return max(0, min(self.max_batch_size - count, by_memory))

    def schedule(self) -> list[Work]:
        """Chooses the next step's rows and gives them their blocks.

        Returns:
            Works of distinct running sequences, single rows first; empty with nothing to do.
            The caller sets `sequence.computed` once the rows are computed.
        """
        step = _Step(self.budget)
        reading = self._decode(step)
        if reading or self.waiting:
            self._prefill(step, reading)
        return sorted(step.works.values(), key=lambda work: work.count > 1)

    def _decode(self, step: _Step) -> list[Sequence]:
        """Gives each that generates its row; returns those that still read their prompts."""
        ready: list[Sequence] = []
        reading: list[Sequence] = []
        for sequence in self.running.values():
            is_ready = len(sequence.tokens) - sequence.computed == 1
            (ready if is_ready else reading).append(sequence)
        ready.sort(key=lambda s: s.rank)
        for sequence in ready:
            if sequence.request.rid in self.running and self._grow(sequence):
                step.add(Work(sequence, sequence.computed, 1))
        return [s for s in reading if s.request.rid in self.running]

    def _grow(self, sequence: Sequence) -> bool:
        """Gets a running sequence its blocks; False when it had to give up its own instead."""
        while not self.pool.grow(sequence.blocks, len(sequence.tokens)):
            # Works are granted in the order of rank, so the worst has none in this step yet.
            worst = max(self.running.values(), key=lambda s: s.rank)
            self._preempt(worst)
            if worst is sequence:
                return False
        return True

    def _prefill(self, step: _Step, reading: list[Sequence]) -> None:
        generating = len(step.works)
        long_left = self.budget
        # A pace costs those that read, and spares those that generate: the more of them decide.
        if generating >= len(reading) + len(self.waiting):
            long_left = self.pace.rows(generating, self.budget)
        open_door = True
        for sequence in sorted([*reading, *self.waiting.values()], key=lambda s: s.rank):
            if step.left == 0:
                return
            if sequence.request.rid not in self.running:
                # Nobody overtakes the first that does not fit, or a long prompt would starve.
                if not open_door or (long_left == 0 and self._is_long(sequence)):
                    continue
                open_door = self._admit(sequence, step)
                if not open_door:
                    continue
            count = min(step.left, len(sequence.tokens) - sequence.computed)
            if self._is_long(sequence):
                count = min(count, long_left)
                long_left -= count
            if count:
                step.add(Work(sequence, sequence.computed, count))

    def _is_long(self, sequence: Sequence) -> bool:
        """Whether it starts, or started, with so much to read that it has to keep to the pace."""
        if len(sequence.tokens) <= LONG_ROWS:
            return False
        if sequence.request.rid in self.running:
            return len(sequence.tokens) - sequence.found > LONG_ROWS
        found = self._find(sequence)
        self.pool.release(sequence.blocks)
        return len(sequence.tokens) - found * BLOCK_SIZE > LONG_ROWS

    def _admit(self, sequence: Sequence, step: _Step) -> bool:
        """Starts a waiting sequence, at the cost of running ones of a lower class if need be."""
        found = self._find(sequence)
        victims = self._victims(sequence)
        if victims is None:
            self.pool.release(sequence.blocks)
            return False
        for victim in victims:
            step.drop(victim.request.rid)
            self._preempt(victim)
        rid = sequence.request.rid
        del self.waiting[rid]
        self.running[rid] = sequence
        sequence.published = found
        sequence.found = sequence.computed = found * BLOCK_SIZE
        if self.pool.caching and rid not in self._preempted:
            self.queried += len(sequence.tokens)
            self.hits += sequence.found
        return self.pool.grow(sequence.blocks, len(sequence.tokens))

    def _find(self, sequence: Sequence) -> int:
        """Gives a sequence the blocks that are in the cache already; returns how many.

        Never all of its tokens: the last row is what the next token comes from.
        """
        if not self.pool.caching:
            return 0
        for place in range((len(sequence.tokens) - 1) // BLOCK_SIZE):
            if not self.pool.hold(sequence.blocks, sequence.digest(place)):
                break
        return len(sequence.blocks)

    def _victims(self, sequence: Sequence) -> list[Sequence] | None:
        """Whom a newcomer, which holds what was found, displaces; None when it has to wait."""
        needed = blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        lower = [s for s in self.running.values() if s.request.priority > sequence.request.priority]
        if needed > self.pool.free + sum(len(s.blocks) for s in lower):
            return None
        lower.sort(key=lambda s: s.rank)
        victims: list[Sequence] = []
        leaving: Counter[int] = Counter()
        free, running = self.pool.free, len(self.running)
        while True:
            # One more block for each that runs, or the newcomer would soon be thrown out again.
            if running < self.max_batch_size and needed + running <= free:
                return victims
            if running == 0 and needed <= free:
                return victims
            if not lower:
                return None
            victims.append(lower.pop())
            free += self.pool.freed_by(leaving, victims[-1].blocks)
            running -= 1

    def _preempt(self, victim: Sequence) -> None:
        self.pool.release(victim.blocks)
        victim.computed = victim.found = victim.published = 0
        del self.running[victim.request.rid]
        self.waiting[victim.request.rid] = victim
        self._preempted.add(victim.request.rid)
        self.preemptions += 1

    def check_integrity(self) -> None:
        """Checks what must hold between any two calls.

        Raises:
            AssertionError: a rule is broken; says which.
        """
        self.pool.check_integrity([s.blocks for s in self.running.values()])
        broken = ""
        if len(self.running) > self.max_batch_size:
            broken = "more sequences run than the batch holds"
        if self.running.keys() & self.waiting.keys():
            broken = "a sequence both runs and waits"
        if any(s.blocks or s.computed for s in self.waiting.values()):
            broken = "a waiting sequence holds blocks"
        if any(blocks_for(s.computed) > len(s.blocks) for s in self.running.values()):
            broken = "a sequence has computed more than its blocks hold"
        if any(s.computed >= len(s.tokens) for s in self.running.values()):
            broken = "a sequence has no row left to compute"
        if any(s.published * BLOCK_SIZE > s.computed for s in self.running.values()):
            broken = "a sequence has published what it has not computed"
        if not self._preempted <= self.waiting.keys() | self.running.keys():
            broken = "a sequence that is gone counts as preempted"
        if broken:
            raise AssertionError(broken)
