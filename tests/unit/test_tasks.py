"""Ending tasks that swallow a cancellation."""

from __future__ import annotations

import asyncio

import pytest

from shared.tasks import end


async def test_a_task_that_swallows_a_cancellation_is_ended() -> None:
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed == 3:
                    raise

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await end(task)
    assert task.cancelled()
    assert swallowed == 3


async def test_what_a_task_raised_is_not_hidden() -> None:
    async def broken() -> None:
        raise ValueError("broken")

    task = asyncio.create_task(broken())
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="broken"):
        await end(task)


async def test_ended_tasks_are_fine() -> None:
    async def done() -> None:
        return

    task = asyncio.create_task(done())
    await task
    await end(task)
    await end()
