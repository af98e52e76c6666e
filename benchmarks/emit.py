"""What a token costs the server: one emit for a whole step, with readers on every channel.

Beside it, in turns, the least that keeps and delivers a token, without any check: XADD and PUBLISH
in one pipeline a step. A machine's speed changes from hour to hour; the ratio of the two hardly.

`python -m benchmarks.emit` writes benchmarks/results/emit.md.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import psutil

from benchmarks.server import cpu_s
from gateway.hub import Hub, Subscription
from realtime_serve.redis_server import RedisServer, find_binary
from shared import keys, messages
from shared.store import Emission, Store, connect

RESULTS = Path(__file__).parent / "results" / "emit.md"
MODEL, VERSION, ENGINE = "echo", "1", "engine-1"
STREAMS = (1, 8, 64, 256)
STEPS = 1000
ROUNDS = 5


Step = Callable[[int, bytes], Awaitable[None]]
"""Sends one step: its number, from 1, and the message of its token, the same for every stream."""


async def measure(
    server: RedisServer, streams: int, *, bare: bool = False, steps: int = STEPS
) -> tuple[float, float]:
    """Microseconds of the server's CPU a token, and of wall time a call; empties the server.

    `bare` sends by XADD and PUBLISH instead of emit.
    """
    store = Store(connect(server.url, timeout_s=5))
    await store.client.flushall()
    hub = Hub(server.url, store)
    await hub.start()
    while not hub.healthy:  # noqa: ASYNC110  (it tells nobody)
        await asyncio.sleep(0.01)
    rids = [f"{number:032d}" for number in range(streams)]
    readers = [await hub.subscribe(rid) for rid in rids]
    send = _pipeline(store, rids) if bare else await _emit(store, rids)
    reading = [asyncio.create_task(_drain(reader, steps)) for reader in readers]
    process = psutil.Process(server.pid)
    before, began = cpu_s(process), time.perf_counter()
    for step in range(1, steps + 1):
        token = messages.encode(
            messages.Tokens(messages.VERSION, step, [messages.Token(0, step, " word")])
        )
        await send(step, token)
    wall_s = time.perf_counter() - began
    used_s = cpu_s(process) - before
    await asyncio.gather(*reading)
    await hub.close()
    await store.close()
    return used_s * 1e6 / (steps * streams), wall_s * 1e6 / steps


async def _emit(store: Store, rids: Sequence[str]) -> Step:
    """Queues and takes a request for each id; sends by emit."""
    mv = keys.model_version(MODEL, VERSION)
    await store.client.set(keys.is_open(mv), "1")
    for number, rid in enumerate(rids):
        await store.enqueue(
            messages.Request(messages.VERSION, rid, MODEL, VERSION, f"c{number}", [1], _sampling()),
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
    while len(epochs) < len(rids):
        take = await store.take(mv, ENGINE, len(rids), lease_ms=60_000, aging_ms=60_000)
        epochs |= {taken.rid: taken.epoch for taken in take.requests}

    async def send(step: int, token: bytes) -> None:
        _, answers = await store.emit(
            mv,
            ENGINE,
            [Emission(rid, epoch, step, step, token, step) for rid, epoch in epochs.items()],
        )
        assert all(answer.outcome == "ok" for answer in answers)

    return send


def _pipeline(store: Store, rids: Sequence[str]) -> Step:
    """Sends by XADD and PUBLISH, of everything in one pipeline."""
    logs = [keys.log(rid) for rid in rids]

    async def send(step: int, token: bytes) -> None:
        pipeline = store.client.pipeline(transaction=False)
        for log in logs:
            pipeline.execute_command("XADD", log, f"{step}-0", "d", token)
            pipeline.execute_command("PUBLISH", log, b"%d-0 %b" % (step, token))
        await pipeline.execute()

    return send


def _sampling() -> messages.Sampling:
    return messages.Sampling(max_tokens=STEPS)


async def _drain(reader: Subscription, last: int) -> None:
    while reader.last < last:
        await reader.next()


def main() -> None:
    """Measures each number of streams, both ways, in turns, and writes the table."""
    binary, _ = find_binary()
    found: dict[int, tuple[list[tuple[float, float]], list[float]]] = {
        streams: ([], []) for streams in STREAMS
    }
    with tempfile.TemporaryDirectory() as folder, RedisServer.start(binary, Path(folder)) as server:
        for _ in range(ROUNDS):
            for streams, (emits, bares) in found.items():
                emits.append(asyncio.run(measure(server, streams)))
                bares.append(asyncio.run(measure(server, streams, bare=True))[0])
    lines = [
        "# What a token costs the server",
        "",
        f"Written by `python -m benchmarks.emit`: {binary}, append-only file, one emit a step for",
        f"all streams, a gateway's hub subscribed to each; {STEPS} steps, median of {ROUNDS}.",
        "Bare: XADD and PUBLISH in one pipeline a step, with no check of anything.",
        "",
        "| streams | server CPU a token (us) | bare (us) | ratio | a call of emit (us) |",
        "|---|---|---|---|---|",
    ]
    for streams, (emits, bares) in found.items():
        cpu, wall = (statistics.median(values) for values in zip(*emits, strict=True))
        bare = statistics.median(bares)
        ratio = statistics.median(e / b for (e, _), b in zip(emits, bares, strict=True))
        lines.append(f"| {streams} | {cpu:.1f} | {bare:.1f} | {ratio:.2f} | {wall:,.0f} |")
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
