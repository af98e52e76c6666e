"""The native CPU backend: one call of compiled code a step, without the GIL."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from worker.engine.backend import Batch
from worker.engine.blocks import BLOCK_SIZE
from worker.engine.decoder import Sizes, Weight
from worker.engine.load_check import CHECK_OUTS, LEAST_BLOCKS, LoadCheck
from worker.engine.native.build import NativeUnavailable, best_level, library
from worker.engine.native.library import BFLOAT16, FLOAT32, CLayer, CShape, CStep, Library
from worker.engine.sampler import Draw

_KEY_UNIT: Final = 32
"""Keys are padded to a multiple of it: a whole tile."""

_NO_IDS: Final = np.empty(0, np.int32)
_NO_COUNTS: Final = np.empty(0, np.float32)


class CpuBackend:
    """A dense decoder in compiled code.

    Args:
        sizes, weights: the decoder; its weights are copied.
        check: what it must say; None if it is known that it does.
        size: from the bytes of one block to how many are wanted; at least LEAST_BLOCKS are made.
        most_rows: of a step. most_outs: rows of logits of a step.
        threads: 0 for one a processor that this process may use.
        exact: a row's result is the same in every batch and every piece of its prompt.
        folder: for compiled libraries.
        level: of the instruction set, of build.LEVELS; "" for the best.

    Attributes:
        level: that is used.

    Raises:
        NativeUnavailable: it cannot run here, or computes the model wrongly.
        MemoryError: there is not enough.
    """

    device = "cpu"

    def __init__(
        self,
        sizes: Sizes,
        weights: Iterable[Weight],
        check: LoadCheck | None,
        size: Callable[[int], int],
        *,
        most_rows: int,
        most_outs: int,
        threads: int = 0,
        exact: bool = False,
        folder: Path,
        level: str = "",
    ) -> None:
        self.level = level or best_level()
        code = Library(library(self.level, folder))
        self.vocab_size = sizes.vocab
        self.dtype = sizes.dtype
        self.block_count = max(LEAST_BLOCKS, size(_block_bytes(sizes)))
        self.threads = threads or len(os.sched_getaffinity(0))
        self._outs = max(most_outs, CHECK_OUTS)
        shape = CShape(
            dtype=BFLOAT16 if sizes.dtype == "bfloat16" else FLOAT32,
            activation=sizes.activation,
            layers=len(sizes.layers),
            hidden=sizes.hidden,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_size=sizes.head_size,
            ffn=sizes.ffn,
            vocab=sizes.vocab,
            rope_tables=sizes.rope_tables,
            positions=sizes.positions,
            blocks=self.block_count,
            most_rows=max(most_rows, CHECK_OUTS),
            most_outs=self._outs,
            threads=self.threads,
            exact=exact,
            norm_eps=sizes.norm_eps,
            embedding_scale=sizes.embedding_scale,
            logit_soft_cap=sizes.logit_soft_cap,
        )
        layers = [
            CLayer(asks.rope_table, asks.window, asks.scale, asks.soft_cap) for asks in sizes.layers
        ]
        self._handle = code.create(shape, layers)
        try:
            for weight in weights:
                tensor = weight.tensor()
                self._handle.set(weight.layer, weight.part, tensor.data_ptr(), tensor.numel())
            self._handle.complete()
            if check is not None and (difference := check.difference(self)):
                raise NativeUnavailable(difference)
        except BaseException:
            self._handle.close()
            raise
        # Two teams of threads on the same cores cost half of the speed: torch's, which spin after
        # each parallel operation, have nothing to do any more.
        torch.set_num_threads(1)

    def step(self, batch: Batch) -> torch.Tensor:
        """Computes the rows; see `Backend.step`."""
        step, _kept = _step(batch)
        self._handle.run(step, 0)
        return self._logits(batch.out_rows.numel())

    def sample(self, batch: Batch, draws: Sequence[Draw]) -> list[int]:
        """Computes the rows and draws their tokens; see `Backend.sample`."""
        step, kept = _step(batch)
        kept += _draws(step, draws)
        tokens = np.empty(len(draws), np.int64)
        self._handle.run(step, tokens.ctypes.data)
        found: list[int] = tokens.tolist()
        return found

    def clear(self, blocks: list[int]) -> None:
        """Fills blocks with zeros."""
        for block in blocks:
            self._handle.clear(block)

    def alone(self, alone: bool) -> None:
        """Whether one thread computes without the others; see `Backend.alone`."""
        self._handle.alone(alone)

    def close(self) -> None:
        """Frees weights and cache."""
        self._handle.close()

    def _logits(self, rows: int) -> torch.Tensor:
        address, stride = self._handle.logits()
        memory = (ctypes.c_float * (self._outs * stride)).from_address(address)
        values = torch.from_numpy(np.ctypeslib.as_array(memory))
        return values.view(self._outs, stride)[:rows, : self.vocab_size]


def _block_bytes(sizes: Sizes) -> int:
    """Bytes of one block over all layers; see native/source/cache.h."""
    keys = -(-sizes.head_size // _KEY_UNIT) * _KEY_UNIT
    numbers = len(sizes.layers) * sizes.kv_heads * (keys + sizes.head_size) * BLOCK_SIZE
    return numbers * sizes.torch_dtype.itemsize


def _step(batch: Batch) -> tuple[CStep, list[Any]]:
    """The C structure of a batch, and what it points to."""
    step = CStep(
        rows=batch.ids.numel(),
        sequences=batch.block_table.shape[0],
        table_width=batch.block_table.shape[1],
        outs=batch.out_rows.numel(),
    )
    kept: list[Any] = []
    for name, tensor in (
        ("ids", batch.ids),
        ("positions", batch.positions),
        ("sequence", batch.sequences),
        ("table", batch.block_table),
        ("out_rows", batch.out_rows),
    ):
        tensor = tensor.to(torch.int64).contiguous()
        kept.append(tensor)
        setattr(step, name, tensor.data_ptr())
    return step, kept


def _draws(step: CStep, draws: Sequence[Draw]) -> list[Any]:
    """Points a structure to what decides its rows; returns what it points to."""
    sampling = [draw.sampling for draw in draws]
    seen = [draw.seen for draw in draws]
    arrays: dict[str, NDArray[Any]] = {
        "temperature": np.array([s.temperature for s in sampling], np.float32),
        "top_p": np.array([s.top_p for s in sampling], np.float32),
        "min_p": np.array([s.min_p for s in sampling], np.float32),
        "repetition": np.array([s.repetition_penalty for s in sampling], np.float32),
        "presence": np.array([s.presence_penalty for s in sampling], np.float32),
        "frequency": np.array([s.frequency_penalty for s in sampling], np.float32),
        "top_k": np.array([s.top_k for s in sampling], np.int64),
        "seed": np.array([s.seed for s in sampling], np.int64),
        "choice": np.array([draw.choice for draw in draws], np.int64),
        "position": np.array([draw.position for draw in draws], np.int64),
        "seen_start": np.cumsum([0, *(len(s.ids) if s else 0 for s in seen)], dtype=np.int64),
        "seen_ids": np.concatenate([_NO_IDS, *(s.ids for s in seen if s)]),
        "seen_generated": np.concatenate([_NO_COUNTS, *(s.generated for s in seen if s)]),
    }
    for name, array in arrays.items():
        setattr(step, name, array.ctypes.data)
    return list(arrays.values())
