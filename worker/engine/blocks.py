"""Who holds which block of the paged KV cache. Ids only: the tensors belong to the backend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

BLOCK_SIZE: Final = 32
"""Tokens of a block: of which the native backend makes whole tiles (native/source/cache.h)."""


def blocks_for(tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // BLOCK_SIZE)


class BlockPool:
    """The free blocks. A holder is a list of block ids, in the order of its tokens."""

    def __init__(self, count: int) -> None:
        """Makes a pool of the blocks 0 .. count - 1, all free.

        Raises:
            ValueError: no block at all.
        """
        if count < 1:
            raise ValueError(f"a KV cache needs at least one block, not {count}")
        self.count = count
        # Last in, first out: a block that was just used is still in the processor's cache.
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def grow(self, held: list[int], tokens: int) -> bool:
        """Makes `held` large enough for this many tokens.

        Returns:
            False when there are not enough free blocks; then nothing is changed.
        """
        missing = blocks_for(tokens) - len(held)
        if missing > len(self._free):
            return False
        held.extend(self._free.pop() for _ in range(missing))
        return True

    def release(self, held: list[int]) -> None:
        """Takes all blocks of `held` back and empties it."""
        self._free.extend(reversed(held))
        held.clear()

    def check_integrity(self, holders: Iterable[list[int]]) -> None:
        """Checks that every block is either free or held once.

        Args:
            holders: all lists that were grown and not released.

        Raises:
            AssertionError: a block is lost, or has two holders.
        """
        everything = [*self._free, *(block for held in holders for block in held)]
        if sorted(everything) != list(range(self.count)):
            raise AssertionError(f"blocks lost or held twice: {sorted(everything)}")
