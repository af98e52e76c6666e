"""Which block of the KV cache holds which content: the index of the prefix cache. Ids only.

Keys and values of a block are decided by its tokens and all tokens before them, so a block is named
by a digest of its own ids and the digest of the block before: equal names, equal content. It is a
real digest, not Python's hash: a collision would hand one caller another's content.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Final

ROOT: Final = b""
"""What stands for the digest of the block before the first."""


def digest_of(parent: bytes, ids: Sequence[int]) -> bytes:
    """The name of a full block's content: 32 bytes.

    Args:
        parent: digest of the block before, or ROOT.
        ids: the block's token ids, all of them.
    """
    return hashlib.blake2b(parent + array("q", ids).tobytes(), digest_size=32).digest()


class PrefixIndex:
    """A tree of blocks by content: a block is only in it while the block before it is."""

    def __init__(self) -> None:
        """Knows no content yet."""
        self._blocks: dict[bytes, int] = {}
        # By block: its digest, and the block before it, -1 for a first one.
        self._entries: dict[int, tuple[bytes, int]] = {}

    def __len__(self) -> int:
        """How many blocks it names."""
        return len(self._entries)

    def __contains__(self, block: int) -> bool:
        """Whether a block's content is known."""
        return block in self._entries

    def find(self, digest: bytes) -> int | None:
        """The block of this content."""
        return self._blocks.get(digest)

    def add(self, block: int, digest: bytes, parent: int) -> None:
        """Names a block's content.

        Args:
            block: not named yet.
            digest: that no block has.
            parent: the block before, which is named, or -1.
        """
        self._blocks[digest] = block
        self._entries[block] = (digest, parent)

    def drop(self, block: int) -> None:
        """Forgets a block that is before no other."""
        digest, _ = self._entries.pop(block)
        del self._blocks[digest]

    def drop_with_followers(self, blocks: Iterable[int]) -> list[int]:
        """Forgets blocks and all that go on from them: slow, for failures; returns what it was."""
        children: dict[int, list[int]] = {}
        for block, (_, parent) in self._entries.items():
            children.setdefault(parent, []).append(block)
        doomed: list[int] = []
        waiting = list(blocks)
        while waiting:
            block = waiting.pop()
            if block in self._entries:
                self.drop(block)
                doomed.append(block)
                waiting += children.get(block, [])
        return doomed

    def parent_of(self, block: int) -> int:
        """The block before a named one, -1 for a first one."""
        return self._entries[block][1]

    def check_integrity(self) -> None:
        """Checks that it is a tree, and that names and blocks are one to one.

        Raises:
            AssertionError: a rule is broken.
        """
        if {block: digest for digest, block in self._blocks.items()} != {
            block: digest for block, (digest, _) in self._entries.items()
        }:
            raise AssertionError("digests and blocks are not one to one")
        if lost := [b for b, (_, p) in self._entries.items() if p != -1 and p not in self._entries]:
            raise AssertionError(f"blocks whose parents are not in the index: {lost}")
