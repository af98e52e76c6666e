"""deploy/docker/constraints.txt: whatever an image installs has its version there."""

from __future__ import annotations

import re
from importlib.metadata import requires

import pytest
from cluster import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PINNED = {
    canonicalize_name(name)
    for name in re.findall(
        r"(?m)^([\w.-]+)==\S+$", (ROOT / "deploy/docker/constraints.txt").read_text()
    )
}
WITH_TORCH = re.compile(r"torch$|nvidia-|cuda-|triton$")
"""Torch is an argument of the Dockerfile; it says exactly what it needs of CUDA."""


def _installed(extra: str) -> set[str]:
    """All distributions that this project needs with an extra, near and far."""
    seen: set[tuple[str, str]] = set()
    waiting = [("realtime-ai-serve", ""), ("realtime-ai-serve", extra)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for need in map(Requirement, requires(name) or ()):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                other = canonicalize_name(need.name)
                waiting += [(other, each) for each in ("", *need.extras)]
    return {name for name, _ in seen} - {"realtime-ai-serve"}


@pytest.mark.parametrize("extra", ["gateway", "control", "worker"])
def test_every_package_of_an_image_has_its_version(extra: str) -> None:
    installed = _installed(extra)
    assert {"redis", "hiredis", "msgspec"} <= installed
    assert {name for name in installed - PINNED if not WITH_TORCH.match(name)} == set()
