"""What tests need beside Python packages: skipped by name at home, a failure in CI."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest
from chaos.world import find_server

from realtime_serve.redis_server import ServerBinary

REQUIRED = "CHAOS_REQUIRED"
"""Environment variable: what cannot be shown here is a failure, as in CI, which installs it."""


def needs(program: str) -> None:
    """Skips the test where a program is not installed; fails it where all is REQUIRED."""
    if not shutil.which(program):
        _lacks(f"{program} is not installed")


def server_program(kind: str) -> ServerBinary:
    """That of valkey or redis; see `needs`."""
    try:
        return find_server(kind)
    except FileNotFoundError as error:
        _lacks(str(error))


def _lacks(what: str) -> NoReturn:
    if os.environ.get(REQUIRED):
        pytest.fail(f"{what}, and {REQUIRED} is set")
    pytest.skip(what)
