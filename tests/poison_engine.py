"""An echo engine that dies of one prompt, as long as the file at POISON is there."""

from __future__ import annotations

import os
from pathlib import Path

from worker.engine.echo import EchoEngine
from worker.engine.echo_tokenizer import byte_id
from worker.engine.interface import EngineRequest

PROMPT = "poison"


class Poison(EchoEngine):
    """Served as `poison`."""

    def add(self, request: EngineRequest) -> None:
        deadly = [byte_id(code) for code in PROMPT.encode()] == list(request.prompt)
        if deadly and Path(os.environ["POISON"]).exists():
            # Not an exception: the worker would answer for it.
            os._exit(70)
        super().add(request)
