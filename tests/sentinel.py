"""A replicated Redis of real processes: a primary, a replica, and sentinels that fail over."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import redis
from certificates import Certificates
from cluster import free_port

from realtime_serve.lifeline import Lifeline
from realtime_serve.redis_server import server_environment

NAME = "main"
USER = "asker"
RIGHTS = "+auth +hello +ping +client|setname +sentinel|master +sentinel|get-master-addr-by-name"
"""At the sentinels: may ask where the master is, and nothing else (docs/redis.md)."""
PASSWORD = "p@ss/word"
READY_S = 30.0

_SERVER = """\
{port}
bind 127.0.0.1
dir "{folder}"
logfile "{folder}/log"
save ""
appendonly yes
appendfsync everysec
maxmemory-policy noeviction
repl-diskless-sync-delay 0
repl-ping-replica-period 1
requirepass "{password}"
masterauth "{password}"
"""
_SENTINEL = """\
{port}
bind 127.0.0.1
dir "{folder}"
logfile "{folder}/log"
requirepass "{password}"
user {user} on ">{password}" ~* &* -@all {rights}
sentinel monitor {name} 127.0.0.1 {primary} {quorum}
sentinel auth-pass {name} "{password}"
sentinel sentinel-pass "{password}"
sentinel down-after-milliseconds {name} {down_after_ms}
sentinel failover-timeout {name} 3000
"""


class Member:
    """One server or sentinel, which keeps its port and its data when it is started again."""

    def __init__(
        self,
        command: list[str],
        port: int,
        folder: Path,
        lifeline: Lifeline,
        tls: Certificates | None = None,
    ) -> None:
        self.port = port
        self.folder = folder
        scheme, query = ("rediss", tls.options()) if tls else ("redis", "")
        self.client = redis.Redis.from_url(
            f"{scheme}://127.0.0.1:{port}?{query}",
            password=PASSWORD,
            decode_responses=True,
            socket_timeout=READY_S,
        )
        self._command = command
        self._lifeline = lifeline
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._lifeline.command(self._command),
            pass_fds=self._lifeline.fds,
            env=server_environment(os.environ),
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + READY_S
        while True:
            try:
                self.client.ping()
                return
            except redis.RedisError:
                log = self.folder / "log"
                assert self._process.poll() is None, log.exists() and log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Kill -9; the data stays."""
        self.client.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """It stands still and keeps its connections."""
        self.client.close()
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def lose(self, primary: Member) -> None:
        """This replica hears no more from its primary, which has none left then."""
        # It cannot log in again. Packets held back would still arrive after the primary's death.
        self.client.config_set("masterauth", "not any more")
        primary.client.client_kill_filter(_type="slave")
        deadline = time.monotonic() + READY_S
        while primary.client.info("replication")["connected_slaves"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def find(self) -> None:
        """It may log in again."""
        self.client.config_set("masterauth", PASSWORD)

    def role(self) -> str:
        """What it believes to be: master or slave."""
        role: Any = self.client.role()
        return str(role[0])

    def clients(self) -> list[dict[str, str]]:
        """Who is connected, but for sentinels, replicas and this test."""
        mine = str(self.client.client_id())
        rows: Any = [
            *self.client.client_list(_type="normal"),
            *self.client.client_list(_type="pubsub"),
        ]
        return [
            row for row in rows if row["id"] != mine and not row["name"].startswith("sentinel-")
        ]


class Replicated:
    """A primary, a replica, and sentinels.

    Args:
        folder: for data, configurations and logs.
        binary: a redis-server or valkey-server.
        sentinels: how many; 0: nobody fails over, and `url` is the primary's own.
        down_after_ms: a server that is silent for so long is down.
        tls: all speak TLS, and only that.
    """

    def __init__(
        self,
        folder: Path,
        binary: str,
        *,
        sentinels: int = 3,
        down_after_ms: int = 500,
        tls: Certificates | None = None,
    ) -> None:
        self._tls = tls
        self._folder = folder
        self._binary = binary
        self._lifeline = Lifeline()
        self.first = self._server("first")
        self.second = self._server("second", self.first)
        self.sentinels = [
            self._sentinel(index, sentinels // 2 + 1, down_after_ms) for index in range(sentinels)
        ]

    @property
    def url(self) -> str:
        """For RTS_REDIS_URL."""
        password = "p%40ss%2Fword"
        if not self.sentinels:
            return f"redis://:{password}@127.0.0.1:{self.first.port}"
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        scheme, query = ("sentinels", f"&{self._tls.options()}") if self._tls else ("sentinel", "")
        asked = f"sentinel_username={USER}&sentinel_password={password}"
        return f"{scheme}://:{password}@{hosts}/{NAME}?{asked}{query}"

    @property
    def members(self) -> list[Member]:
        return [self.first, self.second, *self.sentinels]

    def primary(self) -> Member:
        """Which one the sentinels call the master."""
        address: Any = self.sentinels[0].client.sentinel_get_master_addr_by_name(NAME)
        return self.first if int(address[1]) == self.first.port else self.second

    def replica(self) -> Member:
        """The other one."""
        return self.second if self.primary() is self.first else self.first

    def wait_for_failover(self, old: Member, timeout_s: float = READY_S) -> Member:
        """Until another one than `old` is the master; that one."""
        deadline = time.monotonic() + timeout_s
        while (primary := self.primary()) is old:
            assert time.monotonic() < deadline, self._logs()
            time.sleep(0.02)
        return primary

    def wait_until_replicated(self) -> None:
        """Until the replica follows the primary, and the sentinels know of both and each other."""
        deadline = time.monotonic() + READY_S
        while not self._is_replicated():
            assert time.monotonic() < deadline, self._logs()
            time.sleep(0.02)
        # A replica that has just been filled confirms nothing for up to a second.
        source = self._source()
        source.client.publish("new", "")
        assert source.client.wait(1, int(READY_S * 1000)) == 1

    @contextmanager
    def stray_sentinel(self) -> Iterator[Member]:
        """One that knows of no failover: of the first server only, which should be dead."""
        stray = self._sentinel(len(self.sentinels), len(self.sentinels) + 1, 500)
        try:
            stray.start()
            yield stray
        finally:
            stray.kill()

    def _source(self) -> Member:
        return self.primary() if self.sentinels else self.first

    def _is_replicated(self) -> bool:
        info: Any = self._source().client.info("replication")
        if info["role"] != "master" or info.get("slave0", {}).get("state") != "online":
            return False
        for sentinel in self.sentinels:
            state: Any = sentinel.client.sentinel_master(NAME)
            others = state["num-other-sentinels"]
            if (state["num-slaves"], others) != (1, len(self.sentinels) - 1):
                return False
            # A sentinel promotes no replica of which it does not know that it follows.
            replicas: Any = sentinel.client.sentinel_slaves(NAME)
            if replicas[0]["flags"] != "slave" or replicas[0]["master-link-status"] != "ok":
                return False
        return True

    def _server(self, name: str, source: Member | None = None) -> Member:
        port = free_port()
        folder = self._folder / name
        config = _SERVER.format(port=self._port(port), folder=folder, password=PASSWORD)
        if source is not None:
            config += f"replicaof 127.0.0.1 {source.port}\n"
        return self._member(port, folder, config)

    def _sentinel(self, index: int, quorum: int, down_after_ms: int) -> Member:
        port = free_port()
        folder = self._folder / f"sentinel-{index}"
        config = _SENTINEL.format(
            port=self._port(port),
            folder=folder,
            password=PASSWORD,
            user=USER,
            rights=RIGHTS,
            name=NAME,
            primary=self.first.port,
            quorum=quorum,
            down_after_ms=down_after_ms,
        )
        return self._member(port, folder, config, "--sentinel")

    def _member(self, port: int, folder: Path, config: str, *flags: str) -> Member:
        folder.mkdir(parents=True)
        # The servers write it anew when a failover changes their parts.
        (folder / "server.conf").write_text(config)
        command = [self._binary, str(folder / "server.conf"), *flags]
        return Member(command, port, folder, self._lifeline, self._tls)

    def _port(self, port: int) -> str:
        return self._tls.server_lines(port) if self._tls else f"port {port}"

    def _logs(self) -> str:
        return "\n".join(f"{m.folder.name}\n{(m.folder / 'log').read_text()}" for m in self.members)

    def __enter__(self) -> Replicated:
        try:
            for member in self.members:
                member.start()
            self.wait_until_replicated()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        for member in reversed(self.members):
            member.kill()
        self._lifeline.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
