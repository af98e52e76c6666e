"""What a token costs the server: one emit for a whole step, with readers on every channel.

`python -m benchmarks.emit` writes benchmarks/results/emit.md.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from gateway.hub import Hub, Subscription
from realtime_serve.redis_server import RedisServer, find_binary
from shared import keys, messages
from shared.store import Emission, Store, connect

RESULTS = Path(__file__).parent / "results" / "emit.md"
MODEL, VERSION, ENGINE = "echo", "1", "engine-1"
STREAMS = (1, 8, 64, 256)
STEPS = 1000
ROUNDS = 3


async def measure(server: RedisServer, streams: int, steps: int = STEPS) -> tuple[float, float]:
    """Microseconds of the server's CPU a token, and of wall time a call; empties the server."""
    store = Store(connect(server.url, timeout_s=5))
    await store.client.flushall()
    hub = Hub(server.url, store)
    await hub.start()
    while not hub.healthy:  # noqa: ASYNC110  (it tells nobody)
        await asyncio.sleep(0.01)
    mv = keys.model_version(MODEL, VERSION)
    await store.client.set(keys.is_open(mv), "1")
    readers = []
    for number in range(streams):
        request = messages.Request(
            messages.VERSION, f"{number:032d}", MODEL, VERSION, f"c{number}", [1], _sampling()
        )
        readers.append(await hub.subscribe(request.rid))
        await store.enqueue(
            request,
            cls="normal",
            timeout_ms=600_000,
            grace_ms=60_000,
            keep_ms=60_000,
            attempt="",
            queue_limit=10_000,
            queue_bytes=1 << 30,
            resumable=False,
        )
    epochs: dict[str, int] = {}
    while len(epochs) < streams:
        take = await store.take(mv, ENGINE, streams, lease_ms=60_000, aging_ms=60_000)
        epochs |= {taken.rid: taken.epoch for taken in take.requests}
    reading = [asyncio.create_task(_drain(reader, steps)) for reader in readers]
    process = psutil.Process(server.pid)
    before, began = process.cpu_times(), time.perf_counter()
    for step in range(1, steps + 1):
        token = messages.encode(
            messages.Tokens(messages.VERSION, step, [messages.Token(0, step, " word")])
        )
        _, answers = await store.emit(
            mv,
            ENGINE,
            [Emission(rid, epoch, step, step, token, step) for rid, epoch in epochs.items()],
        )
        assert all(answer.outcome == "ok" for answer in answers)
    wall_s = time.perf_counter() - began
    after = process.cpu_times()
    await asyncio.gather(*reading)
    await hub.close()
    await store.close()
    cpu_s = after.user - before.user + after.system - before.system
    return cpu_s * 1e6 / (steps * streams), wall_s * 1e6 / steps


def _sampling() -> messages.Sampling:
    return messages.Sampling(max_tokens=STEPS)


async def _drain(reader: Subscription, last: int) -> None:
    while reader.last < last:
        await reader.next()


def main() -> None:
    """Measures each number of streams, in turns, and writes the table."""
    binary, _ = find_binary()
    found: dict[int, list[tuple[float, float]]] = {streams: [] for streams in STREAMS}
    with tempfile.TemporaryDirectory() as folder, RedisServer.start(binary, Path(folder)) as server:
        for _ in range(ROUNDS):
            for streams in STREAMS:
                found[streams].append(asyncio.run(measure(server, streams)))
    lines = [
        "# What a token costs the server",
        "",
        f"Written by `python -m benchmarks.emit`: {binary}, append-only file, one emit a step for",
        f"all streams, a gateway's hub subscribed to each; {STEPS} steps, median of {ROUNDS}.",
        "",
        "| streams | server CPU a token (us) | a call (us) |",
        "|---|---|---|",
    ]
    for streams, rounds in found.items():
        cpu, wall = (statistics.median(values) for values in zip(*rounds, strict=True))
        lines.append(f"| {streams} | {cpu:.1f} | {wall:,.0f} |")
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
