"""The engine alone: what it reaches in a closed loop, without HTTP, Redis and text.

`python -m benchmarks.engine_loop` reads the engine's options, then loads, each a line of JSON, and
answers each with a line. `EngineLoop` is the side that asks.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.companion import Companion, answer
from benchmarks.figures import BenchError, Figures
from benchmarks.load import WARM_UP_TOKENS, Answer, Load, Prompts
from benchmarks.server import family, memory_mb
from worker.engine import EngineOptions, create_engine
from worker.engine.interface import Engine, EngineRequest, SamplingParams

_START_S = 600.0
_ASK_S = 60.0


class EngineLoop:
    """An engine in a process of its own, at the priority that `up` gives a worker.

    Args:
        data_dir: where converted models are kept.
        engine, source, max_batch_size, echo_step_ms: see `EngineOptions`.
        python, env: of its process; other environments have other engines.

    Attributes:
        info: name, device, dtype, the tokenizer, and how long it took to load and to warm up.
        dtype: the same.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        engine: str,
        source: str,
        max_batch_size: int,
        echo_step_ms: float = 0.0,
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._companion = Companion("benchmarks.engine_loop", python=python, env=env)
        options = {
            "data_dir": str(data_dir),
            "engine": engine,
            "source": source,
            "max_batch_size": max_batch_size,
            "echo_step_ms": echo_step_ms,
        }
        self._companion.say(options)
        try:
            self.info: dict[str, Any] = self._companion.hear(_START_S, json.loads)
        except BaseException:
            self.stop()
            raise
        self.dtype: str = self.info["dtype"]

    def run(self, load: Load, prompts: Prompts) -> Figures:
        """Runs a load.

        Raises:
            BenchError: the engine failed.
        """
        # What warms up is not asked again: an engine may remember prompts.
        warm_up, lanes = (
            [[prompts.ids(load.prompt_tokens) for _ in range(count)] for _ in range(load.streams)]
            for count in (1, load.requests)
        )
        self._companion.say(
            {
                "warm_up": warm_up,
                "lanes": lanes,
                "output_tokens": load.output_tokens,
                "temperature": load.temperature,
                "top_p": load.top_p,
                "no_start_after_s": load.no_start_after_s,
                "limit_s": load.limit_s,
            }
        )
        told = self._companion.hear(load.limit_s + 30.0, json.loads)
        return Figures(**told)

    def ask(self, prompt: str, output_tokens: int) -> Answer:
        """One greedy answer.

        Raises:
            BenchError: the engine failed.
        """
        tokenizer = Tokenizer.from_str(self.info["tokenizer"])
        ids = tokenizer.encode(prompt).ids
        self._companion.say({"ask": ids, "output_tokens": output_tokens})
        first_at = self._companion.hear(_ASK_S, lambda line: time.perf_counter())
        generated = self._companion.hear(_ASK_S, json.loads)["ids"]
        return Answer(tokenizer.decode(generated), first_at)

    def memory_mb(self) -> float:
        """Resident memory of its process, in MiB."""
        return memory_mb(family(self._companion.pid))

    def stop(self) -> None:
        """Ends it."""
        self._companion.__exit__()

    def __enter__(self) -> EngineLoop:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def closed_loop(
    engine: Engine,
    lanes: list[list[list[int]]],
    output_tokens: int,
    *,
    no_start_after_s: float,
    limit_s: float,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Figures:
    """Runs each lane's prompts one after the other, the lanes side by side.

    Raises:
        BenchError: a sequence failed, or the time ran out.
    """
    waiting = [list(reversed(lane)) for lane in lanes]
    sampling = SamplingParams(output_tokens, temperature, top_p, ignore_eos=True)
    lane_of: dict[str, int] = {}
    last: dict[str, float] = {}
    got: set[str] = set()
    ttft_ms: list[float] = []
    gap_ms: list[float] = []
    tokens = started = 0
    cpu, began = time.process_time(), time.perf_counter()

    def start(lane: int) -> None:
        nonlocal started
        rid = f"{began}-{started}"
        lane_of[rid] = lane
        own = replace(sampling, seed=started)
        started += 1
        last[rid] = time.perf_counter()
        engine.add(EngineRequest(rid, waiting[lane].pop(), own))

    for lane in range(len(lanes)):
        start(lane)
    while lane_of:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            tokens += len(output.tokens)
            if output.tokens:
                (gap_ms if output.rid in got else ttft_ms).append((now - last[output.rid]) * 1000)
                got.add(output.rid)
                last[output.rid] = now
            if output.finish is None:
                continue
            lane = lane_of.pop(output.rid)
            if output.finish != "length":
                raise BenchError(f"a sequence ended by {output.finish}: {output.error}")
            if waiting[lane] and time.perf_counter() - began < no_start_after_s:
                start(lane)
        if time.perf_counter() - began > limit_s:
            raise BenchError(f"the engine loop took more than {limit_s:.0f} s")
    seconds = time.perf_counter() - began
    if tokens != started * output_tokens:
        raise BenchError(f"{started} sequences gave {tokens} tokens")
    cpu_s = {"engine": time.process_time() - cpu}
    return Figures(tokens, seconds, cpu_s, ttft_ms, gap_ms)


def main() -> int:
    """Serves the process that started this one."""
    options = json.loads(sys.stdin.readline())
    data_dir = Path(options.pop("data_dir"))
    try:
        began = time.perf_counter()
        engine, files = create_engine(EngineOptions(data_dir=data_dir, **options))
        loaded = time.perf_counter()
        engine.warm_up()
        info = engine.info
        _say(
            {
                "name": info.name,
                "device": info.device,
                "dtype": info.dtype,
                "tokenizer": files.tokenizer_json,
                "load_s": loaded - began,
                "warm_up_s": time.perf_counter() - loaded,
            }
        )
        for line in sys.stdin:
            job = json.loads(line)
            if "ask" in job:
                _answer(engine, job["ask"], job["output_tokens"])
                continue
            warm_up, lanes = job.pop("warm_up"), job.pop("lanes")
            output_tokens = job.pop("output_tokens")
            closed_loop(engine, warm_up, min(WARM_UP_TOKENS, output_tokens), **job)
            _say(dataclasses.asdict(closed_loop(engine, lanes, output_tokens, **job)))
    except Exception as error:
        _say({"failed": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _answer(engine: Engine, prompt: list[int], output_tokens: int) -> None:
    """Says that the first token is there, then all of them."""
    sampling = SamplingParams(output_tokens, temperature=0.0, ignore_eos=True)
    engine.add(EngineRequest("ask", prompt, sampling))
    ids: list[int] = []
    finish = None
    while finish is None:
        for output in engine.step():
            if output.tokens and not ids:
                _say({"first": True})
            ids += output.tokens
            finish = output.finish
    _say({"ids": ids})


def _say(value: dict[str, Any]) -> None:
    answer(json.dumps(value))


if __name__ == "__main__":
    sys.exit(main())
