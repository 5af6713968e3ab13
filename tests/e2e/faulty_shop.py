"""The app of the fault tests: workflows of every kind of wait, whose steps write lines that a checker reads."""

from __future__ import annotations

import asyncio
import time

import streamflow as sf
from streamflow.cli.evidence import recorded

app = sf.App("faulty-shop", retry=sf.Retry(max_attempts=5, initial=0.02, max_delay=0.1))


@app.step
async def work(index: int) -> int:
    with recorded():
        await asyncio.sleep(0.02)
    return index


@app.step
def work_in_a_thread(index: int) -> int:
    with recorded():
        time.sleep(0.02)
    return index


@app.step
async def flaky(index: int) -> int:
    with recorded():
        if sf.step_info().attempt < 3:
            raise ConnectionError(f"no answer for {index}")
    return index


@app.step
async def forgets_to_await(seconds: float) -> str:
    with recorded():
        time.sleep(seconds)  # noqa: ASYNC251 - the mistake that is tested: it blocks the event loop
    return "done"


@app.workflow
async def order(items: int) -> int:
    total = 0
    for index in range(items):
        total += await work(index)
    total += sum(await asyncio.gather(*(work_in_a_thread(index) for index in range(3))))
    await asyncio.sleep(0.1)
    total += await flaky(5)
    total += await sf.wait_signal("approved", int, timeout=60)
    return total


@app.workflow
async def interrupts() -> None:
    raise KeyboardInterrupt


@app.workflow
async def slow(seconds: float) -> str:
    return await forgets_to_await(seconds)
