"""vLLM with tiny models for tests: it takes half a minute to start, so each is used again."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from tests.contract.models import save, tiny_model
from worker.engine import EngineOptions
from worker.engine.vllm_engine import VllmEngine, load

_started: dict[tuple[int, int], list[Any]] = defaultdict(list)


@cache
def folder(context: int) -> Path:
    """A tiny Llama with this context length, made once."""
    path = Path(tempfile.mkdtemp(prefix="vllm-test-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
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
    """Leaves vLLM running when it is closed."""

    def close(self) -> None:
        self.release()


def engine(batch: int, context: int) -> VllmEngine:
    """An engine without sequences, on a vLLM that has none; older engines on it may only rest."""
    own = options(batch, context)
    started = _started[batch, context]
    free = [llm for llm in started if not llm.has_unfinished_requests()]
    if not free:
        free = [load(folder(context), own, eager=True)]
        started += free
    return Pooled(own, llm=free[0])
