"""scripts/bootstrap.sh on machines that lack something: one clear sentence, nothing half done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
TOOLS = [
    "sh",
    "cat",
    "cksum",
    "cut",
    "date",
    "dirname",
    "du",
    "grep",
    "kill",
    "mkdir",
    "rm",
    "sed",
    "sleep",
    "tail",
    "uname",
]


class Machine:
    """A clone of the project on a machine that has only the programs in its bin folder."""

    def __init__(self, folder: Path) -> None:
        self.clone = folder / "clone"
        self.bin = folder / "bin"
        (self.clone / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("scripts/bootstrap.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, self.clone / name)
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)

    def program(self, name: str, script: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!{shutil.which('sh')}\n{script}\n")
        path.chmod(0o755)

    def bootstrap(self, **env: str) -> tuple[int, str]:
        done = subprocess.run(
            ["sh", "scripts/bootstrap.sh", "cluster"],
            cwd=self.clone,
            env={"PATH": str(self.bin), "HOME": str(self.clone), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_no_python(machine: Machine) -> None:
    status, output = machine.bootstrap()
    assert status == 1
    assert output == "error: Python 3.11 or newer is needed; found none\n"


def test_old_python(machine: Machine) -> None:
    machine.program("python3", '[ "$1" = --version ] && echo Python 3.9.2 || exit 1')
    status, output = machine.bootstrap()
    assert status == 1
    assert output == "error: Python 3.11 or newer is needed; found Python 3.9.2\n"


def test_no_venv_module(machine: Machine) -> None:
    real = os.path.realpath(sys.executable)
    without = f'case "$*" in *ensurepip*) exit 1;; esac; exec {real} "$@"'
    machine.program("python3", "exit 1")
    machine.program("python3.12", without)
    status, output = machine.bootstrap()
    version = ".".join(map(str, sys.version_info[:2]))
    assert status == 1
    assert output == f"error: Python's venv module is missing: apt install python{version}-venv\n"


def test_windows(machine: Machine) -> None:
    machine.program("uname", "echo MINGW64_NT-10.0")
    status, output = machine.bootstrap()
    assert status == 1
    assert output == "error: Linux or macOS is needed; on Windows use WSL2\n"


def test_no_network_then_done_then_nothing_to_do(machine: Machine) -> None:
    (machine.bin / "python3").symlink_to(os.path.realpath(sys.executable))
    # Nobody listens on port 9 of this machine: that is what no network looks like to pip.
    no_network = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    status, output = machine.bootstrap(**no_network)
    assert status == 1
    assert output.splitlines()[-1] == (
        "error: pip cannot reach the package index: is there a network? Details: .venv/install.log"
    )
    assert not (machine.clone / ".venv" / ".installed-cluster").exists()
    # A pip that installs everything at once; the rest of the script is as it is.
    pip = machine.clone / ".venv" / "pip_calls"
    fake = f'import sys; open({str(pip)!r}, "a").write(" ".join(sys.argv[1:]) + chr(10))'
    for package in (machine.clone / ".venv").glob("lib/python*/site-packages/pip"):
        (package / "__main__.py").write_text(fake)
    status, output = machine.bootstrap()
    assert (status, output.count("done in")) == (0, 2)
    torch, project = pip.read_text().splitlines()
    assert torch.endswith("torch==2.13.0")
    assert project.endswith("--editable .[cluster]")
    assert machine.bootstrap() == (0, "")
    with (machine.clone / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert machine.bootstrap()[1].count("done in") == 2
