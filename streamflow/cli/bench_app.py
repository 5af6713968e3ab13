"""The app that `streamflow bench` measures. A step returns `{"i": n}`; its input is about 100 bytes."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime
from typing import Final

import streamflow as sf
from streamflow.cli.evidence import STARTED, write_line

APP_VARIABLE: Final = "STREAMFLOW_BENCH_APP"
"""The environment variable that names the app: where several measurements share one log, each has its own topics."""

app = sf.App(os.environ.get(APP_VARIABLE, "bench"))

LINE_STEP_SECONDS: Final = 0.02


@app.step
async def unit(i: int, ballast: str) -> dict[str, int]:
    """The least that a step can do, so that what is measured is the engine."""
    return {"i": i}


@app.step
async def line(i: int, ballast: str) -> dict[str, int]:
    """A step that leaves a trace outside of the engine, and takes a while."""
    write_line(STARTED)
    await asyncio.sleep(LINE_STEP_SECONDS)
    return {"i": i}


@app.workflow
async def sequential(steps: int, ballast: str) -> list[int]:
    """One step after another."""
    return [(await unit(i, ballast))["i"] for i in range(steps)]


@app.workflow
async def parallel(steps: int, ballast: str) -> list[int]:
    """All steps side by side."""
    return [each["i"] for each in await asyncio.gather(*(unit(i, ballast) for i in range(steps)))]


@app.workflow
async def parked(seconds: float, ballast: str) -> None:
    """Sleep, and nothing else."""
    await asyncio.sleep(seconds)


@app.workflow
async def alarm(due: datetime, ballast: str) -> float:
    """Sleep until `due`; how many milliseconds late the wake-up is, by the log's own time."""
    await sf.sleep_until(due)
    return (sf.now() - due.astimezone(UTC)).total_seconds() * 1000


@app.workflow
async def lines(steps: int, ballast: str) -> list[int]:
    """One step after another, each leaves a line."""
    return [(await line(i, ballast))["i"] for i in range(steps)]
