"""What must hold for the manifests: each rule gives what is wrong with some objects, in words."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, cast

import promql_parser
from aiohttp import web
from manifests import NAMESPACE, Object, Pod, name, of_kind, pods, selected

from gateway.app import LAST_STEPS_S, create_app
from gateway.census import Census
from gateway.edge import ERRANDS_S
from gateway.hub import Hub
from gateway.metrics import Metrics
from gateway.models import Models
from realtime_serve.cli import _COMMANDS
from shared.settings import Settings, SettingsError, env_name
from shared.store import Store
from worker.main import REDIS_TIMEOUT_S

USER = 10001
IMAGES = {
    "gateway": ("realtime-ai-serve-gateway",),
    "control": ("realtime-ai-serve-gateway",),
    "worker": ("realtime-ai-serve-worker", "realtime-ai-serve-worker-cuda"),
    "": ("valkey/valkey",),
}
BY_HAND = {
    "redis": {"password", "gateway-url", "control-url", "worker-url"},
    "model-hub": {"token"},
}
"""Secrets that docs/kubernetes.md has people make, and their keys."""
PRIVATE = ("/metrics", "/status", "/health", "/livez", "/readyz")
"""Paths that are not for clients from outside."""
SCRAPED = {"namespace", "pod", "container", "job", "endpoint", "le"}
"""Labels that Prometheus adds, or a histogram."""
SPARE_S = 5.0
_CONTROL_S = 10.0


# Settings


def setting_problems(objects: list[Object]) -> list[str]:
    """Settings that are unknown, that the process does not read, or that stop its start."""
    return [what for pod in pods(objects) if pod.role for what in pod_setting_problems(pod)]


def pod_setting_problems(pod: Pod) -> list[str]:
    """The same of one of our processes."""
    if pod.role not in _COMMANDS:
        return [f"{pod.name}: there is no command {pod.role}"]
    found = []
    try:
        settings_of(pod)
    except SettingsError as error:
        found.append(f"{pod.name}: {error}")
    if pod.env.get("RTS_REDIS_URL") is None:
        found.append(f"{pod.name}: there is no RTS_REDIS_URL")
    for spec in dataclasses.fields(Settings):
        if env_name(spec.name) in pod.env and pod.role not in spec.metadata["roles"]:
            found.append(f"{pod.name}: {pod.role} does not read {env_name(spec.name)}")
    return found


def settings_of(pod: Pod) -> Settings:
    """What a process will read.

    Raises:
        SettingsError: it would not start.
    """
    env = {}
    for key, value in pod.env.items():
        if isinstance(value, str):
            env[key] = value
        elif "secretKeyRef" in value:
            env[key] = "redis://:secret@redis:6379/0" if key == "RTS_REDIS_URL" else "secret"
        else:
            resource = value["resourceFieldRef"]["resource"]
            env[key] = pod.limit(resource.removeprefix("limits."))
    return Settings.load({key: text for key, text in env.items() if key.startswith("RTS_")})


def unknown_settings(text: str) -> set[str]:
    """Names in a text that look like settings and are none."""
    known = {env_name(spec.name) for spec in dataclasses.fields(Settings)}
    return set(re.findall(r"\bRTS_[A-Z0-9_]+\b", text)) - known


# Ending


def ending_problems(objects: list[Object]) -> list[str]:
    """Pods that would be killed before they have drained."""
    return [what for pod in pods(objects) if pod.role for what in pod_ending_problems(pod)]


def pod_ending_problems(pod: Pod) -> list[str]:
    """The same of one of our processes."""
    given = pod.spec.get("terminationGracePeriodSeconds", 30)
    needed = _ending_s(pod) + SPARE_S
    return [f"{pod.name}: needs {needed:g} s to end, and has {given}"] if given < needed else []


def _ending_s(pod: Pod) -> float:
    hook = pod.container.get("lifecycle", {}).get("preStop", {})
    hook_s = float(hook.get("sleep", {}).get("seconds", 0))
    assert not hook.keys() - {"sleep"}, "how long does it take?"
    settings = settings_of(pod)
    if pod.role == "gateway":
        # Streams that are cut off, connections, errands.
        last_s = 2 * LAST_STEPS_S + ERRANDS_S
        return hook_s + settings.drain_delay_s + settings.drain_grace_s + last_s
    if pod.role == "worker":
        # A take that is under way, signing off, giving streams back and signing off again, while
        # Redis may be away.
        return hook_s + settings.drain_grace_s + 4 * REDIS_TIMEOUT_S
    return hook_s + _CONTROL_S


# What listens where


@functools.cache
def routes() -> frozenset[tuple[str, str]]:
    """Method and path of all that a gateway serves."""
    nothing: Any = _Nothing()
    app = create_app(Settings(), store=cast(Store, nothing), hub=cast(Hub, nothing))
    return frozenset(
        (route.method, cast(web.Resource, route.resource).canonical)
        for route in app.router.routes()
        if route.resource is not None
    )


def serving_problems(objects: list[Object]) -> list[str]:
    """Probes, ports and paths that nothing of ours serves."""
    return [
        *_probe_problems(objects),
        *_service_problems(objects),
        *_route_problems(objects),
        *_policy_problems(objects),
    ]


_PROBES = {
    "gateway": {"startupProbe", "readinessProbe", "livenessProbe"},
    "StatefulSet/redis": {"startupProbe", "readinessProbe", "livenessProbe"},
    # A liveness probe would have to ask Redis, whose outage must not restart workers.
    "worker": {"startupProbe"},
    # Nobody waits for it, and it has nothing to load.
    "control": {"livenessProbe"},
}


def _probe_problems(objects: list[Object]) -> Iterator[str]:
    for pod in pods(objects):
        what = pod.role or pod.name
        for kind in sorted(_PROBES.get(what, set()) - pod.container.keys()):
            yield f"{pod.name}: has no {kind}"
        ports = _ports(pod)
        if pod.role == "gateway" and ports != {"http": settings_of(pod).port}:
            yield f"{pod.name}: does not listen on {ports}"
        if pod.role in ("control", "worker") and ports:
            yield f"{pod.name}: listens nowhere"
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = pod.container.get(kind, {})
            if "httpGet" in probe:
                path, port = probe["httpGet"]["path"], probe["httpGet"]["port"]
                if port not in ports or ("GET", path) not in routes():
                    yield f"{pod.name}: {kind}: nothing serves {path} on {port}"
            for word in probe.get("exec", {}).get("command", []):
                if word.endswith(".py") and word not in _mounted_files(objects, pod):
                    yield f"{pod.name}: {kind}: there is no {word}"


def _service_problems(objects: list[Object]) -> Iterator[str]:
    for service in of_kind(objects, "Service"):
        targets = selected(objects, {"matchLabels": service["spec"]["selector"]})
        for port in service["spec"]["ports"]:
            if not targets or any(port["targetPort"] not in _ports(pod) for pod in targets):
                yield f"{name(service)}: no pod has a port {port['targetPort']}"
    for monitor in of_kind(objects, "PodMonitor"):
        targets = selected(objects, monitor["spec"]["selector"])
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            served = ("GET", endpoint["path"]) in routes()
            if not served or not targets or any(endpoint["port"] not in _ports(p) for p in targets):
                yield f"{name(monitor)}: nothing serves {endpoint['path']} on {endpoint['port']}"


def _route_problems(objects: list[Object]) -> Iterator[str]:
    services = {
        item["metadata"]["name"]: item["spec"]["ports"] for item in of_kind(objects, "Service")
    }
    for ingress in of_kind(objects, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                yield from _path_problems(name(ingress), path["path"], path["pathType"] == "Exact")
                service = path["backend"]["service"]
                named = [port["name"] for port in services.get(service["name"], [])]
                if service["port"]["name"] not in named:
                    yield f"{name(ingress)}: there is no {service}"
    for route in of_kind(objects, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for match in rule["matches"]:
                exact = match["path"]["type"] == "Exact"
                yield from _path_problems(name(route), match["path"]["value"], exact)
            for backend in rule["backendRefs"]:
                numbers = [port["port"] for port in services.get(backend["name"], [])]
                if backend["port"] not in numbers:
                    yield f"{name(route)}: there is no {backend}"


def _path_problems(where: str, path: str, exact: bool) -> Iterator[str]:
    below = "" if exact else f"{path.rstrip('/')}/"
    paths = {served for _, served in routes()}
    hit = {served for served in paths if served == path or (below and served.startswith(below))}
    if not hit:
        yield f"{where}: nothing is served at {path}"
    if hit.intersection(PRIVATE):
        yield f"{where}: {path} lets outsiders read {sorted(hit.intersection(PRIVATE))}"


def _policy_problems(objects: list[Object]) -> Iterator[str]:
    ports = {str(key) for pod in pods(objects) for item in _ports(pod).items() for key in item}
    for policy in of_kind(objects, "NetworkPolicy"):
        if policy["spec"]["podSelector"] and not selected(objects, policy["spec"]["podSelector"]):
            yield f"{name(policy)}: selects nothing"
        for rule in policy["spec"].get("ingress", []):
            for port in rule.get("ports", []):
                if str(port["port"]) not in ports:
                    yield f"{name(policy)}: nothing listens on {port['port']}"


def _ports(pod: Pod) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in pod.container.get("ports", [])}


def _mounted_files(objects: list[Object], pod: Pod) -> set[str]:
    data = {item["metadata"]["name"]: item["data"] for item in of_kind(objects, "ConfigMap")}
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    return {
        f"{mount['mountPath']}/{file}"
        for mount in pod.container.get("volumeMounts", [])
        for file in data.get(volumes.get(mount["name"], {}).get("configMap", {}).get("name"), {})
    }


# Safety


def hardening_problems(objects: list[Object]) -> list[str]:
    """Rights that a pod does not need."""
    found = []
    for pod in pods(objects):
        spec, container = pod.spec, pod.container
        of_pod, of_container = spec.get("securityContext", {}), container.get("securityContext", {})
        limits = container["resources"].get("limits", {})
        good = {
            "no token": spec.get("automountServiceAccountToken") is False,
            "no service links": spec.get("enableServiceLinks") is False,
            "not root": of_pod.get("runAsNonRoot") is True and of_pod.get("runAsUser") == USER,
            "seccomp": of_pod.get("seccompProfile") == {"type": "RuntimeDefault"},
            "no escalation": of_container.get("allowPrivilegeEscalation") is False,
            "read-only root": of_container.get("readOnlyRootFilesystem") is True,
            "no capabilities": of_container.get("capabilities") == {"drop": ["ALL"]},
            "requests": {"cpu", "memory"} <= container["resources"].get("requests", {}).keys(),
            "limits": {"memory", "ephemeral-storage"} <= limits.keys(),
            "image": _is_ours(container["image"], pod.role),
        }
        found += [f"{pod.name}: {what}" for what, holds in good.items() if not holds]
        wanted = ["/tmp"] if pod.role else ["/data"]
        if "RTS_DATA_DIR" in pod.env:
            wanted += [str(settings_of(pod).data_dir), pod.env["HF_HOME"], pod.env["HOME"]]
        found += [f"{pod.name}: cannot write {w}" for w in wanted if not _is_writable(pod, w)]
    return found


def _is_ours(image: str, role: str) -> bool:
    base, _, tag = image.partition(":")
    return base in IMAGES[role] and tag not in ("", "latest")


def _is_writable(pod: Pod, path: str) -> bool:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    claimed = {
        item["metadata"]["name"] for item in pod.owner["spec"].get("volumeClaimTemplates", [])
    }
    for mount in pod.container.get("volumeMounts", []):
        inside = PurePosixPath(path).is_relative_to(mount["mountPath"])
        kinds = volumes.get(mount["name"], {}).keys() & {"emptyDir", "persistentVolumeClaim"}
        if inside and not mount.get("readOnly") and (kinds or mount["name"] in claimed):
            return True
    return False


# What belongs together


def reference_problems(objects: list[Object]) -> list[str]:
    """Names of what is not there, selectors that find nothing, pods without a budget."""
    there = {name(item) for item in objects}
    known = {
        item["metadata"]["name"]: {*item.get("data", {}), *item.get("stringData", {})}
        for item in of_kind(objects, "Secret")
    }
    found = []
    for pod in pods(objects):
        wanted = {
            f"ServiceAccount/{pod.spec['serviceAccountName']}",
            f"PriorityClass/{pod.spec['priorityClassName']}",
        }
        for volume in pod.spec.get("volumes", []):
            if "configMap" in volume:
                wanted.add(f"ConfigMap/{volume['configMap']['name']}")
            if "persistentVolumeClaim" in volume:
                wanted.add(f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}")
        refs = [v["secretKeyRef"] for v in pod.env.values() if "secretKeyRef" in v]
        secrets = {ref["name"] for ref in refs}
        found += [
            f"{pod.name}: Secret {ref['name']} has no {ref['key']}"
            for ref in refs
            if ref["key"] not in known.get(ref["name"], BY_HAND.get(ref["name"], set()))
        ]
        wanted |= {f"Secret/{secret}" for secret in secrets - BY_HAND.keys()}
        found += [f"{pod.name}: there is no {what}" for what in sorted(wanted - there)]
        if not pod.owner["spec"]["selector"]["matchLabels"].items() <= pod.labels.items():
            found.append(f"{pod.name}: does not select its pods")
        if selected(objects, pod.owner["spec"]["selector"]) != [pod]:
            found.append(f"{pod.name}: selects others' pods, too")
        if pod.role and not pod.spec.get("topologySpreadConstraints"):
            found.append(f"{pod.name}: may all be on one machine")
        for spread in pod.spec.get("topologySpreadConstraints", []):
            if selected(objects, spread["labelSelector"]) != [pod]:
                found.append(f"{pod.name}: is spread among others")
        budgets = of_kind(objects, "PodDisruptionBudget")
        covering = [b for b in budgets if pod in selected(objects, b["spec"]["selector"])]
        # With two, the API server refuses every eviction.
        if pod.role and len(covering) != 1:
            found.append(f"{pod.name}: has {len(covering)} PodDisruptionBudgets")
    for account in of_kind(objects, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            found.append(f"{name(account)}: mounts its token")
    for item in objects:
        spaced = item["kind"] not in ("Namespace", "PriorityClass")
        if spaced and item["metadata"].get("namespace") != NAMESPACE:
            found.append(f"{name(item)}: is in another namespace")
    return found


# Scaling and watching


@functools.cache
def metrics() -> dict[str, frozenset[str]]:
    """Every series that a gateway exports, and its labels."""
    nothing: Any = _Nothing()
    collector = Metrics(cast(Models, nothing), cast(Census, nothing), cast(Hub, nothing))
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return {
        f"{family.name}{suffix}": frozenset(getattr(family, "_labelnames", ()))
        for family in collector.collect()
        for suffix in suffixes[family.type]
    }


class _Nothing:
    """Stands for what is never asked: a gateway that knows no models, and no Redis."""

    gaps = recoveries = 0

    def served(self) -> list[Any]:
        return []


def query_problems(query: str) -> list[str]:
    """PromQL that is none, or asks for series or labels that no gateway exports."""
    try:
        selectors = list(_selectors(promql_parser.parse(query)))
    except ValueError as error:
        return [f"{query}: {error}"]
    found = []
    for selector in selectors:
        if selector.name == "up":
            continue
        if selector.name not in metrics():
            found.append(f"there is no series {selector.name}")
            continue
        labels = {matcher.name for matcher in selector.matchers.matchers}
        unknown = labels - metrics()[selector.name] - SCRAPED
        found += [f"{selector.name} has no label {label}" for label in sorted(unknown)]
        if "namespace" not in labels:
            found.append(f"{selector.name}: of every cluster that Prometheus watches")
    return found


def _selectors(node: Any) -> Iterator[Any]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    elif isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector
    elif isinstance(node, promql_parser.BinaryExpr):
        yield from _selectors(node.lhs)
        yield from _selectors(node.rhs)
    elif isinstance(node, promql_parser.AggregateExpr | promql_parser.ParenExpr):
        yield from _selectors(node.expr)
    elif isinstance(node, promql_parser.Call):
        for argument in node.args:
            yield from _selectors(argument)
    else:
        assert isinstance(node, promql_parser.NumberLiteral), node


def scaling_problems(objects: list[Object]) -> list[str]:
    """What scales nothing, scales by what does not exist, or is scaled by two."""
    found = []
    owners = {name(pod.owner): pod for pod in pods(objects)}
    for scaler in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]
        pod = owners.get(f"{target.get('kind', 'Deployment')}/{target['name']}")
        if pod is None:
            found.append(f"{name(scaler)}: there is no {target['name']}")
            continue
        if "replicas" in pod.owner["spec"]:
            found.append(f"{name(scaler)}: each apply would set the replicas of {pod.name}")
        for trigger in scaler["spec"].get("triggers", []):
            found += [f"{name(scaler)}: {text}" for text in _trigger_problems(trigger, pod)]
    return found


def _trigger_problems(trigger: Object, pod: Pod) -> Iterator[str]:
    metadata, settings = trigger["metadata"], settings_of(pod)
    yield from query_problems(metadata["query"])
    asked = set(re.findall(r"\brts_\w+", metadata["query"]))
    if asked != {"rts_num_requests_waiting", "rts_num_requests_running"}:
        yield "must count what waits and what runs"
    (model,) = settings.models()
    if pod.labels["realtime-ai-serve/model"] != model.name:
        yield f"{pod.name} serves {model.name} and is labelled otherwise"
    if set(re.findall(r'model_name="([^"]*)"', metadata["query"])) != {model.name}:
        yield f"does not ask for {model.name}, which {pod.name} serves"
    if set(re.findall(r'namespace="([^"]*)"', metadata["query"])) != {NAMESPACE}:
        yield "asks for another namespace"
    if not 0 < float(metadata["threshold"]) <= settings.max_batch_size:
        yield f"{metadata['threshold']} requests do not fit into a batch of {pod.name}"


def alert_problems(objects: list[Object]) -> list[str]:
    """Alerts that could never fire."""
    return [
        f"{rule['alert']}: {text}"
        for item in of_kind(objects, "PrometheusRule")
        for group in item["spec"]["groups"]
        for rule in group["rules"]
        for text in query_problems(rule["expr"])
    ]


ALL = (
    setting_problems,
    ending_problems,
    serving_problems,
    hardening_problems,
    reference_problems,
    scaling_problems,
    alert_problems,
)
