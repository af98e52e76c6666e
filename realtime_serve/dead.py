"""`realtime-serve dead`: shows dead letters, runs them again, drops them (docs/dead-letters.md)."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from realtime_serve.redis_server import running_server
from shared.dead_letters import DeadLetter, DeadLetters
from shared.errors import DecodeError, StoreUnavailable
from shared.settings import Settings, SettingsError
from shared.store import Store, connect

REDIS_TIMEOUT_S = 5.0
_FAILED = 1

_REFUSED = {
    "closed": "no worker of {mv} is known: start one, then replay",
    "full": "the queue of {mv} is full: replay it later",
    "running": "it was sent again and has not ended; drop its letter",
    "finished": "it was sent again and has its answer; drop its letter",
    "conflict": "its id is another request's by now; drop its letter",
}


def run_dead(
    settings: Settings,
    action: str,
    ids: Sequence[str] | None,
    *,
    as_json: bool,
    with_prompt: bool,
) -> int:
    """One `realtime-serve dead` command.

    Args:
        settings: which Redis, and the limits of a replay.
        action: list, show, replay, drop.
        ids: of requests; None: all that have letters.
        as_json: list in JSON lines instead of a table.
        with_prompt: show also the prompt's token ids.

    Returns:
        The exit status: 1 when something was not there, was refused, or Redis did not answer.

    Raises:
        SettingsError: there is no Redis to ask.
    """
    url = settings.redis_url or running_server(settings.data_dir / "redis")
    if url is None:
        raise SettingsError(
            "RTS_REDIS_URL=: must name a server, as no `up` runs on "
            f"RTS_DATA_DIR={settings.data_dir}"
        )
    try:
        return asyncio.run(_run(url, settings, action, ids, as_json, with_prompt))
    except StoreUnavailable as error:
        return _complain(f"{error}; the same command again does no harm")


async def _run(
    url: str,
    settings: Settings,
    action: str,
    ids: Sequence[str] | None,
    as_json: bool,
    with_prompt: bool,
) -> int:
    store = Store(connect(url, timeout_s=REDIS_TIMEOUT_S))
    letters = DeadLetters(store)
    try:
        if action == "list":
            return await _list(letters, as_json)
        if action == "show":
            return await _each(letters, ids, lambda found: _show(found[-1], with_prompt))
        if action == "replay":
            return await _each(letters, ids, lambda found: _replay(letters, settings, found))
        return await _each(letters, ids, lambda found: _drop(letters, found))
    finally:
        await store.close()


async def _list(letters: DeadLetters, as_json: bool) -> int:
    rows = []
    async for letter in letters.read():
        if as_json:
            _say(json.dumps(_facts(letter)))
        else:
            rows.append([str(value) for value in _facts(letter).values()])
    if as_json:
        return 0
    if not rows:
        _say("no dead letters")
        return 0
    rows.insert(0, [name.replace("_", " ") for name in _HEADINGS])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        _say("  ".join(map(str.ljust, row, widths)).rstrip())
    return 0


_HEADINGS = ("id", "died", "model", "caller", "class", "deaths", "prompt_tokens", "engine", "why")


def _facts(letter: DeadLetter) -> dict[str, Any]:
    """What is listed: never anything of what was asked."""
    died = datetime.fromtimestamp(letter.died_ms / 1000, UTC)
    try:
        length: int | None = len(letter.request().prompt)
    except DecodeError:
        length = None
    values = (
        *(letter.rid, died.isoformat(timespec="seconds"), letter.mv, letter.caller, letter.cls),
        *(letter.deaths, length, letter.engine, letter.why),
    )
    return dict(zip(_HEADINGS, values, strict=True))


async def _each(
    letters: DeadLetters,
    ids: Sequence[str] | None,
    act: Callable[[list[DeadLetter]], Awaitable[str | None]],
) -> int:
    """Acts on the letters of every request; complaints go on to the next."""
    status = 0
    async for rid, found in _chosen(letters, ids):
        complaint = await act(found) if found else "there is no dead letter of this request"
        if complaint is not None:
            status = _complain(f"{rid}: {complaint}")
    return status


async def _chosen(
    letters: DeadLetters, ids: Sequence[str] | None
) -> AsyncIterator[tuple[str, list[DeadLetter]]]:
    """The letters of each request, the oldest first; it may have failed more than once."""
    # Not the letters: they may be many, and each holds a whole request.
    entries: dict[str, list[str]] = {rid: [] for rid in ids or ()}
    async for letter in letters.read():
        if ids is None or letter.rid in entries:
            entries.setdefault(letter.rid, []).append(letter.entry)
    for rid, mine in entries.items():
        yield rid, await letters.get(mine)


async def _show(letter: DeadLetter, with_prompt: bool) -> str | None:
    shown = _facts(letter)
    try:
        request = msgspec.structs.asdict(letter.request())
    except DecodeError as error:
        _say(json.dumps(shown, indent=2))
        return str(error)
    request["sampling"] = msgspec.structs.asdict(request["sampling"])
    del request["v"]
    if not with_prompt:
        del request["prompt"]
    _say(json.dumps({**shown, "request": request}, indent=2))
    return None


async def _replay(letters: DeadLetters, settings: Settings, found: list[DeadLetter]) -> str | None:
    letter = found[-1]
    try:
        outcome = await letters.replay(
            letter,
            timeout_ms=int(settings.timeout_s * 1000),
            keep_ms=int(settings.resumable_retention_s * 1000),
            queue_limit=settings.queue_limit,
            queue_bytes=settings.queue_bytes,
        )
    except DecodeError as error:
        return str(error)
    if outcome != "accepted":
        return _REFUSED[outcome].format(mv=letter.mv)
    # Not before: whatever happens here, the request is in the queue or its letter is there.
    await letters.drop(same := [other for other in found if _is_same(other, letter)])
    _say(f"{letter.rid}: queued again; its caller reads it at /requests/{letter.rid}/stream")
    if left := len(found) - len(same):
        _say(f"{letter.rid}: {left} older letters are of another request under this id, and stay")
    return None


def _is_same(one: DeadLetter, other: DeadLetter) -> bool:
    """Whether they ask for the same."""
    try:
        return one.request().digest() == other.request().digest()
    except DecodeError:
        return False


async def _drop(letters: DeadLetters, found: list[DeadLetter]) -> None:
    await letters.drop(found)
    _say(f"{found[-1].rid}: dropped")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _complain(text: str) -> int:
    sys.stderr.write(f"realtime-serve: error: {text}\n")
    return _FAILED
