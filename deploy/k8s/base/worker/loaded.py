"""Startup probe of a worker: whether this pod's engine has loaded and listens.

A worker has no port, so Redis is asked for the channel that its engine subscribes to once it is
warm. Only until the first yes: an outage of Redis later on must not restart workers, and a probe's
Python would take time from the engine's threads.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import Any

from shared import keys
from shared.store import connect

TIMEOUT_S = 3.0


async def is_listening(url: str, host: str) -> bool:
    """Whether an engine of this host is subscribed to its control channel."""
    client: Any = connect(url, timeout_s=TIMEOUT_S)
    try:
        # An engine's name is its host, its process and a random part.
        return bool(await client.pubsub_channels(keys.control_channel(f"{host}-*")))
    finally:
        await client.aclose(close_connection_pool=True)


if __name__ == "__main__":
    url = os.environ["RTS_REDIS_URL"]
    sys.exit(not asyncio.run(is_listening(url, socket.gethostname())))
