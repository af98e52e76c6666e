"""Ending asyncio tasks for certain."""

from __future__ import annotations

import asyncio
from typing import Any

AGAIN_S = 0.1


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks and waits until they have ended.

    One cancel is not always enough: on CPython 3.11, `wait_for` and `timeout(0)` swallow one that
    meets a task about to run. shared/connection.py mends redis-py; other libraries use both, too.

    Raises:
        Exception: what a task raised, if it did not end by being cancelled.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=AGAIN_S)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
