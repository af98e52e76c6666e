"""Rivals that serve over HTTP: how each is started, and what its requests look like."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.figures import BenchError, Figures
from benchmarks.load import Answer, Load, Prompts, Target, ask, run_load
from benchmarks.rivals.environments import (
    LITSERVE,
    TRANSFORMERS,
    VLLM,
    Environment,
    NotInstalled,
)
from benchmarks.server import HOST, Server, cpu_s, free_port, get, memory_mb
from realtime_serve.screen import Screen
from worker.engine.loader import dtype_for

_START_S = 600.0
_LITSERVE = str(Path(__file__).with_name("litserve_server.py"))
_LLAMA_SERVER = "llama-server"


@dataclass(frozen=True, slots=True)
class Rival:
    """One way to run another server.

    Attributes:
        name: for people. environment: what it runs in; None: a program of this machine.
        command: after the interpreter; {model}, {port}, {streams}, {context} and {dtype} are
            filled in.
        path: of its endpoint. health: page that answers 200 when it is ready.
        fields: of its requests, for a load. names_model: whether they name the model by its folder.
        env: environment variables; {prefix} is the environment's folder, {cores} as in 0-1.
        streams: most streams it is asked to serve; one that serves serially would take minutes.
        samples: whether it can be asked for temperature and top_p.
        usual: whether it is measured when nobody asks for it by name.
        dtype: that it is told to compute in; "" for bfloat16 where torch has instructions for it.
    """

    name: str
    environment: Environment | None
    command: tuple[str, ...]
    path: str
    health: str
    fields: Callable[[Load], Mapping[str, Any]]
    names_model: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    streams: int = 256
    samples: bool = True
    usual: bool = True
    dtype: str = ""


def _transformers_fields(load: Load) -> dict[str, Any]:
    # -1 is no token: the counterpart of ignore_eos.
    config: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    if load.temperature:
        config |= {"do_sample": True, "temperature": load.temperature, "top_p": load.top_p}
    return {"stream": True, "generation_config": json.dumps(config)}


def _openai_fields(load: Load) -> dict[str, Any]:
    return {
        "stream": True,
        "temperature": load.temperature,
        "top_p": load.top_p,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }


def _transformers(name: str, *flags: str, streams: int, usual: bool) -> Rival:
    return Rival(
        name,
        TRANSFORMERS,
        (
            *("-m", "transformers.cli.transformers", "serve", "{model}", "--host", HOST),
            *("--port", "{port}", "--dtype", "{dtype}", "--log-level", "error", *flags),
        ),
        "/v1/completions",
        "/health",
        _transformers_fields,
        names_model=True,
        streams=streams,
        usual=usual,
    )


def _litserve(name: str, batch: int, *, streams: int) -> Rival:
    return Rival(
        name,
        LITSERVE,
        (_LITSERVE, "{model}", "{port}", str(batch), "{dtype}"),
        "/predict",
        "/health",
        lambda load: {},
        streams=streams,
        samples=False,
        usual=False,
    )


def _vllm(name: str, *, dtype: str = "", usual: bool = True) -> Rival:
    return Rival(
        name,
        VLLM,
        (
            *("-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--host", HOST),
            *("--port", "{port}", "--dtype", "{dtype}"),
        ),
        "/v1/completions",
        "/health",
        _openai_fields,
        names_model=True,
        # The fastest that we know of on two cores: 1.3 times the tokens of the defaults. Releases
        # that do not know VLLM_CPU_SGL_KERNEL say so and ignore it.
        env={
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_OMP_THREADS_BIND": "{cores}",
            "VLLM_CPU_SGL_KERNEL": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "LD_PRELOAD": "{prefix}/lib/libiomp5.so",
            "VLLM_NO_USAGE_STATS": "1",
        },
        usual=usual,
        dtype=dtype,
    )


RIVALS = (
    _vllm("vLLM"),
    # Without instructions for it: as fast with one stream, at a third of the speed with eight.
    _vllm("vLLM in bfloat16", dtype="bfloat16", usual=False),
    _transformers(
        "transformers serve --continuous-batching",
        "--continuous-batching",
        # More make it slower, and would take a third of the whole benchmark's time.
        streams=32,
        usual=True,
    ),
    Rival(
        "llama.cpp",
        None,
        (
            *(_LLAMA_SERVER, "--model", "{model}", "--host", HOST, "--port", "{port}"),
            *("--parallel", "{streams}", "--ctx-size", "{context}", "--no-webui"),
            *("--no-repack", "--log-disable"),
        ),
        "/v1/completions",
        "/health",
        _openai_fields,
        streams=32,
    ),
    _transformers("transformers serve", streams=8, usual=False),
    _litserve("LitServe", 1, streams=8),
    _litserve("LitServe, batches of up to 32", 32, streams=64),
)


def interpreter(rival: Rival, root: Path, gguf: Path | None, screen: Screen) -> str:
    """The interpreter that runs a rival, installed if need be; "" for a program of this machine.

    Raises:
        NotInstalled: it is not here and cannot be had.
    """
    if rival.environment is not None:
        return rival.environment.python(root, screen)
    if shutil.which(_LLAMA_SERVER) is None:
        raise NotInstalled(f"not installed: there is no {_LLAMA_SERVER} on the PATH")
    if gguf is None:
        raise NotInstalled("not measured: it needs the model as a BF16 GGUF file, --gguf FILE")
    return ""


class RunningRival:
    """A rival that serves.

    Args:
        rival: which. python: of its environment, "" for none. model: folder or GGUF file.
        streams: most at a time. context: tokens of each.
    """

    def __init__(
        self, rival: Rival, python: str, model: Path, *, streams: int = 64, context: int = 1024
    ) -> None:
        self._rival = rival
        self._model = model
        port = free_port()
        dtype = rival.dtype or dtype_for("auto")
        self.dtype = dtype if "{dtype}" in rival.command else "none"
        filled = {
            "model": str(model),
            "port": str(port),
            "streams": str(min(streams, rival.streams)),
            "context": str(min(streams, rival.streams) * context),
            "prefix": str(Path(python).parents[1]) if python else "",
            "cores": _cores(),
            "dtype": dtype,
        }
        command = [word.format(**filled) for word in rival.command]
        # Nothing of it is to be fetched while it is measured.
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        env |= {name: value.format(**filled) for name, value in rival.env.items()}
        # Away from here, so that it cannot import what this project calls the same.
        folder = Path(tempfile.gettempdir())
        self._server = Server([python, *command] if python else command, env, port, folder)
        try:
            self._server.wait(lambda: get(port, rival.health)[0] == 200, _START_S)
        except BaseException:
            self.stop()
            raise

    def run(self, load: Load, prompts: Prompts) -> Figures:
        """Runs a load.

        Raises:
            BenchError: a request failed.
        """
        try:
            return run_load(self._target(load), load, prompts, self.read_cpu)
        except BenchError as error:
            raise BenchError(f"{error}\nIts log:\n{self._server.log_tail()}") from error

    def ask(self, prompt: str, output_tokens: int) -> Answer:
        """One greedy answer.

        Raises:
            BenchError: it gave none.
        """
        return ask(self._target(Load(1, 1)), prompt, output_tokens)

    def read_cpu(self) -> dict[str, float]:
        """CPU time so far of all its processes together."""
        return {"rival": sum(map(cpu_s, self._server.family()))}

    def memory_mb(self) -> float:
        """Resident memory of all its processes, in MiB."""
        return memory_mb(self._server.family())

    def stop(self) -> None:
        """Stops it."""
        self._server.stop()

    def _target(self, load: Load) -> Target:
        named = {"model": str(self._model)} if self._rival.names_model else {}
        fields = {**self._rival.fields(load), **named}
        return Target(HOST, self._server.port, self._rival.path, fields)


def _cores() -> str:
    """Those that this process may use, as vLLM wants them: 0-1."""
    allowed = getattr(os, "sched_getaffinity", None)
    cores = sorted(allowed(0)) if allowed else range(os.cpu_count() or 1)
    return f"{cores[0]}-{cores[-1]}"
