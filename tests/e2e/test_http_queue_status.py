"""`event: queue_status`: what a stream waits for, told to who asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gateway_site import Site, letters, open_site, until

from realtime_serve.redis_server import RedisServer, find_binary
from shared import keys, messages
from shared.store import Emission

BODY = {"model": "echo", "prompt": "hello", "max_tokens": 3, "seed": 5}
ASKS = {"X-Queue-Status": "1"}


class Blocks:
    """A stream's blocks, one by one; keep-alives are left out."""

    def __init__(self, content: Any) -> None:
        self._content = content

    async def next(self) -> dict[str, str]:
        """The fields of the next block."""
        fields: dict[str, str] = {}
        while line := (await self._content.readline()).decode().rstrip("\n"):
            name, _, value = line.partition(": ")
            if name:
                fields[name] = value
        return fields

    async def status(self) -> Any:
        """Data of the next block, which must be a report."""
        async with asyncio.timeout(10):
            block = await self.next()
        assert set(block) == {"event", "data"}, block
        assert block["event"] == "queue_status"
        return json.loads(block["data"])

    async def rest(self) -> list[dict[str, str]]:
        """All further blocks."""
        blocks = []
        while not blocks or blocks[-1].get("data") != "[DONE]":
            blocks.append(await self.next())
        return blocks


@asynccontextmanager
async def stream(
    site: Site, path: str = "/infer_stream", body: Any = None, **headers: str
) -> AsyncIterator[Blocks]:
    async with site.http.post(site.url(path), json=body or BODY, headers=headers) as reply:
        assert reply.status == 200, await reply.text()
        yield Blocks(reply.content)


def text_of(blocks: list[dict[str, str]]) -> str:
    """Of the tokens behind, which must be all of them, each once."""
    tokens = [block for block in blocks if "index" in block.get("data", "")]
    assert [block["id"] for block in tokens] == [str(i + 1) for i in range(len(tokens))]
    return "".join(json.loads(block["data"])["token"] for block in tokens)


async def test_who_asks_hears_its_place_and_others_do_not(redis_url: str) -> None:
    async with open_site(redis_url, keep_alive_s=0.05) as site:
        site.worker.room = 0
        async with stream(site) as plain, stream(site, **ASKS) as asking:
            report = await asking.status()
            rid = report.pop("request_id")
            assert report == {"status": "queued", "position": 2, "eta_s": None, "workers": 1}
            assert [rid] == [flow.rid for flow in site.edge.flows if flow.queue_status]
            # Nothing changes, so nothing is said.
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2.5):
                    await asking.next()
            site.worker.room = 8
            assert text_of(await asking.rest()) == letters(5, 3)
            blocks = await plain.rest()
            assert text_of(blocks) == letters(5, 3)
            assert not any("event" in block for block in blocks)


async def test_a_model_without_workers(redis_url: str) -> None:
    """Scaled to zero: the stream hears that nobody serves, that somebody came, and its tokens."""
    async with open_site(redis_url, keep_alive_s=0.05) as site:
        worker = site.worker
        worker.room, worker.beating = 0, False
        await site.store.depart(worker.mv, worker.engine)
        await until(lambda: not site.edge.census.of(worker.mv).engines)
        async with stream(site, **ASKS) as asking:
            assert (await asking.status())["workers"] == 0
            worker.beating = True
            report = await asking.status()
            assert (report["workers"], report["position"]) == (1, 1)
            worker.room = 8
            assert text_of(await asking.rest()) == letters(5, 3)


async def test_a_place_comes_nearer_with_an_expected_wait(redis_url: str) -> None:
    async with open_site(redis_url) as site:
        site.worker.room = 0
        before = [asyncio.create_task(site.post("/infer", BODY)) for _ in range(8)]
        await until(lambda: _is_waiting(site, 8))
        async with stream(site, **ASKS) as asking:
            reports = [await asking.status()]
            assert reports[0]["position"] == 9
            # Three or so a second, so that each report has another place.
            site.worker.step_s, site.worker.room = 0.1, 1
            while reports[-1]["position"] > 6:
                reports.append(await asking.status())
            site.worker.step_s, site.worker.room = 0.001, 16
            assert text_of([b for b in await asking.rest() if "event" not in b]) == letters(5, 3)
        places = [report["position"] for report in reports]
        assert places == sorted(places, reverse=True)
        assert 0 < reports[-1]["eta_s"] < 60
        await asyncio.gather(*before)


async def test_a_worker_that_reads_a_prompt(redis_url: str) -> None:
    async with open_site(redis_url) as site:
        site.worker.frozen = True
        async with stream(site, "/v1/completions", {**BODY, "stream": True}, **ASKS) as asking:
            report = await asking.status()
            assert report.pop("request_id")
            assert report == {"status": "running", "prompt_tokens": 5, "computed_tokens": 0}
            site.worker.frozen = False
            chunks = [json.loads(block["data"]) for block in (await asking.rest())[:-1]]
            assert "".join(c["choices"][0]["text"] for c in chunks) == letters(5, 3)


async def test_how_much_of_a_prompt_is_read(redis_url: str) -> None:
    async with open_site(redis_url) as site:
        site.worker.frozen = True
        async with stream(site, **ASKS) as asking:
            assert (await asking.status())["computed_tokens"] == 0
            (rid,) = site.worker.running
            epoch = site.worker.running[rid].epoch
            rows = [Emission(rid, epoch, 1, 0, b"", 3)]
            await site.store.emit(site.worker.mv, site.worker.engine, rows)
            assert (await asking.status())["computed_tokens"] == 3
            # It has given them up.
            rows = [Emission(rid, epoch, 1, 0, b"", messages.WAITS)]
            await site.store.emit(site.worker.mv, site.worker.engine, rows)
            assert (await asking.status())["computed_tokens"] == 0
            site.worker.frozen = False
            assert text_of(await asking.rest()) == letters(5, 3)


async def test_handed_back_in_the_middle_it_waits_again(redis_url: str) -> None:
    """Its worker stops, so its version is one without workers, and not the gateway's any more."""
    async with open_site(redis_url) as site:
        worker = site.worker
        async with stream(site, body={**BODY, "max_tokens": 40}, **ASKS) as asking:
            worker.step_s = 0.02
            blocks = [await asking.next() for _ in range(3)]
            worker.frozen, worker.room = True, 0
            (rid,) = worker.running
            await site.store.release(worker.mv, worker.engine, [(rid, worker.running[rid].epoch)])
            worker.running.clear()
            while "event" not in (block := await asking.next()):
                blocks.append(block)
            report = json.loads(block["data"])
            assert (report["status"], report["position"]) == ("queued", 1)
            worker.frozen, worker.room = False, 8
            blocks += [b for b in await asking.rest() if "event" not in b]
            assert text_of(blocks) == letters(5, 40)


async def test_a_version_that_is_not_live_any_more(redis_url: str) -> None:
    """Its last workers serve its queue to the end, and gateways count the live version only."""
    async with open_site(redis_url) as site:
        old = site.worker
        # Those before have been taken: the number of the next one is not its place.
        await asyncio.gather(*(site.post("/infer", BODY) for _ in range(4)))
        old.room, old.beating = 0, False
        async with stream(site, **ASKS) as asking:
            client: Any = site.store.client
            await site.store.publish_model(msgspec.structs.replace(old.card, version="2"))
            await client.hset(keys.model("echo"), "live", "2")
            await until(lambda: site.edge.models.served()[0].version == "2")
            report = await asking.status()
            assert (report["position"], report["workers"]) == (1, 1)
            old.room = 8
            assert text_of(await asking.rest()) == letters(5, 3)


async def test_it_goes_on_after_an_outage_of_redis(tmp_path: Path) -> None:
    binary, _ = find_binary()
    with RedisServer.start(binary, tmp_path) as own:
        async with open_site(own.url) as site:
            site.worker.room = 0
            async with stream(site, **ASKS) as asking:
                own.kill()
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(2.5):
                        await asking.next()
                own.restart()
                assert (await asking.status())["position"] == 1
                site.worker.room = 8
                assert text_of(await asking.rest()) == letters(5, 3)


async def test_a_resumed_stream_can_ask_too(redis_url: str) -> None:
    async with open_site(redis_url) as site:
        site.worker.room = 0
        async with stream(site, **{"X-Resumable": "30"}):
            (flow,) = site.edge.flows
            url = site.url(f"/requests/{flow.rid}/stream")
            async with site.http.get(url, headers=ASKS) as reply:
                blocks = Blocks(reply.content)
                assert (await blocks.status())["position"] == 1
                site.worker.room = 8
                assert text_of(await blocks.rest()) == letters(5, 3)


@pytest.mark.parametrize(
    ("path", "value"), [("/infer_stream", "yes"), ("/infer_stream", ""), ("/infer", "1")]
)
async def test_it_is_one_or_nothing_and_for_streams(redis_url: str, path: str, value: str) -> None:
    async with open_site(redis_url) as site:
        status, reply, _ = await site.post(path, BODY, {"X-Queue-Status": value})
        assert (status, reply["error"]["param"]) == (400, "X-Queue-Status")
        status, _, _ = await site.post("/infer", BODY, {"X-Queue-Status": "0"})
        assert status == 200


async def _is_waiting(site: Site, count: int) -> bool:
    return (await site.counts())[0] == count
