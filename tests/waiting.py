"""Waiting for what announces itself nowhere: asked again and again, until a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

DEADLINE_SECONDS = 60.0
"""For a fact that never comes. It measures no speed: on a machine with other work, 20 seconds were not enough."""


async def until(true: Callable[[], object]) -> None:
    """Wait until it holds; fail after the deadline."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + DEADLINE_SECONDS
    while not true():
        assert loop.time() < give_up_at, f"it did not hold within {DEADLINE_SECONDS} s"
        await asyncio.sleep(0.001)  # tidy: what is waited for has no event


async def until_async(true: Callable[[], Awaitable[object]]) -> None:
    """The same of what must be awaited to be known."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + DEADLINE_SECONDS
    while not await true():
        assert loop.time() < give_up_at, f"it did not hold within {DEADLINE_SECONDS} s"
        await asyncio.sleep(0.001)  # tidy: what is waited for has no event
