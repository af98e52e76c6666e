"""The load: C clients in a closed loop, in a process of its own that costs little.

`python -m benchmarks.client` reads a job from its input, says "start" when the counted requests
begin and "end" when they are over, then the result, each on a line. What arrives is only stored
with its time; it is read and checked after the end (benchmarks/transcript.py).
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from dataclasses import dataclass
from typing import Any, cast

import uvloop

from benchmarks.companion import answer
from benchmarks.transcript import BadResponse, read_response

# With the end of the chunk before it: the head of a response may end in "0\r\n\r\n", too.
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_GOOD = b"HTTP/1.1 200 "
_CONNECT_S = 10.0


@dataclass(slots=True)
class Recording:
    """One request and what came back."""

    sent_at: float
    parts: list[bytes]
    times: list[float]


class Lane(asyncio.Protocol):
    """One client: a connection on which one request follows the other."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []
        self.error = ""
        self._clock = time.perf_counter
        self._waiting: list[bytes] = []
        self._no_start_after = 0.0
        self._over: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._parts: list[bytes] = []
        self._times: list[float] = []

    async def play(self, requests: list[bytes], no_start_after: float) -> None:
        """Sends each request when the one before has been answered; at least one."""
        self.recordings = []
        if self._transport is None:
            self.error = "the connection was closed before a request"
            return
        self._waiting = requests[::-1]
        self._no_start_after = no_start_after
        self._over = asyncio.get_running_loop().create_future()
        self._send()
        await self._over

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio's Protocol."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Stores; the only code that runs for each token."""
        self._times.append(self._clock())
        self._parts.append(data)
        if data.endswith(_LAST_CHUNK) or len(data) < len(_LAST_CHUNK):
            self._perhaps_complete()
        elif len(self._parts) == 1 and not data.startswith(_GOOD):
            self._end(f"refused: {data[:600]!r}")

    def connection_lost(self, error: Exception | None) -> None:
        """Part of asyncio's Protocol."""
        self._transport = None
        head = self._parts[0][:300] if self._parts else b""
        self._end(f"the connection was closed: {error or 'by the server'} {head!r}")

    def close(self) -> None:
        """Hangs up."""
        if self._transport is not None:
            self._transport.close()

    def _send(self) -> None:
        assert self._transport is not None
        self._parts, self._times = [], []
        self.recordings.append(Recording(self._clock(), self._parts, self._times))
        self._transport.write(self._waiting.pop())

    def _perhaps_complete(self) -> None:
        tail = b"".join(self._parts[-len(_LAST_CHUNK) :])
        if not tail.endswith(_LAST_CHUNK):
            return
        if self._waiting and self._clock() < self._no_start_after:
            self._send()
        else:
            self._end("")

    def _end(self, error: str) -> None:
        if self._over is not None and not self._over.done():
            self.error = error
            self._over.set_result(None)


async def play(job: dict[str, Any]) -> dict[str, Any]:
    """Runs a job and returns its result, see `benchmarks.load`."""
    warm_up, counted = _requests(job, job["warm_up"]), _requests(job, job["lanes"])
    async with asyncio.timeout(job["limit_s"]):
        early = await _connected(job)
        await _together(early, warm_up, float("inf"))
        for lane in early:
            lane.close()
        # A server may hang up on connections that waited for the last of the others.
        lanes = await _connected(job)
        gc.collect()
        gc.disable()
        answer("start")
        cpu, began = time.process_time(), time.perf_counter()
        await _together(lanes, counted, began + job["no_start_after_s"])
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        answer("end")
    for lane in lanes:
        lane.close()
    lanes += [lane for lane in early if lane.error]
    return {"seconds": seconds, "cpu_s": cpu, **_summary(lanes)}


async def _connected(job: dict[str, Any]) -> list[Lane]:
    loop = asyncio.get_running_loop()
    lanes = []
    for _ in job["lanes"]:
        async with asyncio.timeout(_CONNECT_S):
            _, lane = await loop.create_connection(Lane, job["host"], job["port"])
        lanes.append(lane)
    return lanes


async def _together(lanes: list[Lane], requests: list[list[bytes]], no_start_after: float) -> None:
    pairs = zip(lanes, requests, strict=True)
    await asyncio.gather(*(lane.play(of_lane, no_start_after) for lane, of_lane in pairs))


def _requests(job: dict[str, Any], bodies: list[list[str]]) -> list[list[bytes]]:
    head = (
        f"POST {job['path']} HTTP/1.1\r\nHost: {job['host']}:{job['port']}\r\n"
        "Content-Type: application/json\r\nContent-Length: "
    ).encode()
    of_lanes = ([body.encode() for body in of_lane] for of_lane in bodies)
    return [
        [b"%b%d\r\n\r\n%b" % (head, len(data), data) for data in of_lane] for of_lane in of_lanes
    ]


def _summary(lanes: list[Lane]) -> dict[str, Any]:
    errors = [lane.error for lane in lanes if lane.error]
    tokens, ttfts, gaps = [], [], []
    for lane in lanes:
        recordings = lane.recordings[:-1] if lane.error else lane.recordings
        for recording in recordings:
            try:
                timing = read_response(recording.parts, recording.times, recording.sent_at)
            except (BadResponse, ValueError, LookupError, AttributeError) as error:
                errors.append(f"{type(error).__name__}: {error}")
                continue
            tokens.append(timing.tokens)
            ttfts.append(round(timing.ttft_s * 1000, 3))
            gaps += [round(gap * 1000, 3) for gap in timing.gaps_s]
    return {"errors": errors, "tokens": tokens, "ttft_ms": ttfts, "gap_ms": gaps}


def main() -> int:
    """Runs the job on the standard input."""
    job = json.loads(sys.stdin.readline())
    try:
        answer(json.dumps(uvloop.run(play(job))))
    except (OSError, TimeoutError) as error:
        answer(json.dumps({"failed": f"{type(error).__name__}: {error}"}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
