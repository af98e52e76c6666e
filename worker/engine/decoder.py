"""A dense decoder as the native backend is made from it: sizes, and what its parts consist of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from worker.engine.native.library import Part


class Asks(msgspec.Struct, frozen=True):
    """What a layer asks of attention.

    Attributes:
        rope_table: which table its positions come from.
        window: positions that a row sees, itself included; 0 for all.
        scale: of the scores. soft_cap: scores are squeezed into (-soft_cap, soft_cap); 0 for not.
    """

    rope_table: int
    window: int
    scale: float
    soft_cap: float


class Sizes(msgspec.Struct, frozen=True):
    """Everything about a decoder but its weights.

    Attributes:
        dtype: of the matrices, "bfloat16" or "float32".
        positions: longest context that is wanted.
        activation: of the gated feed-forward part, a number of api.h.
        rope_tables: how many there are. layers: what each asks for.
    """

    dtype: str
    positions: int
    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    activation: int
    norm_eps: float
    embedding_scale: float
    logit_soft_cap: float
    rope_tables: int
    layers: list[Asks]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same for torch."""
        dtype: Any = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True, slots=True)
class Weight:
    """A part of a decoder.

    Attributes:
        layer: index of the layer or of the rotary table; -1 for others.
        part: which.
        sources: tensors on the CPU that follow each other in it; a number is so many zeros.
        dtype: of matrices the decoder's, of others float32.
        plus: is added to each number.
    """

    layer: int
    part: Part
    sources: list[torch.Tensor | int]
    dtype: torch.dtype
    plus: float = 0.0

    def tensor(self) -> torch.Tensor:
        """The numbers, contiguous."""
        parts = [
            torch.zeros(source, dtype=self.dtype)
            if isinstance(source, int)
            else source.detach().to(self.dtype)
            for source in self.sources
        ]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (whole + self.plus if self.plus else whole).contiguous()
