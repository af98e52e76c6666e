"""OpenVINO GenAI's continuous batching behind our engine interface, so that one loop measures both.

Runs in an environment of its own: it imports openvino_genai, and of this project what needs nothing
but the standard library. The source is a folder that `openvino_export` made.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import openvino
import openvino_genai

from worker.engine import EngineOptions, ModelFiles
from worker.engine.interface import EngineInfo, EngineRequest, EngineStats, StepOutput

_CACHE_GB = 2  # as much as vLLM gets
_CONTEXT = 4096
_FINISHED = openvino_genai.GenerationFinishReason


class OpenVinoEngine:
    """OpenVINO's pipeline; measured, not served: it knows no end ids and no stop ids."""

    def __init__(self, options: EngineOptions) -> None:
        """Loads the model; `source` and `max_batch_size` count."""
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.cache_size = _CACHE_GB
        scheduling.max_num_seqs = options.max_batch_size
        scheduling.dynamic_split_fuse = True
        scheduling.enable_prefix_caching = False
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(
            options.source, scheduling, "CPU"
        )
        tokenizer = Path(options.source, "tokenizer.json").read_text()
        self.files = ModelFiles("openvino", tokenizer, None, _CONTEXT, (), "", "", 1 << 30)
        self.info = EngineInfo("openvino", options.max_batch_size, _CONTEXT, 1 << 30, device="cpu")
        self._running: dict[str, Any] = {}
        self._number = 0
        self._stats = EngineStats()

    def warm_up(self) -> None:
        """The pipeline compiles when it is made."""

    def room(self) -> int:
        """Free places of the batch."""
        return max(0, self.info.max_batch_size - len(self._running))

    def add(self, request: EngineRequest) -> None:
        """Admits a sequence."""
        sampling = request.sampling
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = sampling.max_tokens
        config.ignore_eos = True
        if sampling.temperature > 0:
            config.do_sample = True
            config.temperature, config.top_p = sampling.temperature, sampling.top_p
            config.rng_seed = sampling.seed
        ids = openvino.Tensor(numpy.array([[*request.prompt]], dtype=numpy.int64))
        self._running[request.rid] = self._pipeline.add_request(self._number, ids, config)
        self._number += 1

    def abort(self, rid: str) -> None:
        """Drops a sequence, if it is there."""
        if handle := self._running.pop(rid, None):
            handle.cancel()

    def step(self) -> list[StepOutput]:
        """Runs one iteration and collects what came of it."""
        if not self._running:
            return []
        self._pipeline.step()
        self._stats.steps += 1
        outputs = []
        for rid, handle in list(self._running.items()):
            output = StepOutput(rid, [])
            while handle.can_read():
                for part in handle.read().values():
                    output.tokens += part.generated_ids
                    if part.finish_reason != _FINISHED.NONE:
                        output.finish = "length"
            if output.finish is not None:
                del self._running[rid]
            if output.tokens or output.finish:
                outputs.append(output)
        return outputs

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        return replace(self._stats, running=len(self._running))

    def close(self) -> None:
        """Nothing is left to free."""
