"""The HTTP protocol of aiohttp, with our answers to what is refused before any handler runs."""

from __future__ import annotations

import logging
import secrets
from typing import Any

from aiohttp import web

from gateway import sse
from gateway.errors import Problem, describe, http_problem

log = logging.getLogger(__name__)

SERVER = "realtime-ai-serve"
"""Instead of the versions of everything."""


def problem_response(problem: Problem) -> web.Response:
    """An error as a reply."""
    response = web.Response(
        body=sse.encode(problem.body()),
        status=problem.status,
        headers=problem.headers,
        content_type="application/json",
    )
    if problem.headers.get("Connection") == "close":
        response.force_close()
    return response


class Protocol(web.RequestHandler):
    """One connection."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The reply to what is no HTTP, or to a defect that got past all handlers."""
        if status < 500:
            # Neither the reply nor the log repeats what may be anything.
            kind = type(exc).__name__
            response = self._refusal(http_problem(status, f"This is not valid HTTP: {kind}"), kind)
        else:
            # A client that left while it was written to is in the access log, and no defect.
            if not isinstance(exc, ConnectionError):
                log.error("a request failed", exc_info=exc)
            response = problem_response(describe(RuntimeError()))
        if request.writer.output_size > 0:
            raise ConnectionError("a response had begun")
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Sends the reply; one that aiohttp made before any handler ran, as to Expect, as ours."""
        if isinstance(resp, web.HTTPException):
            problem = http_problem(resp.status, resp.reason)
            resp = self._refusal(problem, type(resp).__name__)
            resp.force_close()
        return await super().finish_response(request, resp, start_time)

    def look_for_end(self) -> None:
        """Notices a client's leaving, behind whatever it sent ahead.

        Reading is paused when that is too much to be kept. It is then thrown away, and the
        connection closes after the reply at hand.
        """
        if self._reading_paused or self._buffer_paused:
            self._close = True
            self._resume_transport_reading()

    def _refusal(self, problem: Problem, kind: str) -> web.Response:
        rid = secrets.token_hex(16)
        log.info("refused", extra={"request_id": rid, "status": problem.status, "problem": kind})
        response = problem_response(problem)
        response.headers["X-Request-Id"] = rid
        response.headers["Server"] = SERVER
        return response


class Runner(web.AppRunner):
    """Runs an application on connections of this kind."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        assert made.request_handler is not None
        return _Server(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            **made._kwargs,
        )


class _Server(web.Server):
    """Makes connections."""

    def __call__(self) -> Protocol:
        options: dict[str, Any] = self._kwargs
        return Protocol(self, loop=self._loop, **options)
