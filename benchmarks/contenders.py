"""Who is measured against whom, and how each is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from benchmarks.cluster import Cluster
from benchmarks.engine_loop import EngineLoop
from benchmarks.figures import Figures
from benchmarks.load import Answer, Load, Prompts
from benchmarks.rivals.environments import OPENVINO
from benchmarks.rivals.openvino_export import export
from benchmarks.rivals.servers import RIVALS, Rival, RunningRival, interpreter
from realtime_serve.screen import Screen

ALONE, CLUSTER, OPENVINO_NAME = "engine alone", "cluster", "OpenVINO GenAI"
_OPENVINO_ENGINE = "benchmarks.rivals.openvino_engine:OpenVinoEngine"


class Subject(Protocol):
    """Whatever runs and can be measured.

    Attributes:
        dtype: that it computes in; "none" where it does not tell.
    """

    dtype: str

    def run(self, load: Load, prompts: Prompts) -> Figures:
        """Runs a load."""

    def ask(self, prompt: str, output_tokens: int) -> Answer:
        """One greedy answer."""

    def memory_mb(self) -> float:
        """Resident memory in MiB."""

    def stop(self) -> None:
        """Ends it."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One of those that are compared.

    Attributes:
        name: for people. http: whether it is asked over HTTP, or runs in the asking process.
        prepare: installs what is missing; gives what starts it, and versions by package.
        streams: most that it is asked for. samples: whether it is measured with sampling, too.
        usual: whether it is measured when nobody asks for it by name.
    """

    name: str
    http: bool
    prepare: Callable[[], tuple[Callable[[], Subject], dict[str, str]]]
    streams: int = 256
    samples: bool = True
    usual: bool = True


@dataclass(frozen=True, slots=True)
class Setting:
    """What all of them are started with.

    Attributes:
        data_dir: where models and the rivals' environments are. engine: of ours.
        model: its folder; None with an engine that needs none. gguf: the same for llama.cpp.
        streams: most at a time. context: most tokens of a stream.
        echo_step_ms: of the echo engine.
    """

    data_dir: Path
    engine: str
    model: Path | None
    streams: int
    context: int
    gguf: Path | None = None
    echo_step_ms: float = 0.0
    screen: Screen = field(default_factory=Screen)

    @property
    def environments(self) -> Path:
        """Where the rivals' environments are."""
        return self.data_dir / "rivals"


def contenders(setting: Setting) -> Iterator[Contender]:
    """All that there are, ours first."""
    yield Contender(ALONE, False, lambda: (partial(_alone, setting), {}))
    yield Contender(CLUSTER, True, lambda: (partial(_cluster, setting), {}))
    if setting.model is None:
        return
    for rival in RIVALS:
        yield Contender(
            rival.name,
            True,
            partial(_server, setting, rival, setting.model),
            rival.streams,
            rival.samples,
            rival.usual,
        )
    yield Contender(OPENVINO_NAME, False, partial(_openvino, setting, setting.model))


def _alone(setting: Setting) -> EngineLoop:
    return EngineLoop(
        setting.data_dir,
        engine=setting.engine,
        source=str(setting.model or ""),
        max_batch_size=max(32, setting.streams),
        echo_step_ms=setting.echo_step_ms,
    )


def _cluster(setting: Setting) -> Cluster:
    model = setting.model
    return Cluster(
        setting.data_dir,
        engine=setting.engine,
        model=f"{model.name}={model}" if model else "",
        max_batch_size=max(32, setting.streams),
        echo_step_ms=setting.echo_step_ms,
    )


def _server(
    setting: Setting, rival: Rival, model: Path
) -> tuple[Callable[[], Subject], dict[str, str]]:
    python = interpreter(rival, setting.environments, setting.gguf, setting.screen)
    versions = rival.environment.versions(python) if rival.environment else {}
    source = model if python else (setting.gguf or model)

    def start() -> Subject:
        return RunningRival(rival, python, source, streams=setting.streams, context=setting.context)

    return start, versions


def _openvino(setting: Setting, model: Path) -> tuple[Callable[[], Subject], dict[str, str]]:
    python = OPENVINO.python(setting.environments, setting.screen)
    folder = setting.environments / OPENVINO.name / "models" / model.name
    setting.screen.step(f"{OPENVINO_NAME}: converts the model to {folder}, once")
    source = export(python, model, folder)

    def start() -> Subject:
        return EngineLoop(
            setting.data_dir,
            engine=_OPENVINO_ENGINE,
            source=str(source),
            max_batch_size=max(32, setting.streams),
            python=python,
        )

    return start, OPENVINO.versions(python)
