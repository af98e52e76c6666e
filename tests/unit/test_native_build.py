"""Where the native backend's library comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.engine.native import build


def test_an_image_brings_its_libraries_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, data = tmp_path / "built", tmp_path / "data"
    monkeypatch.setattr(build, "BUILT", built)
    monkeypatch.setattr(build, "_compile", lambda compiler, arguments, path: _touch(path))
    monkeypatch.setattr(build, "_compiler", lambda: "c++")
    build.main(str(built))
    monkeypatch.delattr(build, "_compiler")
    for level in build.LEVELS:
        assert build.library(level, data).parent == built
    assert not data.exists()


def test_an_image_for_another_processor_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    monkeypatch.delattr(build, "_compile")
    build.main(str(tmp_path / "built"))
    assert list((tmp_path / "built").iterdir()) == [], "what is copied into the image is there"
    assert "no native backend" in capsys.readouterr().out


def _touch(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.touch()
