"""Real servers for the contract tests: Valkey always, Redis where redis-server is on PATH."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from script_model import Clock, assert_consistent
from servers import Server, start

from shared.store import Store, connect

TIMEOUT_S = 5.0


@pytest.fixture(scope="session", params=["valkey", "redis"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A running server that all tests of the session share."""
    it = start(request.param)
    yield it
    it.stop()


@pytest.fixture(params=["valkey", "redis"])
def own_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of one test alone, which may stop or kill it."""
    it = start(request.param)
    yield it
    it.go_on()
    it.stop()


@pytest.fixture
async def store(server: Server) -> AsyncIterator[Store]:
    """The scripts over an empty server. Afterwards every counter must agree with what is there."""
    it = Store(connect(server.url, timeout_s=TIMEOUT_S))
    await it.client.flushall()
    yield it
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await assert_consistent(it.client)
    finally:
        await it.close()


@pytest.fixture
async def clock(store: Store) -> Clock:
    """Stops the time that the scripts of `store` see; only the test moves it."""
    return await Clock.stop(store)
