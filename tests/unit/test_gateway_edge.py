"""Callers, headers, limits, errors, metrics: the small parts of the gateway."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from prometheus_client import CollectorRegistry, generate_latest

from gateway import errors
from gateway.callers import Callers
from gateway.census import Census
from gateway.headers import read_label, read_last_event_id, read_terms
from gateway.limits import limit_headers
from gateway.metrics import Distribution, Meter, Metrics, Series
from gateway.openapi import describe_api
from shared import messages
from shared.errors import InvalidRequest, RtsError, StoreUnavailable
from shared.settings import Settings
from shared.store import Limited


def request_from(peer: str | None, path: str = "/", **headers: str) -> Any:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    request = make_mocked_request("GET", path, headers=sent)
    transport: Any = request.transport
    transport.get_extra_info.side_effect = None
    transport.get_extra_info.return_value = (peer, 1234) if peer else ""
    return request


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "expected"),
    [
        ("", "1.2.3.4", "9.9.9.9", "1.2.3.4"),
        ("10.0.0.0/8", "1.2.3.4", "9.9.9.9", "1.2.3.4"),
        ("10.0.0.0/8", "10.0.0.1", "9.9.9.9", "9.9.9.9"),
        ("10.0.0.0/8", "10.0.0.1", "8.8.8.8, 9.9.9.9", "9.9.9.9"),
        ("10.0.0.0/8", "10.0.0.1", "8.8.8.8, 9.9.9.9, 10.0.0.2", "9.9.9.9"),
        ("10.0.0.0/8", "10.0.0.1", "evil, 10.0.0.2", "10.0.0.2"),
        ("10.0.0.0/8", "10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.0/8,::1", "::1", "2001:db8::1", "2001:db8::1"),
        ("::1", None, "9.9.9.9", "local"),
    ],
)
def test_whose_address_counts(
    trusted: str, peer: str | None, forwarded: str, expected: str
) -> None:
    callers = Callers(trusted)
    request = request_from(peer, X_Forwarded_For=forwarded)
    assert callers.caller(request) == f"ip:{expected}"


def test_a_name_goes_before_the_address_and_cannot_be_taken_for_one() -> None:
    callers = Callers("")
    request = request_from("1.2.3.4", "/?client_id=b", X_Client_Id="c")
    assert callers.caller(request, "a") == "id:a"
    assert callers.caller(request) == "id:b"
    assert callers.caller(request_from("1.2.3.4", X_Client_Id="c")) == "id:c"
    assert callers.caller(request_from("1.2.3.4", X_Client_Id="ip:9.9.9.9")) == "id:ip:9.9.9.9"
    for bad in ("", "x" * 129, "a\nb", "\x7f"):
        with pytest.raises(InvalidRequest, match="client_id"):
            callers.caller(request, bad)


def test_headers_of_a_request() -> None:
    settings = Settings(redis_url="unix:///x", timeout_s=10, max_grace_s=20)
    terms = read_terms(request_from("1.1.1.1"), settings)
    assert (terms.grace_s, terms.timeout_s, terms.idempotency_key) == (None, None, None)
    given = request_from(
        "1.1.1.1", X_Resumable="20", X_Timeout_S="2.5", Idempotency_Key="k", traceparent="no"
    )
    terms = read_terms(given, settings)
    assert (terms.grace_s, terms.timeout_s, terms.idempotency_key) == (20, 2.5, "k")
    assert terms.traceparent == ""
    assert not terms.queue_status
    assert read_terms(request_from("1.1.1.1", X_Queue_Status="1"), settings).queue_status
    for name in ("X-Resumable", "X-Timeout-S"):
        for bad in ("21", "0", "-1", "nan", "1e1", " ", "1,2"):
            with pytest.raises(InvalidRequest, match=name):
                read_terms(make_mocked_request("GET", "/", headers={name: bad}), settings)
    assert read_label(request_from("1.1.1.1", X_Request_Id="a-b:1")) == "a-b:1"
    assert read_label(request_from("1.1.1.1", X_Request_Id="a b")) == ""
    assert read_last_event_id(request_from("1.1.1.1")) is None
    assert read_last_event_id(request_from("1.1.1.1", Last_Event_ID="")) is None
    assert read_last_event_id(request_from("1.1.1.1", Last_Event_ID="12")) == 12


def test_limit_headers() -> None:
    settings = Settings(redis_url="unix:///x", requests_per_minute=60, tokens_per_minute=1000)
    headers = limit_headers(settings, Limited("", 59, 900, 0, 1000, 6001))
    assert headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1.000s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "900",
        "x-ratelimit-reset-tokens": "6.001s",
        "RateLimit-Policy": '"requests";q=60;w=60, "tokens";q=1000;w=60',
        "RateLimit": '"requests";r=59;t=1, "tokens";r=900;t=7',
    }
    assert limit_headers(Settings(redis_url="unix:///x"), Limited("", 0, 0, 0, 0, 0)) == {}


def test_a_refusal_says_when_to_come_again() -> None:
    problem = errors.describe(errors.RateLimited("tokens", 1500, {"x": "y"}))
    assert problem.status == 429
    assert problem.headers == {"x": "y", "Retry-After": "2", "retry-after-ms": "1500"}
    assert problem.body()["error"]["type"] == "tokens"
    for error in (
        StoreUnavailable("x"),
        errors.QueueFull("x"),
        errors.Draining("x"),
        errors.TooManyConnections("x"),
        errors.ModelNotReady("x"),
    ):
        problem = errors.describe(error)
        assert problem.status == 503
        assert problem.headers["Retry-After"] == "1"


def test_clients_do_not_learn_where_redis_is() -> None:
    problem = errors.describe(StoreUnavailable("ConnectionError: /run/secret.sock"))
    assert (problem.status, problem.code) == (503, "store_unavailable")
    assert "secret" not in problem.message


def test_every_error_has_a_status_and_our_insides_stay_inside() -> None:
    for cls in RtsError.__subclasses__():
        if cls.__module__.startswith("gateway"):
            known = cls is errors.StreamFailed or cls in errors._STATUS
            assert known, cls
    problem = errors.describe(ValueError("/secret/path"))
    assert (problem.status, problem.code) == (500, "internal_error")
    assert "secret" not in problem.message


def test_a_distribution_is_a_histogram() -> None:
    found = Distribution((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 5.0):
        found.observe(value)
    assert found.buckets() == [("0.1", 2.0), ("1.0", 3.0), ("+Inf", 4.0)]
    assert found.total == pytest.approx(5.65)


def test_a_meter_measures_one_stream() -> None:
    series: Series = Series()
    window: deque[Any] = deque()
    meter = Meter(series, window, started=10.0, prompt_tokens=7)
    meter.count(10.5, 1)
    meter.count(10.6, 2)
    meter.end(11.0, messages.End(1, "stop", timings={"queue": 250.0}), 3)
    assert series.first_token.total == pytest.approx(0.5)
    assert series.inter_token.total == pytest.approx(0.05)
    assert series.end_to_end.total == pytest.approx(1.0)
    assert series.queue_time.total == pytest.approx(0.25)
    assert (series.prompt_tokens, series.generated_tokens) == (7, 3)
    assert series.ended == {"stop": 1}
    assert window[0].tokens == 3


def test_a_meter_of_a_resumed_stream_measures_its_end() -> None:
    series: Series = Series()
    window: deque[Any] = deque()
    meter = Meter(series, window, started=10.0, prompt_tokens=7, resumed=True)
    meter.count(10.5, 1)
    timings = {"queue": 250.0, "prefill": 250.0, "decode": 1500.0}
    meter.end(11.0, messages.End(1, "stop", timings=timings), 9)
    assert series.ended == {"stop": 1}
    assert (series.generated_tokens, series.prompt_tokens) == (0, 0)
    assert series.end_to_end.total == 2.0
    assert (window[0].total_s, window[0].tokens) == (2.0, 9)


def test_the_expected_wait_is_by_the_latest_pace() -> None:
    store: Any = None
    census = Census(store)
    assert census.eta_s("m@v", "high", 4) is None
    census._heads["m@v", "high"] = deque([(0.0, 100), (10.0, 120)])
    assert census.eta_s("m@v", "high", 4) == 2.0
    census._heads["m@v", "high"] = deque([(0.0, 100), (10.0, 100)])
    assert census.eta_s("m@v", "high", 4) is None


def make_metrics() -> Metrics:
    models: Any = SimpleNamespace(served=list)
    census: Any = SimpleNamespace()
    hub: Any = SimpleNamespace(gaps=3, recoveries=2)
    return Metrics(models, census, hub)


def test_the_summary_is_of_the_last_minute() -> None:
    metrics = make_metrics()
    for i in range(100):
        meter = metrics.meter("m", "normal", float(i), 1)
        meter.count(i + 0.5, 10)
        meter.end(i + 1.0, messages.End(1, "error" if i % 10 == 0 else "stop"), 10)
    assert metrics.summary(100.0) == {
        "m": {
            "p50": 1000.0,
            "p95": 1000.0,
            "p99": 1000.0,
            "throughput": pytest.approx(10.167),
            "requests_per_s": pytest.approx(1.017),
            "error_rate": pytest.approx(0.0984),
        }
    }
    assert metrics.summary(1000.0)["m"]["requests_per_s"] == 0


def test_the_number_of_series_is_bounded() -> None:
    metrics = make_metrics()
    for i in range(2000):
        if i % 2:
            metrics.meter(f"m{i}", "high", 0.0, 1)
        else:
            metrics.count_limited(f"m{i}", "high")
    registry = CollectorRegistry()
    registry.register(metrics)
    text = generate_latest(registry).decode()
    assert 'model_name="other"' in text
    assert text.count("rts_prompt_tokens_total{") <= 513
    assert text.count("rts_rate_limited_total{") <= 513
    assert "rts_stream_gaps_total 3.0" in text
    assert "rts_stream_recoveries_total 2.0" in text


def test_the_description_of_the_api_is_whole() -> None:
    document = describe_api()
    schemas = document["components"]["schemas"]
    assert schemas["InferRequest"]["additionalProperties"] is False
    assert schemas["InferRequest"]["required"] == ["model", "prompt"]
    for path in ("/requests/{id}/stream", "/infer_stream/{id}"):
        names = [found["name"] for found in document["paths"][path]["get"]["parameters"]]
        assert names == ["id", "Last-Event-ID", "X-Queue-Status"]

    def references(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                yield value["$ref"]
            for item in value.values():
                yield from references(item)
        elif isinstance(value, list):
            for item in value:
                yield from references(item)

    for reference in references(document):
        assert reference.rpartition("/")[2] in schemas
