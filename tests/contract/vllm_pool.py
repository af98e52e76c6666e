"""vLLM with tiny models for tests: it takes half a minute to start, so each is used again."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from tests.contract.models import save, tiny_model
from worker.engine import EngineOptions
from worker.engine.vllm_engine import VllmEngine, load

_idle: dict[tuple[int, int], list[Any]] = defaultdict(list)


@cache
def folder(context: int) -> Path:
    """A tiny Llama with this context length, made once."""
    path = Path(tempfile.mkdtemp(prefix="vllm-test-"))
    # vLLM has no attention kernel for smaller heads.
    save(tiny_model("llama", hidden_size=128, max_position_embeddings=context), path)
    return path


def options(batch: int, context: int, **more: Any) -> EngineOptions:
    """Options that serve that model in float32."""
    values = {
        "source": str(folder(context)),
        "dtype": "float32",
        "kv_cache_mb": 16,
        "threads": 1,
        **more,
    }
    return EngineOptions("vllm", max_batch_size=batch, **values)


class Pooled(VllmEngine):
    """Gives vLLM back when it is closed."""

    def __init__(self, batch: int, context: int) -> None:
        self._key = (batch, context)
        own = options(batch, context)
        idle = _idle[self._key]
        super().__init__(own, llm=idle.pop() if idle else load(folder(context), own, eager=True))

    def close(self) -> None:
        _idle[self._key].append(self.release())


def engine(batch: int, context: int) -> VllmEngine:
    """An engine without sequences."""
    return Pooled(batch, context)
