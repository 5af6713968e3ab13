"""An approval, a cancel and a time limit that race, under random faults: whatever wins, all must agree on it."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import streamflow as sf

app = sf.App("orders")

shelf: dict[str, str] = {}
"""Stands for a warehouse: who has which parcel."""


@app.step
async def reserve(order: str) -> None:
    """Puts a parcel aside; a late attempt, from a worker that was paused, must not undo what came after it."""
    shelf.setdefault(order, "reserved")


@app.step
async def release(order: str) -> None:
    """Puts it back, as often as one likes."""
    shelf[order] = "free"


@app.step
async def ship(order: str) -> None:
    """Hands it over."""
    shelf[order] = "shipped"


@app.workflow
async def check_out(order: str) -> str:
    """Ship what is approved within a minute; put everything else back."""
    try:
        await reserve(order)
        approved = await sf.wait_signal("approved", bool, timeout=timedelta(minutes=1))
    except (TimeoutError, asyncio.CancelledError):
        await release(order)
        raise
    if not approved:
        await release(order)
        return "refused"
    shipping = asyncio.create_task(ship(order))
    try:
        await asyncio.shield(shipping)
    except asyncio.CancelledError:
        await shipping  # too late: without this, the run is cancelled, and the parcel gone
    return "shipped"


async def race(client: sf.Client) -> str:
    """Approve and cancel at the same time, about when the limit is over; what the run says is what the shelf says."""
    shelf.clear()
    run = await client.start(check_out, "o-1")
    await asyncio.sleep(59.9)
    await asyncio.gather(run.signal("approved", True), run.cancel(), return_exceptions=True)  # it may be closed
    try:
        said = await run.result()
    except sf.WorkflowCancelled:
        said = "cancelled"
    except sf.WorkflowFailed as error:
        said = f"failed with {error.error.type}"
    assert (said, shelf["o-1"]) in {
        ("shipped", "shipped"),
        ("cancelled", "free"),
        ("failed with TimeoutError", "free"),
    }
    return said


def test_whatever_wins_the_shelf_agrees() -> None:
    """Over 20 seeds, each with 8 faults: crashes, pauses, lost and late writes, brokers away, clocks that jump."""
    played = sf.testing.simulate(app, race, seeds=range(20), faults=8, workers=2)
    assert len({each.result for each in played}) > 1, "more than one of them wins now and then"
