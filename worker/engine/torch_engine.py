"""The torch engine: scheduler, backend and sampler put together."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Final

import numpy as np
import torch

from shared.messages import WAITS
from worker.engine import EngineError, EngineOptions, ModelFiles
from worker.engine.backend import Backend, Batch
from worker.engine.backends import OtherDtype, make_backend, open_model
from worker.engine.blocks import BLOCK_SIZE, BlockPool, blocks_for
from worker.engine.history import History
from worker.engine.interface import (
    EngineInfo,
    EngineRequest,
    EngineStats,
    SamplingParams,
    StepOutput,
)
from worker.engine.load_check import LEAST_BLOCKS
from worker.engine.loader import LoadedModel, dtype_for
from worker.engine.memory import free_bytes
from worker.engine.sampler import FAILED, Draw
from worker.engine.scheduler import Scheduler, Work
from worker.engine.sequence import Sequence, check_request

_STEP_ROWS: Final = 192
"""Rows of a step: fewer waste the weights that every step reads, more make the others wait."""

_LEAST_PIECE: Final = 16
"""Rows of prompts in a step at least: with fewer, a long prompt would take forever."""

_AUTO_CACHE_BYTES: Final = (512 << 20, 4 << 30)
"""On a CPU: as much as the weights, within these bounds, if one context does not need more and the
memory is free."""

_AUTO_CACHE_SHARE: Final = {"cpu": 0.3, "cuda": 0.7}
"""Of the free memory. A GPU has nobody else; what is left is for what a step needs."""

log = logging.getLogger(__name__)


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
            EngineError: no such model, it cannot be computed rightly, or there is no memory for it.
        """
        if options.threads:
            torch.set_num_threads(options.threads)
        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        # Before anything is loaded: a start that knows the model loads less, and the context, which
        # is part of the version, must not depend on that.
        free = free_bytes()
        opened = None
        try:
            opened = _opened(options, device, free, loaded, blocks, step_rows)
        except OtherDtype as why:
            log.warning(
                f"the native CPU backend cannot be used: {why}; torch computes the model in "
                f"{dtype_for(options.dtype)} here, which is another version of it"
            )
        # Not in the handler, which holds what was loaded.
        if opened is None:
            options = replace(options, backend="reference")
            opened = _opened(options, device, free, None, blocks, step_rows)
        files, self._backend, rows = opened
        context_length = min(files.context_length, self._backend.block_count * BLOCK_SIZE)
        log.info(
            "KV cache",
            extra={"tokens": self._backend.block_count * BLOCK_SIZE, "context": context_length},
        )
        if context_length < files.context_length:
            log.warning(
                f"the KV cache shortens the context of the model, {files.context_length} tokens, "
                f"to {context_length}; RTS_KV_CACHE_MB sets its size"
            )
        identity = f"{files.version} {self._backend.dtype} {context_length}"
        self.files = replace(
            files,
            version=hashlib.sha256(identity.encode()).hexdigest()[:8],
            context_length=context_length,
            vocab_size=self._backend.vocab_size,
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
        self._scheduler = Scheduler(
            BlockPool(self._backend.block_count, caching=options.prefix_cache),
            options.max_batch_size,
            rows,
        )
        self._lease_s = options.lease_ms / 1000
        self._progress = options.progress
        self._arrivals = 0
        self._ended: dict[str, StepOutput] = {}
        self._stats = EngineStats()

    def warm_up(self) -> None:
        """Fits the steps to the lease, runs a prompt, then every batch size by powers of two.

        Raises:
            EngineError: a full batch is too slow for the lease, or too large for the memory.
        """
        try:
            self._progress("warming up", 0.0)
            if self._lease_s:
                self._fit_steps()
            self._rehearse_all()
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise EngineError(
                f"the memory of {self.info.device} does not hold a full step; a smaller "
                f"RTS_KV_CACHE_MB or RTS_MAX_BATCH_SIZE may help ({_first_line(error)})"
            ) from error
        self._progress("warming up", 1.0)
        self._stats = EngineStats()
        self._scheduler.forget_counts()
        self._scheduler.pool.forget_all()

    def _fit_steps(self) -> None:
        """Chooses how many rows a step has at most, so that none comes near the lease.

        From few to many: on a slow machine a step of many rows would take minutes.
        """
        batch, limit_s = self.info.max_batch_size, self._lease_s / 4
        least = self._works(0, BLOCK_SIZE)
        took = self._measured(least, limit_s)
        if took > self._lease_s / 2:
            told = (
                f"one token for each sequence of a full batch takes {took * 1000:.0f} ms, more "
                f"than half of the lease: raise RTS_LEASE_MS={self._lease_s * 1000:.0f} or lower "
                f"RTS_MAX_BATCH_SIZE={batch}"
            )
            if self._undisturbed(least, took) > self._lease_s / 2:
                raise EngineError(told)
            log.warning(f"this machine is busy: {told}")
        most = self._scheduler.budget - batch
        piece = min(_LEAST_PIECE, most)
        row_s = 0.0
        if took <= limit_s:
            took = self._measured(self._works(piece, self.info.context_length), limit_s)
        while piece < most and took <= limit_s:
            self._progress("warming up", 0.5 * piece / most)
            wider = min(4 * piece, most)
            # What narrower ones let expect is believed at once; within bounds, or one that was held
            # up would speak for all.
            expected = min(took + row_s * (wider - piece), 2 * limit_s)
            works = self._works(wider, self.info.context_length)
            longer = self._measured(works, max(limit_s, expected))
            row_s = (longer - took) / (wider - piece)
            if longer > limit_s:
                piece += int((limit_s - took) / row_s)
                break
            piece, took = wider, longer
        self._scheduler.budget = batch + piece
        log.info("step", extra={"rows": batch + piece, "took_ms": round(took * 1000)})

    def _works(self, piece: int, context: int) -> list[Work]:
        """A full batch that generates, and `piece` rows more at the end of a long prompt."""
        request = EngineRequest("", [0], SamplingParams(2, top_p=0.9))
        # Not taken from the pool: nothing of value is in the cache yet. Few, because the first
        # use of memory takes time.
        pool = min(64, self._scheduler.pool.count)
        works = []
        for i in range(self.info.max_batch_size):
            last = i == self.info.max_batch_size - 1
            tokens = min(context if last else BLOCK_SIZE, self.info.context_length)
            blocks = [(i + j) % pool for j in range(blocks_for(tokens))]
            count = min(piece + 1, tokens) if last else 1
            works.append(Work(Sequence(request, i, [0] * tokens, 0, blocks), tokens - count, count))
        return works

    def _measured(self, works: list[Work], credible_s: float) -> float:
        """Seconds of a step; the best of three while above what is credible.

        Other processes, and the first use of anything, make some slow.
        """
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            self._run(works)
            best = min(best, time.perf_counter() - began)
            if best <= credible_s:
                break
        return best

    def _undisturbed(self, works: list[Work], took: float) -> float:
        """Seconds of a step that took so long, if no other process needed the processor.

        Threads that wait for each other on a busy machine take many times as long, and even their
        processor time grows; that of one thread does not.
        """
        if self.info.device != "cpu":
            return took
        self._backend.alone(True)
        try:
            began = time.thread_time()
            self._run(works)
            return (time.thread_time() - began) / self._backend.threads
        finally:
            self._backend.alone(False)

    def _rehearse_all(self) -> None:
        """Runs a prompt of a full step, then every batch size by powers of two."""
        length = min(self._scheduler.budget, self.info.context_length - 4)
        self._rehearse(1, [0] * length)
        size = 2
        while size <= self.info.max_batch_size:
            self._progress("warming up", 0.5 + size / (4 * self.info.max_batch_size))
            self._rehearse(size, [0])
            size *= 2

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
        sequence = Sequence.of(request, self._arrivals, History.of(request))
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
        # Whoever watches a stream must not take this for an engine that has forgotten it.
        outputs += [StepOutput(rid, [], WAITS) for rid in self._scheduler.waiting]
        if not works:
            return outputs
        self._stats.steps += 1
        # Sequences of about the same length, side by side, cost the attention least.
        works.sort(key=lambda work: (work.count > 1, work.first))
        began = time.perf_counter()
        try:
            results = self._run(works)
        except Exception as error:
            results = self._run_apart(works, error)
        else:
            single = sum(work.count == 1 for work in works)
            rows = sum(work.count for work in works) - single
            self._scheduler.pace.observe(single, rows, time.perf_counter() - began)
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
            prefix_queries=scheduler.queried,
            prefix_hits=scheduler.hits,
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
        sampling = [work for work in works if work.samples]
        draws = [
            Draw(
                work.sequence.request.sampling,
                work.sequence.request.choice,
                work.sequence.position,
                work.sequence.seen,
            )
            for work in sampling
        ]
        tokens = iter(self._backend.sample(_batch(works), draws))
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
        # Its last block: what it may share with others, as their beginning, is before it.
        block = torch.tensor([works[0].sequence.blocks[-1:]])
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
            self._backend.clear(self._scheduler.pool.forget(sequence.blocks))
        elif result is not None:
            self._scheduler.publish(sequence)
            sequence.append(result)
            output.tokens.append(result)
            output.finish = sequence.ended(self.info)
            self._stats.generated_tokens += 1
        if output.finish is not None:
            self._scheduler.remove(output.rid)
        return output


def _opened(
    options: EngineOptions,
    device: torch.device,
    free: int,
    loaded: LoadedModel | None,
    blocks: int,
    step_rows: int,
) -> tuple[ModelFiles, Backend, int]:
    """What is published of the model, what computes it, and the most rows of a step.

    `free` is the memory before anything was loaded, in bytes.

    Raises:
        EngineError, OtherDtype: see `make_backend`, `open_model`; or there is no memory for it.
    """
    model = loaded or open_model(options, device)
    files, weights = model.files, model.weights_bytes
    free -= 0 if loaded else weights
    if blocks:
        size: Callable[[int], int] = lambda block_bytes: blocks  # noqa: E731
    else:
        context = blocks_for(files.context_length)
        most = context * options.max_batch_size
        size = _cache_size(options.kv_cache_mb, most, context, weights, device, free)
    # A full batch that generates must leave room in the step for prompts.
    rows = max(step_rows, options.max_batch_size + step_rows // 2)
    try:
        return files, make_backend(model, options, size, device=device, rows=rows), rows
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise EngineError(
            f"the memory of {device} does not hold the model and its KV cache; a smaller "
            f"RTS_KV_CACHE_MB may help ({_first_line(error)})"
        ) from error


def _result(token: int) -> int | str:
    return token if token != FAILED else "the model's output is not a number"


def _batch(works: list[Work]) -> Batch:
    """The works' rows, one after the other."""
    counts = np.array([work.count for work in works])
    rows = chain.from_iterable(
        work.sequence.tokens[work.first : work.first + work.count] for work in works
    )
    positions = chain.from_iterable(range(work.first, work.first + work.count) for work in works)
    table = np.full((len(works), max(len(work.sequence.blocks) for work in works)), -1)
    for line, work in zip(table, works, strict=True):
        line[: len(work.sequence.blocks)] = work.sequence.blocks
    samples = np.array([work.samples for work in works])
    # By numpy: small operations of torch take several times as long.
    return Batch(
        ids=torch.from_numpy(np.fromiter(rows, np.int64)),
        positions=torch.from_numpy(np.fromiter(positions, np.int64)),
        sequences=torch.from_numpy(np.repeat(np.arange(len(works)), counts)),
        block_table=torch.from_numpy(table),
        out_rows=torch.from_numpy((counts.cumsum() - 1)[samples]),
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _cache_size(
    megabytes: int, most: int, context: int, weights: int, device: torch.device, free: int
) -> Callable[[int], int]:
    """How many blocks the cache gets, from the bytes of one.

    Args:
        megabytes: if it is set.
        most: blocks of a full batch of full contexts, more are of no use.
        context: blocks of one context.
        weights: bytes of the model.
        device: where it will be.
        free: bytes of memory that are left beside the model, if that is a CPU.
    """

    def size(block_bytes: int) -> int:
        """Raises EngineError if it would be too small to serve from."""
        on_cpu = device.type == "cpu"
        left = max(0, free) if on_cpu else torch.cuda.mem_get_info(device)[0]
        why = f"RTS_KV_CACHE_MB={megabytes}"
        count = (megabytes << 20) // block_bytes
        if not megabytes:
            share = _AUTO_CACHE_SHARE[device.type]
            why = f"{share:.0%} of the {left >> 20} MiB of free memory"
            count = int(left * share) // block_bytes
            if on_cpu:
                low, high = _AUTO_CACHE_BYTES
                usual = min(max(low, weights), high)
                count = min(count, max(context, usual // block_bytes))
        if count < LEAST_BLOCKS:
            least, whole = (-(-n * block_bytes // (1 << 20)) for n in (LEAST_BLOCKS, context))
            raise EngineError(
                f"{why} is too small for this model's KV cache: RTS_KV_CACHE_MB must be at "
                f"least {least}, and {whole} for its whole context"
            )
        count = min(most, count)
        if count * block_bytes > left:
            log.warning(f"{why} is more than the {left >> 20} MiB of free memory")
        return count

    return size
