"""The scheduler against a model of the engine that only counts rows."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from worker.engine.blocks import BLOCK_SIZE, BlockPool, blocks_for
from worker.engine.interface import EngineRequest, SamplingParams
from worker.engine.scheduler import Scheduler, Work
from worker.engine.sequence import Sequence


def sequence(rid: str, arrival: int, length: int, most: int = 8, priority: int = 1) -> Sequence:
    request = EngineRequest(rid, [1] * length, SamplingParams(most), priority=priority)
    return Sequence.of(request, arrival)


def make(blocks: int = 100, batch: int = 4, budget: int = 32) -> Scheduler:
    return Scheduler(BlockPool(blocks), batch, budget)


def plan(works: list[Work]) -> list[tuple[str, int, int]]:
    return [(work.sequence.request.rid, work.first, work.count) for work in works]


def run(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """One step of an engine without a model."""
    works = scheduler.schedule()
    scheduler.check_integrity()
    done = plan(works)
    for work in works:
        finishes = work.samples
        work.sequence.computed = work.first + work.count
        if finishes:
            work.sequence.tokens.append(2)
            if work.sequence.position >= work.sequence.request.sampling.max_tokens:
                scheduler.remove(work.sequence.request.rid)
    scheduler.check_integrity()
    return done


def test_generating_sequences_go_first_and_prompts_fill_the_rest_of_the_step() -> None:
    scheduler = make(budget=32)
    scheduler.add(sequence("a", 0, 5))
    assert run(scheduler) == [("a", 0, 5)]
    scheduler.add(sequence("b", 1, 50))
    scheduler.add(sequence("c", 2, 10))
    assert run(scheduler) == [("a", 5, 1), ("b", 0, 31)]
    assert run(scheduler) == [("a", 6, 1), ("b", 31, 19), ("c", 0, 10)]
    assert run(scheduler) == [("a", 7, 1), ("b", 50, 1), ("c", 10, 1)]


def test_prompts_are_read_by_priority_then_arrival() -> None:
    scheduler = make(budget=20)
    for arrival, (rid, priority) in enumerate(
        [("low", 2), ("first", 1), ("second", 1), ("high", 0)]
    ):
        scheduler.add(sequence(rid, arrival, 20, priority=priority))
    order = [run(scheduler)[-1][0] for _ in range(2)]
    assert order == ["high", "first"]


def test_the_batch_size_holds() -> None:
    scheduler = make(batch=2)
    for i in range(3):
        scheduler.add(sequence(str(i), i, 3))
    assert [rid for rid, _, _ in run(scheduler)] == ["0", "1"]
    assert (len(scheduler.running), len(scheduler.waiting)) == (2, 1)


def test_a_higher_class_takes_the_place_of_the_youngest_of_the_lowest() -> None:
    scheduler = make(batch=2)
    scheduler.add(sequence("old", 0, 3, priority=2))
    scheduler.add(sequence("young", 1, 3, priority=2))
    run(scheduler)
    scheduler.add(sequence("same class", 2, 3, priority=2))
    scheduler.add(sequence("high", 3, 3, priority=0))
    assert {rid for rid, _, _ in run(scheduler)} == {"old", "high"}
    assert list(scheduler.waiting) == ["same class", "young"]
    assert scheduler.preemptions == 1


def test_when_blocks_run_out_the_worst_rank_gives_way_and_is_computed_again() -> None:
    scheduler = make(blocks=4, budget=64)
    scheduler.add(sequence("a", 0, 16, most=20))
    scheduler.add(sequence("b", 1, 15, most=20))
    assert [rid for rid, _, _ in run(scheduler)] == ["a", "b"]
    while scheduler.preemptions == 0:
        run(scheduler)
    assert list(scheduler.running) == ["a"]
    waiting = scheduler.waiting["b"]
    assert (waiting.computed, waiting.blocks) == (0, [])
    known = len(waiting.tokens)
    works: list[tuple[str, int, int]] = []
    while "b" not in scheduler.running:
        works = run(scheduler)
    assert ("b", 0, known) in works


def test_a_newcomer_leaves_those_that_run_a_block_to_grow() -> None:
    scheduler = make(blocks=4, budget=64)
    scheduler.add(sequence("a", 0, 30))
    run(scheduler)
    scheduler.add(sequence("b", 1, 30))
    assert [rid for rid, _, _ in run(scheduler)] == ["a"]
    assert scheduler.pool.free == 2
    assert scheduler.room() == 0
    scheduler.remove("a")
    assert [rid for rid, _, _ in run(scheduler)] == ["b"]


def test_nobody_overtakes_a_long_prompt_that_waits_for_memory() -> None:
    scheduler = make(blocks=8)
    scheduler.add(sequence("a", 0, 60, most=4))
    run(scheduler)
    scheduler.add(sequence("long", 1, 100))
    scheduler.add(sequence("short", 2, 3))
    while "a" in scheduler:
        run(scheduler)
        assert "short" not in scheduler.running
    run(scheduler)
    assert "long" in scheduler.running


def test_what_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="cache"):
        make(blocks=2).add(sequence("a", 0, 33))
    with pytest.raises(ValueError, match="rows"):
        make(batch=4, budget=4)


def test_room_is_by_places_and_by_memory() -> None:
    scheduler = make(blocks=12, batch=4, budget=64)
    assert scheduler.room() == 4
    scheduler.add(sequence("a", 0, 60))
    # Four blocks each, and one more for each that runs: one more fits, a third does not.
    assert scheduler.room() == 1
    run(scheduler)
    assert scheduler.room() == 1
    scheduler.add(sequence("b", 1, 60))
    assert scheduler.room() == 0
    scheduler.remove("a")
    scheduler.remove("b")
    scheduler.remove("unknown")
    assert scheduler.room() == 4


class Engine(RuleBasedStateMachine):
    """Sequences come, go and are computed in any order; the rules hold and all of them end."""

    @initialize(blocks=st.integers(4, 16), batch=st.integers(1, 6), extra=st.integers(1, 40))
    def start(self, blocks: int, batch: int, extra: int) -> None:
        self.scheduler = Scheduler(BlockPool(blocks), batch, batch + extra)
        self.context = blocks * BLOCK_SIZE
        self.arrivals = 0

    @rule(
        length=st.integers(1, 200),
        most=st.integers(1, 40),
        priority=st.integers(0, 2),
        generated=st.integers(0, 10),
    )
    def add(self, length: int, most: int, priority: int, generated: int) -> None:
        length = min(length, self.context - 40)
        request = EngineRequest(
            str(self.arrivals), [1] * length, SamplingParams(most + 10), [2] * generated, priority
        )
        self.scheduler.add(Sequence.of(request, self.arrivals))
        self.arrivals += 1

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        known = [*self.scheduler.running, *self.scheduler.waiting]
        if known:
            rid = data.draw(st.sampled_from(known))
            self.scheduler.remove(rid)
            assert rid not in self.scheduler

    @rule()
    def step(self) -> None:
        self.one_step()

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def one_step(self) -> None:
        scheduler = self.scheduler
        everybody = {**scheduler.running, **scheduler.waiting}
        works = scheduler.schedule()
        assert sum(work.count for work in works) <= scheduler.budget
        assert len({work.sequence.request.rid for work in works}) == len(works)
        counts = [work.count for work in works]
        assert counts == sorted(counts, key=lambda count: count > 1)
        for work in works:
            assert work.sequence.request.rid in scheduler.running
            assert (work.first, work.count > 0) == (work.sequence.computed, True)
            assert len(work.sequence.blocks) >= blocks_for(work.first + work.count)
        if everybody:
            best = min(everybody.values(), key=lambda s: s.rank)
            assert best in [work.sequence for work in works], "the best rank always advances"
        for work in works:
            ends = work.samples
            work.sequence.computed = work.first + work.count
            if ends:
                work.sequence.tokens.append(2)
                full = len(work.sequence.tokens) >= self.context
                if full or work.sequence.position >= work.sequence.request.sampling.max_tokens:
                    scheduler.remove(work.sequence.request.rid)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        left = {**self.scheduler.running, **self.scheduler.waiting}
        bound = 10 + sum(len(s.tokens) + s.request.sampling.max_tokens for s in left.values())
        for _ in range(bound):
            self.one_step()
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert self.scheduler.pool.free == self.scheduler.pool.count


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
