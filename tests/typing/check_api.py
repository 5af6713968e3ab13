"""What type checkers must see of the public names: read by mypy and pyright, never run (tests/typing/test_types.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type

import streamflow as sf
from streamflow.testing.plugin import Simulations

app = sf.App("shop", retry=sf.Retry(max_attempts=3), max_parallel_steps=8)


@dataclass
class Order:
    """An argument."""

    id: str
    total: int


@app.step
async def charge(order_id: str, amount: int) -> str:
    """A plain decorator."""
    return order_id


@app.step(retry=sf.Retry.never, timeout=timedelta(seconds=3))
def reserve(order_id: str) -> int:
    """A decorator with options, on a plain function."""
    return len(order_id)


@app.workflow
async def fulfil(order: Order, express: bool = False) -> dict[str, str]:
    """Calls of steps have their functions' parameters and results."""
    assert_type(await charge(order.id, order.total), str)
    assert_type(await charge(order_id=order.id, amount=1), str)
    assert_type(await reserve.options(delay=3, name="again")(order.id), int)
    paid, places = await asyncio.gather(charge(order.id, 1), reserve(order.id))
    assert_type(paid, str)
    assert_type(places, int)
    assert_type(await sf.wait_signal("approved", bool, timeout=timedelta(days=7)), bool)
    assert_type(sf.now(), datetime)
    with app.defaults(retry=sf.Retry.never):
        await charge(order.id, "5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await charge(order.id)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    return {}


@app.workflow(timeout=60)
async def sweep() -> None:
    """A workflow without arguments."""


async def use() -> None:
    """A start is typed by the workflow's function, a handle by its result."""
    async with app.serve("memory://", max_parallel_steps=3) as client:
        assert_type(client, sf.Client)
    async with sf.connect("memory://", app="shop") as client:
        handle = await client.start(fulfil, Order("o-1", 3), id="o-1", context={"by": "ann"})
        assert_type(handle, sf.Handle[dict[str, str]])
        assert_type(await handle.result(timeout=3), dict[str, str])
        assert_type(await client.start(fulfil, Order("o-2", 3), True), sf.Handle[dict[str, str]])
        assert_type(await client.start(sweep, at=datetime.now(UTC)), sf.Handle[None])
        assert_type(await client.start("anything", 1, "x", delay=5), sf.Handle[Any])
        assert_type(client.handle("o-1"), sf.Handle[Any])
        assert_type(client.handle("o-1", fulfil), sf.Handle[dict[str, str]])
        go = client.start
        await go(fulfil, "o-1")  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue,reportArgumentType]
        await go(sweep, 1)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue,reportArgumentType]
        wrong = "replace"
        await go(sweep, if_exists=wrong)  # type: ignore[call-overload,call-arg]  # pyright: ignore[reportArgumentType]

        async for status in handle.watch():
            assert_type(status, sf.RunStatus)
        steps = await handle.steps(order="desc", limit=5)
        assert_type(steps.items, list[sf.StepView])
        assert_type(steps.cursor, str | None)
        assert_type(await handle.history(), list[sf.HistoryEvent])
        assert_type(await client.list(workflow=fulfil, state="failed"), sf.Page[sf.RunStatus])
        assert_type(await handle.cleanup(force=True), bool)
        await handle.signal("approved", True, id="once")


async def scenario(client: sf.Client) -> int:
    """What a simulated world plays."""
    return len((await client.list()).items)


def simulated(given: Simulations) -> None:
    """A world's options are the same wherever one is made; what is played has the scenario's result."""
    assert_type(sf.testing.simulate(app, scenario, faults=2, workers=3).result, int)
    assert_type(sf.testing.simulate(app, scenario, seeds=range(3)), list[sf.testing.Played[int]])
    assert_type(given.simulate(app, scenario, seeds=50, queues=["gpu"]), list[sf.testing.Played[int]])
    sf.testing.world(app, seed=3, crash_after_every_turn=True)
    given.world(app, steps_max="a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    sf.testing.world(app, worker=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def as_any_result(handle: sf.Handle[int]) -> sf.Handle[object]:
    """A handle is covariant in its result."""
    return handle


def outside() -> Coroutine[None, None, str]:
    """Outside of a workflow a step is the function itself."""
    return charge("o-1", 5)
