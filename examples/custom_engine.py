"""An engine of your own: it says the prompt backwards.

    RTS_ENGINE=examples.custom_engine:Backwards make up
    curl http://127.0.0.1:8000/infer -H 'Content-Type: application/json' \
        -d '{"model": "backwards", "prompt": "stressed"}'

A class that takes the options and has `info`, `files` and the methods of worker.engine.interface.
"""

from __future__ import annotations

from worker.engine import EngineOptions
from worker.engine.echo_tokenizer import END_ID, VOCAB_SIZE, byte_files
from worker.engine.interface import EngineInfo, EngineRequest, EngineStats, StepOutput

CONTEXT = 4096


class Backwards:
    """Each step says one more byte of every prompt, from its end."""

    def __init__(self, options: EngineOptions) -> None:
        self.files = byte_files("backwards", CONTEXT)
        self.info = EngineInfo("backwards", options.max_batch_size, CONTEXT, VOCAB_SIZE)
        self._running: dict[str, tuple[EngineRequest, list[int]]] = {}

    def warm_up(self) -> None:
        """Nothing has to be loaded."""

    def room(self) -> int:
        return self.info.max_batch_size - len(self._running)

    def add(self, request: EngineRequest) -> None:
        left = [END_ID, *request.prompt]
        # What another worker said before it died is not said again.
        self._running[request.rid] = (request, left[: len(left) - len(request.generated)])

    def abort(self, rid: str) -> None:
        self._running.pop(rid, None)

    def step(self) -> list[StepOutput]:
        return [self._advance(rid) for rid in list(self._running)]

    def _advance(self, rid: str) -> StepOutput:
        request, left = self._running[rid]
        said = len(request.prompt) + 2 - len(left)
        output = StepOutput(rid, [left.pop()], prefilled=said)
        if not left or said == request.sampling.max_tokens:
            output.finish = "length" if left else "stop"
            del self._running[rid]
        return output

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._running))

    def close(self) -> None:
        self._running.clear()
