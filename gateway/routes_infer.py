"""POST /infer and /infer_stream, and what all endpoints that generate have in common."""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import web

from gateway.edge import EDGE, Edge
from gateway.headers import read_terms
from gateway.middleware import TRAIL, json_response
from gateway.relay import Listening, Relay
from gateway.requests import InferRequest, Order, read_json
from gateway.submit import Sender, submit

_decoder = msgspec.json.Decoder(InferRequest)


def install(app: web.Application) -> None:
    """Adds the routes."""
    app.router.add_post("/infer", infer)
    app.router.add_post("/infer_stream", infer_stream)


async def infer(request: web.Request) -> web.StreamResponse:
    """Generates, and answers when it is complete."""
    body = await read_json(request, _decoder)
    return await generate(request, body.order(stream=False))


async def infer_stream(request: web.Request) -> web.StreamResponse:
    """Generates, and streams the tokens."""
    body = await read_json(request, _decoder)
    return await generate(request, body.order(stream=True))


async def generate(request: web.Request, order: Order) -> web.StreamResponse:
    """Queues the order and answers in the way that was asked for."""
    edge, trail = request.app[EDGE], request[TRAIL]
    caller = edge.callers.caller(request, order.client_id)
    terms = read_terms(request, edge.settings)
    label = "" if trail.label == trail.rid else trail.label
    trail.facts.update(model=order.model, priority=order.cls)
    ticket = await submit(edge, order, Sender(caller, trail.rid, label, terms))
    subject = ticket.subject
    trail.label = label or subject.rid
    trail.is_about(subject.rid, ticket.subscription.run)
    trail.facts.update(prompt_tokens=subject.prompt_tokens)
    if ticket.attached:
        edge.metrics.resumes += 1
    meter = edge.metrics.meter(
        subject.view.model,
        ticket.cls,
        trail.started,
        subject.prompt_tokens,
        resumed=ticket.attached,
    )
    listening = Listening(
        request=request,
        subject=subject,
        caller=caller,
        subscription=ticket.subscription,
        kept=ticket.kept,
        moves=terms.grace_s is not None,
        after=None,
        started=trail.started,
        meter=meter,
        queue_status=terms.queue_status,
    )
    relay = Relay(edge, listening)
    try:
        if order.stream:
            return await relay.stream(ticket.headers)
        reply = json_response(await relay.collect(), headers=ticket.headers)
    finally:
        trail.facts.update(tokens=relay.flow.subscription.last, reason=relay.reason)
    await _send(edge, request, reply)
    return reply


async def _send(edge: Edge, request: web.Request, reply: web.Response) -> None:
    """Sends here instead of after the handler, where nothing bounds the wait for a slow client."""
    try:
        async with asyncio.timeout(edge.settings.slow_client_s):
            await reply.prepare(request)
            await reply.write_eof()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
