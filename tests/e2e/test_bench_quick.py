"""The benchmark itself still runs: all of its parts, in seconds, on the echo engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.emit import measure
from realtime_serve.redis_server import RedisServer

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


def test_quick_mode_measures_everything(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "benchmarks.run", "--quick", "--out", str(tmp_path / "out")]
    ran = subprocess.run(
        argv,
        cwd=ROOT,
        env={**os.environ, "RTS_DATA_DIR": str(tmp_path / "data")},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "## The engine alone, and the cluster over HTTP" in ran.stdout
    assert (tmp_path / "out" / "cluster.md").read_text() in ran.stdout
    told = json.loads((tmp_path / "out" / "cluster.json").read_text())
    assert [part["streams"] for part in told["cluster"]] == [1, 4]
    for part in told["cluster"] + told["transport"]:
        assert part["tokens_per_s"] > 0
        assert {"server", "gateway", "worker loop", "client"} <= set(part["cpu_us_a_token"])
    assert list((tmp_path / "data").iterdir()) == [], "its servers' data is removed"


def test_the_engine_is_measured_alone_and_through_the_cluster(tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "benchmarks.engine", "--quick", "--out", str(out)]
    ran = subprocess.run(
        argv,
        cwd=ROOT,
        env={**os.environ, "RTS_DATA_DIR": str(tmp_path / "data")},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    page = (out / "engine.md").read_text()
    assert "## Prompt 16, output 8, greedy" in page
    assert "## What sampling costs" in page
    told = json.loads((out / "engine.json").read_text())
    assert told["skipped"] == {}
    assert {part["name"] for part in told["measured"]} == {"engine alone", "cluster"}
    for part in told["measured"]:
        assert part["tokens_per_s"] > 0
        assert part["ttft_ms"]["p50"] > 0
        assert part["gap_ms"]["p99"] > 0
    for start in told["starts"].values():
        assert 0 < start["first_token_s"] < 50
        assert start["memory_mb"] > 10


def test_a_contender_that_is_unknown_is_named(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "benchmarks.engine", "--quick", "--only", "cluster,nobody"]
    env = {**os.environ, "RTS_DATA_DIR": str(tmp_path)}
    ran = subprocess.run(
        argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30, check=False
    )
    assert ran.returncode == 1
    assert "nobody is none of engine alone, cluster" in ran.stdout


@pytest.mark.parametrize("bare", [False, True])
async def test_what_a_token_costs_the_server(redis_server: RedisServer, bare: bool) -> None:
    # A process's CPU time is counted in hundredths of a second.
    cpu_us, call_us = await measure(redis_server, 16, bare=bare, steps=200)
    assert 0 < cpu_us < 1000
    assert call_us > 0
