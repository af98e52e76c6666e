"""Certificates of an authority of the tests' own, for servers on 127.0.0.1 and their clients."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlencode

import trustme


class Certificates:
    """Files in a folder.

    Attributes:
        ca: whom to trust. server, client: each with certificate and key.
    """

    def __init__(self, folder: Path, *, host: str = "127.0.0.1") -> None:
        authority = trustme.CA()
        self.ca = folder / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        self.server = self._issue(authority, folder / "server", host)
        self.client = self._issue(authority, folder / "client", "client.test")

    @staticmethod
    def _issue(authority: trustme.CA, base: Path, name: str) -> tuple[Path, Path]:
        issued = authority.issue_cert(name)
        certificate, key = base.with_suffix(".crt"), base.with_suffix(".key")
        issued.private_key_pem.write_to_path(str(key))
        for index, blob in enumerate(issued.cert_chain_pems):
            blob.write_to_path(str(certificate), append=index > 0)
        return certificate, key

    def options(self, *, client: bool = True) -> str:
        """What stands behind the ? of a URL."""
        found = {"ssl_ca_certs": self.ca}
        if client:
            found |= dict(zip(("ssl_certfile", "ssl_keyfile"), self.client, strict=True))
        return urlencode({name: str(path) for name, path in found.items()})

    def server_lines(self, port: int) -> str:
        """Of a server's configuration: TLS alone, and clients must have a certificate."""
        certificate, key = self.server
        return (
            f'port 0\ntls-port {port}\ntls-ca-cert-file "{self.ca}"\n'
            f'tls-cert-file "{certificate}"\ntls-key-file "{key}"\n'
            "tls-auth-clients yes\ntls-replication yes\n"
        )
