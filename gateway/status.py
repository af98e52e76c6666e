"""GET /livez /readyz /health /status /models /metrics: how this gateway and its cluster are."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from gateway.edge import EDGE, Edge
from gateway.middleware import json_response
from gateway.models import ServedModel
from shared import messages


def install(app: web.Application) -> None:
    """Adds the routes."""
    registry = CollectorRegistry()
    registry.register(app[EDGE].metrics)

    async def metrics(request: web.Request) -> web.StreamResponse:
        """Prometheus' text, or a summary as JSON for those who accept only that."""
        if "application/json" in request.headers.get("Accept", ""):
            now = asyncio.get_running_loop().time()
            return json_response(request.app[EDGE].metrics.summary(now))
        return web.Response(
            body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/health", health)
    app.router.add_get("/status", status)
    app.router.add_get("/models", models)
    app.router.add_get("/metrics", metrics)


async def livez(request: web.Request) -> web.StreamResponse:
    """The process runs; nothing else counts."""
    return json_response({"status": "alive"})


async def readyz(request: web.Request) -> web.StreamResponse:
    """Whether requests should be sent here."""
    edge = request.app[EDGE]
    state = _state(edge)
    ready = state == "healthy"
    return json_response(
        {"status": "ready" if ready else state},
        200 if ready else 503,
        None if ready else {"Retry-After": "1"},
    )


async def health(request: web.Request) -> web.StreamResponse:
    """The same as readyz, with how busy it is."""
    edge = request.app[EDGE]
    state = _state(edge)
    return json_response(
        {
            "status": state,
            "active_connections": edge.connections(),
            "active_streams": len(edge.flows),
        },
        200 if state == "healthy" else 503,
    )


async def status(request: web.Request) -> web.StreamResponse:
    """Connections, streams, models, queues, workers, as of the last second."""
    edge = request.app[EDGE]
    served = edge.models.served()
    return json_response(
        {
            "status": _state(edge),
            "connections": edge.connections(),
            "streams": len(edge.flows),
            "models": {model.name: _model(edge, model) for model in served},
            "queues": {model.name: edge.census.of(model.mv).queues for model in served},
            "workers": [
                {"model": model.name, "version": model.version, **_fields(engine)}
                for model in served
                for engine in edge.census.of(model.mv).engines
            ],
        }
    )


async def models(request: web.Request) -> web.StreamResponse:
    """The models there are."""
    edge = request.app[EDGE]
    found = {model.name: _model(edge, model) for model in edge.models.served()}
    return json_response({"models": found, "total_models": len(found)})


def _state(edge: Edge) -> str:
    if edge.leaving:
        return "draining"
    return "healthy" if edge.healthy else "redis_unavailable"


def _model(edge: Edge, model: ServedModel) -> dict[str, Any]:
    counts = edge.census.of(model.mv)
    return {
        "version": model.version,
        "context_length": model.context_length,
        "vocab_size": model.vocab_size,
        "chat": model.tokenizer.has_template,
        "workers": len(counts.engines),
        "waiting": sum(count.waiting for count in counts.queues.values()),
        "running": sum(count.running for count in counts.queues.values()),
    }


def _fields(engine: messages.EngineCard) -> dict[str, Any]:
    fields = msgspec.structs.asdict(engine)
    del fields["v"]
    return fields
