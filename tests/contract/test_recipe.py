"""A second start of the native backend: what the first one learned, and nothing that changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.contract.models import save, tiny_model  # noqa: E402
from tests.contract.native import LEVELS, share_libraries  # noqa: E402
from tests.contract.test_native_engine import WronglyRead  # noqa: E402
from tests.contract.test_torch_engine import greedy, prompts, run  # noqa: E402
from worker.engine import EngineOptions, backends, dense, recipe, torch_engine  # noqa: E402
from worker.engine.interface import EngineRequest  # noqa: E402
from worker.engine.loader import LoadedModel, load  # noqa: E402
from worker.engine.native.build import NativeUnavailable  # noqa: E402
from worker.engine.recipe import Known  # noqa: E402
from worker.engine.torch_engine import TorchEngine  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not LEVELS, reason="the native backend cannot run here"),
]

# Each with something of its own: tied weights, biases, norms of heads and of results, two tables.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
}


@pytest.fixture
def options(tmp_path: Path) -> EngineOptions:
    """Of an engine for the model in tmp_path/model, with a data folder of its own."""
    data = tmp_path / "data"
    share_libraries(data)
    return EngineOptions(
        source=str(tmp_path / "model"),
        dtype="float32",
        backend="cpu",
        max_batch_size=2,
        threads=1,
        kv_cache_mb=1,
        data_dir=data,
    )


def start(options: EngineOptions) -> tuple[bool, list[int]]:
    """Whether the model was known, so that transformers did not load it, and what is said."""
    with pytest.MonkeyPatch.context() as patch:
        loads: list[Path] = []

        def counted(folder: Path, *more: Any) -> LoadedModel:
            loads.append(folder)
            return load(folder, *more)

        patch.setattr(backends, "load", counted)
        engine = TorchEngine(options)
    said = run(engine, [EngineRequest("a", prompts(1)[4], greedy(12))])["a"]
    engine.close()
    return not loads, said


def recipes(options: EngineOptions) -> list[Path]:
    return sorted((options.data_dir / "recipes").glob("*"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_start_is_the_first_one_again(
    options: EngineOptions, name: str, dtype: str
) -> None:
    family, overrides = MODELS[name]
    sizes = {} if "head_dim" in overrides else {"head_dim": 16}
    save(tiny_model(family, **sizes, **overrides).to(getattr(torch, dtype)), Path(options.source))
    options = replace(options, dtype=dtype)
    first = TorchEngine(options)
    files, info = first.files, first.info
    first.close()
    known = backends.open_model(options, torch.device("cpu"))
    assert isinstance(known, Known)
    loaded = load(Path(options.source), dtype, "it")
    assert known.weights_bytes == loaded.weights_bytes
    read = dense.Dense(loaded.model, known.files.context_length)
    assert known.sizes == read.sizes
    for one, other in zip(known.weights(), read.weights(), strict=True):
        assert (one.layer, one.part) == (other.layer, other.part)
        assert torch.equal(one.tensor(), other.tensor())
    again = TorchEngine(options)
    assert (again.files, again.info) == (files, info)
    again.close()


def test_what_has_changed_is_learned_anew(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(options.source)
    save(tiny_model("llama", head_dim=16), folder)
    known, said = start(options)
    assert not known
    assert start(options) == (True, said)
    # What the backend is asked for.
    assert not start(replace(options, deterministic=True))[0]
    assert start(replace(options, deterministic=True)) == (True, said)
    assert start(options)[0]
    # The program. While a cluster rolls, both are in use.
    assert len(recipes(options)) == 2
    monkeypatch.setattr(recipe, "_code", lambda: b"another")
    assert start(options) == (False, said)
    assert start(options) == (True, said)
    assert len(recipes(options)) == 3
    # The weights.
    save(tiny_model("llama", head_dim=16, initializer_range=0.2), folder)
    known, other = start(options)
    assert not known
    assert other != said
    # The config.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.01}))
    assert not start(options)[0]
    assert start(options)[0]


@pytest.mark.parametrize("broken", ["recipe.json", "tables.safetensors"])
def test_a_broken_recipe_is_of_no_use(options: EngineOptions, broken: str) -> None:
    save(tiny_model("llama", head_dim=16), Path(options.source))
    _, said = start(options)
    (place,) = recipes(options)
    (place / broken).write_bytes((place / broken).read_bytes()[:40])
    assert start(options) == (False, said)
    assert start(options) == (True, said), "it is written again"
    (place / broken).unlink()
    assert start(options) == (False, said)


def test_nothing_is_kept_of_what_is_computed_wrongly(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tiny_model("llama", head_dim=16), Path(options.source))
    options = replace(options, backend="auto")
    monkeypatch.setattr(dense, "Dense", WronglyRead)
    assert not start(options)[0]
    assert recipes(options) == []
    assert not start(options)[0]


def test_nothing_is_kept_of_weights_that_are_in_no_such_file(options: EngineOptions) -> None:
    folder = Path(options.source)
    model = tiny_model("llama", head_dim=16)
    save(model, folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    _, said = start(options)
    assert recipes(options) == []
    assert start(options) == (False, said)


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(options: EngineOptions) -> None:
    save(tiny_model("llama", head_dim=16), Path(options.source))
    # root may write anywhere, but not into a file.
    (options.data_dir / "recipes").write_text("no folder")
    _, said = start(options)
    assert start(options) == (False, said)


def test_a_file_in_another_dtype_is_rounded_as_transformers_rounds_it(
    options: EngineOptions,
) -> None:
    save(tiny_model("gemma2"), Path(options.source))
    options = replace(options, dtype="bfloat16")
    _, said = start(options)
    assert start(options) == (True, said)


def test_of_two_files_with_the_same_names_nothing_is_kept(options: EngineOptions) -> None:
    folder = Path(options.source)
    save(tiny_model("llama", head_dim=16), folder)
    (folder / "model.fp16.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    _, said = start(options)
    assert recipes(options) == []
    assert start(options) == (False, said)


@pytest.mark.parametrize("error", [NativeUnavailable("it cannot be loaded"), OSError("gone")])
def test_what_fails_with_a_known_model_is_done_the_long_way(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save(tiny_model("llama", head_dim=16), Path(options.source))
    _, said = start(options)

    def broken(self: Known) -> None:
        raise error

    monkeypatch.setattr(Known, "weights", broken)
    assert start(options) == (False, said)


def test_the_context_does_not_depend_on_what_is_known(options: EngineOptions) -> None:
    """It is part of the model's version: streams go from one worker to another of the same."""
    save(tiny_model("llama", head_dim=16, max_position_embeddings=4096), Path(options.source))
    options = replace(options, kv_cache_mb=0)
    with pytest.MonkeyPatch.context() as patch:
        # Loaded weights take memory.
        free = iter([3 << 20, 1 << 20])
        patch.setattr(torch_engine, "free_bytes", lambda: next(free))
        first = TorchEngine(options)
        patch.setattr(torch_engine, "free_bytes", lambda: 3 << 20)
        again = TorchEngine(options)
    assert first.info.context_length < 4096
    assert first.files == again.files
    first.close()
    again.close()


def test_what_no_start_has_used_for_long_is_removed(options: EngineOptions) -> None:
    save(tiny_model("llama", head_dim=16), Path(options.source))
    start(options)
    (old,) = recipes(options)
    left_over = old.parent / ".broken-off"
    left_over.mkdir()
    long_ago = time.time() - 31 * 86400
    for place in (old, left_over):
        os.utime(place, (long_ago, long_ago))
    assert start(options)[0]
    assert time.time() - old.stat().st_mtime < 60, "it is in use"
    start(replace(options, deterministic=True))
    assert old.exists()
    assert not left_over.exists()
    for file in old.iterdir():
        assert file.stat().st_mode & 0o777 == 0o644, "others may read it"


def test_the_reference_knows_nothing(options: EngineOptions) -> None:
    save(tiny_model("llama", head_dim=16), Path(options.source))
    start(options)
    assert not start(replace(options, backend="reference"))[0]


def test_a_second_start_does_without_transformers(options: EngineOptions) -> None:
    save(tiny_model("llama", head_dim=16), Path(options.source))
    start(options)
    code = """
import sys
from pathlib import Path
from worker.engine import EngineOptions, create_engine
source, data = sys.argv[1:]
options = EngineOptions(source=source, dtype="float32", backend="cpu", max_batch_size=2, threads=1,
                        kv_cache_mb=1, data_dir=Path(data))
engine, files = create_engine(options)
engine.warm_up()
assert "torch" in sys.modules
sys.exit("transformers" in sys.modules)
"""
    argv = [sys.executable, "-c", code, options.source, str(options.data_dir)]
    assert subprocess.run(argv, check=False).returncode == 0
    shutil.rmtree(options.data_dir / "recipes")
    assert subprocess.run(argv, check=False).returncode == 1
