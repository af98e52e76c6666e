"""Our own cluster under test: `realtime-serve up` with a data folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import BenchError, Figures
from benchmarks.load import Answer, Load, Prompts, Target, ask, run_load
from benchmarks.server import HOST, Server, cpu_s, free_port, get, main_thread_cpu_s, memory_mb
from shared.settings import ENV_PREFIX, Settings

_START_S = 300.0
_ROLES = ("gateway", "worker", "control")
_KEPT = ("native", "recipes")
"""Folders of what one start leaves for the next, as in a cluster that is started again."""
_ROOT = Path(__file__).parents[1]


class Cluster:
    """Server, control, worker and gateway, as `up` starts them.

    Args:
        data_dir: where a folder for this cluster's own server is made, and removed at the end.
        **settings: of the cluster.

    Attributes:
        started_s: how long the start took. dtype: of its worker, as in EngineInfo.
    """

    dtype = "none"

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="bench-", dir=data_dir))
        self._settings = Settings(
            port=free_port(),
            data_dir=self._folder,
            drain_grace_s=2.0,
            log_level="warning",
            **settings,
        )
        if self._settings.engine == "torch":
            self._share(data_dir)
        foreign = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)}
        argv = [sys.executable, "-m", "realtime_serve.cli", "up"]
        env = foreign | self._settings.to_env()
        self._server = Server(argv, env, self._settings.port, _ROOT)
        try:
            self.started_s = self._server.wait(self._is_ready, _START_S)
            self._roles = self._find_roles()
        except BaseException:
            self.stop()
            raise

    def run(self, load: Load, prompts: Prompts) -> Figures:
        """Runs a load, to the full length.

        Raises:
            BenchError: a request failed.
        """
        try:
            return run_load(self._target(load), load, prompts, self.read_cpu)
        except BenchError as error:
            raise BenchError(f"{error}\nThe cluster's log:\n{self._server.log_tail()}") from error

    def ask(self, prompt: str, output_tokens: int) -> Answer:
        """One greedy answer.

        Raises:
            BenchError: it gave none.
        """
        return ask(self._target(Load(1, 1)), prompt, output_tokens)

    def memory_mb(self) -> float:
        """Resident memory of all its processes, in MiB."""
        return memory_mb(self._server.family())

    @property
    def url(self) -> str:
        """Of its gateway."""
        return f"http://{HOST}:{self._settings.port}"

    def role_memory(self, role: str) -> int:
        """Resident memory of one of its processes, in bytes."""
        return int(self._roles[role].memory_info().rss)

    def read_cpu(self) -> dict[str, float]:
        """CPU time so far by process; the worker's event loop and its engine thread(s) apart."""
        found = {role: cpu_s(process) for role, process in self._roles.items()}
        loop = main_thread_cpu_s(self._roles["worker"])
        return {
            "server": found["server"],
            "gateway": found["gateway"],
            "worker loop": loop,
            "worker engine": found["worker"] - loop,
            "control": found["control"],
        }

    def stop(self) -> None:
        """Stops it and removes its data."""
        self._server.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _share(self, data_dir: Path) -> None:
        for name in _KEPT:
            (data_dir / name).mkdir(exist_ok=True)
            (self._folder / name).symlink_to(data_dir / name)

    def _target(self, load: Load) -> Target:
        fields = {
            "model": self._settings.models()[0].name,
            "stream": True,
            "temperature": load.temperature,
            "top_p": load.top_p,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        return Target(HOST, self._settings.port, "/v1/completions", fields)

    def _is_ready(self) -> bool:
        if get(self._settings.port, "/readyz")[0] != 200:
            return False
        status, body = get(self._settings.port, "/status")
        workers = json.loads(body)["workers"] if status == 200 else []
        if workers:
            self.dtype = workers[0]["dtype"]
        return bool(workers)

    def _find_roles(self) -> dict[str, psutil.Process]:
        roles = {}
        for process in self._server.family()[1:]:
            words = process.cmdline()
            role = next((role for role in _ROLES if role in words), "server")
            roles[role] = process
        return roles

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
