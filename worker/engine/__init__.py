"""Engines by name: what a worker asks for, and what it publishes about the model it got.

An engine class is constructed as `Class(options)` and has two attributes: `info` (EngineInfo) and
`files` (ModelFiles). That is the whole convention, for our engines and for a user's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from worker.engine.interface import Engine

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0..1."""

BUILTIN: Final = {
    "echo": "worker.engine.echo:EchoEngine",
    "torch": "worker.engine.torch_engine:TorchEngine",
}


def no_progress(what: str, share: float) -> None:
    """The progress callback of those who do not watch."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is made from; an engine ignores what it has no use for.

    Attributes:
        engine: "echo", "torch" or `package.module:Class`.
        source: the model: a hub id, a local folder, or a GGUF file.
        dtype: "auto", "bfloat16" or "float32".
        max_batch_size: most sequences at once, 1-256.
        echo_step_ms: how long a step of the echo engine takes.
        kv_cache_mb: MiB for the KV cache; 0 chooses by the model and the machine. A cache that is
            smaller than the model's context shortens the context.
        threads: compute threads on a CPU; 0 leaves torch's choice.
        data_dir: where converted models are kept.
        progress: told about slow parts of the start.
    """

    engine: str = "torch"
    source: str = ""
    dtype: str = "auto"
    max_batch_size: int = 32
    echo_step_ms: float = 0.0
    kv_cache_mb: int = 0
    threads: int = 0
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
        for name in ("echo_step_ms", "kv_cache_mb", "threads"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What a gateway needs to turn text into ids and back for this model version.

    Attributes:
        version: 8 hex digits, a hash of what the model was loaded from.
        tokenizer_json: text of a `tokenizers` file.
        chat_template: jinja source, None for a model without one.
        context_length: most tokens of prompt and output together.
        eos_ids: ids that end an answer.
        bos_token, eos_token: for the template; "" for a model without them.
        vocab_size: rows of the model's logits; ids are in [0, vocab_size).
    """

    version: str
    tokenizer_json: str
    chat_template: str | None
    context_length: int
    eos_ids: tuple[int, ...]
    bos_token: str
    eos_token: str
    vocab_size: int


def resolve(name: str) -> Callable[[EngineOptions], Any]:
    """The engine class for a name or `package.module:Class`.

    Raises:
        ValueError: no such engine.
        TypeError: the module has no such class.
        ImportError: the module or something that it imports is missing; says what to install.
    """
    path = BUILTIN.get(name, name)
    module_name, colon, class_name = path.partition(":")
    if not (module_name and colon and class_name):
        known = ", ".join(BUILTIN)
        raise ValueError(f"unknown engine {name!r}: known are {known}, or package.module:Class")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if name in BUILTIN:
            raise ImportError(
                f"the {name} engine needs {error.name or 'a package'}, which cannot be imported "
                f"({error}): pip install 'realtime-ai-serve[worker]'",
                name=error.name,
            ) from error
        raise ImportError(
            f"engine {name!r} cannot be imported: {error}", name=error.name
        ) from error
    found = getattr(module, class_name, None)
    if not callable(found):
        raise TypeError(f"engine {name!r}: module {module_name} has no class {class_name}")
    return cast("Callable[[EngineOptions], Any]", found)


def create_engine(options: EngineOptions) -> tuple[Engine, ModelFiles]:
    """Makes the engine that the options name, with its model loaded but not warmed up.

    Raises:
        ValueError: no such engine, or an option it cannot serve.
        ImportError: something is not installed.
        TypeError: no such class, or it lacks `info` or `files`.
        Exception: whatever the engine raises, `worker.engine.loader.ModelLoadError` for a model.
    """
    engine = resolve(options.engine)(options)
    files = getattr(engine, "files", None)
    if getattr(engine, "info", None) is None or not isinstance(files, ModelFiles):
        raise TypeError(
            f"engine {options.engine!r} lacks `info` (EngineInfo) or `files` (ModelFiles)"
        )
    return engine, files
