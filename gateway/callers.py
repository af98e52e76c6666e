"""Who sends a request: what limits, fairness and ownership go by."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from aiohttp import web

from shared.errors import InvalidRequest

_LONGEST = 128

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Callers:
    """Tells callers apart: by the name they give, else by their address.

    Args:
        trusted_proxies: comma-separated addresses or networks whose X-Forwarded-For is believed.
    """

    def __init__(self, trusted_proxies: str) -> None:
        self._trusted: list[Network] = [
            ipaddress.ip_network(item.strip(), strict=False)
            for item in trusted_proxies.split(",")
            if item.strip()
        ]

    def caller(self, request: web.Request, client_id: str | None = None) -> str:
        """The caller of a request; `client_id` is the one in its body.

        Raises:
            InvalidRequest: a name that is too long or not printable.
        """
        name, param = client_id, "client_id"
        if name is None and "client_id" in request.query:
            name = request.query["client_id"]
        if name is None and "X-Client-Id" in request.headers:
            name, param = request.headers["X-Client-Id"], "X-Client-Id"
        if name is None:
            # The prefixes keep a name from being taken for an address.
            return "ip:" + self.address(request)
        if not 1 <= len(name) <= _LONGEST or not name.isprintable():
            raise InvalidRequest(f"{param} must be 1 to {_LONGEST} printable characters", param)
        return "id:" + name

    def address(self, request: web.Request) -> str:
        """The client's address, beyond the proxies that are trusted."""
        peer = request.transport.get_extra_info("peername") if request.transport else None
        address = str(peer[0]) if isinstance(peer, tuple) else "local"
        if not self._trusted:
            return address
        forwarded = ",".join(request.headers.getall("X-Forwarded-For", []))
        return self._beyond(address, reversed(forwarded.split(",")))

    def _beyond(self, address: str, hops: Iterable[str]) -> str:
        for hop in hops:
            if not self._is_trusted(address):
                break
            try:
                address = str(ipaddress.ip_address(hop.strip()))
            except ValueError:
                break
        return address

    def _is_trusted(self, address: str) -> bool:
        try:
            known = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(known in network for network in self._trusted)
