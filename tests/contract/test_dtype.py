"""Which dtype `auto` is: that of whatever comes to compute the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tests.contract.models import save, tiny_model  # noqa: E402
from tests.contract.native import FOLDER, LEVELS  # noqa: E402
from worker.engine import EngineOptions, backends, loader  # noqa: E402
from worker.engine.loader import dtype_for  # noqa: E402
from worker.engine.native.build import NativeUnavailable  # noqa: E402
from worker.engine.torch_engine import TorchEngine  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.timeout(120)]

needs_native = pytest.mark.skipif(not LEVELS, reason="the native backend cannot run here")


@pytest.fixture
def options(tmp_path: Path) -> EngineOptions:
    """Of an engine for a model in float32, with a folder of its own and the compiled library."""
    save(tiny_model("llama", head_dim=16), tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    (data / "native").symlink_to(FOLDER)
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


@pytest.mark.usefixtures("old")
def test_what_compiled_code_cannot_do_is_loaded_anew_for_torch(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = served(replace(options, backend="reference"))
    (options.data_dir / "native").unlink()
    monkeypatch.setenv("CXX", "no-such-compiler")
    # float32 as in the files, not rounded on the way: the version says that tokens are the same.
    assert served(options) == asked
    kept = replace(options, dtype="bfloat16")
    assert served(kept)[:2] == ("ReferenceBackend", "bfloat16")


@pytest.mark.usefixtures("old")
def test_weights_loaded_anew_are_those_of_the_files(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    (options.data_dir / "native").unlink()
    monkeypatch.setenv("CXX", "no-such-compiler")
    engine = TorchEngine(options)
    weights = engine._backend._model.state_dict()  # type: ignore[attr-defined]
    own = loader.load(Path(options.source), "float32", "it").model.state_dict()
    assert all(torch.equal(weights[name], own[name]) for name in own)
    engine.close()


@pytest.mark.usefixtures("old")
def test_a_processor_that_the_code_is_not_for_loads_float32_at_once(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []

    def none() -> str:
        raise NativeUnavailable("too old")

    def load(folder: Path, dtype: str, *more: object) -> loader.LoadedModel:
        loads.append(dtype)
        return loader.load(folder, dtype, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(backends, "best_level", none)
    monkeypatch.setattr("worker.engine.cpu.best_level", none)
    monkeypatch.setattr(backends, "load", load)
    assert served(options)[:2] == ("ReferenceBackend", "float32")
    assert loads == ["float32"]
