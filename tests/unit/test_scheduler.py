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
    """A sequence that begins like no other."""
    prompt = [100 + arrival, *[1] * (length - 1)]
    return Sequence.of(EngineRequest(rid, prompt, SamplingParams(most), priority=priority), arrival)


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
            scheduler.publish(work.sequence)
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
    scheduler = make(blocks=4, budget=5 * BLOCK_SIZE)
    scheduler.add(sequence("a", 0, BLOCK_SIZE, most=BLOCK_SIZE + 4))
    scheduler.add(sequence("b", 1, BLOCK_SIZE - 1, most=BLOCK_SIZE + 4))
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
    # Its first block was there still.
    assert known > BLOCK_SIZE
    assert ("b", BLOCK_SIZE, known - BLOCK_SIZE) in works
    assert (scheduler.queried, scheduler.hits) == (2 * BLOCK_SIZE - 1, 0)


def test_a_newcomer_leaves_those_that_run_a_block_to_grow() -> None:
    scheduler = make(blocks=4, budget=4 * BLOCK_SIZE)
    two = 2 * BLOCK_SIZE - 2
    scheduler.add(sequence("a", 0, two))
    run(scheduler)
    scheduler.add(sequence("b", 1, two))
    assert [rid for rid, _, _ in run(scheduler)] == ["a"]
    assert scheduler.pool.free == 2
    assert scheduler.room() == 0
    scheduler.remove("a")
    assert [rid for rid, _, _ in run(scheduler)] == ["b"]


def test_nobody_overtakes_a_long_prompt_that_waits_for_memory() -> None:
    scheduler = make(blocks=8)
    scheduler.add(sequence("a", 0, 4 * BLOCK_SIZE - 4, most=4))
    run(scheduler)
    scheduler.add(sequence("long", 1, 6 * BLOCK_SIZE + 4))
    scheduler.add(sequence("short", 2, 3))
    while "a" in scheduler:
        run(scheduler)
        assert "short" not in scheduler.running
    run(scheduler)
    assert "long" in scheduler.running


def test_what_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="cache"):
        make(blocks=2).add(sequence("a", 0, 2 * BLOCK_SIZE + 1))
    with pytest.raises(ValueError, match="rows"):
        make(batch=4, budget=4)


def test_room_is_by_places_and_by_memory() -> None:
    scheduler = make(blocks=12, batch=4, budget=4 * BLOCK_SIZE)
    assert scheduler.room() == 4
    four = 4 * BLOCK_SIZE - 4
    scheduler.add(sequence("a", 0, four))
    # Four blocks each, and one more for each that runs: one more fits, a third does not.
    assert scheduler.room() == 1
    run(scheduler)
    assert scheduler.room() == 1
    scheduler.add(sequence("b", 1, four))
    assert scheduler.room() == 0
    scheduler.remove("a")
    scheduler.remove("b")
    scheduler.remove("unknown")
    assert scheduler.room() == 4


def chat(rid: str, arrival: int, prompt: list[int], priority: int = 1) -> Sequence:
    return Sequence.of(EngineRequest(rid, prompt, SamplingParams(8), (), priority), arrival)


def test_what_another_sequence_left_is_not_computed_again() -> None:
    scheduler = make(budget=8 * BLOCK_SIZE)
    system = list(range(10, 10 + 3 * BLOCK_SIZE))
    scheduler.add(chat("a", 0, [*system, 1, 2]))
    # Nothing can be found before a token has come out.
    scheduler.add(chat("too early", 1, [*system, 3]))
    assert run(scheduler) == [("a", 0, len(system) + 2), ("too early", 0, len(system) + 1)]
    scheduler.remove("a")
    scheduler.add(chat("b", 2, [*system, 4, 5, 6]))
    assert run(scheduler)[-1] == ("b", len(system), 3)
    assert scheduler.running["b"].blocks[:3] == scheduler.running["too early"].blocks[:3]
    # All but the last block: the next token comes from the last row.
    scheduler.add(chat("c", 3, system))
    assert run(scheduler)[-1] == ("c", len(system) - BLOCK_SIZE, BLOCK_SIZE)
    assert scheduler.running["c"].blocks == scheduler.running["b"].blocks[:3]
    assert scheduler.hits == 5 * BLOCK_SIZE
    assert scheduler.queried == 4 * len(system) + 2 + 1 + 3


def test_a_block_that_is_full_by_one_token_needs_one_row() -> None:
    scheduler = make(budget=8 * BLOCK_SIZE)
    scheduler.add(chat("a", 0, [7] * BLOCK_SIZE))
    run(scheduler)
    scheduler.add(chat("b", 1, [7] * BLOCK_SIZE + [8]))
    assert run(scheduler) == [("a", BLOCK_SIZE, 1), ("b", BLOCK_SIZE, 1)]


def test_what_was_generated_is_found_by_the_next_turn() -> None:
    scheduler = make(budget=8 * BLOCK_SIZE)
    scheduler.add(chat("a", 0, [7] * (2 * BLOCK_SIZE - 4)))
    while "a" in scheduler:
        run(scheduler)
    turn = [*[7] * (2 * BLOCK_SIZE - 4), *[2] * 8, 5]
    scheduler.add(chat("b", 1, turn))
    assert run(scheduler) == [("b", 2 * BLOCK_SIZE, len(turn) - 2 * BLOCK_SIZE)]


def test_a_newcomer_displaces_as_many_as_free_the_blocks_that_it_has_not_found() -> None:
    scheduler = make(blocks=8, batch=4, budget=8 * BLOCK_SIZE)
    shared = list(range(10, 10 + 3 * BLOCK_SIZE))
    scheduler.add(chat("one", 0, [*shared, 1], priority=2))
    run(scheduler)
    scheduler.add(chat("two", 1, [*shared, 2], priority=2))
    run(scheduler)
    assert scheduler.pool.free == 3
    # Five blocks, three of them there; those of the others that it shares would not become free.
    scheduler.add(chat("high", 2, [*shared, *[3] * (2 * BLOCK_SIZE)], priority=0))
    assert run(scheduler)[-1][:2] == ("high", len(shared))
    assert list(scheduler.waiting) == ["two"]
    while scheduler.waiting:
        works = run(scheduler)
    assert works[-1][:2] == ("two", len(shared))
    assert scheduler.queried == 5 * BLOCK_SIZE + 2 * len(shared) + 2


def test_what_a_failed_sequence_touched_is_not_found_again() -> None:
    scheduler = make(budget=8 * BLOCK_SIZE)
    prompt = [7] * (2 * BLOCK_SIZE + 1)
    scheduler.add(chat("a", 0, prompt))
    run(scheduler)
    scheduler.add(chat("b", 1, [*prompt[:-1], 9]))
    run(scheduler)
    failed = scheduler.running["a"].blocks
    assert scheduler.pool.forget(failed) == failed[2:], "what others hold is not cleared"
    scheduler.remove("a")
    scheduler.add(chat("c", 2, prompt))
    assert run(scheduler)[-1] == ("c", 0, len(prompt))
    assert scheduler.hits == 2 * BLOCK_SIZE


def reading(rows_s: float = 0.001) -> Scheduler:
    """Two that generate, at 100 ms a step and `rows_s` a row of a prompt."""
    scheduler = make(blocks=1000, batch=8, budget=300)
    for i in range(2):
        scheduler.add(chat(f"runs {i}", i, [50 + i]))
    run(scheduler)
    scheduler.pace.observe(2, 0, 0.1)
    scheduler.pace.observe(0, 256, 0.1 + 256 * rows_s)
    return scheduler


def test_a_long_prompt_keeps_to_the_pace_while_others_generate() -> None:
    scheduler = reading()
    scheduler.add(chat("long", 2, list(range(2000))))
    scheduler.add(chat("short", 3, [5] * 100))
    assert run(scheduler)[2:] == [("long", 0, 62), ("short", 0, 100)]
    scheduler.add(chat("longer", 4, list(range(1, 3000))))
    assert run(scheduler)[3:] == [("long", 62, 61)]
    assert "longer" in scheduler.waiting
    for rid in ("runs 0", "runs 1", "short"):
        scheduler.remove(rid)
    assert run(scheduler) == [("long", 123, 300)]


def test_those_that_read_decide_when_they_are_more() -> None:
    scheduler = reading()
    for i in range(3):
        scheduler.add(chat(f"long {i}", 2 + i, [i, *range(2000)]))
    assert run(scheduler)[2:] == [("long 0", 0, 298)]


def test_a_prompt_that_was_mostly_found_is_not_long() -> None:
    scheduler = reading()
    text = list(range(2000))
    scheduler.add(chat("first", 2, text))
    while any(rid == "first" for rid, _, count in run(scheduler) if count > 1):
        for rid in ("runs 0", "runs 1"):
            scheduler.remove(rid)
    scheduler.add(chat("again", 3, [*text, *[1] * 200]))
    assert run(scheduler)[-1][2] >= 200


class Engine(RuleBasedStateMachine):
    """Sequences come, go and are computed in any order; the rules hold and all of them end."""

    @initialize(
        blocks=st.integers(4, 16),
        batch=st.integers(1, 6),
        extra=st.integers(1, 40),
        caching=st.booleans(),
    )
    def start(self, blocks: int, batch: int, extra: int, caching: bool) -> None:
        self.scheduler = Scheduler(BlockPool(blocks, caching=caching), batch, batch + extra)
        self.context = blocks * BLOCK_SIZE
        self.arrivals = 0
        # What each block holds, as (position, all ids up to there), and what was ever written.
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(
        length=st.integers(1, 200),
        common=st.integers(0, 200),
        most=st.integers(1, 40),
        priority=st.integers(0, 2),
        generated=st.integers(0, 10),
    )
    def add(self, length: int, common: int, most: int, priority: int, generated: int) -> None:
        length = min(length, self.context - 40)
        common = min(common, length)
        prompt = [1] * common + [100 + self.arrivals % 3] * (length - common)
        request = EngineRequest(
            str(self.arrivals), prompt, SamplingParams(most + 10), [2] * generated, priority
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

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        if self.scheduler.running:
            rid = data.draw(st.sampled_from(list(self.scheduler.running)))
            blocks = self.scheduler.running[rid].blocks
            for block in self.scheduler.pool.forget(blocks):
                # Whoever finds it now finds what is not there.
                self.content[block] = ()
            self.scheduler.remove(rid)

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
            # It is told by the blocks alone what the rows of its sequence look at.
            ids, blocks = tuple(work.sequence.tokens), work.sequence.blocks
            for place in range(work.first // BLOCK_SIZE):
                assert self.content[blocks[place]] == ids[: (place + 1) * BLOCK_SIZE]
            for place in range(work.first // BLOCK_SIZE, blocks_for(work.first + work.count)):
                end = min((place + 1) * BLOCK_SIZE, work.first + work.count)
                self.content[blocks[place]] = ids[:end]
                assert sum(blocks[place] in s.blocks for s in scheduler.running.values()) == 1
        for work in works:
            ends = work.samples
            work.sequence.computed = work.first + work.count
            if ends:
                scheduler.publish(work.sequence)
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
