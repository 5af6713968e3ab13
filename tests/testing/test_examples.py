"""The examples of `streamflow/testing/examples` hold, and so do their claims."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import streamflow as sf
from streamflow.testing.examples import booking, checkout, reminder

TESTS: list[Callable[[], None]] = [
    function
    for module in (reminder, booking, checkout)
    for name, function in vars(module).items()
    if name.startswith("test_")
]


@pytest.mark.parametrize("test", TESTS, ids=lambda test: f"{test.__module__.rpartition('.')[2]}-{test.__name__}")
def test_an_example_holds(test: Callable[[], None]):
    test()
    assert test.__doc__, "an example says what it shows"


def test_there_are_three_examples():
    assert {test.__module__.rpartition(".")[2] for test in TESTS} == {"reminder", "booking", "checkout"}


def test_the_example_of_the_race_finds_its_bug():
    """Without the shield, a cancel that comes while the parcel leaves makes the run lie."""
    app = sf.App("orders")

    @app.workflow
    async def check_out(order: str) -> str:
        await reserve(order)
        if await sf.wait_signal("approved", bool):
            await ship(order)
        return "shipped"

    @app.step
    async def reserve(order: str) -> None:
        checkout.shelf.setdefault(order, "reserved")

    @app.step
    async def ship(order: str) -> None:
        checkout.shelf[order] = "shipped"

    async def race(client: sf.Client) -> None:
        checkout.shelf.clear()
        run = await client.start(check_out, "o-1")
        await run.signal("approved", True)
        await run.cancel()
        with pytest.raises(sf.WorkflowCancelled):
            await run.result()
        assert checkout.shelf.get("o-1", "free") == "free"

    with pytest.raises(sf.testing.SimulationFailed) as failed:
        sf.testing.simulate(app, race, seeds=range(20), faults=8)
    assert failed.value.__cause__ is not None
