"""A server that is killed before its last writes are on the disk, although it acknowledged them.

`appendfsync everysec` puts a write off while an earlier one is being synced, for up to two seconds.
Here that is done to the file, so that it is known what is lost.
"""

from __future__ import annotations

from pathlib import Path

from realtime_serve.redis_server import RedisServer


class LostWrites:
    """Remembers what is in the append-only file now, to lose what comes after it."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._sizes = {path: path.stat().st_size for path in self._files()}
        assert self._sizes

    def kill(self) -> int:
        """Kills the server; returns how many bytes it has lost. To be started again."""
        self._server.kill()
        lost = 0
        for path in self._files():
            size, kept = path.stat().st_size, self._sizes.get(path, 0)
            lost += size - kept
            with path.open("r+b") as file:
                file.truncate(kept)
        return lost

    def _files(self) -> list[Path]:
        return sorted(self._server.plan.folder.rglob("*.incr.aof"))
