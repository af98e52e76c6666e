"""Shows that an engine lives: a heartbeat each second and a subscribed control channel."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from shared import keys, messages
from shared.errors import StoreUnavailable
from shared.store import Store, connect, unavailable

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
PING_S = 0.25
SILENT_S = 1.0


async def listen(store: Store, url: str, engine: str, heard: asyncio.Event) -> None:
    """Stays subscribed to the engine's control channel, for ever; `heard` is set while it is.

    Other engines count the subscribers: a killed process is noticed at once, long before its lease
    runs out. A new server is greeted first: from then on it counts how long others have had to come
    back.
    """
    while True:
        client = connect(url, timeout_s=5.0, connections=1)
        try:
            async with unavailable():
                pubsub = client.pubsub()
                await pubsub.subscribe(keys.control_channel(engine))
                await _watch(store, pubsub, heard)
        except StoreUnavailable as error:
            heard.clear()
            log.warning("control channel lost", extra={"error": error.reason})
            await asyncio.sleep(0.1)
        finally:
            heard.clear()
            await client.aclose(close_connection_pool=True)


async def _watch(store: Store, pubsub: Any, heard: asyncio.Event) -> None:
    """Asks for a sign of life: a half-open connection would be silent for ever."""
    loop = asyncio.get_running_loop()
    heard_at = loop.time()
    while True:
        await pubsub.ping()
        while (message := await pubsub.get_message(timeout=PING_S)) is not None:
            heard_at = loop.time()
            if message["type"] == "subscribe":
                await store.greet()
                heard.set()
            elif message["type"] == "pong":
                await asyncio.sleep(PING_S)
                break
        if loop.time() - heard_at > SILENT_S:
            raise TimeoutError(f"no answer for {SILENT_S} s")


async def beat(
    store: Store,
    model: messages.ModelCard,
    card: Callable[[], messages.EngineCard],
    leaving: asyncio.Event,
) -> None:
    """Publishes the model's files, then announces the engine each second until it is `leaving`."""
    published = False
    while not leaving.is_set():
        try:
            if not published:
                await store.publish_model(model)
                published = True
            now = card()
            await store.heartbeat(model.model, model.version, now.engine, now)
            if not await _files_are_there(store, model):
                published = False
                continue
        except StoreUnavailable as error:
            log.warning("no heartbeat", extra={"error": error.reason})
            published = False
        with suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_S):
                await leaving.wait()


async def _files_are_there(store: Store, model: messages.ModelCard) -> bool:
    async with unavailable():
        mv = keys.model_version(model.model, model.version)
        return bool(await store.client.exists(keys.files(mv)))
