"""The checks of docker-compose.yml and deploy/k8s whether control is alive, made on a real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from realtime_serve.lifeline import Lifeline

ROOT = Path(__file__).parents[2]
NO_REDIS = "redis://127.0.0.1:1/0"
ALL = {"compose", "kubernetes"}


def commands(file: Path) -> dict[str, list[str]]:
    """The checks, by who makes them, of a file in place of the one that they name."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["control"]
    kind, check = compose["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    named = {"compose": (compose["environment"], ["sh", "-c", check.replace("$$", "$")])}
    manifest = next(yaml.safe_load_all((ROOT / "deploy/k8s/base/control.yaml").read_text()))
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    env = {each["name"]: each.get("value") for each in container["env"]}
    named["kubernetes"] = (env, container["livenessProbe"]["exec"]["command"])
    found = {}
    for who, (variables, command) in named.items():
        path = variables["RTS_HEARTBEAT_FILE"]
        assert path in command[-1]
        found[who] = [*command[:-1], command[-1].replace(path, str(file))]
    return found


def say(file: Path) -> set[str]:
    """Who says that it is alive."""
    return {
        who
        for who, command in commands(file).items()
        if subprocess.run(command, capture_output=True, check=False).returncode == 0
    }


@contextmanager
def control(file: Path) -> Iterator[subprocess.Popen[str]]:
    """A control process that has no Redis."""
    env = {**os.environ, "RTS_REDIS_URL": NO_REDIS, "RTS_HEARTBEAT_FILE": str(file)}
    with Lifeline() as lifeline:
        command = [sys.executable, "-m", "realtime_serve.cli", "control"]
        process = subprocess.Popen(
            lifeline.command(command),
            pass_fds=lifeline.fds,
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def wait_until_alive(file: Path) -> None:
    deadline = time.monotonic() + 30
    while say(file) != ALL:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def make_old(file: Path) -> None:
    then = time.time() - 31
    os.utime(file, (then, then))


def test_a_loop_that_turns_is_alive_and_one_that_stands_is_not(tmp_path: Path) -> None:
    file = tmp_path / "heartbeat"
    assert say(file) == set()
    with control(file) as process:
        wait_until_alive(file)
        # Without Redis, too; a new process would not bring that back.
        make_old(file)
        wait_until_alive(file)
        process.send_signal(signal.SIGSTOP)
        try:
            # The signal takes effect while another process runs.
            time.sleep(0.2)
            make_old(file)
            time.sleep(2.5)
            assert say(file) == set()
        finally:
            process.send_signal(signal.SIGCONT)
        wait_until_alive(file)
        process.terminate()
        assert process.wait(20) == 0


def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with control(tmp_path / "none" / "heartbeat") as process:
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "RTS_HEARTBEAT_FILE cannot be written" in output
    assert "Traceback" not in output
