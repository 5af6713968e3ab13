"""The app of the Kafka tests of step queues: one step on a queue, which tells when it began and ended."""

from __future__ import annotations

import asyncio
import os

import streamflow as sf
from streamflow.cli.evidence import recorded
from tests.kafka.faulty_app import APP_VARIABLE

app = sf.App(os.environ.get(APP_VARIABLE, "queued"), retry=sf.Retry.never)


@app.step(queue="gpu")
async def embed(number: int, seconds: float) -> int:
    with recorded():
        await asyncio.sleep(seconds)
    return number


@app.workflow
async def index(number: int, seconds: float) -> int:
    return await embed(number, seconds)
