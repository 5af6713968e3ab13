"""The app of the tests of step queues: its step says who began it, and ends when the test lets it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import streamflow as sf

FOLDER_VARIABLE = "STREAMFLOW_TEST_FOLDER"

app = sf.App("queue-shop", retry=sf.Retry.never)


@app.step(queue="gpu")
async def embed() -> int:
    """The process that ran it."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    info = sf.step_info()
    with (folder / "begun").open("a") as lines:
        lines.write(f"{os.getpid()} {info.workflow_id} {info.attempt}\n")
    while not (folder / "release").exists():  # noqa: ASYNC110
        await asyncio.sleep(0.01)  # tidy: a file has no event to wait for
    return os.getpid()


@app.workflow
async def index() -> int:
    return await embed()
