"""The native backend computes what transformers computes, and is replaced where it cannot."""

from __future__ import annotations

import copy
import ctypes
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch")

from tests.contract.models import VOCAB, expected, loaded, tiny_model  # noqa: E402
from tests.contract.native import DATA_DIR, FOLDER, LEVELS  # noqa: E402
from tests.contract.test_torch_engine import greedy, prompts, run  # noqa: E402
from worker.engine import EngineError, EngineOptions, backends, cpu, dense  # noqa: E402
from worker.engine.backend import Batch  # noqa: E402
from worker.engine.blocks import BLOCK_SIZE  # noqa: E402
from worker.engine.cpu import CpuBackend  # noqa: E402
from worker.engine.dense import Dense  # noqa: E402
from worker.engine.interface import EngineRequest, SamplingParams  # noqa: E402
from worker.engine.load_check import LoadCheck  # noqa: E402
from worker.engine.native import build  # noqa: E402
from worker.engine.native.build import NativeUnavailable, best_level, library  # noqa: E402
from worker.engine.native.library import Part  # noqa: E402
from worker.engine.reference import ReferenceBackend  # noqa: E402
from worker.engine.torch_engine import TorchEngine  # noqa: E402

# Libraries may have to be compiled first.
pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {"head_dim": 64, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36},
    ),
    "llama, biases, tied": (
        "llama",
        {"head_dim": 80, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama, scaled positions": (
        "llama",
        {
            "head_dim": 96,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("mistral", {"head_dim": 128, "sliding_window": 11}),
    "qwen2": ("qwen2", {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 1}),
    "gemma": ("gemma", {"head_dim": 256}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu, "best_level", lambda: request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def model_of(name: str) -> Any:
    family, overrides = MODELS[name]
    return tiny_model(family, **overrides)


def engine_of(model: Any, batch: int = 8, deterministic: bool = False, **more: Any) -> TorchEngine:
    engine = TorchEngine(
        EngineOptions(
            max_batch_size=batch,
            threads=2,
            backend="cpu",
            deterministic=deterministic,
            data_dir=DATA_DIR,
        ),
        loaded=loaded(copy.deepcopy(model)),
        **more,
    )
    assert isinstance(engine._backend, CpuBackend)
    return engine


def backend_of(model: Any, positions: int = 256, **more: Any) -> CpuBackend:
    model = copy.deepcopy(model)
    read = Dense(model, positions)
    return CpuBackend(
        read.sizes,
        read.weights(),
        LoadCheck(model, read.sizes.vocab),
        lambda block_bytes: 24,
        **{
            "most_rows": 200,
            "most_outs": 200,
            "threads": 2,
            "folder": FOLDER,
            **more,
        },
    )


@pytest.mark.parametrize("name", MODELS)
def test_greedy_output_is_that_of_transformers(name: str, level: str) -> None:
    model = model_of(name)
    texts = prompts(1)
    right = [expected(model, prompt, 24) for prompt in texts]
    variety = sum(len(set(one.tokens)) for one in right) / len(right)
    assert variety > 3, "a model that repeats itself proves little"
    requests = [EngineRequest(str(i), p, greedy(24)) for i, p in enumerate(texts)]
    # Later ones go before earlier ones, which have to give up their blocks.
    urgent = [replace(request, priority=2 - i % 3) for i, request in enumerate(requests)]
    # Roomy; in small pieces and joining at different steps; short of blocks.
    roomy = engine_of(model)
    chunked = engine_of(model, batch=5, step_rows=14)
    short = engine_of(model, blocks=5, step_rows=40)
    for engine, given, every in ((roomy, requests, 0), (chunked, requests, 3), (short, urgent, 1)):
        got = run(engine, given, every)
        for i, one in enumerate(right):
            assert len(got[str(i)]) == 24
            one.check(got[str(i)])
        engine.close()
    assert short.stats().preemptions > 0


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_reference(name: str, kind: torch.dtype, level: str) -> None:
    model = model_of(name).to(kind)
    native = backend_of(model)
    reference = ReferenceBackend(copy.deepcopy(model), torch.device("cpu"), lambda size: 24)
    oracle = ReferenceBackend(copy.deepcopy(model).float(), torch.device("cpu"), lambda size: 24)
    source = random.Random(3)
    lengths = [0] * 4
    table = torch.randperm(24, generator=torch.Generator().manual_seed(1))[:20].view(4, 5)
    for counts in ((70, 1, 33, 5), (1, 1, 1, 1), (3, 40, 1, 20), (1, 1, 64, 1)):
        rows = [
            (source.randrange(VOCAB), lengths[s] + i, s)
            for s, count in enumerate(counts)
            for i in range(count)
        ]
        ids, positions, sequences = (torch.tensor(column) for column in zip(*rows, strict=True))
        batch = Batch(ids, positions, sequences, table, torch.arange(len(rows)))
        got, rounded, want = (one.step(batch).double() for one in (native, reference, oracle))
        for s, count in enumerate(counts):
            lengths[s] += count
        off = float((got - want).norm() / want.norm())
        if kind == torch.float32:
            assert off < 5e-5
        else:
            # No further from the truth than transformers' own bf16.
            assert off < 1.2 * float((rounded - want).norm() / want.norm()) + 1e-3
    native.close()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_deterministic_is_the_same_alone_and_in_any_batch(kind: torch.dtype, level: str) -> None:
    model = model_of("llama").to(kind)
    texts = prompts(7)
    sampling = SamplingParams(20, 0.9, 0.9, ignore_eos=True)
    requests = [
        EngineRequest(str(i), p, replace(sampling, seed=i) if i % 2 else greedy(20))
        for i, p in enumerate(texts)
    ]
    alone: dict[str, list[int]] = {}
    engine = engine_of(model, deterministic=True)
    for request in requests:
        alone |= run(engine, [request])
    for more, every in (({}, 0), ({"step_rows": 11, "batch": 5}, 2), ({"blocks": 5}, 1)):
        assert run(engine_of(model, deterministic=True, **more), requests, every) == alone
    # And to the last bit, which tokens alone would not show.
    exact, table = backend_of(model, exact=True), torch.arange(5)[None]
    ids = torch.tensor(texts[6])
    rows = torch.arange(len(ids))
    whole = exact.step(Batch(ids, rows, rows * 0, table, rows)).clone()
    for start, end in ((0, 31), (31, 32), (32, 33), (33, 90)):
        piece = rows[start:end]
        other = torch.cat([piece * 0 + 5, ids[start:end]])
        batch = Batch(
            other,
            torch.cat([torch.arange(end - start), piece]),
            torch.cat([piece * 0, piece * 0 + 1]),
            torch.stack([torch.arange(10, 15), table[0]]),
            torch.arange(end - start, 2 * (end - start)),
        )
        assert torch.equal(exact.step(batch), whole[start:end])


def test_what_is_not_deterministic_does_not_claim_it() -> None:
    if "amx" not in LEVELS:
        pytest.skip("one kernel of attention only")
    model = model_of("llama").to(torch.bfloat16)
    loose, ids = backend_of(model), torch.tensor(prompts(7)[6])
    rows, table = torch.arange(len(ids)), torch.arange(5)[None]
    whole = loose.step(Batch(ids, rows, rows * 0, table, rows)).clone()
    first = torch.zeros(1, dtype=torch.int64)
    same = [
        torch.equal(loose.step(Batch(ids[i : i + 1], rows[i : i + 1], first, table, first))[0], one)
        for i, one in enumerate(whole)
    ]
    assert not all(same), "the negative control of the test above"


def test_several_engines_in_one_process(level: str) -> None:
    texts = prompts(5)
    names = ["llama", "gemma2"]
    engines = [engine_of(model_of(name), step_rows=30) for name in names]
    right = [[expected(model_of(name), text, 12) for text in texts] for name in names]
    got: list[dict[str, list[int]]] = [{}, {}]
    for engine in engines:
        for i, text in enumerate(texts):
            engine.add(EngineRequest(str(i), text, greedy(12)))
    going = True
    while going:
        busy = [step(engine, tokens) for engine, tokens in zip(engines, got, strict=True)]
        going = any(busy)
    for tokens, answers in zip(got, right, strict=True):
        for i, one in enumerate(answers):
            one.check(tokens[str(i)])


def step(engine: TorchEngine, tokens: dict[str, list[int]]) -> bool:
    outputs = engine.step()
    for output in outputs:
        tokens.setdefault(output.rid, []).extend(output.tokens)
    return bool(outputs)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"ids": [3, VOCAB]}, "vocabulary"),
        ({"ids": [3, -1]}, "vocabulary"),
        ({"positions": [255, 256]}, "context"),
        ({"positions": [4, 6]}, "not in order"),
        ({"sequences": [0, 2]}, "of no sequence"),
        ({"sequences": [1, 1], "block_table": [[0, 1], [2, 3]]}, "not in order"),
        ({"block_table": [[0, 24]], "positions": [62, 63]}, "no block 24"),
        ({"block_table": [[-1, 1]]}, "no block -1"),
        ({"block_table": [[0]], "positions": [31, 32]}, "too few blocks"),
        ({"out_rows": [2]}, "not there"),
        ({"out_rows": [-1]}, "not there"),
        ({"out_rows": [0] * 201}, "logits of 201 rows"),
        (
            {
                "ids": [1] * 201,
                "positions": list(range(201)),
                "sequences": [0] * 201,
                "block_table": [list(range(7))],
            },
            "a step of 201 rows",
        ),
        ({"ids": [], "positions": [], "sequences": [], "out_rows": []}, "a step of 0 rows"),
    ],
)
def test_a_step_that_makes_no_sense_touches_nothing(changes: dict[str, Any], why: str) -> None:
    backend = backend_of(model_of("llama"))
    good = {
        "ids": [3, 5],
        "positions": [0, 1],
        "sequences": [0, 0],
        "block_table": [[0, 1]],
        "out_rows": [1],
    }
    batch = Batch(**{name: torch.tensor(value) for name, value in good.items()})
    before = backend.step(batch).clone()
    with pytest.raises(ValueError, match=why):
        backend.step(
            Batch(
                **{
                    name: torch.tensor(value, dtype=torch.int64)
                    for name, value in {**good, **changes}.items()
                }
            )
        )
    assert torch.equal(backend.step(batch), before)
    backend.close()


def test_a_part_of_the_wrong_size_is_refused() -> None:
    backend = backend_of(model_of("llama"))
    data = (ctypes.c_float * 64)()
    for layer, part, count, why in (
        (0, Part.NORM_FFN, 37, "has 37 numbers, not 36"),
        (0, Part.QKV, 64, "has 64 numbers"),
        (3, Part.NORM_FFN, 36, "no layer or table 3"),
        (1, Part.ROPE_COS, 64, "no layer or table 1"),
        (0, 17, 64, "no part 17"),
    ):
        with pytest.raises(ValueError, match=why):
            backend._handle.set(layer, part, ctypes.addressof(data), count)  # type: ignore[arg-type]


def test_a_sequence_whose_numbers_are_none_fails_alone(level: str) -> None:
    model = model_of("llama")
    texts = prompts(6, VOCAB - 20)
    right = [expected(model, text, 12) for text in texts]
    # An id that nobody else has, and that the check at load does not ask for.
    bad_id = max(
        set(range(VOCAB))
        - {token for one in right for token in one.tokens}
        - {(i * 7919 + 17) % VOCAB for i in range(48)}
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[bad_id] = float("nan")
    engine = engine_of(model, batch=10)
    texts.append([bad_id] * 40)
    got: dict[str, list[int]] = {}
    errors = {}
    for again in range(2):
        for i, text in enumerate(texts):
            engine.add(EngineRequest(f"{i} {again}", text, greedy(12)))
        while outputs := engine.step():
            for output in outputs:
                got.setdefault(output.rid, []).extend(output.tokens)
                if output.finish == "error":
                    errors[output.rid] = output.error
    bad = len(texts) - 1
    assert errors == {f"{bad} {i}": "the model's output is not a number" for i in range(2)}
    for i, one in enumerate(right):
        for again in range(2):
            assert len(got[f"{i} {again}"]) == 12
            one.check(got[f"{i} {again}"])


# Where it cannot be used.


def served_by(model: Any, **options: Any) -> Any:
    engine = TorchEngine(
        EngineOptions(**{"max_batch_size": 4, "threads": 1, "data_dir": DATA_DIR, **options}),
        loaded=loaded(copy.deepcopy(model)),
    )
    prompt = prompts(1)[4]
    got = run(engine, [EngineRequest("a", prompt, greedy(8))])
    expected(model, prompt, 8).check(got["a"])
    return engine._backend


def test_it_is_used_where_it_can_be() -> None:
    assert isinstance(served_by(model_of("llama")), CpuBackend)
    assert isinstance(served_by(model_of("llama"), backend="reference"), ReferenceBackend)


@pytest.mark.parametrize(
    ("family", "overrides", "why"),
    [
        ("gpt2", {}, "it does not know gpt2 models"),
        ("llama", {}, "it does not know heads of size 8"),
        ("llama", {"head_dim": 16, "hidden_act": "relu"}, "it does not know the activation relu"),
    ],
)
def test_what_it_does_not_know_runs_through_the_reference(
    family: str, overrides: dict[str, Any], why: str
) -> None:
    model = tiny_model(family, **overrides)
    assert isinstance(served_by(model), ReferenceBackend)
    with pytest.raises(EngineError, match=why):
        served_by(model, backend="cpu")
    with pytest.raises(EngineError, match=f"RTS_DETERMINISTIC needs the native CPU backend: {why}"):
        served_by(model, deterministic=True)


class WronglyRead(Dense):
    """A model of another norm than it has."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sizes = msgspec.structs.replace(self.sizes, norm_eps=0.5)


def test_what_it_computes_wrongly_runs_through_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dense, "Dense", WronglyRead)
    assert isinstance(served_by(model_of("llama")), ReferenceBackend)
    with pytest.raises(EngineError, match="are off by"):
        served_by(model_of("llama"), backend="cpu")


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("no-such-compiler", "there is no C.. compiler: CXX is no-such-compiler"),
        ("false", "failed: no message"),
    ],
)
def test_without_a_compiler_the_reference_serves(
    compiler: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert isinstance(served_by(model_of("llama"), data_dir=tmp_path), ReferenceBackend)
    with pytest.raises(EngineError, match=why):
        served_by(model_of("llama"), data_dir=tmp_path, backend="cpu")


def test_a_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "_COMMON", ["-std=c++17", "-O0", "-fPIC", "-shared", "-pthread"])
    made = library(LEVELS[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [made.name]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert library(LEVELS[0], tmp_path) == made
    monkeypatch.setattr(build, "_COMMON", ["-O1"])
    with pytest.raises(NativeUnavailable):
        library(LEVELS[0], tmp_path)


def test_a_broken_library_is_replaced_by_the_reference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "native.so"
    broken.write_bytes(b"\x7fELF")
    monkeypatch.setattr(cpu, "library", lambda level, folder: broken)
    assert isinstance(served_by(model_of("llama")), ReferenceBackend)


def test_levels_are_those_of_the_processor(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    avx512 = "avx512f avx512bw avx512vl avx512dq avx512_bf16"
    for flags, level in (
        (f"fma avx2 {avx512} amx_tile amx_bf16", "amx"),
        (f"fma avx2 {avx512} amx_tile", "avx512_bf16"),
        ("fma avx2 avx512f avx512bw avx512vl avx512dq", "avx2"),
    ):
        info.write_text(f"model name\t: x\nflags\t\t: sse {flags}\n")
        assert best_level(info) == level
    info.write_text("flags\t\t: sse avx\n")
    with pytest.raises(NativeUnavailable, match="no AVX2"):
        best_level(info)


def test_a_device_that_is_no_cpu_has_the_reference() -> None:
    with pytest.raises(EngineError, match="the device is meta"):
        backends.make_backend(
            loaded(model_of("llama")),
            EngineOptions(backend="cpu"),
            lambda size: 24,
            device=torch.device("meta"),
            rows=64,
        )


def test_blocks_are_those_of_the_native_cache() -> None:
    text = (build.SOURCE / "cache.h").read_text()
    assert f"constexpr int BLOCK = {BLOCK_SIZE};" in text
