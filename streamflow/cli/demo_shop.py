"""The demo's app: a shop, written as anybody would write it. `recorded()` alone is the demo's own (see `evidence`)."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from datetime import timedelta

import streamflow as sf
from streamflow.cli.evidence import recorded

app = sf.App("shop")

NEEDS_APPROVAL_ABOVE = 100


@dataclass
class Order:
    """What a customer wants; `total` in euros."""

    id: str
    total: int


@dataclass
class Receipt:
    """How an order ended."""

    order_id: str
    payment: str
    parcel: str
    approved: bool


@app.step(retry=sf.Retry(max_attempts=None, initial=0.1, max_delay=2.0), timeout=10)
async def charge(order: Order) -> str:
    """Take the money. The payment provider fails three times in ten; streamflow tries again."""
    with recorded():
        await asyncio.sleep(random.uniform(0.05, 0.25))
        if random.random() < 0.3:
            raise ConnectionError("the payment provider does not answer")
        # The same key for all attempts: a real provider charges once, however often it is asked.
        return f"payment-{sf.step_info().idempotency_key}"


@app.step
def reserve(order: Order) -> str:
    """Set the goods aside. A plain function: it runs in a thread, so it may block."""
    with recorded():
        time.sleep(random.uniform(0.02, 0.1))
        return f"parcel-{order.id}"


@app.step
async def ship(order: Order, parcel: str) -> None:
    """Hand the parcel over."""
    with recorded():
        await asyncio.sleep(random.uniform(0.05, 0.15))


@app.step
async def refund(payment: str) -> None:
    """Give the money back."""
    with recorded():
        await asyncio.sleep(0.05)


@app.workflow
async def fulfil(order: Order) -> Receipt:
    """Pay and pack at the same time, leave time to change one's mind, ask a person about large orders, ship."""
    payment, parcel = await asyncio.gather(charge(order), reserve(order))
    await asyncio.sleep(1.0)  # durable: the run needs no worker meanwhile, and it could as well be 30 days
    approved = True
    if order.total > NEEDS_APPROVAL_ABOVE:
        try:
            approved = await sf.wait_signal("approved", bool, timeout=timedelta(days=7))
        except TimeoutError:
            approved = False
    if approved:
        await ship(order, parcel)
    else:
        await refund(payment)
    return Receipt(order.id, payment, parcel, approved)
