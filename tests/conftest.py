"""Fixtures of all tests. Tests only ever use Redis servers that they started themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.settings import DEMO_MODEL, Settings

DATA_DIR = Settings.load(
    {key: value for key, value in os.environ.items() if key == "RTS_DATA_DIR"}
).data_dir


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the person who runs the tests, least of all their Redis, reaches a test."""
    for name in list(os.environ):
        if name.startswith("RTS_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The demo model's folder; `make test` fetches it before the tests run."""
    path = DATA_DIR / "models" / DEMO_MODEL
    if not path.is_dir():
        pytest.fail(f"no demo model in {path}: python -m realtime_serve.demo_model")
    return path
