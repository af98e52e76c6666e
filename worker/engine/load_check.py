"""At load, a backend's logits are compared with those of transformers' own attention."""

from __future__ import annotations

import inspect
from typing import Any, Final

import torch

from worker.engine.backend import Backend, Batch
from worker.engine.blocks import blocks_for
from worker.engine.loader import ModelLoadError

_ROWS: Final = 24
_PIECES: Final = ((0, 17), (17, 23), (23, 24))
"""A long piece of a prompt, a short one, one token."""

CHECK_OUTS: Final = 2 * max(end - start for start, end in _PIECES)
"""Rows of logits that a backend must be able to give at once."""

LEAST_BLOCKS: Final = 2 * blocks_for(_ROWS)
"""A smaller cache could not be checked."""

_TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Relative to the norm of all logits. Two right ways to round bf16 differ by up to 8 % in small
random models, by 1 to 2 % in trained ones; what is computed wrongly differs by far more."""


def refuse_by_config(model: Any) -> None:
    """Refuses what a short run could not show to be wrong.

    Raises:
        ModelLoadError: naming what.
    """
    config = model.config.get_text_config(decoder=True)
    why = ""
    if model.config.is_encoder_decoder:
        why = "it has an encoder"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other := kinds - {"full_attention", "sliding_attention"}:
        why = f"it has layers of {', '.join(sorted(other))}"
    rope = getattr(config, "rope_parameters", None) or {}
    # One set a model, or one a kind of layer.
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in ("dynamic", "longrope"):
            why = f"its {part['rope_type']} positions depend on the longest sequence of a batch"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        why = "it cannot compute the logits of chosen rows only"
    if why:
        raise refusal(model, why)


def refusal(model: Any, why: str | Exception) -> ModelLoadError:
    """The error for a model that cannot be served rightly."""
    if isinstance(why, Exception):
        why = str(why).strip().partition("\n")[0] or type(why).__name__
    return ModelLoadError(f"{model.config.model_type} models are not supported: {why}")


class LoadCheck:
    """What a model says to two sequences, and whether a backend says the same.

    Args:
        model: of transformers, on its device. vocab_size: ids are below it.
    """

    def __init__(self, model: Any, vocab_size: int) -> None:
        ids = (torch.arange(2 * _ROWS) * 7919 + 17) % vocab_size
        self._ids = ids.view(2, _ROWS)
        before = model.config._attn_implementation
        with torch.inference_mode():
            model.set_attn_implementation("eager")
            output = model(input_ids=self._ids.to(model.device), use_cache=False)
            model.set_attn_implementation(before)
        self._expected = output.logits.float().cpu()
        self._tolerance = _TOLERANCE.get(model.dtype, 0.1)

    def difference(self, backend: Backend) -> str:
        """Runs both sequences in pieces, side by side.

        Returns:
            "" if the logits agree, else how they do not. The cache's first blocks are used, and
            cleared.
        """
        most = blocks_for(_ROWS)
        blocks = torch.arange(2 * most).flip(0).view(2, most)
        found = ""
        for start, end in _PIECES:
            positions = torch.arange(start, end).repeat(2)
            sequences = torch.arange(2).repeat_interleave(end - start)
            rows = torch.arange(positions.numel())
            ids = self._ids[:, start:end].flatten()
            logits = backend.step(Batch(ids, positions, sequences, blocks, rows))
            got = logits.float().cpu().view(2, end - start, -1)
            want = self._expected[:, start:end]
            error = float((got - want).norm() / want.norm())
            if not error <= self._tolerance:
                found = f"the logits of positions {start}-{end - 1} are off by {error:.1%}"
                break
        backend.clear(list(range(2 * most)))
        return found
