"""OpenAI's endpoints: /v1/chat/completions, /v1/completions, /v1/models."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from gateway.edge import EDGE
from gateway.middleware import json_response
from gateway.models import ServedModel
from gateway.openai import ChatRequest, CompletionRequest
from gateway.requests import read_json
from gateway.routes_infer import generate

OWNER = "realtime-ai-serve"

_chat_decoder = msgspec.json.Decoder(ChatRequest)
_completion_decoder = msgspec.json.Decoder(CompletionRequest)


def install(app: web.Application) -> None:
    """Adds the routes."""
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_post("/v1/completions", completions)
    app.router.add_get("/v1/models", list_models)
    # Names of models may hold slashes.
    app.router.add_get("/v1/models/{model:.+}", show_model)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answers a conversation."""
    body = await read_json(request, _chat_decoder)
    return await generate(request, body.order())


async def completions(request: web.Request) -> web.StreamResponse:
    """Continues a text."""
    body = await read_json(request, _completion_decoder)
    return await generate(request, body.order())


async def list_models(request: web.Request) -> web.StreamResponse:
    """All models."""
    served = request.app[EDGE].models.served()
    return json_response({"object": "list", "data": [_model(model) for model in served]})


async def show_model(request: web.Request) -> web.StreamResponse:
    """One model."""
    model = await request.app[EDGE].models.resolve(request.match_info["model"])
    return json_response(_model(model))


def _model(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": OWNER,
        "max_model_len": model.context_length,
    }
