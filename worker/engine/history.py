"""Which tokens a sequence has seen, and how often it generated each: what penalties count."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from worker.engine.interface import EngineRequest

_FIRST_ROOM = 64
"""Different tokens for which there is room at first."""


class History:
    """A sequence's different tokens, kept up one by one: no step looks at the whole context.

    Args:
        prompt: ids that count as seen, not as generated.
        generated: ids that earlier owners of the sequence generated.
    """

    __slots__ = ("_counts", "_ids", "_places", "_size")

    def __init__(self, prompt: Iterable[int] = (), generated: Iterable[int] = ()) -> None:
        known = list(dict.fromkeys(prompt))
        self._places = {token: place for place, token in enumerate(known)}
        self._size = len(known)
        self._ids = np.zeros(max(_FIRST_ROOM, 2 * self._size), np.int32)
        self._ids[: self._size] = known
        self._counts = np.zeros(len(self._ids), np.float32)
        for token in generated:
            self.add(token)

    @classmethod
    def of(cls, request: EngineRequest) -> History | None:
        """The history of a new sequence, or None where no penalty counts anything."""
        sampling = request.sampling
        if not sampling.penalized:
            return None
        # The repetition penalty alone asks for the prompt.
        prompt = request.prompt if sampling.repetition_penalty != 1 else ()
        return cls(prompt, request.generated)

    def add(self, token: int) -> None:
        """Counts a token that was generated."""
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = self._size
            if place == len(self._ids):
                # By doubling, so that a token costs the same however many there are.
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token
            self._size += 1
        self._counts[place] += 1

    @property
    def ids(self) -> NDArray[np.int32]:
        """The different tokens, in no special order, contiguous: a view until the next `add`."""
        return self._ids[: self._size]

    @property
    def generated(self) -> NDArray[np.float32]:
        """How often each of `ids` was generated; 0 for those of the prompt alone. A view, too."""
        return self._counts[: self._size]
