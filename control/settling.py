"""Settles budgets: what a request was charged beyond what it used goes back to its caller."""

from __future__ import annotations

from typing import Any

from redis.exceptions import ResponseError

from shared import keys
from shared.store import Store, unavailable

PAGE = 500
"""Facts read at once."""
STALE_MS = 3_000
"""Facts that another control process read this long ago and did not settle are taken over; too
early does no harm."""
GONE_MS = 3_600_000
"""A control process that has not asked for this long is gone: the next one has another name."""


async def settle(store: Store, consumer: str) -> int:
    """Settles every fact there is; returns how many.

    A fact is acknowledged after its budget was settled, and settling is idempotent by its id: a
    control process that dies in between loses and repeats nothing.

    Raises:
        StoreUnavailable: Redis did not answer; the next round goes on.
    """
    await _ensure_group(store)
    settled = 0
    async with unavailable():
        await store.client.xautoclaim(
            keys.ENDED, keys.CONTROL_GROUP, consumer, STALE_MS, count=PAGE, justid=True
        )
    # First its own: those just claimed, and what an earlier round read and did not get to.
    for after in ("0", ">"):
        while page := await _read(store, consumer, after):
            for entry_id, fact in page:
                # A fact that was trimmed meanwhile has no fields.
                if fact:
                    await _settle_one(store, entry_id.decode(), fact)
                async with unavailable():
                    await store.client.xack(keys.ENDED, keys.CONTROL_GROUP, entry_id)
                settled += 1
    await _forget_gone(store, consumer)
    return settled


async def _forget_gone(store: Store, consumer: str) -> None:
    """Removes the names of other control processes that are gone and have left nothing."""
    async with unavailable():
        for other in await store.client.xinfo_consumers(keys.ENDED, keys.CONTROL_GROUP):
            gone = other["idle"] > GONE_MS and not other["pending"]
            if gone and other["name"] != consumer.encode():
                await store.client.xgroup_delconsumer(keys.ENDED, keys.CONTROL_GROUP, other["name"])


async def _read(
    store: Store, consumer: str, after: str
) -> list[tuple[bytes, dict[bytes, bytes] | None]]:
    async with unavailable():
        reply: Any = await store.client.xreadgroup(
            keys.CONTROL_GROUP, consumer, {keys.ENDED: after}, count=PAGE
        )
    return reply[0][1] if reply else []


async def _settle_one(store: Store, fact_id: str, fact: dict[bytes, bytes]) -> None:
    unused = int(fact[b"charge"]) - int(fact[b"prompt"]) - int(fact[b"tokens"])
    if unused > 0:
        await store.settle(fact[b"caller"].decode(), fact_id, unused)


async def _ensure_group(store: Store) -> None:
    async with unavailable():
        try:
            await store.client.xgroup_create(keys.ENDED, keys.CONTROL_GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
