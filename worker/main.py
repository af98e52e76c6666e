"""The worker process: load a model, warm it up, serve until told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable

import uvloop
from tokenizers import Tokenizer

from shared import keys, messages
from shared.errors import StoreUnavailable
from shared.logging import setup_logging
from shared.settings import ModelSource, Settings, SettingsError
from shared.store import Store, connect
from shared.tasks import end
from worker.drain import Drain
from worker.driver import Driver, EngineStuck, EngineThread
from worker.engine import EngineError, EngineOptions, ModelFiles, create_engine
from worker.engine.interface import Engine
from worker.engine.progress import ProgressLog
from worker.intake import Intake
from worker.outbox import Outbox
from worker.presence import beat, listen
from worker.text import Vocabulary

log = logging.getLogger(__name__)

REDIS_TIMEOUT_S = 1.5
"""A connection on which nothing was answered for so long is dropped, and what was sent is sent
again: a half-open one would hold up every stream of the engine."""

STOP_S = 15.0
"""Longest wait for the engine's last step and its end; then it hangs, and the worker failed."""


def main(settings: Settings) -> int:
    """Runs a worker until SIGTERM or SIGINT; returns the exit status, 2 for a setting at fault."""
    setup_logging(settings, "worker")
    try:
        sources = settings.models()
        if len(sources) != 1:
            names = ", ".join(source.name for source in sources)
            raise SettingsError(f"RTS_MODEL names {names}: a worker process serves one model")
        thread = EngineThread()
        engine, files = thread.run(lambda: _load(settings, sources[0])).result()
    except (SettingsError, EngineError, ImportError) as error:
        log.error(str(error))
        return 2
    worker = Worker(settings, sources[0].name, engine, files, thread)
    try:
        status = uvloop.run(worker.run())
    except Exception as error:
        log.critical("worker failed", exc_info=error)
        status = 1
    if status:
        # A device's library that failed or hangs may not let the interpreter end in an orderly way.
        logging.shutdown()
        os._exit(status)
    return status


def _load(settings: Settings, source: ModelSource) -> tuple[Engine, ModelFiles]:
    began = time.monotonic()
    log.info("loading", extra={"model": source.name, "engine": settings.engine})
    engine, files = create_engine(
        EngineOptions(
            engine=settings.engine,
            source=source.source,
            dtype=settings.dtype,
            backend=settings.backend,
            deterministic=settings.deterministic,
            max_batch_size=settings.max_batch_size,
            lease_ms=settings.lease_ms,
            echo_step_ms=settings.echo_step_ms,
            kv_cache_mb=settings.kv_cache_mb,
            threads=settings.threads,
            prefix_cache=settings.prefix_cache,
            data_dir=settings.data_dir,
            progress=ProgressLog(),
        )
    )
    loaded = time.monotonic()
    log.info("warming up", extra={"loaded_s": round(loaded - began, 1)})
    # Before the first take: no request waits for a compiler, and no step outlasts the lease.
    engine.warm_up()
    log.info("warm", extra={"warm_up_s": round(time.monotonic() - loaded, 1)})
    return engine, files


class Worker:
    """Everything around one loaded engine."""

    def __init__(
        self,
        settings: Settings,
        model: str,
        engine: Engine,
        files: ModelFiles,
        thread: EngineThread,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._thread = thread
        self._id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._model = messages.ModelCard(
            messages.VERSION,
            model=model,
            version=files.version,
            tokenizer=files.tokenizer_json,
            chat_template=files.chat_template or "",
            context_length=files.context_length,
            vocab_size=files.vocab_size,
            bos_token=files.bos_token,
            eos_token=files.eos_token,
            eos_ids=list(files.eos_ids),
            created=int(time.time()),
            sampling=dict(files.sampling),
        )
        self._mv = keys.model_version(model, files.version)
        self._vocabulary = Vocabulary(Tokenizer.from_str(files.tokenizer_json))
        self._started = time.time()
        self._store = Store(connect(settings.redis_url, timeout_s=REDIS_TIMEOUT_S))
        self._outbox = Outbox(self._store, self._mv, self._id)
        self._driver: Driver | None = None

    async def run(self) -> int:
        """Serves until a signal or a failure of the engine; returns the exit status."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        failed: asyncio.Future[BaseException] = loop.create_future()

        def fail(error: BaseException) -> None:
            if not failed.done():
                log.critical("engine failed", exc_info=error)
                failed.set_result(error)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        driver = Driver(self._engine, self._thread, on_step=self._outbox.on_step, on_failure=fail)
        self._driver = driver
        self._outbox.attach(driver)
        driver.start()
        heard = asyncio.Event()
        intake = self._intake(driver, heard)
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(listen(self._store, self._settings.redis_url, self._id, heard)),
                tasks.create_task(self._outbox.run()),
                tasks.create_task(self._watch(driver, fail)),
            ]
            beating = tasks.create_task(beat(self._store, self._model, self.card, stop))
            taking = tasks.create_task(intake.run())
            announcing = tasks.create_task(self._announce(heard))
            await stop.wait()
            await end(announcing)
            intake.stop()
            drain = Drain(
                self._store,
                self._mv,
                self._id,
                driver=driver,
                intake=intake,
                outbox=self._outbox,
                beating=beating,
                taking=taking,
                grace_s=self._settings.drain_grace_s,
            )
            await drain.run(failed)
            # What a failed one owns is taken over by others: its control channel ends here.
            await end(*background)
        await self._leave()
        if not failed.done():
            try:
                await driver.stop(STOP_S)
            except Exception as error:
                fail(error)
        await self._store.close()
        return 1 if failed.done() else 0

    def card(self) -> messages.EngineCard:
        """What this engine is and does now."""
        info = self._engine.info
        assert self._driver is not None
        stats = self._driver.stats
        return messages.EngineCard(
            messages.VERSION,
            engine=self._id,
            kind=info.name,
            device=info.device,
            dtype=info.dtype,
            host=socket.gethostname(),
            pid=os.getpid(),
            max_batch_size=info.max_batch_size,
            running=stats.running,
            waiting=stats.waiting,
            kv_usage=stats.kv_usage,
            draining=False,
            started=self._started,
            steps=stats.steps,
            prompt_tokens=stats.prompt_tokens,
            generated_tokens=stats.generated_tokens,
            preemptions=stats.preemptions,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            fenced=self._outbox.fenced,
        )

    async def _watch(self, driver: Driver, fail: Callable[[BaseException], None]) -> None:
        """Ends the worker when its engine hangs: its streams are elsewhere, its device is lost."""
        longest_s = self._settings.engine_iteration_timeout_s
        while longest_s:
            await asyncio.sleep(min(1.0, longest_s / 4))
            if driver.step_s > longest_s:
                fail(EngineStuck(f"a step has not ended in {longest_s:g} s"))
                return

    async def _announce(self, heard: asyncio.Event) -> None:
        await heard.wait()
        log.info("ready", extra={"model": self._mv, "engine": self._id})

    def _intake(self, driver: Driver, heard: asyncio.Event) -> Intake:
        settings = self._settings
        return Intake(
            self._store,
            model=self._model.model,
            version=self._model.version,
            engine=self._id,
            vocabulary=self._vocabulary,
            heard=heard,
            driver=driver,
            outbox=self._outbox,
            max_batch_size=settings.max_batch_size,
            max_wait_ms=settings.max_wait_ms,
            lease_ms=settings.lease_ms,
            aging_ms=int(settings.aging_s * 1000),
        )

    async def _leave(self) -> None:
        """Once more: what is handed over has no consumer left to keep."""
        try:
            await self._store.depart(self._mv, self._id)
        except StoreUnavailable:
            log.warning("could not sign off; the heartbeat runs out by itself")
