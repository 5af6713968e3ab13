"""The app of the Kafka fault tests: ten steps one after another, each of which tells when it began and ended."""

from __future__ import annotations

import asyncio
import os
from typing import Final

import streamflow as sf
from streamflow.cli.evidence import recorded

APP_VARIABLE: Final = "STREAMFLOW_FAULTY_APP"
"""The environment variable with the app's name: each test has topics of its own."""

STEPS: Final = 10

app = sf.App(os.environ.get(APP_VARIABLE, "faulty"), retry=sf.Retry(max_attempts=5, initial=0.05, max_delay=0.2))


@app.step
async def work(index: int, seconds: float) -> int:
    with recorded():
        await asyncio.sleep(seconds)
    return index


@app.workflow
async def order(seconds: float) -> list[int]:
    return [await work(index, seconds) for index in range(STEPS)]


@app.workflow
async def parked() -> str:
    return await sf.wait_signal("go", str)
