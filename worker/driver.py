"""The thread that owns the engine, and the queues between it and the event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from worker.engine.interface import Engine, EngineRequest, EngineStats, StepOutput

T = TypeVar("T")

STEPS_AHEAD = 64
"""Steps the engine may run beyond what the loop has handled; then it waits: memory is bounded."""


class EngineStuck(Exception):
    """The engine is at a step, or at its end, for ever."""


class EngineThread:
    """The one thread that makes, warms up and steps the engine.

    Not the main thread and another one: OpenMP keeps a team of threads for each thread that ever
    computed, and two teams on the same cores cost 35-40 % of the tokens (measured, 2 cores).
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], object], Future[Any]]] = (
            queue.SimpleQueue()
        )
        # A daemon: a process that is told to stop does not wait for a model to load.
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def run(self, function: Callable[[], T]) -> Future[T]:
        """Calls a function in the thread, after those before it."""
        future: Future[T] = Future()
        self._work.put((function, future))
        return future

    def _run(self) -> None:
        while True:
            function, future = self._work.get()
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)


class Driver:
    """Runs an engine in its thread, one step after the other.

    Args:
        engine: warmed up. thread: the one that made it.
        on_step: called in the event loop with each step's outputs.
        on_failure: called in the event loop when a step raised; no step follows.
    """

    def __init__(
        self,
        engine: Engine,
        thread: EngineThread,
        *,
        on_step: Callable[[list[StepOutput]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._engine = engine
        self._on_step = on_step
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[EngineRequest | str | None] = queue.SimpleQueue()
        self._ahead = threading.Semaphore(STEPS_AHEAD)
        self._room = engine.room()
        # Each written by one thread only: the difference is on its way.
        self._sent = 0
        self._received = 0
        self.stats = EngineStats()
        self._thread = thread
        self._finished: Future[None] | None = None
        self._step_began: float | None = None

    @property
    def step_s(self) -> float:
        """How long the engine has been at what it does now; 0 while it waits or is waited for."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def room(self) -> int:
        """How many more sequences the engine would take now, those on their way counted."""
        return max(0, self._room - (self._sent - self._received))

    def start(self) -> None:
        """Starts stepping."""
        self._finished = self._thread.run(self._run)

    def add(self, request: EngineRequest) -> None:
        """Passes a request to the engine; a refusal comes back as an output with finish "error"."""
        self._sent += 1
        self._commands.put(request)

    def abort(self, rid: str) -> None:
        """Tells the engine to drop a sequence."""
        self._commands.put(rid)

    def handled(self) -> None:
        """The loop is done with one step."""
        self._ahead.release()

    async def stop(self, timeout_s: float = 60.0) -> None:
        """Ends after the current step and closes the engine.

        Raises:
            EngineStuck: that takes longer than `timeout_s`; the thread goes on.
            Exception: what closing the engine raised.
        """
        self._commands.put(None)
        # Nobody may be there any more to handle what it has for the loop until it reads this.
        self._ahead.release(STEPS_AHEAD)
        if self._finished is not None:
            done, _ = await asyncio.wait([asyncio.wrap_future(self._finished)], timeout=timeout_s)
            if not done:
                raise EngineStuck(f"it has not ended in {timeout_s:g} s")
            done.pop().result()

    def _run(self) -> None:
        try:
            busy = False
            while self._obey(wait=not busy):
                self._step_began = time.monotonic()
                outputs = self._engine.step()
                self.stats = self._engine.stats()
                self._room = self._engine.room()
                busy = self.stats.running + self.stats.waiting > 0
                self._pass_on(outputs)
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._on_failure, error)
        finally:
            self._engine.close()

    def _obey(self, *, wait: bool) -> bool:
        """Carries out the commands that are there; with `wait`, at least one. False: stop."""
        refused: list[StepOutput] = []
        received = 0
        self._step_began = None if wait else time.monotonic()
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                break
            if wait:
                wait, self._step_began = False, time.monotonic()
            if command is None:
                return False
            if isinstance(command, str):
                self._engine.abort(command)
                continue
            try:
                self._engine.add(command)
            except ValueError as error:
                refused.append(StepOutput(command.rid, [], finish="error", error=str(error)))
            received += 1
        # In this order a reader sees too little room for a moment, never too much.
        self._room = self._engine.room()
        self._received += received
        self._pass_on(refused)
        return True

    def _pass_on(self, outputs: list[StepOutput]) -> None:
        self._step_began = None
        if outputs:
            self._ahead.acquire()
            self._loop.call_soon_threadsafe(self._on_step, outputs)
