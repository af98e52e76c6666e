"""The reference backend: transformers' modules with our attention and our paged KV cache.

It runs any family whose attention goes through transformers' attention interface, on any device
torch has, and is the oracle of every other backend. What it cannot compute rightly it refuses at
load: it runs each model once beside transformers' own attention and compares.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

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
from worker.engine.blocks import blocks_for
from worker.engine.loader import ModelLoadError

_CHECK_ROWS: Final = 24

LEAST_BLOCKS: Final = 2 * blocks_for(_CHECK_ROWS)
"""A smaller cache could not be checked."""

_TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 6e-2}


class ReferenceBackend:
    """A transformers model that runs flat batches over a paged cache."""

    def __init__(self, model: Any, device: torch.device, size: Callable[[int], int]) -> None:
        """Takes the model over, allocates the cache, and checks the model's output.

        Args:
            model: a causal language model of transformers; its attention is replaced.
            device: where it runs.
            size: from the bytes of one block to how many blocks are wanted; it gets
                LEAST_BLOCKS if that is more. Called when the weights are where they stay.

        Raises:
            ModelLoadError: the model asks for something that would not be computed rightly.
        """
        self._model = model.to(device).eval()
        self._device = device
        self._family = str(self._model.config.model_type)
        self._dtype = self._model.dtype
        self.device = str(device)
        self.dtype = str(self._dtype).removeprefix("torch.")
        self._refuse_by_config()
        AttentionInterface.register(NAME, paged_attention)
        layers = self._record()
        self.block_count = max(LEAST_BLOCKS, size(PagedCache.block_bytes(layers, self._dtype)))
        self._cache = PagedCache(layers, self.block_count, self._dtype, device)
        try:
            self._check()
        except (ModelLoadError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise self._refusal(error) from error

    @torch.inference_mode()
    def step(self, batch: Batch) -> torch.Tensor:
        """Computes the rows; see `Backend.step`."""
        attention = PagedAttention(self._cache, batch, self._device)
        return self._forward(batch.ids, batch.positions, batch.out_rows, attention)

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

    def _refuse_by_config(self) -> None:
        """Refuses what a short run could not show to be wrong."""
        config = self._model.config.get_text_config(decoder=True)
        why = ""
        if self._model.config.is_encoder_decoder:
            why = "it has an encoder"
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if other := kinds - {"full_attention", "sliding_attention"}:
            why = f"it has layers of {', '.join(sorted(other))}"
        rope = getattr(config, "rope_parameters", None) or {}
        # One set a model, or one a kind of layer.
        for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
            if part.get("rope_type") in ("dynamic", "longrope"):
                why = f"its {part['rope_type']} positions depend on the longest sequence of a batch"
        if "logits_to_keep" not in inspect.signature(self._model.forward).parameters:
            why = "it cannot compute the logits of chosen rows only"
        if why:
            raise ModelLoadError(f"{self._family} models are not supported: {why}")

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
            raise self._refusal(error) from error
        config = self._model.config.get_text_config(decoder=True)
        if sorted(recorder.layers) != list(range(config.num_hidden_layers)):
            raise ModelLoadError(
                f"{self._family} models are not supported: {len(recorder.layers)} of their "
                f"{config.num_hidden_layers} layers use transformers' attention interface"
            )
        kinds = getattr(config, "layer_types", None) or []
        for index, kind in enumerate(kinds):
            if (kind == "sliding_attention") != bool(recorder.layers[index].window):
                raise ModelLoadError(
                    f"{self._family} models are not supported: layer {index} is said to be of "
                    f"{kind}, but its window is {recorder.layers[index].window}"
                )
        return recorder.layers

    def _refusal(self, error: Exception) -> ModelLoadError:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return ModelLoadError(f"{self._family} models are not supported: {reason}")

    @torch.inference_mode()
    def _check(self) -> None:
        """Compares a run in pieces, beside another sequence, with transformers' own attention."""
        ids = (torch.arange(2 * _CHECK_ROWS) * 7919 + 17) % self.vocab_size
        ids = ids.view(2, _CHECK_ROWS)
        self._model.set_attn_implementation("eager")
        expected = self._model(input_ids=ids.to(self._device), use_cache=False).logits.float()
        self._model.set_attn_implementation(NAME)
        most = blocks_for(_CHECK_ROWS)
        blocks = torch.arange(2 * most).flip(0).view(2, most)
        for start, end in ((0, 17), (17, 23), (23, 24)):
            positions = torch.arange(start, end).repeat(2)
            sequences = torch.arange(2).repeat_interleave(end - start)
            rows = torch.arange(positions.numel())
            batch = Batch(ids[:, start:end].flatten(), positions, sequences, blocks, rows)
            got = self.step(batch).float().view(2, end - start, -1)
            want = expected[:, start:end]
            error = float((got - want).norm() / want.norm())
            if not error <= _TOLERANCE.get(self._dtype, 6e-2):
                raise ModelLoadError(
                    f"{self._family} models are not supported: with the paged cache the logits of "
                    f"positions {start}-{end - 1} are off by {error:.1%}"
                )
        self.clear(list(range(2 * most)))
