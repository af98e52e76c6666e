"""No block of the KV cache is lost, held unknowingly, or found for what it is not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from worker.engine.blocks import BLOCK_SIZE, BlockPool, blocks_for
from worker.engine.prefix import ROOT, digest_of


def test_blocks_are_counted_up() -> None:
    sizes = (0, 1, BLOCK_SIZE, BLOCK_SIZE + 1, 10 * BLOCK_SIZE)
    assert [blocks_for(tokens) for tokens in sizes] == [0, 1, 1, 2, 10]


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="0"):
        BlockPool(0)


def test_growing_beyond_the_pool_changes_nothing() -> None:
    pool, held = BlockPool(3), []
    assert pool.grow(held, BLOCK_SIZE + 4)
    before = list(held)
    assert not pool.grow(held, BLOCK_SIZE * 3 + 1)
    assert (held, pool.free) == (before, 1)
    pool.check_integrity([held])


def test_what_is_lost_or_held_twice_is_found() -> None:
    pool, held = BlockPool(3), []
    pool.grow(held, BLOCK_SIZE + 4)
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity([])
    with pytest.raises(AssertionError, match="twice"):
        pool.check_integrity([held, held])


def test_a_digest_is_that_of_all_ids_so_far() -> None:
    first = digest_of(ROOT, [1] * BLOCK_SIZE)
    names = {
        first,
        digest_of(ROOT, [2] * BLOCK_SIZE),
        digest_of(first, [1] * BLOCK_SIZE),
        digest_of(first, [1] * (BLOCK_SIZE - 1) + [2]),
        digest_of(digest_of(ROOT, [2] * BLOCK_SIZE), [1] * BLOCK_SIZE),
        digest_of(ROOT, [1] * (BLOCK_SIZE - 1) + [257]),
    }
    assert len(names) == 6
    assert {len(name) for name in names} == {32}
    assert digest_of(ROOT, [1] * BLOCK_SIZE) == first


def filled(pool: BlockPool, *digests: bytes) -> list[int]:
    """A holder of full blocks of these contents."""
    held: list[int] = []
    for place, digest in enumerate(digests):
        if not pool.hold(held, digest):
            assert pool.grow(held, (place + 1) * BLOCK_SIZE)
            pool.publish(held, place, digest)
    return held


def test_the_least_recently_used_goes_first_and_followers_before_what_they_follow() -> None:
    pool = BlockPool(6)
    for branch in (b"x", b"y"):
        pool.release(filled(pool, b"a", b"a" + branch, b"a" + branch + branch))
    pool.release(filled(pool, b"a", b"ax"))
    names, gone = [b"a", b"ax", b"axx", b"ay", b"ayy"], []
    taken: list[int] = []
    for blocks in range(1, 7):
        assert pool.grow(taken, blocks * BLOCK_SIZE)
        pool.check_integrity([taken])
        gone += [name for name in names if pool._index.find(name) is None and name not in gone]
    # One was empty; of the others "ax" was used last.
    assert gone == [b"axx", b"ayy", b"ay", b"ax", b"a"]


def test_two_that_wrote_the_same_keep_one() -> None:
    pool = BlockPool(4)
    one, two = [], []
    pool.grow(one, 2 * BLOCK_SIZE)
    pool.grow(two, 2 * BLOCK_SIZE)
    pool.publish(one, 0, b"a")
    pool.publish(two, 0, b"a")
    assert one[0] == two[0]
    assert one[1] != two[1]
    assert pool.free == 1
    pool.check_integrity([one, two])


def test_followers_of_what_was_forgotten_are_not_found_either() -> None:
    pool = BlockPool(6)
    pool.release(filled(pool, b"a", b"ab", b"abc"))
    pool.release(filled(pool, b"z"))
    other = filled(pool, b"a", b"ab")
    failed = filled(pool, b"a")
    assert pool.forget(failed) == []
    pool.release(failed)
    assert not any(pool.hold([], name) for name in (b"a", b"ab", b"abc"))
    pool.grow(other, 3 * BLOCK_SIZE)
    # Could not be found without the blocks before it.
    pool.publish(other, 2, b"abc")
    assert not pool.hold([], b"abc")
    assert pool.forget(other) == other
    pool.release(other)
    pool.check_integrity([])
    assert pool.free == 6


def test_everything_can_be_forgotten() -> None:
    pool = BlockPool(4)
    held = filled(pool, b"a")
    pool.release(filled(pool, b"a", b"ab"))
    pool.forget_all()
    assert not pool.hold([], b"a")
    assert pool.free == 3
    pool.release(held)
    pool.check_integrity([])


class Pool(RuleBasedStateMachine):
    """Holders of texts of one letter a block, against a model that knows what blocks contain."""

    @initialize(count=st.integers(1, 12))
    def start(self, count: int) -> None:
        self.pool = BlockPool(count)
        # By holder: its blocks, its text, and how much of it is published.
        self.holders: list[tuple[list[int], str]] = []
        # What is in a block, as the whole text up to it.
        self.content: dict[int, str] = {}

    @rule(text=st.text("ab", min_size=1, max_size=6), publish=st.booleans())
    def come(self, text: str, publish: bool) -> None:
        held: list[int] = []
        free = self.pool.free
        while len(held) < len(text) and self.pool.hold(held, text[: len(held) + 1].encode()):
            assert self.content[held[-1]] == text[: len(held)]
        found = len(held)
        if not self.pool.grow(held, len(text) * BLOCK_SIZE):
            assert len(text) > free
            self.pool.release(held)
            return
        for place in range(found, len(text)):
            assert not any(held[place] in other for other, _ in self.holders), "it is written to"
            self.content[held[place]] = text[: place + 1]
        if publish:
            for place in range(found, len(text)):
                self.pool.publish(held, place, text[: place + 1].encode())
        self.holders.append((held, text))
        self.check(held, text)

    @rule(data=st.data())
    def publish_later(self, data: st.DataObject) -> None:
        if self.holders:
            held, text = data.draw(st.sampled_from(self.holders))
            for place in range(len(text)):
                self.pool.publish(held, place, text[: place + 1].encode())
            self.check(held, text)

    @rule(data=st.data(), fails=st.booleans())
    def leave(self, data: st.DataObject, fails: bool) -> None:
        if not self.holders:
            return
        held, text = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        if fails:
            others = {block for other, _ in self.holders for block in other}
            assert set(self.pool.forget(held)) == set(held) - others
            for place in range(len(text)):
                found: list[int] = []
                # Another one may have written the same, without it.
                if self.pool.hold(found, text[: place + 1].encode()):
                    assert not set(found) & set(held), "what failed is found"
                    self.pool.release(found)
        self.pool.release(held)

    def check(self, held: list[int], text: str) -> None:
        assert [self.content[block] for block in held] == [
            text[: place + 1] for place in range(len(text))
        ]

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity([held for held, _ in self.holders])
            held = {block for blocks, _ in self.holders for block in blocks}
            assert self.pool.free == self.pool.count - len(held)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for held, _ in self.holders:
                self.pool.release(held)
            everything: list[int] = []
            assert self.pool.grow(everything, self.pool.count * BLOCK_SIZE)
            self.pool.check_integrity([everything])


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


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
