"""Which ways the network policies leave open, as Kubernetes adds them up."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator

from manifests import Object, Pod, of_kind, pods, selects

REDIS, DNS = 6379, 53
ANY = 9999
"""Nothing listens there."""
NAMES = {"kubernetes.io/metadata.name": "kube-system"}
CLIENTS = {"realtime-ai-serve/client": "true"}
"""Labels of the namespace that answers for names, and of one whose pods may come to gateways."""
ELSEWHERE = "203.0.113.9"
"""An address on the internet."""

Peer = Callable[[Object], bool]


def path_problems(objects: list[Object]) -> list[str]:
    """A way that is needed and closed, or open and not needed."""
    return [*_to_redis(objects), *_among_us(objects), *_to_others(objects)]


def _to_redis(objects: list[Object]) -> Iterator[str]:
    ours = [pod for pod in pods(objects) if pod.role]
    servers = [pod for pod in pods(objects) if not pod.role]
    for pod in ours:
        if not servers and not _leaves(objects, pod, REDIS, _address(ELSEWHERE)):
            yield f"{pod.name}: cannot reach a Redis that is elsewhere"
        for server in servers:
            leaves = _leaves(objects, pod, REDIS, _pod(server))
            if not (leaves and _enters(objects, server, REDIS, _pod(pod))):
                yield f"{pod.name}: cannot reach {server.name}"


def _among_us(objects: list[Object]) -> Iterator[str]:
    """Processes of ours meet in Redis alone."""
    for pod in pods(objects):
        for other in pods(objects):
            for port in other.container.get("ports", []):
                number = port["containerPort"]
                if other.role and _leaves(objects, pod, number, _pod(other)):
                    yield f"{pod.name}: may talk to {other.name}"


def _to_others(objects: list[Object]) -> Iterator[str]:
    for pod in pods(objects):
        if pod.role and not _leaves(objects, pod, DNS, _namespace(NAMES)):
            yield f"{pod.name}: cannot ask for names"
        for port in [item["containerPort"] for item in pod.container.get("ports", [])] or [ANY]:
            for labels, wanted in ((CLIENTS, pod.role == "gateway"), ({}, False)):
                if _enters(objects, pod, port, _namespace(labels)) != wanted:
                    yield f"{pod.name}: of namespaces with {labels}, pods {wanted=} at it"


def _leaves(objects: list[Object], pod: Pod, port: int, peer: Peer) -> bool:
    return _is_open(objects, pod, "Egress", "to", port, peer)


def _enters(objects: list[Object], pod: Pod, port: int, peer: Peer) -> bool:
    return _is_open(objects, pod, "Ingress", "from", port, peer)


def _is_open(objects: list[Object], pod: Pod, kind: str, side: str, port: int, peer: Peer) -> bool:
    """Whether any rule of any policy that selects the pod lets this peer; without one all may."""
    policies = [
        item["spec"]
        for item in of_kind(objects, "NetworkPolicy")
        if kind in item["spec"]["policyTypes"] and selects(item["spec"]["podSelector"], pod.labels)
    ]
    rules = [rule for policy in policies for rule in policy.get(kind.lower(), [])]
    return not policies or any(
        ("ports" not in rule or any(item["port"] == port for item in rule["ports"]))
        and (side not in rule or any(map(peer, rule[side])))
        for rule in rules
    )


def _pod(pod: Pod) -> Peer:
    """One of the same namespace."""
    return lambda rule: (
        "podSelector" in rule
        and "namespaceSelector" not in rule
        and selects(rule["podSelector"], pod.labels)
    )


def _namespace(labels: dict[str, str]) -> Peer:
    """Any of another namespace."""
    return lambda rule: (
        "namespaceSelector" in rule
        and "podSelector" not in rule
        and selects(rule["namespaceSelector"], labels)
    )


def _address(text: str) -> Peer:
    """One that is no pod."""
    address = ipaddress.ip_address(text)

    def holds(rule: Object) -> bool:
        if "ipBlock" not in rule:
            return False
        outside = [rule["ipBlock"]["cidr"], *rule["ipBlock"].get("except", [])]
        inside = [address in ipaddress.ip_network(network) for network in outside]
        return inside[0] and not any(inside[1:])

    return holds
