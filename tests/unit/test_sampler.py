"""Tokens are drawn from the exact distribution, by the row's own random number alone."""

from __future__ import annotations

import math
import random

import pytest

torch = pytest.importorskip("torch")

from worker.engine.interface import SamplingParams  # noqa: E402
from worker.engine.randomness import random_bits, uniform  # noqa: E402
from worker.engine.sampler import FAILED, Draw, sample  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def draw(position: int = 0, choice: int = 0, **sampling: float | int) -> Draw:
    return Draw(SamplingParams(max_tokens=1, **sampling), choice, position)  # type: ignore[arg-type]


def logits(rows: int, width: int, spread: float, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * spread


def exact(row: torch.Tensor, temperature: float, top_p: float, top_k: int) -> list[float]:
    """The distribution by its definition: sort, cut at top_k, cut at top_p, share out."""
    probabilities = torch.softmax(row.double() / temperature, -1).tolist()
    order = sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i))
    order = order[: top_k or None]
    mass = sum(probabilities[i] for i in order)
    kept, seen = [], 0.0
    for i in order:
        if seen >= top_p * mass:
            break
        kept.append(i)
        seen += probabilities[i]
    return [probabilities[i] / seen if i in set(kept) else 0.0 for i in range(len(probabilities))]


def chi_square(counts: list[int], shares: list[float]) -> float:
    """How improbable the counts are, in standard deviations of the chi-square (Wilson-Hilferty)."""
    total = sum(counts)
    bins: list[tuple[float, float]] = []
    rest_count, rest_share = 0, 0.0
    for count, share in zip(counts, shares, strict=True):
        if share == 0:
            assert count == 0, "an impossible token was drawn"
        elif share * total < 5:
            rest_count, rest_share = rest_count + count, rest_share + share
        else:
            bins.append((count, share * total))
    if rest_share * total >= 5:
        bins.append((rest_count, rest_share * total))
    statistic = sum((count - want) ** 2 / want for count, want in bins)
    free = len(bins) - 1
    if free == 0:
        return 0.0
    spread = 2 / (9 * free)
    return ((statistic / free) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


@pytest.mark.parametrize(
    ("width", "spread", "temperature", "top_p", "top_k"),
    [
        (40, 2.0, 1.0, 1.0, 0),
        (1000, 1.0, 0.7, 1.0, 0),
        (40, 2.0, 1.0, 0.8, 0),
        (40, 2.0, 2.0, 1.0, 7),
        (300, 1.0, 1.0, 0.6, 30),
        # What follows needs more than the first candidates.
        (700, 1.0, 1.0, 0.9, 0),
        (700, 1.0, 1.3, 1.0, 100),
        (700, 1.0, 1.0, 0.7, 200),
        (30, 1.0, 1.0, 0.9, 500),
    ],
)
def test_the_distribution_is_exact(
    width: int, spread: float, temperature: float, top_p: float, top_k: int
) -> None:
    row, batch, count = logits(1, width, spread), 256, 12
    shares = exact(row[0], temperature, top_p, top_k)
    counts = [0] * width
    for i in range(count):
        draws = [
            draw(i * batch + j, temperature=temperature, top_p=top_p, top_k=top_k, seed=11)
            for j in range(batch)
        ]
        for token in sample(row.expand(batch, -1), draws):
            counts[token] += 1
    assert abs(chi_square(counts, shares)) < 4


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    source, rows, width = random.Random(3), 60, 3000
    table = logits(rows, width, 2.0).to(torch.bfloat16)
    draws = [
        draw(
            position=source.randrange(1000),
            choice=source.randrange(4),
            temperature=source.choice([0.0, 0.3, 1.0, 2.0]),
            top_p=source.choice([1.0, 1.0, 0.5, 0.95, 0.999]),
            top_k=source.choice([0, 0, 1, 20, 64, 65, 900, 5000]),
            seed=source.randrange(2**63),
        )
        for _ in range(rows)
    ]
    alone = [sample(table[i : i + 1], [draws[i]])[0] for i in range(rows)]
    for _ in range(10):
        chosen = source.sample(range(rows), source.randrange(1, rows + 1))
        got = sample(table[chosen], [draws[i] for i in chosen])
        assert got == [alone[i] for i in chosen]


def test_rows_that_need_more_candidates_keep_their_places() -> None:
    table = logits(6, 3000, 2.0)
    draws = [draw(i, top_k=900 * (i % 2 == 0)) for i in range(6)]
    alone = [sample(table[i : i + 1], [draws[i]])[0] for i in range(6)]
    assert sample(table, draws) == alone


def test_only_seed_choice_and_position_change_the_random_number() -> None:
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    keys = [(s, c, p) for s in (0, 1, 2**63 - 1) for c in range(4) for p in range(500)]
    assert len({random_bits(*key) for key in keys}) == len(keys)
    numbers = [uniform(*key) for key in keys]
    assert all(0 <= number < 1 for number in numbers)
    counts = [sum(int(number * 10) == i for number in numbers) for i in range(10)]
    assert abs(chi_square(counts, [0.1] * 10)) < 4


def test_zero_temperature_takes_the_most_likely() -> None:
    table = logits(5, 333, 1.0)
    assert (
        sample(table, [draw(temperature=0, seed=i) for i in range(5)]) == table.argmax(-1).tolist()
    )


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-45, 1e-38, 9.9e-6, 1e-5])
def test_the_smallest_temperatures_are_zero(temperature: float) -> None:
    table = logits(6, 333, 1.0)
    table[1, 5:] = -torch.inf
    table[2] *= 1e30
    for more in ({}, {"top_p": 0.5}, {"top_k": 3}, {"top_k": 100, "top_p": 0.9}):
        draws = [draw(i, temperature=temperature, **more) for i in range(6)]
        assert sample(table, draws) == table.argmax(-1).tolist()


def test_one_candidate_leaves_no_choice() -> None:
    table = logits(4, 333, 1.0)
    best = table.argmax(-1).tolist()
    assert sample(table, [draw(i, temperature=2, top_k=1) for i in range(4)]) == best
    assert sample(table, [draw(i, temperature=2, top_p=1e-9) for i in range(4)]) == best
    assert sample(table, [draw(i, temperature=1e-6) for i in range(4)]) == best


def test_equally_likely_tokens_are_kept_in_order_of_their_ids() -> None:
    for width in (50, 400, 5000):
        table = torch.zeros(1, width).expand(60, -1)
        for keep in (10, 100):
            draws = [draw(i, top_k=keep) for i in range(60)]
            assert max(sample(table, draws)) < keep


def test_forbidden_tokens_are_never_drawn() -> None:
    table = torch.full((200, 1000), -torch.inf)
    table[:, [3, 700]] = 1.0
    for more in ({}, {"top_k": 20}, {"top_p": 0.99}, {"top_k": 500, "top_p": 0.9}):
        assert set(sample(table, [draw(i, **more) for i in range(200)])) == {3, 700}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_no_numbers_fail_alone(bad: float, temperature: float) -> None:
    table = logits(3, 100, 1.0)
    draws = [draw(i, temperature=temperature, top_p=0.9) for i in range(3)]
    right = sample(table, draws)
    table[1, 50] = bad
    assert sample(table, draws) == [right[0], FAILED, right[2]]
    table[1] = -torch.inf
    assert sample(table, draws)[1] == FAILED
