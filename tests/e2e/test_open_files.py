"""A gateway that is started with a low limit of open files, as containers are; real processes."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path

import pytest
from cluster import Cluster
from gateway_site import until

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
