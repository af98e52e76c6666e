"""Each kernel of the native backend alone, against torch, for every level this processor has."""

from __future__ import annotations

import ctypes
import math
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402

from tests.contract.native import LEVELS, native_library  # noqa: E402
from worker.engine.interface import SamplingParams  # noqa: E402
from worker.engine.randomness import uniform  # noqa: E402
from worker.engine.sampler import FAILED  # noqa: E402

# Three libraries are compiled first.
pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]

PROBES = Path(__file__).with_name("native_probes.cpp")
F = ctypes.c_float
L = ctypes.c_int64


@pytest.fixture(scope="session", params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def probes(level: str) -> ctypes.CDLL:
    code = ctypes.CDLL(str(native_library(level, extra=[PROBES])))
    code.probe_choose.restype = L
    code.probe_best.restype = L
    code.probe_uniform.restype = ctypes.c_double
    assert code.probe_start() == 0
    return code


def p(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    if tensor is None:
        return ctypes.c_void_p()
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KINDS = pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def panels(product: torch.Tensor, gate_up: bool) -> torch.Tensor:
    """Columns in the order in which the packed matrix has them, padded with zeros."""
    rows, outputs = product.shape
    if not gate_up:
        return torch.nn.functional.pad(product, (0, -outputs % 32))
    half = torch.nn.functional.pad(product.view(rows, 2, -1), (0, -(outputs // 2) % 16))
    return half.view(rows, 2, -1, 16).transpose(1, 2).reshape(rows, -1)


@KINDS
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        (1, 32, 32),
        (2, 33, 7),
        (7, 100, 70),
        (16, 64, 96),
        (17, 576, 64),
        (33, 48, 130),
        (300, 80, 40),
    ],
)
@pytest.mark.parametrize("gate_up", [False, True])
def test_multiply(
    probes: ctypes.CDLL, kind: torch.dtype, rows: int, inputs: int, outputs: int, gate_up: bool
) -> None:
    outputs += outputs % 2 if gate_up else 0
    a, w = randn(rows, inputs).to(kind), randn(outputs, inputs, seed=1).to(kind)
    for bias in (None, randn(outputs, seed=2)):
        want = a.double() @ w.double().T + (0 if bias is None else bias.double())
        want = panels(want, gate_up)
        got = torch.full(want.shape, float("nan"))
        probes.probe_multiply(
            kind == torch.bfloat16, rows, inputs, outputs, gate_up, p(a), p(w), p(bias), p(got)
        )
        # Products of bf16 are exact in float32: the sums alone are rounded.
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6 * inputs)


@KINDS
def test_a_row_does_not_depend_on_the_others(probes: ctypes.CDLL, kind: torch.dtype) -> None:
    a, w = randn(70, 600).to(kind), randn(64, 600, seed=1).to(kind)
    results = []
    for rows in (1, 3, 16, 17, 40, 70):
        got = torch.empty(rows, 64)
        probes.probe_multiply(kind == torch.bfloat16, rows, 600, 64, 0, p(a), p(w), p(None), p(got))
        results.append(got)
    for got in results:
        assert torch.equal(got, results[-1][: len(got)])


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: int,
    window: int,
    scale: float,
    soft_cap: float,
) -> torch.Tensor:
    """By its definition, in float64. q: [rows, heads, size], k, v: [length, kv_heads, size]."""
    q, k, v = q.double(), k.double(), v.double()
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = torch.einsum("rhd,thd->hrt", q, k) * scale
    if soft_cap:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    rows = torch.arange(position, position + q.shape[0])[:, None]
    keys = torch.arange(k.shape[0])[None]
    seen = (keys <= rows) & ((keys > rows - window) if window else (keys >= 0))
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hrt,thd->rhd", torch.softmax(scores, -1), v)


@KINDS
@pytest.mark.parametrize("size", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "count", "position", "window", "soft_cap"),
    [
        (1, 1, 1, 0, 0, 0.0),
        (9, 3, 1, 95, 0, 0.0),
        (7, 1, 40, 0, 0, 0.0),
        (4, 2, 37, 700, 0, 0.0),
        (8, 1, 5, 1100, 40, 0.0),
        (20, 1, 70, 3, 9, 6.0),
        (3, 3, 33, 510, 600, 0.0),
        # Neighbours of whom some see nothing of the first chunk.
        (1, 1, 16, 511, 9, 6.0),
        (3, 1, 40, 500, 40, 0.0),
    ],
)
def test_attention(
    probes: ctypes.CDLL,
    level: str,
    kind: torch.dtype,
    size: int,
    heads: int,
    kv_heads: int,
    count: int,
    position: int,
    window: int,
    soft_cap: float,
) -> None:
    length = position + count
    q = randn(count, heads, size).to(kind)
    k, v = (randn(length, kv_heads, size, seed=s).to(kind) for s in (1, 2))
    blocks = -(-length // 32)
    table = torch.randperm(blocks + 3, generator=torch.Generator().manual_seed(3))[:blocks]
    table = table.contiguous()
    want = attention(q, k, v, position, window, size**-0.5, soft_cap)
    bf16 = kind == torch.bfloat16

    def attend(tiles: bool, first: int, rows: int) -> torch.Tensor:
        """The rows from the first-th on, in one call."""
        some, got = q[first : first + rows], torch.full_like(q[:rows], float("nan"))
        assert (
            probes.probe_attention(
                bf16,
                tiles,
                heads,
                kv_heads,
                size,
                rows,
                position + first,
                window,
                F(size**-0.5),
                F(soft_cap),
                p(table),
                blocks + 3,
                p(some),
                p(k),
                p(v),
                p(got),
            )
            == 0
        )
        return got

    tolerance = 3e-2 if bf16 else 2e-5
    for tiles in (False, True) if bf16 and level == "amx" else (False,):
        got = attend(tiles, 0, count)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    # By vectors a row is the same bit by bit, alone and among its neighbours.
    alone = torch.cat([attend(False, row, 1) for row in range(count)])
    assert torch.equal(attend(False, 0, count), alone)


@pytest.mark.parametrize(
    ("which", "exact"),
    [
        (0, torch.exp),
        (1, torch.tanh),
        (2, torch.nn.functional.silu),
        (3, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
)
def test_functions(probes: ctypes.CDLL, which: int, exact: object) -> None:
    x = torch.cat([torch.linspace(-90, 88, 8000), torch.linspace(-3, 3, 8000)])
    got = torch.empty_like(x)
    probes.probe_function(which, x.numel(), p(x), p(got))
    want = exact(x.double())  # type: ignore[operator]
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=3e-7)
    special = torch.tensor([float("nan"), -torch.inf] * 8)
    got = torch.empty(16)
    probes.probe_function(0, 16, p(special), p(got))
    assert got[0].isnan()
    assert got[1] == 0


def test_rounding_to_bf16(probes: ctypes.CDLL) -> None:
    x = torch.cat(
        [randn(4096), torch.tensor([0.0, torch.inf, -torch.inf, 1 + 2**-8, 1 + 3 * 2**-8])]
    )
    x = torch.nn.functional.pad(x, (0, -x.numel() % 16))
    x[-1] = float("nan")
    got = torch.empty(2, x.numel(), dtype=torch.bfloat16)
    operand = torch.empty(x.numel())
    probes.probe_to_bf16(x.numel(), p(x), p(got[0]), p(got[1]), p(operand))
    want = x.to(torch.bfloat16)
    for one in (*got, operand):
        assert torch.equal(one[:-1], want[:-1].to(one.dtype))
        assert one[-1].isnan()


def test_norm_and_rotary_positions(probes: ctypes.CDLL) -> None:
    x, weight = randn(96), randn(96, seed=1)
    got = torch.empty(96)
    probes.probe_norm(96, p(x), p(weight), F(1e-5), p(got))
    want = torch.nn.functional.rms_norm(x.double(), (96,), weight.double(), 1e-5)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    cos, sin = randn(40, seed=2), randn(40, seed=3)
    for norm in (None, weight[:80].contiguous()):
        head, got = x[:80].contiguous(), torch.empty(80)
        probes.probe_rotate(80, p(head), p(norm), F(1e-6), p(cos), p(sin), p(got))
        if norm is not None:
            head = torch.nn.functional.rms_norm(head, (80,), norm, 1e-6)
        a, b = head.chunk(2)
        want = torch.cat([a * cos - b * sin, b * cos + a * sin])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_random_numbers_are_those_of_python(probes: ctypes.CDLL) -> None:
    source = random.Random(1)
    for _ in range(200):
        seed, choice = source.randrange(1 << 63), source.randrange(1 << 20)
        position = source.randrange(1 << 20)
        got = probes.probe_uniform(L(seed), L(choice), L(position))
        assert got == uniform(seed, choice, position)


def kept(
    row: np.ndarray, sampling: SamplingParams, min_p: float = 0.0
) -> tuple[list[int], np.ndarray]:
    """What min_p, top_k and top_p keep, the most likely first, and all weights: by sorting."""
    row = row.astype(np.float64)
    weights = np.exp((row - row.max()) / sampling.temperature)
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    order = [i for i in order if weights[i] >= min_p]
    order = order[: sampling.top_k or None]
    goal, total, found = sampling.top_p * weights[order].sum(), 0.0, []
    for i in order:
        if total >= goal:
            break
        found.append(i)
        total += weights[i]
    return found, weights


@pytest.mark.parametrize("width", [32, 160, 4096, 49152])
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize(
    ("sampling", "min_p"),
    [
        (SamplingParams(1, 0.8, 0.95), 0.0),
        (SamplingParams(1, 1.0, 1.0), 0.0),
        (SamplingParams(1, 1.3, 0.5), 0.0),
        (SamplingParams(1, 1.0, 1.0, 5), 0.0),
        (SamplingParams(1, 0.9, 0.7, 100), 0.0),
        (SamplingParams(1, 0.9, 0.7, 3000), 0.0),
        (SamplingParams(1, 1.0, 1.0), 0.1),
        (SamplingParams(1, 1.0, 0.8, 40), 0.02),
        (SamplingParams(1, 1.0, 0.6), 0.01),
    ],
)
def test_draws_follow_the_distribution(
    probes: ctypes.CDLL, width: int, spread: float, sampling: SamplingParams, min_p: float
) -> None:
    row = (randn(width) * spread).contiguous()
    known, weights = kept(row.numpy(), sampling, min_p)
    # At the edge rounding may decide otherwise for a token or two.
    loose = set(known) | set(
        kept(
            row.numpy(),
            SamplingParams(1, sampling.temperature, min(1, sampling.top_p + 1e-4), sampling.top_k),
            min_p * 0.999,
        )[0]
    )
    share = np.zeros(width)
    share[known] = weights[known] / weights[known].sum()
    # The draws' random numbers are even, so that halves of the mass are drawn half of the time.
    order, draws = np.argsort(-share), 1500 if width <= 4096 else 300
    top = set(order[: int(np.searchsorted(np.cumsum(share[order]), 0.5)) + 1].tolist())
    hits = 0
    for i in range(draws):
        token = probes.probe_choose(
            p(row),
            width,
            F(sampling.temperature),
            F(sampling.top_p),
            F(min_p),
            F(1),
            F(0),
            F(0),
            L(sampling.top_k),
            L(7),
            L(0),
            L(i),
            L(0),
            None,
            None,
        )
        assert token in loose
        hits += token in top
    want = share[list(top)].sum()
    assert abs(hits / draws - want) < 4 * math.sqrt(want * (1 - want) / draws) + 2e-3


def test_the_most_likely_token_is_the_first_of_equals(probes: ctypes.CDLL) -> None:
    row = randn(1024).contiguous()
    row[[300, 77, 901]] = row.max() + 1

    def choose(row: torch.Tensor) -> int:
        return int(
            probes.probe_choose(
                p(row),
                row.numel(),
                F(0),
                F(1),
                F(0),
                F(1),
                F(0),
                F(0),
                L(0),
                L(0),
                L(0),
                L(0),
                L(0),
                None,
                None,
            )
        )

    assert choose(row) == 77
    for bad in (float("nan"), torch.inf):
        broken = row.clone()
        broken[5] = bad
        assert choose(broken) == FAILED
    assert choose(torch.full((64,), -torch.inf)) == FAILED


def test_the_most_likely_token_does_not_depend_on_the_order(probes: ctypes.CDLL) -> None:
    """Threads look at the panels that they get to."""
    logits = torch.round(randn(40 * 32) * 2)
    want = int(logits.argmax())
    assert (logits == logits.max()).sum() > 1, "there are equals"
    for seed in range(20):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).int()
        assert probes.probe_best(p(logits), 40, p(order)) == want
    logits[7] = math.nan
    assert probes.probe_best(p(logits), 40, p(order)) == -1


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("threads", "count"), [(1, 5), (2, 1), (2, 40), (3, 41)])
def test_threads_take_over_what_a_slow_one_has_not_begun(
    probes: ctypes.CDLL, threads: int, count: int, alone: bool
) -> None:
    who = torch.zeros(4, count, dtype=torch.int32)
    probes.probe_spread(threads, count, alone, p(who))
    assert bool(((who >= 100) & (who < 100 + threads)).all()), "each once"
    if threads > 1 and count > 1:
        # All of its share would be a half or a third of them.
        assert bool(((who == 99 + threads).sum(dim=1) <= 2).all())


def test_penalties(probes: ctypes.CDLL) -> None:
    row = randn(256).contiguous()
    ids = torch.tensor([3, 200, 17], dtype=torch.int32)
    generated = torch.tensor([0.0, 2.0, 1.0])
    want = row.clone()
    for token, times in zip(ids.tolist(), generated.tolist(), strict=True):
        want[token] = want[token] / 1.3 if want[token] > 0 else want[token] * 1.3
        if times:
            want[token] -= 0.4 + 0.7 * times
    got = row.clone()
    token = probes.probe_choose(
        p(got),
        256,
        F(0),
        F(1),
        F(0),
        F(1.3),
        F(0.4),
        F(0.7),
        L(0),
        L(0),
        L(0),
        L(0),
        L(3),
        p(ids),
        p(generated),
    )
    torch.testing.assert_close(got, want)
    assert token == int(want.argmax())
