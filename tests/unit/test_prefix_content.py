"""What a sequence finds in its blocks is what it would have computed, whoever wrote it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from worker.engine.blocks import BLOCK_SIZE, BlockPool
from worker.engine.interface import EngineRequest, SamplingParams
from worker.engine.scheduler import Scheduler, Work
from worker.engine.sequence import Sequence

_Row = tuple[int, ...]


class Contents(RuleBasedStateMachine):
    """A cache whose rows are the whole text up to them, so that a wrong one cannot be right."""

    @initialize(blocks=st.integers(4, 12), batch=st.integers(1, 5), caching=st.booleans())
    def start(self, blocks: int, batch: int, caching: bool) -> None:
        self.pool = BlockPool(blocks, caching=caching)
        self.scheduler = Scheduler(self.pool, batch, batch + 2 * BLOCK_SIZE)
        self.rows: dict[tuple[int, int], _Row] = {}
        self.failed: set[tuple[int, int]] = set()
        self.context = blocks * BLOCK_SIZE
        self.arrivals = 0

    @rule(
        head=st.integers(0, 2),
        length=st.integers(1, 5 * BLOCK_SIZE),
        tail=st.lists(st.integers(3, 5), max_size=3),
        most=st.integers(1, 2 * BLOCK_SIZE),
        priority=st.integers(0, 2),
    )
    def add(self, head: int, length: int, tail: list[int], most: int, priority: int) -> None:
        prompt = ([head] * length + tail)[: self.context - 1]
        request = EngineRequest(str(self.arrivals), prompt, SamplingParams(most), priority=priority)
        self.scheduler.add(Sequence.of(request, self.arrivals))
        self.arrivals += 1

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        known = [*self.scheduler.running, *self.scheduler.waiting]
        if known:
            self.scheduler.remove(data.draw(st.sampled_from(known)))
            self.scheduler.check_integrity()

    @rule(fails=st.integers(0, 12), times=st.integers(1, 4))
    def step(self, fails: int, times: int) -> None:
        for i in range(times):
            self.one_step(fails if i == 0 else -1)

    def one_step(self, fails: int) -> None:
        works = self.scheduler.schedule()
        self.scheduler.check_integrity()
        held = [s.blocks for s in self.scheduler.running.values()]
        for work in works:
            self.compute(work, held)
        for i, work in enumerate(works):
            sequence = work.sequence
            samples = work.samples
            sequence.computed = work.first + work.count
            if i == fails:
                for block in self.pool.forget(sequence.blocks):
                    for offset in range(BLOCK_SIZE):
                        self.rows.pop((block, offset), None)
                self.scheduler.remove(sequence.request.rid)
            elif samples:
                self.scheduler.publish(sequence)
                sequence.tokens.append(len(sequence.tokens) % 3)
                full = len(sequence.tokens) >= self.context
                if full or sequence.position >= sequence.request.sampling.max_tokens:
                    self.scheduler.remove(sequence.request.rid)
            self.scheduler.check_integrity()

    def compute(self, work: Work, held: list[list[int]]) -> None:
        sequence = work.sequence
        tokens = tuple(sequence.tokens)
        for place in range(work.first, work.first + work.count):
            block = sequence.blocks[place // BLOCK_SIZE]
            assert sum(block in blocks for blocks in held) == 1, "a shared block is written"
            self.rows[block, place % BLOCK_SIZE] = tokens[: place + 1]
        for place in range(work.first + work.count):
            where = (sequence.blocks[place // BLOCK_SIZE], place % BLOCK_SIZE)
            assert self.rows.get(where) == tokens[: place + 1]

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        left = [*self.scheduler.running.values(), *self.scheduler.waiting.values()]
        for _ in range(10 + sum(len(s.tokens) + s.request.sampling.max_tokens for s in left)):
            if not self.scheduler.running and not self.scheduler.waiting:
                break
            self.one_step(-1)
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert self.pool.free == self.pool.count


TestContents = Contents.TestCase
TestContents.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
