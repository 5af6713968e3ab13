"""Steps that run side by side: in another order under another seed, in the same one under the same."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

import streamflow as sf
from streamflow.testing.options import STEP_DELAY_SECONDS

SEEDS = range(8)
app = sf.App("offers", retry=sf.Retry.never)


@app.step
async def ask_near() -> int:
    """The cheaper one."""
    return 5


@app.step
def ask_far() -> int:
    """A plain function."""
    return 7


@app.step
async def check() -> None:
    """Comes before an offer."""


@app.step(timeout=0.01)
async def hasty() -> str:
    """Has little time."""
    return "in time"


@app.workflow
async def ask_both() -> list[int]:
    """The offers as they come in: whoever takes the first for the cheapest has written a race."""
    offers: list[int] = []

    async def ask(step: sf.Step[[], int]) -> None:
        offers.append(await step())

    await asyncio.gather(ask(ask_near), ask(ask_far))
    return offers


@app.workflow
async def ask_after_check() -> list[int]:
    """One of them takes two steps."""
    offers: list[int] = []

    async def near() -> None:
        await check()
        offers.append(await ask_near())

    async def far() -> None:
        offers.append(await ask_far())

    await asyncio.gather(near(), far())
    return offers


@app.workflow
async def hurry() -> str:
    """A step with a timeout."""
    return await hasty()


@app.workflow
async def one_after_another() -> list[int]:
    """No race."""
    return [await ask_near(), await ask_far()]


def play(workflow: Any, **options: Any) -> list[Any]:
    async def scenario(client: sf.Client) -> Any:
        return await (await client.start(workflow)).result()

    return [each.result for each in sf.testing.simulate(app, scenario, **options)]


async def cheapest(client: sf.Client) -> None:
    offers = await (await client.start(ask_both)).result()
    assert offers[0] == 5, "the first is the cheapest"


def test_a_race_that_a_user_wrote_is_found_within_a_few_seeds():
    with pytest.raises(sf.testing.SimulationFailed, match="the first is the cheapest") as failed:
        sf.testing.simulate(app, cheapest, seeds=SEEDS)
    text = str(failed.value)
    assert f"Play it again: simulate(app, cheapest, seed={failed.value.seed})" in text
    with pytest.raises(sf.testing.SimulationFailed) as again:
        sf.testing.simulate(app, cheapest, seed=failed.value.seed)
    assert str(again.value) == text


def test_without_delays_it_is_found_by_nobody():
    """A plain step takes some time of its own; an async one takes none."""
    assert {tuple(offers) for offers in play(ask_both, seeds=SEEDS, step_delay=0)} == {(5, 7)}


@pytest.mark.parametrize("workflow", [ask_both, ask_after_check], ids=lambda workflow: workflow.name)
def test_the_same_seed_is_the_same_order(workflow: Any):
    orders = play(workflow, seeds=SEEDS)
    assert {tuple(offers) for offers in orders} == {(5, 7), (7, 5)}
    assert play(workflow, seeds=SEEDS) == orders


def test_what_is_no_race_stays_in_order():
    assert {tuple(offers) for offers in play(one_after_another, seeds=SEEDS)} == {(5, 7)}


def test_a_delay_takes_a_tenth_of_an_attempts_timeout_at_most():
    assert play(hurry, seeds=SEEDS, step_delay=60) == ["in time"] * len(SEEDS)


@pytest.mark.parametrize("step_delay", [2, timedelta(days=2)], ids=str)
def test_a_delay_is_as_long_as_the_test_says(step_delay: float | timedelta):
    async def scenario(client: sf.Client, world: sf.testing.World) -> timedelta:
        begun = world.now
        await (await client.start(one_after_another)).result()
        return world.now - begun

    limit = step_delay if isinstance(step_delay, timedelta) else timedelta(seconds=step_delay)
    took = [each.result for each in sf.testing.simulate(app, scenario, seeds=SEEDS, step_delay=step_delay)]
    assert limit / 2 < max(took) < 4 * limit + timedelta(seconds=1)
    usual = [each.result for each in sf.testing.simulate(app, scenario, seeds=SEEDS)]
    assert all(each.total_seconds() < 4 * STEP_DELAY_SECONDS + 1 for each in usual)


def test_by_hand_nothing_is_held_up_unless_asked_for():
    async def order(**options: Any) -> tuple[int, ...]:
        async with sf.testing.world(app, **options) as world:
            return tuple(await (await world.client.start(ask_both)).result())

    async def test() -> None:
        assert {await order(seed=seed) for seed in SEEDS} == {(5, 7)}
        asked = [await order(seed=seed, step_delay=0.05) for seed in SEEDS]
        assert set(asked) == {(5, 7), (7, 5)}
        assert asked == [await order(seed=seed, step_delay=0.05) for seed in SEEDS]

    asyncio.run(test())


def test_a_delay_that_is_none_is_refused():
    with pytest.raises(sf.InvalidArguments, match="step_delay"):
        sf.testing.simulate(app, cheapest, step_delay=-1)
