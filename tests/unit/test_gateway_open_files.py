"""How many connections fit the limit of open files."""

from __future__ import annotations

import resource

import pytest

from gateway import open_files
from gateway.open_files import OTHERS, make_room


class _Limits:
    """In place of the module `resource`."""

    RLIMIT_NOFILE = resource.RLIMIT_NOFILE
    RLIM_INFINITY = resource.RLIM_INFINITY

    def __init__(self, soft: int, hard: int, *, most: int = 10**6) -> None:
        self.soft, self.hard, self._most = soft, hard, most

    def getrlimit(self, _: int) -> tuple[int, int]:
        return self.soft, self.hard

    def setrlimit(self, _: int, limits: tuple[int, int]) -> None:
        if limits[0] > self._most:
            raise ValueError
        self.soft, self.hard = limits


@pytest.mark.parametrize(
    ("limits", "connections", "soft"),
    [
        (_Limits(1024, 524_288), 2000, 4000 + OTHERS),
        (_Limits(20_000, 20_000), 2000, 20_000),
        (_Limits(1024, 3000), 2000, 3000),
        (_Limits(1024, 1024), 1024 - OTHERS, 1024),
        (_Limits(256, resource.RLIM_INFINITY), 2000, 4000 + OTHERS),
        (_Limits(256, resource.RLIM_INFINITY, most=1000), 256 - OTHERS, 256),
        (_Limits(resource.RLIM_INFINITY, resource.RLIM_INFINITY), 2000, resource.RLIM_INFINITY),
        (_Limits(64, 64), 1, 64),
    ],
)
def test_what_does_not_fit_is_not_promised(
    monkeypatch: pytest.MonkeyPatch, limits: _Limits, connections: int, soft: int
) -> None:
    monkeypatch.setattr(open_files, "resource", limits)
    assert make_room(2000) == connections
    assert limits.soft == soft
