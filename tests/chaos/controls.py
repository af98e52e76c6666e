"""The negative control: with a part of the protocol switched off the harness must see it."""

from __future__ import annotations

from dataclasses import replace

from chaos import faults_network, faults_redis, faults_worker
from chaos.play import TOKENS_WRONG, Scenario


def _without(part: str, name: str, scenario: Scenario) -> Scenario:
    return replace(
        scenario,
        name=f"control: {name}; {scenario.name}",
        launcher=("-m", "chaos.crippled", part),
        expect_wrong=TOKENS_WRONG,
        fast=2,
        budgets=False,
        limit_s=8.0,
        stalls="none",
        settings={**scenario.settings, "timeout_s": 12},
    )


def _lax(scenario: Scenario) -> Scenario:
    """Gateways that accept what only the primary has, and do not queue again what it loses."""
    return replace(
        scenario,
        name="control: not strict, no recovery; failover to a replica that lags",
        # A request that was accepted, and that nobody knows any more.
        expect_wrong="log_expired|its request is gone",
        launcher=("-m", "chaos.crippled", "recovery"),
        stalls="none",
        settings={**scenario.settings, "strict": 0},
    )


def _named(scenarios: tuple[Scenario, ...], name: str) -> Scenario:
    return next(s for s in scenarios if s.name.startswith(name))


SCENARIOS = (
    _without("fence", "no fence", _named(faults_worker.SCENARIOS, "two zombies")),
    _without("order", "no fence, any order", _named(faults_worker.SCENARIOS, "worker SIGSTOP")),
    _without(
        "sequence", "no sequence check", _named(faults_network.SCENARIOS, "pub/sub messages lost")
    ),
    _without("refill", "no refill", _named(faults_redis.SCENARIOS, "CLIENT KILL")),
    _lax(_named(faults_redis.SCENARIOS, "failover to a replica that lags")),
)
