"""Engines by name: what a worker asks for, and what it publishes about the model it got.

An engine class is constructed as `Class(options)` and has two attributes: `info` (EngineInfo) and
`files` (ModelFiles). That is the whole convention, for our engines and for a user's own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from worker.engine.interface import Engine

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0..1."""

BUILTIN: Final = {
    "echo": "worker.engine.echo:EchoEngine",
    "torch": "worker.engine.torch_engine:TorchEngine",
    "vllm": "worker.engine.vllm_engine:VllmEngine",
}

_EXTRAS: Final = {"vllm": "vllm"}
"""What to install for an engine that needs more than a worker does; docs/engines.md tells how."""


class EngineError(Exception):
    """An engine cannot start, for a reason that a person can do something about.

    The message is one sentence for that person. Whatever else an engine raises is a bug.
    """


def no_progress(what: str, share: float) -> None:
    """The progress callback of those who do not watch."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is made from; an engine ignores what it has no use for.

    Attributes:
        engine: "echo", "torch", "vllm" or `package.module:Class`.
        source: the model: a hub id, a local folder, or a GGUF file.
        dtype: "auto", "bfloat16" or "float32".
        backend: what computes the torch engine's models: "cpu", compiled code; "reference",
            transformers' modules; "auto", the former where it can be had.
        deterministic: a sequence's tokens are the same alone and in any batch; an engine that
            cannot do that refuses to start.
        max_batch_size: most sequences at once, 1-256.
        lease_ms: a step that takes longer has the engine declared dead; 0 for no such limit.
        echo_step_ms: how long a step of the echo engine takes.
        kv_cache_mb: MiB for the KV cache; 0 chooses by the model and the free memory. A cache that
            is smaller than the model's context shortens the context.
        threads: compute threads on a CPU; 0 leaves torch's choice.
        prefix_cache: whether sequences share what their beginnings have in common.
        data_dir: for converted models, compiled code, and what starts learn of models.
        progress: told about slow parts of the start.
    """

    engine: str = "torch"
    source: str = ""
    dtype: str = "auto"
    backend: str = "auto"
    deterministic: bool = False
    max_batch_size: int = 32
    lease_ms: int = 0
    echo_step_ms: float = 0.0
    kv_cache_mb: int = 0
    threads: int = 0
    prefix_cache: bool = True
    data_dir: Path = field(default_factory=lambda: Path("~/.cache/realtime-serve").expanduser())
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        """Refuses values that no engine can serve.

        Raises:
            ValueError: naming the option and its value.
        """
        if not 1 <= self.max_batch_size <= 256:
            raise ValueError(f"max_batch_size must be 1-256, not {self.max_batch_size}")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype must be auto, bfloat16 or float32, not {self.dtype!r}")
        if self.backend not in ("auto", "cpu", "reference"):
            raise ValueError(f"backend must be auto, cpu or reference, not {self.backend!r}")
        for name in ("lease_ms", "echo_step_ms", "kv_cache_mb", "threads"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")
        if not isinstance(self.prefix_cache, bool):
            raise ValueError(f"prefix_cache must be true or false, not {self.prefix_cache!r}")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What a gateway needs to turn text into ids and back for this model version.

    Attributes:
        version: 8 hex digits, a hash of all that decides which tokens are served: what the model
            was loaded from, its dtype, its context length.
        tokenizer_json: text of a `tokenizers` file.
        chat_template: jinja source, None for a model without one.
        context_length: most tokens of prompt and output together.
        eos_ids: ids that end an answer.
        bos_token, eos_token: for the template; "" for a model without them.
        vocab_size: rows of the model's logits; ids are in [0, vocab_size).
        sampling: what the model's authors advise for requests that leave it out; some of
            temperature, top_p, top_k, min_p and repetition_penalty, as in SamplingParams.
    """

    version: str
    tokenizer_json: str
    chat_template: str | None
    context_length: int
    eos_ids: tuple[int, ...]
    bos_token: str
    eos_token: str
    vocab_size: int
    sampling: Mapping[str, float] = field(default_factory=dict)


def resolve(name: str) -> Callable[[EngineOptions], Any]:
    """The engine class for a name or `package.module:Class`.

    A module of one's own may lie in the current folder, as with `python -m`.

    Raises:
        EngineError: no such engine, or the module has no such class.
        ImportError: the module or something that it imports is missing; says what to install.
    """
    path = BUILTIN.get(name, name)
    module_name, colon, class_name = path.partition(":")
    if not (module_name and colon and class_name):
        known = ", ".join(BUILTIN)
        raise EngineError(f"unknown engine {name!r}: known are {known}, or package.module:Class")
    if name not in BUILTIN and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if name in BUILTIN:
            raise ImportError(
                f"the {name} engine needs {error.name or 'a package'}, which cannot be imported "
                f"({error}): pip install 'realtime-ai-serve[{_EXTRAS.get(name, 'worker')}]'",
                name=error.name,
            ) from error
        raise ImportError(
            f"engine {name!r} cannot be imported: {error}", name=error.name
        ) from error
    found = getattr(module, class_name, None)
    if not callable(found):
        raise EngineError(f"engine {name!r}: module {module_name} has no class {class_name}")
    return cast("Callable[[EngineOptions], Any]", found)


def create_engine(options: EngineOptions) -> tuple[Engine, ModelFiles]:
    """Makes the engine that the options name, with its model loaded but not warmed up.

    Raises:
        EngineError: no such engine or class, it lacks `info` or `files`, or the engine says so.
        ImportError: something is not installed.
        Exception: whatever else the engine raises; a bug.
    """
    engine = resolve(options.engine)(options)
    files = getattr(engine, "files", None)
    if getattr(engine, "info", None) is None or not isinstance(files, ModelFiles):
        raise EngineError(
            f"engine {options.engine!r} lacks `info` (EngineInfo) or `files` (ModelFiles)"
        )
    return engine, files
