"""A worker of the last release behind a new gateway, with real processes."""

from __future__ import annotations

import json
import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT, Cluster
from gateway_site import letters

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]


def infer(url: str, **fields: Any) -> tuple[int, Any]:
    body = {"model": "echo", "prompt": "hi", "max_tokens": 9, "seed": 3, **fields}
    request = urllib.request.Request(
        f"{url}/infer", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_an_old_worker_never_runs_a_request_without_what_it_does_not_know(tmp_path: Path) -> None:
    release = tmp_path / "release"
    with tarfile.open(ROOT / "tests" / "chaos" / "release-0.1.0.tar.xz") as archive:
        archive.extractall(release, filter="data")
    env = {"PYTHONPATH": f"{release}{os.pathsep}{ROOT / 'tests'}", "PYTHONSAFEPATH": "1"}
    with Cluster(tmp_path) as cluster:
        cluster.start("gateway")
        old = cluster.start("worker", env=env)
        cluster.wait()
        known = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "presence_penalty": 0, "min_p": 0}
        status, answer = infer(cluster.url, **known)
        assert (status, answer["text"]) == (200, letters(3, 9))
        for later in ({"min_p": 0.1}, {"repetition_penalty": 1.1}):
            status, answer = infer(cluster.url, **later)
            assert (status, answer["error"]["code"]) == (500, "worker_cannot_run")
        status, answer = infer(cluster.url)
        assert status == 200, "the worker lives on"
        assert old.stop() == 0
        cluster.processes.remove(old)
        cluster.start("worker")
        cluster.wait()
        for later in ({"min_p": 0.1}, {"repetition_penalty": 1.1}):
            status, answer = infer(cluster.url, **later)
            assert (status, answer["text"]) == (200, letters(3, 9))
