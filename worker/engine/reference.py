"""The reference backend: transformers' modules with our attention and our paged KV cache.

It runs any family whose attention goes through transformers' attention interface, on any device
torch has, and is the oracle of every other backend. What it cannot compute rightly it refuses at
load: it runs each model once beside transformers' own attention and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AttentionInterface

from worker.engine.attention import (
    NAME,
    Attention,
    Layer,
    LayerRecorder,
    PagedAttention,
    PagedCache,
    paged_attention,
)
from worker.engine.backend import Batch
from worker.engine.load_check import LEAST_BLOCKS, LoadCheck, refusal
from worker.engine.sampler import Draw, sample


class ReferenceBackend:
    """A transformers model that runs flat batches over a paged cache."""

    def __init__(self, model: Any, device: torch.device, size: Callable[[int], int]) -> None:
        """Takes the model over, allocates the cache, and checks the model's output.

        Args:
            model: a causal language model of transformers that `refuse_by_config` lets pass; its
                attention is replaced.
            device: where it runs.
            size: from the bytes of one block to how many blocks are wanted; it gets
                LEAST_BLOCKS if that is more. Called when the weights are where they stay.

        Raises:
            ModelLoadError: the model asks for something that would not be computed rightly.
        """
        self._model = model.to(device).eval()
        self._device = device
        self._dtype = self._model.dtype
        self.threads = torch.get_num_threads() if device.type == "cpu" else 1
        self.device = str(device)
        self.dtype = str(self._dtype).removeprefix("torch.")
        AttentionInterface.register(NAME, paged_attention)
        layers = self._record()
        self.block_count = max(LEAST_BLOCKS, size(PagedCache.block_bytes(layers, self._dtype)))
        self._cache = PagedCache(layers, self.block_count, self._dtype, device)
        try:
            difference = LoadCheck(self._model, self.vocab_size).difference(self)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise refusal(self._model, error) from error
        if difference:
            raise refusal(self._model, f"with the paged cache {difference}")

    @torch.inference_mode()
    def step(self, batch: Batch) -> torch.Tensor:
        """Computes the rows; see `Backend.step`."""
        attention = PagedAttention(self._cache, batch, self._device)
        return self._forward(batch.ids, batch.positions, batch.out_rows, attention)

    def sample(self, batch: Batch, draws: Sequence[Draw]) -> list[int]:
        """Computes the rows and draws their tokens; see `Backend.sample`."""
        logits = self.step(batch)
        return sample(logits, draws) if draws else []

    def alone(self, alone: bool) -> None:
        """Whether one thread computes without the others; see `Backend.alone`."""
        if self._device.type == "cpu":
            torch.set_num_threads(1 if alone else self.threads)

    @torch.inference_mode()
    def clear(self, blocks: list[int]) -> None:
        """Fills blocks with zeros."""
        index = torch.tensor(blocks, device=self._device)
        for cache in (*self._cache.keys.values(), *self._cache.values.values()):
            cache.index_fill_(0, index, 0.0)

    def close(self) -> None:
        """Lets go of weights and cache."""
        del self._model, self._cache

    def _forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        out_rows: torch.Tensor,
        attention: Attention,
    ) -> torch.Tensor:
        output = self._model(
            input_ids=ids.to(self._device).unsqueeze(0),
            position_ids=positions.to(self._device).unsqueeze(0),
            use_cache=False,
            logits_to_keep=out_rows.to(self._device),
            paged=attention,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def _record(self) -> dict[int, Layer]:
        """What the layers ask for, from a run of one token."""
        recorder = LayerRecorder()
        one = torch.zeros(1, dtype=torch.int64)
        try:
            self._model.set_attn_implementation(NAME)
            self.vocab_size = self._forward(one, one, one, recorder).shape[-1]
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise refusal(self._model, error) from error
        config = self._model.config.get_text_config(decoder=True)
        if sorted(recorder.layers) != list(range(config.num_hidden_layers)):
            raise refusal(
                self._model,
                f"{len(recorder.layers)} of their {config.num_hidden_layers} layers use "
                "transformers' attention interface",
            )
        kinds = getattr(config, "layer_types", None) or []
        for index, kind in enumerate(kinds):
            if (kind == "sliding_attention") != bool(recorder.layers[index].window):
                raise refusal(
                    self._model,
                    f"layer {index} is said to be of {kind}, but its window is "
                    f"{recorder.layers[index].window}",
                )
        return recorder.layers
