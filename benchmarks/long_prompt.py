"""What a long prompt costs those who generate beside it: their time between tokens.

`python -m benchmarks.long_prompt` runs the torch engine alone with the demo model (or a folder
given as an argument) and writes benchmarks/results/long_prompt.md.
"""

from __future__ import annotations

import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.figures import BenchError, percentiles
from benchmarks.machine import describe
from realtime_serve.demo_model import fetch_demo_model
from realtime_serve.screen import Screen
from shared.settings import Settings
from worker.engine import EngineOptions, create_engine
from worker.engine.interface import Engine, EngineRequest, SamplingParams

RESULTS = Path(__file__).parent / "results" / "long_prompt.md"
STREAMS = (1, 8, 32)
PROMPT_TOKENS = 64
LONG_TOKENS = 4000
STEPS = 100
"""Without the long prompt; with it, as many as it takes."""
ROUNDS = 3
_LIMIT_S = 300.0


@dataclass(slots=True)
class Watch:
    """Milliseconds between the tokens of those that generate, and until the long prompt's first."""

    gap_ms: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)


def prompt(source: random.Random, tokens: int) -> list[int]:
    """Ids that no other prompt begins with."""
    return [source.randrange(1000, 40_000) for _ in range(tokens)]


def follow(engine: Engine, steps: int, watch: Watch, until: str = "") -> None:
    """Steps so many times, or until the sequence `until` has its first token.

    Raises:
        BenchError: a sequence failed, or it took too long.
    """
    began = last = time.perf_counter()
    done = 0
    while done < steps or until:
        outputs = engine.step()
        now = time.perf_counter()
        if failed := [output.error for output in outputs if output.finish == "error"]:
            raise BenchError(failed[0])
        if now - began > _LIMIT_S:
            raise BenchError(f"{done} steps took more than {_LIMIT_S:.0f} s")
        heard = sum(bool(output.tokens) and output.rid != until for output in outputs)
        watch.gap_ms += [1000 * (now - last)] * heard
        last = now
        done += 1
        if until and any(output.rid == until and output.tokens for output in outputs):
            watch.first_token_ms.append(1000 * (now - began))
            return


def measure(engine: Engine, streams: int, seed: int) -> tuple[Watch, Watch]:
    """Those that generate without, and then with a long prompt beside them."""
    source = random.Random(seed)
    without, beside = Watch(), Watch()
    forever = SamplingParams(max_tokens=100_000, temperature=0.0, ignore_eos=True)
    for i in range(streams):
        engine.add(EngineRequest(f"stream {i}", prompt(source, PROMPT_TOKENS), forever))
    # All of them generate.
    follow(engine, 20, Watch())
    follow(engine, STEPS, without)
    engine.add(EngineRequest("long", prompt(source, LONG_TOKENS), SamplingParams(2)))
    follow(engine, 0, beside, until="long")
    for i in range(streams):
        engine.abort(f"stream {i}")
    engine.abort("long")
    return without, beside


def table(found: dict[int, list[tuple[Watch, Watch]]]) -> list[str]:
    """The rows of the results, over all rounds."""
    lines = [
        "| streams | p50 without (ms) | p99 without | p50 with | p99 with | p99 with / without "
        "| the long prompt's first token (s) |",
        "|---|---|---|---|---|---|---|",
    ]
    for streams, rounds in found.items():
        without = percentiles([gap for one, _ in rounds for gap in one.gap_ms])
        beside = percentiles([gap for _, one in rounds for gap in one.gap_ms])
        first = sorted(ms for _, one in rounds for ms in one.first_token_ms)[len(rounds) // 2]
        lines.append(
            f"| {streams} | {without[0]:.1f} | {without[2]:.1f} | {beside[0]:.1f} "
            f"| {beside[2]:.1f} | {beside[2] / without[2]:.2f} | {first / 1000:.1f} |"
        )
    return lines


def main() -> int:
    """Measures, in turns, and writes the table."""
    settings = Settings.load(os.environ)
    folder = Path(sys.argv[1]) if sys.argv[1:] else None
    folder = folder or fetch_demo_model(settings.data_dir, Screen())
    engine, _ = create_engine(EngineOptions(source=str(folder), max_batch_size=max(STREAMS) + 1))
    engine.warm_up()
    machine = describe("none")
    found: dict[int, list[tuple[Watch, Watch]]] = {streams: [] for streams in STREAMS}
    for number in range(ROUNDS):
        for streams in STREAMS:
            found[streams].append(measure(engine, streams, 100 * number + streams))
    lines = [
        "# A long prompt beside streams that generate",
        "",
        f"Written by `python -m benchmarks.long_prompt`: the torch engine alone on {folder.name},",
        f"{engine.info.dtype}, prompts of {PROMPT_TOKENS} tokens that generate; time between their",
        f"tokens without and with a prompt of {LONG_TOKENS} tokens beside them, {ROUNDS} rounds.",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; load before: "
        f"{', '.join(map(str, machine['load_before']))}.",
        "",
        *table(found),
    ]
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
