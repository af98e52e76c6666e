"""A GET to a gateway of ours, without a client library that would delay the start."""

from __future__ import annotations

import asyncio
import ipaddress


def base_url(host: str, port: int) -> str:
    """The address under which this machine reaches a server that listens on `host`."""
    return f"http://{_bracketed(reachable(host))}:{port}"


def reachable(host: str) -> str:
    """`host`, or the loopback address if that means all of this machine's addresses."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"


async def get(host: str, port: int, path: str, timeout_s: float = 2.0) -> tuple[int, bytes]:
    """The status and the body of `path`; status 0 when nobody answers in time."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(reachable(host), port)
            try:
                name = _bracketed(reachable(host))
                # HTTP/1.0, so that the body ends with the connection and comes unchunked.
                request = f"GET {path} HTTP/1.0\r\nHost: {name}:{port}\r\n\r\n"
                writer.write(request.encode())
                reply = await reader.read(-1)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0, b""
    head, _, body = reply.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    if len(words) < 2 or not words[1].isdigit():
        return 0, b""
    return int(words[1]), body


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
