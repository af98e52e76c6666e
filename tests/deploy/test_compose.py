"""docker-compose.yml as a file; tests/docker/stack.py brings it up where there is an engine."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import pytest
import rules
import yaml
from cluster import ROOT
from manifests import Pod

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


def _with_defaults(value: object) -> str:
    return re.sub(r"\$\{\w+(?::-([^}]*))?\}", lambda found: found[1] or "", str(value))


def _pod(name: str) -> Pod:
    """A service as the pod that it would be."""
    service = SERVICES[name]
    # The image of a worker says its command.
    command = service.get("command", ["realtime-serve", "worker"])
    env = {key: _with_defaults(value) for key, value in service["environment"].items()}
    container = {
        "command": command,
        "env": [{"name": key, "value": value} for key, value in env.items()],
    }
    spec = {
        "terminationGracePeriodSeconds": int(service.get("stop_grace_period", "10s").rstrip("s")),
        "containers": [container],
    }
    return Pod(
        {"kind": "Service", "metadata": {"name": name}, "spec": {"template": {"spec": spec}}}
    )


@pytest.mark.parametrize("name", OURS)
def test_a_process_reads_its_settings_and_has_the_time_to_end(name: str) -> None:
    assert rules.pod_setting_problems(_pod(name)) == []
    assert rules.pod_ending_problems(_pod(name)) == []


def test_these_checks_find_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**SERVICES["gateway"]["environment"], "RTS_DRAIN_GRACE_S": "90"}
    monkeypatch.setitem(SERVICES, "gateway", {**SERVICES["gateway"], "environment": environment})
    assert len(rules.pod_ending_problems(_pod("gateway"))) == 1
    environment["RTS_MAX_BATCH_SIZE"] = "3"
    (found,) = rules.pod_setting_problems(_pod("gateway"))
    assert "does not read RTS_MAX_BATCH_SIZE" in found
    environment["RTS_NO_SUCH"] = "1"
    assert any("RTS_NO_SUCH" in what for what in rules.pod_setting_problems(_pod("gateway")))


def test_what_is_built_is_what_the_docker_test_builds() -> None:
    """tests/docker/stack.py calls `docker build` itself: the same file, folder and base."""
    dockerfile = (ROOT / "deploy/docker/Dockerfile").read_text()
    built = {
        service["image"]: service["build"] for service in SERVICES.values() if "build" in service
    }
    for build in built.values():
        assert (build["context"], build["dockerfile"]) == (".", "deploy/docker/Dockerfile")
        for name, value in build["args"].items():
            assert f"\nARG {name}={_with_defaults(value)}\n" in f"\n{dockerfile}"
    # Each image of ours is one that some service builds.
    assert {SERVICES[name]["image"] for name in OURS} == set(built)


def test_without_an_engine_the_docker_test_says_so_at_once() -> None:
    make = shutil.which("make")
    assert make is not None
    done = subprocess.run(
        [make, "docker-test"],
        cwd=ROOT,
        env={"PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("SKIPPED: it needs a Docker engine")


def test_every_volume_is_named_and_used() -> None:
    used = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", ())
        if isinstance(volume, str) and volume[0] not in "./$"
    }
    assert used == set(STACK["volumes"])
