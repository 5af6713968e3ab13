"""A small app for the processor: steps, signals, sleeps, failures."""

from __future__ import annotations

import asyncio
from typing import Any

import streamflow as sf

app = sf.Registry()


@app.step
async def work(n: int) -> int:
    return n


@app.step(at_most_once=True)
async def once(n: int) -> int:
    return n


@app.step(queue="gpu", timeout=5, retry=sf.Retry(max_attempts=2, initial=1, jitter=0))
async def embed(n: int) -> int:
    return n


@app.workflow
async def remote(n: int) -> int:
    return await embed(n)


@app.workflow
async def line(n: int) -> int:
    """`n` steps, one after the other."""
    total = 0
    for i in range(n):
        total += await work(i)
    return total


@app.workflow(retention=1.5)
async def brief() -> int:
    """Kept for a moment only when it is closed."""
    return await work(1)


@app.workflow
async def fan(n: int) -> int:
    """`n` steps at once."""
    return sum(await asyncio.gather(*(work(i) for i in range(n))))


@app.workflow
async def careful() -> int:
    return await once(1)


@app.workflow
async def listens() -> list[Any]:
    """Collects signals until one is null; each is shown as progress."""
    heard: list[Any] = []
    while (value := await sf.wait_signal("s")) is not None:
        heard.append(value)
        sf.progress(value if len(str(value)) < 100 else len(str(value)))
    return heard


@app.workflow
async def sleeps(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "awake"


@app.workflow
async def mixed() -> int:
    """Waits for a signal or a timeout, then for two steps of which one may fail."""
    try:
        await sf.wait_signal("s", timeout=5)
    except TimeoutError:
        sf.progress("late")
    first, second = await asyncio.gather(work(1), work(2), return_exceptions=True)
    return len([outcome for outcome in (first, second) if isinstance(outcome, int)])
