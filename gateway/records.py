"""What Redis knows of one request, as a gateway shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gateway.errors import RequestNotFound
from gateway.formats import ID_PREFIXES, Subject
from shared import keys, messages
from shared.store import Store, unavailable

_RID_LENGTH = 32
_FIELDS = (
    *("st", "mv", "cls", "caller", "seq", "pt", "tk", "reason", "view", "run"),
    *("t0", "t1", "t2", "t3", "dl"),
)
_STATES = {b"w": "queued", b"r": "running"}
_ENDED = {
    "stop": "completed",
    "length": "completed",
    "cancelled": "cancelled",
    "abandoned": "cancelled",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One request.

    Attributes:
        state: queued, running, completed, cancelled, failed. reason: of its end, or "".
        run: as State.run. seq: number of its last token.
        ticket: its number in the queue, against the queue's head.
        times: Unix ms of t0 accepted, t1 taken, t2 first token, t3 ended; those that have come.
        log_exists: its tokens can still be read.
    """

    rid: str
    run: bytes
    state: str
    mv: str
    cls: str
    seq: int
    prompt_tokens: int
    ticket: int
    reason: str
    view: messages.View
    times: dict[str, int]
    deadline_ms: int
    log_exists: bool

    @property
    def ended(self) -> bool:
        """Whether nothing will follow."""
        return bool(self.reason)

    @property
    def subject(self) -> Subject:
        """What an answer about it needs."""
        return Subject(self.rid, self.view, self.prompt_tokens)


async def read_record(store: Store, text: str, caller: str) -> Record:
    """The caller's request.

    Args:
        store: where to look.
        text: its id, also as OpenAI's objects write it.
        caller: who asks.

    Raises:
        RequestNotFound: no such request, or another caller's.
        StoreUnavailable: Redis cannot be asked.
        DecodeError: written by a release that this one does not understand.
    """
    rid = text
    for prefix in ID_PREFIXES:
        rid = rid.removeprefix(prefix)
    if len(rid) != _RID_LENGTH or not rid.isalnum() or not rid.isascii():
        raise RequestNotFound(text[:64])
    async with unavailable(), store.client.pipeline(transaction=False) as pipe:
        pipe.hmget(keys.request(rid), list(_FIELDS))
        pipe.exists(keys.log(rid))
        row, log_exists = await pipe.execute()
    values: dict[str, Any] = dict(zip(_FIELDS, row, strict=True))
    if values["st"] is None or values["caller"] != caller.encode():
        raise RequestNotFound(rid)
    reason = (values["reason"] or b"").decode()
    return Record(
        rid=rid,
        run=values["run"] or b"",
        state=_ENDED.get(reason, "failed") if reason else _STATES.get(values["st"], "running"),
        mv=values["mv"].decode(),
        cls=values["cls"].decode(),
        seq=int(values["seq"]),
        prompt_tokens=int(values["pt"]),
        ticket=int(values["tk"]),
        reason=reason,
        view=messages.decode(values["view"], messages.View),
        times={name: int(values[name]) for name in ("t0", "t1", "t2", "t3") if values[name]},
        deadline_ms=int(values["dl"]),
        log_exists=bool(log_exists),
    )
