"""The app that clients in other languages start runs of. Its name comes from the test, which has topics of its own."""

from __future__ import annotations

import os

import streamflow as sf

APP_VARIABLE = "STREAMFLOW_TEST_APP"

app = sf.App(os.environ.get(APP_VARIABLE, "orders"))


@app.workflow
async def fulfil(order: dict[str, object]) -> dict[str, object]:
    return {"id": order["id"], "approved": await sf.wait_signal("approved", bool)}


@app.workflow
async def echo(value: str) -> str:
    return value
