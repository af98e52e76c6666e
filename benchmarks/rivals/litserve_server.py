"""A LitServe server that streams a transformers model: as its users write one, and with batches.

    python litserve_server.py FOLDER PORT BATCH DTYPE

With BATCH 1 requests are served one after the other. With more, requests that wait at the same time
are generated together, as one batch from start to end; all prompts must have the same length.
Runs in an environment of its own, so it imports nothing of this project.
"""

# mypy: disable-error-code="import-not-found,misc,arg-type"

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any

import litserve
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer


class Streamer(BaseStreamer):
    """Hands the ids of each step, one for each sequence, to an iterator."""

    def __init__(self) -> None:
        self._steps: queue.Queue[list[int] | None] = queue.Queue()
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompts, then with each step."""
        if self._prompt:
            self._prompt = False
            return
        self._steps.put(value.reshape(-1).tolist())

    def end(self) -> None:
        """Called when all sequences have ended, and when generating failed."""
        self._steps.put(None)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._steps.get, None)


class Api(litserve.LitAPI):
    """The model behind POST /predict."""

    def __init__(self, folder: str, batch: int, dtype: str) -> None:
        waits = {"max_batch_size": batch, "batch_timeout": 0.005} if batch > 1 else {}
        super().__init__(stream=True, **waits)
        self._folder = folder
        self._batched = batch > 1
        self._dtype = dtype

    def setup(self, device: str) -> None:
        """Loads the model, in the process that will run it."""
        self._tokenizer = AutoTokenizer.from_pretrained(self._folder)
        model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=self._dtype)
        self._model = model.to(device)
        self._device = device

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Several requests stay a list."""
        return inputs

    def unbatch(self, output: Iterator[Any]) -> Iterator[Any]:
        """Each step is a list already."""
        yield from output

    def predict(self, x: Any) -> Iterator[list[str]]:
        """Each step's texts, one for each request."""
        requests = x if self._batched else [x]
        texts = [request["prompt"] for request in requests]
        inputs = self._tokenizer(texts, return_tensors="pt").to(self._device)
        streamer = Streamer()
        length = max(request["max_tokens"] for request in requests)
        arguments = {
            **inputs,
            "streamer": streamer,
            "max_new_tokens": length,
            "min_new_tokens": length,
            "do_sample": False,
        }
        thread = threading.Thread(target=self._generate, args=(streamer, arguments))
        thread.start()
        for ids in streamer:
            yield [str(self._tokenizer.decode([token])) for token in ids]
        thread.join()

    def encode_response(self, output: Iterator[list[str]]) -> Iterator[Any]:
        """Server-sent events."""
        for texts in output:
            yield self._each([f"data: {json.dumps({'token': text})}\n\n" for text in texts])
        # Zipped with the requests of the batch, however many they are.
        yield self._each(["data: [DONE]\n\n"] * self.max_batch_size)

    def _each(self, events: list[str]) -> list[str] | str:
        return events if self._batched else events[0]

    def _generate(self, streamer: Streamer, arguments: dict[str, Any]) -> None:
        try:
            with torch.inference_mode():
                self._model.generate(**arguments)
        finally:
            streamer.end()


if __name__ == "__main__":
    folder, port, batch, dtype = sys.argv[1:]
    server = litserve.LitServer(Api(folder, int(batch), dtype), accelerator="auto", timeout=600)
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning")
