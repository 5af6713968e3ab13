"""Steps at the top of a module, as a pool process needs them."""

from __future__ import annotations

import asyncio
import os
import time

import streamflow as sf
from streamflow.workflow.stepinfo import step_info

app = sf.App("steps")


class Awkward(Exception):
    """Cannot be pickled and made again: its constructor takes something else than its args."""

    def __init__(self, code: int, *, place: str) -> None:
        super().__init__(f"{code} at {place}")


@app.step(process=True)
def add(a: int, b: int) -> int:
    return a + b


@app.step(process=True)
def who() -> list[object]:
    return [os.getpid(), step_info().idempotency_key]


@app.step(process=True)
def die() -> None:
    os._exit(7)


@app.step(process=True)
def hang() -> None:
    while True:
        time.sleep(60)


@app.step(process=True)
def fail(kind: str) -> None:
    match kind:
        case "awkward":
            raise Awkward(3, place="home")
        case "exit":
            raise SystemExit(4)
        case "interrupt":
            raise KeyboardInterrupt
        case "cancelled":
            raise asyncio.CancelledError("gone")
        case "local":
            raise type("Nameless", (Exception,), {"__reduce__": None})("no name")
        case _:
            raise ValueError(kind)
