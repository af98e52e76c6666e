"""Counters of engines, summed over those that come and go."""

from __future__ import annotations

from gateway.census import Tally
from shared import messages


def card(engine: str, queries: int, hits: int) -> messages.EngineCard:
    return messages.EngineCard(
        *(messages.VERSION, engine, "echo", "none", "none", "h", 1, 8, 0, 0, 0.0, False, 0.0),
        prefix_queries=queries,
        prefix_hits=hits,
    )


def test_a_sum_does_not_fall_when_an_engine_is_gone_or_comes_back() -> None:
    tally = Tally()
    seen = []
    for cards in (
        [card("a", 10, 4), card("b", 100, 0)],
        [card("a", 15, 4)],
        [],
        [card("a", 15, 5), card("b", 101, 50), card("c", 1, 1)],
    ):
        tally.count(cards)
        seen.append((tally.totals["prefix_queries"], tally.totals["prefix_hits"]))
    assert seen == [(110, 4), (115, 4), (115, 4), (117, 56)]


def test_engines_that_come_and_go_for_ever_are_not_all_remembered() -> None:
    tally = Tally()
    for i in range(3000):
        tally.count([card(f"engine {i}", 1, 1)])
    assert tally.totals["prefix_queries"] == 3000
    assert len(tally._known) <= 1024
