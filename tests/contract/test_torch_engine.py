"""The torch engine computes what transformers computes, whoever joins, leaves or waits."""

from __future__ import annotations

import copy
import inspect
import random
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from shared.messages import WAITS  # noqa: E402
from tests.contract.models import FAMILIES, VOCAB, expected, loaded, tiny_model  # noqa: E402
from worker.engine import (  # noqa: E402
    EngineError,
    EngineOptions,
    create_engine,
    torch_engine,
)
from worker.engine.blocks import BLOCK_SIZE, blocks_for  # noqa: E402
from worker.engine.interface import EngineRequest, SamplingParams  # noqa: E402
from worker.engine.loader import ModelLoadError  # noqa: E402
from worker.engine.reference import LEAST_BLOCKS  # noqa: E402
from worker.engine.torch_engine import TorchEngine  # noqa: E402

pytestmark = pytest.mark.torch

LENGTHS = (1, 3, BLOCK_SIZE, BLOCK_SIZE + 1, 33, 60, 90, 5)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Two that wait for each other take many times as long where another process needs a core.
    torch.set_num_threads(1)


def engine_of(model: Any, batch: int = 8, eos: tuple[int, ...] = (), **more: Any) -> TorchEngine:
    return TorchEngine(
        EngineOptions(max_batch_size=batch, threads=1, backend="reference"),
        loaded=loaded(copy.deepcopy(model), eos),
        **more,
    )


def prompts(seed: int, vocab: int = VOCAB, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, vocab) for _ in range(length)] for length in lengths]


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)


def run(engine: TorchEngine, requests: list[EngineRequest], every: int = 0) -> dict[str, list[int]]:
    """Adds the requests, one in `every` steps, and steps until all ended."""
    left, got, steps = list(requests), {request.rid: [] for request in requests}, 0
    finishes: dict[str, str | None] = {}
    while left or len(finishes) < len(requests):
        while left and (not every or steps % every == 0):
            engine.add(left.pop(0))
            if every:
                break
        for output in engine.step():
            assert output.error == ""
            got[output.rid] += output.tokens
            if output.finish:
                assert output.rid not in finishes
                finishes[output.rid] = output.finish
        engine.check_integrity()
        steps += 1
        assert steps < 5000
    assert engine.step() == []
    return got


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_that_of_transformers(family: str) -> None:
    model = tiny_model(family)
    texts = prompts(1)
    right = [expected(model, prompt, 24) for prompt in texts]
    variety = sum(len(set(one.tokens)) for one in right) / len(right)
    assert variety > 5, "a model that repeats itself proves little"
    # The later the more urgent.
    requests = [
        EngineRequest(str(i), p, greedy(24), priority=2 - i // 3) for i, p in enumerate(texts)
    ]
    # Roomy; in small pieces and joining at different steps; short of places and blocks.
    roomy = engine_of(model)
    chunked = engine_of(model, batch=8, step_rows=14)
    short = engine_of(model, batch=3, blocks=blocks_for(208), step_rows=40)
    for engine, every in ((roomy, 0), (chunked, 3), (short, 1)):
        got = run(engine, requests, every)
        for i, one in enumerate(right):
            assert len(got[str(i)]) == 24
            one.check(got[str(i)])
    assert short.stats().preemptions > 0
    assert roomy.stats().preemptions == chunked.stats().preemptions == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("seed", range(3))
def test_shared_beginnings_change_no_token(family: str, seed: int) -> None:
    """Random batches of texts that begin alike, memory, pieces, priorities and those that leave."""
    model, source = tiny_model(family), random.Random(seed)
    system = prompts(20 + seed, VOCAB, (source.randrange(40, 100),))[0]
    texts = [
        system[: source.randrange(2, len(system))]
        + prompts(100 * seed + i, VOCAB, (source.randrange(1, 20),))[0]
        for i in range(10)
    ]
    # Asked again, and answered: what was generated is part of a prompt, too.
    right = [expected(model, text, 20) for text in texts]
    texts += [texts[0], texts[1] + right[1].tokens + [5]]
    right += [right[0], expected(model, texts[11], 20)]
    engine = engine_of(
        model,
        batch=source.choice((2, 4, 8)),
        step_rows=source.choice((9, 30, 256)),
        blocks=blocks_for(source.choice((260, 400, 2000))),
    )
    requests = [
        EngineRequest(str(i), text, greedy(20), priority=source.randrange(3))
        for i, text in enumerate(texts[:10])
    ]
    got = run(engine, requests, every=source.randrange(3))
    for i in (10, 11):
        engine.add(EngineRequest(f"leaves {i}", texts[i][:-1], greedy(20)))
        engine.step()
        engine.abort(f"leaves {i}")
    known = right[0].tokens[:7]
    got |= run(
        engine,
        [
            EngineRequest("10", texts[10], greedy(20)),
            EngineRequest("11", texts[11], greedy(20)),
            # Taken over, and at the end of what its earlier owner did.
            EngineRequest("taken", texts[0], greedy(20), generated=known),
        ],
    )
    for i, one in enumerate(right):
        assert len(got[str(i)]) == 20
        one.check(got[str(i)])
    assert len(got["taken"]) == 13
    right[0].check(known + got["taken"])
    stats = engine.stats()
    assert stats.prefix_queries == sum(map(len, texts)) + len(texts[0]) + 7 + sum(
        len(texts[i]) - 1 for i in (10, 11)
    )
    assert 0 < stats.prefix_hits < stats.prefix_queries
    assert stats.kv_usage == 0


def test_without_the_prefix_cache_everything_is_computed() -> None:
    model = tiny_model("llama")
    options = EngineOptions(max_batch_size=2, threads=1, prefix_cache=False)
    engine = TorchEngine(options, loaded=loaded(copy.deepcopy(model)))
    prompt = prompts(1)[6]
    right = expected(model, prompt, 5)
    for _ in range(2):
        right.check(run(engine, [EngineRequest("a", prompt, greedy(5))])["a"])
    stats = engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits, stats.prompt_tokens) == (0, 0, 180)


def test_a_preempted_sequence_finds_what_it_had_computed() -> None:
    model = tiny_model("llama")
    low, high = prompts(7, VOCAB, (80, 80))
    engine = engine_of(model, batch=1, blocks=blocks_for(2 * 100) + 2)
    engine.add(EngineRequest("low", low, greedy(20), priority=2))
    tokens = {"low": [token for output in engine.step() for token in output.tokens], "high": []}
    engine.add(EngineRequest("high", high, greedy(20), priority=0))
    waited = 0
    while outputs := engine.step():
        for output in outputs:
            tokens[output.rid] += output.tokens
            if output.prefilled == WAITS:
                assert (output.rid, output.tokens, output.finish) == ("low", [], None)
                waited += 1
        engine.check_integrity()
    # In every step of the other one.
    assert waited == 20
    stats = engine.stats()
    assert (stats.preemptions, stats.prefix_hits) == (1, 0)
    assert stats.prompt_tokens == 160 + 80 % BLOCK_SIZE
    expected(model, low, 20).check(tokens["low"])
    expected(model, high, 20).check(tokens["high"])


def test_who_waits_for_its_first_room_says_so() -> None:
    model = tiny_model("llama")
    texts = prompts(9, VOCAB, (70, 70))
    engine = engine_of(model, batch=2, blocks=blocks_for(90) + 1)
    for rid, text in zip(("first", "second"), texts, strict=True):
        engine.add(EngineRequest(rid, text, greedy(20)))
    said: dict[str, list[int]] = {"first": [], "second": []}
    while outputs := engine.step():
        for output in outputs:
            said[output.rid].append(output.prefilled)
    assert WAITS not in said["first"]
    # In every step of the other one, and in none of its own.
    assert said["second"][: len(said["first"])] == [WAITS] * len(said["first"])
    assert WAITS not in said["second"][len(said["first"]) :]


def test_what_was_found_is_no_progress_until_a_step_was_survived() -> None:
    model = tiny_model("llama")
    texts = prompts(6, VOCAB - 10, (3 * BLOCK_SIZE,))
    poison = VOCAB - 1
    engine = engine_of(model, step_rows=BLOCK_SIZE + 12)
    run(engine, [EngineRequest("first", texts[0], greedy(2))])
    again = [*texts[0], *[4] * BLOCK_SIZE]
    engine.add(EngineRequest("again", again, greedy(2)))
    # The last row that is told was computed in this step.
    outputs = engine.step()
    assert [(output.prefilled, output.tokens != []) for output in outputs] == [(len(again), True)]
    assert engine.stats().prefix_hits == len(texts[0])
    engine.abort("again")
    engine._backend = Poisoned(engine._backend, poison)
    engine.add(EngineRequest("kills", [*texts[0], poison], greedy(2)))
    [killed] = engine.step()
    assert (killed.finish, killed.tokens) == ("error", [])
    # Of the failed nothing is found, and what it had found is computed again.
    hits = engine.stats().prefix_hits
    run(engine, [EngineRequest("after", texts[0], greedy(2))])
    assert engine.stats().prefix_hits == hits


def test_warming_up_leaves_nothing_to_be_found() -> None:
    engine = engine_of(tiny_model("llama"))
    engine.warm_up()
    assert (engine.stats().prefix_queries, engine.stats().prefix_hits) == (0, 0)
    run(engine, [EngineRequest("a", [0] * 4 * BLOCK_SIZE, greedy(1))])
    assert engine.stats().prefix_hits == 0


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    model = tiny_model("llama")
    texts = prompts(4)
    sampling = SamplingParams(24, 0, ignore_eos=True, repetition_penalty=1.6)
    plain = [expected(model, prompt, 24).tokens for prompt in texts]
    right = [expected(model, prompt, 24, repetition_penalty=1.6) for prompt in texts]
    assert [one.tokens for one in right] != plain
    # Short of blocks, and the later ones go first: some are computed again after they gave way.
    requests = [EngineRequest(str(i), p, sampling, priority=2 - i % 3) for i, p in enumerate(texts)]
    engine = engine_of(model, blocks=blocks_for(160), step_rows=40)
    got = run(engine, requests, 1)
    assert engine.stats().preemptions > 0
    for i, one in enumerate(right):
        assert len(got[str(i)]) == 24
        one.check(got[str(i)])


@pytest.mark.parametrize(
    "sampling",
    [
        greedy(30),
        SamplingParams(30, 0.9, 0.9, 20, seed=7),
        SamplingParams(30, 0.9, 0.9, seed=7, min_p=0.1, frequency_penalty=0.4),
        SamplingParams(30, 0, repetition_penalty=1.3, presence_penalty=-0.5, ignore_eos=True),
    ],
)
def test_another_engine_goes_on_where_one_stopped(sampling: SamplingParams) -> None:
    model = tiny_model("llama")
    prompt = prompts(2)[5]
    whole = run(engine_of(model), [EngineRequest("a", prompt, sampling, choice=3)])["a"]
    first = engine_of(model)
    first.add(EngineRequest("a", prompt, sampling, choice=3))
    got: list[int] = []
    while len(got) < 11:
        got += [token for output in first.step() for token in output.tokens]
    first.abort("a")
    assert first.stats().kv_usage == 0
    second = engine_of(model, step_rows=20)
    rest = run(
        second,
        [
            EngineRequest("a", prompt, sampling, generated=got, choice=3),
            *(EngineRequest(f"other {i}", p, sampling) for i, p in enumerate(prompts(3))),
        ],
    )
    assert got + rest["a"] == whole


def test_those_that_stay_do_not_notice_those_that_leave() -> None:
    model = tiny_model("qwen2")
    texts = prompts(4)
    engine = engine_of(model, batch=4, blocks=blocks_for(320), step_rows=30)
    source = random.Random(9)
    right = {str(i): expected(model, prompt, 20) for i, prompt in enumerate(texts)}
    got: dict[str, list[int]] = {rid: [] for rid in right}
    for i, prompt in enumerate(texts):
        engine.add(EngineRequest(str(i), prompt, greedy(20), priority=i % 3))
        engine.add(EngineRequest(f"leaves {i}", prompt[::-1], greedy(20), priority=(i + 1) % 3))
    steps = 0
    while outputs := engine.step():
        steps += 1
        for output in outputs:
            if output.rid in got:
                got[output.rid] += output.tokens
        if steps % 2:
            engine.abort(f"leaves {source.randrange(len(texts))}")
        engine.check_integrity()
    for rid, one in right.items():
        assert len(got[rid]) == 20
        one.check(got[rid])


def test_the_models_end_ids_end_a_sequence_unless_ignored() -> None:
    model = tiny_model("llama")
    prompt = prompts(1)[4]
    tokens = expected(model, prompt, 24).tokens
    end = next(token for i, token in enumerate(tokens) if i > 4 and token not in tokens[:i])
    engine = engine_of(model, eos=(end,))
    goes_on = EngineRequest("goes on", prompt, greedy(24))
    ends = EngineRequest("ends", prompt, SamplingParams(24, temperature=0))
    got = run(engine, [goes_on, ends])
    assert got["goes on"] == tokens
    assert got["ends"] == tokens[: tokens.index(end) + 1]


def test_a_bf16_model_is_served() -> None:
    engine = engine_of(tiny_model("llama").to(torch.bfloat16))
    assert engine.info.dtype == "bfloat16"
    got = run(engine, [EngineRequest(str(i), p, greedy(5)) for i, p in enumerate(prompts(1))])
    assert all(len(tokens) == 5 for tokens in got.values())


@pytest.mark.parametrize(
    ("family", "overrides", "why"),
    [
        ("mamba", {}, "attention"),
        ("bloom", {"n_head": 4, "n_layer": 3}, "attention"),
        ("gpt_oss", {"num_local_experts": 4, "layer_types": ["full_attention"] * 3}, "s_aux"),
        ("qwen3_next", {"num_experts": 4}, "linear_attention"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
        ("cohere2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    family: str, overrides: dict[str, Any], why: str
) -> None:
    model = tiny_model(family, **overrides)
    with pytest.raises(ModelLoadError, match=why):
        engine_of(model)


def test_a_wrong_attention_is_noticed_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.engine import reference

    original = reference.paged_attention

    def wrong_scale(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "scaling": 0.9})

    monkeypatch.setattr(reference, "paged_attention", wrong_scale)
    with pytest.raises(ModelLoadError, match="off by"):
        engine_of(tiny_model("llama"))


@pytest.mark.parametrize("implementation", ["eager", "rts_paged"])
def test_a_model_that_does_not_run_is_refused_with_a_sentence(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    original = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation == implementation:
            raise IndexError("index out of range\nmore")
        return original(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(
        ModelLoadError, match=r"llama models are not supported: index out of range$"
    ):
        engine_of(model)


class Poisoned:
    """A backend that fails when a certain id is in the batch."""

    def __init__(self, backend: Any, poison: int) -> None:
        self._backend, self._poison = backend, poison

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def step(self, batch: Any) -> Any:
        self._taste(batch)
        return self._backend.step(batch)

    def sample(self, batch: Any, draws: Any) -> Any:
        self._taste(batch)
        return self._backend.sample(batch, draws)

    def _taste(self, batch: Any) -> None:
        if bool((batch.ids == self._poison).any()):
            raise RuntimeError("poison")


@pytest.mark.parametrize("raises", [True, False])
def test_only_the_sequence_that_fails_ends_with_an_error(raises: bool) -> None:
    model = tiny_model("llama")
    texts = prompts(6, VOCAB - 10)
    right = [expected(model, prompt, 12) for prompt in texts]
    poison = max(set(range(VOCAB)) - {token for one in right for token in one.tokens})
    engine = engine_of(model, batch=10, step_rows=60)
    if raises:
        engine._backend = Poisoned(engine._backend, poison)
    else:
        # Keys and values that are not numbers, in the cache for some steps.
        weights = engine._backend._model.get_input_embeddings().weight  # type: ignore[attr-defined]
        weights.data[poison] = float("nan")
    got: dict[str, list[int]] = {}
    errors = {}
    for again in range(2):
        # It is read first, in part, and then held up by the others.
        engine.add(EngineRequest(f"bad {again}", [poison] * 150, greedy(12), priority=2))
        if not raises:
            assert engine.step()[0].prefilled == 60
        for i, prompt in enumerate(texts):
            engine.add(EngineRequest(f"{i} {again}", prompt, greedy(12)))
        while outputs := engine.step():
            for output in outputs:
                if output.finish == "error":
                    errors[output.rid] = output.error
                got.setdefault(output.rid, []).extend(output.tokens)
            engine.check_integrity()
    assert list(errors) == ["bad 0", "bad 1"]
    assert ("poison" if raises else "not a number") in errors["bad 0"]
    for i, one in enumerate(right):
        for again in range(2):
            one.check(got[f"{i} {again}"])
            assert len(got[f"{i} {again}"]) == 12


def test_a_step_in_which_nothing_works_raises() -> None:
    engine = engine_of(tiny_model("llama"))
    engine._backend = Poisoned(engine._backend, 7)
    engine.add(EngineRequest("alone", [7, 7], greedy(3)))
    assert [(output.rid, output.finish) for output in engine.step()] == [("alone", "error")]
    engine.add(EngineRequest("a", [7, 7], greedy(3)))
    engine.add(EngineRequest("b", [7, 7], greedy(3)))
    with pytest.raises(RuntimeError, match="poison"):
        engine.step()
    engine._backend = Poisoned(engine._backend, 0)
    engine.abort("b")
    with pytest.raises(RuntimeError, match="poison"):
        engine.step()


class Timed:
    """A backend on which a row takes its time, by a clock of its own."""

    def __init__(self, backend: Any, row_s: float, share: float = 1.0) -> None:
        self._backend, self._row_s, self._share, self.rows = backend, row_s, share, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def perf_counter(self) -> float:
        return self.rows * self._row_s

    def thread_time(self) -> float:
        return self.perf_counter() * self._share

    def sample(self, batch: Any, draws: Any) -> Any:
        self.rows += batch.ids.numel()
        return self._backend.sample(batch, draws)


def timed(monkeypatch: pytest.MonkeyPatch, row_s: float, lease_ms: int, share: float = 1.0) -> Any:
    engine = TorchEngine(
        EngineOptions(max_batch_size=4, threads=1, lease_ms=lease_ms),
        loaded=loaded(tiny_model("llama", max_position_embeddings=1024)),
    )
    backend: Any = Timed(engine._backend, row_s, share)
    engine._backend = backend
    monkeypatch.setattr(torch_engine, "time", backend)
    return engine


@pytest.mark.parametrize(
    ("row_s", "lease_ms", "low", "high"),
    [
        (0.0001, 3000, 192, 192),
        (0.001, 400, 85, 100),
        (0.001, 4000, 192, 192),
        (0.005, 400, 20, 20),
        (1.0, 0, 192, 192),
    ],
)
def test_steps_are_made_to_fit_the_lease(
    row_s: float, lease_ms: int, low: int, high: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = timed(monkeypatch, row_s, lease_ms)
    engine.warm_up()
    assert low <= engine._scheduler.budget <= high
    engine.check_integrity()
    assert engine.stats().steps == engine.stats().preemptions == 0
    prompt = prompts(1, VOCAB, (600,))[0]
    engine.add(EngineRequest("a", prompt, greedy(3)))
    while engine._scheduler.running or engine._scheduler.waiting:
        before = engine._backend.rows
        engine.step()
        assert not lease_ms or (engine._backend.rows - before) * row_s <= lease_ms / 4000


def test_an_engine_too_slow_for_the_lease_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = timed(monkeypatch, 0.06, 400)
    with pytest.raises(EngineError, match=r"takes 240 ms, .*RTS_LEASE_MS=400 .*BATCH_SIZE=4"):
        engine.warm_up()


def test_an_engine_on_a_busy_machine_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = timed(monkeypatch, 0.06, 400, share=0.2)
    engine.warm_up()
    assert engine._scheduler.budget == 20
    assert "machine is busy" in caplog.text
    assert "RTS_LEASE_MS=400" in caplog.text


def sized(megabytes: int, free: int, monkeypatch: pytest.MonkeyPatch, **more: Any) -> TorchEngine:
    monkeypatch.setattr(torch_engine, "free_bytes", lambda: free)
    return TorchEngine(
        EngineOptions(max_batch_size=2, threads=1, kv_cache_mb=megabytes),
        loaded=loaded(tiny_model("llama", max_position_embeddings=4096, **more)),
    )


def test_the_cache_is_chosen_by_free_memory_and_what_it_shortens_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    roomy = sized(0, 1 << 40, monkeypatch)
    assert roomy._backend.block_count == 2 * blocks_for(4096)
    assert caplog.text == ""
    # A token takes 3 layers * 2 * 2 heads * 8 numbers * 4 bytes = 384 bytes.
    tight = sized(0, 1 << 20, monkeypatch)
    assert tight._backend.block_count == int(0.3 * (1 << 20)) // (BLOCK_SIZE * 384)
    assert tight.info.context_length == tight._backend.block_count * BLOCK_SIZE
    assert "4096" in caplog.text
    assert str(tight.info.context_length) in caplog.text
    assert tight.files.version != roomy.files.version


@pytest.mark.parametrize(
    ("weights", "context", "free", "megabytes"),
    [
        (100 << 20, 10, 1 << 40, 512),
        (1 << 30, 10, 1 << 40, 1024),
        (100 << 30, 10, 1 << 40, 4096),
        (100 << 20, 700, 1 << 40, 700),
        (1 << 30, 10, 1000 << 20, 300),
    ],
)
def test_a_cache_is_as_large_as_the_weights_within_bounds(
    weights: int, context: int, free: int, megabytes: int
) -> None:
    size = torch_engine._cache_size(0, 10**6, context, weights, torch.device("cpu"), free)
    # Blocks of a MiB.
    assert size(1 << 20) == megabytes


def test_a_cache_that_is_too_small_is_told_by_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    # A token takes 3 layers * 2 * 2 heads * 2048 numbers * 4 bytes = 96 KiB.
    least, whole = -(-LEAST_BLOCKS * BLOCK_SIZE * 96 // 1024), 4096 * 96 // 1024
    told = rf"RTS_KV_CACHE_MB=1 is too small .* at least {least}, and {whole} "
    with pytest.raises(EngineError, match=told):
        sized(1, 1 << 40, monkeypatch, head_dim=2048)
    with pytest.raises(EngineError, match=r"30% of the 0 MiB of free memory .*RTS_KV_CACHE_MB"):
        sized(0, 1000, monkeypatch)


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("no room")])
def test_missing_memory_is_a_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    engine = engine_of(tiny_model("llama"))
    monkeypatch.setattr(engine, "_rehearse_all", full)
    with pytest.raises(EngineError, match=r"RTS_KV_CACHE_MB .*no room"):
        engine.warm_up()
    monkeypatch.setattr(torch_engine, "make_backend", full)
    with pytest.raises(EngineError, match=r"RTS_KV_CACHE_MB .*no room"):
        engine_of(tiny_model("llama"))


def test_the_version_is_that_of_dtype_and_context_too() -> None:
    engines = [
        engine_of(tiny_model("llama")),
        engine_of(tiny_model("llama").to(torch.bfloat16)),
        engine_of(tiny_model("llama"), blocks=blocks_for(96)),
        engine_of(tiny_model("llama"), batch=3),
    ]
    versions = [engine.files.version for engine in engines]
    assert versions[0] == versions[3]
    assert len(set(versions)) == 3


def test_a_small_cache_shortens_the_context() -> None:
    engine = engine_of(tiny_model("llama"), blocks=blocks_for(96))
    assert engine.info.context_length == engine.files.context_length == 96
    with pytest.raises(ValueError, match="context"):
        engine.add(EngineRequest("a", [5] * 96, greedy(1)))
    got = run(engine, [EngineRequest(str(i), [5 + i] * 80, greedy(90)) for i in range(3)])
    assert all(len(tokens) == 16 for tokens in got.values())


def test_room_counts_blocks_as_well_as_places() -> None:
    engine = engine_of(tiny_model("llama"), blocks=10)
    assert engine.room() == 8
    half = 4 * BLOCK_SIZE + 6
    engine.add(EngineRequest("a", [5] * half, greedy(60)))
    assert engine.room() <= 1
    engine.step()
    engine.add(EngineRequest("b", [6] * half, greedy(60)))
    assert engine.room() == 0
    engine.step()
    assert engine.stats().waiting == 1
    engine.abort("a")
    engine.abort("b")
    assert engine.room() == 8


def test_sequences_are_taken_together_only_if_little_is_padded() -> None:
    from worker.engine.attention import _groups
    from worker.engine.backend import Batch

    source = random.Random(4)
    for _ in range(50):
        singles = sorted(source.choice([5, 60, 300, 4000]) for _ in range(source.randrange(30)))
        pieces = [source.randrange(2, 40) for _ in range(source.randrange(3))]
        counts = [1] * len(singles) + pieces
        if not counts:
            continue
        positions = singles + [position for piece in pieces for position in range(100, 100 + piece)]
        sequences = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        nothing = torch.empty(0)
        batch = Batch(nothing, torch.tensor(positions), sequences, nothing, nothing)
        seen: list[int] = []
        for chosen, rows in _groups(batch):
            seen += range(chosen.start, chosen.stop)
            assert sequences[rows].unique().tolist() == list(range(chosen.start, chosen.stop))
            if counts[chosen.start] > 1:
                assert chosen.stop == chosen.start + 1
            else:
                needs = [position // BLOCK_SIZE + 1 for position in positions[rows]]
                assert max(needs) * len(needs) <= 1.25 * sum(needs) + 8
        assert seen == list(range(len(counts)))


@pytest.mark.model
def test_the_demo_model_in_float32_is_that_of_transformers(demo_model_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    options = EngineOptions(
        source=str(demo_model_path), dtype="float32", max_batch_size=6, kv_cache_mb=64, threads=1
    )
    engine, files = create_engine(options)
    assert isinstance(engine, TorchEngine)
    model = AutoModelForCausalLM.from_pretrained(
        demo_model_path, dtype=torch.float32, local_files_only=True
    )
    texts = prompts(8, files.vocab_size, (3, 40, 18, 75, 9, 31))
    requests = [EngineRequest(str(i), p, greedy(16)) for i, p in enumerate(texts)]
    got = run(engine, requests, every=2)
    for i, prompt in enumerate(texts):
        expected(model, prompt, 16).check(got[str(i)])


@pytest.mark.model
def test_the_demo_model_chats(demo_model_path: Path) -> None:
    from jinja2 import Environment
    from tokenizers import Tokenizer

    engine, files = create_engine(
        EngineOptions(source=str(demo_model_path), dtype="auto", max_batch_size=2, threads=1)
    )
    engine.warm_up()
    assert engine.stats().steps == 0
    tokenizer = Tokenizer.from_str(files.tokenizer_json)
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    assert end in files.eos_ids
    assert files.chat_template is not None
    text = (
        Environment()
        .from_string(files.chat_template)
        .render(
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True,
            bos_token=files.bos_token,
            eos_token=files.eos_token,
        )
    )
    ids = tokenizer.encode(text).ids
    assert ids.count(start) == text.count("<|im_start|>") == 3
    assert ids.count(end) == 2
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    engine.add(EngineRequest("a", ids, SamplingParams(40, temperature=0)))
    tokens: list[int] = []
    while outputs := engine.step():
        tokens += outputs[0].tokens
        finish = outputs[0].finish
    assert "Paris" in tokenizer.decode(tokens)
    assert finish == "stop"
    assert tokens[-1] in files.eos_ids
