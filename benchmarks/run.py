"""What the cluster costs: the engine alone, the cluster over HTTP, the transport, in one run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from benchmarks import machine
from benchmarks.cluster import Cluster
from benchmarks.engine_loop import EngineLoop
from benchmarks.figures import BenchError, Figures, Rounds
from benchmarks.load import Load, Prompts
from benchmarks.report import Report
from realtime_serve.redis_server import ServerError, find_binary
from realtime_serve.screen import Screen
from shared.settings import DEMO_MODEL, Settings, SettingsError
from worker.engine.echo_tokenizer import tokenizer_json

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        parts: of cluster, transport.
        engine, model: of the first part; the model's folder.
        streams: how many at a time. rounds: how often each. load: of one stream.
        transport: pairs of the echo engine's step in ms and streams. transport_load: of one stream.
        out: folder for the results; None: only print.
    """

    parts: tuple[str, ...]
    engine: str
    model: str
    data_dir: Path
    streams: tuple[int, ...]
    rounds: int
    load: Load
    transport: tuple[tuple[float, int], ...]
    transport_load: Load
    out: Path | None
    echo_step_ms: float = 10.0

    @property
    def model_name(self) -> str:
        """The last part of the folder: reports name no places."""
        return Path(self.model).name


PARTS = ("cluster", "transport")


class Subject(Protocol):
    """Whatever a load can be run on."""

    def run(self, load: Load, prompts: Prompts) -> Figures:
        """Runs it."""


class Bench:
    """One run: measures what the plan says, and tells the screen how it goes."""

    def __init__(self, plan: Plan, screen: Screen, server: str) -> None:
        self._plan = plan
        self._screen = screen
        self.report = Report(machine.describe(server), "", self._words())

    def run(self) -> None:
        """Measures everything.

        Raises:
            BenchError: something failed; figures of a run with errors are worth nothing.
        """
        if "cluster" in self._plan.parts:
            self._alone_and_cluster()
        if "transport" in self._plan.parts:
            self._transport()

    def _alone_and_cluster(self) -> None:
        plan, report = self._plan, self.report
        size = max(32, *plan.streams)
        named = f"{plan.model_name}={plan.model}" if plan.model else ""
        self._screen.step(f"starting the engine alone: {plan.engine} {plan.model_name}".rstrip())
        with ExitStack() as stack:
            alone = EngineLoop(
                plan.data_dir,
                engine=plan.engine,
                source=plan.model,
                max_batch_size=size,
                echo_step_ms=plan.echo_step_ms,
            )
            stack.enter_context(alone)
            info = alone.info
            report.model = f"Engine {info['name']} on {info['device']} ({info['dtype']})" + (
                f", model {plan.model_name}." if plan.model else "."
            )
            report.starts_s["engine alone"] = info["load_s"] + info["warm_up_s"]
            self._screen.step("starting the cluster")
            cluster = Cluster(
                plan.data_dir,
                engine=plan.engine,
                model=named,
                max_batch_size=size,
                echo_step_ms=plan.echo_step_ms,
            )
            stack.enter_context(cluster)
            report.starts_s["cluster"] = cluster.started_s
            for streams in plan.streams:
                load = replace(plan.load, streams=streams)
                report.alone[streams], report.cluster[streams] = Rounds(), Rounds()
                for number in range(plan.rounds):
                    prompts = Prompts(info["tokenizer"], _seed(streams, number))
                    self._measure(report.alone[streams], "engine alone", alone, load, prompts)
                    self._measure(report.cluster[streams], "cluster", cluster, load, prompts)

    def _transport(self) -> None:
        plan = self._plan
        for step_ms in dict.fromkeys(step for step, _ in plan.transport):
            what = f"echo engine, {step_ms:g} ms a step"
            self._screen.step(f"starting a cluster: {what}")
            options = {"engine": "echo", "echo_step_ms": step_ms, "max_batch_size": 256}
            with Cluster(plan.data_dir, **options) as cluster:
                for streams in [n for step, n in plan.transport if step == step_ms]:
                    load = replace(plan.transport_load, streams=streams)
                    rounds = self.report.transport[step_ms, streams] = Rounds()
                    for number in range(plan.rounds):
                        prompts = Prompts(tokenizer_json(), _seed(streams, number))
                        self._measure(rounds, what, cluster, load, prompts)

    def _measure(
        self, rounds: Rounds, what: str, subject: Subject, load: Load, prompts: Prompts
    ) -> None:
        figures = subject.run(load, prompts)
        rounds.runs.append(figures)
        self._screen.step(
            f"{what}, streams {load.streams}: {figures.tokens_per_s:,.0f} tokens/s "
            f"({figures.tokens} tokens in {figures.seconds:.1f} s)"
        )

    def _words(self) -> str:
        plan, load = self._plan, self._plan.load
        return (
            "Each stream is a client that sends its next request when the last has been answered: "
            f"{load.requests} after a short one to warm up, {plan.transport_load.requests} for the "
            f"transport. Prompts of {load.prompt_tokens} tokens, no two alike, "
            f"{load.output_tokens} tokens out, greedy. Rounds: {plan.rounds}."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status."""
    screen = Screen()
    try:
        plan = _plan(_parser().parse_args(argv))
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
        (plan.out / "cluster.md").write_text(page)
        (plan.out / "cluster.json").write_text(bench.report.json() + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds: does the benchmark work?")
    parser.add_argument("--only", help=f"parts, comma-separated, of {', '.join(PARTS)}")
    parser.add_argument("--engine", default="torch", help="torch, echo or package.module:Class")
    parser.add_argument("--model", default="", help="folder; empty = the demo model")
    parser.add_argument("--streams", type=numbers, default=(1, 8, 32), help="as in 1,8,32,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=3, help="counted ones of each stream")
    parser.add_argument("--out", type=Path, help="folder for cluster.md and cluster.json")
    return parser


def _plan(given: argparse.Namespace) -> Plan:
    settings = Settings.load(os.environ)
    if given.quick:
        load = Load(streams=1, requests=1, prompt_tokens=16, output_tokens=8, limit_s=30.0)
        return Plan(
            parts=_parts(given.only),
            engine="echo",
            model="",
            data_dir=settings.data_dir,
            streams=(1, 4),
            rounds=1,
            load=load,
            transport=((0.0, 8),),
            transport_load=load,
            out=given.out,
            echo_step_ms=1.0,
        )
    model = given.model or str(settings.data_dir / "models" / DEMO_MODEL)
    if given.engine == "echo":
        model = ""
    elif not Path(model).exists():
        raise BenchError(f"no model at {model}: python -m realtime_serve.demo_model")
    return Plan(
        parts=_parts(given.only),
        engine=given.engine,
        model=model,
        data_dir=settings.data_dir,
        streams=given.streams,
        rounds=given.rounds,
        load=Load(streams=1, requests=given.requests),
        transport=((0.0, 64), (0.0, 256), (20.0, 64), (20.0, 256)),
        transport_load=Load(streams=1, requests=8),
        out=given.out or RESULTS,
    )


def _parts(text: str | None) -> tuple[str, ...]:
    if text is None:
        return PARTS
    parts = tuple(text.split(","))
    if unknown := [part for part in parts if part not in PARTS]:
        raise BenchError(f"--only {text}: {unknown[0]} is none of {', '.join(PARTS)}")
    return parts


def _seed(streams: int, number: int) -> int:
    """Other prompts for every load and round: engines remember them."""
    return streams * 1000 + number


def numbers(text: str) -> tuple[int, ...]:
    """Numbers of streams from a command line.

    Raises:
        argparse.ArgumentTypeError: they are none.
    """
    found = tuple(int(part) for part in text.split(","))
    if not found or min(found) < 1 or max(found) > 256:
        raise argparse.ArgumentTypeError("numbers of streams are 1 to 256")
    return found


if __name__ == "__main__":
    sys.exit(main())
