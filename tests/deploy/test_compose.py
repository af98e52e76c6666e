"""docker-compose.yml as a file; tests/docker/stack.py brings it up where there is an engine."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from cluster import ROOT

STACK: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = STACK["services"]
OURS = ("gateway", "worker", "worker-gpu", "control")


def test_the_gpu_profile_is_a_worker_with_another_image_and_a_gpu() -> None:
    cpu, gpu = SERVICES["worker"], SERVICES["worker-gpu"]
    assert gpu["profiles"] == ["gpu"]
    assert "profiles" not in cpu
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])
    apart = {"image", "build", "profiles", "deploy"}
    assert {k: v for k, v in gpu.items() if k not in apart} == {
        k: v for k, v in cpu.items() if k not in apart
    }
    stages = (ROOT / "deploy/docker/Dockerfile").read_text()
    for service in (cpu, gpu):
        assert f" AS {service['build']['target']}\n" in stages
    assert gpu["image"] != cpu["image"]


@pytest.mark.parametrize("name", OURS)
def test_ours_have_a_root_to_read_only_and_no_capabilities(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_every_volume_is_named_and_used() -> None:
    used = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", ())
        if isinstance(volume, str) and volume[0] not in "./$"
    }
    assert used == set(STACK["volumes"])
