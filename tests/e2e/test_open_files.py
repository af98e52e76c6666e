"""A gateway that is started with a low limit of open files, as containers are; real processes."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path

import pytest
from cluster import Cluster
from gateway_site import until

from gateway import open_files
from gateway.open_files import OTHERS, make_room
from realtime_serve import probe

SOFT = 150


@pytest.mark.e2e
async def test_a_low_limit_is_raised(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Cluster(tmp_path) as cluster:
        # Of this process, and so of those that it starts.
        resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, before[1]))
        try:
            cluster.start("gateway", max_connections=2 * SOFT)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        (port,) = cluster.ports
        await until(lambda: _is_up(port), 30)
        answers, writers = [], []
        for _ in range(2 * SOFT):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            answers.append((await reader.readline()).split()[1:2])
        assert answers == [[b"200"]] * (2 * SOFT)
        for writer in writers:
            writer.close()


async def _is_up(port: int) -> bool:
    return (await probe.get("127.0.0.1", port, "/livez"))[0] == 200


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
