"""What happens between the processes and Redis."""

from __future__ import annotations

import asyncio
import re
import subprocess
from urllib.parse import urlsplit, urlunsplit

from chaos.netproxy import NetProxy
from chaos.play import Scenario, Stage, Stalls


def through(url: str, port: int) -> str:
    """The server's address by way of a proxy."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f":{parts.password}@127.0.0.1:{port}"))


async def lose_messages(stage: Stage) -> None:
    """One in ten pub/sub messages never arrives at the gateway."""
    world, load = stage.world, stage.load
    proxy = await behind_proxy(stage)
    await gateway_behind(stage, proxy)
    async with load.running():
        async for _ in stage.each_round():
            world.mark()
            before, proxy.loss = proxy.lost, 0.1
            await asyncio.sleep(1.5)
            proxy.loss = 0.0
            stage.proof(proxy.lost - before, "messages lost")


async def cut(stage: Stage) -> None:
    """Connections of one gateway to Redis are reset in the middle of what they carry, often."""
    world, load = stage.world, stage.load
    proxy = await behind_proxy(stage)
    await gateway_behind(stage, proxy)
    async with load.running():
        async for _ in stage.each_round():
            for _ in range(5):
                await load.under_way()
                world.mark()
                stage.proof(proxy.cut(), "connections cut")
                await asyncio.sleep(0.7)


async def half_open(stage: Stage) -> None:
    """The gateway's connections go silent and are never closed; new ones work after a moment."""
    world, load = stage.world, stage.load
    proxy = await behind_proxy(stage)
    await gateway_behind(stage, proxy)
    async with load.running():
        async for _ in stage.each_round():
            world.mark()
            stage.proof(proxy.silence(), "connections gone silent")
            await asyncio.sleep(0.4)
            proxy.heal()
            await asyncio.sleep(2.0)


async def worker_half_open(stage: Stage) -> None:
    """The same for one worker: its streams go on elsewhere, and it comes back."""
    world, load = stage.world, stage.load
    proxy = await behind_proxy(stage)
    world.start("worker", redis_url=through(world.redis.url, proxy.port))
    await world.ready(2)
    async with load.running():
        async for _ in stage.each_round():
            world.mark()
            stage.proof(proxy.silence(), "connections gone silent")
            await asyncio.sleep(2.5)
            proxy.heal()
            await asyncio.sleep(3.0)


async def drop_packets(stage: Stage) -> None:
    """The kernel drops every packet of the established connections, for both sides."""
    world, load = stage.world, stage.load
    port = urlsplit(world.redis.url).port
    table = f"chaos{port}"
    rules = f"""
    table inet {table} {{
        set broken {{ type inet_service; }}
        chain out {{
            type filter hook output priority 0;
            tcp sport @broken tcp dport {port} counter drop
            tcp sport {port} tcp dport @broken counter drop
        }}
    }}
    """
    _nft(rules)
    try:
        async with load.running():
            async for _ in stage.each_round():
                own = {
                    c["addr"].rpartition(":")[2]
                    for c in world.client.client_list()
                    if c["id"] == str(world.client.client_id())
                }
                ports = {c["addr"].rpartition(":")[2] for c in world.client.client_list()} - own
                world.mark()
                element = f"add element inet {table} broken {{ {', '.join(sorted(ports))} }}"
                _nft(element)
                before = _dropped(table)
                await asyncio.sleep(7.0)
                stage.proof(_dropped(table) - before, "packets dropped")
    finally:
        _nft(f"delete table inet {table}")


async def behind_proxy(stage: Stage) -> NetProxy:
    """A proxy in front of the server, for whoever is started by way of it."""
    port = urlsplit(stage.world.redis.url).port
    assert port is not None
    return await stage.stack.enter_async_context(NetProxy(port, stage.chance()))


def _dropped(table: str) -> int:
    """Packets that the table has dropped."""
    told = subprocess.run(
        ["nft", "list", "table", "inet", table], capture_output=True, text=True, check=True
    ).stdout
    return sum(int(count) for count in re.findall(r"counter packets (\d+)", told))


def _nft(rules: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)


async def gateway_behind(stage: Stage, proxy: NetProxy) -> None:
    world = stage.world
    world.start("gateway", redis_url=through(world.redis.url, proxy.port))
    await world.ready(2)


SCENARIOS = (
    Scenario("pub/sub messages lost", lose_messages, fast=1, gateways=0, tcp=True),
    Scenario(
        "connections of a gateway reset",
        cut,
        gateways=0,
        tcp=True,
        # The tenth time as the first: what it waits before it connects again does not grow.
        most_stall=Stalls(most=0.8),
    ),
    Scenario("connections of a gateway half-open", half_open, gateways=0, tcp=True),
    Scenario(
        "connections of a worker half-open", worker_half_open, workers=1, tcp=True, stalls="moved"
    ),
    Scenario(
        "half-open, packets dropped by the kernel",
        drop_packets,
        fast=1,
        tcp=True,
        programs=("nft",),
        root=True,
    ),
)
