"""A fast choice of the scenarios; `make chaos` plays all of them, longer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chaos.catalogue import SCENARIOS
from chaos.play import NOT_ALLOWED, REQUIRED, Scenario, play, seed_of
from chaos.world import SERVERS, find_server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

FAST = [scenario for scenario in SCENARIOS if scenario.fast]


def skip(reason: str) -> None:
    """At home by name; in CI, which installs what is needed, it is a failure."""
    if os.environ.get(REQUIRED) and reason != NOT_ALLOWED:
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
    row = await play(scenario, tmp_path, server=server, seed=seed, rounds=2)
    assert row.faults >= 2
    assert row.streams >= 20
    if scenario.expect_wrong:
        assert row.wrong_streams, "the harness does not see what it must"
    else:
        assert not row.wrong, row.wrong[:5]
        assert row.complete + row.told == row.streams or "vanish" in scenario.kinds
