"""The vllm engine: vLLM's continuous batching behind our interface, for those who have it.

A thin adapter: ids in, ids out. What vLLM cannot do as the interface would have it:

- Sampling repeats by (seed, choice, position) as everywhere, but the random numbers are vLLM's: a
  stream that another engine began goes on with other draws, so the engines are different versions
  of a model. And vLLM's kernels are not batch-invariant: in bfloat16 a continuation after a
  worker's death may differ from an unbroken run after some tokens, greedy or not.
- What another engine generated is a prompt to vLLM: its presence and frequency penalties count
  from there on.
- Priorities are vLLM's: they decide who starts, and who is preempted when its cache is full; a high
  one does not preempt a running low one to get its place in the batch.
- A step fails as a whole: there is no telling whose fault it was, so the engine ends.
- Output that is not a number is not noticed; the tokens are then arbitrary.
- Counters of rows count each prompt once, whatever preemption or vLLM's prefix cache did.

On a CPU vLLM computes in a process of its own, which ends with this one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from vllm import EngineArgs, SamplingParams
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor

from shared.messages import WAITS
from worker.engine import EngineError, EngineOptions, ModelFiles
from worker.engine import interface as ours
from worker.engine.interface import EngineInfo, EngineRequest, EngineStats, StepOutput
from worker.engine.loader import describe, dtype_for, locate
from worker.engine.randomness import random_bits
from worker.engine.sequence import Sequence, check_request

_CPU_STEP_ROWS: Final = 512
"""Most rows of a step on a CPU: vLLM's own choice takes seconds there, and leases are shorter."""

_CPU_CACHE_MB: Final = 2048
"""Of the KV cache on a CPU, where vLLM would take almost all of the memory."""

_GREEDY: Final = 1e-5
"""Temperatures below it are greedy, here as in vLLM."""

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Entry:
    """A sequence, and what vLLM calls it."""

    sequence: Sequence
    name: str
    preemptions: int = field(default=0)


class VllmEngine:
    """A model served by vLLM in this thread."""

    def __init__(self, options: EngineOptions, *, llm: LLMEngine | None = None) -> None:
        """Loads the model.

        Args:
            options: of the engine; `threads` counts on a CPU only.
            llm: vLLM with the model in memory already and without sequences; it is taken over.

        Raises:
            EngineError: no such model, or vLLM cannot serve it; says why.
        """
        folder = locate(options.source, options.data_dir, options.progress)
        files = describe(folder)
        options.progress("loading weights", 0.0)
        self._llm: Any = llm or load(folder, options)
        options.progress("loading weights", 1.0)
        config = self._llm.vllm_config
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        self.files = _published(files, dtype, int(config.model_config.max_model_len))
        self.info = EngineInfo(
            name="vllm",
            max_batch_size=options.max_batch_size,
            context_length=self.files.context_length,
            vocab_size=self.files.vocab_size,
            eos_ids=frozenset(self.files.eos_ids),
            device="cpu" if current_platform.is_cpu() else f"{current_platform.device_type}:0",
            dtype=dtype,
        )
        self._step_rows = int(config.scheduler_config.max_num_batched_tokens)
        self._lease_s = options.lease_ms / 1000
        self._progress = options.progress
        self._entries: dict[str, _Entry] = {}
        self._ended: dict[str, StepOutput] = {}
        self._arrivals = 0
        self._stats = EngineStats()

    def warm_up(self) -> None:
        """Runs a full step and a full batch, twice: what compiles does so the first time.

        Raises:
            EngineError: a step takes longer than half of the lease.
        """
        took = 0.0
        for share in (0.0, 0.5):
            self._progress("warming up", share)
            took = self._rehearse()
        if 0 < self._lease_s < 2 * took:
            raise EngineError(
                f"a step of vLLM takes {took * 1000:.0f} ms, more than half of the lease: raise "
                f"RTS_LEASE_MS={self._lease_s * 1000:.0f} or lower RTS_MAX_BATCH_SIZE"
            )
        self._llm.reset_prefix_cache()
        self._progress("warming up", 1.0)
        self._stats = EngineStats()

    def room(self) -> int:
        """How many more sequences, of the size of those here, would start soon."""
        count = len(self._entries)
        free = self.info.max_batch_size - count
        used = self._kv_usage()
        if used:
            running = max(1, len(self._running()))
            free = min(free, int((1 - used) / (used / running)) - (count - running))
        return max(0, free)

    def add(self, request: EngineRequest) -> None:
        """Admits a sequence; it joins at the next step, or waits for a place and for memory.

        Raises:
            ValueError: see `check_request`.
        """
        check_request(
            request, self.info, self._ended if request.rid in self._ended else self._entries
        )
        sequence = Sequence.of(request, self._arrivals)
        self._arrivals += 1
        if finish := sequence.ended(self.info):
            # An earlier owner generated all of it, and was gone before it could say so.
            self._ended[request.rid] = StepOutput(request.rid, [], len(sequence.tokens), finish)
            return
        name = self._llm.add_request(
            request.rid,
            {"prompt_token_ids": sequence.tokens.copy()},
            _sampling(sequence, self.info),
            priority=request.priority,
        )
        self._entries[request.rid] = _Entry(sequence, name)

    def abort(self, rid: str) -> None:
        """Drops a sequence, if it is there."""
        self._ended.pop(rid, None)
        if self._entries.pop(rid, None):
            self._llm.abort_request([rid])

    def step(self) -> list[StepOutput]:
        """Runs one iteration.

        Raises:
            Exception: vLLM failed; the engine is of no more use.
        """
        outputs = list(self._ended.values())
        self._ended.clear()
        if not self._entries:
            return outputs
        self._seed()
        told = {output.request_id: output for output in self._llm.step()}
        self._stats.steps += 1
        outputs += [self._advance(rid, output) for rid, output in told.items()]
        running = self._running()
        for rid, entry in self._entries.items():
            request = running.get(entry.name)
            if request is not None:
                self._stats.preemptions += request.num_preemptions - entry.preemptions
                entry.preemptions = request.num_preemptions
            if rid in told:
                continue
            if request is not None:
                # A long prompt is read in pieces: without a word it would be taken for hung.
                outputs.append(StepOutput(rid, [], request.num_computed_tokens))
            elif entry.name in self._scheduler.requests:
                # But not what vLLM knows no more: that is idle, whatever we think.
                outputs.append(StepOutput(rid, [], WAITS))
        return outputs

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        running = len(self._running())
        return replace(
            self._stats,
            running=running,
            waiting=len(self._entries) - running,
            kv_usage=self._kv_usage(),
        )

    def close(self) -> None:
        """Frees the model and its cache."""
        self.release()
        self._llm.engine_core.shutdown()

    def release(self) -> LLMEngine:
        """Drops all sequences and hands vLLM over, for another engine with the same model."""
        for rid in list(self._entries):
            self.abort(rid)
        return self._llm

    def _advance(self, rid: str, output: Any) -> StepOutput:
        """Takes the new tokens of one sequence."""
        sequence = self._entries[rid].sequence
        [completion] = output.outputs
        tokens = list(completion.token_ids)
        if sequence.computed == 0:
            self._stats.prompt_tokens += len(sequence.tokens)
        sequence.computed = len(sequence.tokens) + max(0, len(tokens) - 1)
        sequence.tokens += tokens
        self._stats.generated_tokens += len(tokens)
        told = StepOutput(rid, tokens, sequence.computed, sequence.ended(self.info))
        if told.finish is None and output.finished:
            told.finish = "error"
            told.error = f"vLLM ended the sequence early: {completion.finish_reason}"
        if told.finish is not None:
            del self._entries[rid]
            if not output.finished:
                self._llm.abort_request([rid])
        return told

    def _seed(self) -> None:
        """Makes the next draws a function of (seed, choice, position), as the interface has it."""
        seeds = {
            entry.name: _bits(entry.sequence)
            for entry in self._entries.values()
            if entry.sequence.request.sampling.temperature >= _GREEDY
        }
        if seeds:
            self._llm.collective_rpc(reseed, args=(seeds,))

    def _running(self) -> dict[str, Any]:
        """Requests of vLLM that have a place in the batch, by its names for them."""
        return {request.request_id: request for request in self._scheduler.running}

    @property
    def _scheduler(self) -> Any:
        return self._llm.engine_core.engine_core.scheduler

    def _kv_usage(self) -> float:
        return float(self._scheduler.kv_cache_manager.usage)

    def _rehearse(self) -> float:
        """Runs a prompt of a full step, then a full batch; seconds of the slowest step."""
        longest = 0.0
        sampling = ours.SamplingParams(max_tokens=3, top_p=0.9, ignore_eos=True)
        length = min(self._step_rows, self.info.context_length - 4)
        for prompts in ([length], [1] * self.info.max_batch_size):
            for i, tokens in enumerate(prompts):
                self.add(EngineRequest(f"warm-up {i}", [0] * tokens, sampling))
            while self._entries:
                began = time.perf_counter()
                self.step()
                longest = max(longest, time.perf_counter() - began)
        return longest


def load(folder: Path, options: EngineOptions, *, eager: bool = False) -> LLMEngine:
    """Starts vLLM with the model in a folder.

    Args:
        folder: of the model.
        options: of the engine.
        eager: do not compile; it starts faster and computes slower.

    Raises:
        EngineError: vLLM cannot serve it; says why.
    """
    more: dict[str, Any] = {}
    if current_platform.is_cpu():
        more["max_num_batched_tokens"] = max(_CPU_STEP_ROWS, 2 * options.max_batch_size)
        if options.threads:
            # Where vLLM reads it; a setting of the person who starts us goes first.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", _first_cores(options.threads))
    megabytes = options.kv_cache_mb
    # vLLM has an environment variable for it, too.
    if not megabytes and current_platform.is_cpu() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        megabytes = _CPU_CACHE_MB
    if megabytes:
        more["kv_cache_memory_bytes"] = megabytes << 20
    try:
        config = EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype=dtype_for(options.dtype),
            # As long as the cache holds.
            max_model_len=-1,
            max_num_seqs=options.max_batch_size,
            scheduling_policy="priority",
            # A step's tokens come with that step: an abort then frees at once.
            async_scheduling=False,
            enforce_eager=eager,
            disable_log_stats=True,
            **more,
        ).create_engine_config()
        # In this process, whatever VLLM_ENABLE_V1_MULTIPROCESSING says: `step` is one step.
        llm = LLMEngine(
            vllm_config=config,
            executor_class=Executor.get_class(config),
            log_stats=False,
            multiprocess_mode=False,
        )
        if current_platform.is_cpu():
            llm.collective_rpc(mend_generators)
        return llm
    except (ValueError, RuntimeError, OSError, MemoryError, NotImplementedError) as error:
        log.debug("vLLM failed", exc_info=error)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EngineError(f"vLLM cannot serve {options.source}: {reason}") from error


def mend_generators(worker: Any) -> None:
    """Gives the generators of vLLM's process on a CPU the offset that it moves.

    After a piece of a prompt it takes the draw back by moving the offset, which only generators of
    GPUs have: a seeded request with a long prompt ended the engine (0.32). As each step is seeded
    anew, there is nothing to take back.
    """
    import torch

    class Generator(torch.Generator):
        def get_offset(self) -> int:
            return 0

        def set_offset(self, offset: int) -> torch.Generator:
            return self

    torch.Generator = Generator  # type: ignore[misc]


def reseed(worker: Any, seeds: dict[str, int]) -> None:
    """Seeds the generators of sequences; vLLM calls it where the model is computed.

    A sequence that joins with this step has none yet: its parameters say its first seed.
    """
    requests = getattr(worker.model_runner, "requests", {})
    for name in seeds.keys() & requests.keys():
        generator = requests[name].generator
        if generator is not None:
            generator.manual_seed(seeds[name])


def _published(files: ModelFiles, dtype: str, context_length: int) -> ModelFiles:
    identity = f"vllm {files.version} {dtype} {context_length}"
    return replace(
        files,
        version=hashlib.sha256(identity.encode()).hexdigest()[:8],
        context_length=context_length,
    )


def _sampling(sequence: Sequence, info: EngineInfo) -> SamplingParams:
    sampling = sequence.request.sampling
    stops = sampling.stop_ids | (frozenset() if sampling.ignore_eos else info.eos_ids)
    return SamplingParams(
        max_tokens=min(
            sampling.max_tokens - sequence.position, info.context_length - len(sequence.tokens)
        ),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=_bits(sequence) if sampling.temperature >= _GREEDY else None,
        stop_token_ids=sorted(stops),
        # Its end ids are among the stops: vLLM's own idea of them comes from its tokenizer.
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _bits(sequence: Sequence) -> int:
    """63 random bits for the next token of a sequence."""
    request = sequence.request
    return random_bits(request.sampling.seed, request.choice, sequence.position) >> 1


def _first_cores(count: int) -> str:
    """The first cores that this process may use, as vLLM wants them: 0,1."""
    allowed = getattr(os, "sched_getaffinity", None)
    cores = sorted(allowed(0)) if allowed else range(os.cpu_count() or 1)
    return ",".join(map(str, list(cores)[:count]))
