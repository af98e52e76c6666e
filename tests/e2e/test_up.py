"""`realtime-serve up` with real processes and the echo engine: starts, recovers, leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
import redis
from cluster import free_port

from realtime_serve.redis_server import RedisServer, find_binary
from realtime_serve.up import usable_cores

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
GONE_WITHIN_S = 5.0


class Up:
    """A running `up` and what it has printed."""

    def __init__(self, argv: list[str], env: Mapping[str, str], cwd: Path = ROOT) -> None:
        self.process = subprocess.Popen(
            argv,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output = ""

    def wait_for(self, text: str) -> str:
        """Read until a line holds `text`; that line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return line
        pytest.fail(f"{text!r} was never printed:\n{self.output}")

    def family(self) -> dict[str, psutil.Process]:
        """The processes it started, by role and index as in their command lines."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            # One that has just ended has no command line any more.
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if "realtime_serve.cli" in words:
                    rest = words[words.index("realtime_serve.cli") + 1 :]
                    found["-".join(word for word in rest if word != "--index")] = process
                else:
                    found["server"] = process
        return found

    def end(self) -> int:
        """The exit status, once it has ended."""
        rest, _ = self.process.communicate(timeout=30)
        self.output += rest
        return self.process.returncode


class Starter:
    """Starts clusters on a free port with a data folder of their own, and ends them."""

    def __init__(self, tmp_path: Path) -> None:
        self.env = {
            "RTS_ENGINE": "echo",
            "RTS_DATA_DIR": str(tmp_path / "data"),
            "RTS_PORT": str(two_free_ports()),
            "RTS_DRAIN_GRACE_S": "5",
        }
        self._started: list[Up] = []

    def __call__(self, *flags: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Up:
        argv = [sys.executable, "-m", "realtime_serve.cli", "up", *flags]
        return self.run(argv, env, cwd)

    def run(self, argv: list[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Up:
        up = Up(argv, {**self.env, **(env or {})}, cwd)
        self._started.append(up)
        return up

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.env['RTS_PORT']}"

    def close(self) -> None:
        for up in self._started:
            family = []
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(up.process.pid).children(recursive=True)
            for process in (up.process, *family):
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    process.kill()
            up.process.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    starter.close()


def two_free_ports() -> int:
    """The first of two in a row."""
    while True:
        port = free_port()
        if free_port() == port + 1:
            return port


def assert_gone(processes: Mapping[str, psutil.Process]) -> None:
    _, alive = psutil.wait_procs(list(processes.values()), timeout=GONE_WITHIN_S)
    assert alive == []


def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def answers(url: str) -> bool:
    """Whether a prompt gets text."""
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            content = json.loads(reply.read())["choices"][0]["message"]["content"]
            return isinstance(content, str)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def test_starts_serves_and_stops_on_ctrl_c(start: Starter) -> None:
    up = start("--gateways", "2", "--workers", "2")
    up.wait_for("ready in")
    assert answers(start.url)
    assert f"curl -N {start.url}/v1/chat/completions" in up.wait_for("curl")
    family = up.family()
    roles = {"server", "control", "gateway-0", "gateway-1", "worker-0", "worker-1"}
    assert set(family) == roles
    own = psutil.Process(up.process.pid).nice()
    assert family["worker-0"].nice() == own
    assert {family[role].nice() for role in ("server", "control", "gateway-0")} == {own + 5}
    up.process.send_signal(signal.SIGINT)
    assert up.end() == 0
    assert "stopped" in up.output
    assert "killed" not in up.output
    assert_gone(family)


@pytest.mark.parametrize(
    ("flags", "threads"),
    [
        (["--workers", "2"], str(max(1, usable_cores() // 2))),
        (["--workers", "2", "--model", "a=x,b=y"], str(max(1, usable_cores() // 4))),
        (["--workers", "2", "--threads", "3"], "3"),
        ([], None),
    ],
    ids=["two", "two-of-each", "as-told", "alone"],
)
def test_workers_share_the_cores(
    start: Starter, fakes: Callable[..., Path], flags: list[str], threads: str | None
) -> None:
    up = start(*flags, cwd=fakes(gateway=FAKE_GATEWAY.replace('"echo"', '"none"')))
    until(lambda: any(role.startswith("worker") for role in up.family()))
    workers = [each for role, each in up.family().items() if role.startswith("worker")]
    assert {worker.environ().get("RTS_THREADS") for worker in workers} == {threads}
    up.process.terminate()
    assert up.end() == 0


def test_serves_again_on_the_same_data(start: Starter) -> None:
    for _ in range(2):
        up = start()
        up.wait_for("ready in")
        assert answers(start.url)
        up.process.terminate()
        assert up.end() == 0


def test_a_model_of_an_earlier_run_is_not_listed_any_more(start: Starter) -> None:
    names = []
    for model in ("first", "second"):
        up = start(env={"RTS_MODEL": f"{model}=echo"})
        up.wait_for("ready in")
        with urllib.request.urlopen(f"{start.url}/v1/models", timeout=10) as reply:
            names.append([item["id"] for item in json.loads(reply.read())["data"]])
        up.process.terminate()
        assert up.end() == 0
    assert names == [["first"], ["second"]]


def test_kill_9_leaves_no_process_and_no_lock(start: Starter) -> None:
    up = start()
    up.wait_for("ready in")
    family = up.family()
    assert len(family) == 4
    up.process.kill()
    assert_gone(family)
    start().wait_for("ready in")


def test_stops_when_make_is_killed(start: Starter) -> None:
    script = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    command = [sys.executable, "-m", "realtime_serve.cli", "up", "--end-with-parent"]
    make = start.run([sys.executable, "-c", script, *command])
    make.wait_for("ready in")
    family = psutil.Process(make.process.pid).children(recursive=True)
    assert len(family) == 5
    make.process.kill()
    assert psutil.wait_procs(family, timeout=GONE_WITHIN_S + 3)[1] == []


def test_busy_port_is_named_with_its_holder_and_the_way_out(start: Starter) -> None:
    port = int(start.env["RTS_PORT"])
    with socket.create_server(("127.0.0.1", port + 1)):
        up = start("--gateways", "2")
        assert up.end() == 1
    holder = f"pid {os.getpid()}: {' '.join(psutil.Process().cmdline())[:100]}"
    assert f"port {port + 1} is held by {holder}" in up.output
    way_out = int(up.output.partition("RTS_PORT=")[2].split()[0])
    assert way_out > port + 1
    assert "server:" not in up.output


def test_data_folder_is_for_one_at_a_time(start: Starter) -> None:
    first = start()
    first.wait_for("ready in")
    second = start(env={"RTS_PORT": str(two_free_ports())})
    assert second.end() == 1
    assert f"in use by another `up` (pid {first.process.pid})" in second.output
    assert "RTS_DATA_DIR" in second.output
    assert answers(start.url)


@pytest.mark.parametrize("role", ["worker-0", "gateway-0", "control", "server"])
def test_a_crashed_process_is_started_again(start: Starter, role: str) -> None:
    up = start()
    up.wait_for("ready in")
    victim = up.family()[role]
    victim.kill()
    assert "was killed by SIGKILL, starting it again in 1 s" in up.wait_for("starting it again")
    until(lambda: role in up.family() and up.family()[role].pid != victim.pid)
    until(lambda: answers(start.url))
    up.process.terminate()
    assert up.end() == 0


def test_uses_a_given_server_and_leaves_it_running(start: Starter, tmp_path: Path) -> None:
    binary, _ = find_binary()
    with RedisServer.start(binary, tmp_path / "mine", tcp=True) as server:
        password = server.url.partition(":")[2].partition("@")[0].rpartition(":")[2]
        up = start(env={"RTS_REDIS_URL": server.url})
        up.wait_for("ready in")
        assert answers(start.url)
        family = up.family()
        assert "server" not in family
        assert all(password not in " ".join(each.cmdline()) for each in family.values())
        up.process.terminate()
        assert up.end() == 0
        assert password not in up.output
        assert server.plan.is_ready()


def test_all_processes_understand_an_encoded_password(start: Starter, tmp_path: Path) -> None:
    binary, _ = find_binary()
    with RedisServer.start(binary, tmp_path / "mine", tcp=True) as server:
        secret = "p@ss/w:rd%"
        with redis.Redis.from_url(server.url) as client:
            client.config_set("requirepass", secret)
        address = server.url.rpartition("@")[2]
        up = start(env={"RTS_REDIS_URL": f"redis://:{quote(secret, safe='')}@{address}"})
        up.wait_for("ready in")
        # The control process writes it once it is served.
        host, port = address.partition("/")[0].split(":")
        with redis.Redis(host=host, port=int(port), password=secret) as client:
            until(lambda: client.exists("arq:queue", "rts:arq:health") > 0)
        up.process.terminate()
        assert up.end() == 0
        assert "control lost Redis" not in up.output


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        ([], {"RTS_MAX_BATCH_SIZE": "0"}, "RTS_MAX_BATCH_SIZE=0: must be a whole number from 1"),
        ([], {"RTS_MAX_BATCHSIZE": "8"}, "did you mean RTS_MAX_BATCH_SIZE?"),
        (["--port", "x"], {}, "--port=x: must be a whole number"),
        (["--prot", "80"], {}, "did you mean --port?"),
        (["--host", "0.0.0.0"], {}, "RTS_ALLOW_ANONYMOUS=1"),
        ([], {"RTS_REDIS_URL": "redis://127.0.0.1:1"}, "RTS_REDIS_URL"),
        ([], {"RTS_DATA_DIR": "/dev/null/x"}, "set RTS_DATA_DIR to a folder that you can write"),
    ],
)
def test_bad_settings_stop_the_start(
    start: Starter, flags: list[str], env: dict[str, str], message: str
) -> None:
    up = start(*flags, env=env)
    assert up.end() in (1, 2)
    assert message in up.output
    assert "Traceback" not in up.output


@pytest.mark.parametrize("source", ["/nonexistent/model", "/nonexistent/model.gguf", "./none"])
def test_a_model_that_is_not_there_stops_the_start(start: Starter, source: str) -> None:
    up = start(env={"RTS_ENGINE": "torch", "RTS_MODEL": f"mine={source}"})
    assert up.end() == 1
    assert up.output == f"error: RTS_MODEL: there is no {source}\n"


@pytest.mark.torch
@pytest.mark.parametrize("name", ["folder", "file.gguf"])
def test_a_model_that_is_none_stops_the_start(start: Starter, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.gguf").write_text("this is no model\n")
    path = str(tmp_path / name)
    up = start(env={"RTS_ENGINE": "torch", "RTS_MODEL": path})
    assert up.end() == 1
    last = [line for line in up.output.splitlines() if '"worker-0"' in line][-1]
    assert json.loads(last)["level"] == "error"
    assert path in json.loads(last)["message"]
    assert up.output.splitlines()[-1].startswith("error: worker-0 cannot start")
    assert "starting it again" not in up.output
    assert "Traceback" not in up.output


@pytest.mark.parametrize("role", ["gateway", "worker", "control"])
def test_a_process_alone_needs_a_server(start: Starter, role: str) -> None:
    alone = start.run([sys.executable, "-m", "realtime_serve.cli", role])
    assert alone.end() == 2
    assert "RTS_REDIS_URL" in alone.output


def test_status(start: Starter) -> None:
    command = [sys.executable, "-m", "realtime_serve.cli", "status"]
    nobody = start.run(command)
    assert nobody.end() == 1
    assert "RTS_PORT" in nobody.output
    start().wait_for("ready in")
    status = start.run(command)
    assert status.end() == 0
    assert {"connections", "models", "queues", "workers"} <= set(json.loads(status.output))


FAKE_GATEWAY = """
    import http.server, json, signal, threading

    def main(settings):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                worker = {"model": "echo", "started": 1e12}
                self.wfile.write(json.dumps({"workers": [worker]}).encode())

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer((settings.host, settings.port), Handler)

        def stop(*_):
            print("gateway stops", flush=True)
            threading.Thread(target=server.shutdown).start()

        signal.signal(signal.SIGTERM, stop)
        server.serve_forever()
        return 0
"""
OBEDIENT = """
    import signal

    def main(settings):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        signal.sigwait([signal.SIGTERM])
        print("NAME stops", flush=True)
        return 0
"""
STUBBORN = """
    import signal, threading

    def main(settings):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("NAME is deaf", flush=True)
        threading.Event().wait()
        return 0
"""
WRONG = """
    import sys

    def main(settings):
        print("the model is not a model", file=sys.stderr, flush=True)
        return STATUS
"""


@pytest.fixture
def fakes(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder whose gateway, worker and control are found before the real ones."""

    def make(worker: str = OBEDIENT, control: str = OBEDIENT, gateway: str = FAKE_GATEWAY) -> Path:
        for path, source in (
            ("gateway/app.py", gateway),
            ("worker/main.py", worker.replace("NAME", "worker")),
            ("control/main.py", control.replace("NAME", "control")),
        ):
            file = tmp_path / "fakes" / path
            file.parent.mkdir(parents=True)
            (file.parent / "__init__.py").touch()
            file.write_text(textwrap.dedent(source))
        return tmp_path / "fakes"

    return make


def test_gateways_stop_first_then_workers_then_control(
    start: Starter, fakes: Callable[..., Path]
) -> None:
    up = start(cwd=fakes())
    up.wait_for("ready in")
    up.process.terminate()
    assert up.end() == 0
    stops = [line for line in up.output.splitlines() if line.endswith(" stops")]
    assert stops == ["gateway stops", "worker stops", "control stops"]


def test_a_second_ctrl_c_stops_at_once(start: Starter, fakes: Callable[..., Path]) -> None:
    up = start("--drain-grace-s", "600", cwd=fakes(worker=STUBBORN))
    up.wait_for("worker is deaf")
    up.wait_for("ready in")
    family = up.family()
    up.process.send_signal(signal.SIGINT)
    up.wait_for("gateway stops")
    up.process.send_signal(signal.SIGINT)
    assert up.end() == 0
    assert "stopping at once" in up.output
    assert_gone(family)


def test_the_grace_time_ends(start: Starter, fakes: Callable[..., Path]) -> None:
    up = start("--drain-grace-s", "0", cwd=fakes(worker=STUBBORN))
    up.wait_for("worker is deaf")
    up.wait_for("ready in")
    family = up.family()
    up.process.terminate()
    assert up.end() == 0
    assert "worker-0 did not stop in time and was killed" in up.output
    assert_gone(family)


@pytest.mark.parametrize(
    ("status", "reason"), [("2", "cannot start"), ("1", "crashed 3 times before it was ready")]
)
def test_a_process_that_cannot_start_stops_all(
    start: Starter, fakes: Callable[..., Path], status: str, reason: str
) -> None:
    never_ready = FAKE_GATEWAY.replace("send_response(200)", "send_response(503)")
    up = start(cwd=fakes(worker=WRONG.replace("STATUS", status), gateway=never_ready))
    up.wait_for("the model is not a model")
    assert up.end() == 1
    assert f"error: worker-0 {reason}" in up.output
