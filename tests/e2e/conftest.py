"""A Redis for the tests of the gateway, empty at the start of each, and a gateway on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis
from gateway_site import Site, open_site

from realtime_serve.redis_server import RedisServer, find_binary


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    binary, _ = find_binary()
    folder: Path = tmp_path_factory.mktemp("redis")
    with RedisServer.start(binary, folder) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
async def site(redis_url: str) -> AsyncIterator[Site]:
    async with open_site(redis_url) as found:
        yield found
