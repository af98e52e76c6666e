"""Around every request: its id, refusals, errors in one shape, CORS, one line in the log."""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from gateway import sse
from gateway.edge import EDGE, Edge
from gateway.errors import Draining, TooManyConnections, describe, http_problem, is_known
from gateway.headers import ALLOWED, read_label
from gateway.limits import EXPOSED
from gateway.protocol import SERVER, problem_response
from shared.errors import StoreUnavailable
from shared.settings import Settings

log = logging.getLogger("gateway.access")

_ALWAYS = frozenset({"/livez", "/readyz", "/metrics"})
"""Answered even with too many connections."""
_WHILE_DRAINING = _ALWAYS | {"/health", "/status"}
_QUIET = frozenset({"/livez", "/readyz", "/metrics", "/health", "/status"})
"""Asked for every few seconds by machines: not worth a line at the usual level."""


@dataclass(slots=True)
class Trail:
    """What is known of an HTTP request on its way.

    Attributes:
        rid: the id of the request it may put on the queue.
        label: what X-Request-Id says: the client's own, or a proxy's; else the rid.
        stream_id: what X-Stream-Id says: the rid of the request that is answered, "" without one.
        stream_run: what X-Stream-Run says: which run of it.
        started: when it arrived, in the event loop's time.
        facts: for the log line.
    """

    rid: str
    label: str
    started: float
    stream_id: str = ""
    stream_run: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def is_about(self, rid: str, run: bytes) -> None:
        """The answer is of this run of this request."""
        self.stream_id, self.stream_run = rid, run.decode()
        self.facts["rid"] = rid


TRAIL = web.RequestKey("trail", Trail)


_NAMES = ("X-Request-Id", "X-Stream-Id", "X-Stream-Run")
"""Headers that browsers of other origins may read, beside those of the limits."""


class Cors:
    """Which origins browsers may call from.

    Args:
        origins: comma-separated, * is any.
    """

    def __init__(self, origins: str) -> None:
        self._origins = {item.strip() for item in origins.split(",") if item.strip()}

    def headers(self, request: web.Request) -> dict[str, str]:
        """What goes on every response."""
        if not self._origins:
            return {}
        origin = request.headers.get("Origin", "")
        if "*" in self._origins:
            allowed = {"Access-Control-Allow-Origin": "*"}
        elif origin in self._origins:
            allowed = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        else:
            return {"Vary": "Origin"}
        return {**allowed, "Access-Control-Expose-Headers": ", ".join((*_NAMES, *EXPOSED))}

    def preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a browser that asks first; None for any other request."""
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        if "Access-Control-Allow-Origin" not in self.headers(request):
            return None
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
                "Access-Control-Allow-Headers": ", ".join((*ALLOWED, *_asked_by_sdk(request))),
                "Access-Control-Max-Age": "3600",
            },
        )


def _asked_by_sdk(request: web.Request) -> list[str]:
    """The headers by which OpenAI's SDKs describe themselves."""
    asked = request.headers.get("Access-Control-Request-Headers", "").split(",")
    return [name.strip() for name in asked if name.strip().lower().startswith("x-stainless-")]


def install(app: web.Application, settings: Settings) -> None:
    """Puts it around all of the application's handlers."""
    cors = Cors(settings.cors_origins)

    @web.middleware
    async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
        label = read_label(request)
        rid = secrets.token_hex(16)
        trail = Trail(rid, label or rid, asyncio.get_running_loop().time())
        request[TRAIL] = trail
        status = 499
        try:
            response = cors.preflight(request) or await _answer(request, handler)
            status = response.status
            return response
        finally:
            # Without a response the client has gone away.
            _log(request, trail, status)

    async def on_prepare(request: web.Request, response: web.StreamResponse) -> None:
        trail = request.get(TRAIL)
        if trail is not None:
            response.headers["X-Request-Id"] = trail.label
            if trail.stream_id:
                response.headers["X-Stream-Id"] = trail.stream_id
            if trail.stream_run:
                response.headers["X-Stream-Run"] = trail.stream_run
        response.headers.update(cors.headers(request))
        response.headers["Server"] = SERVER
        if request.app[EDGE].leaving:
            response.force_close()
            response.headers["Connection"] = "close"

    app.middlewares.append(around)
    app.on_response_prepare.append(on_prepare)


def json_response(value: Any, status: int = 200, headers: Any = None) -> web.Response:
    """A JSON reply."""
    return web.Response(
        body=sse.encode(value), status=status, headers=headers, content_type="application/json"
    )


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        _refuse(request, request.app[EDGE])
        return await handler(request)
    except web.HTTPException as error:
        return _of_http(request, error)
    except ConnectionError:
        raise
    except Exception as error:
        if not is_known(error):
            log.exception("a handler failed", extra={"request_id": request[TRAIL].label})
        problem = describe(error)
        request[TRAIL].facts["error"] = problem.code
        if isinstance(error, StoreUnavailable):
            request[TRAIL].facts["why"] = error.reason
        return problem_response(problem)


def _refuse(request: web.Request, edge: Edge) -> None:
    """Raises what this gateway says to anything but a probe."""
    if edge.draining and request.path not in _WHILE_DRAINING:
        raise Draining("This gateway is shutting down; another one will answer")
    if edge.connections() > edge.settings.max_connections and request.path not in _ALWAYS:
        raise TooManyConnections("This gateway has too many connections; try again later")


def _of_http(request: web.Request, error: web.HTTPException) -> web.Response:
    """What the HTTP server itself refuses, as an unknown path, in our shape."""
    messages = {
        404: f"There is nothing at {request.method} {request.path}",
        405: f"{request.method} is not allowed at {request.path}",
    }
    response = problem_response(
        http_problem(error.status, messages.get(error.status, error.reason))
    )
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def _log(request: web.Request, trail: Trail, status: int) -> None:
    level = logging.DEBUG if request.path in _QUIET else logging.INFO
    if not log.isEnabledFor(level):
        return
    took_s = asyncio.get_running_loop().time() - trail.started
    log.log(
        level,
        "request",
        extra={
            "request_id": trail.label,
            "method": request.method,
            "path": request.path,
            "status": status,
            "ms": round(took_s * 1000, 1),
            **trail.facts,
        },
    )
