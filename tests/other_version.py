"""An echo engine whose files are others: under the same name it is another version of the model."""

from __future__ import annotations

from worker.engine import EngineOptions
from worker.engine.echo import EchoEngine


class Other(EchoEngine):
    """With a shorter context."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options, context_length=4096)
