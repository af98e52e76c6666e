"""GET /openapi.json: the API's description, its bodies generated from the types that check them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
from aiohttp import web

from gateway.middleware import json_response
from gateway.openai import ChatRequest, CompletionRequest
from gateway.queue_status import Queued, Running
from gateway.requests import InferRequest

_REF = "#/components/schemas/{name}"


class ErrorBody(msgspec.Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(msgspec.Struct):
    """Every error's body, and the data of an event that ends a stream early."""

    error: ErrorBody


class Usage(msgspec.Struct):
    """Counted tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class InferMetrics(msgspec.Struct):
    """Where the time went."""

    queue_ms: float
    ttft_ms: float
    total_ms: float
    tokens_per_s: float


class InferReply(msgspec.Struct):
    """The reply of /infer."""

    request_id: str
    model: str
    tokens: list[str]
    text: str
    finish_reason: str
    usage: Usage
    metrics: InferMetrics


class InferEvent(msgspec.Struct):
    """Data of one event of /infer_stream; the last one before [DONE] is InferSummary."""

    request_id: str
    index: int
    token: str
    text: str


class InferSummary(msgspec.Struct):
    """Data of the last event of /infer_stream."""

    request_id: str
    finish_reason: str
    usage: Usage
    metrics: InferMetrics


_TYPES = (
    InferRequest,
    ChatRequest,
    CompletionRequest,
    InferReply,
    InferEvent,
    InferSummary,
    Queued,
    Running,
    ErrorReply,
)


def install(app: web.Application) -> None:
    """Adds the route."""
    document = describe_api()

    async def show(request: web.Request) -> web.StreamResponse:
        """The document."""
        return json_response(document)

    app.router.add_get("/openapi.json", show)


def describe_api() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    _, components = msgspec.json.schema_components(_TYPES, ref_template=_REF)
    return {
        "openapi": "3.1.0",
        "info": {"title": "realtime-ai-serve", "version": _version()},
        "paths": {
            "/infer": {"post": _post("Generate", "InferRequest", _json("InferReply"))},
            "/infer_stream": {
                "post": _post("Generate, as events", "InferRequest", _events("InferEvent"))
            },
            "/v1/chat/completions": {
                "post": _post("Answer a conversation", "ChatRequest", _json_or_events())
            },
            "/v1/completions": {
                "post": _post("Continue a text", "CompletionRequest", _json_or_events())
            },
            "/v1/models": {"get": _get("All models, as OpenAI lists them")},
            "/v1/models/{model}": {"get": _get("One model", "model")},
            "/requests/{id}": {
                "get": _get("State, place in the queue, expected wait", "id"),
                "delete": _get("Cancel", "id"),
            },
            "/requests/{id}/stream": {"get": _resume("Resume from behind Last-Event-ID")},
            "/infer_stream/{id}": {"get": _resume("The same")},
            "/models": {"get": _get("All models")},
            "/health": {"get": _get("State of this gateway")},
            "/status": {"get": _get("Queues, workers, models")},
            "/metrics": {"get": _get("Prometheus metrics; JSON if only that is accepted")},
            "/livez": {"get": _get("Whether the process runs")},
            "/readyz": {"get": _get("Whether requests should be sent here")},
        },
        "components": {"schemas": components},
    }


def _post(summary: str, body: str, content: dict[str, Any]) -> dict[str, Any]:
    names = (
        *("X-Request-Id", "X-Resumable", "X-Queue-Status"),
        *("X-Timeout-S", "Idempotency-Key", "X-Client-Id"),
    )
    return {
        "summary": summary,
        "parameters": [_parameter(name, "header") for name in names],
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {
            "200": {"description": "The answer", "content": content},
            "default": _failure(),
        },
    }


def _get(summary: str, *path: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "parameters": [_parameter(name, "path") for name in path],
        "responses": {"200": {"description": "The answer"}, "default": _failure()},
    }


def _resume(summary: str) -> dict[str, Any]:
    found = _get(summary, "id")
    found["parameters"] += [
        _parameter(name, "header") for name in ("Last-Event-ID", "X-Queue-Status")
    ]
    return found


def _parameter(name: str, place: str) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": {"type": "string"}}


def _failure() -> dict[str, Any]:
    return {"description": "What went wrong", "content": _json("ErrorReply")}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(name=name)}}}


def _events(name: str) -> dict[str, Any]:
    return {"text/event-stream": {"schema": {"$ref": _REF.format(name=name)}}}


def _json_or_events() -> dict[str, Any]:
    # Their shapes are OpenAI's.
    return {
        "application/json": {"schema": {"type": "object"}},
        "text/event-stream": {"schema": {"type": "string"}},
    }


def _version() -> str:
    try:
        return version("realtime-ai-serve")
    except PackageNotFoundError:
        return "0"
