"""Which dtype `auto` is: that of whatever comes to compute the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.contract.models import save, tiny_model  # noqa: E402
from tests.contract.native import LEVELS, share_libraries  # noqa: E402
from worker.engine import EngineOptions, backends, loader, torch_engine  # noqa: E402
from worker.engine.loader import LoadedModel, ModelLoadError, dtype_for  # noqa: E402
from worker.engine.native.build import NativeUnavailable  # noqa: E402
from worker.engine.torch_engine import TorchEngine  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.timeout(120)]

needs_native = pytest.mark.skipif(not LEVELS, reason="the native backend cannot run here")


@pytest.fixture
def options(tmp_path: Path) -> EngineOptions:
    """Of an engine for a model in float32, with a folder of its own and the compiled library."""
    save(tiny_model("llama", head_dim=16), tmp_path / "model")
    data = tmp_path / "data"
    share_libraries(data)
    return EngineOptions(
        source=str(tmp_path / "model"), max_batch_size=2, threads=1, kv_cache_mb=1, data_dir=data
    )


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without instructions for bfloat16."""
    monkeypatch.setattr(loader, "_multiplies_bfloat16", lambda: False)


@pytest.fixture
def new(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with them."""
    monkeypatch.setattr(loader, "_multiplies_bfloat16", lambda: True)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dtypes in which models are loaded."""
    found: list[str] = []

    def load(folder: Path, dtype: str, *more: Any) -> LoadedModel:
        found.append(dtype)
        return loader.load(folder, dtype, *more)

    monkeypatch.setattr(backends, "load", load)
    return found


def served(options: EngineOptions) -> tuple[str, str, str]:
    """What computes, in which dtype, and the version of the model."""
    engine = TorchEngine(options)
    try:
        backend = engine._backend
        assert backend.dtype == engine.info.dtype
        return type(backend).__name__, backend.dtype, engine.files.version
    finally:
        engine.close()


def test_a_processor_says_whether_it_multiplies_bfloat16(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    for flags, has in (("avx2 fma avx512f", False), ("avx512_bf16", True), ("amx_bf16", True)):
        info.write_text(f"flags\t\t: sse {flags}\n")
        assert loader._multiplies_bfloat16(info) == has
    assert not loader._multiplies_bfloat16(tmp_path / "none")


@pytest.mark.usefixtures("old")
def test_what_is_asked_for_is_what_there_is() -> None:
    for asked in ("bfloat16", "float32"):
        assert dtype_for(asked) == dtype_for(asked, native=True) == asked
    assert (dtype_for("auto"), dtype_for("auto", native=True)) == ("float32", "bfloat16")


@needs_native
@pytest.mark.usefixtures("old")
def test_compiled_code_computes_in_bfloat16_wherever_it_runs(options: EngineOptions) -> None:
    first = served(options)
    assert first[:2] == ("CpuBackend", "bfloat16")
    # A start that knows the model.
    assert served(options) == first
    assert served(replace(options, dtype="bfloat16")) == first
    float32 = served(replace(options, dtype="float32"))
    assert float32[:2] == ("CpuBackend", "float32")
    assert float32[2] != first[2]


@pytest.mark.usefixtures("old")
def test_torch_computes_in_float32_without_instructions(options: EngineOptions) -> None:
    assert served(replace(options, backend="reference"))[:2] == ("ReferenceBackend", "float32")


@pytest.mark.usefixtures("new")
def test_torch_computes_in_bfloat16_with_them(options: EngineOptions) -> None:
    assert served(replace(options, backend="reference"))[:2] == ("ReferenceBackend", "bfloat16")


@needs_native
@pytest.mark.usefixtures("old")
def test_what_compiled_code_turns_out_not_to_know_is_loaded_anew(
    options: EngineOptions, loads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    # Of a family that is known, by its config; only a look at the model shows the rest.
    save(tiny_model("llama", head_dim=16, hidden_act="gelu"), Path(options.source))
    asked = served(replace(options, backend="reference"))
    assert loads == ["float32"]
    loads.clear()
    # float32 as in the files, not rounded on the way: the version says that tokens are the same.
    assert served(options) == asked
    assert loads == ["bfloat16", "float32"]
    assert "does not know the activation gelu; torch computes the model in float32" in caplog.text
    loads.clear()
    assert served(replace(options, dtype="bfloat16"))[:2] == ("ReferenceBackend", "bfloat16")
    assert loads == ["bfloat16"]


@needs_native
@pytest.mark.usefixtures("old")
def test_what_is_loaded_anew_is_the_same_version(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", head_dim=16, hidden_act="gelu", max_position_embeddings=4096)
    save(model, Path(options.source))
    # The cache, and with it the context, is as large as the weights and the free memory allow.
    options = replace(options, kv_cache_mb=0)
    free = iter([3 << 20, 3 << 20, 1 << 20])
    monkeypatch.setattr(torch_engine, "free_bytes", lambda: next(free))
    direct = TorchEngine(replace(options, backend="reference"))
    anew = TorchEngine(options)
    assert direct.info.context_length < 4096
    assert direct.files == anew.files
    weights = anew._backend._model.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    direct.close()
    anew.close()


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("lacks", ["compiler", "level", "family"])
def test_what_compiled_code_is_not_for_is_loaded_once(
    options: EngineOptions, loads: list[str], monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    def none() -> str:
        raise NativeUnavailable("too old")

    if lacks == "compiler":
        (options.data_dir / "native").unlink()
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif lacks == "level":
        monkeypatch.setattr(backends, "best_level", none)
        monkeypatch.setattr("worker.engine.cpu.best_level", none)
    else:
        save(tiny_model("phi3"), Path(options.source))
    assert served(options)[:2] == ("ReferenceBackend", "float32")
    assert loads == ["float32"]


@pytest.mark.usefixtures("old")
def test_a_broken_config_is_told_by_who_loads_it(options: EngineOptions) -> None:
    (Path(options.source) / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not a valid JSON"):
        served(options)
