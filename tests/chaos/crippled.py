"""The negative control: processes that lack one part of the delivery protocol.

`python -m chaos.crippled <part> <role> ...` runs a role as the command line does, without
- fence: emit does not ask who owns a request;
- order: nor which token comes next, and gateways take what comes;
- sequence: gateways hand on whatever comes, as it comes;
- refill: gateways do not read from the log what they missed;
- recovery: gateways do not queue again what Redis has lost.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable

import shared.store
from gateway import hub
from realtime_serve import cli
from shared import messages
from shared.errors import LogExpired


def without_fence() -> None:
    """Whoever has the next token of a request writes it."""
    _cripple_emit(("own ~= step[i + 1] .. ':' .. engine", "false"))


def without_order() -> None:
    """What is emitted is appended behind what is there, whoever sends it."""
    _cripple_emit(
        ("own ~= step[i + 1] .. ':' .. engine", "false"),
        (
            "local own, seq, st = v[1], v[2], v[3]",
            "local own, seq, st = v[1], v[2], v[3]\n"
            "  last = string.format('%.0f', (seq or 0) + last - before)\n"
            "  before = seq",
        ),
    )
    without_sequence()


def _cripple_emit(*changes: tuple[str, str]) -> None:
    original = shared.store.Script.__init__

    def crippled(self: shared.store.Script, client: object, name: str) -> None:
        original(self, client, name)  # type: ignore[arg-type]
        if name == "emit":
            for old, new in changes:
                _replace(self, old, new)

    shared.store.Script.__init__ = crippled  # type: ignore[method-assign]


def without_sequence() -> None:
    """No token is missed, and none is known from before."""
    hub.Subscription._accept = _accept_all  # type: ignore[method-assign]
    hub.Subscription._missing = lambda self, entry: False  # type: ignore[method-assign]


def without_refill() -> None:
    """A gap is gone over, an end is believed; only what is live is handed on."""

    def accept(self: hub.Subscription, entry: messages.Entry) -> messages.Entry | None:
        return _accept_all(self, entry) if entry.seq >= self.last else None

    hub.Subscription._accept = accept  # type: ignore[method-assign]
    hub.Subscription._missing = lambda self, entry: False  # type: ignore[method-assign]
    hub.Subscription.resync = lambda self: None  # type: ignore[method-assign]


def without_recovery() -> None:
    """What Redis has lost is lost."""

    async def recover(self: hub.Subscription) -> None:
        raise LogExpired(self.rid)

    hub.Subscription._recover = recover  # type: ignore[method-assign]


def _accept_all(self: hub.Subscription, entry: messages.Entry) -> messages.Entry:
    self.last = max(self.last, entry.seq)
    return entry


def _replace(script: shared.store.Script, old: str, new: str) -> None:
    # A control that cripples nothing would prove nothing.
    assert old in script._source, old
    script._source = script._source.replace(old, new)
    script._sha = hashlib.sha1(script._source.encode(), usedforsecurity=False).hexdigest()


PARTS: dict[str, Callable[[], None]] = {
    "fence": without_fence,
    "order": without_order,
    "sequence": without_sequence,
    "refill": without_refill,
    "recovery": without_recovery,
}

if __name__ == "__main__":
    PARTS[sys.argv[1]]()
    sys.exit(cli.main(sys.argv[2:]))
