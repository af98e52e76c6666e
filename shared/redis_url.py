"""What RTS_REDIS_URL may say; read without redis-py, which settings do not wait for."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

_SENTINEL_SCHEMES = ("sentinel://", "sentinels://")
_SCHEMES = ("redis://", "rediss://", "unix://", *_SENTINEL_SCHEMES)
_SENTINEL_PORT = 26379
_SENTINEL_FORM = (
    "sentinel:// or sentinels://, then [user:password@]host[:port][,host[:port]...]"
    "/<master name>[/<db>][?sentinel_username=...&sentinel_password=...]"
)
_SENTINEL_URL = re.compile(
    r"sentinel(?P<tls>s?)://((?P<user>[^:@/?#]*)(:(?P<password>[^@/?#]*))?@)?(?P<hosts>[^@/?#]+)"
    r"/(?P<master>[^/?#]+)(/(?P<db>[0-9]{1,6}))?(\?(?P<options>[^?#]*))?"
)
_HOST = re.compile(r"(\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^:\[\]\s]+))(:(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Files of a connection with TLS; the server's certificate and name are always verified.

    Attributes:
        ssl_ca_certs: who may have signed the server's certificate; "": whom the system trusts.
        ssl_certfile, ssl_keyfile: the certificate that this process shows; "": none.
    """

    ssl_ca_certs: str = ""
    ssl_certfile: str = ""
    ssl_keyfile: str = ""


_TLS = tuple(each.name for each in fields(TlsFiles))


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """A server that is found by asking sentinels.

    Attributes:
        sentinels: host and port of each. master: what they call the server.
        db: the database. username, password: of the server, whichever it is at the time.
        sentinel_username, sentinel_password: of the sentinels themselves.
        tls: of both; None: without.
    """

    sentinels: tuple[tuple[str, int], ...]
    master: str
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    sentinel_username: str = ""
    sentinel_password: str = field(default="", repr=False)
    tls: TlsFiles | None = None


def is_sentinel(url: str) -> bool:
    """Whether the server is found by asking sentinels."""
    return url.startswith(_SENTINEL_SCHEMES)


def parse_tls(url: str) -> TlsFiles | None:
    """How a checked rediss:// or sentinels:// URL wants it; None for others."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("rediss", "sentinels"):
        return None
    return TlsFiles(**{name: value for name, value in _options(parts.query) if name in _TLS})


def parse_sentinel(url: str) -> SentinelUrl:
    """The parts of a sentinel:// or sentinels:// URL.

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
    options = dict(_options(found["options"] or ""))
    known = {"sentinel_username", "sentinel_password", *(_TLS if found["tls"] else ())}
    _refuse_options(options, known)
    texts = (found[name] or "" for name in ("master", "user", "password"))
    master, user, password = map(urllib.parse.unquote, texts)
    return SentinelUrl(
        sentinels,
        master,
        int(found["db"] or 0),
        user,
        password,
        options.get("sentinel_username", ""),
        options.get("sentinel_password", ""),
        parse_tls(url),
    )


def check_redis_url(url: str) -> None:
    """Refuses what redis-py would fail at, or what our own connection does not do as well.

    Raises:
        ValueError: says what must be otherwise. What is wrong is not repeated: it may be a part of
            the password.
    """
    if not url.startswith(_SCHEMES):
        raise ValueError(
            "must start with redis://, rediss://, unix://, sentinel:// or sentinels://"
        )
    if is_sentinel(url):
        parse_sentinel(url)
        _refuse_missing(url)
        return
    try:
        parts = urllib.parse.urlsplit(url)
        # It is read here, and may be no number.
        parts.port  # noqa: B018
        options = dict(_options(parts.query))
    except ValueError:
        raise ValueError("not a valid URL") from None
    _refuse_options(options, {"db", *(_TLS if parts.scheme == "rediss" else ())})
    db = options.get("db", "")
    if parts.scheme != "unix" and "db" not in options:
        db = parts.path.removeprefix("/")
    if (db or "db" in options) and not re.fullmatch("[0-9]{1,6}", db):
        raise ValueError("the database must be a number")
    _refuse_missing(url)


def _options(query: str) -> list[tuple[str, str]]:
    return urllib.parse.parse_qsl(query, keep_blank_values=True)


def _refuse_options(options: Mapping[str, str], known: set[str]) -> None:
    if options.keys() - known:
        raise ValueError(f"of options behind a ?, only {', '.join(sorted(known))} are supported")
    if bool(options.get("ssl_certfile")) != bool(options.get("ssl_keyfile")):
        raise ValueError("ssl_certfile and ssl_keyfile go together")


def _refuse_missing(url: str) -> None:
    # At the start alone: later, while a certificate is renewed, a file may be away for a moment.
    for name, value in _options(urllib.parse.urlsplit(url).query):
        if name in _TLS and not Path(value).is_file():
            raise ValueError(f"{name} names no file")
