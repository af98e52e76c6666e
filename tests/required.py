"""What tests need beside Python packages: skipped by name at home, a failure in CI."""

from __future__ import annotations

import os
import shutil

import pytest

REQUIRED = "CHAOS_REQUIRED"
"""Environment variable: what cannot be shown here is a failure, as in CI, which installs it."""


def needs(program: str) -> None:
    """Skips the test where a program is not installed; fails it where all is REQUIRED."""
    if shutil.which(program):
        return
    if os.environ.get(REQUIRED):
        pytest.fail(f"{program} is not installed, and {REQUIRED} is set")
    pytest.skip(f"{program} is not installed")
