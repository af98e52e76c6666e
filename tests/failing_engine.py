"""An echo engine whose steps fail, or never end, while the file at FAILING is there."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from worker.engine.echo import EchoEngine
from worker.engine.interface import StepOutput


class Failing(EchoEngine):
    """Served as `failing`."""

    def step(self) -> list[StepOutput]:
        if Path(os.environ["FAILING"]).exists():
            raise RuntimeError("the device is gone")
        return super().step()


class Hanging(EchoEngine):
    """Served as `hanging`."""

    def step(self) -> list[StepOutput]:
        if Path(os.environ["FAILING"]).exists():
            threading.Event().wait()
        return super().step()
