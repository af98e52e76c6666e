"""deploy/prometheus and deploy/grafana: rules that fire, queries that a real Prometheus answers."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster, free_port
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from required import needs

from realtime_serve import Client
from realtime_serve.lifeline import Lifeline

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/rules.yml"
K8S_RULES = ROOT / "deploy/k8s/components/monitoring/rules.yaml"
SCALED_OBJECT = ROOT / "deploy/k8s/components/worker-autoscaling/scaled-object.yaml"
PROVISIONING = ROOT / "deploy/grafana/provisioning"
DASHBOARD = PROVISIONING / "dashboards/realtime-ai-serve.json"


def _queries() -> list[str]:
    """Every query of the dashboard, as Grafana would send it with all models chosen."""
    board = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [query.replace("$model", ".*").replace("$__rate_interval", "20s") for query in found]


@pytest.mark.parametrize(
    "command",
    [("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")],
    ids=["config", "rules"],
)
def test_promtool_is_content(command: tuple[str, ...]) -> None:
    needs("promtool")
    done = subprocess.run(
        ["promtool", *command], cwd=RULES.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_has_a_test_in_which_it_fires() -> None:
    tests = yaml.safe_load((RULES.parent / "rules_test.yml").read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tests
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in _rules(RULES)}


def test_kubernetes_has_the_same_rules() -> None:
    ours, theirs = _rules(RULES), _rules(K8S_RULES)
    assert [_comparable(rule) for rule in ours] == [_comparable(rule) for rule in theirs]


def _rules(path: Path) -> list[dict[str, Any]]:
    found = yaml.safe_load(path.read_text())
    groups = found.get("spec", found)["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _comparable(rule: dict[str, Any]) -> list[Any]:
    """A rule without where its series come from, and without advice, which differs."""
    query = rule["expr"].replace('job="realtime-ai-serve"', "")
    query = query.replace('namespace="realtime-ai-serve", container="gateway"', "")
    query = re.sub(r'namespace="realtime-ai-serve"(, )?', "", query).replace("{}", "")
    summary = rule["annotations"]["summary"]
    return [rule["alert"], query, rule["for"], rule["labels"], summary]


class Prometheus:
    """A real one that scrapes gateways once a second.

    Attributes:
        gateway: URL of the first of them.
    """

    def __init__(self, folder: Path, targets: list[str], lifeline: Lifeline) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.gateway = f"http://{targets[0]}"
        config = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(RULES)]
        # In place of Docker's DNS.
        del config["scrape_configs"][0]["dns_sd_configs"]
        config["scrape_configs"][0]["static_configs"] = [{"targets": targets}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with (folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                lifeline.command(
                    [
                        "prometheus",
                        f"--config.file={folder / 'prometheus.yml'}",
                        f"--storage.tsdb.path={folder / 'data'}",
                        f"--web.listen-address={self.url.removeprefix('http://')}",
                    ]
                ),
                pass_fds=lifeline.fds,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def get(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(
            f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=5
        ) as reply:
            return json.loads(reply.read())["data"]

    def query(self, query: str) -> list[Any]:
        found: list[Any] = self.get("query", query=query)["result"]
        return found

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has seen a cluster of two gateways under some load."""
    needs("prometheus")
    folder = tmp_path_factory.mktemp("monitoring")
    with Cluster(folder) as cluster, Lifeline() as lifeline:
        cluster.up(gateways=2, workers=1)
        server = Prometheus(folder, [f"127.0.0.1:{port}" for port in cluster.ports], lifeline)
        try:
            _load(cluster, server)
            yield server
        finally:
            server.stop()


def _load(cluster: Cluster, server: Prometheus) -> None:
    """Streams through both gateways until a rate of what they count can be computed."""
    deadline = time.monotonic() + 50
    gateways = [f"http://127.0.0.1:{port}" for port in cluster.ports]
    while time.monotonic() < deadline:
        for gateway in gateways:
            with Client(gateway) as client:
                stream = client.stream("a", model="echo", max_tokens=20)
                assert len(list(stream)) == 20
        try:
            if len(server.query("rate(rts_generation_tokens_total[20s]) > 0")) == len(gateways):
                return
        except OSError:
            pass  # It is still starting.
        time.sleep(0.2)
    raise AssertionError("Prometheus has no data")


@pytest.mark.e2e
@pytest.mark.parametrize("query", _queries())
def test_query_of_the_dashboard_finds_data(prometheus: Prometheus, query: str) -> None:
    found = [float(series["value"][1]) for series in prometheus.query(query)]
    # A quantile of nothing is NaN, of each class that nobody used.
    assert any(math.isfinite(value) for value in found), (query, found)


def test_the_dashboard_has_what_operators_look_for() -> None:
    queries = " ".join(_queries())
    for wanted in (
        *("rts_queue_depth", "rts_queue_oldest_seconds", "rts_time_to_first_token_seconds"),
        *("rts_inter_token_latency_seconds", "rts_generation_tokens_total", "rts_workers"),
        *("finished_reason", "rts_rate_limited_total", "priority"),
    ):
        assert wanted in queries


def _unknown(written: Any, read: Any, path: str = "") -> list[str]:
    """Where something was written that is gone when Grafana's own types have read it."""
    if isinstance(written, dict):
        gone = [f"{path}.{key}" for key in written if key not in read]
        return gone + [
            what
            for key in written.keys() & read.keys()
            for what in _unknown(written[key], read[key], f"{path}.{key}")
        ]
    if isinstance(written, list):
        pairs = enumerate(zip(written, read, strict=True))
        return [what for i, (a, b) in pairs for what in _unknown(a, b, f"{path}[{i}]")]
    return [] if written == read else [path]


def _as_grafana_reads(board: Any) -> Any:
    register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(board)))


def test_the_dashboard_has_only_what_grafana_knows() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert _unknown(board, _as_grafana_reads(board)) == []
    panel = board["panels"][0]
    panel["options"]["legendd"] = panel["targets"][0]["exprr"] = board["no_such"] = 1
    panel["fieldConfig"]["defaults"]["custom"] = {"no_such": 1}
    assert len(_unknown(board, _as_grafana_reads(board))) == 4


def test_the_dashboard_asks_the_source_that_is_provisioned() -> None:
    (source,) = yaml.safe_load((PROVISIONING / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    board = json.loads(DASHBOARD.read_text())
    asked = [*board["templating"]["list"], *board["panels"]]
    asked += [target for panel in board["panels"] for target in panel["targets"]]
    wanted = {"type": source["type"], "uid": source["uid"]}
    assert all(each["datasource"] == wanted for each in asked)


@pytest.mark.e2e
def test_what_scales_workers_follows_what_there_is_to_do(prometheus: Prometheus) -> None:
    manifest = yaml.safe_load(SCALED_OBJECT.read_text())
    query = manifest["spec"]["triggers"][0]["metadata"]["query"]
    query = query.replace('namespace="realtime-ai-serve", model_name="chat"', 'model_name="echo"')

    def wait_for(wanted: float) -> None:
        deadline = time.monotonic() + 30
        while [float(series["value"][1]) for series in prometheus.query(query)] != [wanted]:
            assert time.monotonic() < deadline, prometheus.query(query)
            time.sleep(0.2)

    wait_for(0)
    with Client(prometheus.gateway) as client:
        streams = [client.stream("a", model="echo", max_tokens=3000) for _ in range(3)]
        for stream in streams:
            next(iter(stream))
        wait_for(3)
        for stream in streams:
            client.cancel(stream.request_id)
    wait_for(0)


@pytest.mark.e2e
def test_all_rules_are_loaded_and_healthy(prometheus: Prometheus) -> None:
    deadline = time.monotonic() + 10
    while True:
        [group] = prometheus.get("rules")["groups"]
        states = {rule["name"]: (rule["health"], rule["state"]) for rule in group["rules"]}
        if "unknown" not in {health for health, _ in states.values()}:
            break
        assert time.monotonic() < deadline, states
        time.sleep(0.2)
    assert set(states.values()) == {("ok", "inactive")}
    assert set(states) == {rule["alert"] for rule in _rules(RULES)}
