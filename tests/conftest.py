"""Fixtures of all tests. Tests only ever use Redis servers that they started themselves."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the person who runs the tests, least of all their Redis, reaches a test."""
    for name in list(os.environ):
        if name.startswith("RTS_"):
            monkeypatch.delenv(name)
