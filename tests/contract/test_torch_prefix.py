"""The torch engine with a prefix cache computes what it computes without one."""

from __future__ import annotations

import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.contract.models import FAMILIES, VOCAB, expected, tiny_model  # noqa: E402
from tests.contract.test_torch_engine import Poisoned, engine_of, greedy, run  # noqa: E402
from worker.engine.blocks import BLOCK_SIZE  # noqa: E402
from worker.engine.interface import EngineRequest  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def shared_prompts(seed: int, count: int) -> list[list[int]]:
    """Two beginnings of two blocks, and ends of their own; some are whole blocks, some equal."""
    source = random.Random(seed)
    heads = [[source.randrange(3, VOCAB) for _ in range(2 * BLOCK_SIZE)] for _ in range(2)]
    found = []
    for _ in range(count):
        head = heads[source.randrange(2)][: source.choice((BLOCK_SIZE, 2 * BLOCK_SIZE))]
        ids = [source.randrange(3, VOCAB) for _ in range(source.choice((0, 1, 5, BLOCK_SIZE)))]
        found.append(head + ids)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found_in_the_cache_changes_no_token(family: str) -> None:
    model = tiny_model(family)
    texts = shared_prompts(3, 8)
    right = [expected(model, prompt, 12) for prompt in texts]
    source = random.Random(7)
    for blocks, rows, batch in ((0, 256, 8), (0, 14, 5), (11, 40, 4)):
        engine = engine_of(model, batch=batch, step_rows=rows, blocks=blocks)
        for again in range(2):
            requests = [
                EngineRequest(f"{i} {again}", p, greedy(12), priority=source.randrange(3))
                for i, p in enumerate(texts)
            ]
            got = run(engine, requests, every=source.choice((0, 1, 3)))
            for i, one in enumerate(right):
                assert len(got[f"{i} {again}"]) == 12
                one.check(got[f"{i} {again}"])
        stats = engine.stats()
        assert 0 < stats.prefix_hits < stats.prefix_queries
        if blocks:
            assert stats.preemptions > 0


def test_an_answer_is_part_of_the_next_turns_beginning() -> None:
    model = tiny_model("llama")
    prompt = shared_prompts(5, 1)[0][:BLOCK_SIZE]
    engine = engine_of(model)
    answer = run(engine, [EngineRequest("a", prompt, greedy(2 * BLOCK_SIZE + 1))])["a"]
    turn = [*prompt, *answer, 5, 6, 7]
    expected(model, turn, 8).check(run(engine, [EngineRequest("b", turn, greedy(8))])["b"])
    assert engine.stats().prefix_hits == 3 * BLOCK_SIZE


def test_a_failure_leaves_those_that_share_its_beginning_alone() -> None:
    model = tiny_model("llama")
    poison = VOCAB - 1
    beginning = [5 + i % 60 for i in range(2 * BLOCK_SIZE)]
    texts = [[*beginning, 9], [*beginning, *(10 + i % 60 for i in range(3 * BLOCK_SIZE))]]
    right = [expected(model, prompt, 8) for prompt in texts]
    # A step holds one piece: one sequence reads while the other waits with half of its prompt.
    engine = engine_of(model, batch=4, step_rows=20)
    engine._backend = Poisoned(engine._backend, poison)
    right[0].check(run(engine, [EngineRequest("first", texts[0], greedy(8))])["first"])
    engine.add(EngineRequest("reads", texts[1], greedy(8), priority=1))
    output = engine.step()[0]
    assert 2 * BLOCK_SIZE < output.prefilled < len(texts[1])
    engine.add(EngineRequest("bad", [*beginning, *[poison] * 40], greedy(8), priority=0))
    bad = engine.step()
    assert [(one.rid, one.finish) for one in bad] == [("bad", "error")]
    got: list[int] = []
    while outputs := engine.step():
        got += [token for one in outputs for token in one.tokens]
        engine.check_integrity()
    assert len(got) == 8
    right[1].check(got)


def test_without_a_cache_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.contract.models import loaded
    from worker.engine import EngineOptions
    from worker.engine.torch_engine import TorchEngine

    options: Any = EngineOptions(max_batch_size=4, threads=1, prefix_cache=False)
    engine = TorchEngine(options, loaded=loaded(tiny_model("llama")))
    for rid in ("a", "b"):
        run(engine, [EngineRequest(rid, [5] * 4 * BLOCK_SIZE, greedy(3))])
    assert engine.stats().prefix_queries == engine.stats().prefix_hits == 0
