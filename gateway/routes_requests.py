"""GET and DELETE /requests/{id}, and its stream from any token on."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from gateway.edge import EDGE, Edge
from gateway.errors import ANOTHER_RUN, RequestGone, RequestNotFound
from gateway.headers import read_last_event_id, read_stream_run, wants_queue_status
from gateway.middleware import TRAIL, json_response
from gateway.records import Record, read_record
from gateway.relay import Listening, Relay
from shared import keys
from shared.errors import InvalidRequest
from shared.store import unavailable


def install(app: web.Application) -> None:
    """Adds the routes."""
    app.router.add_get("/requests/{id}", show, allow_head=False)
    app.router.add_delete("/requests/{id}", cancel)
    app.router.add_get("/requests/{id}/stream", resume, allow_head=False)
    app.router.add_get("/infer_stream/{id}", resume, allow_head=False)


async def show(request: web.Request) -> web.StreamResponse:
    """State, place in the queue, expected wait."""
    edge = request.app[EDGE]
    record, _ = await _find(request)
    return json_response(await _describe(edge, record))


async def cancel(request: web.Request) -> web.StreamResponse:
    """Ends the request; one that had ended before stays as it is."""
    edge = request.app[EDGE]
    record, caller = await _find(request)
    run = read_stream_run(request)
    if await edge.store.cancel(record.rid, caller, run=run) == "unknown":
        raise RequestNotFound(record.rid)
    record, _ = await _find(request)
    return json_response(await _describe(edge, record))


async def resume(request: web.Request) -> web.StreamResponse:
    """The stream from behind Last-Event-ID on, in the format the request was made in."""
    edge, trail = request.app[EDGE], request[TRAIL]
    after = read_last_event_id(request)
    queue_status = wants_queue_status(request)
    record, caller = await _find(request)
    if record.ended and not record.log_exists:
        raise RequestGone("The tokens of this request are not kept any more")
    # While it runs, a failover may have taken back tokens that a client has seen; they come again.
    if after is not None and record.ended and after > record.seq:
        raise InvalidRequest(
            f"Last-Event-ID {after} is beyond this stream, which has {record.seq} tokens",
            "Last-Event-ID",
        )
    subscription = await edge.hub.subscribe(record.rid, after or 0, replay=True, run=record.run)
    try:
        await edge.store.heard(record.rid)
    except BaseException:
        subscription.close()
        raise
    edge.metrics.resumes += 1
    # Whoever posted it decides whether it goes on: a second reader's leaving changes nothing.
    meter = None
    if record.view.resumable:
        # Its first reader may be gone; of others, their only one measures them.
        meter = edge.metrics.meter(
            record.view.model, record.cls, trail.started, record.prompt_tokens, resumed=True
        )
    listening = Listening(
        request=request,
        subject=record.subject,
        caller=caller,
        subscription=subscription,
        kept=True,
        moves=True,
        after=after,
        started=trail.started,
        meter=meter,
        queue_status=queue_status,
    )
    relay = Relay(edge, listening)
    trail.is_about(record.rid, record.run)
    trail.facts.update(model=record.view.model, after=after or 0)
    try:
        return await relay.stream({})
    finally:
        trail.facts.update(tokens=subscription.last, reason=relay.reason)


async def _find(request: web.Request) -> tuple[Record, str]:
    edge = request.app[EDGE]
    caller = edge.callers.caller(request)
    run = read_stream_run(request)
    record = await read_record(edge.store, request.match_info["id"], caller)
    if run not in (b"", record.run):
        raise RequestGone(ANOTHER_RUN)
    return record, caller


async def _describe(edge: Edge, record: Record) -> dict[str, Any]:
    found: dict[str, Any] = {
        "request_id": record.rid,
        "status": record.state,
        "model": record.view.model,
        "version": record.view.version,
        "priority": record.cls,
        "created": record.view.created,
        "deadline": record.deadline_ms / 1000,
        "resumable": record.view.resumable,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.seq,
        "finish_reason": record.reason or None,
        "position": None,
        "eta_s": None,
    }
    if record.state == "queued":
        client: Any = edge.store.client
        async with unavailable():
            head = await client.hget(keys.count(record.mv, record.cls), "head")
        found["position"], found["eta_s"] = edge.census.place(
            record.mv, record.cls, record.ticket, int(head or 0)
        )
    times = record.times
    if "t1" in times:
        found["queue_ms"] = times["t1"] - times["t0"]
    if "t2" in times:
        found["ttft_ms"] = times["t2"] - times["t0"]
    if "t3" in times:
        found["total_ms"] = times["t3"] - times["t0"]
    return found
