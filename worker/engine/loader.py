"""Models from a hub id, a folder or a GGUF file.

torch and transformers are imported by the functions that need them: the error is for everybody.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from worker.engine import EngineError, ModelFiles, Progress, no_progress

if TYPE_CHECKING:
    import torch

_HUB_ID: Final = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_WEIGHTS: Final = ("*.safetensors", "*.bin")
_OTHERS: Final = ("*.json", "*.jinja", "*.model", "*.txt")
"""Files that say what a model is, beside its weights."""

_SAMPLE: Final = 64 << 10
"""Bytes at the head, in the middle and at the tail of weights that stand for all of them."""

_ADVISABLE: Final = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-9, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}
"""Sampling that a model's generation_config.json may advise, and the values that are served."""

_END_OF_TURN: Final = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
"""Ends of an answer that files converted by others often fail to name as such."""


class ModelLoadError(EngineError):
    """A model cannot be loaded or would not be computed rightly; the message says why."""


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        model: a transformers module for causal language modelling, on the CPU.
        files: what is published of it.
        folder, dtype: where it is, and in which it was loaded; None for one that was never in
            files.
    """

    model: torch.nn.Module
    files: ModelFiles
    folder: Path | None = None
    dtype: str | None = None

    @property
    def weights_bytes(self) -> int:
        """What its weights take."""
        return sum(each.numel() * each.itemsize for each in self.model.parameters())


def load(folder: Path, dtype: str, source: str, progress: Progress = no_progress) -> LoadedModel:
    """Loads a model and its tokenizer.

    Args:
        folder: as `locate` found it.
        source: how the user calls it.
        dtype: "bfloat16" or "float32".
        progress: told how far it is.

    Raises:
        ModelLoadError: it is broken.
    """
    progress("loading weights", 0.0)
    import torch
    from transformers import AutoModelForCausalLM

    kind = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    with _explained(source), _quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=kind, local_files_only=True, trust_remote_code=False
        )
        files = _files(folder, model.config, model.generation_config)
    progress("loading weights", 1.0)
    return LoadedModel(model, files, folder, dtype)


def describe(folder: Path) -> ModelFiles:
    """What is published of the model in a folder, for engines that load its weights themselves.

    Raises:
        ModelLoadError: the folder's config or tokenizer is missing, broken or of no use.
    """
    from transformers import AutoConfig, GenerationConfig

    with _explained(str(folder)), _quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        generation = None
        if (folder / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        return _files(folder, config, generation)


def model_type(folder: Path) -> str:
    """What transformers calls the decoder of the model in a folder: llama, qwen2, ...

    Raises:
        ModelLoadError: its config is missing, broken, or of a kind that transformers does not know.
    """
    from transformers import AutoConfig

    with _explained(str(folder)):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return str(config.get_text_config(decoder=True).model_type)


def locate(source: str, data_dir: Path, progress: Progress = no_progress) -> Path:
    """The folder with a source's config, tokenizer and weights, fetched or converted if need be.

    Args:
        source: a hub id (`name` or `owner/name`, `@revision` may follow), a folder, or a GGUF file.
        data_dir: where a GGUF file's converted model is kept, under models/.
        progress: told how far it is.

    Raises:
        ModelLoadError: there is no such model.
    """
    path = Path(source).expanduser()
    if source.lower().endswith(".gguf"):
        if not path.is_file():
            raise ModelLoadError(f"there is no file {path}")
        folder = data_dir / "models" / f"{path.stem}-{_fingerprint(path)}"
        if not folder.is_dir():
            convert_gguf(path, folder, progress)
        return folder
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"{path} is no model folder: it has no config.json")
        return path
    # Asked for a path that does not exist, transformers would try the hub for half a minute.
    if path.is_absolute() or source.startswith(("~", ".")) or not _HUB_ID.fullmatch(source):
        raise ModelLoadError(f"there is no model folder {path}")
    return _download(source, progress)


def convert_gguf(path: Path, folder: Path, progress: Progress = no_progress) -> None:
    """Writes the model in a GGUF file as a folder with bfloat16 weights; takes some ten seconds.

    The folder appears when it is complete. If another process made it meanwhile, that one stays.

    Args:
        path: the file.
        folder: to be made; its parents are made too.
        progress: told how far it is.

    Raises:
        ModelLoadError: the file is missing, or transformers cannot read it.
    """
    if not path.is_file():
        raise ModelLoadError(f"there is no file {path}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _explained(str(path)), _quiet():
            progress(f"converting {path.name}", 0.0)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            progress(f"converting {path.name}", 0.25)
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
            progress(f"converting {path.name}", 0.9)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        if not folder.is_dir():
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        progress(f"converting {path.name}", 1.0)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def dtype_for(asked: str, *, native: bool = False) -> str:
    """The dtype that is asked for; "auto" is bfloat16 where it is fast.

    Args:
        asked: "bfloat16", "float32" or "auto".
        native: whether our compiled code computes, which has half of the bytes to read then, on
            every processor that it is for. torch needs instructions for it, or takes several
            times as long as in float32.
    """
    if asked != "auto":
        return asked
    return "bfloat16" if native or _multiplies_bfloat16() else "float32"


def _multiplies_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether torch's device has instructions for it."""
    import torch

    if torch.cuda.is_available():
        return True
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def _download(source: str, progress: Progress) -> Path:
    """The local copy of a hub model, as transformers itself keeps it."""
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    progress(f"downloading {source}", 0.0)
    for weights in ("*.safetensors", "pytorch_model*.bin"):
        with _explained(source):
            folder = Path(
                snapshot_download(
                    name,
                    revision=revision or None,
                    allow_patterns=[*_OTHERS, weights],
                    ignore_patterns=["*/*"],
                    tqdm_class=_bar(f"downloading {source}", progress),
                )
            )
        # Most that have both have the same in both.
        if any(folder.glob("*.safetensors")):
            break
    progress(f"downloading {source}", 1.0)
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{source} is no model: it has no config.json")
    return folder


def _bar(what: str, progress: Progress) -> Any:
    """The class of a progress bar that shows nothing, and tells `progress` of the bytes."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

    class Bar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._counts_bytes and self.total:
                progress(what, min(self.n / self.total, 0.99))

    return Bar


def _files(folder: Path, config: Any, generation: Any) -> ModelFiles:
    """Reads the tokenizer; `generation` is the model's generation config, None without one."""
    from transformers import AutoTokenizer

    config = config.get_text_config(decoder=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    if not getattr(tokenizer, "is_fast", False):
        raise ModelLoadError(f"{folder} has no tokenizer that the `tokenizers` package can run")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    context = getattr(config, "max_position_embeddings", None)
    if not context:
        raise ModelLoadError(f"{folder} does not say how long its context is")
    return ModelFiles(
        version=version_of(folder),
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        chat_template=template,
        context_length=int(context),
        eos_ids=_eos_ids([generation, config, tokenizer], tokenizer, template),
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
        vocab_size=int(config.vocab_size),
        sampling=_advice(folder),
    )


def _advice(folder: Path) -> dict[str, float]:
    """The sampling of generation_config.json, as far as an engine can do it.

    From the file: transformers' object also has values that the model's authors never named.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    said = json.loads(path.read_text())
    found: dict[str, float] = {}
    for name, (low, high) in _ADVISABLE.items():
        value = said.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            good = False
        else:
            good = low <= value <= high and (name != "top_k" or value == int(value))
        if good:
            found[name] = value
        else:
            log.warning(f"{path}: {name} is ignored, {value!r} is not from {low:g} to {high:g}")
    return found


def _eos_ids(sources: list[Any], tokenizer: Any, template: str | None) -> tuple[int, ...]:
    """Every id that ends an answer, whichever of a model's files says so."""
    found: set[int] = set()
    for ids in (getattr(source, "eos_token_id", None) for source in sources if source is not None):
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    found.update(added[end] for end in _END_OF_TURN if end in added and end in (template or ""))
    return tuple(sorted(found))


def version_of(folder: Path) -> str:
    """8 hex digits that change with the model's files."""
    digest = hashlib.sha256()
    for pattern in (*_OTHERS, *_WEIGHTS):
        for path in sorted(folder.glob(pattern)):
            size = path.stat().st_size
            digest.update(json.dumps([path.name, size]).encode())
            if pattern in _OTHERS:
                digest.update(path.read_bytes())
                continue
            with path.open("rb") as file:
                for start in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
                    file.seek(max(0, start))
                    digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:8]


def _fingerprint(path: Path) -> str:
    """8 hex digits from the size and both ends of a file, which may be too long to read."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()[:8]


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Whatever goes wrong in the libraries is a ModelLoadError with one line of reason."""
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelLoadError(f"cannot load {source}: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' progress bars out of our logs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
