"""`realtime-serve dead` on a real cluster whose workers really die over a request."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import poison_engine
import pytest
import redis
from cluster import ROOT, Cluster
from gateway_site import letters, read_events, until

from realtime_serve.redis_server import RedisServer, find_binary
from shared import messages

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]

SECRET = poison_engine.PROMPT
BODY = {"model": "poison", "prompt": SECRET, "max_tokens": 12, "seed": 9, "client_id": "ann"}
UNKNOWN = "0" * 32


@dataclass
class Ran:
    status: int
    out: str
    error: str


def dead(*words: str, **env: str) -> Ran:
    done = subprocess.run(
        [sys.executable, "-m", "realtime_serve.cli", "dead", *words],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=30,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


class Place:
    """A cluster, the poison's switch, and workers that are started again."""

    def __init__(self, cluster: Cluster, switch: Path) -> None:
        self.cluster = cluster
        self.switch = switch
        self.deaths = 0

    def dead(self, *words: str, **env: str) -> Ran:
        return dead(*words, RTS_REDIS_URL=self.cluster.redis.url, **env)

    @asynccontextmanager
    async def restarting(self) -> AsyncIterator[None]:
        async def keep() -> None:
            while True:
                worker = [p for p in self.cluster.processes if p.role == "worker"][-1]
                if worker.popen.poll() is not None:
                    self.deaths += 1
                    self.cluster.start("worker", env={"POISON": str(self.switch)})
                await asyncio.sleep(0.02)

        task = asyncio.create_task(keep())
        try:
            yield
        finally:
            task.cancel()

    async def fail(self, http: aiohttp.ClientSession, path: str = "/infer", **more: Any) -> str:
        """Has a request kill three workers; its id."""
        self.switch.touch()
        async with (
            self.restarting(),
            http.post(self.cluster.url + path, json={**BODY, **more}) as reply,
        ):
            text = await reply.text()
            found = json.loads(text) if reply.status != 200 else read_events(text)[-1].data
            assert found["error"]["code"] == "engine_failed", text
            assert reply.status == (502 if path == "/infer" else 200)
        self.switch.unlink()
        return reply.headers["X-Request-Id"]

    async def result(self, http: aiohttp.ClientSession, rid: str) -> str:
        url = f"{self.cluster.url}/requests/{rid}/stream?client_id=ann"
        async with http.get(url) as reply:
            assert reply.status == 200, await reply.text()
            events = read_events(await reply.text())
            assert events[-1].data == "[DONE]"
            return "".join(event.data["text"] for event in events[:-2])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("dead")
    # A worker that died is found by its lease, or sooner by its silence; not right after the start.
    with Cluster(folder, engine="poison_engine:Poison", lease_ms=500) as cluster:
        it = Place(cluster, folder / "poison")
        cluster.start("gateway")
        cluster.start("control")
        cluster.start("worker", env={"POISON": str(it.switch)})
        cluster.wait()
        yield it


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture(autouse=True)
def _no_letters(place: Place) -> None:
    with redis.Redis.from_url(place.cluster.redis.url) as client:
        client.delete("rts:dead")


async def test_a_letter_is_listed_shown_and_replayed(
    place: Place, http: aiohttp.ClientSession
) -> None:
    before = place.deaths
    rid = await place.fail(http)
    assert place.deaths == before + 3
    table = place.dead("list")
    assert (table.status, table.error) == (0, "")
    heading, row = table.out.splitlines()
    assert heading.split() == [
        *("id", "died", "model", "caller", "class", "deaths", "prompt", "tokens", "engine", "why")
    ]
    assert row.startswith(f"{rid}  ")
    (line,) = place.dead("list", "--json").out.splitlines()
    facts = json.loads(line)
    assert facts["id"] == rid
    assert (facts["caller"], facts["class"], facts["deaths"]) == ("id:ann", "normal", 3)
    assert facts["model"].startswith("poison@")
    assert facts["prompt_tokens"] == len(SECRET)
    assert "died without progress" in facts["why"]
    shown = place.dead("show", rid)
    request = json.loads(shown.out)["request"]
    assert shown.status == 0
    assert "prompt" not in request
    assert (request["sampling"]["max_tokens"], request["api"]) == (12, "infer")
    assert len(json.loads(place.dead("show", rid, "--prompt").out)["request"]["prompt"]) == 6

    replayed = place.dead("replay", rid, "--resumable-retention-s", "60")
    assert (replayed.status, replayed.error) == (0, "")
    assert f"/requests/{rid}/stream" in replayed.out
    assert await place.result(http, rid) == letters(9, 12)
    assert place.dead("list").out == "no dead letters\n"
    assert place.dead("list", "--json").out == ""
    # Also when its answer has long been there; its letter is gone.
    again = place.dead("replay", rid)
    assert (again.status, again.out) == (1, "")
    assert again.error == f"realtime-serve: error: {rid}: there is no dead letter of this request\n"


async def test_a_stream_gets_the_error_as_an_event_and_all_are_replayed_and_dropped(
    place: Place, http: aiohttp.ClientSession
) -> None:
    first = await place.fail(http, "/infer_stream")
    second = await place.fail(http, priority="high")
    listed = [json.loads(line) for line in place.dead("list", "--json").out.splitlines()]
    assert [(facts["id"], facts["class"]) for facts in listed] == [
        (first, "normal"),
        (second, "high"),
    ]
    done = place.dead("replay", "--all")
    assert (done.status, len(done.out.splitlines())) == (0, 2)
    for rid in (first, second):
        assert await place.result(http, rid) == letters(9, 12)
    third = await place.fail(http)
    dropped = place.dead("drop", UNKNOWN, third)
    assert dropped.status == 1
    assert dropped.out == f"{third}: dropped\n"
    assert UNKNOWN in dropped.error
    assert place.dead("drop", "--all").out == ""
    assert place.dead("list").out == "no dead letters\n"


async def test_a_replay_that_kills_again_is_a_new_letter(
    place: Place, http: aiohttp.ClientSession
) -> None:
    rid = await place.fail(http)
    place.switch.touch()
    async with place.restarting():
        assert (await asyncio.to_thread(place.dead, "replay", rid)).status == 0
        await until(lambda: is_listed(place, rid), 30)
    place.switch.unlink()
    assert place.dead("replay", rid).status == 0
    assert await place.result(http, rid) == letters(9, 12)


async def test_a_letter_of_another_request_under_the_same_id_stays(
    place: Place, http: aiohttp.ClientSession
) -> None:
    """A key that was used for something else before, long ago."""
    rid = await place.fail(http)
    with redis.Redis.from_url(place.cluster.redis.url) as client:
        ((_, letter),) = client.xrange("rts:dead")  # type: ignore[misc]
        request = messages.decode(letter[b"body"], messages.Request)
        other = messages.encode(msgspec.structs.replace(request, prompt=[5]))
        client.delete("rts:dead")
        for body in (other, letter[b"body"], letter[b"body"]):
            client.xadd("rts:dead", {**letter, b"body": body})
        done = place.dead("replay", rid)
        assert done.status == 0
        assert "1 older letters are of another request under this id" in done.out
        ((_, left),) = client.xrange("rts:dead")  # type: ignore[misc]
        assert left[b"body"] == other
    assert await place.result(http, rid) == letters(9, 12)


async def test_why_a_replay_is_refused(place: Place, http: aiohttp.ClientSession) -> None:
    rid = await place.fail(http)
    with redis.Redis.from_url(place.cluster.redis.url) as client:
        (mv,) = [key.decode().removeprefix("rts:open:") for key in client.keys("rts:open:*")]
        _, fields = client.xrange("rts:dead")[0]
        worker = [p for p in place.cluster.processes if p.role == "worker"][-1]
        worker.stop()
        client.delete(f"rts:open:{mv}")
        closed = place.dead("replay", rid)
        assert (closed.status, closed.out) == (1, "")
        assert f"{rid}: no worker of {mv} is known" in closed.error
        client.set(f"rts:open:{mv}", "1")
        # Nobody takes it now; and the letter comes again, as when the command died in between.
        assert place.dead("replay", rid).status == 0
        client.xadd("rts:dead", fields)
        running = place.dead("replay", rid)
        assert (running.status, "has not ended" in running.error) == (1, True)
        client.delete("rts:r:" + rid)
    assert place.dead("drop", rid).status == 0
    place.cluster.start("worker", env={"POISON": str(place.switch)})


def test_without_a_server(tmp_path: Path, place: Place) -> None:
    none = dead("list", RTS_DATA_DIR=str(tmp_path))
    assert (none.status, none.out) == (2, "")
    assert "RTS_REDIS_URL" in none.error
    assert str(tmp_path) in none.error
    away = dead("list", RTS_REDIS_URL=f"unix://{tmp_path}/none")
    assert (away.status, away.out) == (1, "")
    assert "redis is not available" in away.error
    assert dead("show").status == dead("drop").status == dead("replay").status == 2
    assert place.dead("show", UNKNOWN).status == 1


def test_the_server_of_up_is_found(tmp_path: Path) -> None:
    binary, _ = find_binary()
    with RedisServer.start(binary, tmp_path / "redis" / binary.kind, tcp=True) as server:
        with redis.Redis.from_url(server.url) as client:
            client.xadd("rts:dead", {"rid": "old", "body": b"\xff"})
        listed = dead("list", RTS_DATA_DIR=str(tmp_path))
        assert (listed.status, listed.error) == (0, "")
        assert "old" in listed.out
        unreadable = dead("replay", "old", RTS_DATA_DIR=str(tmp_path))
        assert unreadable.status == 1
        assert "cannot read a Request" in unreadable.error
        server.kill()
        assert dead("list", RTS_DATA_DIR=str(tmp_path)).status == 2
    assert not list(tmp_path.glob("redis/*/server.url"))


async def is_listed(place: Place, rid: str) -> bool:
    done = await asyncio.to_thread(place.dead, "list", "--json")
    return [json.loads(line)["id"] for line in done.out.splitlines()] == [rid]
