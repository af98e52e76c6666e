"""Streams that outlive their connection; repeated Idempotency-Keys."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from gateway_site import Event, Site, letters, open_site, read_events, until

from gateway.hub import Subscription
from shared import keys, messages
from shared.store import Enqueued

BODY = {"model": "echo", "prompt": "hello", "max_tokens": 40, "seed": 5}
CHAT = {
    "model": "echo",
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 10,
    "seed": 5,
    "stream": True,
    "stream_options": {"include_usage": True},
}
COMPLETION = {**{k: v for k, v in CHAT.items() if k != "messages"}, "prompt": "x"}
RESUMABLE = {"X-Resumable": "30"}


def text_of(events: list[Event]) -> str:
    return "".join(event.data["text"] for event in events if "text" in event.data)


async def _read_some(reply: Any, count: int) -> list[Event]:
    """The first events, with more if they came together."""
    raw = b""
    while raw.count(b"\n\n") < count:
        raw += await reply.content.readany()
    return read_events(raw[: raw.rindex(b"\n\n") + 2].decode())


async def test_a_broken_stream_goes_on_from_the_last_event(site: Site) -> None:
    site.worker.step_s = 0.005
    reply = await site.http.post(site.url("/infer_stream"), json=BODY, headers=RESUMABLE)
    rid = reply.headers["X-Request-Id"]
    first = await _read_some(reply, 5)
    reply.close()
    await until(lambda: not len(site.edge.flows))
    assert await site.counts() == (0, 1)
    path, last = f"/requests/{rid}/stream", first[-1].id
    status, rest, headers = await site.get(path, {"Last-Event-ID": str(last)})
    assert status == 200
    assert headers["Content-Type"].startswith("text/event-stream")
    assert rest[0].id == (last or 0) + 1
    assert text_of(first) + text_of(rest) == letters(5, 40)
    assert rest[-1].data == "[DONE]"
    assert rest[-2].data["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 40,
        "total_tokens": 45,
    }
    # Also after its end, from anywhere, at either address.
    for address in (path, f"/infer_stream/{rid}"):
        for after in (0, 17, 40):
            _, again, _ = await site.get(address, {"Last-Event-ID": str(after)})
            assert text_of(again) == letters(5, 40)[after:]
            assert again[-2].data == rest[-2].data
    _, again, _ = await site.get(path)
    assert text_of(again) == letters(5, 40)
    _, text, _ = await site.get("/metrics")
    assert "rts_stream_resumes_total 8.0" in text


async def test_a_request_whose_client_left_is_counted_once(site: Site, redis_url: str) -> None:
    async with open_site(redis_url) as other:
        other.worker.room = 0
        site.worker.step_s = 0.005
        reply = await site.http.post(site.url("/infer_stream"), json=BODY, headers=RESUMABLE)
        rid = reply.headers["X-Request-Id"]
        await _read_some(reply, 2)
        reply.close()
        await until(lambda: not len(site.edge.flows))
        # Two readers see its end as it comes, a third one later.
        path = f"/requests/{rid}/stream"
        await asyncio.gather(site.get(path), other.get(path))
        await other.get(path)
        # A plain one is its only reader's, whoever else looks.
        _, _, headers = await site.post("/infer_stream", BODY)
        await other.get(f"/requests/{headers['X-Request-Id']}/stream")
        await until(lambda: not site.edge._errands and not other.edge._errands)
        ended = 0
        for gateway in (site, other):
            _, text, _ = await gateway.get("/metrics")
            for line in text.splitlines():
                if line.startswith("rts_request_success_total{"):
                    ended += int(float(line.split()[-1]))
        assert ended == 2


async def test_another_gateway_can_resume(site: Site, redis_url: str) -> None:
    site.worker.step_s = 0.005
    async with open_site(redis_url) as other:
        other.worker.room = 0
        reply = await site.http.post(site.url("/infer_stream"), json=BODY, headers=RESUMABLE)
        first = await _read_some(reply, 3)
        reply.close()
        rid = reply.headers["X-Request-Id"]
        _, rest, _ = await other.get(
            f"/requests/{rid}/stream", {"Last-Event-ID": str(first[-1].id)}
        )
        assert text_of(first) + text_of(rest) == letters(5, 40)


async def test_who_has_seen_more_than_a_failover_left_waits_for_what_follows(site: Site) -> None:
    site.worker.step_s = 0.01
    reply = await site.http.post(site.url("/infer_stream"), json=BODY, headers=RESUMABLE)
    first = await _read_some(reply, 3)
    reply.close()
    rid = reply.headers["X-Request-Id"]
    # As if the log had been longer before: its tokens are computed again, and are the same.
    status, rest, _ = await site.get(f"/requests/{rid}/stream", {"Last-Event-ID": "30"})
    assert status == 200, rest
    assert first[-1].id < 30
    assert text_of(rest) == letters(5, 40)[30:]
    assert next(event.id for event in rest if event.data != "[DONE]") == 31


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)]
)
async def test_an_openai_stream_is_resumed_in_its_own_format(
    site: Site, path: str, body: dict[str, Any]
) -> None:
    _, events, _ = await site.post(path, body, RESUMABLE)
    name = events[0].data["id"]
    _, again, _ = await site.get(f"/requests/{name}/stream")
    assert [event.data for event in again] == [event.data for event in events]
    _, rest, _ = await site.get(f"/requests/{name}/stream", {"Last-Event-ID": "4"})
    fourth = [event.id for event in events].index(4)
    assert [event.data for event in rest] == [event.data for event in events[fourth + 1 :]]
    assert rest[-2].data["usage"]["completion_tokens"] == 10
    assert len(rest) == 6 + 3, "tokens, their end, the usage, [DONE]"


@pytest.mark.parametrize(
    "value", ["x", "-1", "1.5", "41", "1" * 16, "99999999999", "0x1", "1 2", "abc-3"]
)
async def test_an_id_that_is_not_of_this_stream(site: Site, value: str) -> None:
    _, events, _ = await site.post("/infer_stream", BODY)
    rid = events[0].data["request_id"]
    status, reply, _ = await site.get(f"/requests/{rid}/stream", {"Last-Event-ID": value})
    assert status == 400
    assert reply["error"]["param"] == "Last-Event-ID"


async def test_what_is_not_kept_any_more_is_gone(redis_url: str) -> None:
    async with open_site(redis_url, retention_s=1) as site:
        _, events, _ = await site.post("/infer_stream", BODY)
        rid = events[0].data["request_id"]
        client: Any = site.store.client
        await until(lambda: _gone(client, keys.log(rid)))
        status, reply, _ = await site.get(f"/requests/{rid}/stream")
        assert (status, reply["error"]["code"]) == (410, "request_gone")
        assert (await site.get(f"/requests/{rid}"))[1]["status"] == "completed"
        await client.delete(keys.request(rid))
        status, reply, _ = await site.get(f"/requests/{rid}/stream")
        assert (status, reply["error"]["code"]) == (404, "request_not_found")


async def test_lost_data_ends_a_stream_with_an_error(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody relays it any more who accepted it."""
    monkeypatch.setattr("gateway.hub.SILENT_S", 0.2)
    monkeypatch.setattr("gateway.hub.COME_BACK_S", 0.5)
    async with open_site(redis_url) as site:
        site.worker.frozen = True
        url = site.url("/infer_stream")
        async with site.http.post(url, json=BODY, headers=RESUMABLE) as reply:
            rid = reply.headers["X-Request-Id"]
        await until(lambda: site.worker.running)
        reply = await site.http.get(site.url(f"/requests/{rid}/stream"))
        client: Any = site.store.client
        await client.delete(keys.request(rid))
        events = read_events(await reply.text())
        assert events[-1].data["error"]["code"] == "log_expired"


@pytest.mark.parametrize("value", ["", "x", "-1", "0", "nan", "inf", "3601", "1e3"])
async def test_a_bad_grace(site: Site, value: str) -> None:
    status, reply, _ = await site.post("/infer_stream", BODY, {"X-Resumable": value})
    assert (status, reply["error"]["param"]) == (400, "X-Resumable")


async def test_a_grace_needs_a_stream(site: Site) -> None:
    status, reply, _ = await site.post("/infer", BODY, RESUMABLE)
    assert (status, reply["error"]["param"]) == (400, "X-Resumable")


async def test_grace_and_retention_reach_redis(redis_url: str) -> None:
    async with open_site(redis_url, resumable_retention_s=77) as site:
        client: Any = site.store.client
        fields = []
        for headers in (RESUMABLE, {}, {"Idempotency-Key": "k"}):
            _, events, _ = await site.post("/infer_stream", BODY, headers)
            key = keys.request(events[0].data["request_id"])
            fields.append(await client.hmget(key, ["grace", "keep"]))
        assert fields == [[b"30000", b"77000"], [b"5000", b"30000"], [b"30000", b"77000"]]


async def test_a_repeated_key_attaches_to_the_running_stream(site: Site) -> None:
    site.worker.step_s = 0.005
    body = {**BODY}
    del body["seed"]
    key = {"Idempotency-Key": "order-7"}
    first = asyncio.create_task(site.post("/infer_stream", body, key))
    await until(lambda: site.worker.running)
    _, second, headers = await site.post("/infer_stream", body, key)
    _, events, first_headers = await first
    assert [e.data for e in events] == [e.data for e in second]
    assert headers["X-Request-Id"] == first_headers["X-Request-Id"]
    assert len(site.worker.seen) == 1
    # After its end, too.
    _, third, _ = await site.post("/infer_stream", body, key)
    assert [e.data for e in third] == [e.data for e in events]
    assert len(site.worker.seen) == 1


async def test_a_repeated_key_of_a_reply_in_one_piece(site: Site) -> None:
    key = {"Idempotency-Key": "k"}
    _, one, _ = await site.post("/infer", BODY, key)
    _, two, _ = await site.post("/infer", BODY, key)
    assert one == two
    assert len(site.worker.seen) == 1


async def test_a_repeated_key_answers_as_the_first_time(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {"Idempotency-Key": "k"}
    _, events, _ = await site.post("/v1/chat/completions", CHAT, key)
    monkeypatch.setattr("gateway.submit.time.time", lambda: 1.0)
    body = {**CHAT, "stream_options": {"include_usage": False}}
    _, again, _ = await site.post("/v1/chat/completions", body, key)
    assert [event.data for event in again] == [event.data for event in events]


async def test_a_repeated_key_after_a_failure_runs_again(site: Site) -> None:
    key = {"Idempotency-Key": "k"}
    site.worker.frozen = True
    status, _, _ = await site.post("/infer", {**BODY, "timeout_s": 0.2}, key)
    assert status == 504
    await until(lambda: not len(site.edge.flows))
    site.worker.running.clear()
    site.worker.frozen = False
    status, reply, _ = await site.post("/infer", BODY, key)
    assert (status, reply["text"]) == (200, letters(5, 40))
    assert len(site.worker.seen) == 2


async def test_a_repeated_key_whose_tokens_are_gone_runs_again(site: Site) -> None:
    key = {"Idempotency-Key": "k"}
    _, one, _ = await site.post("/infer", BODY, key)
    client: Any = site.store.client
    await client.delete(keys.log(one["request_id"]))
    async with asyncio.timeout(2):
        _, two, _ = await site.post("/infer", BODY, key)
    assert two["text"] == one["text"]
    assert len(site.worker.seen) == 2


def let_another_run_speak(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes with a key hears a token of an earlier run before it knows its own."""
    attach, store = site.edge.store.attach, site.edge.store

    async def attach_late(request: messages.Request, **options: Any) -> Enqueued | None:
        token = messages.Tokens(messages.VERSION, 1, [messages.Token(0, 1, "!")])
        await store.client.publish(keys.log(request.rid), b"1-0 " + messages.encode(token))
        await asyncio.sleep(0.05)
        return await attach(request, **options)

    monkeypatch.setattr(store, "attach", attach_late)


async def test_tokens_of_an_attempt_that_is_taken_back_are_not_mixed_in(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gateway heard no answer, and takes it back now."""
    let_another_run_speak(site, monkeypatch)
    _, events, _ = await site.post("/infer_stream", BODY, {"Idempotency-Key": "k"})
    assert text_of(events) == letters(5, 40)


async def test_a_reader_of_a_run_that_failed_gets_nothing_of_the_next_one(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gateway hears neither of the end nor of the beginning: a moment without Redis."""
    site.worker.step_s = 0.005
    key = {"Idempotency-Key": "k"}
    reply = await site.http.post(site.url("/infer_stream"), json=BODY, headers=key)
    rid = reply.headers["X-Request-Id"]
    first = await _read_some(reply, 5)
    feed = Subscription.feed
    monkeypatch.setattr(Subscription, "feed", lambda self, frame: None)
    await site.send("DELETE", f"/requests/{rid}")
    # As another version, which may answer otherwise.
    site.worker.frozen = True
    again = asyncio.create_task(site.post("/infer_stream", {**BODY}, key))
    await until(lambda: len(site.worker.seen) == 2)
    monkeypatch.setattr(Subscription, "feed", feed)
    site.worker.frozen = False
    rest = read_events((await reply.content.read()).decode())
    assert text_of(rest) == letters(5, 40)[len(text_of(first)) :][: len(text_of(rest))]
    assert rest[-1].data["error"]["code"] == "request_gone"
    _, events, _ = await again
    assert text_of(events) == letters(5, 40)


async def test_a_name_of_a_run_that_failed_is_of_nothing(site: Site) -> None:
    site.worker.step_s = 0.005
    key = {"Idempotency-Key": "k", "X-Resumable": "30"}
    reply = await site.http.post(site.url("/infer_stream"), json=BODY, headers=key)
    rid, run = reply.headers["X-Stream-Id"], reply.headers["X-Stream-Run"]
    await _read_some(reply, 3)
    path, named = f"/requests/{rid}/stream", {"Last-Event-ID": "3", "X-Stream-Run": run}
    resumed = await site.http.get(site.url(path), headers=named)
    assert (resumed.status, resumed.headers["X-Stream-Run"]) == (200, run)
    resumed.close()
    attached = await site.http.post(site.url("/infer_stream"), json=BODY, headers=key)
    assert attached.headers["X-Stream-Run"] == run
    status, _, _ = await site.send("DELETE", f"/requests/{rid}", headers=named)
    assert status == 200
    site.worker.frozen = True
    again = await site.http.post(site.url("/infer_stream"), json=BODY, headers=key)
    assert again.headers["X-Stream-Id"] == rid
    assert again.headers["X-Stream-Run"] != run
    for method, address in (
        ("GET", path),
        ("GET", f"/requests/{rid}"),
        ("DELETE", f"/requests/{rid}"),
    ):
        status, answer, _ = await site.send(method, address, headers=named)
        assert (status, answer["error"]["code"]) == (410, "request_gone")
    site.worker.frozen = False
    # Who names none means whichever is there.
    _, events, _ = await site.get(path)
    assert text_of(events) == letters(5, 40)
    status, answer, _ = await site.get(path, {"X-Stream-Run": "a b"})
    assert (status, answer["error"]["param"]) == (400, "X-Stream-Run")


async def test_who_attaches_hears_nothing_of_the_run_before(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.worker.frozen = True
    key = {"Idempotency-Key": "k"}
    first = asyncio.create_task(site.post("/infer_stream", BODY, key))
    await until(lambda: site.worker.running)
    let_another_run_speak(site, monkeypatch)
    second = asyncio.create_task(site.post("/infer_stream", BODY, key))
    await asyncio.sleep(0.2)
    site.worker.frozen = False
    await first
    _, events, _ = await second
    assert text_of(events) == letters(5, 40)


async def test_who_attaches_may_ask_for_more_time(site: Site) -> None:
    client: Any = site.store.client
    site.worker.frozen = True
    key = {"Idempotency-Key": "k"}
    first = await site.http.post(site.url("/infer_stream"), json=BODY, headers=key)
    name = keys.request(first.headers["X-Request-Id"])
    for asked, held in (("90", b"90000"), ("10", b"90000")):
        more = {**key, "X-Resumable": asked}
        second = await site.http.post(site.url("/infer_stream"), json=BODY, headers=more)
        assert second.status == 200
        assert await client.hget(name, "grace") == held
        second.close()
    first.close()


async def test_a_key_belongs_to_its_caller_and_its_request(site: Site) -> None:
    key = {"Idempotency-Key": "k"}
    _, one, _ = await site.post("/infer", BODY, key)
    _, two, _ = await site.post("/infer", {**BODY, "client_id": "other"}, key)
    assert one["request_id"] != two["request_id"]
    for changed in ({"max_tokens": 41}, {"prompt": "x"}, {"seed": 6}, {"stream": True}):
        status, reply, _ = await site.post("/infer", {**BODY, **changed}, key)
        assert (status, reply["error"]["code"]) == (409, "idempotency_conflict")
    for bad in ("", "a b", "x" * 257):
        status, reply, _ = await site.post("/infer", BODY, {"Idempotency-Key": bad})
        assert (status, reply["error"]["param"]) == (400, "Idempotency-Key")


async def test_a_request_with_a_key_outlives_its_connection(site: Site) -> None:
    site.worker.frozen = True
    key = {"Idempotency-Key": "k"}
    post = asyncio.create_task(site.post("/infer", BODY, key))
    await until(lambda: site.worker.running)
    post.cancel()
    await until(lambda: not len(site.edge.flows))
    site.worker.frozen = False
    _, reply, _ = await site.post("/infer", BODY, key)
    assert reply["text"] == letters(5, 40)
    assert len(site.worker.seen) == 1


async def _gone(client: Any, key: str) -> bool:
    return not await client.exists(key)
