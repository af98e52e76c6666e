"""Who holds which block of the paged KV cache. Ids only: the tensors belong to the backend.

Holders may share full blocks of equal content, which nobody writes again. What nobody holds stays
findable until its block is needed, the least recently used first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Final

from worker.engine.prefix import PrefixIndex

BLOCK_SIZE: Final = 32
"""Tokens of a block: of which the native backend makes whole tiles (native/source/cache.h)."""


def blocks_for(tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // BLOCK_SIZE)


class BlockPool:
    """The blocks of a cache. A holder is a list of block ids, in the order of its tokens.

    A block is in one of three states: held, by any number of holders; cached: held by nobody, but
    its content can be found; or empty.
    """

    def __init__(self, count: int, *, caching: bool = True) -> None:
        """Makes a pool of the blocks 0 .. count - 1, all empty.

        Args:
            count: of blocks.
            caching: whether content is remembered and shared.

        Raises:
            ValueError: no block at all.
        """
        if count < 1:
            raise ValueError(f"a KV cache needs at least one block, not {count}")
        self.count = count
        self.caching = caching
        # Last in, first out: a block that was just used is still in the processor's cache.
        self._empty = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._index = PrefixIndex()
        # The least recently used first. A holder of a block holds all before it, too, and lets go
        # of the last first: so a block comes before those that it goes on from.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._cached)

    def grow(self, held: list[int], tokens: int) -> bool:
        """Makes `held` large enough for this many tokens.

        Returns:
            False when there are not enough free blocks; then nothing is changed.
        """
        missing = blocks_for(tokens) - len(held)
        if missing <= 0:
            return True
        if missing > self.free:
            return False
        for _ in range(missing):
            block = self._empty.pop() if self._empty else self._evict()
            self._holders[block] = 1
            held.append(block)
        return True

    def release(self, held: list[int]) -> None:
        """Lets go of all blocks of `held` and empties it."""
        for block in reversed(held):
            self._let_go(block)
        held.clear()

    def hold(self, held: list[int], digest: bytes) -> bool:
        """Adds the block of this content to `held`; False when there is none."""
        block = self._index.find(digest)
        if block is None:
            return False
        self._cached.pop(block, None)
        self._holders[block] += 1
        held.append(block)
        return True

    def publish(self, held: list[int], place: int, digest: bytes) -> None:
        """Makes a full block findable; the holder takes the one of equal content if there is one.

        Args:
            held: by whom.
            place: of the block in it; those before are published.
            digest: of the content, which nobody writes again.
        """
        block = held[place]
        parent = held[place - 1] if place else -1
        if place and parent not in self._index:
            # Forgotten since: what goes on from it could not be found.
            return
        known = self._index.find(digest)
        if known is None:
            self._index.add(block, digest, parent)
        elif known != block:
            self._cached.pop(known, None)
            self._holders[known] += 1
            held[place] = known
            self._let_go(block)

    def forget(self, held: list[int]) -> list[int]:
        """Makes unfindable what a failed holder wrote or read, and all that goes on from it.

        Returns:
            The blocks that only this holder has, which are to be cleared.
        """
        for block in self._index.drop_with_followers(held):
            if not self._holders[block]:
                del self._cached[block]
                self._empty.append(block)
        return [block for block in held if self._holders[block] == 1]

    def forget_all(self) -> None:
        """Makes everything unfindable."""
        self._index = PrefixIndex()
        self._empty.extend(self._cached)
        self._cached.clear()

    def freed_by(self, leaving: Counter[int], held: Iterable[int]) -> int:
        """How many blocks a holder would free, after others.

        Args:
            leaving: how many of the leaving hold each block; counts this one afterwards.
            held: by the one that would leave next.
        """
        freed = 0
        for block in held:
            leaving[block] += 1
            freed += leaving[block] == self._holders[block]
        return freed

    def _let_go(self, block: int) -> None:
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if block in self._index:
                self._cached[block] = None
            else:
                self._empty.append(block)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._index.drop(block)
        return block

    def check_integrity(self, holders: Iterable[list[int]]) -> None:
        """Checks the books.

        Args:
            holders: all lists that were grown and not released.

        Raises:
            AssertionError: a block is lost, or is counted wrongly, or could not be evicted.
        """
        counts = Counter(block for held in holders for block in held)
        if counts != Counter({b: n for b, n in enumerate(self._holders) if n}):
            raise AssertionError(f"blocks lost or held twice: {counts} {self._holders}")
        everything = [*self._empty, *self._cached, *counts]
        if sorted(everything) != list(range(self.count)):
            raise AssertionError(f"blocks lost or in two states: {sorted(everything)}")
        self._index.check_integrity()
        if any(block in self._index for block in self._empty):
            raise AssertionError("an empty block can be found")
        later: set[int] = set()
        for block in self._cached:
            if block not in self._index:
                raise AssertionError("a cached block cannot be found")
            if self._index.parent_of(block) in later:
                raise AssertionError("a block would be evicted before one that goes on from it")
            later.add(block)
        for block in counts:
            if block in self._index and (parent := self._index.parent_of(block)) in self._cached:
                raise AssertionError(f"{block} is held, {parent} before it is not")
        if not self.caching and len(self._index):
            raise AssertionError("content is remembered although that is off")
