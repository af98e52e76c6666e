"""What RTS_REDIS_URL may say; read without redis-py, which settings do not wait for."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass, field

SENTINEL_SCHEME = "sentinel://"
_SCHEMES = ("redis://", "rediss://", "unix://", SENTINEL_SCHEME)
_SENTINEL_PORT = 26379
_SENTINEL_FORM = (
    "sentinel://[user:password@]host[:port][,host[:port]...]/<master name>[/<db>]"
    "[?sentinel_password=...]"
)
_SENTINEL_URL = re.compile(
    r"sentinel://((?P<user>[^:@/?#]*)(:(?P<password>[^@/?#]*))?@)?(?P<hosts>[^@/?#]+)"
    r"/(?P<master>[^/?#]+)(/(?P<db>[0-9]{1,6}))?(\?sentinel_password=(?P<sentinel>[^&#]*))?"
)
_HOST = re.compile(r"(\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^:\[\]\s]+))(:(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """A server that is found by asking sentinels.

    Attributes:
        sentinels: host and port of each. master: what they call the server.
        db: the database. username, password: of the server, whichever it is at the time.
        sentinel_password: of the sentinels themselves.
    """

    sentinels: tuple[tuple[str, int], ...]
    master: str
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    sentinel_password: str = field(default="", repr=False)


def is_sentinel(url: str) -> bool:
    """Whether the server is found by asking sentinels."""
    return url.startswith(SENTINEL_SCHEME)


def parse_sentinel(url: str) -> SentinelUrl:
    """The parts of a sentinel:// URL.

    Raises:
        ValueError: it is none. The message repeats nothing of it: that could be a password.
    """
    found = _SENTINEL_URL.fullmatch(url)
    hosts = [_HOST.fullmatch(host) for host in found["hosts"].split(",")] if found else []
    if found is None or None in hosts:
        raise ValueError(f"must be {_SENTINEL_FORM}")
    sentinels = tuple(
        (host["v6"] or host["name"], int(host["port"] or _SENTINEL_PORT)) for host in hosts if host
    )
    if not all(0 < port < 65536 for _, port in sentinels):
        raise ValueError("a sentinel's port must be from 1 to 65535")
    texts = (found[name] or "" for name in ("master", "user", "password", "sentinel"))
    master, user, password, sentinel = map(urllib.parse.unquote, texts)
    return SentinelUrl(sentinels, master, int(found["db"] or 0), user, password, sentinel)


def check_redis_url(url: str) -> None:
    """Refuses what redis-py would fail at, or what our own connection does not do as well.

    Raises:
        ValueError: says what must be otherwise. What is wrong is not repeated: it may be a part of
            the password.
    """
    if not url.startswith(_SCHEMES):
        raise ValueError("must start with redis://, rediss://, unix:// or sentinel://")
    if is_sentinel(url):
        parse_sentinel(url)
        return
    try:
        parts = urllib.parse.urlsplit(url)
        # It is read here, and may be no number.
        parts.port  # noqa: B018
        options = urllib.parse.parse_qs(parts.query, keep_blank_values=True)
    except ValueError:
        raise ValueError("not a valid URL") from None
    if options.keys() - {"db"}:
        raise ValueError("of options behind a ?, only db is supported")
    db = options.get("db", [""])[-1]
    if parts.scheme != "unix" and "db" not in options:
        db = parts.path.removeprefix("/")
    if (db or "db" in options) and not re.fullmatch("[0-9]{1,6}", db):
        raise ValueError("the database must be a number")
