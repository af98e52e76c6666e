"""deploy/k8s as kustomize renders it: valid, safe, and of one mind with the code.

Each rule is also shown what it is there to find, or it might find nothing for ever.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paths
import pytest
import redis
import rules
import schemas
import yaml
from cluster import free_port
from gateway_site import Site, open_site, until
from manifests import (
    FOLDER,
    OVERLAYS,
    ROOT,
    Object,
    of_component,
    of_kind,
    overlay_objects,
    pod,
    pods,
    rendered,
)
from prometheus_client.parser import text_string_to_metric_families
from required import server_program

from realtime_serve.redis_server import RedisServer, ServerBinary, find_binary
from shared import keys
from shared.access import acl_file
from shared.settings import Settings

ALL = (*OVERLAYS, "second-model", "ingress")
KUSTOMIZATIONS = sorted(
    path.parent
    for path in FOLDER.rglob("kustomization.yaml")
    if "kind: Kustomization" in path.read_text()
)


@pytest.mark.parametrize("version", schemas.VERSIONS)
@pytest.mark.parametrize("overlay", ALL)
def test_valid(overlay: str, version: str) -> None:
    found = [text for item in overlay_objects(overlay) for text in schemas.problems(item, version)]
    assert found == []


RULES = (*rules.ALL, paths.path_problems)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.__name__))
@pytest.mark.parametrize("overlay", ALL)
def test_rule_holds(overlay: str, rule: Callable[[list[Object]], list[str]]) -> None:
    assert rule(overlay_objects(overlay)) == []


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_kustomization_renders(folder: Path) -> None:
    assert rendered(folder)


def test_every_component_is_part_of_an_overlay_that_is_checked() -> None:
    used = {
        Path(component).name
        for folder in KUSTOMIZATIONS
        for component in yaml.safe_load((folder / "kustomization.yaml").read_text()).get(
            "components", []
        )
    }
    # There is one way in for a cluster; test_rule_holds adds the other one to an overlay.
    assert used | {"ingress"} == {path.name for path in (FOLDER / "components").iterdir()}


def test_what_must_be_there() -> None:
    kinds = {overlay: {item["kind"] for item in overlay_objects(overlay)} for overlay in ALL}
    everywhere = {
        *("Namespace", "ServiceAccount", "PriorityClass", "NetworkPolicy", "Deployment", "Service"),
        *("PodDisruptionBudget", "ConfigMap"),
    }
    assert all(everywhere <= found for found in kinds.values())
    assert {"HorizontalPodAutoscaler", "ScaledObject", "PodMonitor", "PrometheusRule"} < kinds[
        "production"
    ]
    assert {"HTTPRoute", "Gateway", "PersistentVolumeClaim"} < kinds["production"]
    assert "Ingress" in kinds["ingress"]
    for overlay in ("cpu", "gpu", "local"):
        assert "StatefulSet" in kinds[overlay]
    for overlay in ("gpu", "production"):
        worker = pod(overlay_objects(overlay), "worker")
        assert worker.limit("nvidia.com/gpu") == "1"
        assert worker.container["image"].startswith("realtime-ai-serve-worker-cuda:")


def test_every_role_is_deployed_in_every_overlay() -> None:
    for overlay in OVERLAYS:
        roles = {pod.role for pod in pods(overlay_objects(overlay))}
        assert roles - {""} == {"gateway", "control", "worker"}


def test_secrets_are_not_in_the_repository() -> None:
    secrets = {o: of_kind(overlay_objects(o), "Secret") for o in OVERLAYS}
    assert not any(secrets[overlay] for overlay in OVERLAYS if overlay != "local")
    (local,) = secrets["local"]
    values = [base64.b64decode(value).decode() for value in local["data"].values()]
    assert set(values) == {"local", "redis://:local@redis:6379/0"}


def _files() -> list[Path]:
    files = [path for path in FOLDER.rglob("*") if path.suffix in (".yaml", ".conf", ".py")]
    deploy = (path for path in (ROOT / "deploy").glob("*/*") if path.is_file())
    pages = [ROOT / "README.md", ROOT / "docker-compose.yml", *(ROOT / "docs").glob("*.md")]
    return sorted({*files, *deploy, *pages})


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_setting_that_a_file_names_exists(path: Path) -> None:
    assert rules.unknown_settings(path.read_text()) == set()


def test_the_page_names_what_there_is() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    for part in ("overlays", "components", "examples"):
        for folder in (FOLDER / part).iterdir():
            assert f"{part}/{folder.name}" in page, folder
    for path in re.findall(r"deploy/k8s/[\w/.-]*\w", page):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page):
        assert (ROOT / "docs" / link).exists(), link


def test_the_way_in_waits_as_long_as_an_answer_may_take() -> None:
    (ingress,) = of_kind(of_component("ingress"), "Ingress")
    said = ingress["metadata"]["annotations"]
    settings = Settings()
    nginx = "nginx.ingress.kubernetes.io"
    assert said[f"{nginx}/proxy-buffering"] == "off"
    assert int(said[f"{nginx}/proxy-read-timeout"]) > settings.timeout_s > settings.keep_alive_s
    assert int(said[f"{nginx}/proxy-body-size"].removesuffix("m")) << 20 > settings.max_body_bytes
    assert int(said["haproxy.org/timeout-server"].removesuffix("s")) > settings.timeout_s
    assert said["haproxy.org/backend-config-snippet"] == "option http-no-delay"
    # What a gateway refuses goes to another one, as with the nginx of deploy/nginx.
    again = re.search(r"proxy_next_upstream (.*);", (ROOT / "deploy/nginx/nginx.conf").read_text())
    assert again is not None
    assert said[f"{nginx}/proxy-next-upstream"] == again[1]
    assert said[f"{nginx}/proxy-next-upstream-tries"] == "2"
    (route,) = of_kind(of_component("gateway-api"), "HTTPRoute")
    (rule,) = route["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}


def test_both_ways_in_are_for_the_same_paths() -> None:
    (ingress,) = of_kind(of_component("ingress"), "Ingress")
    (route,) = of_kind(of_component("gateway-api"), "HTTPRoute")
    of_ingress = {path["path"] for path in ingress["spec"]["rules"][0]["http"]["paths"]}
    of_route = {match["path"]["value"] for match in route["spec"]["rules"][0]["matches"]}
    assert of_ingress == of_route


# Redis, and the probe that asks it


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    binary, _ = find_binary()
    with RedisServer.start(binary, tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["valkey", "redis"])
def binary(request: pytest.FixtureRequest) -> ServerBinary:
    return server_program(request.param)


def test_a_server_takes_the_configuration(tmp_path: Path, binary: ServerBinary) -> None:
    with _container(tmp_path, binary) as port, _client(port, "p") as client:
        said = client.config_get(
            *("appendonly", "maxmemory", "maxmemory-policy", "client-output-buffer-limit")
        )
        with pytest.raises(redis.AuthenticationError), _client(port, "") as other:
            other.ping()
    assert (said["appendonly"], said["maxmemory-policy"]) == ("yes", "noeviction")
    assert "pubsub 268435456" in said["client-output-buffer-limit"]
    limit = pod(overlay_objects("cpu"), "redis").limit("memory")
    assert limit.endswith("Gi")
    assert 2 * int(said["maxmemory"]) <= int(limit.removesuffix("Gi")) << 30


def test_a_server_takes_a_user_for_each_role(tmp_path: Path, binary: ServerBinary) -> None:
    """As docs/kubernetes.md has it: `default`, which the probes are, keeps the old password."""
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "users.acl").write_text(acl_file({"gateway": "g"}, admin="p"))
    with _container(tmp_path, binary) as port, _client(port, "p") as client:
        assert client.acl_users() == ["default", "gateway"]
        with _client(port, "g", username="gateway") as gateway:
            assert gateway.ping()
            with pytest.raises(redis.exceptions.NoPermissionError):
                gateway.flushall()


@contextlib.contextmanager
def _container(folder: Path, binary: ServerBinary) -> Iterator[int]:
    """Runs what the container of the StatefulSet would; only folders and its address are others."""
    port = free_port()
    shell, option, script = pod(overlay_objects("cpu"), "redis").container["command"]
    for old, new in (
        ("valkey-server ", f"{binary.path} "),
        ("/etc/valkey/", f"{FOLDER}/components/redis/"),
        ("/etc/valkey-users/", f"{folder}/users/"),
        ("--dir /data", f"--dir {folder} --port {port} --bind 127.0.0.1"),
    ):
        assert old in script
        script = script.replace(old, new)
    with subprocess.Popen(
        [shell, option, script],
        env={"REDISCLI_AUTH": "p", "PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if "Ready to accept connections" in line:
                    break
            assert process.poll() is None, "".join(said)
            arguments = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
            assert arguments[0].startswith(str(binary.path)), "signals are the server's"
            assert not {"p", "requirepass"}.intersection(arguments)
            yield port
        finally:
            process.terminate()


def _client(port: int, password: str, **more: Any) -> redis.Redis:
    return redis.Redis(port=port, password=password, decode_responses=True, **more)


@pytest.mark.parametrize("kind", ["readinessProbe", "livenessProbe"])
def test_a_server_whose_disk_is_full_is_not_killed(tmp_path: Path, kind: str) -> None:
    """It answers, and goes on reading; killed, it would lose what it could not write."""
    probe = pod(overlay_objects("cpu"), "redis").container[kind]["exec"]["command"]

    def passes(answer: str) -> bool:
        cli = tmp_path / "valkey-cli"
        cli.write_text(f"#!/bin/sh\necho '{answer}'\n")
        cli.chmod(0o755)
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.run(probe, env=env, check=False).returncode == 0

    assert passes("PONG")
    assert passes("MISCONF Errors writing to the AOF file: No space left on device")
    assert not passes("LOADING Valkey is loading the dataset in memory")
    assert not passes("Could not connect to Valkey at 127.0.0.1:6379: Connection refused")


def test_the_probe_is_true_while_an_engine_of_this_host_listens(server: RedisServer) -> None:
    probe = _module(FOLDER / "base" / "worker" / "loaded.py")
    client = redis.Redis.from_url(server.url)

    def ask(host: str) -> bool:
        return bool(asyncio.run(probe.is_listening(server.url, host)))

    with client, client.pubsub() as engine:
        assert not ask("worker-7b-x2")
        engine.subscribe(keys.control_channel("worker-7b-x2-17-a1b2c3"))
        assert engine.get_message(timeout=5)
        assert ask("worker-7b-x2")
        assert not ask("worker-7b-x")
        engine.unsubscribe()
        assert engine.get_message(timeout=5)
        assert not ask("worker-7b-x2")


async def test_a_request_wakes_workers_and_keeps_them_until_it_ends(server: RedisServer) -> None:
    async with open_site(server.url) as site:
        worker = site.worker
        worker.room = 0
        worker.beating = False
        await site.store.depart(worker.mv, worker.engine)
        await until(lambda: _has(site, {"rts_workers": 0.0, **_WORK, "demand": 0.0}))
        body = {"model": "echo", "prompt": "a", "max_tokens": 3}
        asked = asyncio.create_task(site.post("/infer", body))
        await until(
            lambda: _has(site, {"rts_workers": 0.0, "rts_num_requests_waiting": 1.0, "demand": 1.0})
        )
        worker.frozen, worker.room = True, 1
        await until(lambda: _has(site, {"rts_num_requests_running": 1.0, "demand": 1.0}))
        worker.frozen = False
        assert (await asked)[0] == 200
        await until(lambda: _has(site, {**_WORK, "demand": 0.0}))


async def test_of_a_model_that_nobody_knows_there_is_no_number(server: RedisServer) -> None:
    """So KEDA sees an error, not a zero, and its fallback starts a worker."""
    async with open_site(server.url) as site:
        site.worker.room = 0
        assert "demand" in await _numbers(site)
        assert "demand" not in await _numbers(site, "another")


_WORK = {"rts_num_requests_waiting": 0.0, "rts_num_requests_running": 0.0}


async def _has(site: Site, wanted: dict[str, float]) -> bool:
    return wanted.items() <= (await _numbers(site)).items()


async def _numbers(site: Site, model: str = "echo") -> dict[str, float]:
    """Sums over the priorities of a model's gauges; `demand` is what the ScaledObject asks for."""
    # Now, not within the next second.
    await site.edge.census.refresh([served.mv for served in site.edge.models.served()])
    _, text, _ = await site.get("/metrics")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if family.type == "gauge" and sample.labels.get("model_name") == model:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    if _WORK.keys() <= found.keys():
        found["demand"] = sum(found[name] for name in _WORK)
    return found


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What the rules are there to find


def _set_env(objects: list[Object], wanted: str, key: str, value: str | None) -> None:
    env = pod(objects, wanted).container["env"]
    env[:] = [item for item in env if item["name"] != key]
    if value is not None:
        env.append({"name": key, "value": value})


def _query(objects: list[Object], old: str, new: str) -> None:
    (scaled,) = of_kind(objects, "ScaledObject")
    metadata = scaled["spec"]["triggers"][0]["metadata"]
    assert old in metadata["query"]
    metadata["query"] = metadata["query"].replace(old, new)


def _first(objects: list[Object], kind: str) -> Object:
    return of_kind(objects, kind)[0]["spec"]


def _part_of(objects: list[Object], wanted: str, key: str) -> Object:
    found: Object = pod(objects, wanted).container[key]
    return found


Change = Callable[[list[Object]], Any]


def _drop_policy(objects: list[Object], which: str) -> None:
    objects[:] = [
        o for o in objects if (o["kind"], o["metadata"]["name"]) != ("NetworkPolicy", which)
    ]


def _policy(objects: list[Object], which: str) -> Any:
    (found,) = [o for o in of_kind(objects, "NetworkPolicy") if o["metadata"]["name"] == which]
    return found["spec"]


FAULTS: list[tuple[str, Change, str]] = [
    ("path_problems", lambda o: _drop_policy(o, "redis-clients"), "worker: cannot reach a Redis"),
    ("path_problems", lambda o: _drop_policy(o, "dns"), "control: cannot ask for names"),
    ("path_problems", lambda o: _drop_policy(o, "gateway"), "gateway: of namespaces"),
    ("path_problems", lambda o: _drop_policy(o, "default-deny"), "pods wanted=False"),
    (
        "path_problems",
        lambda o: _policy(o, "gateway")["ingress"][0]["from"][1]["namespaceSelector"].clear(),
        "of namespaces with {}",
    ),
    (
        "path_problems",
        lambda o: _policy(o, "redis-clients")["egress"].append({}),
        "worker: may talk to Deployment/gateway",
    ),
    (
        "setting_problems",
        lambda o: _set_env(o, "gateway", "RTS_DRAIN_DELAY", "3"),
        "unknown environment variable; did you mean RTS_DRAIN_DELAY_S?",
    ),
    ("setting_problems", lambda o: _set_env(o, "gateway", "RTS_PORT", "http"), "RTS_PORT=http"),
    ("setting_problems", lambda o: _set_env(o, "gateway", "RTS_ALLOW_ANONYMOUS", None), "RTS_HOST"),
    ("setting_problems", lambda o: _set_env(o, "control", "RTS_PORT", "1"), "does not read"),
    (
        "setting_problems",
        lambda o: _set_env(o, "worker", "RTS_REDIS_URL", None),
        "no RTS_REDIS_URL",
    ),
    (
        "setting_problems",
        lambda o: _part_of(o, "worker", "command").__setitem__(1, "wroker"),
        "no command wroker",
    ),
    ("ending_problems", lambda o: _set_env(o, "worker", "RTS_DRAIN_GRACE_S", "85"), "has 90"),
    ("ending_problems", lambda o: _set_env(o, "gateway", "RTS_DRAIN_DELAY_S", "60"), "has 180"),
    (
        "ending_problems",
        lambda o: pod(o, "gateway").container.update(
            lifecycle={"preStop": {"sleep": {"seconds": 60}}}
        ),
        "has 180",
    ),
    (
        "ending_problems",
        lambda o: pod(o, "gateway").spec.pop("terminationGracePeriodSeconds"),
        "30",
    ),
    (
        "serving_problems",
        lambda o: _part_of(o, "gateway", "readinessProbe")["httpGet"].update(path="/ready"),
        "nothing serves /ready",
    ),
    (
        "serving_problems",
        lambda o: _part_of(o, "gateway", "livenessProbe")["httpGet"].update(port="web"),
        "nothing serves /livez on web",
    ),
    *(
        (
            "serving_problems",
            lambda o, who=who, kind=kind: pod(o, who).container.pop(kind),
            f"has no {kind}",
        )
        for who, kind in (
            ("gateway", "startupProbe"),
            ("worker", "startupProbe"),
            ("control", "livenessProbe"),
        )
    ),
    (
        "reference_problems",
        lambda o: pod(o, "gateway").spec.pop("topologySpreadConstraints"),
        "gateway: may all be on one machine",
    ),
    ("serving_problems", lambda o: _set_env(o, "gateway", "RTS_PORT", "8001"), "not listen"),
    (
        "serving_problems",
        lambda o: _part_of(o, "worker", "startupProbe")["exec"].update(command=["python", "/a.py"]),
        "there is no /a.py",
    ),
    (
        "serving_problems",
        lambda o: _first(o, "Service")["ports"][0].update(targetPort="web"),
        "no pod has a port web",
    ),
    (
        "serving_problems",
        lambda o: _first(o, "Service")["selector"].update(app="x"),
        "no pod has a port",
    ),
    (
        "serving_problems",
        lambda o: _first(o, "PodMonitor")["podMetricsEndpoints"][0].update(path="/metric"),
        "nothing serves /metric",
    ),
    (
        "serving_problems",
        lambda o: _first(o, "HTTPRoute")["rules"][0]["matches"][0]["path"].update(value="/v2"),
        "nothing is served at /v2",
    ),
    (
        "serving_problems",
        lambda o: _first(o, "HTTPRoute")["rules"][0]["matches"][0]["path"].update(value="/"),
        "lets outsiders read",
    ),
    (
        "serving_problems",
        lambda o: _first(o, "HTTPRoute")["rules"][0]["backendRefs"][0].update(port=8000),
        "there is no",
    ),
    (
        "reference_problems",
        lambda o: pod(o, "control").env["RTS_REDIS_URL"]["secretKeyRef"].update(key="control-uri"),
        "Secret redis has no control-uri",
    ),
    (
        "hardening_problems",
        lambda o: _part_of(o, "worker", "securityContext").update(readOnlyRootFilesystem=False),
        "read-only root",
    ),
    (
        "hardening_problems",
        lambda o: pod(o, "control").spec.update(automountServiceAccountToken=True),
        "no token",
    ),
    ("hardening_problems", lambda o: pod(o, "gateway").spec.pop("enableServiceLinks"), "links"),
    (
        "hardening_problems",
        lambda o: pod(o, "gateway").container.update(image="realtime-ai-serve-gateway"),
        "image",
    ),
    (
        "hardening_problems",
        lambda o: _set_env(o, "worker", "RTS_DATA_DIR", "/models"),
        "cannot write /models",
    ),
    (
        "reference_problems",
        lambda o: pod(o, "worker").spec.update(serviceAccountName="x"),
        "no ServiceAccount/x",
    ),
    (
        "reference_problems",
        lambda o: _first(o, "PodDisruptionBudget")["selector"]["matchLabels"].update(x="y"),
        "has 0 PodDisruptionBudgets",
    ),
    ("reference_problems", lambda o: pod(o, "worker").labels.clear(), "does not select its pods"),
    (
        "reference_problems",
        lambda o: _first(o, "PodDisruptionBudget")["selector"].clear(),
        "has 2 PodDisruptionBudgets",
    ),
    (
        "scaling_problems",
        lambda o: pod(o, "worker").owner["spec"].update(replicas=1),
        "each apply would set the replicas",
    ),
    ("scaling_problems", lambda o: _query(o, '"chat"', '"chta"'), "does not ask for chat"),
    (
        "scaling_problems",
        lambda o: _query(o, "rts_num_requests_running", "rts_running"),
        "there is no series rts_running",
    ),
    ("scaling_problems", lambda o: _query(o, "model_name", "model"), "has no label model"),
    ("scaling_problems", lambda o: _query(o, "sum(", "sum(("), "sum(("),
    ("scaling_problems", lambda o: _set_env(o, "worker", "RTS_MAX_BATCH_SIZE", "8"), "fit into"),
    (
        "scaling_problems",
        lambda o: _first(o, "ScaledObject")["scaleTargetRef"].update(name="wroker"),
        "there is no wroker",
    ),
    (
        "alert_problems",
        lambda o: _first(o, "PrometheusRule")["groups"][0]["rules"][1].update(
            expr='rts_dead_letters{namespace="x"} > 0'
        ),
        "there is no series rts_dead_letters",
    ),
    (
        "alert_problems",
        lambda o: _first(o, "PrometheusRule")["groups"][0]["rules"][1].update(
            expr="rts_workers == 0"
        ),
        "of every cluster",
    ),
]


@pytest.mark.parametrize(("rule", "change", "told"), FAULTS)
def test_rule_finds(rule: str, change: Change, told: str) -> None:
    objects = overlay_objects("production")
    change(objects)
    (check,) = [found for found in RULES if found.__name__ == rule]
    found = check(objects)
    assert any(told in text for text in found), found


def test_a_redis_without_a_probe_is_found() -> None:
    objects = overlay_objects("cpu")
    assert not rules.serving_problems(objects)
    del pod(objects, "redis").container["livenessProbe"]
    assert rules.serving_problems(objects) == ["StatefulSet/redis: has no livenessProbe"]


@pytest.mark.parametrize("version", schemas.VERSIONS)
@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Deployment", "spec.template.spec"),
        ("Deployment", "spec.template.spec.containers.0.securityContext"),
        ("NetworkPolicy", "spec"),
        ("PodDisruptionBudget", "spec"),
        ("HorizontalPodAutoscaler", "spec.behavior.scaleDown"),
        ("PersistentVolumeClaim", "spec"),
        ("PriorityClass", ""),
        ("ScaledObject", "spec"),
        ("ScaledObject", "spec.triggers.0"),
        ("ScaledObject", "spec.advanced.horizontalPodAutoscalerConfig.behavior.scaleUp"),
        ("PodMonitor", "spec.podMetricsEndpoints.0"),
        ("PrometheusRule", "spec.groups.0.rules.0"),
        ("HTTPRoute", "spec.rules.0.timeouts"),
        ("Gateway", "spec.listeners.0"),
    ],
)
def test_an_unknown_field_is_found(kind: str, path: str, version: str) -> None:
    item = of_kind(overlay_objects("production"), kind)[0]
    assert schemas.problems(item, version) == []
    where: Any = item
    for part in filter(None, path.split(".")):
        where = where[int(part) if part.isdigit() else part]
    where["misspelt"] = 1
    (found,) = schemas.problems(item, version)
    assert "misspelt" in found


def test_a_kind_that_does_not_exist_is_found() -> None:
    item = overlay_objects("cpu")[0] | {"apiVersion": "policy/v1beta1", "kind": "PodSecurityPolicy"}
    (found,) = schemas.problems(item, schemas.VERSIONS[0])
    assert "there is no" in found


def test_a_misspelt_setting_in_a_text_is_found() -> None:
    assert rules.unknown_settings("RTS_REDIS_URL and RTS_REDIS_ULR") == {"RTS_REDIS_ULR"}
