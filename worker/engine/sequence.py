"""One sequence inside an engine: its tokens, what may be added, and when it ends."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from worker.engine.blocks import BLOCK_SIZE
from worker.engine.interface import EngineInfo, EngineRequest, Finish
from worker.engine.prefix import ROOT, digest_of

if TYPE_CHECKING:
    # It imports numpy, which the echo engine starts without.
    from worker.engine.history import History


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and how far it is.

    Attributes:
        request: as it was added.
        arrival: grows with every sequence of an engine; the younger gives way.
        tokens: prompt and generated ids.
        computed: leading tokens whose keys and values are in the cache.
        blocks: the cache's blocks that hold them, in order.
        seen: what its penalties count; None where it has none.
        found: leading tokens that were in the cache when it was last admitted.
        published: leading blocks that others may find.
        rank: smaller goes first: priority, then arrival.
    """

    request: EngineRequest
    arrival: int
    tokens: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    seen: History | None = None
    found: int = 0
    published: int = 0
    rank: tuple[int, int] = field(init=False)
    _digests: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Fixes the rank, which is looked at in every step."""
        self.rank = (self.request.priority, self.arrival)

    @classmethod
    def of(cls, request: EngineRequest, arrival: int, seen: History | None = None) -> Sequence:
        """The sequence of a new request; `generated` is read again as if it were prompt."""
        return cls(request, arrival, [*request.prompt, *request.generated], seen=seen)

    def append(self, token: int) -> None:
        """Adds a token that was generated."""
        self.tokens.append(token)
        if self.seen is not None:
            self.seen.add(token)

    @property
    def position(self) -> int:
        """Index of the next generated token, from 0: part of its random number's key."""
        return len(self.tokens) - len(self.request.prompt)

    def digest(self, place: int) -> bytes:
        """The name of the content of its block at this place, which its tokens fill."""
        known = self._digests
        while len(known) <= place:
            first = len(known) * BLOCK_SIZE
            ids = self.tokens[first : first + BLOCK_SIZE]
            known.append(digest_of(known[-1] if known else ROOT, ids))
        return known[place]

    def ended(self, info: EngineInfo) -> Finish | None:
        """Whether the tokens so far end the sequence: an end id, `max_tokens`, or the context."""
        sampling = self.request.sampling
        if self.position:
            last = self.tokens[-1]
            if last in sampling.stop_ids or (last in info.eos_ids and not sampling.ignore_eos):
                return "stop"
        if self.position >= sampling.max_tokens or len(self.tokens) >= info.context_length:
            return "length"
        return None


def check_request(request: EngineRequest, info: EngineInfo, known: Container[str]) -> None:
    """Refuses what an engine cannot serve.

    Args:
        request: about to be added.
        info: of the engine.
        known: rids that the engine has.

    Raises:
        ValueError: the rid is known, the prompt is empty, an id is out of the vocabulary, prompt +
            generated do not fit into the context, or the prompt leaves no room in it, or
            `max_tokens` is below 1.
    """
    if request.rid in known:
        raise ValueError(f"rid {request.rid!r} is already in the engine")
    if not request.prompt:
        raise ValueError("the prompt is empty")
    if request.sampling.max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {request.sampling.max_tokens}")
    for ids in (request.prompt, request.generated):
        if ids and not (min(ids) >= 0 and max(ids) < info.vocab_size):
            raise ValueError(f"a token id is outside the vocabulary of {info.vocab_size}")
    length = len(request.prompt) + len(request.generated)
    # With tokens that fill it, it has ended already.
    if max(length - 1, len(request.prompt)) >= info.context_length:
        raise ValueError(
            f"{length} tokens leave no room in the context of {info.context_length} tokens"
        )
