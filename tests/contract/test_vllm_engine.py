"""What of the vllm engine goes beyond the contract; `make test-vllm` runs it."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm", exc_type=ImportError)

from shared.messages import WAITS
from tests.contract.models import VOCAB, expected, tiny_model
from tests.contract.test_engines import ask, drain
from tests.contract.vllm_pool import engine as pooled
from tests.contract.vllm_pool import folder, options
from worker.engine import EngineError, create_engine
from worker.engine.interface import EngineRequest, SamplingParams
from worker.engine.vllm_engine import VllmEngine

pytestmark = pytest.mark.vllm


def test_greedy_is_what_transformers_generates() -> None:
    model = tiny_model("llama", hidden_size=128, max_position_embeddings=256)
    source = random.Random(4)
    prompts = {
        str(length): [source.randrange(3, VOCAB) for _ in range(length)]
        for length in (1, 3, 17, 60, 130, 200)
    }
    engine = pooled(4, 256)
    for rid, prompt in prompts.items():
        greedy = SamplingParams(20, temperature=0.0, ignore_eos=True)
        engine.add(EngineRequest(rid, prompt, greedy))
    got = drain(engine)
    engine.close()
    for rid, prompt in prompts.items():
        assert len(got[rid][0]) == 20
        expected(model, prompt, 20).check(got[rid][0])


def test_the_models_own_end_ends_a_sequence() -> None:
    engine = pooled(4, 256)
    assert engine.info.eos_ids == {96}
    engine.add(ask("free", 200, seed=3))
    free = drain(engine)["free"][0]
    assert 96 in free, "another seed may have it"
    engine.add(ask("ends", 200, seed=3, ignore_eos=False))
    assert drain(engine)["ends"] == (free[: free.index(96) + 1], "stop")
    engine.close()


def test_a_prompt_that_takes_several_steps_tells_how_far_it_is() -> None:
    engine = pooled(2, 2048)
    engine.add(ask("long", 2, length=700))
    seen = []
    while outputs := engine.step():
        seen += [(output.prefilled, len(output.tokens)) for output in outputs]
    assert seen == [(512, 0), (700, 1), (701, 1)]
    engine.close()


def test_a_sequence_that_was_preempted_says_that_it_waits() -> None:
    # Five blocks of 128 tokens, and two sequences that come to need three each.
    engine, _ = create_engine(options(2, 512, kv_cache_mb=1))
    try:
        for seed, rid in enumerate(("first", "second")):
            engine.add(ask(rid, 350, length=5, seed=seed))
        said: list[list[int]] = []
        counts = {"first": 0, "second": 0}
        while outputs := engine.step():
            said.append([output.prefilled for output in outputs if not output.tokens])
            for output in outputs:
                counts[output.rid] += len(output.tokens)
        assert counts == {"first": 350, "second": 350}
        assert engine.stats().preemptions == 1
        waited = [rows for rows in said if rows]
        # In each step until the other one had ended.
        assert len(waited) > 10
        assert waited == [[WAITS]] * len(waited)
    finally:
        engine.close()


def test_who_waits_for_its_first_place_says_so() -> None:
    engine = pooled(4, 256)
    for number in range(5):
        # Of a batch of four.
        engine.add(ask(str(number), 10))
    first = {output.rid: output.prefilled for output in engine.step()}
    assert first.pop("4") == WAITS
    assert WAITS not in first.values()
    # What vLLM has lost does not wait for anything.
    engine._llm.abort_request(["4"])
    assert {output.rid for output in engine.step()} == set("0123")
    engine.abort("4")
    drain(engine)
    engine.close()


def test_an_end_that_only_vllm_knows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = pooled(4, 256)
    engine.add(ask("a", 50))
    broken = SimpleNamespace(
        request_id="a",
        finished=True,
        outputs=[SimpleNamespace(token_ids=[5], finish_reason="repetition")],
    )
    with monkeypatch.context() as patched:
        patched.setattr(engine._llm, "step", lambda: [broken])
        [output] = [output for output in engine.step() if output.finish]
    assert (output.rid, output.tokens, output.finish) == ("a", [5], "error")
    assert "repetition" in output.error
    engine._llm.abort_request(["a"])
    assert engine.step() == []
    engine.close()


def test_a_step_too_slow_for_the_lease_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = pooled(4, 256)
    monkeypatch.setattr(engine, "_lease_s", 0.1)
    monkeypatch.setattr(engine, "_rehearse", lambda: 0.06)
    with pytest.raises(EngineError, match="60 ms, more than half of the lease"):
        engine.warm_up()
    engine.close()


def test_it_is_another_version_than_the_models_files_say() -> None:
    from worker.engine.loader import describe

    engine = pooled(4, 256)
    assert engine.files.version != describe(folder(256)).version
    engine.close()


@pytest.mark.parametrize("kv_cache_mb", [1])
def test_a_small_cache_shortens_the_context(kv_cache_mb: int) -> None:
    # A block of vLLM's on a CPU is 128 tokens: 3 layers, 2 heads of 32, float32, keys and values.
    small = options(2, 2048, kv_cache_mb=kv_cache_mb)
    engine, files = create_engine(small)
    try:
        assert files.context_length == engine.info.context_length < 2048
        assert engine.info.context_length >= 128
        engine.add(ask("a", 10_000, length=5))
        tokens, finish = drain(engine)["a"]
        assert (len(tokens), finish) == (engine.info.context_length - 5, "length")
    finally:
        engine.close()


def test_a_model_that_vllm_does_not_know_is_told(tmp_path: Any) -> None:
    import json

    for path in folder(256).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_attention_heads"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"vLLM cannot serve|cannot load"):
        VllmEngine(options(4, 256, source=str(tmp_path)))
