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


NEEDED = "Python 3.11, 3.12, 3.13 or 3.14 is needed"


def test_no_python(machine: Machine) -> None:
    status, output = machine.bootstrap()
    assert status == 1
    assert output == f"error: {NEEDED}; found none\n"


@pytest.mark.parametrize("version", ["3.9.2", "3.15.0"])
def test_a_python_that_is_too_old_or_too_new(machine: Machine, version: str) -> None:
    machine.program("python3", '[ "$1" = --version ] && echo Python ' + version + " || exit 1")
    status, output = machine.bootstrap()
    assert status == 1
    assert output == f"error: {NEEDED}; found Python {version}\n"


def test_the_range_of_versions_is_asked_for(machine: Machine) -> None:
    """A newer python3 is passed over for one that works and is called by its number."""
    real = os.path.realpath(sys.executable)
    newer = f"""
case "$2" in *version_info*) exec {real} -c "
import sys; sys.version_info = (3, 15, 0); exec(sys.argv[1])" "$2";; esac
echo Python 3.15.0"""
    machine.program("python3", newer)
    status, output = machine.bootstrap()
    assert (status, output) == (1, f"error: {NEEDED}; found Python 3.15.0\n")
    machine.program("python3.12", f'case "$*" in *ensurepip*) exit 1;; esac; exec {real} "$@"')
    assert "venv module is missing" in machine.bootstrap()[1]


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
    machine.program("uname", "echo Linux")
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
    assert "2.5 GB" in output
    assert output.index("PIP_EXTRA_INDEX_URL") < output.index("installing torch")
    torch, project = pip.read_text().splitlines()
    assert torch.endswith("torch==2.13.0")
    assert project.endswith("--editable .[cluster]")
    assert machine.bootstrap() == (0, "")
    with (machine.clone / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert machine.bootstrap()[1].count("done in") == 2
