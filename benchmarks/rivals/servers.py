"""Which rivals there are, how each is started, and what its requests look like."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.figures import Figures
from benchmarks.load import Load, Prompts, Target, run_load
from benchmarks.server import HOST, Server, cpu_s, free_port, get

_START_S = 180.0
_LITSERVE = str(Path(__file__).with_name("litserve_server.py"))
_LITSERVE_INSTALL = "pip install torch==2.13.0 transformers==5.23.0 litserve==0.2.19"
_TRANSFORMERS_INSTALL = "pip install torch==2.13.0 'transformers[serving]==5.23.0'"
# -1 is no token: the counterpart of ignore_eos.
_GREEDY = json.dumps({"do_sample": False, "eos_token_id": -1, "pad_token_id": 0})
_TRANSFORMERS_FIELDS = {"stream": True, "generation_config": _GREEDY}


@dataclass(frozen=True, slots=True)
class Rival:
    """One way to run another server.

    Attributes:
        name: for people.
        needs: modules without which it cannot run. install: how to get them.
        command: after the interpreter; {model} and {port} are filled in.
        path: of its endpoint. health: page that answers 200 when it is ready.
        fields: of its requests. names_model: whether they name the model by its folder.
        streams: most streams it is asked to serve; one that serves serially would take minutes.
    """

    name: str
    needs: tuple[str, ...]
    install: str
    command: tuple[str, ...]
    path: str
    health: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    names_model: bool = False
    streams: int = 256


def _transformers(name: str, *flags: str, streams: int) -> Rival:
    return Rival(
        name,
        ("transformers", "fastapi", "uvicorn", "openai"),
        _TRANSFORMERS_INSTALL,
        (
            *("-m", "transformers.cli.transformers", "serve", "{model}", "--host", HOST),
            *("--port", "{port}", "--dtype", "bfloat16", "--log-level", "error", *flags),
        ),
        "/v1/completions",
        "/health",
        _TRANSFORMERS_FIELDS,
        names_model=True,
        streams=streams,
    )


def _litserve(name: str, batch: int, *, streams: int) -> Rival:
    return Rival(
        name,
        ("litserve", "torch", "transformers"),
        _LITSERVE_INSTALL,
        (_LITSERVE, "{model}", "{port}", str(batch)),
        "/predict",
        "/health",
        streams=streams,
    )


RIVALS = (
    _transformers("transformers serve", streams=8),
    _transformers("transformers serve --continuous-batching", "--continuous-batching", streams=64),
    _litserve("LitServe", 1, streams=8),
    _litserve("LitServe, batches of up to 32", 32, streams=64),
)


def installed(rival: Rival, python: str) -> bool:
    """Whether an interpreter has what the rival needs."""
    code = f"import importlib.util as u; assert all(map(u.find_spec, {rival.needs!r}))"
    asked = subprocess.run([python, "-c", code], capture_output=True, timeout=60, check=False)
    return asked.returncode == 0


class RunningRival:
    """A rival that serves.

    Args:
        rival: which. python: of its environment. model: the folder.

    Attributes:
        started_s: how long the start took.
    """

    def __init__(self, rival: Rival, python: str, model: Path) -> None:
        self._rival = rival
        self._model = model
        port = free_port()
        command = [word.format(model=model, port=port) for word in rival.command]
        # Nothing of it is to be fetched while it is measured.
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # Away from here, so that it cannot import what this project calls the same.
        folder = Path(tempfile.gettempdir())
        self._server = Server([python or sys.executable, *command], env, port, folder)
        try:
            self.started_s = self._server.wait(lambda: get(port, rival.health)[0] == 200, _START_S)
        except BaseException:
            self.stop()
            raise

    def run(self, load: Load, prompts: Prompts) -> Figures:
        """Runs a load.

        Raises:
            BenchError: a request failed.
        """
        named = {"model": str(self._model)} if self._rival.names_model else {}
        fields = {**self._rival.fields, **named}
        target = Target(HOST, self._server.port, self._rival.path, fields)
        return run_load(target, load, prompts, self.read_cpu)

    def read_cpu(self) -> dict[str, float]:
        """CPU time so far of all its processes together."""
        return {"rival": sum(map(cpu_s, self._server.family()))}

    def stop(self) -> None:
        """Stops it."""
        self._server.stop()

    def __enter__(self) -> RunningRival:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
