"""An app with all kinds of steps, for the tests of tests."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import streamflow as sf

app = sf.App("shop", retry=sf.Retry(max_attempts=3, initial=1.0, jitter=0.0))


@app.step
async def charge(amount: int) -> str:
    """A step."""
    return f"paid {amount}"


@app.step
def pack(what: str) -> str:
    """A plain one."""
    return f"packed {what} in attempt {sf.step_info().attempt}"


@app.step(queue="lorries")
async def drive(what: str) -> str:
    """On a queue."""
    return f"drove {what}"


@app.step
async def slow(seconds: float) -> str:
    """Takes its time."""
    await asyncio.sleep(seconds)
    return "done"


@app.workflow
async def order(amount: int) -> list[str]:
    """One of each."""
    return [await charge(amount), await pack("a book"), await drive("a book")]


@app.workflow
async def wait(name: str) -> str:
    """Waits for a signal."""
    value: str = await sf.wait_signal(name, str)
    return value


@app.workflow
async def sleep(days: float) -> str:
    """Sleeps."""
    await asyncio.sleep(days * 86_400)
    return "slept"


@app.workflow
async def hurry(seconds: float, limit: float) -> str:
    """A step of its own time against a limit, beside a long sleep."""
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(86_400))
        async with asyncio.timeout(limit):
            return await slow(seconds)


@app.workflow(retention=timedelta(hours=1))
async def forget() -> str:
    """Is deleted an hour after it closed."""
    return "gone soon"
