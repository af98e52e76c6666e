"""Every sampling parameter, mixed in one batch, against a slow sampler by the definitions."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from worker.engine.history import History  # noqa: E402
from worker.engine.interface import EngineRequest, SamplingParams  # noqa: E402
from worker.engine.sampler import FAILED, Draw, sample  # noqa: E402

pytestmark = pytest.mark.torch

PROFILE = settings(max_examples=60, derandomize=True, database=None, deadline=None)
SLACK = 1e-6
"""Of the whole mass: adding up in another order moves the border between two tokens by less."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def draw_of(
    sampling: SamplingParams, prompt: list[int], generated: list[int], choice: int = 0
) -> Draw:
    request = EngineRequest("r", prompt, sampling, generated)
    return Draw(sampling, choice, len(generated), History.of(request))


def penalized(
    row: torch.Tensor, sampling: SamplingParams, prompt: list[int], generated: list[int]
) -> torch.Tensor:
    """A row after the penalties, token by token as vLLM's and OpenAI's documents define them."""
    row = row.float().clone()
    one = torch.tensor  # A float32 for each number: Python's own would compute in float64.
    for token in {*prompt, *generated}:
        value = row[token]
        repetition = one(sampling.repetition_penalty)
        value = value / repetition if value > 0 else value * repetition
        value = value - one(sampling.frequency_penalty) * generated.count(token)
        if token in generated:
            value = value - one(sampling.presence_penalty)
        row[token] = value
    return row


def acceptable(row: torch.Tensor, draw: Draw) -> set[int]:
    """The tokens that a row, after penalties, may give: by a full sort, and by the random number.

    The kept tokens share out [0, 1) by their probabilities, the likely ones first or in order of
    their ids; more than one token only where the random number falls on a border.
    """
    sampling = draw.sampling
    if sampling.temperature < 1e-5:
        return {int(row.argmax())}
    weights = ((row - row.max()) / torch.tensor(sampling.temperature)).exp()
    value, order = weights.sort(descending=True, stable=True)
    possible = (value >= torch.tensor(sampling.min_p)) & (value > 0)
    kept: list[int] = order[possible].tolist()[: sampling.top_k or None]
    mass = weights[kept].double()
    shares = (mass.cumsum(0) - mass) / mass.sum()
    found: set[int] = set()
    # Where top_p's border is a matter of rounding, the last token may be in or out.
    for border in (sampling.top_p - SLACK, sampling.top_p + SLACK):
        line = kept[: max(1, int((shares < border).sum()))]
        for places in (line, sorted(line)):
            ends = weights[places].double().cumsum(0)
            ends = (ends / ends[-1].clone()).tolist()
            found |= {
                token
                for token, begin, end in zip(places, [0.0, *ends], ends, strict=False)
                if begin - SLACK <= draw.uniform <= end + SLACK
            }
    return found


@st.composite
def rows(draw: st.DrawFn, width: int) -> tuple[SamplingParams, list[int], list[int], int]:
    """A row's parameters, its prompt, what it generated, and the index of its choice."""
    ids = st.integers(0, width - 1)
    penalty = st.sampled_from([0.0, 0.0, 0.5, -0.7, 2.0, -2.0])
    sampling = SamplingParams(
        max_tokens=1000,
        temperature=draw(st.sampled_from([0.0, 0.0, 0.3, 0.8, 1.0, 2.0])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.3, 0.95])),
        top_k=draw(st.sampled_from([0, 0, 1, 5, 64, 65, 300])),
        min_p=draw(st.sampled_from([0.0, 0.0, 1e-4, 0.05, 0.5, 1.0])),
        presence_penalty=draw(penalty),
        frequency_penalty=draw(penalty),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.5, 0.01, 100.0])),
        seed=draw(st.integers(0, 2**63 - 1)),
    )
    prompt = draw(st.lists(ids, min_size=1, max_size=30))
    return sampling, prompt, draw(st.lists(ids, max_size=30)), draw(st.integers(0, 3))


@PROFILE
@given(st.data())
def test_all_parameters_in_one_batch(data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([40, 400, 3000]))
    batch = data.draw(st.lists(rows(width), min_size=1, max_size=12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    spread = data.draw(st.sampled_from([0.3, 2.0, 8.0]))
    table = torch.randn(len(batch), width, generator=generator) * spread
    if data.draw(st.booleans()):
        table = table.bfloat16()
    untouched = table.clone()
    draws = [draw_of(*row) for row in batch]
    tokens = sample(table, draws)
    assert torch.equal(table, untouched)
    for i, (sampling, prompt, generated, _) in enumerate(batch):
        row = penalized(table[i], sampling, prompt, generated)
        assert tokens[i] in acceptable(row, draws[i]), (i, batch[i])


def test_a_row_is_the_same_alone_and_among_others_with_penalties() -> None:
    source, width = random.Random(5), 3000
    generator = torch.Generator().manual_seed(3)
    table = (torch.randn(40, width, generator=generator) * 2).bfloat16()
    draws = [
        draw_of(
            SamplingParams(
                max_tokens=9,
                temperature=source.choice([0.0, 0.7, 1.5]),
                top_p=source.choice([1.0, 0.9]),
                min_p=source.choice([0.0, 0.02, 0.9]),
                presence_penalty=source.choice([0.0, 1.0]),
                repetition_penalty=source.choice([1.0, 1.2]),
                seed=i,
            ),
            [source.randrange(width) for _ in range(50)],
            [source.randrange(width) for _ in range(source.randrange(50))],
        )
        for i in range(40)
    ]
    alone = [sample(table[i : i + 1], [draws[i]])[0] for i in range(40)]
    for _ in range(10):
        chosen = source.sample(range(40), source.randrange(1, 41))
        assert sample(table[chosen], [draws[i] for i in chosen]) == [alone[i] for i in chosen]


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 0.5])
def test_what_is_penalized_enough_is_not_said_again(temperature: float) -> None:
    row = torch.zeros(1, 100)
    row[0, [3, 5]] = torch.tensor([50.0, 49.0])
    said: list[int] = []
    sampling = SamplingParams(9, temperature, presence_penalty=1.5)
    for _ in range(2):
        said += sample(row, [draw_of(sampling, [3], said)])
    assert said == [3, 5], "the prompt is not counted by presence and frequency"
    sampling = SamplingParams(9, temperature, repetition_penalty=1.5)
    assert sample(row, [draw_of(sampling, [3], [])]) == [5], "but by repetition it is"


def test_min_p_of_one_leaves_the_most_likely() -> None:
    table = torch.randn(30, 500, generator=torch.Generator().manual_seed(1))
    draws = [draw_of(SamplingParams(1, 2.0, min_p=1.0, seed=i), [1], []) for i in range(30)]
    assert sample(table, draws) == table.argmax(-1).tolist()


def test_min_p_of_a_flat_row_keeps_all_that_it_should() -> None:
    row = torch.zeros(1, 1000)
    row[0, 500:] = -1.0
    draws = [draw_of(SamplingParams(1, min_p=0.5, seed=i), [1], []) for i in range(300)]
    tokens = sample(row.expand(300, -1), draws)
    assert max(tokens) < 500
    assert len(set(tokens)) > 200


@pytest.mark.parametrize("repetition", [0.01, 100.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_largest_numbers_stay_numbers(repetition: float, temperature: float) -> None:
    width = 70
    table = torch.full((3, width), 3e38)
    table[1] *= -1
    table[2, 1:] = -torch.inf
    everything = list(range(width))
    sampling = SamplingParams(1, temperature, 0.9, repetition_penalty=repetition)
    tokens = sample(table, [draw_of(sampling, everything, []) for _ in range(3)])
    assert all(0 <= token < width for token in tokens[:2])
    assert tokens[2] == 0
    table[1, 4] = float("nan")
    assert sample(table, [draw_of(sampling, everything, []) for _ in range(3)])[1] == FAILED


# -- the history ----------------------------------------------------------------------------------


@PROFILE
@given(
    st.lists(st.integers(0, 300), max_size=200),
    st.lists(st.integers(0, 300), max_size=200),
    st.integers(0, 200),
)
def test_a_history_counts(prompt: list[int], generated: list[int], earlier: int) -> None:
    history = History(prompt, generated[:earlier])
    for token in generated[earlier:]:
        history.add(token)
    ids, counts = history.ids, history.generated
    assert (ids.dtype, counts.dtype) == (np.int32, np.float32)
    assert ids.flags.c_contiguous
    assert counts.flags.c_contiguous
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {
        token: generated.count(token) for token in {*prompt, *generated}
    }
    assert len(set(ids.tolist())) == len(ids)


def test_a_history_is_kept_only_where_it_counts() -> None:
    def seen(**sampling: float) -> History | None:
        return History.of(EngineRequest("r", [1, 2], SamplingParams(9, **sampling), [7, 7]))  # type: ignore[arg-type]

    assert seen(min_p=0.5, top_p=0.5) is None
    for name in ("presence_penalty", "frequency_penalty"):
        history = seen(**{name: 0.1})
        assert history is not None
        assert (history.ids.tolist(), history.generated.tolist()) == ([7], [2])
    history = seen(repetition_penalty=1.1)
    assert history is not None
    assert (history.ids.tolist(), history.generated.tolist()) == ([1, 2, 7], [0, 0, 2])
