"""No block of the KV cache is lost or held twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.blocks import BLOCK_SIZE, BlockPool, blocks_for


def test_a_block_holds_sixteen_tokens() -> None:
    assert BLOCK_SIZE == 16
    assert [blocks_for(tokens) for tokens in (0, 1, 16, 17, 160)] == [0, 1, 1, 2, 10]


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="0"):
        BlockPool(0)


def test_growing_beyond_the_pool_changes_nothing() -> None:
    pool, held = BlockPool(3), []
    assert pool.grow(held, 20)
    before = list(held)
    assert not pool.grow(held, 16 * 3 + 1)
    assert (held, pool.free) == (before, 1)
    pool.check_integrity([held])


def test_what_is_lost_or_held_twice_is_found() -> None:
    pool, held = BlockPool(3), []
    pool.grow(held, 20)
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity([])
    with pytest.raises(AssertionError, match="twice"):
        pool.check_integrity([held, held])


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 120), st.booleans()), max_size=40),
)
def test_any_order_of_growing_and_releasing_keeps_the_books(
    count: int, steps: list[tuple[int, int, bool]]
) -> None:
    pool = BlockPool(count)
    holders: list[list[int]] = [[] for _ in range(5)]
    for who, tokens, release in steps:
        held, free = holders[who], pool.free
        if release:
            pool.release(held)
            assert held == []
        else:
            before = list(held)
            fits = blocks_for(tokens) - len(before) <= free
            assert pool.grow(held, tokens) is fits
            assert held[: len(before)] == before
            assert len(held) == (max(len(before), blocks_for(tokens)) if fits else len(before))
        pool.check_integrity(holders)
