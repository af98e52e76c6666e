"""A second start of the native backend: what the first one learned, and nothing that changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.contract.models import save, tiny_model  # noqa: E402
from tests.contract.native import FOLDER, LEVELS  # noqa: E402
from tests.contract.test_native_engine import WronglyRead  # noqa: E402
from tests.contract.test_torch_engine import greedy, prompts, run  # noqa: E402
from worker.engine import EngineOptions, backends, dense, recipe  # noqa: E402
from worker.engine.interface import EngineRequest  # noqa: E402
from worker.engine.loader import load  # noqa: E402
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
    data.mkdir()
    # Compiled once for all tests.
    (data / "native").symlink_to(FOLDER)
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
    """Whether the model was known, and what the engine says."""
    was_known = isinstance(backends.open_model(options, torch.device("cpu")), Known)
    engine = TorchEngine(options)
    said = run(engine, [EngineRequest("a", prompts(1)[4], greedy(12))])["a"]
    engine.close()
    return was_known, said


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
    # The program; what the last one knew is not kept.
    assert len(recipes(options)) == 2
    monkeypatch.setattr(recipe, "_code", lambda: "another")
    assert start(options) == (False, said)
    assert start(options) == (True, said)
    assert len(recipes(options)) == 2
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
