"""`make docker-test`: the images and docker-compose.yml on a real Docker engine.

Builds the images, brings the stack up, streams through its load balancer with the official client,
restarts control, workers, gateways and Redis under 100 streams, none of which may break, and takes
it all down. Says so,
and does nothing, where there is no engine. Settings, as environment variables: COMPOSE (the
command, `docker compose`), DOCKER_BUILD_ARGS (further arguments of `docker build`, where package
indexes need some).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from cluster import free_port
from openai import OpenAI

from realtime_serve import Client

ROOT = Path(__file__).parents[2]
IMAGES = ("redis:7.2-bookworm", "haproxy:2.8-bookworm", "prom/prometheus:v3.5.0")
BASE = "python:3.11-slim-bookworm"
# Grafana computes nothing of its own; its queries have a test, tests/deploy/test_monitoring.py.
SERVICES = ("redis", "gateway", "haproxy", "worker", "control", "prometheus")
STREAMS = 100
TOKENS = 100
WORKERS = 2


class Stack:
    """The compose project, under a name and ports of its own, with the echo engine."""

    def __init__(self) -> None:
        self.port = free_port()
        self._compose = shlex.split(os.environ.get("COMPOSE", "docker compose"))
        self._env = {key: value for key, value in os.environ.items() if key[:4] != "RTS_"} | {
            "COMPOSE_PROJECT_NAME": "rts-docker-test",
            "PORT": str(self.port),
            "PROMETHEUS_PORT": str(free_port()),
            "TAG": "docker-test",
            "RTS_ENGINE": "echo",
            "RTS_ECHO_STEP_MS": "30",
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def compose(self, *words: str) -> str:
        command = [*self._compose, "--ansi", "never", *words]
        done = subprocess.run(
            command, cwd=ROOT, env=self._env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
        return done.stdout

    def up(self, *words: str) -> None:
        self.compose("up", "--detach", "--no-build", "--wait", *words, *SERVICES)

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "--quiet", service).split()

    def restart(self, container: str) -> None:
        """Stops one as an upgrade does, starts it again, and waits until it is healthy."""
        docker("stop", "--time", "60", container)
        docker("start", container)
        deadline = time.monotonic() + 60
        while (state := _state(container)) not in ("running", "running healthy"):
            assert time.monotonic() < deadline, f"{container}: {state}"
            time.sleep(0.25)

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            self.up("--scale", f"worker={WORKERS}")
            yield
        except BaseException:
            print(self.compose("logs", "--tail", "30"))
            raise
        finally:
            self.compose("down", "--volumes", "--timeout", "60")


def docker(*words: str) -> str:
    done = subprocess.run(["docker", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"docker {shlex.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def _state(container: str) -> str:
    wanted = "{{.State.Status}}{{if .State.Health}} {{.State.Health.Status}}{{end}}"
    return docker("inspect", "--format", wanted, container)


def build() -> None:
    """The two images, and what they and the stack are made of where it cannot be pulled."""
    subprocess.run([str(ROOT / "tests/docker/stand_ins.sh"), BASE, *IMAGES], check=True)
    os.environ["DOCKER_BUILDKIT"] = "1"
    for target in ("gateway", "worker"):
        name = f"realtime-ai-serve-{target}:docker-test"
        more = shlex.split(os.environ.get("DOCKER_BUILD_ARGS", ""))
        file = ("--file", "deploy/docker/Dockerfile", "--target", target)
        docker("build", "--quiet", *more, *file, "--tag", name, ".")
        size = int(docker("image", "inspect", "--format", "{{.Size}}", name))
        base = int(docker("image", "inspect", "--format", "{{.Size}}", BASE))
        print(f"{name}: {size // 10**6} MB, {(size - base) // 10**6} MB of them on top of its base")


class Load:
    """Streams that follow each other, a hundred at once, until told to end."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(STREAMS)
        self.complete = [0, 0]
        self.broken: list[str] = []
        self._tasks: list[Future[None]] = [
            self._pool.submit(self._plain if index % 2 else self._resumable)
            for index in range(STREAMS)
        ]

    def _plain(self) -> None:
        with OpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=5) as client:
            while not self._end.is_set():
                try:
                    found = list(
                        client.completions.create(
                            model="echo", prompt="a", max_tokens=TOKENS, seed=1, stream=True
                        )
                    )
                    reasons = [each.choices[0].finish_reason for each in found if each.choices]
                    text = "".join(each.choices[0].text for each in found if each.choices)
                    self._check("plain", text, reasons[-1:] == ["length"])
                except Exception as error:
                    self.broken.append(f"plain: {error!r}")

    def _resumable(self) -> None:
        with Client(self._url) as client:
            while not self._end.is_set():
                try:
                    stream = client.stream("a", model="echo", max_tokens=TOKENS, seed=1)
                    text = "".join(token.text for token in stream)
                    self._check("resumable", text, stream.answer.finish_reason == "length")
                except Exception as error:
                    self.broken.append(f"resumable: {error!r}")

    def _check(self, kind: str, text: str, ended: bool) -> None:
        """The echo engine's tokens follow from the seed: all texts are one."""
        self.expected = getattr(self, "expected", text)
        if ended and text == self.expected:
            self.complete[kind == "plain"] += 1
        else:
            self.broken.append(f"{kind}: {len(text)} characters of {len(self.expected)}, {ended=}")

    def stop(self) -> None:
        self._end.set()
        for task in self._tasks:
            task.result(120)
        self._pool.shutdown()


def main() -> int:
    """Runs it all; the exit status."""
    if (
        not shutil.which("docker")
        or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        print("SKIPPED: docker-test needs a Docker engine, and `docker info` finds none")
        return 0
    build()
    stack = Stack()
    with stack.running():
        print("up and healthy")
        with urllib.request.urlopen(f"{stack.url}/models", timeout=5) as reply:
            assert b"echo" in reply.read()
        load = Load(stack.url)
        time.sleep(3)
        for service in ("control", "worker", "gateway", "redis"):
            for container in stack.containers(service):
                began = time.monotonic()
                stack.restart(container)
                print(f"restarted one {service} in {time.monotonic() - began:.1f} s", flush=True)
                time.sleep(3)
        load.stop()
        resumable, plain = load.complete
        print(
            f"{plain} plain and {resumable} resumable streams complete, {len(load.broken)} broken"
        )
        for line in load.broken[:10]:
            print(f"  {line}")
        stack.up("--scale", "worker=3", "--scale", "gateway=4")
        assert len(stack.containers("gateway")) == 4
        assert len(stack.containers("worker")) == 3
        print("scaled to 4 gateways and 3 workers")
    print("down")
    return bool(load.broken) or not (plain and resumable)


if __name__ == "__main__":
    sys.exit(main())
