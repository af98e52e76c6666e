"""What every engine keeps to. A new engine is added to ENGINES and must pass all of it."""

from __future__ import annotations

import importlib.util
import random
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.messages import WAITS
from worker.engine import EngineError, EngineOptions, ModelFiles, create_engine
from worker.engine.echo import EchoEngine, echo_token
from worker.engine.interface import Engine, EngineInfo, EngineRequest, SamplingParams

Make = Callable[..., Any]


def make_echo(batch: int = 4, context: int = 256) -> Engine:
    return EchoEngine(EngineOptions(engine="echo", max_batch_size=batch), context_length=context)


def make_torch(batch: int = 4, context: int = 256) -> Engine:
    from tests.contract.models import loaded, tiny_model
    from worker.engine.torch_engine import TorchEngine

    model = tiny_model("llama", max_position_embeddings=context)
    return TorchEngine(
        EngineOptions(max_batch_size=batch, threads=1), loaded=loaded(model, eos_ids=(96,))
    )


def make_vllm(batch: int = 4, context: int = 256) -> Engine:
    from tests.contract.vllm_pool import engine

    return engine(batch, context)


ENGINES = [
    pytest.param(make_echo, id="echo"),
    pytest.param(make_torch, id="torch", marks=pytest.mark.torch),
]
if importlib.util.find_spec("vllm"):
    # `make test-vllm` has it, in an environment of its own.
    ENGINES.append(pytest.param(make_vllm, id="vllm", marks=pytest.mark.vllm))


@pytest.fixture(params=ENGINES)
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[Engine] = []

    def build(**options: int) -> Engine:
        made.append(request.param(**options))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


def ask(rid: str, count: int = 8, length: int = 5, **sampling: Any) -> EngineRequest:
    more = {
        name: sampling.pop(name) for name in ("generated", "choice", "priority") if name in sampling
    }
    sampling.setdefault("ignore_eos", True)
    prompt = [3 + (i * 7 + length) % 80 for i in range(length)]
    return EngineRequest(rid, prompt, SamplingParams(count, **sampling), **more)


def drain(engine: Engine) -> dict[str, tuple[list[int], str]]:
    """Steps until nothing is left: what each sequence got, and how it ended."""
    tokens: dict[str, list[int]] = {}
    ends: dict[str, str] = {}
    while outputs := engine.step():
        assert len({output.rid for output in outputs}) == len(outputs)
        for output in outputs:
            assert output.rid not in ends, "an output after the end"
            tokens.setdefault(output.rid, []).extend(output.tokens)
            if output.finish:
                ends[output.rid] = output.finish
                assert (output.error != "") == (output.finish == "error")
    assert tokens.keys() == ends.keys()
    return {rid: (got, ends[rid]) for rid, got in tokens.items()}


def test_info_and_files_agree(make: Make) -> None:
    engine = make()
    info: EngineInfo = engine.info
    files: ModelFiles = engine.files
    assert info.max_batch_size == 4
    assert info.context_length == files.context_length == 256
    assert set(info.eos_ids) == set(files.eos_ids)
    assert info.vocab_size == files.vocab_size
    assert all(0 <= end < info.vocab_size for end in info.eos_ids)
    assert len(files.version) == 8


def test_warming_up_leaves_no_trace(make: Make) -> None:
    engine = make()
    engine.warm_up()
    assert engine.step() == []
    assert engine.room() == 4
    stats = engine.stats()
    assert (stats.steps, stats.prompt_tokens, stats.generated_tokens, stats.running) == (0, 0, 0, 0)


def test_an_idle_engine_does_nothing(make: Make) -> None:
    engine = make()
    assert engine.step() == []
    engine.abort("unknown")
    assert engine.stats().steps == 0


def test_max_tokens_end_a_sequence(make: Make) -> None:
    engine = make()
    for count in (1, 2, 9):
        engine.add(ask(str(count), count))
    for rid, (tokens, finish) in drain(engine).items():
        assert (len(tokens), finish) == (int(rid), "length")
        assert all(0 <= token < engine.info.vocab_size for token in tokens)


def test_the_context_ends_a_sequence(make: Make) -> None:
    engine = make(context=64)
    engine.add(ask("a", 1000, length=60))
    assert drain(engine)["a"][1] == "length"
    engine.add(ask("b", 1000, length=63))
    tokens, finish = drain(engine)["b"]
    assert (len(tokens), finish) == (1, "length")


@pytest.mark.parametrize("most", [3, 1000])
def test_what_had_its_end_before_it_came_ends_at_once(make: Make, most: int) -> None:
    """Its end was lost, its last token was not."""
    engine = make(context=64)
    length = 10 if most == 3 else 61
    engine.add(EngineRequest("a", [5] * length, SamplingParams(most), generated=[6] * 3))
    assert drain(engine) == {"a": ([], "length")}


def test_stop_ids_end_a_sequence_and_are_included(make: Make) -> None:
    engine = make()
    engine.add(ask("free", 30, seed=4))
    free = drain(engine)["free"][0]
    stop = free[12]
    engine.add(ask("stopped", 30, seed=4, stop_ids=frozenset({stop})))
    tokens, finish = drain(engine)["stopped"]
    assert finish == "stop"
    assert tokens == free[: free.index(stop) + 1]


def test_an_end_at_the_last_token_is_a_stop(make: Make) -> None:
    engine = make()
    engine.add(ask("free", 6, seed=4))
    free = drain(engine)["free"][0]
    count = free.index(free[5]) + 1
    engine.add(ask("both", count, seed=4, stop_ids=frozenset({free[5]})))
    assert drain(engine)["both"] == (free[:count], "stop")


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (EngineRequest("a", [], SamplingParams(3)), "empty"),
        (EngineRequest("a", [5, 100000], SamplingParams(3)), "vocabulary"),
        (EngineRequest("a", [5, -1], SamplingParams(3)), "vocabulary"),
        (EngineRequest("a", [5], SamplingParams(3), generated=[100000]), "vocabulary"),
        (EngineRequest("a", [5] * 256, SamplingParams(3)), "context"),
        (EngineRequest("a", [5] * 250, SamplingParams(300), generated=[5] * 7), "context"),
        (EngineRequest("a", [5], SamplingParams(0)), "max_tokens"),
        (EngineRequest("known", [5], SamplingParams(3)), "already"),
    ],
)
def test_what_cannot_be_served_is_refused_and_changes_nothing(
    make: Make, request_: EngineRequest, why: str
) -> None:
    engine = make()
    engine.add(ask("known", 3))
    with pytest.raises(ValueError, match=why):
        engine.add(request_)
    assert list(drain(engine)) == ["known"]
    engine.add(ask("known", 3))
    assert list(drain(engine)) == ["known"]


def test_sequences_join_and_leave_at_any_step(make: Make) -> None:
    alone = {}
    for i in range(12):
        engine = make()
        engine.add(ask(str(i), 4 + i, length=3 + 5 * i, seed=i))
        alone[str(i)] = drain(engine)[str(i)]
    engine, source = make(), random.Random(2)
    got: dict[str, list[int]] = {rid: [] for rid in alone}
    ends: dict[str, str] = {}
    waiting = list(range(12))
    extra = 0
    while len(ends) < len(alone):
        if waiting and engine.room():
            i = waiting.pop(0)
            engine.add(ask(str(i), 4 + i, length=3 + 5 * i, seed=i))
        if source.random() < 0.3:
            extra += 1
            engine.add(ask(f"leaves {extra}", 1000, priority=2))
        if source.random() < 0.5:
            engine.abort(f"leaves {extra}")
        for output in engine.step():
            if output.rid in got:
                got[output.rid] += output.tokens
                if output.finish:
                    ends[output.rid] = output.finish
    assert {rid: (got[rid], ends[rid]) for rid in alone} == alone


def test_an_aborted_sequence_is_gone_and_its_place_is_free(make: Make) -> None:
    engine = make(batch=2)
    engine.add(ask("a", 1000))
    engine.add(ask("b", 1000))
    engine.step()
    assert engine.room() == 0
    engine.abort("a")
    engine.abort("a")
    assert engine.room() == 1
    assert [output.rid for output in engine.step()] == ["b"]
    engine.add(ask("a", 2))
    engine.abort("b")
    assert list(drain(engine)) == ["a"]
    assert engine.stats().kv_usage == 0


def test_an_aborted_sequence_that_never_ran_is_gone(make: Make) -> None:
    engine = make()
    engine.add(ask("a"))
    engine.abort("a")
    assert engine.step() == []
    assert engine.room() == 4


def test_more_than_the_batch_holds_wait_their_turn(make: Make) -> None:
    engine = make(batch=2)
    for i in range(5):
        engine.add(ask(str(i), 3, priority=0 if i == 4 else 1))
    assert engine.room() == 0
    waits = {output.rid: output.prefilled == WAITS for output in engine.step()}
    assert waits == {"4": False, "0": False, "1": True, "2": True, "3": True}
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (2, 3)
    assert 0 < stats.kv_usage <= 1
    assert sorted(drain(engine)) == ["0", "1", "2", "3", "4"]


def test_the_counters_count(make: Make) -> None:
    engine = make()
    engine.add(ask("a", 4, length=10))
    engine.add(ask("b", 6, length=20))
    drain(engine)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens) == (30, 10)
    assert stats.steps >= 6
    assert (stats.running, stats.waiting, stats.preemptions, stats.kv_usage) == (0, 0, 0, 0)


def test_progress_on_a_prompt_is_told(make: Make) -> None:
    engine = make()
    engine.add(ask("a", 3, length=20))
    seen = []
    while outputs := engine.step():
        seen += [(len(output.tokens), output.prefilled) for output in outputs]
    assert seen[-3:] == [(1, 20), (1, 21), (1, 22)]


def test_a_seed_decides_the_tokens(make: Make) -> None:
    def tokens(seed: int, choice: int = 0) -> list[int]:
        engine = make()
        engine.add(ask("a", 24, seed=seed, choice=choice))
        return drain(engine)["a"][0]

    assert tokens(7) == tokens(7)
    assert tokens(2**63 - 1) == tokens(2**63 - 1)
    assert len({tuple(tokens(seed)) for seed in (1, 2, 3)}) == 3
    assert len({tuple(tokens(7, choice)) for choice in (0, 1, 2)}) == 3


@pytest.mark.parametrize("known", [1, 7, 15])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"min_p": 0.3, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.2},
        {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.2},
    ],
    ids=lambda sampling: "+".join(sampling) or "plain",
)
def test_a_sequence_goes_on_from_what_another_engine_generated(
    make: Make, known: int, sampling: dict[str, Any]
) -> None:
    engine = make()
    if engine.info.name == "vllm" and "frequency_penalty" in sampling:
        pytest.skip("to vLLM it is a prompt, over which these penalties do not count")
    engine.add(ask("a", 16, seed=9, **sampling))
    whole = drain(engine)["a"][0]
    other = make()
    other.add(ask("other", 20, seed=1))
    other.step()
    other.add(ask("a", 16, seed=9, **sampling, generated=whole[:known]))
    assert drain(other)["a"] == (whole[known:], "length")


def test_a_sequence_that_had_all_its_tokens_just_ends(make: Make) -> None:
    engine = make()
    engine.add(ask("full", 3, generated=[5, 6, 7]))
    engine.add(ask("stopped", 9, generated=[5, 6, 7], stop_ids=frozenset({7})))
    engine.add(ask("aborted", 3, generated=[5, 6, 7]))
    with pytest.raises(ValueError, match="already"):
        engine.add(ask("full", 3))
    engine.abort("aborted")
    assert drain(engine) == {"full": ([], "length"), "stopped": ([], "stop")}


def test_the_echo_is_known_in_advance() -> None:
    engine, files = create_engine(EngineOptions(engine="echo"))
    from tokenizers import Tokenizer

    engine.add(ask("a", 200, seed=5, choice=1))
    tokens = drain(engine)["a"][0]
    assert tokens == [echo_token(5, 1, position) for position in range(200)]
    text = Tokenizer.from_str(files.tokenizer_json).decode(tokens)
    assert len(text) == 200
    assert set(text) == set("abcdefghijklmnopqrstuvwxyz ")


def test_the_byte_tokenizer_is_one_id_a_byte() -> None:
    from tokenizers import Tokenizer

    from worker.engine.echo_tokenizer import END_ID, END_TOKEN, byte_id, tokenizer_json

    tokenizer = Tokenizer.from_str(tokenizer_json())
    assert sorted(byte_id(byte) for byte in range(256)) == list(range(256))
    text = "Grüße, 世界! \n\t\x00\x7f 🙂"
    ids = tokenizer.encode(text + END_TOKEN).ids
    assert ids == [*(byte_id(byte) for byte in text.encode()), END_ID]
    assert tokenizer.decode(ids) == text


def test_an_echo_step_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("worker.engine.echo.time.sleep", slept.append)
    engine = EchoEngine(EngineOptions(engine="echo", echo_step_ms=12.5))
    engine.step()
    engine.add(ask("a", 2))
    drain(engine)
    assert slept == [0.0125, 0.0125]


class Constant:
    """A user's engine: everything but the tokens is taken from echo."""

    def __init__(self, options: EngineOptions) -> None:
        self._echo = EchoEngine(options)
        self.info, self.files = self._echo.info, self._echo.files

    def __getattr__(self, name: str) -> Any:
        return getattr(self._echo, name)


def test_an_engine_of_ones_own_is_found_by_module_and_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module: Any = types.ModuleType("my_engines")
    module.Constant, module.Bare = Constant, lambda options: object()
    monkeypatch.setitem(sys.modules, "my_engines", module)
    engine, files = create_engine(EngineOptions(engine="my_engines:Constant", max_batch_size=3))
    assert (engine.info.max_batch_size, files.vocab_size) == (3, 257)
    with pytest.raises(EngineError, match="info"):
        create_engine(EngineOptions(engine="my_engines:Bare"))
    with pytest.raises(EngineError, match="no class Missing"):
        create_engine(EngineOptions(engine="my_engines:Missing"))


def test_an_engine_of_ones_own_may_lie_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine_of_this_folder.py").write_text(
        "from worker.engine.echo import EchoEngine\nclass Mine(EchoEngine): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    engine, _ = create_engine(EngineOptions(engine="engine_of_this_folder:Mine"))
    assert type(engine).__name__ == "Mine"
    sys.modules.pop("engine_of_this_folder")


@pytest.mark.parametrize(("step_ms", "lease_ms"), [(1500, 3000), (100, 200), (60_000, 60_000)])
def test_an_echo_step_that_would_outlast_the_lease_is_refused(step_ms: int, lease_ms: int) -> None:
    with pytest.raises(EngineError, match=f"RTS_ECHO_STEP_MS={step_ms} .*RTS_LEASE_MS={lease_ms}"):
        EchoEngine(EngineOptions(engine="echo", echo_step_ms=step_ms, lease_ms=lease_ms))
    EchoEngine(EngineOptions(engine="echo", echo_step_ms=step_ms - 1, lease_ms=2 * step_ms))
    EchoEngine(EngineOptions(engine="echo", echo_step_ms=step_ms))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (EngineError("the model is bad"), 2),
        (ImportError("no module named vllm"), 2),
        (ValueError("a bug"), None),
        (TypeError("a bug"), None),
    ],
)
def test_only_a_bug_of_an_engine_ends_the_start_with_a_traceback(
    error: Exception,
    status: int | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from shared.settings import Settings
    from worker import main

    def broken(options: EngineOptions) -> Any:
        raise error

    module: Any = types.ModuleType("broken_engines")
    module.Broken = broken
    monkeypatch.setitem(sys.modules, "broken_engines", module)
    monkeypatch.setattr(main, "setup_logging", lambda *_: None)
    settings = Settings(engine="broken_engines:Broken")
    if status is None:
        with pytest.raises(type(error), match="a bug"):
            main.main(settings)
    else:
        assert main.main(settings) == status
        last = caplog.records[-1]
        assert (last.getMessage(), last.levelname, last.exc_info) == (str(error), "ERROR", None)


def test_progress_is_logged_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    from worker.engine.progress import ProgressLog

    caplog.set_level("INFO", "worker")
    now = 5.0
    progress = ProgressLog(lambda: now)
    for i in range(101):
        progress("loading", i / 100)
        now += 0.04
    progress("warming up", 0.0)
    progress("warming up", 1.0)
    told = [(record.getMessage(), vars(record)["done"]) for record in caplog.records]
    assert told[:3] == [("loading", "0%"), ("loading", "25%"), ("loading", "50%")]
    assert told[-3:] == [("loading", "100%"), ("warming up", "0%"), ("warming up", "100%")]
    assert len(told) == 7


@pytest.mark.parametrize("name", ["", "vllmm", "a:", ":b"])
def test_an_unknown_engine_is_told_with_those_that_are(name: str) -> None:
    with pytest.raises(EngineError, match=r"echo, torch, vllm, or package\.module:Class"):
        create_engine(EngineOptions(engine=name))


def test_a_missing_package_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("worker.engine.torch_engine")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"torch.*pip install 'realtime-ai-serve\[worker\]'"):
        create_engine(EngineOptions(engine="torch"))
    monkeypatch.delitem(sys.modules, "worker.engine.vllm_engine", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"vllm.*pip install 'realtime-ai-serve\[vllm\]'"):
        create_engine(EngineOptions(engine="vllm"))
    with pytest.raises(ImportError, match="no_such_module"):
        create_engine(EngineOptions(engine="no_such_module:Class"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_batch_size", 0),
        ("max_batch_size", 257),
        ("dtype", "float16"),
        ("echo_step_ms", -1.0),
        ("echo_step_ms", float("nan")),
        ("kv_cache_mb", -1),
        ("threads", -2),
        ("prefix_cache", 2),
    ],
)
def test_bad_options_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        EngineOptions(**{field: value})
