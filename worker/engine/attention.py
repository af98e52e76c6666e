"""Attention over a paged KV cache in plain torch, as transformers' modules call it.

Rows of all sequences lie in one flat batch. Sequences that generate are taken together with others
of about their length; a piece of a prompt is taken alone. So work follows the real lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.engine.backend import Batch
from worker.engine.blocks import BLOCK_SIZE, blocks_for

NAME: Final = "rts_paged"
"""Under which transformers knows `paged_attention`."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer asks of attention.

    Attributes:
        kv_heads: heads of keys and values.
        key_dim, value_dim: size of one head.
        window: positions that a row sees, itself included; 0 for all.
        softcap: scores are squeezed into (-softcap, softcap); 0 for not.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class Call:
    """The rows of one step in one layer.

    Attributes:
        index: of the layer.
        layer: what it asks for.
        q: [heads, rows, key_dim].
        k: [kv_heads, rows, key_dim].
        v: [kv_heads, rows, value_dim].
        scale: of the scores.
    """

    index: int
    layer: Layer
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float


class Attention(Protocol):
    """What `paged_attention` hands a layer's queries, keys and values to."""

    def attend(self, call: Call) -> torch.Tensor:
        """The result, [rows, heads, value_dim]."""


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: Attention | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers' modules call in place of their own.

    Raises:
        NotImplementedError: the model asks for something that this attention does not do.
    """
    index = getattr(module, "layer_idx", None)
    if paged is None or index is None:
        raise NotImplementedError("its attention does not hand on what the paged cache needs")
    for name in ("s_aux", "position_bias", "attn_bias", "head_mask", "alibi"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"its attention uses {name}")
    layer = Layer(
        key.shape[1], key.shape[3], value.shape[3], sliding_window or 0, float(softcap or 0.0)
    )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    call = Call(index, layer, query[0], key[0], value[0], scale)
    return paged.attend(call).unsqueeze(0), None


class LayerRecorder:
    """Stands in for the cache in a first run, to learn what the layers of a model ask for."""

    def __init__(self) -> None:
        """Knows no layer yet."""
        self.layers: dict[int, Layer] = {}
        self.scales: dict[int, float] = {}

    def attend(self, call: Call) -> torch.Tensor:
        """Notes the layer and attends to nothing."""
        if call.index in self.layers:
            raise NotImplementedError("two of its attentions have the same index")
        self.layers[call.index] = call.layer
        self.scales[call.index] = call.scale
        return call.q.new_zeros(call.q.shape[1], call.q.shape[0], call.layer.value_dim)


class PagedCache:
    """Keys and values of all layers, in blocks, and room to lay a group's blocks side by side."""

    def __init__(
        self, layers: dict[int, Layer], count: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocates `count` blocks a layer, and one more that stays zero, to fill up short rows."""

        def blocks(heads: int, size: int) -> torch.Tensor:
            return _zeros(count + 1, BLOCK_SIZE * heads * size, dtype, device)

        self.spare = count
        self.keys = {i: blocks(layer.kv_heads, layer.key_dim) for i, layer in layers.items()}
        self.values = {i: blocks(layer.kv_heads, layer.value_dim) for i, layer in layers.items()}
        self._room: dict[str, torch.Tensor] = {}

    @staticmethod
    def block_bytes(layers: dict[int, Layer], dtype: torch.dtype) -> int:
        """Bytes of one block over all layers."""
        sizes = (layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers.values())
        return BLOCK_SIZE * dtype.itemsize * sum(sizes)

    def write(self, index: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores keys and values, [kv_heads, rows, size], at slot = block * BLOCK_SIZE + offset."""
        for cache, new in ((self.keys[index], k), (self.values[index], v)):
            flat = new.transpose(0, 1).reshape(new.shape[1], -1)
            cache.view(-1, flat.shape[1]).index_copy_(0, slots, flat)

    def gather(self, index: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the blocks' keys and values, [blocks, BLOCK_SIZE * kv_heads * size] each."""
        return self._take("k", self.keys[index], blocks), self._take(
            "v", self.values[index], blocks
        )

    def _take(self, name: str, cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        # The same memory for every layer: it stays in the processor's cache, and fresh memory from
        # the system would cost more than the copy.
        size = blocks.numel() * cache.shape[1]
        room = self._room.get(name)
        if room is None or room.numel() < size:
            room = self._room[name] = torch.empty(size * 2, dtype=cache.dtype, device=cache.device)
        out = room[:size].view(blocks.numel(), cache.shape[1])
        return torch.index_select(cache, 0, blocks, out=out)


@dataclass(slots=True)
class Group:
    """Sequences whose rows are attended to in one call: many with one row, or one with many.

    Attributes:
        rows: of the batch.
        blocks: of its sequences, padded to the longest, flat.
        positions: of the rows, [sequences, rows of each].
        length: keys that are looked at; a multiple of BLOCK_SIZE if there are several sequences.
        masks: what is added to the scores, [sequences, 1, rows of each, length], by window.
    """

    rows: slice
    blocks: torch.Tensor
    positions: torch.Tensor
    length: int
    masks: dict[int, torch.Tensor | None] = field(default_factory=dict)

    def mask(self, window: int, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores; None when every row sees all keys."""
        if window not in self.masks:
            keys = torch.arange(self.length, device=self.positions.device)
            seen = keys <= self.positions[..., None]
            if window:
                seen &= keys > self.positions[..., None] - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            mask.masked_fill_(~seen, -torch.inf)
            self.masks[window] = None if bool(seen.all()) else mask[:, None]
        return self.masks[window]


class PagedAttention:
    """The attention of one step: where its rows are written, and what they look at."""

    def __init__(self, cache: PagedCache, batch: Batch, device: torch.device) -> None:
        """Lays out a step."""
        self._cache = cache
        self._rows = batch.ids.numel()
        block = batch.block_table[batch.sequences, batch.positions // BLOCK_SIZE]
        self._slots = (block * BLOCK_SIZE + batch.positions % BLOCK_SIZE).to(device)
        table = batch.block_table.masked_fill(batch.block_table < 0, cache.spare)
        self._groups = []
        for sequences, rows in _groups(batch):
            positions = batch.positions[rows].view(sequences.stop - sequences.start, -1)
            length = int(positions.max()) + 1
            blocks = table[sequences, : blocks_for(length)].flatten().to(device)
            if positions.shape[0] > 1:
                length = blocks_for(length) * BLOCK_SIZE
            self._groups.append(Group(rows, blocks, positions.to(device), length))

    def attend(self, call: Call) -> torch.Tensor:
        """Writes the rows' keys and values, and attends over all their sequences have so far."""
        q, layer = call.q, call.layer
        self._cache.write(call.index, self._slots, call.k, call.v)
        heads, kv_heads = q.shape[0], layer.kv_heads
        out = q.new_empty(self._rows, heads, layer.value_dim)
        for group in self._groups:
            count, each = group.positions.shape
            keys, values = self._cache.gather(call.index, group.blocks)
            keys = keys.view(count, -1, kv_heads, layer.key_dim)[:, : group.length].transpose(1, 2)
            values = values.view(count, -1, kv_heads, layer.value_dim)[:, : group.length]
            values = values.transpose(1, 2)
            mask = group.mask(layer.window, q.dtype)
            if each == 1:
                # The heads that share keys become rows of one head, so that keys are read once.
                query = q[:, group.rows].transpose(0, 1).reshape(count, kv_heads, -1, layer.key_dim)
            else:
                query = q[:, group.rows].unsqueeze(0)
            if layer.softcap:
                result = _capped(query, keys, values, mask, call.scale, layer.softcap)
            else:
                result = scaled_dot_product_attention(
                    query, keys, values, attn_mask=mask, scale=call.scale, enable_gqa=each > 1
                )
            if each == 1:
                out[group.rows] = result.reshape(count, heads, layer.value_dim)
            else:
                out[group.rows] = result[0].transpose(0, 1)
        return out


def _zeros(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(rows, width, dtype=dtype, device=device)
    # torch would write all of it now; this memory is only taken, as zeros, once it is used.
    memory = np.zeros((rows, width * dtype.itemsize), np.uint8)
    return torch.from_numpy(memory).view(dtype)


def _groups(batch: Batch) -> Iterator[tuple[slice, slice]]:
    """Neighbours to be taken together, as (sequences, rows)."""
    counts = torch.bincount(batch.sequences).tolist()
    ends = torch.tensor(counts).cumsum(0)
    needs = (batch.positions[ends - 1] // BLOCK_SIZE + 1).tolist()
    first = row = 0
    while first < len(counts):
        last, real, most = first + 1, needs[first], needs[first]
        while counts[first] == 1 and last < len(counts) and counts[last] == 1:
            real, most = real + needs[last], max(most, needs[last])
            # A call costs about as much as eight blocks of padding.
            if most * (last + 1 - first) > 1.25 * real + 8:
                break
            last += 1
        rows = sum(counts[first:last])
        yield slice(first, last), slice(row, row + rows)
        first, row = last, row + rows


def _capped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attention with squeezed scores, which torch's own does not do. Shapes as for torch's own."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * (scale / softcap)) * softcap
    if mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v)
