"""Whether an object is one that an API server takes: unknown fields are errors.

Kubernetes' own kinds by the strict schemas that kubernetes-validate brings along; KEDA's, the
Prometheus operator's and Gateway API's by crds.json, which says where it comes from.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import referencing
from jsonschema import Draft202012Validator
from kubernetes_validate.utils import schema_contents

VERSIONS = ("1.32", "1.34", "1.37")
"""The oldest that the manifests are for, one between, the newest that schemas are known of."""

_CRDS = Path(__file__).with_name("crds.json")


def problems(item: dict[str, Any], version: str) -> list[str]:
    """What is wrong with an object, for a version of Kubernetes."""
    where = f"{item['kind']}/{item['metadata']['name']}"
    validator = _validator(item["apiVersion"], item["kind"], version)
    if validator is None:
        return [f"{where}: there is no {item['apiVersion']} {item['kind']} in {version}"]
    return [
        f"{where}: {'.'.join(map(str, error.path))}: {error.message}"
        for error in validator.iter_errors(item)
    ]


@functools.cache
def _validator(api_version: str, kind: str, version: str) -> Any:
    crds = _crds()
    if f"{api_version}/{kind}" in crds["kinds"]:
        return Draft202012Validator(
            {**crds["kinds"][f"{api_version}/{kind}"], "$defs": crds["$defs"]}
        )
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    folder = f"kubernetes-json-schema/v{version}.0-local-strict"
    try:
        schema = schema_contents(f"{folder}/{kind.lower()}-{group}.json", version)
    except FileNotFoundError:
        return None
    return Draft202012Validator(schema, registry=_registry(folder, version))


@functools.cache
def _registry(folder: str, version: str) -> referencing.Registry[Any]:
    # kubernetes-validate reads these 2 MB again for every object.
    definitions = schema_contents(f"{folder}/_definitions.json", version)
    resource: referencing.Resource[Any] = referencing.Resource.from_contents(definitions)
    return resource @ referencing.Registry()


@functools.cache
def _crds() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_CRDS.read_text())
    return found
