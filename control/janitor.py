"""Ends and removes what nobody else is left to: overdue requests, dead engines, dead letters."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from shared import keys
from shared.store import ENGINE_TTL_MS, Store, unavailable

BATCH = 256
"""Requests ended by one script call, so that it never holds Redis up for long."""
DEAD_LETTER_DAYS = 7


async def sweep(store: Store) -> dict[str, int]:
    """One round; returns how many requests were ended and engines forgotten.

    Raises:
        StoreUnavailable: Redis did not answer; the next round goes on.
    """
    ended = 0
    while True:
        batch = len(await store.expire(BATCH))
        ended += batch
        if batch < BATCH:
            break
    forgotten = 0
    async for mv, engine in _departed(store):
        forgotten += await store.forget(mv, engine)
    oldest = int((time.time() - DEAD_LETTER_DAYS * 86400) * 1000)
    async with unavailable():
        await store.client.xtrim(keys.DEAD, minid=f"{oldest}-0", approximate=True)
    return {"ended": ended, "forgotten": forgotten}


async def _departed(store: Store) -> AsyncIterator[tuple[str, str]]:
    """Engines that own nothing, of which a trace is left, and that send no heartbeat any more."""
    async with unavailable():
        seconds, _ = await store.client.time()
        since_ms = seconds * 1000 - ENGINE_TTL_MS
        models = await store.client.smembers(keys.MODELS)  # type: ignore[misc]
        for model in models:
            fields = await store.client.hkeys(keys.model(model.decode()))  # type: ignore[misc]
            for field in fields:
                if field.startswith(b"v:"):
                    mv = keys.model_version(model.decode(), field[2:].decode())
                    for engine in await _silent(store, mv, since_ms):
                        yield mv, engine


async def _silent(store: Store, mv: str, since_ms: int) -> set[str]:
    owning: set[str] = {keys.NOBODY}
    known: set[str] = set()
    for cls in keys.CLASSES:
        queue = keys.queue(mv, cls)
        # The first take makes the group: before it there is a queue at most.
        if not await store.client.exists(queue) or not await store.client.xinfo_groups(queue):
            continue
        for consumer in await store.client.xinfo_consumers(queue, keys.GROUP):
            name = consumer["name"].decode()
            (owning if consumer["pending"] else known).add(name)
    heard = {
        name.decode(): at
        for name, at in await store.client.zrange(keys.engines(mv), 0, -1, withscores=True)
    }
    silent = {name for name in known | heard.keys() if heard.get(name, 0.0) < since_ms}
    return silent - owning
