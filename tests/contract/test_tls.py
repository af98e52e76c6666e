"""TLS to real servers: certificates and names are verified, one server and Sentinel alike."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import aiohttp
import pytest
from certificates import Certificates
from cluster import Cluster, free_port
from gateway_site import letters
from required import needs
from sentinel import PASSWORD, Member, Replicated

from gateway.pubsub import PubSubConnection
from realtime_serve.lifeline import Lifeline
from realtime_serve.redis_server import check_server
from shared import keys
from shared.errors import StoreUnavailable
from shared.settings import Settings, SettingsError
from shared.store import Store, connect

BODY = {"model": "echo", "prompt": "hello", "max_tokens": 10, "seed": 5}

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(autouse=True)
def _redis_server() -> None:
    # Valkey's build on PyPI has no TLS.
    needs("redis-server")


@contextmanager
def serving(folder: Path, certificates: Certificates) -> Iterator[Member]:
    config = folder / "server.conf"
    port = free_port()
    config.write_text(
        certificates.server_lines(port)
        + f'bind 127.0.0.1\ndir "{folder}"\nsave ""\nrequirepass "{PASSWORD}"\nappendonly yes\n'
        "maxmemory-policy noeviction\n"
    )
    lifeline = Lifeline()
    server = Member(["redis-server", str(config)], port, folder, lifeline, certificates)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        lifeline.close()


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


def url(server: Member, options: str) -> str:
    return f"rediss://:p%40ss%2Fword@127.0.0.1:{server.port}/0?{options}"


async def identity(address: str) -> bytes:
    store = Store(connect(address, timeout_s=5))
    try:
        return await store.identity()
    finally:
        await store.close()


async def test_both_sides_are_verified(tmp_path: Path, certificates: Certificates) -> None:
    with serving(tmp_path, certificates) as server:
        assert await identity(url(server, certificates.options()))
        assert server.client.exists(keys.IDENTITY)
        # The server asks for a certificate, and nothing else is wrong.
        with pytest.raises(StoreUnavailable, match=r"(?i)certificate.required|closed|reset"):
            await identity(url(server, certificates.options(client=False)))
        with pytest.raises(StoreUnavailable):
            await identity(f"redis://:p%40ss%2Fword@127.0.0.1:{server.port}/0")


@pytest.mark.parametrize("system", [False, True])
async def test_only_the_named_authority_is_trusted(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, system: bool
) -> None:
    (tmp_path / "other").mkdir()
    other = Certificates(tmp_path / "other")
    if system:
        # One whom the system trusts has signed the server's certificate: that does not count.
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
    with serving(tmp_path, certificates) as server:
        mine = certificates.options().replace(quote(str(certificates.ca), safe=""), "{ca}")
        address = url(server, mine.format(ca=quote(str(other.ca), safe="")))
        with pytest.raises(StoreUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            await identity(address)
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
            await subscribe(address)
        # Without a name of one it does.
        bare = url(server, mine.replace("ssl_ca_certs={ca}&", ""))
        if system:
            assert await identity(bare)
            await subscribe(bare)


async def subscribe(address: str) -> None:
    """As gateways do; returns once it is up."""
    connection = PubSubConnection(
        address, on_message=lambda *_: None, on_subscribed=lambda _: None, channels=list
    )
    running = asyncio.create_task(connection._connected())
    try:
        while not connection.up:
            await asyncio.wait([running], timeout=0.02)
            if running.done():
                running.result()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_certificate_may_be_away_for_a_moment(
    tmp_path: Path, certificates: Certificates
) -> None:
    with serving(tmp_path, certificates) as server:
        address = url(server, certificates.options())
        away = certificates.ca.with_suffix(".new")
        certificates.ca.rename(away)
        with pytest.raises(StoreUnavailable, match="No such file"):
            await identity(address)
        with pytest.raises(OSError, match="No such file"):
            await subscribe(address)
        with pytest.raises(SettingsError, match="ssl_ca_certs names no file"):
            Settings.load({"RTS_REDIS_URL": address})
        away.rename(certificates.ca)
        assert await identity(address)


async def test_a_certificate_of_another_host_is_refused(tmp_path: Path) -> None:
    elsewhere = Certificates(tmp_path, host="redis.elsewhere.test")
    with (
        serving(tmp_path, elsewhere) as server,
        pytest.raises(StoreUnavailable, match=r"(?i)mismatch"),
    ):
        await identity(url(server, elsewhere.options()))


async def test_a_cluster_serves_through_tls(tmp_path: Path, certificates: Certificates) -> None:
    with serving(tmp_path, certificates) as server, Cluster(tmp_path / "cluster") as cluster:
        address = url(server, certificates.options())
        assert await asyncio.to_thread(check_server, address) == []
        for role in ("gateway", "worker", "control"):
            cluster.start(role, redis_url=address)
        cluster.wait()
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{cluster.url}/infer", json=BODY) as reply,
        ):
            assert (await reply.json())["text"] == letters(5, 10)
        assert server.client.xlen(keys.ENDED) == 1


async def test_a_cluster_follows_a_failover_with_tls(
    tmp_path: Path, certificates: Certificates
) -> None:
    with (
        Replicated(tmp_path / "servers", "redis-server", tls=certificates) as servers,
        Cluster(tmp_path / "cluster") as cluster,
    ):
        for role in ("gateway", "worker", "control"):
            cluster.start(role, redis_url=servers.url)
        cluster.wait()
        async with aiohttp.ClientSession() as http:

            async def answer() -> str:
                async with http.post(f"{cluster.url}/infer", json=BODY) as reply:
                    return str((await reply.json()).get("text"))

            assert await answer() == letters(5, 10)
            old = servers.primary()
            old.kill()
            await asyncio.to_thread(servers.wait_for_failover, old)
            async with asyncio.timeout(30):
                while await answer() != letters(5, 10):
                    await asyncio.sleep(0.1)
