"""The contract between the engine and a device: rows in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from worker.engine.sampler import Draw


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. A row is one token of one sequence; nothing is padded by length.

    The rows of a sequence are neighbours, in order of position. Keys and values of earlier
    positions are in the cache already; the rows' own are written by the step.

    Attributes:
        ids: token ids, int64 [rows], on the CPU like all of these.
        positions: position of each row in its sequence, int64 [rows].
        sequences: index of each row's sequence, int64 [rows], not falling, from 0 without a gap.
        block_table: blocks of each sequence, int64 [sequences, most blocks], filled up with -1.
            Position p of a sequence lies in its block p // BLOCK_SIZE.
        out_rows: rows whose logits are wanted, int64 [out].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    sequences: torch.Tensor
    block_table: torch.Tensor
    out_rows: torch.Tensor


class Backend(Protocol):
    """A model on a device, with its KV cache.

    Attributes:
        vocab_size: width of the logits.
        block_count: blocks of the cache.
        device, dtype: names, as in EngineInfo.
        threads: that compute a step; 1 on a device that is no CPU.
    """

    vocab_size: int
    block_count: int
    device: str
    dtype: str
    threads: int

    def step(self, batch: Batch) -> torch.Tensor:
        """Computes the rows and writes their keys and values.

        Computing a row again overwrites what it wrote, so that a failed step can be repeated.

        Returns:
            Logits [out, vocab_size] on the backend's device, in any float type, valid until the
            next step.
        """

    def sample(self, batch: Batch, draws: Sequence[Draw]) -> list[int]:
        """Computes the rows as `step` does, and draws a token for each out row.

        Args:
            batch: of the step.
            draws: one an out row.

        Returns:
            Token ids, FAILED where a row's largest logit is not a finite number. What a row draws
            depends on its logits and its draw alone.
        """

    def alone(self, alone: bool) -> None:
        """Whether the calling thread computes without others, until it is told otherwise."""

    def clear(self, blocks: list[int]) -> None:
        """Fills blocks with zeros, lest what is not a number reaches their next holder."""

    def close(self) -> None:
        """Frees weights and cache."""
