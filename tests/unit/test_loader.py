"""Where models come from, and how fast a wrong source is told."""

from __future__ import annotations

import fnmatch
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from worker.engine import loader
from worker.engine.loader import ModelLoadError, locate
from worker.engine.memory import free_bytes


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "./no-such", "~/no-such", "../a/b", "a/b/c", "no such", ""]
)
def test_a_missing_folder_is_told_at_once(source: str, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ModelLoadError, match=r"no model folder|no config\.json"):
        locate(source, tmp_path)
    assert time.monotonic() - start < 1


def test_a_missing_gguf_file_is_told_at_once(tmp_path: Path) -> None:
    for name in ("none.gguf", "none.GGUF"):
        with pytest.raises(ModelLoadError, match=rf"no file .*{name}"):
            locate(str(tmp_path / name), tmp_path)


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        locate(str(tmp_path), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert locate(str(tmp_path), tmp_path / "data") == tmp_path


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def convert(path: Path, folder: Path, progress: object) -> None:
        made.append(folder)
        folder.mkdir(parents=True)

    monkeypatch.setattr(loader, "convert_gguf", convert)
    file, data = tmp_path / "tiny.gguf", tmp_path / "data"
    file.write_bytes(b"one")
    first = locate(str(file), data)
    assert first.parent == data / "models"
    assert first.name.startswith("tiny-")
    assert locate(str(file), data) == first
    file.write_bytes(b"two")
    assert locate(str(file), data) != first
    assert len(made) == 2


def test_a_hub_id_may_name_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(source: str, progress: object) -> Path:
        asked.append(source)
        return tmp_path

    monkeypatch.setattr(loader, "_download", download)
    for source in ("gpt2", "Qwen/Qwen3-0.6B", "owner/name@refs/pr/1"):
        assert locate(source, tmp_path) == tmp_path
    assert asked == ["gpt2", "Qwen/Qwen3-0.6B", "owner/name@refs/pr/1"]


def test_the_version_changes_with_the_files(tmp_path: Path) -> None:
    versions = set()
    for name, content in (
        ("config.json", "{}"),
        ("tokenizer.json", "{}"),
        ("model.safetensors", "123"),
        ("model.safetensors", "1234"),
        ("other.safetensors", "1234"),
        ("config.json", '{"a": 1}'),
        ("generation_config.json", '{"eos_token_id": 1}'),
        ("generation_config.json", '{"eos_token_id": 2}'),
        ("chat_template.jinja", "a"),
        ("chat_template.jinja", "b"),
        ("tokenizer.model", "a"),
        ("other.safetensors", "1235"),
    ):
        (tmp_path / name).write_text(content)
        versions.add(loader.version_of(tmp_path))
    (tmp_path / "README.md").write_text("irrelevant")
    assert loader.version_of(tmp_path) in versions
    assert len(versions) == 12
    assert all(len(version) == 8 and int(version, 16) >= 0 for version in versions)


@pytest.mark.parametrize("at", [0, 500_000, 999_999])
def test_the_version_changes_with_the_weights_of_a_fine_tuned_model(
    tmp_path: Path, at: int
) -> None:
    weights = bytearray(1_000_000)
    (tmp_path / "model.safetensors").write_bytes(weights)
    before = loader.version_of(tmp_path)
    weights[at] = 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert loader.version_of(tmp_path) != before


@pytest.mark.parametrize(
    ("repository", "fetched"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["config.json", "pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
    ],
)
def test_old_weights_are_fetched_only_where_there_are_no_others(
    repository: list[str], fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub: Any = types.ModuleType("huggingface_hub")

    def snapshot_download(name: str, allow_patterns: list[str], **more: Any) -> str:
        assert (name, more["revision"]) == ("owner/name", None)
        bars = [more["tqdm_class"](total=100, unit=unit) for unit in ("B", "it")]
        for bar in bars:
            bar.update(30)
            bar.update(20)
            bar.close()
        for file in repository:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).write_text("{}")
        return str(tmp_path)

    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    told: list[float] = []
    assert locate("owner/name", tmp_path, lambda what, share: told.append(share)) == tmp_path
    found = [path.name for path in sorted(tmp_path.iterdir()) if path.suffix != ".json"]
    assert found == fetched
    assert told[:3] == [0.0, 0.3, 0.5]
    assert told[-1] == 1.0


@pytest.mark.torch
def test_a_broken_folder_is_one_line_of_reason(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    with pytest.raises(ModelLoadError, match="cannot load") as caught:
        loader.load(str(tmp_path), "float32", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.torch
def test_a_broken_gguf_file_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF nonsense" * 10)
    with pytest.raises(ModelLoadError, match="cannot load"):
        locate(str(file), tmp_path / "data")
    assert list((tmp_path / "data" / "models").iterdir()) == []


@pytest.mark.torch
def test_a_folder_gives_what_gateways_need(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from tests.contract.models import tiny_model
    from worker.engine.echo_tokenizer import CHAT_TEMPLATE, END_TOKEN, tokenizer_json

    tiny_model("llama", vocab_size=257, eos_token_id=[3, 4]).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "top_k": 20}))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TOKEN,
        "chat_template": CHAT_TEMPLATE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    told: list[tuple[str, float]] = []
    got = loader.load(tmp_path, "bfloat16", "it", lambda what, share: told.append((what, share)))
    assert next(got.model.parameters()).dtype == torch.bfloat16
    assert got.files.eos_ids == (3, 4, 256)
    assert (got.files.bos_token, got.files.eos_token) == ("", END_TOKEN)
    assert got.files.chat_template == CHAT_TEMPLATE
    assert (got.files.context_length, got.files.vocab_size) == (256, 257)
    assert got.files.sampling == {"top_k": 20}
    assert json.loads(got.files.tokenizer_json)["model"]["type"] == "BPE"
    assert told[-1] == ("loading weights", 1.0)
    assert loader.describe(tmp_path) == got.files


@pytest.mark.parametrize(
    ("said", "advice", "refused"),
    [
        (None, {}, ()),
        ({"eos_token_id": 2, "do_sample": True, "temperature": None}, {}, ()),
        (
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
            (),
        ),
        ({"temperature": 0, "min_p": 0.1}, {"temperature": 0, "min_p": 0.1}, ()),
        (
            {"temperature": -1, "top_p": 0, "top_k": 1.5, "min_p": "x", "repetition_penalty": True},
            {},
            ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        ),
    ],
    ids=["no file", "no advice", "qwen", "more", "bad"],
)
def test_the_sampling_that_a_models_authors_advise(
    said: Any,
    advice: dict[str, float],
    refused: tuple[str, ...],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if said is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert loader._advice(tmp_path) == advice
    assert len(caplog.records) == len(refused)
    for record, name in zip(caplog.records, refused, strict=True):
        assert f"{name} is ignored" in record.getMessage()


@pytest.mark.parametrize(
    ("limit", "free"),
    [
        (None, 8000 << 10),
        ("max", 8000 << 10),
        (str(4000 << 10), (4000 - 3000 + 500) << 10),
        (str(1000 << 10), 0),
        (str(90_000 << 10), 8000 << 10),
    ],
)
def test_free_memory_is_that_of_the_container(limit: str | None, free: int, tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   8000 kB\n")
    if limit:
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text(f"{3000 << 10}\n")
        (group / "memory.stat").write_text(f"anon 7\ninactive_file {500 << 10}\nslab 3\n")
    assert free_bytes(tmp_path) == free


def test_free_memory_is_known_everywhere(tmp_path: Path) -> None:
    assert free_bytes() > 0
    assert free_bytes(tmp_path) > 0
