"""A whole cluster on one machine: `realtime-serve up` starts, watches and stops its processes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from realtime_serve import ports, probe
from realtime_serve.data_folder import DataFolder, FolderInUse, FolderUnusable, writable
from realtime_serve.demo_model import DemoModelError, fetch_demo_model
from realtime_serve.lifeline import Lifeline
from realtime_serve.redis_server import (
    ServerError,
    ServerPlan,
    check_server,
    find_binary,
    server_environment,
)
from realtime_serve.screen import Screen
from realtime_serve.supervisor import Child, Program
from shared import keys
from shared.settings import ENV_PREFIX, Settings
from shared.store import connect

# Engine threads spin while they wait; whoever runs beside them must not push them off their core.
_BESIDE_ENGINE = 5
_SERVER_START_S = 120.0
_SERVER_STOP_S = 15.0
_AFTER_GRACE_S = 5.0
_POLL_S = 0.5
_ORPHAN_GRACE_S = 3.0


class UpError(Exception):
    """The cluster cannot be started or had to stop; the message says why and what to do."""


def run_up(settings: Settings, screen: Screen, *, end_with_parent: bool = False) -> int:
    """Run the cluster in the foreground until Ctrl-C or SIGTERM.

    Args:
        settings: of the cluster; the processes get them in their environment.
        screen: where to say what happens.
        end_with_parent: also stop when the process that started this one ends, as make does.

    Returns:
        The exit status.
    """
    # Asked now: it may end while files are still being fetched.
    parent = os.getppid() if end_with_parent else None
    try:
        with _sigterm_as_interrupt(), _prepared(settings, screen) as (server, folder):
            cluster = Cluster(settings, screen, server, folder, parent)
            return asyncio.run(cluster.run())
    except (UpError, ServerError, FolderInUse, FolderUnusable, DemoModelError) as error:
        screen.text(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        screen.text("stopped")
        return 130


@contextlib.contextmanager
def _prepared(
    settings: Settings, screen: Screen
) -> Iterator[tuple[ServerPlan | None, DataFolder | None]]:
    """Everything that can fail or take long before the first process is started."""
    _refuse_missing_models(settings)
    _refuse_busy_ports(settings)
    if settings.redis_url:
        for warning in check_server(settings.redis_url):
            screen.text(f"warning: RTS_REDIS_URL: {warning}")
        screen.step("server: the one at RTS_REDIS_URL")
        _fetch_models(settings, screen)
        yield None, None
        return
    binary, passed_over = find_binary()
    for text in passed_over:
        screen.text(f"note: {text}")
    folder = DataFolder(settings.data_dir / "redis")
    try:
        screen.step(f"server: {binary}, data in {folder.path}")
        _fetch_models(settings, screen)
        # Redis and Valkey do not read each other's files.
        with writable(folder.path / binary.kind):
            plan = ServerPlan.make(binary, folder.path / binary.kind)
        try:
            yield plan, folder
        finally:
            plan.clean()
    finally:
        folder.close()


def _refuse_missing_models(settings: Settings) -> None:
    # The worker would say so too, but only once torch is loaded and the others have started.
    if settings.engine not in ("torch", "vllm") or not settings.workers:
        return
    for model in settings.models():
        is_path = model.source.startswith(("/", "./", "../")) or model.source.endswith(".gguf")
        if is_path and not model.is_demo and not Path(model.source).exists():
            raise UpError(f"RTS_MODEL: there is no {model.source}")


def _refuse_busy_ports(settings: Settings) -> None:
    for port in range(settings.port, settings.port + settings.gateways):
        try:
            if ports.is_free(settings.host, port):
                continue
        except OSError as error:
            raise UpError(f"cannot listen on {settings.host} port {port}: {error}") from error
        free = ports.next_free(settings.host, port, settings.gateways)
        way_out = f"; stop it, or take another port: RTS_PORT={free}" if free else ""
        raise UpError(f"port {port} is held by {ports.holder(port)}{way_out}")


def _fetch_models(settings: Settings, screen: Screen) -> None:
    if settings.workers and any(model.is_demo for model in settings.models()):
        fetch_demo_model(settings.data_dir, screen)


class Cluster:
    """The processes of one cluster, from the server's start to the last process's end."""

    def __init__(
        self,
        settings: Settings,
        screen: Screen,
        server: ServerPlan | None,
        folder: DataFolder | None,
        parent: int | None,
    ) -> None:
        self._settings = settings
        self._screen = screen
        self._server = server
        self._folder = folder
        self._parent = parent
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._failure: str | None = None
        self._children: list[Child] = []
        self._started = time.time()

    async def run(self) -> int:
        """Start everything, wait for the order to stop, stop everything; the exit status."""
        loop = asyncio.get_running_loop()
        for number in _stop_signals():
            loop.add_signal_handler(number, self._on_signal)
        with Lifeline() as lifeline:
            async with asyncio.TaskGroup() as group:
                stages = self._stages(lifeline)
                watchers = [group.create_task(self._watch_parent())]
                server, *others = stages
                for child in server:
                    group.create_task(child.run())
                if await self._server_is_ready():
                    await self._forget_models()
                    for child in (child for stage in others for child in stage):
                        group.create_task(child.run())
                    watchers.append(group.create_task(self._announce()))
                await self._stop.wait()
                for watcher in watchers:
                    watcher.cancel()
                await self._shut_down(stages)
        if self._failure:
            raise UpError(self._failure)
        self._screen.step("stopped")
        return 0

    def _stages(self, lifeline: Lifeline) -> list[list[Child]]:
        """Server, control, workers, gateways: in the order of starting; the reverse of stopping."""
        programs = [self._server_programs(), [self._role("control")], [], []]
        settings = self._settings
        number = 0
        engines = settings.workers * len(settings.models())
        threads = settings.threads
        if not threads and engines > 1:
            # Alone, an engine chooses; engines that each take all cores stop each other.
            threads = max(1, usable_cores() // engines)
        for model in settings.models():
            for _ in range(settings.workers):
                changes: dict[str, object] = {"threads": threads}
                if settings.model:
                    changes["model"] = f"{model.name}={model.source}"
                programs[2].append(self._role("worker", number, **changes))
                number += 1
        for index in range(settings.gateways):
            port = settings.port + index
            programs[3].append(self._role("gateway", index, port=port, gateways=1))
        stages = [
            [Child(program, lifeline, self._screen.step, self._fail) for program in stage]
            for stage in programs
        ]
        self._children = [child for stage in stages for child in stage]
        return stages

    def _server_programs(self) -> list[Program]:
        if self._server is None or self._folder is None:
            return []
        environment = server_environment(_foreign_environment())
        name, argv = f"{self._server.binary.kind} server", self._server.argv
        return [Program(name, argv, environment, _BESIDE_ENGINE, self._folder.fds)]

    def _role(self, role: str, index: int | None = None, **changes: object) -> Program:
        url = self._server.url if self._server else self._settings.redis_url
        settings = dataclasses.replace(self._settings, redis_url=url, **changes)  # type: ignore[arg-type]
        argv = [sys.executable, "-m", "realtime_serve.cli", role]
        if index is not None:
            argv += ["--index", str(index)]
        environment = _foreign_environment() | settings.to_env()
        name = role if index is None else f"{role}-{index}"
        return Program(name, argv, environment, 0 if role == "worker" else _BESIDE_ENGINE)

    async def _server_is_ready(self) -> bool:
        if self._server is None:
            return True
        for _ in range(int(_SERVER_START_S / 0.01)):
            if self._stop.is_set():
                break
            if self._server.is_ready():
                return True
            await asyncio.sleep(0.01)
        if self._failure or not self._stop.is_set():
            self._fail(f"{self._server.binary} did not start:\n{self._server.log_tail()}")
        return False

    async def _forget_models(self) -> None:
        """What an earlier run served is not listed any more; what waits for it stays."""
        if self._server is None:
            return
        client = connect(self._server.url, timeout_s=5.0)
        try:
            names = [keys.MODELS]
            for pattern in (keys.model("*"), keys.is_open("*")):
                names += [name.decode() async for name in client.scan_iter(pattern, count=1000)]
            await client.delete(*names)
        finally:
            await client.aclose(close_connection_pool=True)

    async def _announce(self) -> None:
        """Wait until every gateway is ready and sees our workers, then say what to try."""
        settings = self._settings
        wanted = Counter({model.name: settings.workers for model in settings.models()})
        waiting = set(range(settings.port, settings.port + settings.gateways))
        names = ", ".join(model.name for model in settings.models())
        self._screen.step(f"processes started, loading {names}")
        while waiting:
            for port in sorted(waiting):
                status, _ = await probe.get(settings.host, port, "/readyz")
                # Engines of an earlier cluster on the same data do not count.
                if status == 200 and wanted <= await _engines(settings.host, port, self._started):
                    waiting.discard(port)
            await asyncio.sleep(_POLL_S)
        for child in self._children:
            child.settle()
        self._screen.step(f"ready in {self._screen.elapsed_s:.1f} s")
        self._screen.text(_what_to_try(settings))

    async def _watch_parent(self) -> None:
        while self._parent is not None:
            if os.getppid() != self._parent:
                self._screen.step("the process that started this one has ended")
                self._hurry_after(_ORPHAN_GRACE_S)
                self._stop.set()
                return
            await asyncio.sleep(0.5)

    def _hurry_after(self, seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds, self._hurry.set)

    async def _shut_down(self, stages: Sequence[Sequence[Child]]) -> None:
        """Stop gateways, then workers, then control, then the server, each with its grace time."""
        server, control, workers, gateways = stages
        settings = self._settings
        grace_s = settings.drain_delay_s + settings.drain_grace_s + _AFTER_GRACE_S
        for stage in (gateways, workers, control):
            await self._stop_stage(stage, grace_s)
        for child in server:
            if not await child.stop(_SERVER_STOP_S):
                self._screen.step(f"{child.program.name} did not stop in time and was killed")

    async def _stop_stage(self, stage: Sequence[Child], grace_s: float) -> None:
        killer = asyncio.create_task(self._kill_when_hurried(stage))
        ends = await asyncio.gather(*(child.stop(grace_s) for child in stage))
        killer.cancel()
        for child, ended in zip(stage, ends, strict=True):
            if not ended:
                self._screen.step(f"{child.program.name} did not stop in time and was killed")

    async def _kill_when_hurried(self, stage: Sequence[Child]) -> None:
        await self._hurry.wait()
        for child in stage:
            child.kill()

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._screen.step("stopping at once")
            self._hurry.set()
            return
        self._screen.step("stopping; Ctrl-C again stops at once")
        self._stop.set()

    def _fail(self, message: str) -> None:
        self._failure = self._failure or message
        self._stop.set()


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _foreign_environment() -> dict[str, str]:
    return {key: text for key, text in os.environ.items() if not key.startswith(ENV_PREFIX)}


async def _engines(host: str, port: int, since: float) -> Counter[str]:
    """How many engines that started since then a gateway knows of, by model."""
    status, body = await probe.get(host, port, "/status")
    try:
        workers = json.loads(body)["workers"] if status == 200 else []
        return Counter(worker["model"] for worker in workers if worker["started"] >= since)
    except (ValueError, KeyError, TypeError):
        return Counter()


def _what_to_try(settings: Settings) -> str:
    url = probe.base_url(settings.host, settings.port)
    names = [model.name for model in settings.models()]
    question = {"role": "user", "content": "What is the capital of France?"}
    # The demo model is small: at the default temperature it wanders.
    body = json.dumps(
        {"model": names[0], "stream": True, "temperature": 0.2, "messages": [question]}
    )
    waits = "" if settings.workers else " (once a worker is there: RTS_WORKERS is 0)"
    return (
        f"\n  {url}  serves {', '.join(names)}{waits}\n\n"
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"    -d {shlex.quote(body)}\n\n"
        "  Ctrl-C to stop\n"
    )


def _stop_signals() -> list[signal.Signals]:
    # Under nohup the end of the terminal is to be ignored.
    hang_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hang_up]


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """While files are fetched: a stop must run the same clean-up as Ctrl-C."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = [number for number in _stop_signals() if number != signal.SIGINT]
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
