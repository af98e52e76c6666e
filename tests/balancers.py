"""The load balancers of deploy/, in front of gateways on this machine."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster import ROOT, free_port

from realtime_serve.lifeline import Lifeline

BALANCERS = ("haproxy", "nginx")
LISTENS_WITHIN_S = 20


class Balancer:
    """A haproxy or an nginx with the shipped configuration; only addresses and folders are others.

    It listens when this returns.

    Args:
        kind: one of BALANCERS. folder: for its files. ports: of the gateways, on loopback.
        texts: what else is to be otherwise, by what the file has there, once.

    Attributes:
        port: where it listens, on loopback.
    """

    def __init__(
        self,
        kind: str,
        folder: Path,
        ports: Sequence[int],
        lifeline: Lifeline,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        config = folder / f"{kind}.conf"
        text = _haproxy(self.port, ports) if kind == "haproxy" else _nginx(self.port, ports, folder)
        for old, new in (texts or {}).items():
            assert text.count(old) == 1, (kind, old)
            text = text.replace(old, new)
        config.write_text(text)
        command = {
            "haproxy": ["haproxy", "-f", str(config), "-db"],
            "nginx": ["nginx", "-c", str(config), "-g", "daemon off;"],
        }[kind]
        with (folder / f"{kind}.log").open("wb") as log:
            self._process = subprocess.Popen(
                lifeline.command(command),
                pass_fds=lifeline.fds,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._wait(folder / f"{kind}.log")

    def _wait(self, log: Path) -> None:
        """Until it listens; its log says why it does not."""
        until = time.monotonic() + LISTENS_WITHIN_S
        while self._process.poll() is None and time.monotonic() < until:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        self.stop()
        raise OSError(f"the balancer does not listen: {log.read_text()}")

    def __enter__(self) -> Balancer:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """SIGTERM: nginx's master takes its workers along."""
        self._process.terminate()
        self._process.wait()


def _haproxy(port: int, ports: Sequence[int]) -> str:
    servers = [f"    server g{each} 127.0.0.1:{each}" for each in ports]
    return _replaced(
        ROOT / "deploy/haproxy/haproxy.cfg",
        {
            "    bind :8000": [f"    bind 127.0.0.1:{port}"],
            "    server-template gateway 1-16 gateway:8000 resolvers names init-addr none": servers,
        },
    )


def _nginx(port: int, ports: Sequence[int], folder: Path) -> str:
    rule = " max_fails=0;"
    temporary = [
        f"    {name}_temp_path {folder}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    ]
    return _replaced(
        ROOT / "deploy/nginx/nginx.conf",
        {
            "worker_processes auto;": ["worker_processes auto;", f"pid {folder}/nginx.pid;"],
            "http {": ["http {", *temporary],
            "        listen 8000;": [f"        listen 127.0.0.1:{port};"],
            f"        server gateway:8000{rule}": [
                f"        server 127.0.0.1:{each}{rule}" for each in ports
            ],
        },
    )


def _replaced(path: Path, lines: dict[str, list[str]]) -> str:
    """The file with some of its lines, each of which must be there once, replaced."""
    text = path.read_text().split("\n")
    for line, others in lines.items():
        assert text.count(line) == 1, (path, line)
        place = text.index(line)
        text[place : place + 1] = others
    return "\n".join(text)
