"""Which rows of which sequences the next step computes: continuous batching over a paged cache.

A row is one token of one sequence. A step takes one row of every sequence that is generating and
fills the rest of its budget with pieces of prompts. Ranks decide everything: a smaller priority
number goes first, then the earlier arrival; when blocks run out the worst rank gives its blocks up
and is computed again later. So the best rank always advances, and every sequence ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.engine.blocks import BlockPool, blocks_for
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


class Scheduler:
    """The sequences of an engine: those with blocks (running) and those without (waiting)."""

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
        self.preemptions = 0

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
        step: dict[str, Work] = {}
        self._decode(step)
        self._prefill(step)
        return sorted(step.values(), key=lambda work: work.count > 1)

    def _decode(self, step: dict[str, Work]) -> None:
        ready = [s for s in self.running.values() if len(s.tokens) - s.computed == 1]
        for sequence in sorted(ready, key=lambda s: s.rank):
            if sequence.request.rid in self.running and self._grow(sequence):
                step[sequence.request.rid] = Work(sequence, sequence.computed, 1)

    def _grow(self, sequence: Sequence) -> bool:
        """Gets a running sequence its blocks; False when it had to give up its own instead."""
        while not self.pool.grow(sequence.blocks, len(sequence.tokens)):
            # Works are granted in the order of rank, so the worst has none in this step yet.
            worst = max(self.running.values(), key=lambda s: s.rank)
            self._preempt(worst)
            if worst is sequence:
                return False
        return True

    def _prefill(self, step: dict[str, Work]) -> None:
        left = self.budget - len(step)
        reading = [s for s in self.running.values() if len(s.tokens) - s.computed > 1]
        open_door = True
        for sequence in sorted([*reading, *self.waiting.values()], key=lambda s: s.rank):
            rid = sequence.request.rid
            if left == 0:
                return
            if rid not in self.running:
                # Nobody overtakes the first that does not fit, or a long prompt would starve.
                open_door = open_door and self._admit(sequence, step)
                if not open_door:
                    continue
            count = min(left, len(sequence.tokens) - sequence.computed)
            step[rid] = Work(sequence, sequence.computed, count)
            left = self.budget - sum(work.count for work in step.values())

    def _admit(self, sequence: Sequence, step: dict[str, Work]) -> bool:
        """Starts a waiting sequence, at the cost of running ones of a lower class if need be."""
        lower = [s for s in self.running.values() if s.request.priority > sequence.request.priority]
        lower.sort(key=lambda s: s.rank)
        needed = blocks_for(len(sequence.tokens))
        victims: list[Sequence] = []
        while True:
            running = len(self.running) - len(victims)
            free = self.pool.free + sum(len(victim.blocks) for victim in victims)
            # One more block for each that runs, or the newcomer would soon be thrown out again.
            if running < self.max_batch_size and needed + running <= free:
                break
            if running == 0 and needed <= free:
                break
            if not lower:
                return False
            victims.append(lower.pop())
        for victim in victims:
            step.pop(victim.request.rid, None)
            self._preempt(victim)
        del self.waiting[sequence.request.rid]
        self.running[sequence.request.rid] = sequence
        return self.pool.grow(sequence.blocks, len(sequence.tokens))

    def _preempt(self, victim: Sequence) -> None:
        self.pool.release(victim.blocks)
        victim.computed = 0
        del self.running[victim.request.rid]
        self.waiting[victim.request.rid] = victim
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
        if any(s.computed > len(s.tokens) for s in self.running.values()):
            broken = "a sequence has computed more than it has"
        if broken:
            raise AssertionError(broken)
