"""Clients of resumable requests that leave while these wait: their grace time runs in the queue."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
from gateway_site import Site, letters, open_site, until

from shared import keys

BODY = {"model": "echo", "prompt": "hello", "max_tokens": 30, "seed": 5}
GRACE_S = 0.6


async def test_a_request_whose_client_stays_away_is_not_run(site: Site) -> None:
    site.worker.room = 0
    rid, client = await _ask(site)
    assert await _unheard(site, rid) is None
    client.close()
    await until(lambda: _unheard(site, rid))
    await asyncio.sleep(GRACE_S + 0.1)
    # Nothing looks through the queue: it ends when its turn comes.
    assert (await site.get(f"/requests/{rid}"))[1]["status"] == "queued"
    site.worker.room = 1
    assert (await site.post("/infer", BODY))[0] == 200
    _, found, _ = await site.get(f"/requests/{rid}")
    assert (found["status"], found["finish_reason"]) == ("cancelled", "abandoned")
    assert found["completion_tokens"] == 0
    assert [request.rid for request in site.worker.seen].count(rid) == 0
    assert await site.counts() == (0, 0)


async def test_a_client_that_comes_back_in_time_gets_it_all(site: Site) -> None:
    site.worker.room = 0
    rid, client = await _ask(site)
    client.close()
    await until(lambda: _unheard(site, rid))
    again = asyncio.create_task(site.get(f"/requests/{rid}/stream"))
    await until(lambda: len(site.edge.flows) == 1)
    await asyncio.sleep(GRACE_S + 0.1)
    site.worker.room = 1
    _, events, _ = await again
    assert "".join(event.data["text"] for event in events[:-2]) == letters(5, 30)
    assert events[-1].data == "[DONE]"


async def test_who_leaves_again_has_the_whole_time_again(site: Site) -> None:
    site.worker.room = 0
    rid, client = await _ask(site)
    client.close()
    first = await _noted(site, rid, 0)
    back = await site.http.get(site.url(f"/requests/{rid}/stream"))
    back.close()
    assert await _noted(site, rid, first) > first


async def test_another_listener_keeps_it(site: Site, redis_url: str) -> None:
    site.worker.room = 0
    async with open_site(redis_url) as other:
        other.worker.room = 0
        rid, client = await _ask(site)
        stays = asyncio.create_task(other.get(f"/requests/{rid}/stream"))
        await until(lambda: len(other.edge.flows) == 1)
        client.close()
        await until(lambda: not len(site.edge.flows))
        await until(lambda: not site.edge._errands)
        assert await _unheard(site, rid) is None
        site.worker.room = 1
        _, events, _ = await stays
        assert events[-1].data == "[DONE]"


async def test_a_listener_on_its_way_out_is_waited_for(site: Site) -> None:
    """As is this gateway itself: it unsubscribes on another connection."""
    site.worker.room = 0
    rid, client = await _ask(site)
    listener = site.store.client.pubsub()
    await listener.subscribe(keys.log(rid))
    assert await listener.get_message(timeout=2)
    client.close()
    await until(lambda: not len(site.edge.flows))
    await asyncio.sleep(0.05)
    assert await _unheard(site, rid) is None
    await listener.aclose()  # type: ignore[no-untyped-call]
    await until(lambda: _unheard(site, rid))


async def test_a_drained_gateway_leaves_what_it_hands_over(site: Site) -> None:
    site.worker.room = 0
    rid, _ = await _ask(site)
    await site.server.drain(0)
    await until(lambda: _unheard(site, rid))


async def _ask(site: Site) -> tuple[str, aiohttp.ClientResponse]:
    reply = await site.http.post(
        site.url("/infer_stream"), json=BODY, headers={"X-Resumable": str(GRACE_S)}
    )
    assert reply.status == 200
    return reply.headers["X-Request-Id"], reply


async def _unheard(site: Site, rid: str) -> bytes | None:
    client: Any = site.store.client
    found: bytes | None = await client.hget(keys.request(rid), "unheard")
    return found


async def _noted(site: Site, rid: str, later_than: int) -> int:
    async def noted() -> bool:
        return int(await _unheard(site, rid) or 0) > later_than

    await until(noted)
    return int(await _unheard(site, rid) or 0)
