"""The echo engine: deterministic letters at a set pace, for tests, chaos and benchmarks.

Its tokens come from the seed alone: there are no logits for other sampling parameters to change.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Final

from shared.messages import WAITS
from worker.engine import EngineError, EngineOptions
from worker.engine.echo_tokenizer import VOCAB_SIZE, byte_files, byte_id
from worker.engine.interface import EngineInfo, EngineRequest, EngineStats, StepOutput
from worker.engine.randomness import random_bits
from worker.engine.sequence import Sequence, check_request

CONTEXT_LENGTH: Final = 32768


def echo_token(seed: int, choice: int, position: int) -> int:
    """The id that every echo engine generates here: a lowercase letter, or a space in 6 of 32.

    Args:
        seed: of the request.
        choice: index of the choice.
        position: index of the generated token, from 0.
    """
    draw = random_bits(seed, choice, position) >> 59
    return byte_id(ord("a") + draw if draw < 26 else ord(" "))


class EchoEngine:
    """An engine without a model. A step takes `echo_step_ms` and gives each sequence one token."""

    def __init__(self, options: EngineOptions, *, context_length: int = CONTEXT_LENGTH) -> None:
        """Makes an engine.

        Args:
            options: `max_batch_size`, `echo_step_ms` and `lease_ms` count.
            context_length: in tokens.

        Raises:
            EngineError: a step would take too much of the lease.
        """
        if 0 < options.lease_ms <= 2 * options.echo_step_ms:
            raise EngineError(
                f"a step of RTS_ECHO_STEP_MS={options.echo_step_ms:g} is too long: it must be "
                f"below half of RTS_LEASE_MS={options.lease_ms}"
            )
        self.files = byte_files("echo", context_length)
        self.info = EngineInfo(
            name="echo",
            max_batch_size=options.max_batch_size,
            context_length=context_length,
            vocab_size=VOCAB_SIZE,
            eos_ids=frozenset(self.files.eos_ids),
        )
        self._step_s = options.echo_step_ms / 1000
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0
        self._stats = EngineStats()

    def warm_up(self) -> None:
        """Nothing is compiled."""

    def room(self) -> int:
        """Free places of the batch."""
        return max(0, self.info.max_batch_size - len(self._sequences))

    def add(self, request: EngineRequest) -> None:
        """Admits a sequence; beyond the batch size it waits for a place.

        Raises:
            ValueError: see `check_request`.
        """
        check_request(request, self.info, self._sequences)
        self._sequences[request.rid] = Sequence.of(request, self._arrivals)
        self._arrivals += 1

    def abort(self, rid: str) -> None:
        """Drops a sequence, if it is there."""
        self._sequences.pop(rid, None)

    def step(self) -> list[StepOutput]:
        """Gives the next token to each of the first `max_batch_size` sequences."""
        if not self._sequences:
            return []
        if self._step_s:
            time.sleep(self._step_s)
        ranked = sorted(self._sequences.values(), key=lambda s: s.rank)
        most = self.info.max_batch_size
        self._stats.steps += 1
        waiting = [StepOutput(sequence.request.rid, [], WAITS) for sequence in ranked[most:]]
        return [self._advance(sequence) for sequence in ranked[:most]] + waiting

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        count, most = len(self._sequences), self.info.max_batch_size
        running = min(count, most)
        return replace(
            self._stats, running=running, waiting=count - running, kv_usage=running / most
        )

    def close(self) -> None:
        """Drops the sequences."""
        self._sequences.clear()

    def _advance(self, sequence: Sequence) -> StepOutput:
        output = StepOutput(sequence.request.rid, [])
        if sequence.computed == 0:
            self._stats.prompt_tokens += len(sequence.tokens)
        output.finish = sequence.ended(self.info)
        if output.finish is None:
            request = sequence.request
            token = echo_token(request.sampling.seed, request.choice, sequence.position)
            sequence.computed = len(sequence.tokens)
            sequence.append(token)
            output.tokens.append(token)
            output.prefilled = sequence.computed
            output.finish = sequence.ended(self.info)
            self._stats.generated_tokens += 1
        if output.finish is not None:
            del self._sequences[output.rid]
        return output
