"""The torch engine: scheduler, backend and sampler put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Final

import torch

from worker.engine import EngineOptions
from worker.engine.backend import Backend, Batch
from worker.engine.blocks import BLOCK_SIZE, BlockPool, blocks_for
from worker.engine.interface import (
    EngineInfo,
    EngineRequest,
    EngineStats,
    SamplingParams,
    StepOutput,
)
from worker.engine.loader import LoadedModel, load
from worker.engine.reference import ReferenceBackend
from worker.engine.sampler import FAILED, Draw, sample
from worker.engine.scheduler import Scheduler, Work
from worker.engine.sequence import Sequence, check_request

_STEP_ROWS: Final = 256
"""Rows of a step: fewer waste the weights that every step reads, more make the others wait."""

_AUTO_CACHE_BYTES: Final = 2 << 30


class TorchEngine:
    """A transformers model that serves many sequences at once."""

    def __init__(
        self,
        options: EngineOptions,
        *,
        loaded: LoadedModel | None = None,
        blocks: int = 0,
        step_rows: int = _STEP_ROWS,
    ) -> None:
        """Loads the model and allocates the KV cache.

        Args:
            options: of the engine.
            loaded: the model, if it is in memory already; it is taken over.
            blocks: of the KV cache, in place of `options.kv_cache_mb`; 0 for not.
            step_rows: most rows of a step.

        Raises:
            worker.engine.loader.ModelLoadError: no such model, or it cannot be computed rightly.
        """
        if options.threads:
            torch.set_num_threads(options.threads)
        if loaded is None:
            loaded = load(options.source, options.dtype, options.data_dir, options.progress)
        files = loaded.files
        most = blocks_for(files.context_length) * options.max_batch_size
        self._backend: Backend = ReferenceBackend(
            loaded.model,
            torch.device("cuda:0" if torch.cuda.is_available() else "cpu"),
            _cache_size(blocks, options.kv_cache_mb, most, blocks_for(files.context_length)),
        )
        context_length = min(files.context_length, self._backend.block_count * BLOCK_SIZE)
        self.files = replace(
            files, context_length=context_length, vocab_size=self._backend.vocab_size
        )
        self.info = EngineInfo(
            name="torch",
            max_batch_size=options.max_batch_size,
            context_length=context_length,
            vocab_size=self._backend.vocab_size,
            eos_ids=frozenset(files.eos_ids),
            device=self._backend.device,
            dtype=self._backend.dtype,
        )
        # A full batch that generates must leave room in the step for prompts.
        rows = max(step_rows, options.max_batch_size + step_rows // 2)
        self._scheduler = Scheduler(
            BlockPool(self._backend.block_count), options.max_batch_size, rows
        )
        self._progress = options.progress
        self._arrivals = 0
        self._ended: dict[str, StepOutput] = {}
        self._stats = EngineStats()

    def warm_up(self) -> None:
        """Runs a full step of a prompt, then every batch size by powers of two."""
        length = min(self._scheduler.budget, self.info.context_length - 4)
        self._rehearse(1, [0] * length)
        size = 2
        while size <= self.info.max_batch_size:
            self._progress("warming up", size / (2 * self.info.max_batch_size))
            self._rehearse(size, [0])
            size *= 2
        self._progress("warming up", 1.0)
        self._stats = EngineStats()
        self._scheduler.preemptions = 0

    def room(self) -> int:
        """How many more sequences would start soon, by places of the batch and by blocks."""
        return self._scheduler.room()

    def add(self, request: EngineRequest) -> None:
        """Admits a sequence; it joins at the next step, or waits for a place and for memory.

        Raises:
            ValueError: see `check_request`.
        """
        known = self._ended if request.rid in self._ended else self._scheduler
        check_request(request, self.info, known)
        sequence = Sequence.of(request, self._arrivals)
        self._arrivals += 1
        if finish := sequence.ended(self.info):
            # An earlier owner generated all of it, and was gone before it could say so.
            self._ended[request.rid] = StepOutput(request.rid, [], len(sequence.tokens), finish)
        else:
            self._scheduler.add(sequence)

    def abort(self, rid: str) -> None:
        """Drops a sequence, if it is there."""
        self._scheduler.remove(rid)
        self._ended.pop(rid, None)

    def step(self) -> list[StepOutput]:
        """Runs one iteration.

        A sequence that cannot be computed although others can ends with an error.

        Raises:
            Exception: nothing can be computed; the engine is of no more use.
        """
        outputs = list(self._ended.values())
        self._ended.clear()
        works = self._scheduler.schedule()
        if not works:
            return outputs
        self._stats.steps += 1
        # Sequences of about the same length, side by side, cost the attention least.
        works.sort(key=lambda work: (work.count > 1, work.first))
        try:
            results = self._run(works)
        except Exception as error:
            results = self._run_apart(works, error)
        return outputs + [
            self._advance(work, result) for work, result in zip(works, results, strict=True)
        ]

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        scheduler = self._scheduler
        return replace(
            self._stats,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_usage=1 - scheduler.pool.free / scheduler.pool.count,
            preemptions=scheduler.preemptions,
        )

    def close(self) -> None:
        """Frees the model and its cache."""
        for rid in [*self._scheduler.running, *self._scheduler.waiting]:
            self._scheduler.remove(rid)
        self._backend.close()

    def check_integrity(self) -> None:
        """Checks the scheduler; for tests.

        Raises:
            AssertionError: a rule is broken.
        """
        self._scheduler.check_integrity()

    def _rehearse(self, count: int, prompt: list[int]) -> None:
        """Runs a few sequences to their end."""
        sampling = SamplingParams(max_tokens=3, top_p=0.9, ignore_eos=True)
        for i in range(count):
            self.add(EngineRequest(f"warm-up {i}", prompt, sampling))
        while self._scheduler.running or self._scheduler.waiting:
            self.step()

    def _run(self, works: list[Work]) -> list[int | str | None]:
        """What becomes of each work: a token, None while the prompt is being read, an error."""
        logits = self._backend.step(_batch(works))
        sampling = [work for work in works if work.samples]
        draws = [
            Draw(
                work.sequence.request.sampling, work.sequence.request.choice, work.sequence.position
            )
            for work in sampling
        ]
        tokens = iter(sample(logits, draws) if draws else [])
        return [_result(next(tokens)) if work.samples else None for work in works]

    def _run_apart(self, works: list[Work], error: Exception) -> list[int | str | None]:
        """Each work alone, after a step failed, to tell whose fault it was."""
        results: list[int | str | None] = []
        for work in works:
            try:
                results += self._run([work])
            except Exception as own:
                results.append(f"the model failed: {type(own).__name__}: {own}")
        if all(isinstance(result, str) for result in results) and not self._to_blame(works):
            raise error
        return results

    def _to_blame(self, works: list[Work]) -> bool:
        """Whether a step that failed was of one sequence, and the model works without it."""
        if len(works) > 1:
            return False
        zero = torch.zeros(1, dtype=torch.int64)
        block = torch.tensor([works[0].sequence.blocks[:1]])
        try:
            self._backend.step(Batch(zero, zero, zero, block, zero))
        except Exception:
            return False
        return True

    def _advance(self, work: Work, result: int | str | None) -> StepOutput:
        sequence = work.sequence
        known = len(sequence.tokens)
        sequence.computed = work.first + work.count
        if work.first < len(sequence.request.prompt):
            self._stats.prompt_tokens += (
                min(sequence.computed, len(sequence.request.prompt)) - work.first
            )
        output = StepOutput(sequence.request.rid, [], min(sequence.computed, known))
        if isinstance(result, str):
            output.finish, output.error = "error", result
            self._backend.clear(sequence.blocks)
        elif result is not None:
            sequence.tokens.append(result)
            output.tokens.append(result)
            output.finish = sequence.ended(self.info)
            self._stats.generated_tokens += 1
        if output.finish is not None:
            self._scheduler.remove(output.rid)
        return output


def _result(token: int) -> int | str:
    return token if token != FAILED else "the model's output is not a number"


def _batch(works: list[Work]) -> Batch:
    """The works' rows, one after the other."""
    counts = torch.tensor([work.count for work in works])
    rows = chain.from_iterable(
        work.sequence.tokens[work.first : work.first + work.count] for work in works
    )
    positions = chain.from_iterable(range(work.first, work.first + work.count) for work in works)
    width = max(len(work.sequence.blocks) for work in works)
    table = [work.sequence.blocks + [-1] * (width - len(work.sequence.blocks)) for work in works]
    last = counts.cumsum(0) - 1
    return Batch(
        ids=torch.tensor(list(rows)),
        positions=torch.tensor(list(positions)),
        sequences=torch.arange(len(works)).repeat_interleave(counts),
        block_table=torch.tensor(table),
        out_rows=last[torch.tensor([work.samples for work in works])],
    )


def _cache_size(blocks: int, megabytes: int, most: int, context: int) -> Callable[[int], int]:
    """How many blocks the cache gets, from the bytes of one.

    Args:
        blocks: if it is set.
        megabytes: if it is set.
        most: blocks of a full batch of full contexts, more are of no use.
        context: blocks of one context.
    """

    def size(block_bytes: int) -> int:
        if blocks:
            return blocks
        if megabytes:
            return min(most, (megabytes << 20) // block_bytes)
        # Enough for one whole context in any case; memory is only taken once it is written.
        return min(most, max(context, _AUTO_CACHE_BYTES // block_bytes))

    return size
