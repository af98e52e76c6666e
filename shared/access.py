"""What each role may do in Redis: the rules of an ACL file with the least that it needs.

Scripts run with the rights of whoever calls them, so the commands and names they use count too.
Names are those of shared/keys.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shared.keys import PREFIX


@dataclass(frozen=True, slots=True)
class Access:
    """The rights of a role.

    Attributes:
        reads: patterns of keys that it reads only. writes: of keys that it reads and writes.
        channels: patterns that it publishes to or subscribes to. All are without our prefix.
        commands: beside those that everybody needs.
        others: patterns of keys that have no prefix of ours, read and written.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    channels: tuple[str, ...]
    commands: str
    others: tuple[str, ...] = ()


_CONNECTION: Final = "auth hello ping select quit reset client|setname eval evalsha"
_SUBSCRIBER: Final = "subscribe unsubscribe"
_COMMON: Final = (
    "exists hdel hget hincrby hmget hset info lpop lrem pexpire publish pubsub|numsub time "
    "xack xadd xdel xgroup|delconsumer xpending zrem"
)
"""Of common.lua: what it takes to end a request, which every role does."""

_ENQUEUE: Final = "del getdel hexists hsetnx lpush ltrim pexpireat rpush zadd"

_ARQ: Final = (
    "multi exec watch unwatch zcard zrange zscore zremrangebyscore zincrby set psetex setex get "
    "incrby expire del dbsize zadd"
)
"""Of the library that runs control's jobs."""

_REQUESTS: Final = ("r:*", "l:*", "q:*", "lane:*", "turn:*", "count:*", "owns:*", "leases:*")
_FINISHED: Final = (*_REQUESTS, "due", "ended")

ROLES: Final = {
    "gateway": Access(
        reads=("models", "m:*", "f:*", "open:*", "engines:*", "cards:*"),
        writes=(*_FINISHED, "b:*", "charge:*", "wake:*", "id", "secret"),
        channels=("l:*", "mark"),
        commands=f"{_ENQUEUE} {_SUBSCRIBER} expire get hgetall set smembers wait xinfo|groups "
        "xrange zcount zrange zrangebyscore",
    ),
    "worker": Access(
        reads=(),
        writes=(
            *_FINISHED,
            *("models", "m:*", "f:*", "open:*", "engines:*", "cards:*", "server", "dead", "wake:*"),
        ),
        channels=("l:*", "w:*"),
        # pubsub|channels: for the probe of deploy/k8s. zrange: of workers of release 0.1.
        commands=f"{_SUBSCRIBER} pubsub|channels blpop del hexists hgetall hlen lpush ltrim "
        "pexpireat sadd set xclaim xgroup|create xinfo|groups xrange xreadgroup zadd zcount zrange "
        "zrangebyscore",
    ),
    "control": Access(
        reads=("models", "m:*"),
        writes=(*_FINISHED, "engines:*", "cards:*", "b:*", "settled:*", "dead", "arq", "arq:*"),
        channels=("l:*",),
        commands=f"{_ARQ} hkeys smembers xautoclaim xgroup|create xinfo|consumers xinfo|groups "
        "xreadgroup xtrim zrangebyscore",
        others=("arq:*",),
    ),
    # Whoever looks after dead letters by hand.
    "operator": Access(
        reads=("open:*",),
        writes=(*_FINISHED, "dead", "charge:*", "wake:*"),
        channels=("l:*",),
        commands=f"{_ENQUEUE} xrange",
    ),
}
"""By name of role, which is the name of the user too."""


def user_line(role: str, password: str) -> str:
    """The line of a role in an ACL file, as of Redis 7 and Valkey; the password as its SHA-256."""
    access = ROLES[role]
    rules = [  # in the order in which Redis applies them
        *("user", role, "reset", "on", f"#{_digest(password)}", "-@all"),
        *(f"%R~{PREFIX}{name}" for name in access.reads),
        *(f"~{PREFIX}{name}" for name in access.writes),
        *(f"~{name}" for name in access.others),
        *(f"&{PREFIX}{name}" for name in access.channels),
        *(f"+{command}" for command in f"{_CONNECTION} {_COMMON} {access.commands}".split()),
    ]
    return " ".join(dict.fromkeys(rules))


def acl_file(passwords: Mapping[str, str], admin: str = "") -> str:
    """An ACL file with a line for each role that has a password.

    Args:
        passwords: by role.
        admin: password of the user "default", who may do everything; "" switches it off.

    Raises:
        ValueError: there is no such role.
    """
    if unknown := passwords.keys() - ROLES.keys():
        raise ValueError(f"no such role: {', '.join(sorted(unknown))}")
    rights = f"on #{_digest(admin)} ~* &* +@all" if admin else "off"
    lines = [user_line(role, passwords[role]) for role in ROLES if role in passwords]
    return "\n".join([f"user default reset {rights}", *lines, ""])


def _digest(password: str) -> str:
    return hashlib.sha256(password.encode()).hexdigest()
