"""/infer, /infer_stream, /requests/{id} over real HTTP and a real Redis."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from gateway_site import Site, letters, model_card, open_site, until

BODY = {"model": "echo", "prompt": "hello", "max_tokens": 8, "seed": 5}


async def test_infer_answers_in_one_piece(site: Site) -> None:
    status, reply, headers = await site.post("/infer", BODY)
    assert status == 200
    assert reply["text"] == letters(5, 8)
    assert reply["tokens"] == list(letters(5, 8))
    assert reply["finish_reason"] == "length"
    assert reply["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}
    assert reply["metrics"]["queue_ms"] == 1.5
    assert reply["metrics"]["ttft_ms"] == 4.0
    assert headers["X-Request-Id"] == reply["request_id"]
    assert (await site.counts()) == (0, 0)


async def test_infer_stream_sends_an_event_for_each_token(site: Site) -> None:
    status, events, headers = await site.post("/infer_stream", BODY)
    assert status == 200
    assert headers["Content-Type"].startswith("text/event-stream")
    assert headers["Cache-Control"] == "no-cache"
    assert headers["X-Accel-Buffering"] == "no"
    *tokens, summary, done = events
    assert [event.id for event in tokens] == list(range(1, 9))
    assert [event.data["index"] for event in tokens] == list(range(8))
    assert "".join(event.data["token"] for event in tokens) == letters(5, 8)
    assert all(event.data["text"] == event.data["token"] for event in tokens)
    assert summary.data["finish_reason"] == "length"
    assert summary.data["usage"]["completion_tokens"] == 8
    assert summary.id == 8
    assert done.data == "[DONE]"
    assert {event.data["request_id"] for event in events[:-1]} == {headers["X-Request-Id"]}


async def test_a_sane_label_of_the_client_comes_back(site: Site) -> None:
    _, reply, headers = await site.post("/infer", BODY, {"X-Request-Id": "my-7"})
    assert headers["X-Request-Id"] == "my-7"
    assert len(reply["request_id"]) == 32
    assert headers["X-Stream-Id"] == reply["request_id"]
    _, reply, headers = await site.post("/infer", BODY, {"X-Request-Id": "a b{}"})
    assert headers["X-Request-Id"] == reply["request_id"]
    _, _, headers = await site.post("/infer", {"model": "nope"}, {"X-Request-Id": "my-8"})
    assert headers["X-Request-Id"] == "my-8"
    assert "X-Stream-Id" not in headers


async def test_many_streams_at_once_keep_apart(site: Site) -> None:
    bodies = [{**BODY, "seed": seed, "max_tokens": 20 + seed} for seed in range(50)]
    replies = await asyncio.gather(*(site.post("/infer_stream", body) for body in bodies))
    for body, (status, events, _) in zip(bodies, replies, strict=True):
        assert status == 200
        text = "".join(event.data["text"] for event in events[:-2])
        assert text == letters(body["seed"], body["max_tokens"])
    assert await site.counts() == (0, 0)


async def test_the_worker_gets_what_was_ordered(site: Site) -> None:
    order = {
        **BODY,
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "stop": ["#", "!!"],
        "priority": "High",
        "client_id": "me",
    }
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    await site.post("/infer", order, {"traceparent": trace, "X-Request-Id": "mine"})
    request = site.worker.seen[-1]
    assert request.prompt == [ord(c) - 0x21 for c in "hello"]
    assert request.caller == "id:me"
    assert request.traceparent == trace
    assert request.label == "mine"
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (8, 0.25, 0.5)
    assert (sampling.top_k, sampling.seed, sampling.stop) == (7, 5, ["#", "!!"])
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    # A worker that would ignore one of these cannot read it.
    assert request.v == 2
    await site.post("/infer", BODY)
    assert site.worker.seen[-1].v == 1


@pytest.mark.parametrize("whose", ["auto", "openai"])
async def test_what_a_request_leaves_out_is_as_the_models_authors_advise(
    redis_url: str, whose: str
) -> None:
    advice = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    async with open_site(
        redis_url, card=model_card(sampling=advice), generation_config=whose
    ) as site:

        async def sampling_of(**fields: Any) -> dict[str, Any]:
            status, *_ = await site.post("/infer", {**BODY, **fields})
            assert status == 200
            return {name: getattr(site.worker.seen[-1].sampling, name) for name in advice}

        expected = advice if whose == "auto" else neutral
        assert await sampling_of() == expected
        assert await sampling_of(temperature=None, top_k=None) == expected
        assert await sampling_of(**neutral) == neutral
        assert await sampling_of(**{**neutral, "top_k": -1}) == neutral
        assert await sampling_of(top_p=0.5) == {**expected, "top_p": 0.5}


async def test_without_max_tokens_the_default_is_cut_to_the_context(site: Site) -> None:
    await site.post("/infer", {"model": "echo", "prompt": "x"})
    assert site.worker.seen[-1].sampling.max_tokens == 256
    await site.post("/infer", {"model": "echo", "prompt": "x" * 4090})
    assert site.worker.seen[-1].sampling.max_tokens == 6


async def test_high_goes_before_low(site: Site) -> None:
    site.worker.room = 0
    posts = []
    for cls in ("low", "normal", "high"):
        posts.append(
            asyncio.create_task(site.post("/infer", {**BODY, "priority": cls, "client_id": cls}))
        )
        await until(lambda cls=cls: _waits(site, cls))
    site.worker.room = 1
    await asyncio.gather(*posts)
    assert [request.caller for request in site.worker.seen] == ["id:high", "id:normal", "id:low"]


async def test_a_waiting_request_is_shown_with_its_place(site: Site) -> None:
    site.worker.room = 0
    posts = [asyncio.create_task(_open_stream(site, BODY)) for _ in range(3)]
    rids = []
    for post in posts:
        rids.append((await post).headers["X-Request-Id"])
    shown = [(await site.get(f"/requests/{rid}"))[1] for rid in rids]
    assert sorted(item["position"] for item in shown) == [1, 2, 3]
    assert {item["status"] for item in shown} == {"queued"}
    assert shown[0]["eta_s"] is None
    site.worker.room = 8
    await until(lambda: _is(site, rids[0], "completed"))
    _, item, _ = await site.get(f"/requests/chatcmpl-{rids[0]}")
    assert item["finish_reason"] == "length"
    assert item["completion_tokens"] == 8
    assert item["position"] is None
    for post in posts:
        post.result().close()


async def test_delete_ends_a_waiting_request(site: Site) -> None:
    site.worker.room = 0
    reply = await _open_stream(site, BODY)
    rid = reply.headers["X-Request-Id"]
    status, shown, _ = await site.send("DELETE", f"/requests/{rid}")
    assert (status, shown["status"]) == (200, "cancelled")
    text = await reply.text()
    assert json.loads(text.split("data: ")[1])["error"]["code"] == "request_cancelled"
    assert "[DONE]" not in text
    assert await site.counts() == (0, 0)
    status, shown, _ = await site.send("DELETE", f"/requests/{rid}")
    assert (status, shown["status"]) == (200, "cancelled")


async def test_delete_ends_a_running_request_for_a_waiting_client(site: Site) -> None:
    site.worker.frozen = True
    post = asyncio.create_task(site.post("/infer", BODY))
    await until(lambda: site.worker.running)
    (rid,) = site.worker.running
    assert (await site.send("DELETE", f"/requests/{rid}"))[0] == 200
    status, reply, _ = await post
    assert (status, reply["error"]["code"]) == (499, "request_cancelled")


async def test_requests_of_others_do_not_exist(site: Site) -> None:
    _, reply, _ = await site.post("/infer", {**BODY, "client_id": "me"})
    path = f"/requests/{reply['request_id']}"
    for method in ("GET", "DELETE"):
        assert (await site.send(method, path))[0] == 404
        assert (await site.send(method, path + "?client_id=you"))[0] == 404
        assert (await site.send(method, path + "?client_id=me"))[0] == 200
        assert (await site.send(method, path, None, {"X-Client-Id": "me"}))[0] == 200
    assert (await site.get(path + "/stream"))[0] == 404
    assert (await site.get(path + "/stream?client_id=me"))[0] == 200
    for unknown in ("x", "0" * 32, "%00"):
        assert (await site.get(f"/requests/{unknown}"))[0] == 404


@pytest.mark.parametrize("path", ["/infer", "/infer_stream"])
async def test_a_plain_request_ends_with_its_connection(site: Site, path: str) -> None:
    site.worker.frozen = True
    post = asyncio.create_task(site.post(path, BODY))
    await until(lambda: site.worker.running)
    post.cancel()
    await asyncio.gather(post, return_exceptions=True)
    await until(lambda: _is_empty(site))
    assert len(site.edge.flows) == 0


async def test_a_waiting_request_ends_with_its_connection(site: Site) -> None:
    site.worker.room = 0
    post = asyncio.create_task(site.post("/infer", BODY))
    await until(lambda: _waits(site, "normal"))
    post.cancel()
    await until(lambda: _is_empty(site))


async def test_the_deadline_passes_in_the_queue(site: Site) -> None:
    site.worker.room = 0
    status, reply, _ = await site.post("/infer", {**BODY, "timeout_s": 0.1})
    assert (status, reply["error"]["code"]) == (504, "queue_timeout")
    status, events, _ = await site.post("/infer_stream", BODY, {"X-Timeout-S": "0.1"})
    assert status == 200
    assert [event.data["error"]["code"] for event in events] == ["queue_timeout"]
    assert await site.counts() == (0, 0)


async def test_the_deadline_passes_while_it_runs(site: Site) -> None:
    site.worker.step_s = 0.05
    status, events, _ = await site.post("/infer_stream", {**BODY, "max_tokens": 99, "timeout_s": 1})
    assert status == 200
    assert events[-1].data["error"]["code"] == "timeout"
    assert events[-1].id == len(events) - 1
    site.worker.frozen = True
    status, reply, _ = await site.post("/infer", {**BODY, "timeout_s": 0.1})
    assert (status, reply["error"]["code"]) == (504, "timeout")


@pytest.mark.parametrize(
    ("end", "status", "code", "message"),
    [
        (("error", "", ""), 500, "engine_error", "could not run"),
        (("error", "bad_grammar", "No."), 500, "bad_grammar", "No."),
        (("engine_failed", "", ""), 502, "engine_failed", "died"),
        (("abandoned", "", ""), 499, "request_cancelled", "nobody"),
        (("something_new", "", ""), 500, "engine_error", "something_new"),
    ],
)
async def test_the_ends_that_workers_write(
    site: Site, end: tuple[str, str, str], status: int, code: str, message: str
) -> None:
    site.worker.end = end
    found, reply, _ = await site.post("/infer", BODY)
    assert (found, reply["error"]["code"]) == (status, code)
    assert message in reply["error"]["message"]
    _, events, _ = await site.post("/infer_stream", BODY)
    assert [event.data["error"]["code"] for event in events] == [code]


async def test_a_request_that_stops(site: Site) -> None:
    site.worker.end = ("stop", "", "")
    _, reply, _ = await site.post("/infer", BODY)
    assert (reply["finish_reason"], reply["text"], reply["tokens"]) == ("stop", "", [])
    _, events, _ = await site.post("/infer_stream", BODY)
    assert events[0].data["finish_reason"] == "stop"
    assert events[0].id == 0


async def test_a_full_queue_refuses(redis_url: str) -> None:
    async with open_site(redis_url, queue_limit=2) as site:
        site.worker.room = 0
        held = [await _open_stream(site, BODY) for _ in range(2)]
        status, reply, headers = await site.post("/infer", BODY)
        assert (status, reply["error"]["code"]) == (503, "queue_full")
        assert headers["Retry-After"] == "1"
        assert (await site.get("/livez"))[0] == 200
        assert (await site.get("/readyz"))[0] == 200
        for reply in held:
            reply.close()
        await until(lambda: _is_empty(site))


async def test_what_can_be_watched(site: Site) -> None:
    await site.post("/infer_stream", {**BODY, "priority": "high"})
    site.worker.room = 0
    held = await _open_stream(site, BODY)
    await until(lambda: site.edge.census.of(site.worker.mv).queues["normal"].waiting == 1)
    _, text, _ = await site.get("/metrics")
    for line in (
        'rts_time_to_first_token_seconds_count{model_name="echo",priority="high"} 1.0',
        'rts_inter_token_latency_seconds_count{model_name="echo",priority="high"} 7.0',
        'rts_e2e_request_latency_seconds_count{model_name="echo",priority="high"} 1.0',
        'rts_request_queue_time_seconds_sum{model_name="echo",priority="high"} 0.0015',
        'rts_prompt_tokens_total{model_name="echo",priority="high"} 5.0',
        'rts_generation_tokens_total{model_name="echo",priority="high"} 8.0',
        'rts_request_success_total{finished_reason="length",model_name="echo",priority="high"} 1.0',
        'rts_num_requests_waiting{model_name="echo",priority="normal"} 1.0',
        'rts_queue_depth{model_name="echo",priority="normal"} 1.0',
        'rts_workers{model_name="echo"} 1.0',
        'rts_kv_cache_usage_perc{model_name="echo"} 0.25',
        'rts_prefix_cache_queries_total{model_name="echo"} 80.0',
        'rts_prefix_cache_hits_total{model_name="echo"} 64.0',
        'rts_num_preemptions_total{model_name="echo"} 3.0',
        'rts_fenced_emits_total{model_name="echo"} 2.0',
        'rts_request_redeliveries_total{model_name="echo",priority="normal"} 0.0',
        'rts_dead_letters_total{model_name="echo",priority="normal"} 0.0',
        "rts_streams 1.0",
        "rts_stream_gaps_total 0.0",
        "rts_stream_resumes_total 0.0",
    ):
        assert line in text
    assert "rts_connections " in text
    assert 'rts_queue_oldest_seconds{model_name="echo",priority="normal"}' in text
    _, summary, _ = await site.get("/metrics", {"Accept": "application/json"})
    assert set(summary["echo"]) == {
        *("p50", "p95", "p99", "throughput", "requests_per_s", "error_rate")
    }
    _, status, _ = await site.get("/status")
    assert status["queues"]["echo"]["normal"]["waiting"] == 1
    assert status["streams"] == 1
    assert status["workers"][0]["engine"] == "fake-0"
    assert status["workers"][0]["prefix_queries"] == 80
    assert status["workers"][0]["prefix_hits"] == 64
    _, health, _ = await site.get("/health")
    assert health["status"] == "healthy"
    assert health["active_streams"] == 1
    assert health["active_connections"] >= 1
    _, found, _ = await site.get("/models")
    assert found["total_models"] == 1
    assert found["models"]["echo"]["context_length"] == 4096
    _, document, _ = await site.get("/openapi.json")
    assert document["paths"]["/infer"]["post"]["requestBody"]
    held.close()


async def test_cors(redis_url: str) -> None:
    async with open_site(redis_url, cors_origins="https://good.org") as site:
        good = {"Origin": "https://good.org"}
        ask = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type,x-stainless-os,x-other",
        }
        status, _, headers = await site.send(
            "OPTIONS", "/v1/chat/completions", None, {**good, **ask}
        )
        assert status == 204
        assert headers["Access-Control-Allow-Origin"] == "https://good.org"
        allowed = headers["Access-Control-Allow-Headers"].lower().split(", ")
        assert {"content-type", "last-event-id", "x-resumable", "x-stainless-os"} <= set(allowed)
        assert "x-other" not in allowed
        status, _, headers = await site.post("/infer_stream", BODY, good)
        assert headers["Access-Control-Allow-Origin"] == "https://good.org"
        exposed = headers["Access-Control-Expose-Headers"].split(", ")
        assert {"X-Request-Id", "X-Stream-Id"} <= set(exposed)
        _, _, headers = await site.post("/infer", {}, good)
        assert headers["Access-Control-Allow-Origin"] == "https://good.org"
        _, _, headers = await site.get("/health", {"Origin": "https://evil.org"})
        assert "Access-Control-Allow-Origin" not in headers
        status, _, _ = await site.send(
            "OPTIONS", "/infer", None, {**ask, "Origin": "https://evil.org"}
        )
        assert status == 405


async def _open_stream(site: Site, body: Any, headers: dict[str, str] | None = None) -> Any:
    """The response as soon as its headers are there."""
    return await site.http.post(site.url("/infer_stream"), json=body, headers=headers)


async def _waits(site: Site, cls: str) -> bool:
    return (await site.counts(cls))[0] > 0


async def _is_empty(site: Site) -> bool:
    return await site.counts() == (0, 0)


async def _is(site: Site, rid: str, status: str) -> bool:
    return bool((await site.get(f"/requests/{rid}"))[1]["status"] == status)
