"""The control process: an arq worker that runs the janitor and the settling as cron jobs."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from pathlib import Path
from typing import Any

import msgspec
from arq import cron
from arq.connections import ArqRedis
from arq.worker import Worker
from redis.exceptions import RedisError

from control.janitor import sweep
from control.settling import settle
from shared.errors import StoreUnavailable
from shared.logging import setup_logging
from shared.settings import Settings
from shared.store import Store, connect

log = logging.getLogger(__name__)

EVERY_SECOND = set(range(60))
QUEUE = "rts:arq"
REDIS_TIMEOUT_S = 5.0
RETRY_S = 1.0
"""Pause before the worker is started again after Redis was away."""


def main(settings: Settings) -> int:
    """Runs the control process until SIGTERM or SIGINT; returns the exit status."""
    setup_logging(settings, "control")
    if file := _heartbeat_file(settings):
        try:
            # What an earlier process left behind is no sign of this one.
            file.unlink(missing_ok=True)
            file.touch()
        except OSError as error:
            log.error(f"RTS_HEARTBEAT_FILE cannot be written: {error}")
            return 1
    return asyncio.run(_run(settings))


async def _run(settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    store = Store(connect(settings.redis_url, timeout_s=REDIS_TIMEOUT_S))
    stopping = asyncio.create_task(stop.wait())
    # One for all workers: calls of one that failed may go on, and connect once more.
    queue = _queue(settings)
    heartbeat = _heartbeat_file(settings)
    try:
        while not stop.is_set():
            # Without Redis, too: a new process would not bring that back.
            _beat(heartbeat)
            worker = _worker(queue, store, heartbeat)
            running = asyncio.create_task(worker.async_run())
            await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                running.cancel()
            outcome = (await asyncio.gather(running, return_exceptions=True))[0]
            # Its jobs may have been cut off: their CancelledError is not this process's.
            await asyncio.gather(worker.close(), return_exceptions=True)
            if not stop.is_set():
                # arq's worker ends when Redis goes away; this process waits for it to come back.
                log.warning("control lost Redis", extra={"error": repr(outcome)})
                await asyncio.wait([stopping], timeout=RETRY_S)
    finally:
        stopping.cancel()
        # arq leaves it open when Redis is away.
        await queue.aclose(close_connection_pool=True)
        await store.close()
    return 0


def _heartbeat_file(settings: Settings) -> Path | None:
    return Path(settings.heartbeat_file).expanduser() if settings.heartbeat_file else None


def _beat(file: Path | None) -> None:
    if file is None:
        return
    try:
        file.touch()
    except OSError as error:
        log.warning("the heartbeat file cannot be written", extra={"error": str(error)})


class _Beating(Worker):
    """arq's worker, which shows by a file that it still looks for jobs."""

    def __init__(self, file: Path | None, **options: Any) -> None:
        super().__init__(**options)
        self._file = file

    async def heart_beat(self) -> None:
        """Called by arq every half a second."""
        _beat(self._file)
        await super().heart_beat()


def _queue(settings: Settings) -> ArqRedis:
    # arq's own reading of a URL keeps %40 in a password as it is and ignores the query.
    pool = connect(settings.redis_url, timeout_s=REDIS_TIMEOUT_S).connection_pool
    return ArqRedis(
        pool,
        # arq pickles by default; whoever can write to Redis must not be able to run code here.
        job_serializer=msgspec.msgpack.Encoder(enc_hook=_text_of).encode,
        job_deserializer=msgspec.msgpack.decode,
        default_queue_name=QUEUE,
    )


def _text_of(result: object) -> str:
    # The result of a job that arq could not run: it serializes what it does not keep, too.
    if isinstance(result, Exception):
        return repr(result)
    raise NotImplementedError


def _worker(queue: ArqRedis, store: Store, heartbeat: Path | None) -> Worker:
    return _Beating(
        heartbeat,
        cron_jobs=[
            cron(janitor, second=EVERY_SECOND, timeout=10),
            cron(settling, second=EVERY_SECOND, timeout=60),
        ],
        redis_pool=queue,
        queue_name=QUEUE,
        health_check_key=f"{QUEUE}:health",
        job_serializer=queue.job_serializer,
        job_deserializer=queue.job_deserializer,
        handle_signals=False,
        keep_result=0,
        on_startup=_ready,
        ctx={"store": store, "name": f"{socket.gethostname()}-{os.getpid()}"},
    )


async def _ready(ctx: dict[str, Any]) -> None:
    log.info("ready")


async def janitor(ctx: dict[str, Any]) -> None:
    """Cron job, each second, once however many control processes there are."""
    try:
        done = await sweep(ctx["store"])
    except (StoreUnavailable, RedisError) as error:
        log.warning("janitor could not finish", extra={"error": str(error)})
        return
    if any(done.values()):
        log.info("janitor", extra=done)


async def settling(ctx: dict[str, Any]) -> None:
    """Cron job, each second: settles what has ended since."""
    try:
        await settle(ctx["store"], ctx["name"])
    except (StoreUnavailable, RedisError) as error:
        log.warning("settling could not finish", extra={"error": str(error)})
