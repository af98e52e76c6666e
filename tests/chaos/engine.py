"""The echo engine, which kills or hangs its own process where a scenario orders it to."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import time
from pathlib import Path

from worker.engine import EngineOptions
from worker.engine.echo import EchoEngine
from worker.engine.echo_tokenizer import byte_id
from worker.engine.interface import EngineRequest, StepOutput

ORDERS = "CHAOS_ORDERS"
"""Environment variable: the folder in which a file is an order to the first engine that sees it."""
POISON = "poison"
"""Whoever computes a prompt that begins so dies."""
MOMENTS = ("prefill", "decode", "emit", "end")
"""When an engine can be ordered to die: before a first token, in the middle, with a step computed
that was not sent, with an end computed that was not sent."""

_POISON_IDS = [byte_id(code) for code in POISON.encode()]


class Fragile(EchoEngine):
    """Generates what the echo engine does."""

    def __init__(self, options: EngineOptions) -> None:
        # Its own sleep: time.sleep fails under a faked clock.
        super().__init__(dataclasses.replace(options, echo_step_ms=0))
        self._pause_s = options.echo_step_ms / 1000
        self._orders = Path(os.environ[ORDERS])

    def add(self, request: EngineRequest) -> None:
        super().add(request)
        if not request.generated and self._ordered("prefill"):
            _die()

    def step(self) -> list[StepOutput]:
        if any(list(s.request.prompt[: len(_POISON_IDS)]) == _POISON_IDS for s in self._running()):
            _die()
        if self._ordered("hang"):
            hanging = self._orders / f"hanging-{os.getpid()}"
            hanging.touch()
            while hanging.exists():
                _sleep(0.02)
        if any(s.position > 10 for s in self._running()) and self._ordered("decode"):
            _die()
        if self._running():
            _sleep(self._pause_s)
        self._tell_time()
        outputs = super().step()
        if any(output.finish for output in outputs) and self._ordered("end"):
            _die()
        if any(output.tokens for output in outputs) and self._ordered("emit"):
            _die()
        return outputs

    def _tell_time(self) -> None:
        """Where it is asked for: what this process takes the time to be."""
        if (self._orders / "tell-time").exists():
            # Whoever reads it finds all of it.
            whole = self._orders / f"telling-{os.getpid()}"
            whole.write_text(str(time.time()))
            whole.replace(self._orders / f"time-{os.getpid()}")

    def _running(self) -> list:  # type: ignore[type-arg]
        return list(self._sequences.values())

    def _ordered(self, what: str) -> bool:
        """Whether there is such an order; it is then carried out, by this engine alone."""
        try:
            (self._orders / what).unlink()
        except FileNotFoundError:
            return False
        return True


class Signed(Fragile):
    """Generates what says in whose ownership it was generated: each epoch has letters of its own.

    Two engines that both think that they own a request so write different tokens, as they do with
    a model whose numbers depend on the rest of the batch.
    """

    def add(self, request: EngineRequest) -> None:
        epoch = int(request.rid.rpartition(":")[2])
        super().add(dataclasses.replace(request, choice=epoch))


def _sleep(seconds: float) -> None:
    select.select([], [], [], seconds)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
