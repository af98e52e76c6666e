"""A fast choice of the scenarios; `make chaos` plays all of them, longer."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
from required import REQUIRED

from chaos.catalogue import SCENARIOS
from chaos.ledger import Ledger
from chaos.load import Load, Stream
from chaos.play import Scenario, Stalls, is_excused, play, seed_of
from chaos.run import updated
from chaos.world import SERVERS, find_server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

FAST = [scenario for scenario in SCENARIOS if scenario.fast]


def skip(reason: str) -> None:
    """At home by name; in CI, which installs what is needed, it is a failure."""
    if os.environ.get(REQUIRED) and not is_excused(reason):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.parametrize(
    ("scenario", "server"),
    [(scenario, SERVERS[i % 2]) for i, scenario in enumerate(FAST)],
    ids=lambda value: value.name if isinstance(value, Scenario) else value,
)
async def test_no_token_is_lost_or_repeated(
    scenario: Scenario, server: str, tmp_path: Path
) -> None:
    if missing := scenario.missing():
        skip(missing)
    try:
        find_server(server)
    except FileNotFoundError as error:
        skip(str(error))
    seed = seed_of(1, scenario.name, server)
    row = await play(scenario, tmp_path, server=server, seed=seed, rounds=scenario.fast)
    assert row.faults >= scenario.fast
    assert row.streams >= 20
    if scenario.expect_wrong:
        assert row.as_expected, f"the harness does not see what it must: {row.wrong[:5]}"
    else:
        assert not row.wrong, row.wrong[:5]
        assert not scenario.most_stall.missed(row.stalls_s, slack=2)
        assert row.complete + row.told == row.streams or "vanish" in scenario.kinds


def test_one_seed_is_the_same_streams_and_faults_however_fast_clients_are() -> None:
    def drawn(seed: int, connections: int) -> tuple[list[Any], float]:
        rng = random.Random(seed)
        world: Any = SimpleNamespace(settings={"engine": "echo"}, urls=lambda: ["a", "b", "c"])
        load = Load(world, rng, cast("Any", None))
        for _ in range(connections):
            load._url()
        streams = [load.make("caller", kind) for kind in ("plain", "stop", "chat")]
        return [(s.seed, s.max_tokens, s.prompt, s.stop) for s in streams], rng.random()

    assert drawn(5, 0) == drawn(5, 9)
    assert drawn(5, 0) != drawn(6, 0)


async def test_a_run_that_no_client_knows_must_be_one_that_a_client_may_not_know_of() -> None:
    def sent(kind: str, number: int, **fields: Any) -> Stream:
        return Stream(f"{kind}-{number}", "a", kind, 1, 50, "x", "y" * 50, 50, **fields)

    async def wrong(streams: list[Stream], *reasons: str, tokens: int = 50) -> list[str]:
        facts = [
            (b"", {b"rid": b"%d" % i, b"caller": b"id:a", b"tokens": b"%d" % tokens, b"reason": r})
            for i, r in enumerate(reason.encode() for reason in reasons)
        ]
        world: Any = SimpleNamespace(
            data_url="redis://127.0.0.1:1", settings={"tokens_per_minute": 1}
        )
        ledger = Ledger(world)
        ledger._client = SimpleNamespace(xrange=AsyncMock(return_value=facts))
        await ledger._check_ends(streams)
        await ledger.close()
        return ledger.wrong

    silent = sent("plain", 1, unanswered=1)
    lost = sent("refusable", 2, broken='503 {"code":"store_unavailable"}')
    full = sent("refusable", 3, broken='503 {"code":"queue_full"}')
    keyed = sent("keyed", 4, unanswered=1)
    assert await wrong([], "abandoned") == await wrong([], "cancelled") == []
    assert await wrong([silent, lost], "length", "length") == []
    # Each accounts for one run, of its own length, that came to its own end.
    assert len(await wrong([silent], "length", "length")) == 1
    assert await wrong([silent], "length", tokens=49)
    assert await wrong([silent], "engine_failed")
    # This one was refused; this one comes again, and gets it.
    assert await wrong([full], "length")
    assert await wrong([keyed], "length")


def test_rows_that_are_played_again_are_counted_and_named() -> None:
    table = "\n".join(
        [
            "| fault | times | streams | wrong | told | hit |",
            "|---|---|---|---|---|---|",
            "| one | 3 | 100 | 1 | 0 | 5 |",
            "| two | 3 | 1000 | 0 | 0 | 5 |",
            "| three | not run: no root | | | | |",
            "| control: x | 3 | 50 | 7 (must be) | 0 | 5 |",
            "",
            "1,100 streams outside the controls, 1 wrong; 3 rounds.",
        ]
    )
    once = updated(table, ["| one | 3 | 120 | 0 | 0 | 6 |"], 3)
    assert "| one | 3 | 120 | 0 | 0 | 6 |" in once
    assert "| one | 3 | 100" not in once
    assert "1,120 streams outside the controls, 0 wrong; 3 rounds." in once
    assert once.endswith("like all:\n- one (3 rounds; 1 wrong before)\n")
    twice = updated(once, ["| two | 3 | 1 | 2 | 0 | 6 |", "| one | 3 | 1 | 0 | 0 | 6 |"], 9)
    assert "2 streams outside the controls, 2 wrong; 3 rounds." in twice
    assert twice.endswith(
        "- one (3 rounds; 1 wrong before)\n"
        "- two (9 rounds; 0 wrong before)\n- one (9 rounds; 0 wrong before)\n"
    )
    with pytest.raises(ValueError, match="no row four"):
        updated(table, ["| four | 3 | 1 | 0 | 0 | 6 |"], 3)


def test_stalls_are_held_against_each_of_their_bounds() -> None:
    most = Stalls(p50=0.5, p99=1.0, most=3.0)
    assert most.missed([]) == ""
    assert most.missed([0.1] * 200 + [2.0]) == ""
    assert most.missed([0.6, 0.1, 0.7]) == "stall p50 0.60 s, not 0.5"
    assert most.missed([0.6, 0.1, 0.7], slack=2) == ""
    assert most.missed([0.1] * 20 + [2.0]).startswith("stall p99 2.00 s")
    assert most.missed([0.1] * 200 + [3.1]).startswith("stall max 3.10 s")
