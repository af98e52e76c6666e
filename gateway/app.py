"""The gateway process: put together, started, drained, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal

import uvloop
from aiohttp import web

from gateway import middleware, openapi, routes_infer, routes_openai, routes_requests, status
from gateway.edge import EDGE, Edge
from gateway.flows import HANDOVER
from gateway.hub import Hub
from gateway.open_files import make_room
from gateway.protocol import Runner
from shared.settings import Settings
from shared.store import Store, connect

log = logging.getLogger(__name__)

REDIS_TIMEOUT_S = 0.8
REDIS_CONNECTIONS = 32
KEEP_ALIVE_S = 75.0
"""A connection without a request is closed after this."""
LAST_STEPS_S = 2.0
"""For events that say a stream is cut off, and for closing connections."""
_HURRY_LOOK_S = 0.1


def main(settings: Settings) -> int:
    """Runs a gateway until SIGTERM or SIGINT; the exit status."""
    wanted, room = settings.max_connections, make_room(settings.max_connections)
    if room < wanted:
        log.warning(
            "too few open files are allowed (ulimit -n) for RTS_MAX_CONNECTIONS",
            extra={"max_connections": wanted, "in_force": room},
        )
    return uvloop.run(_run(dataclasses.replace(settings, max_connections=room)))


def create_app(
    settings: Settings, *, store: Store | None = None, hub: Hub | None = None
) -> web.Application:
    """The application; its parts start and stop with it.

    Args:
        settings: of this process.
        store: to be used instead of a new one for `settings.redis_url`.
        hub: the same.
    """
    if store is None:
        client = connect(
            settings.redis_url, timeout_s=REDIS_TIMEOUT_S, connections=REDIS_CONNECTIONS
        )
        store = Store(client)
    if hub is None:
        hub = Hub(settings.redis_url, store, backlog=2 * settings.slow_client_events)
    edge = Edge(settings, store, hub)
    app = web.Application(client_max_size=settings.max_body_bytes)
    app[EDGE] = edge
    middleware.install(app, settings)
    for part in (routes_infer, routes_openai, routes_requests, status, openapi):
        part.install(app)
    app.on_startup.append(_start)
    app.on_cleanup.append(_close)
    return app


class Server:
    """An application that listens.

    Args:
        app: made by `create_app`.
    """

    def __init__(self, app: web.Application) -> None:
        self._app = app
        self._edge = app[EDGE]
        self._runner = Runner(
            app,
            access_log=None,
            handler_cancellation=True,
            keepalive_timeout=KEEP_ALIVE_S,
            auto_decompress=False,
            shutdown_timeout=LAST_STEPS_S,
        )

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._runner.addresses[0][1])

    async def start(self, host: str, port: int) -> None:
        """Listens; port 0 is any free one.

        Raises:
            OSError: the address cannot be used.
        """
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        self._edge.connections = lambda: len(server.connections)
        await web.TCPSite(self._runner, host, port, backlog=1024).start()

    async def drain(
        self, grace_s: float, hurry: asyncio.Event | None = None, *, delay_s: float = 0.0
    ) -> None:
        """Says that it goes away, then takes no requests any more and ends the streams.

        Requests are still served for `delay_s`: a load balancer sends them until it has seen that
        this gateway is not ready. Then resumable streams are closed at once, for their clients to
        go on elsewhere; plain ones have `grace_s`; what is left gets an error. `hurry` cuts both
        times short.
        """
        edge = self._edge
        hurry = hurry or asyncio.Event()
        edge.leaving = True
        if delay_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await hurry.wait()
        edge.draining = True
        ends_at = asyncio.get_running_loop().time() + grace_s
        while True:
            # Each time: what was about to be accepted when it began opens a moment later.
            for flow in edge.flows:
                if flow.moves and flow.response is not None:
                    flow.stop(HANDOVER)
            left_s = ends_at - asyncio.get_running_loop().time()
            if left_s <= 0 or hurry.is_set():
                break
            if await edge.flows.empty(min(left_s, _HURRY_LOOK_S)):
                break
        for flow in edge.flows:
            flow.stop("gateway_draining")
        await edge.flows.empty(LAST_STEPS_S)

    async def stop(self) -> None:
        """Closes the listener and all connections, then the application's parts."""
        await self._runner.cleanup()


async def _run(settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    server = Server(create_app(settings))
    try:
        await server.start(settings.host, settings.port)
        log.info("listening", extra={"host": settings.host, "port": settings.port})
        await stop.wait()
        delay_s, grace_s = settings.drain_delay_s, settings.drain_grace_s
        log.info("draining", extra={"delay_s": delay_s, "grace_s": grace_s})
        await server.drain(grace_s, hurry, delay_s=delay_s)
    except OSError as error:
        log.error("cannot listen", extra={"error": str(error)})
        return 1
    finally:
        await server.stop()
    log.info("stopped")
    return 0


async def _start(app: web.Application) -> None:
    await app[EDGE].start()


async def _close(app: web.Application) -> None:
    await app[EDGE].close()
