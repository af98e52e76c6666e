"""The engine alone: what it reaches in a closed loop, without HTTP, Redis and text.

`python -m benchmarks.engine_loop` reads the engine's options, then loads, each a line of JSON, and
answers each with a line. `EngineLoop` is the side that asks.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.companion import Companion, answer
from benchmarks.figures import BenchError, Figures
from benchmarks.load import Load, Prompts
from worker.engine import EngineOptions, create_engine
from worker.engine.interface import Engine, EngineRequest, SamplingParams

_START_S = 300.0


class EngineLoop:
    """An engine in a process of its own, at the priority that `up` gives a worker.

    Args:
        data_dir: where converted models are kept.
        engine, source, max_batch_size, echo_step_ms: see `EngineOptions`.

    Attributes:
        info: name, device, dtype, the tokenizer, and how long it took to load and to warm up.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        engine: str,
        source: str,
        max_batch_size: int,
        echo_step_ms: float,
    ) -> None:
        self._companion = Companion("benchmarks.engine_loop")
        options = {
            "data_dir": str(data_dir),
            "engine": engine,
            "source": source,
            "max_batch_size": max_batch_size,
            "echo_step_ms": echo_step_ms,
        }
        self._companion.say(options)
        self.info: dict[str, Any] = self._companion.hear(_START_S, json.loads)

    def run(self, load: Load, prompts: Prompts) -> Figures:
        """Runs a load.

        Raises:
            BenchError: the engine failed.
        """
        lanes = [
            [prompts.ids(load.prompt_tokens) for _ in range(load.requests)]
            for _ in range(load.streams)
        ]
        self._companion.say(
            {
                "lanes": lanes,
                "output_tokens": load.output_tokens,
                "no_start_after_s": load.no_start_after_s,
                "limit_s": load.limit_s,
            }
        )
        told = self._companion.hear(load.limit_s + 30.0, json.loads)
        return Figures(told["tokens"], told["seconds"], {"engine": told["cpu_s"]})

    def __enter__(self) -> EngineLoop:
        return self

    def __exit__(self, *error: object) -> None:
        self._companion.__exit__()


def closed_loop(
    engine: Engine,
    lanes: list[list[list[int]]],
    output_tokens: int,
    *,
    no_start_after_s: float,
    limit_s: float,
) -> Figures:
    """Runs each lane's prompts one after the other, the lanes side by side.

    Raises:
        BenchError: a sequence failed, or the time ran out.
    """
    waiting = [list(reversed(lane)) for lane in lanes]
    sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    lane_of: dict[str, int] = {}
    tokens = started = 0
    cpu, began = time.process_time(), time.perf_counter()

    def start(lane: int) -> None:
        nonlocal started
        rid = f"{began}-{started}"
        lane_of[rid] = lane
        started += 1
        engine.add(EngineRequest(rid, waiting[lane].pop(), sampling))

    for lane in range(len(lanes)):
        start(lane)
    while lane_of:
        for output in engine.step():
            tokens += len(output.tokens)
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
    return Figures(tokens, seconds, {"engine": time.process_time() - cpu})


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
            limits = {name: job[name] for name in ("no_start_after_s", "limit_s")}
            warm = [[lane[0]] for lane in job["lanes"]]
            closed_loop(engine, warm, 8, **limits)
            figures = closed_loop(engine, job["lanes"], job["output_tokens"], **limits)
            _say(
                {
                    "tokens": figures.tokens,
                    "seconds": figures.seconds,
                    "cpu_s": figures.cpu_s["engine"],
                }
            )
    except Exception as error:
        _say({"failed": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _say(value: dict[str, Any]) -> None:
    answer(json.dumps(value))


if __name__ == "__main__":
    sys.exit(main())
