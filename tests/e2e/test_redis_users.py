"""A cluster whose processes each have a user of their own, on servers that let nobody else in."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import poison_engine
import pytest
import redis
import sentinel
from cluster import ROOT, Cluster, Process, free_port
from gateway_site import letters, read_events, until
from required import server_program

from realtime_serve.lifeline import Lifeline
from shared.access import ROLES, acl_file

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]

BODY = {"model": "poison", "prompt": "hello", "seed": 9, "client_id": "ann"}


class Place:
    """A cluster with an ACL file; whatever a server refuses is in its ACL log."""

    def __init__(self, cluster: Cluster, switch: Path) -> None:
        self.cluster = cluster
        self.switch = switch
        self.admin = redis.Redis.from_url(cluster.redis.url, decode_responses=True)

    def url(self, user: str, password: str | None = None) -> str:
        return re.sub("//.*@", f"//{user}:{password or f'of-{user}'}@", self.cluster.redis.url)

    def start(self, role: str, **settings: int) -> Process:
        env = {"POISON": str(self.switch)}
        return self.cluster.start(role, redis_url=self.url(role), env=env, **settings)

    def refusals(self) -> list[Any]:
        return [
            (row["username"], row["reason"], row["object"], row["context"])
            for row in self.admin.acl_log()
        ]


@pytest.fixture(params=["valkey", "redis"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Nothing but a server with the users."""
    binary = server_program(request.param)
    settings: dict[str, Any] = {"lease_ms": 500, "requests_per_minute": 10_000}
    with Cluster(
        tmp_path, binary=binary, tcp=True, engine="poison_engine:Poison", **settings
    ) as cluster:
        it = Place(cluster, tmp_path / "poison")
        passwords = {role: f"of-{role}" for role in ROLES}
        # As a server would read it at its start.
        for line in acl_file(passwords).splitlines()[1:]:
            it.admin.execute_command("ACL SETUSER", *line.split()[1:])
        yield it


@pytest.fixture
def place(server: Place) -> Place:
    """A whole cluster on it."""
    for role in ("gateway", "worker", "control"):
        server.start(role)
    server.cluster.wait()
    return server


async def test_everything_works_and_nothing_is_refused(place: Place) -> None:
    url = place.cluster.url
    async with aiohttp.ClientSession() as http:

        async def ask(path: str, headers: dict[str, str] | None = None, **more: Any) -> Any:
            async with http.post(url + path, json={**BODY, **more}, headers=headers) as reply:
                return reply.status, await reply.text(), reply.headers

        # Twice with one key: the second one attaches.
        for _ in range(2):
            _, text, _ = await ask("/infer_stream", {"Idempotency-Key": "k"}, max_tokens=20)
            assert "".join(e.data["text"] for e in read_events(text)[:-2]) == letters(9, 20)
        # A resumable stream whose reader leaves, cancelled by its id.
        resumable = {"X-Resumable": "30"}
        async with http.post(
            f"{url}/infer_stream", json={**BODY, "max_tokens": 5000}, headers=resumable
        ) as reply:
            await reply.content.readline()
            rid = reply.headers["X-Request-Id"]
        async with http.delete(f"{url}/requests/{rid}?client_id=ann") as reply:
            assert reply.status == 200, await reply.text()
        # A worker is killed, another one goes on, and hands its streams back when it is stopped.
        async with http.post(
            f"{url}/infer_stream", json={**BODY, "max_tokens": 1500}, headers=resumable
        ) as reply:
            line = await reply.content.readline()
            (first,) = (p for p in place.cluster.processes if p.role == "worker")
            first.kill()
            second = place.start("worker")
            await until(lambda: '"ready"' in second.log.read_text(), 20)
            await until(lambda: place.admin.hgetall(_owns(place)) != {}, 20)
            place.start("worker")
            second.signal(signal.SIGTERM)
            events = read_events((line + await reply.content.read()).decode())
            assert "".join(e.data["text"] for e in events[:-2]) == letters(9, 1500)
        # A request that kills three workers is a dead letter; the operator runs it again.
        place.switch.touch()
        deadly = {**BODY, "prompt": poison_engine.PROMPT, "max_tokens": 5}
        async with http.post(f"{url}/infer_stream", json=deadly) as reply:
            for _ in range(400):
                if place.admin.xlen("rts:dead"):
                    break
                if not any(
                    p.role == "worker" and p.popen.poll() is None for p in place.cluster.processes
                ):
                    place.start("worker")
                await asyncio.sleep(0.02)
            assert "engine_failed" in await reply.text()
            rid = reply.headers["X-Request-Id"]
        place.switch.unlink()
        assert operator(place, "list").splitlines()[1].startswith(rid)
        assert rid in operator(place, "replay", rid)
        if not any(p.role == "worker" and p.popen.poll() is None for p in place.cluster.processes):
            place.start("worker")
        async with http.get(f"{url}/requests/{rid}/stream?client_id=ann") as reply:
            assert read_events(await reply.text())[-1].data == "[DONE]"
        async with http.get(f"{url}/metrics") as reply:
            assert reply.status == 200
        # Without a replica nothing is accepted, but to wait for one is allowed.
        strict = place.start("gateway", strict=1)
        await until(lambda: place.cluster.get("/readyz", strict.port)[0] == 200, 20)
        async with http.post(
            f"http://127.0.0.1:{strict.port}/infer", json={**BODY, "max_tokens": 2}
        ) as reply:
            assert reply.status == 503, await reply.text()
            assert "not_replicated" in await reply.text()
    with redis.Redis.from_url(place.url("worker"), lib_name=None, lib_version=None) as worker:
        assert worker.pubsub_channels("rts:w:*"), "as the probe of deploy/k8s asks"
    # Control has settled what ended, and swept.
    await until(lambda: is_settled(place.admin), 20)
    assert place.refusals() == []


async def test_who_waits_is_told_and_lost_data_are_put_back_by_these_users(place: Place) -> None:
    url = place.cluster.url
    body = {**BODY, "max_tokens": 400}
    (worker,) = (p for p in place.cluster.processes if p.role == "worker")
    worker.kill()
    async with aiohttp.ClientSession() as http:
        async with http.post(
            f"{url}/infer_stream", json=body, headers={"X-Queue-Status": "1"}
        ) as reply:
            line = b""
            async with asyncio.timeout(20):
                while line != b"event: queue_status\n":
                    line = await reply.content.readline()
            place.start("worker")
            events = read_events((await reply.content.read()).decode())
            assert events[0].data["position"] == 1
            text = "".join(e.data["text"] for e in events[:-2] if "text" in e.data)
            assert text == letters(9, 400)
        async with http.post(f"{url}/infer_stream", json=body) as reply:
            line = await reply.content.readline()
            place.admin.flushall()
            events = read_events((line + await reply.content.read()).decode())
            assert "".join(e.data["text"] for e in events[:-2]) == letters(9, 400)
    assert place.refusals() == []


@pytest.mark.parametrize(
    ("role", "commands"),
    [
        (
            "gateway",
            [
                *("FLUSHALL", "KEYS *", "CONFIG GET *", "SET other 1", "GET other", "ACL LIST"),
                *("HSET rts:cards:m@1 e x", "SET rts:f:m@1 x", "XADD rts:dead * a 1"),
                *("SUBSCRIBE other", "PUBLISH rts:w:e x", "CLIENT KILL TYPE normal", "SHUTDOWN"),
            ],
        ),
        (
            "worker",
            [
                *("FLUSHDB", "SCAN 0", "GET rts:secret", "HGET rts:b:ann r", "GET other"),
                *("SET rts:settled:1 x", "SCRIPT FLUSH", "PUBLISH other x", "MONITOR"),
            ],
        ),
        ("control", ["FLUSHALL", "GET rts:secret", "SET rts:f:m@1 x", "GET rts:charge:a"]),
        ("operator", ["FLUSHALL", "GET rts:secret", "HGET rts:b:ann r", "KEYS *"]),
    ],
)
def test_a_role_may_do_nothing_else(server: Place, role: str, commands: list[str]) -> None:
    with redis.Redis.from_url(server.url(role)) as client:
        assert client.ping()
        for command in commands:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())
        # Nor within a script.
        with pytest.raises(
            redis.exceptions.ResponseError, match=r"(?i)permission|can't access|can't run"
        ):
            client.eval("return redis.call('GET', 'other')", 0)
    assert any(row[0] == role for row in server.refusals()), "they are logged"


@pytest.mark.parametrize("kind", ["valkey", "redis"])
def test_a_server_starts_with_the_file(tmp_path: Path, kind: str) -> None:
    binary = server_program(kind)
    file = tmp_path / "users.acl"
    file.write_text(acl_file({role: f"of-{role}" for role in ROLES}, admin=sentinel.PASSWORD))
    port = free_port()
    command = [str(binary.path), "--port", str(port), "--dir", str(tmp_path)]
    lifeline = Lifeline()
    server = sentinel.Member([*command, "--aclfile", str(file)], port, tmp_path, lifeline)
    try:
        server.start()
        assert {"default", *ROLES} == set(server.client.acl_users())
    finally:
        server.kill()
        lifeline.close()


def _owns(place: Place) -> str:
    (key,) = place.admin.keys("rts:owns:*") or ["rts:owns:none"]
    return key


def is_settled(admin: redis.Redis) -> bool:
    (group,) = admin.xinfo_groups("rts:ended")
    (last, _), *_ = admin.xrevrange("rts:ended", count=1)
    return group["pending"] == 0 and group["last-delivered-id"] == last


def operator(place: Place, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "realtime_serve.cli", "dead", *words],
        cwd=ROOT,
        env={"RTS_REDIS_URL": place.url("operator")},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
