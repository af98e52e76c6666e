"""`make docker-test`: the images and docker-compose.yml on a real Docker engine.

Builds the images, brings the stack up, streams through its load balancer with the official client,
restarts or replaces every service under 100 streams, none of which may break, shows that a gateway
that is killed does break some, has the demo model answer, and takes it all down. The Makefile says
so, and does nothing, where there is no engine. Settings, as environment variables: COMPOSE (the
command, `docker compose`), DOCKER_BUILD_ARGS (further arguments of `docker build`, where package
indexes need some), DOCKER_CUDA (anything: the image for GPUs is built as well, from 3 GB of
packages).
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from cluster import free_port
from gateway_site import letters
from openai import APIConnectionError, APITimeoutError, InternalServerError, OpenAI

from realtime_serve import Client
from shared.settings import DEMO_MODEL, Settings

ROOT = Path(__file__).parents[2]
IMAGES = {
    "PYTHON_IMAGE": "python:3.11-slim-bookworm",
    "REDIS_IMAGE": "redis:7.2-bookworm",
    "HAPROXY_IMAGE": "haproxy:2.8-bookworm",
    "PROMETHEUS_IMAGE": "prom/prometheus:v3.5.0",
}
"""By the variables of docker-compose.yml that name others."""
# Grafana computes nothing of its own; its queries have a test, tests/deploy/test_monitoring.py.
SERVICES = ("redis", "gateway", "haproxy", "worker", "control", "prometheus")
DEMO = Settings().data_dir / "models" / DEMO_MODEL
PROJECT = "rts-docker-test"
STREAMS = 100
TOKENS = 100
LONG_TOKENS = 500
"""Of every second resumable stream: 15 s, so that no grace time and no delay outlasts it."""
MOST_MB = {"gateway": 100, "worker": 1300, "worker-cuda": 5600}
"""On top of the base: docs/docker.md has the sizes."""
WORKERS = 2
PAUSE_S = 3.0


class Stack:
    """The compose project, under a name and ports of its own, with the echo engine.

    Args:
        images: as build() returns them.

    Attributes:
        stubborn: services of which a container had to be killed.
    """

    def __init__(self, images: dict[str, str]) -> None:
        self.port, self._prometheus = free_port(), free_port()
        self.stubborn: list[str] = []
        self._compose = shlex.split(os.environ.get("COMPOSE", "docker compose"))
        self._env = {key: value for key, value in os.environ.items() if key[:4] != "RTS_"} | {
            "COMPOSE_PROJECT_NAME": PROJECT,
            "COMPOSE_FILE": f"docker-compose.yml{os.pathsep}tests/docker/override.yml",
            "DEMO_MODEL": str(DEMO),
            "PORT": str(self.port),
            "PROMETHEUS_PORT": str(self._prometheus),
            "TAG": "docker-test",
            "RTS_ENGINE": "echo",
            "RTS_ECHO_STEP_MS": "30",
            **images,
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

    def up(self, *words: str, **environment: str) -> None:
        self._env |= environment
        self.compose("up", "--detach", "--no-build", "--wait", *words, *SERVICES)

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "--quiet", service).split()

    def careless(self) -> list[str]:
        """Services of ours that run as root, may write to their root or have capabilities."""
        fields = "{{.Config.User}} {{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}}"
        return [
            service
            for service in ("gateway", "worker", "control")
            for container in self.containers(service)
            if docker("inspect", "--format", fields, container) != "10001:10001 true [ALL]"
        ]

    def keeps_a_file(self) -> bool:
        """Whether Redis has its append-only file."""
        (container,) = self.containers("redis")
        told = docker("exec", container, "redis-cli", "config", "get", "appendonly")
        return told.split() == ["appendonly", "yes"]

    def stop(self, service: str, container: str) -> None:
        """Tells a container to end, and notes one that does not."""
        docker("stop", "--time", "60", container)
        if docker("inspect", "--format", "{{.State.ExitCode}}", container) == "137":
            self.stubborn.append(service)

    def left_over(self) -> list[str]:
        """What is still there of the project after its end."""
        of_it = ("--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}")
        kinds = (("container", "ls", "--all"), ("volume", "ls"), ("network", "ls"))
        return [f"{kind[0]} {name}" for kind in kinds for name in docker(*kind, *of_it).split()]

    def restart(self, service: str) -> None:
        """Stops each container, starts it again, and waits until it is healthy."""
        for container in self.containers(service):
            self.stop(service, container)
            docker("start", container)
            _wait_until_healthy(container)

    def replace(self, service: str) -> None:
        """As docs/docker.md tells to upgrade: a new container beside the old ones, one by one."""
        old = self.containers(service)
        for container in old:
            scale = f"{service}={len(old) + 1}"
            self.compose(
                *("up", "--detach", "--no-build", "--no-deps", "--no-recreate", "--wait"),
                *("--scale", scale, service),
            )
            self.stop(service, container)
            docker("rm", container)

    def reload(self, service: str) -> None:
        """New processes take over; the old ones serve what they have to its end."""
        for container in self.containers(service):
            before = _processes(container)
            docker("kill", "--signal", "HUP", container)
            until(lambda c=container, old=before: bool(_processes(c) - old))

    def crashed(self) -> list[str]:
        """Services of which a container ended by itself, and was started again."""
        count = "{{.RestartCount}}"
        return [
            service
            for service in SERVICES
            for container in self.containers(service)
            if docker("inspect", "--format", count, container) != "0"
        ]

    def ask_prometheus(self, query: str) -> int:
        """The one number that a query gives; 0 if it gives none."""
        words = urllib.parse.urlencode({"query": query})
        url = f"http://127.0.0.1:{self._prometheus}/api/v1/query?{words}"
        with urllib.request.urlopen(url, timeout=5) as reply:
            (found,) = json.loads(reply.read())["data"]["result"] or [{"value": (0, 0)}]
            return int(float(found["value"][1]))

    def killed(self) -> list[str]:
        """Stops everything; the services of which a container ever did not end in its time."""
        self.compose("stop")
        state = "{{.State.ExitCode}}"
        return self.stubborn + [
            service
            for service in SERVICES
            for container in self.compose("ps", "--all", "--quiet", service).split()
            if docker("inspect", "--format", state, container) == "137"
        ]

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


def _processes(container: str) -> set[str]:
    return set(docker("top", container, "-eo", "pid").split())


def _wait_until_healthy(container: str) -> None:
    wanted = "{{.State.Status}}{{if .State.Health}} {{.State.Health.Status}}{{end}}"
    deadline = time.monotonic() + 60
    while True:
        state = docker("inspect", "--format", wanted, container)
        if state in ("running", "running healthy"):
            return
        assert time.monotonic() < deadline, f"{container}: {state}"
        time.sleep(0.25)


def build() -> dict[str, str]:
    """Makes our images; returns IMAGES, or what stands in for them where they cannot be pulled."""
    command = [str(ROOT / "tests/docker/stand_ins.sh"), *IMAGES.values()]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    images = dict(zip(IMAGES, found, strict=True))
    print(*found)
    base = images["PYTHON_IMAGE"]
    below = int(docker("image", "inspect", "--format", "{{.Size}}", base))
    os.environ["DOCKER_BUILDKIT"] = "1"
    workers = ["worker", *(["worker-cuda"] if os.environ.get("DOCKER_CUDA") else [])]
    for target in ("gateway", *workers):
        name = f"realtime-ai-serve-{target}:docker-test"
        more = ["--build-arg", f"BASE={base}"]
        more += shlex.split(os.environ.get("DOCKER_BUILD_ARGS", ""))
        file = ("--file", "deploy/docker/Dockerfile", "--target", target)
        docker("build", "--quiet", *more, *file, "--label", PROJECT, "--tag", name, ".")
        size = int(docker("image", "inspect", "--format", "{{.Size}}", name))
        added = (size - below) // 10**6
        print(f"{name}: {size // 10**6} MB, {added} MB of them on top of its base")
        assert added <= MOST_MB[target], f"{target} has grown"
    # Those of earlier runs, whose names these have taken, would fill the disk.
    docker("image", "prune", "--force", "--filter", f"label={PROJECT}")
    # As it runs, and with no compiler: a library that is not there would be made up for in silence.
    confined = ("--rm", "--read-only", "--tmpfs", "/tmp", "--network", "none")
    no_torch = "import importlib.util as u; assert not u.find_spec('torch')"
    docker("run", *confined, "realtime-ai-serve-gateway:docker-test", "python", "-c", no_torch)
    for target in workers:
        image = f"realtime-ai-serve-{target}:docker-test"
        cuda = docker("run", *confined, image, "python", "-c", LOADS)
        assert (cuda != "None") == (target == "worker-cuda"), f"{target} has CUDA {cuda}"
    return images


LOADS = """
from pathlib import Path
import worker.engine.torch_engine
from worker.engine.native.build import BUILT, LEVELS, library
assert all(library(level, Path("/tmp")).parent == BUILT for level in LEVELS)
import torch
print(torch.version.cuda)
"""


class Load:
    """Streams that follow each other, a hundred at once, half plain and half resumable.

    Attributes:
        complete, broken: by kind. refused: requests that were told to come again, and did.
        unheard: those of which nothing was answered, not even a status; they came again, too.
        what: of the broken ones.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(STREAMS)
        self.complete: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()
        self.refused = self.unheard = 0
        self.what: list[str] = []
        self._tasks: list[Future[None]] = [
            self._pool.submit(self._lane, i, "plain" if i % 2 else "resumable")
            for i in range(STREAMS)
        ]

    def _lane(self, seed: int, kind: str) -> None:
        with (
            OpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0) as official,
            Client(self._url) as ours,
        ):
            while not self._end.is_set():
                seed += STREAMS
                tokens = LONG_TOKENS if seed % 4 == 0 else TOKENS
                try:
                    if kind == "plain":
                        text, reason = self._plain(official, seed, tokens)
                    else:
                        text, reason = self._resumable(ours, seed, tokens)
                except Exception as error:
                    self._broke(kind, repr(error))
                    continue
                if (text, reason) == (letters(seed, tokens), "length"):
                    self.complete[kind] += 1
                else:
                    self._broke(kind, f"{reason!r} after {text!r}")

    def _broke(self, kind: str, what: str) -> None:
        self.broken[kind] += 1
        self.what.append(f"{kind}: {what}")
        time.sleep(0.1)

    def _plain(self, client: OpenAI, seed: int, tokens: int) -> tuple[str, str | None]:
        while True:
            try:
                stream = client.completions.create(
                    model="echo", prompt="a", max_tokens=tokens, seed=seed, stream=True
                )
                break
            except InternalServerError as error:
                # Refused before it began, as while Redis restarts; anything else is a break.
                if error.status_code != 503 or "retry-after" not in error.response.headers:
                    raise
                self.refused += 1
                time.sleep(float(error.response.headers["retry-after"]))
            except APITimeoutError:
                raise
            except APIConnectionError:
                # Not even the head of an answer, as while haproxy restarts.
                self.unheard += 1
                time.sleep(0.5)
        choices = [choice for chunk in stream for choice in chunk.choices]
        return "".join(choice.text for choice in choices), choices[-1].finish_reason

    def _resumable(self, client: Client, seed: int, tokens: int) -> tuple[str, str | None]:
        stream = client.stream("a", model="echo", max_tokens=tokens, seed=seed)
        text = "".join(token.text for token in stream)
        return text, stream.answer.finish_reason

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        """Lets what is under way end."""
        self._end.set()
        for task in self._tasks:
            task.result(120)
        self._pool.shutdown()

    def told(self) -> str:
        done = [
            f"{kind}: {self.complete[kind]} complete, {self.broken[kind]} broken" for kind in KINDS
        ]
        return (
            f"{'; '.join(done)}; {self.refused} refused and {self.unheard} unheard, and asked again"
        )


KINDS = ("plain", "resumable")


def restart_everything(stack: Stack) -> bool:
    """Every service in turn, under load; whether no stream broke."""

    def by(how: Callable[[str], None], service: str) -> None:
        began = time.monotonic()
        how(service)
        print(f"{how.__name__} {service}: {time.monotonic() - began:.1f} s", flush=True)
        time.sleep(PAUSE_S)

    with Load(stack.url) as load:
        time.sleep(PAUSE_S)
        by(stack.restart, "control")
        by(stack.replace, "worker")
        by(stack.replace, "gateway")
        by(stack.restart, "redis")
        by(stack.restart, "prometheus")
        by(stack.reload, "haproxy")
        unheard = load.unheard
        # The only door: nothing comes in until it is open again, but what is inside ends.
        by(stack.restart, "haproxy")
        before = load.complete.copy()
    print(load.told())
    for line in load.what[:10]:
        print(f"  {line}")
    # Of all gateways there have been: one that is replaced starts to count anew.
    moved = {
        what: stack.ask_prometheus(f"sum(max_over_time({name}[30m]))")
        for what, name in (
            ("handed over by workers", "rts_request_redeliveries_total"),
            ("resumed at another gateway", "rts_stream_resumes_total"),
        )
    }
    print(", ".join(f"{count} {what}" for what, count in moved.items()))
    if unheard:
        print(f"{unheard} unheard while haproxy was there")
    broken = load.broken.total() + unheard
    whole = all(load.complete[kind] > before[kind] for kind in KINDS) and not broken
    return whole and all(moved.values())


def kill_a_gateway(stack: Stack) -> bool:
    """The control: what must break breaks and is seen, and what must survive does."""
    with Load(stack.url) as load:
        time.sleep(PAUSE_S)
        docker("kill", "--signal", "KILL", stack.containers("gateway")[0])
        time.sleep(PAUSE_S)
    print(f"a gateway killed: {load.told()}")
    return load.broken["plain"] > 0 and not load.broken["resumable"]


def chat(stack: Stack, model: str, words: str, *, max_tokens: int, retries: int = 0) -> str:
    """An answer by the official client, greedy, seed 7."""
    with OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=retries) as client:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": words}],
            max_tokens=max_tokens,
            temperature=0,
            seed=7,
        )
    return answer.choices[0].message.content or ""


def let_the_demo_model_answer(stack: Stack) -> bool:
    """The torch engine in its container; whether it says what the model does."""
    one = ("--scale", "worker=1", "--scale", "gateway=2")
    model = {"RTS_ENGINE": "torch", "RTS_MODEL": "demo=/models/demo", "RTS_KV_CACHE_MB": "256"}
    stack.up(*one, **model)
    text = chat(stack, "demo", "What is the capital of France?", max_tokens=30, retries=5)
    print(f"the demo model says {text!r}")
    return "Paris" in text


def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.5)


def _busy_gateways(stack: Stack) -> int:
    # Of those that are there now.
    up = 'up{job="realtime-ai-serve"} == 1'
    return stack.ask_prometheus(
        f"count(sum by (instance) (rts_generation_tokens_total) > 0 and on (instance) {up})"
    )


def main() -> int:
    """Runs it all; the exit status."""
    if not DEMO.is_dir():
        # Docker would make it, and who fetches it would take that for the model.
        raise SystemExit(f"no model at {DEMO}: python -m realtime_serve.demo_model")
    # A hundred clients that try again would say so in thousands of lines.
    logging.getLogger("realtime_serve.client").setLevel(logging.ERROR)
    stack = Stack(build())
    with stack.running():
        time.sleep(PAUSE_S)
        crashed = stack.crashed()
        print(f"crashed: {crashed}" if crashed else "up and healthy")
        careless, keeps_a_file = stack.careless(), stack.keeps_a_file()
        assert chat(stack, "echo", "hi", max_tokens=20) == letters(7, 20)
        good = restart_everything(stack)
        seen = kill_a_gateway(stack)
        stack.up("--scale", "worker=3", "--scale", "gateway=4")
        assert len(stack.containers("worker")) == 3
        until(lambda: stack.ask_prometheus('sum(up{job="realtime-ai-serve"})') == 4)
        until(lambda: chat(stack, "echo", "hi", max_tokens=20) != "" and _busy_gateways(stack) == 4)
        print("scaled to 3 workers and 4 gateways, which all serve and Prometheus has found")
        answers = let_the_demo_model_answer(stack)
        crashed += stack.crashed()
        killed = stack.killed()
    left_over = stack.left_over()
    print(f"left over: {left_over}" if left_over else "down")
    if not good:
        print("FAILED: a restart broke streams, or none was handed over or resumed")
    if not seen:
        print("FAILED: the death of a gateway broke no plain stream, or a resumable one")
    if crashed:
        print(f"FAILED: containers of {crashed} ended by themselves")
    if killed:
        print(f"FAILED: containers of {killed} did not end when they were told to")
    if not answers:
        print("FAILED: the demo model does not say what it should")
    if careless:
        print(f"FAILED: containers of {careless} are not confined")
    if not keeps_a_file:
        print("FAILED: Redis has no append-only file")
    good = good and seen and answers and keeps_a_file
    return 0 if good and not (crashed or killed or careless or left_over) else 1


if __name__ == "__main__":
    sys.exit(main())
