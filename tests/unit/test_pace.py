"""How much of a long prompt a step reads, by what steps have cost."""

from __future__ import annotations

import random

import pytest

from worker.engine.pace import Pace

BUDGET = 512


def simulate(pace: Pace, decode_s: float, row_s: float, steps: int, jitter: float = 0.0) -> float:
    """A long prompt beside eight that generate; the mean time of its steps by that without."""
    source, total = random.Random(1), 0.0
    for _ in range(steps):
        rows = pace.rows(8, BUDGET)
        seconds = decode_s + rows * row_s
        total += seconds
        pace.observe(8, rows, seconds * (1 + jitter * source.uniform(-1, 1)))
    return total / steps / decode_s


def warm(decode_s: float, row_s: float) -> Pace:
    pace = Pace()
    for generating in (1, 2, 4, 8):
        pace.observe(generating, 0, decode_s)
    pace.observe(0, 256, decode_s + 256 * row_s)
    return pace


def test_without_a_measurement_nothing_is_limited() -> None:
    pace = Pace()
    assert pace.rows(8, BUDGET) == BUDGET
    pace.observe(8, 0, 0.1)
    assert pace.rows(8, BUDGET) == BUDGET
    pace.observe(8, 100, 0.2)
    assert pace.rows(8, BUDGET) == 56
    assert pace.rows(0, BUDGET) == BUDGET, "nobody waits"


@pytest.mark.parametrize(("decode_s", "row_s"), [(0.04, 0.0003), (0.01, 0.0001), (0.1, 0.0005)])
@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_a_step_takes_less_than_twice_as_long(decode_s: float, row_s: float, jitter: float) -> None:
    pace = warm(decode_s, row_s)
    assert 1.4 < simulate(pace, decode_s, row_s, 60, jitter) < 1.9


def test_it_follows_what_steps_cost() -> None:
    pace = warm(0.04, 0.0003)
    before = pace.rows(8, BUDGET)
    # At the end of a long prompt a row costs more.
    simulate(pace, 0.04, 0.0006, 60)
    assert pace.rows(8, BUDGET) <= before * 0.6
    for _ in range(60):
        pace.observe(8, 0, 0.08)
    assert pace.rows(8, BUDGET) >= before * 0.9


def test_a_prompt_always_gets_on() -> None:
    assert warm(0.001, 0.01).rows(8, BUDGET) == 8


def test_a_piece_fills_whole_tiles() -> None:
    slow, fast = warm(0.001, 0.01), warm(0.04, 0.001)
    generating = (1, 7, 8, 9, 16, 31)
    assert [slow.rows(n, BUDGET) for n in generating] == [15, 9, 8, 23, 16, 17]
    assert [fast.rows(n, BUDGET) for n in generating] == [15, 25, 24, 23, 16, 17]


def test_pieces_have_few_sizes() -> None:
    sizes = {warm(0.04, 0.0003 * (1 + i / 100)).rows(8, BUDGET) for i in range(100)}
    assert len(sizes) <= 4
    assert all((8 + size) % 16 == 0 for size in sizes)


def test_a_step_that_was_held_up_changes_little() -> None:
    pace = warm(0.04, 0.0003)
    before = pace.rows(8, BUDGET)
    pace.observe(8, 0, 5.0)
    pace.observe(8, 90, 5.0)
    assert 0.7 * before <= pace.rows(8, BUDGET) <= 1.3 * before


def test_a_first_slow_step_is_forgotten_soon() -> None:
    pace = Pace()
    pace.observe(8, 0, 1.0)
    for _ in range(20):
        pace.observe(8, 0, 0.04)
    pace.observe(0, 256, 0.04 + 256 * 0.0003)
    assert pace.rows(8, BUDGET) <= 1.5 * warm(0.04, 0.0003).rows(8, BUDGET)


def test_rows_that_were_measured_on_a_busy_machine_are_forgotten_soon() -> None:
    pace = warm(0.04, 0.003)
    assert pace.rows(8, BUDGET) == 8
    simulate(pace, 0.04, 0.0003, 30)
    assert pace.rows(8, BUDGET) >= 64


def test_the_nearest_size_stands_for_one_that_was_not_seen() -> None:
    pace = Pace()
    pace.observe(2, 0, 0.02)
    pace.observe(64, 0, 0.2)
    pace.observe(0, 100, 0.02 + 100 * 0.0002)
    assert pace.rows(3, BUDGET) + 3 == pace.rows(2, BUDGET) + 2 == 64
    assert abs(pace.rows(40, BUDGET) - pace.rows(64, BUDGET)) < 16
    assert pace.rows(64, BUDGET) > 512
