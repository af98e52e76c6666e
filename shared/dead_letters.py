"""Requests over which engines died too often: kept to be looked at, run again or dropped."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from shared import keys, messages
from shared.store import Store, unavailable

PAGE = 64
"""Letters read at once; each holds a whole request."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One entry of `rts:dead`, as take.lua wrote it.

    Attributes:
        entry: its id in the stream. rid: the request's.
        caller, mv, cls: whose it was, for which model@version, in which class.
        why: what happened. engine: the last one that died over it. deaths: how many did.
        body: an encoded messages.Request.
    """

    entry: str
    rid: str
    caller: str
    mv: str
    cls: str
    why: str
    engine: str
    deaths: int
    body: bytes

    @property
    def died_ms(self) -> int:
        """When it was given up, in milliseconds of Unix time."""
        return int(self.entry.partition("-")[0])

    def request(self) -> messages.Request:
        """What was asked for.

        Raises:
            DecodeError: written by a release that this one does not understand.
        """
        return messages.decode(self.body, messages.Request)


class DeadLetters:
    """All dead letters of one Redis."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def read(self) -> AsyncIterator[DeadLetter]:
        """All of them, the oldest first.

        Raises:
            StoreUnavailable: Redis did not answer.
        """
        after = "-"
        while True:
            async with unavailable():
                page = await self._store.client.xrange(keys.DEAD, min=after, count=PAGE)
            for entry, fields in page:
                yield _letter(entry, fields)
            if len(page) < PAGE:
                return
            after = f"({page[-1][0].decode()}"

    async def get(self, entries: Iterable[str]) -> list[DeadLetter]:
        """Those of these entries that are still there.

        Raises:
            StoreUnavailable: Redis did not answer.
        """
        found: list[DeadLetter] = []
        for entry in entries:
            async with unavailable():
                page = await self._store.client.xrange(keys.DEAD, min=entry, max=entry)
            found += [_letter(*row) for row in page]
        return found

    async def replay(
        self,
        letter: DeadLetter,
        *,
        timeout_ms: int,
        keep_ms: int,
        queue_limit: int,
        queue_bytes: int,
    ) -> str:
        """Puts the request on its queue again, under its id; the letter stays.

        Nobody need be listening: it runs until its deadline, and its caller can read it for
        `keep_ms` after its end. The same letter is replayed once while that lasts, however often
        this is called.

        Returns:
            accepted; closed (its version takes no requests), full (its queue); running or finished
            (it has been run again already), conflict (its id is another request's by now).

        Raises:
            DecodeError: the request cannot be read.
            StoreUnavailable: Redis did not answer; it may have been accepted.
        """
        answer = await self._store.enqueue(
            letter.request(),
            cls=letter.cls,
            timeout_ms=timeout_ms,
            grace_ms=timeout_ms,
            keep_ms=keep_ms,
            # The letter's own, so that a repeated call finds what the first one did.
            attempt=f"dead-{letter.entry}",
            queue_limit=queue_limit,
            queue_bytes=queue_bytes,
            resumable=True,
        )
        if answer.outcome != "attached":
            return answer.outcome
        async with unavailable():
            state = await self._store.client.hget(keys.request(letter.rid), "st")  # type: ignore[misc]
        return "finished" if state == b"e" else "running"

    async def drop(self, letters: Iterable[DeadLetter]) -> None:
        """Removes letters; what is gone already does no harm.

        Raises:
            StoreUnavailable: Redis did not answer.
        """
        entries = [letter.entry for letter in letters]
        async with unavailable():
            await self._store.client.xdel(keys.DEAD, *entries)


def _letter(entry: bytes, fields: dict[bytes, bytes]) -> DeadLetter:
    # What another release left out is empty: the other letters can be read all the same.
    rid, caller, mv, cls, why, engine = (
        fields.get(name, b"").decode(errors="replace")
        for name in (b"rid", b"caller", b"mv", b"class", b"why", b"engine")
    )
    deaths = int(fields.get(b"deaths", 0))
    body = fields.get(b"body", b"")
    return DeadLetter(entry.decode(), rid, caller, mv, cls, why, engine, deaths, body)
