"""The next token of every row of logits, in one batched pass.

A row's token depends on its own logits, its parameters and its own random number, on nothing else
of the batch. The whole vocabulary is never sorted, nor drawn from by multinomial, which would take
longer than the model. Min_p, top_k and top_p look among a few most likely tokens; a row for which
those do not suffice finds its threshold from a histogram. Penalties change the few logits of tokens
that a sequence has seen, in rows that have any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from worker.engine.history import History
from worker.engine.interface import SamplingParams
from worker.engine.randomness import uniform

_CANDIDATES: Final = 64
"""How many of the most likely tokens min_p, top_k and top_p choose among at first."""

_STRIPE: Final = 256
"""Tokens whose probabilities are added up together: a draw looks for its stripe, then its token."""

_GREEDY: Final = 1e-5
"""Temperatures below are zero: smaller ones overflow in the division, and end at the same token."""

FAILED: Final = -1
"""In place of a token where the logits are not numbers."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What decides one row.

    Attributes:
        sampling: temperature, top_p, top_k, min_p, penalties and seed count.
        choice: index of the choice.
        position: index of the token to be generated, from 0.
        seen: the tokens that penalties count; None for a row without penalties.
    """

    sampling: SamplingParams
    choice: int
    position: int
    seen: History | None = None

    @property
    def uniform(self) -> float:
        """The row's random number, in [0, 1)."""
        return uniform(self.sampling.seed, self.choice, self.position)


@torch.inference_mode()
def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Chooses a token for each row.

    Args:
        logits: [rows, vocabulary], any float type; they are not changed.
        draws: one a row.

    Returns:
        Token ids, FAILED where a row's largest logit is not a finite number.
    """
    best, token = logits.max(-1)
    tokens: list[int] = torch.where(best.isfinite(), token, FAILED).tolist()
    alive = [i for i, found in enumerate(tokens) if found != FAILED]
    random = [i for i in alive if draws[i].sampling.temperature >= _GREEDY]
    if len(random) < len(alive):
        greedy = [i for i in alive if draws[i].sampling.temperature < _GREEDY]
        if penalized := [i for i in greedy if draws[i].seen is not None]:
            changed = logits[torch.tensor(penalized, device=logits.device)].float()
            _penalize(changed, [draws[i] for i in penalized])
            for i, found in zip(penalized, changed.max(-1).indices.tolist(), strict=True):
                tokens[i] = found
    if not random:
        return tokens
    rows, drawn = _Rows.of(logits, draws, random), [draws[i].sampling for i in random]
    narrow = [i for i, d in enumerate(drawn) if d.top_k > 0 or d.top_p < 1 or d.min_p > 0]
    wide = sorted(set(range(len(random))) - set(narrow))
    if narrow:
        some = rows.take(narrow)
        for i, found in zip(narrow, some.from_best(), strict=True):
            tokens[random[i]] = found
            if found == FAILED:
                rows.cut(i)
                wide.append(i)
        wide.sort()
    if wide:
        for i, found in zip(wide, rows.take(wide).from_all(), strict=True):
            tokens[random[i]] = found
    return tokens


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows that are drawn at random.

    Attributes:
        weights: exp of (logits - the largest) / temperature, float32 [rows, stripes, _STRIPE],
            padded by zeros. So a weight is the share of the largest probability.
        sums: of each stripe, float64 [rows, stripes].
        uniform: float64 [rows].
        top_p: float64 [rows].
        top_k: int64 [rows], 0 for all.
        min_p: float32 [rows], as the weights are.
    """

    weights: torch.Tensor
    sums: torch.Tensor
    uniform: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, draws: Sequence[Draw], chosen: list[int]) -> _Rows:
        """The chosen rows."""
        device = logits.device
        if len(chosen) < logits.shape[0]:
            logits = logits[torch.tensor(chosen, device=device)]
        picked = [draws[i] for i in chosen]
        heat = torch.tensor([d.sampling.temperature for d in picked], device=device)
        stripes = -(-logits.shape[1] // _STRIPE)
        scaled = logits.new_full((len(chosen), stripes * _STRIPE), -torch.inf, dtype=torch.float32)
        inner = scaled[:, : logits.shape[1]]
        inner.copy_(logits)
        _penalize(scaled, picked)
        # The largest is taken away first: a tiny temperature then overflows to -inf only.
        inner.sub_(inner.amax(-1, keepdim=True)).div_(heat[:, None])
        weights = scaled.exp_().view(len(chosen), stripes, _STRIPE)
        return cls(
            weights,
            weights.sum(-1).double(),
            torch.tensor([d.uniform for d in picked], dtype=torch.float64, device=device),
            torch.tensor([d.sampling.top_p for d in picked], dtype=torch.float64, device=device),
            torch.tensor([d.sampling.top_k for d in picked], device=device),
            torch.tensor([d.sampling.min_p for d in picked], device=device),
        )

    def take(self, chosen: list[int]) -> _Rows:
        """Some of the rows."""
        if len(chosen) == self.top_k.numel():
            return self
        index = torch.tensor(chosen, device=self.top_k.device)
        return _Rows(*(getattr(self, name)[index] for name in _Rows.__slots__))

    def from_all(self) -> list[int]:
        """Tokens by their probability in the whole vocabulary."""
        stripes = self.sums.cumsum(-1)
        target = (self.uniform * stripes[:, -1]).clamp_max(_below(stripes[:, -1]))[:, None]
        stripe = torch.searchsorted(stripes, target, right=True)
        before = torch.where(stripe > 0, stripes.gather(1, (stripe - 1).clamp_min(0)), 0.0)
        inside = self.weights[torch.arange(len(target), device=target.device), stripe[:, 0]]
        inside = inside.double().cumsum(-1)
        target = torch.minimum(target - before, _below(inside[:, -1:]))
        token = torch.searchsorted(inside, target, right=True)
        tokens: list[int] = (stripe * _STRIPE + token)[:, 0].tolist()
        return tokens

    def from_best(self) -> list[int]:
        """Tokens by their probability among those that min_p, top_k and top_p keep.

        Returns:
            Token ids, FAILED where there are not enough candidates.
        """
        flat = self.weights.flatten(1)
        weight, token = flat.topk(_CANDIDATES + 1, -1)
        # Equal ones in order of their ids, so that the choice among them is not the algorithm's.
        token, order = token.sort(-1)
        weight, order = weight.gather(1, order).sort(stable=True, dim=-1, descending=True)
        token = token.gather(1, order)
        least = self.min_p[:, None]
        likely = weight >= least
        # All that min_p keeps are among the candidates.
        known = ~likely[:, -1:]
        weight = weight.double()
        limited = self.top_k[:, None] > 0
        beyond = torch.arange(weight.shape[1], device=weight.device) >= self.top_k[:, None]
        kept = torch.where(likely & ~(limited & beyond), weight, 0.0)
        summed = kept.cumsum(-1)
        # What top_p is a share of: the mass that min_p and top_k leave.
        mass = torch.where((limited | known)[:, 0], summed[:, -1], self.sums.sum(-1))
        goal = (self.top_p * mass)[:, None]
        kept = torch.where(summed - kept < goal, kept, 0.0)
        enough = torch.where(
            limited,
            self.top_k[:, None] <= _CANDIDATES,
            (least == 0) & (summed[:, -1:] >= goal),
        )
        enough |= known
        # One as likely as the last that is kept may lie beyond the candidates.
        last = (kept > 0).sum(-1, keepdim=True) - 1
        enough &= weight.gather(1, last) > weight[:, -1:]
        summed = kept.cumsum(-1)
        target = (self.uniform * summed[:, -1]).clamp_max(_below(summed[:, -1]))[:, None]
        picked = token.gather(1, torch.searchsorted(summed, target, right=True))
        tokens: list[int] = torch.where(enough, picked, FAILED)[:, 0].tolist()
        return tokens

    def cut(self, row: int) -> None:
        """Sets the weights to zero that a row's min_p, top_k and top_p leave out."""
        weights = self.weights[row].flatten()
        weights = torch.where(weights >= self.min_p[row], weights, 0.0)
        if top_k := int(self.top_k[row]):
            weights = _most_likely(weights, torch.ones_like(weights), float(top_k))
        if (top_p := float(self.top_p[row])) < 1:
            mass = float(weights.sum(dtype=torch.float64))
            weights = _most_likely(weights, weights, top_p * mass)
        self.weights[row] = weights.view_as(self.weights[row])
        self.sums[row] = self.weights[row].sum(-1).double()


def _penalize(logits: torch.Tensor, draws: Sequence[Draw]) -> None:
    """Changes, in place, the logits of the tokens that penalized rows have seen.

    Args:
        logits: float32 [rows, vocabulary, or more], contiguous.
        draws: one a row.
    """
    # (row, its history, its parameters)
    found = [(i, d.seen, d.sampling) for i, d in enumerate(draws) if d.seen is not None]
    sizes = [len(seen.ids) for _, seen, _ in found]
    if not sum(sizes):
        return

    def spread(values: list[float], kind: type[np.generic]) -> torch.Tensor:
        """A row's value for each of its tokens."""
        repeated = np.repeat(np.array(values, kind), sizes)
        return torch.from_numpy(repeated).to(logits.device)

    # One number for row and column: a gather by two takes several times as long.
    place = spread([i * logits.shape[1] for i, _, _ in found], np.int64)
    place += torch.from_numpy(np.concatenate([seen.ids for _, seen, _ in found])).to(place)
    flat = logits.view(-1)
    counts = torch.from_numpy(np.concatenate([seen.generated for _, seen, _ in found]))
    counts = counts.to(logits.device)
    repetition = spread([s.repetition_penalty for *_, s in found], np.float32)
    old = flat.index_select(0, place)
    new = torch.where(old > 0, old / repetition, old * repetition)
    new -= spread([s.frequency_penalty for *_, s in found], np.float32) * counts
    new -= spread([s.presence_penalty for *_, s in found], np.float32) * (counts > 0)
    # A finite logit stays one: a row that can be sampled from still can be.
    most = torch.finfo(torch.float32).max
    flat.scatter_(0, place, torch.where(old.isfinite(), new.clamp(-most, most), old))


def _most_likely(weights: torch.Tensor, amounts: torch.Tensor, goal: float) -> torch.Tensor:
    """Weights with zeros for all but the largest, as few as have amounts of `goal` together.

    Args:
        weights: in [0, 1], float32 [vocabulary].
        amounts: what each counts, [vocabulary].
        goal: positive.
    """
    # The bits of positive floats are in order as integers; half of them make the bins.
    key = weights.view(torch.int32) >> 16
    bins = torch.bincount(key, amounts.double()).flip(0).cumsum(0)
    edge = int(torch.searchsorted(bins, torch.tensor(goal, dtype=bins.dtype, device=bins.device)))
    if edge >= bins.numel():
        return weights
    above = float(bins[edge - 1]) if edge else 0.0
    last = bins.numel() - 1 - edge
    result = torch.where(key > last, weights, 0.0)
    inside = (key == last).nonzero()[:, 0]
    inside = inside[weights[inside].sort(stable=True, descending=True).indices]
    amount = amounts[inside].double()
    inside = inside[above + amount.cumsum(0) - amount < goal]
    result[inside] = weights[inside]
    return result


def _below(x: torch.Tensor) -> torch.Tensor:
    """The next smaller number: a draw that rounding pushed to the very end stays inside."""
    return torch.nextafter(x, torch.zeros_like(x))
