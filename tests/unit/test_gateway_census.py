"""Counters of engines, summed over those that come and go."""

from __future__ import annotations

from gateway.census import Tally


def test_a_sum_does_not_fall_when_somebody_is_gone_or_comes_back() -> None:
    tally = Tally()
    seen = []
    for counters in (
        {"a": {"queries": 10, "hits": 4}, "b": {"queries": 100, "hits": 0}},
        {"a": {"queries": 15, "hits": 4}},
        {},
        {
            "a": {"queries": 15, "hits": 5},
            "b": {"queries": 101, "hits": 50},
            "c": {"queries": 1, "hits": 1},
        },
    ):
        tally.count(counters)
        seen.append((tally.totals["queries"], tally.totals["hits"]))
    assert seen == [(110, 4), (115, 4), (115, 4), (117, 56)]


def test_those_that_come_and_go_for_ever_are_not_all_remembered() -> None:
    tally = Tally()
    for i in range(3000):
        tally.count({f"engine {i}": {"queries": 1}})
    assert tally.totals["queries"] == 3000
    assert len(tally._known) <= 1024
