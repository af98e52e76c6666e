"""All scenarios, in the order of the table."""

from __future__ import annotations

from chaos import (
    controls,
    faults_client,
    faults_gateway,
    faults_network,
    faults_redis,
    faults_worker,
    soak,
)
from chaos.play import Scenario

SCENARIOS: tuple[Scenario, ...] = (
    *faults_worker.SCENARIOS,
    *faults_gateway.SCENARIOS,
    *faults_client.SCENARIOS,
    *faults_network.SCENARIOS,
    *faults_redis.SCENARIOS,
    *soak.SCENARIOS,
    *controls.SCENARIOS,
)
