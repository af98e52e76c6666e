"""Our engine, alone and through the whole cluster, against others: same model, load, machine, run.

Every round runs a load on each in turn, so that whatever the machine does meanwhile hits all alike,
and ratios are taken pair by pair. `python -m benchmarks.engine --help` says what can be chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import limits, machine, plot, random_llama
from benchmarks.contenders import Contender, Setting, Subject, contenders
from benchmarks.engine_report import EngineReport, Start
from benchmarks.figures import BenchError, Rounds
from benchmarks.load import Load, Prompts
from benchmarks.run import RESULTS, numbers
from realtime_serve.redis_server import ServerError, find_binary
from realtime_serve.screen import Screen
from shared.settings import DEMO_MODEL, Settings, SettingsError
from worker.engine.echo_tokenizer import tokenizer_json

_QUESTION = "The capital of France is"
_NO_START_AFTER_S = 4.0
"""A slow one gets fewer requests, not more time."""
_SEEDS_A_LOAD = 1000


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        names: of contenders; empty: the usual ones.
        loads: each on all of them. rounds: how often.
        twice: whether each is started twice, and the second start timed.
        out: folder for the results; None: only print.
    """

    setting: Setting
    names: tuple[str, ...]
    loads: tuple[Load, ...]
    rounds: int
    twice: bool
    out: Path | None


class Bench:
    """One run: all contenders up at the same time, asked in turns."""

    def __init__(self, plan: Plan, screen: Screen, server: str) -> None:
        self._plan = plan
        self._screen = screen
        self._running: dict[str, Subject] = {}
        model = plan.setting.model
        self.report = EngineReport(
            machine.describe(server),
            model.name if model else plan.setting.engine,
            plan.rounds,
            http={each.name: each.http for each in contenders(plan.setting)},
        )
        self._tokenizer = Path(model, "tokenizer.json").read_text() if model else tokenizer_json()

    def run(self) -> None:
        """Measures everything.

        Raises:
            BenchError: there is nobody to measure.
        """
        chosen = self._chosen()
        if model := self._plan.setting.model:
            self.report.shape = limits.Shape.of(model)
        try:
            for contender in chosen:
                self._start(contender)
            for group in _groups(self._plan.loads):
                if self.report.shape:
                    # Again and again: on a shared machine the matrix units are now fast, now slow.
                    self.report.limit = limits.measure().or_better(self.report.limit)
                for number in range(self._plan.rounds):
                    for index, load in group:
                        # The same for all, and never again: engines remember prompts.
                        seed = index * _SEEDS_A_LOAD + number
                        for contender in chosen:
                            self._measure(contender, load, Prompts(self._tokenizer, seed))
        finally:
            for subject in self._running.values():
                subject.stop()
        if not self.report.rounds:
            raise BenchError("nothing was measured")

    def _chosen(self) -> list[Contender]:
        all_of_them = list(contenders(self._plan.setting))
        names = self._plan.names
        known = [each.name for each in all_of_them]
        if unknown := [name for name in names if name not in known]:
            raise BenchError(f"--only: {unknown[0]} is none of {', '.join(known)}")
        return [each for each in all_of_them if (each.name in names if names else each.usual)]

    def _start(self, contender: Contender) -> None:
        name = contender.name
        try:
            begin, versions = contender.prepare()
            self.report.versions |= versions
            if self._plan.twice:
                # The first start fills caches: of files, of compiled code.
                self._screen.step(f"{name}: first start")
                subject = begin()
                try:
                    subject.ask(_QUESTION, 12)
                finally:
                    subject.stop()
            self._screen.step(f"{name}: starting")
            began = time.perf_counter()
            subject = self._running[name] = begin()
            answer = subject.ask(_QUESTION, 12)
        except BenchError as error:
            self._gave_up(name, error)
            return
        self.report.starts[name] = Start(
            answer.first_at - began, _QUESTION + answer.text, subject.dtype
        )
        self._screen.step(
            f"{name}: first token after {answer.first_at - began:.1f} s; "
            f"it says {_QUESTION + answer.text!r}"
        )

    def _measure(self, contender: Contender, load: Load, prompts: Prompts) -> None:
        name = contender.name
        if name not in self._running or load.streams > contender.streams:
            return
        if load.temperature and not contender.samples:
            return
        try:
            figures = self._running[name].run(load, prompts)
        except BenchError as error:
            # Its trouble does not spoil the others' figures.
            self._gave_up(name, error)
            return
        self.report.rounds.setdefault((load, name), Rounds()).runs.append(figures)
        start = self.report.starts[name]
        start.memory_mb = max(start.memory_mb, self._running[name].memory_mb())
        self._screen.step(
            f"{name}, {_words(load)}: {figures.tokens_per_s:,.0f} tokens/s "
            f"({figures.tokens} tokens in {figures.seconds:.1f} s)"
        )

    def _gave_up(self, name: str, error: BenchError) -> None:
        self.report.skipped[name] = str(error).partition("\n")[0]
        self._screen.step(f"{name}: {error}")
        if (subject := self._running.pop(name, None)) is not None:
            with contextlib.suppress(BenchError):
                subject.stop()


def _groups(loads: Sequence[Load]) -> list[list[tuple[int, Load]]]:
    """Loads with their numbers; those that differ in sampling alone together, to be compared."""
    groups: dict[Load, list[tuple[int, Load]]] = {}
    for index, load in enumerate(loads):
        groups.setdefault(replace(load, temperature=0.0, top_p=1.0), []).append((index, load))
    return list(groups.values())


def _words(load: Load) -> str:
    sampled = ", sampled" if load.temperature else ""
    return f"{load.prompt_tokens}/{load.output_tokens}{sampled}, streams {load.streams}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status."""
    screen = Screen()
    # As Ctrl-C does: or what the rivals started would go on, and spoil what is measured next.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        plan = _plan(_parser().parse_args(argv), screen)
        binary, _ = find_binary()
        bench = Bench(plan, screen, str(binary))
        bench.run()
    except (BenchError, ServerError, SettingsError) as error:
        screen.text(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        screen.text("stopped")
        return 130
    page = bench.report.markdown()
    screen.text("\n" + page)
    if plan.out is not None:
        plan.out.mkdir(parents=True, exist_ok=True)
        (plan.out / "engine.json").write_text(bench.report.json() + "\n")
        try:
            plot.draw(bench.report, plan.out / "engine.svg")
            page += "\n![tokens a second by streams](engine.svg)\n"
        except ImportError:
            screen.text("no plot: pip install 'realtime-ai-serve[bench]' brings matplotlib")
        (plan.out / "engine.md").write_text(page)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds: does the benchmark work?")
    parser.add_argument("--only", help="contenders by name, comma-separated")
    parser.add_argument("--engine", default="torch", help="of ours: torch, vllm, module:Class")
    parser.add_argument("--model", type=Path, help="folder; default = the demo model")
    parser.add_argument("--big", action="store_true", help="a random model of 1B parameters")
    parser.add_argument("--gguf", type=Path, help="the same model in BF16 for llama.cpp")
    parser.add_argument("--streams", type=numbers, default=(1, 8, 32, 64), help="as in 1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=4, help="most counted ones of a stream")
    parser.add_argument("--short", action="store_true", help="no long prompts, no sampling")
    parser.add_argument("--one-start", action="store_true", help="do not time second starts")
    parser.add_argument("--out", type=Path, help="folder for engine.md, engine.json, engine.svg")
    return parser


def _plan(given: argparse.Namespace, screen: Screen) -> Plan:
    settings = Settings.load(os.environ)
    names = tuple(given.only.split(",")) if given.only else ()
    if given.quick:
        load = Load(1, 1, prompt_tokens=16, output_tokens=8, limit_s=30.0)
        setting = Setting(settings.data_dir, "echo", None, 4, 64, echo_step_ms=1.0, screen=screen)
        sampled = replace(load, temperature=0.8, top_p=0.95)
        quick = (load, replace(load, streams=4), replace(sampled, streams=4))
        return Plan(setting, names, quick, 1, twice=False, out=given.out)
    model = given.model or settings.data_dir / "models" / DEMO_MODEL
    if not model.is_dir():
        raise BenchError(f"no model at {model}: python -m realtime_serve.demo_model")
    if given.big:
        screen.step("the random model of 1B parameters is made, if it is not there (a minute)")
        model = random_llama.make(model)
    short = Load(1, given.requests, no_start_after_s=_NO_START_AFTER_S)
    loads = [replace(short, streams=n) for n in given.streams]
    if not given.short:
        long = replace(short, prompt_tokens=512, output_tokens=128, requests=1)
        loads += [replace(long, streams=n) for n in (8, 32) if n <= max(given.streams)]
        most = min(32, max(given.streams))
        loads.append(replace(short, streams=most, temperature=0.8, top_p=0.95))
    return Plan(
        Setting(
            settings.data_dir,
            given.engine,
            model,
            max(load.streams for load in loads),
            1024,
            gguf=given.gguf,
            screen=screen,
        ),
        names,
        tuple(loads),
        given.rounds,
        twice=not given.one_start,
        out=given.out or RESULTS,
    )


if __name__ == "__main__":
    sys.exit(main())
