"""Dead letters on real servers: as take.lua writes them, read, replayed and dropped."""

from __future__ import annotations

import secrets

import pytest
from script_model import MV, Clock, make_request

from shared import keys, messages
from shared.dead_letters import PAGE, DeadLetter, DeadLetters
from shared.errors import DecodeError
from shared.store import Emission, Store

LEASE_MS = 500
MINUTE = 60_000


@pytest.fixture(autouse=True)
async def _open(store: Store) -> None:
    await store.client.set(keys.is_open(MV), "1")


@pytest.fixture
def letters(store: Store) -> DeadLetters:
    return DeadLetters(store)


async def put(store: Store, rid: str, caller: str = "alice") -> str:
    answer = await store.enqueue(
        make_request(rid, caller, 5),
        cls="normal",
        timeout_ms=MINUTE,
        grace_ms=5000,
        keep_ms=30_000,
        attempt=secrets.token_hex(8),
        queue_limit=100,
        queue_bytes=10**6,
        resumable=False,
    )
    return answer.outcome


async def take(store: Store, engine: str) -> list[tuple[str, int, int]]:
    found = await store.take(MV, engine, 1, lease_ms=LEASE_MS, aging_ms=10**9)
    return [(taken.rid, taken.epoch, taken.deaths) for taken in found.requests]


async def die(store: Store, clock: Clock, rid: str, caller: str = "alice") -> DeadLetter:
    """Three engines take it and die."""
    if await store.client.hget(keys.request(rid), "st") != b"w":  # type: ignore[misc]
        assert await put(store, rid, caller) == "accepted"
    for death in range(3):
        assert [found[0] for found in await take(store, f"{rid}-{death}")] == [rid]
        await clock.advance(LEASE_MS + 1)
    assert await take(store, "undertaker") == []
    return (await letters_of(store, rid))[-1]


async def letters_of(store: Store, rid: str) -> list[DeadLetter]:
    return [letter async for letter in DeadLetters(store).read() if letter.rid == rid]


async def replay(letters: DeadLetters, letter: DeadLetter, **changed: int) -> str:
    options = {"timeout_ms": 9000, "keep_ms": 7000, "queue_limit": 10, "queue_bytes": 10**6}
    return await letters.replay(letter, **{**options, **changed})


async def end(store: Store, engine: str, rid: str, epoch: int) -> None:
    blob = messages.encode(messages.End(messages.VERSION, "stop"))
    await store.emit(MV, engine, [Emission(rid, epoch, 1, 0, b"", 9, "stop", blob)])


async def test_a_letter_holds_the_request(store: Store, clock: Clock, letters: DeadLetters) -> None:
    letter = await die(store, clock, "r1", "bob")
    assert [found async for found in letters.read()] == [letter]
    assert (letter.rid, letter.caller, letter.mv, letter.cls) == ("r1", "bob", MV, "normal")
    assert (letter.engine, letter.deaths) == ("r1-2", 3)
    assert letter.request() == make_request("r1", "bob", 5)
    seconds, _ = await store.client.time()
    assert abs(letter.died_ms / 1000 - seconds) < 10
    assert await letters.get([letter.entry, "1-1"]) == [letter]


async def test_all_are_read_page_by_page(store: Store, letters: DeadLetters) -> None:
    count = 2 * PAGE + 1
    async with store.client.pipeline(transaction=False) as pipe:
        for i in range(count):
            pipe.xadd(keys.DEAD, {"rid": f"r{i}"})
        await pipe.execute()
    assert [letter.rid async for letter in letters.read()] == [f"r{i}" for i in range(count)]


async def test_what_cannot_be_read_hides_no_other(
    store: Store, clock: Clock, letters: DeadLetters
) -> None:
    await store.client.xadd(keys.DEAD, {"rid": "strange", "body": b"\xff"})
    await die(store, clock, "r1")
    strange, readable = [letter async for letter in letters.read()]
    assert (strange.rid, strange.deaths, readable.rid) == ("strange", 0, "r1")
    with pytest.raises(DecodeError):
        await replay(letters, strange)


async def test_a_replay_is_a_new_run(store: Store, clock: Clock, letters: DeadLetters) -> None:
    letter = await die(store, clock, "r1")
    assert await replay(letters, letter) == "accepted"
    client = store.client
    names = ["st", "deaths", "seq", "caller", "cls", "grace", "keep", "charge"]
    values = await client.hmget(keys.request("r1"), names)  # type: ignore[misc]
    assert values == [b"w", b"0", b"0", b"alice", b"normal", b"9000", b"7000", b"0"]
    deadline = int(await client.hget(keys.request("r1"), "dl"))  # type: ignore[misc, arg-type]
    assert deadline == clock.now_ms + 9000
    view = await client.hget(keys.request("r1"), "view")  # type: ignore[misc]
    assert view is not None
    assert messages.decode(view, messages.View).resumable  # type: ignore[arg-type]
    # Whoever owned it before cannot write into this run.
    assert await take(store, "healthy") == [("r1", 4, 0)]
    await end(store, "healthy", "r1", 4)


async def test_a_letter_is_replayed_once(store: Store, clock: Clock, letters: DeadLetters) -> None:
    letter = await die(store, clock, "r1")
    assert await replay(letters, letter) == "accepted"
    assert await replay(letters, letter) == "accepted"
    assert len(await store.client.xrange(keys.queue(MV, "normal"))) == 1
    again = await die(store, clock, "r1")
    assert again.entry != letter.entry
    # Of the first letter there is nothing left to do; the second one is a run of its own.
    assert await replay(letters, letter) == "accepted"
    assert await take(store, "healthy") == []
    assert await replay(letters, again) == "accepted"
    assert [found[0] for found in await take(store, "healthy")] == ["r1"]


async def test_a_request_whose_record_is_gone_is_replayed(
    store: Store, clock: Clock, letters: DeadLetters
) -> None:
    letter = await die(store, clock, "r1")
    await store.client.delete(keys.request("r1"), keys.log("r1"))
    assert await replay(letters, letter) == "accepted"
    assert await take(store, "healthy") == [("r1", 1, 0)]


async def test_why_a_replay_is_refused(store: Store, clock: Clock, letters: DeadLetters) -> None:
    letter = await die(store, clock, "r1")
    await store.client.delete(keys.is_open(MV))
    assert await replay(letters, letter) == "closed"
    await store.client.set(keys.is_open(MV), "1")
    await put(store, "other")
    assert await replay(letters, letter, queue_limit=1) == "full"
    await store.cancel("other", "alice")
    # Its client sent it again.
    assert await put(store, "r1") == "accepted"
    assert await replay(letters, letter) == "running"
    ((_, epoch, _),) = await take(store, "healthy")
    assert await replay(letters, letter) == "running"
    await end(store, "healthy", "r1", epoch)
    assert await replay(letters, letter) == "finished"
    await clock.advance(1)
    await store.client.delete(keys.request("r1"), keys.log("r1"))
    assert await put(store, "r1", "mallory") == "accepted"
    assert await replay(letters, letter) == "conflict"


async def test_letters_are_dropped(store: Store, clock: Clock, letters: DeadLetters) -> None:
    for rid in ("r1", "r2"):
        await die(store, clock, rid)
    await letters.drop(await letters_of(store, "r1"))
    assert [letter.rid async for letter in letters.read()] == ["r2"]
    found = await letters_of(store, "r2")
    await letters.drop(found)
    await letters.drop(found)
    assert [letter async for letter in letters.read()] == []
