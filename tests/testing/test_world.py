"""`world`: the simulated world by hand, inside of an ordinary asyncio test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

import streamflow as sf
from tests.testing.shop import app, charge, order, pack, sleep, slow, wait

World = sf.testing.World


def by_hand(test: Callable[[World], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with sf.testing.world(app, **options) as world:
            await test(world)

    asyncio.run(run())


def test_what_a_client_can_do_can_be_done_here():
    async def test(world: World) -> None:
        run = await world.client.start(order, 5, id="order-1")
        assert await run.result() == ["paid 5", "packed a book in attempt 1", "drove a book"]
        assert (run.id, repr(run)) == ("order-1", "<run order-1>")
        assert (await run.status()).state == "completed"
        assert [step.name for step in (await run.steps()).items] == ["charge", "pack", "drive"]
        assert (await run.history())[-1].type == "RunCompleted"
        assert [status.id for status in (await world.client.list()).items] == ["order-1"]
        waiting = await world.client.start(wait, "go", id="w-1")
        await world.client.handle("w-1").signal("go", "on")
        states = [status.state async for status in waiting.watch()]
        assert states[-1] == "completed"
        await (await world.client.start(wait, "go", id="w-2")).cancel()
        with pytest.raises(sf.WorkflowCancelled):
            await world.client.handle("w-2").result()

    by_hand(test)


def test_time_passes_as_far_as_is_needed_and_no_further():
    async def test(world: World) -> None:
        begun = world.now
        run = await world.client.start(sleep, 30)
        assert (await run.status()).state == "running"
        assert world.now - begun < timedelta(seconds=1)
        await world.advance(timedelta(days=29))
        assert timedelta(days=29) <= world.now - begun < timedelta(days=29, seconds=2)
        assert (await run.status()).state == "running"
        assert await run.result() == "slept"
        assert timedelta(days=30) <= world.now - begun < timedelta(days=30, seconds=2)
        assert world.events < 2_000, "far less than the seconds of a month"

    by_hand(test)


@pytest.mark.parametrize("keep_disk", [True, False])
def test_a_crash_keeps_the_log_and_loses_what_was_running(keep_disk: bool):
    async def test(world: World) -> None:
        sleeper = await world.client.start(sleep, 1)
        world.mock_step(charge, lambda amount: asyncio.sleep(100, "paid late"))  # tidy: of the world's own time
        payer = await world.client.start(order, 5)
        await world.advance(50)
        await world.crash_worker(keep_disk=keep_disk)
        assert (await payer.result())[0] == "paid late"
        assert [call.attempt for call in world.calls(charge)] == [1, 1], "it began again under its number"
        assert await sleeper.result() == "slept"

    by_hand(test)


def test_one_of_two_workers_crashes():
    async def test(world: World) -> None:
        runs = [await world.client.start(sleep, 1) for _ in range(4)]
        await world.crash_worker(1)
        assert [await run.result() for run in runs] == ["slept"] * 4

    by_hand(test, workers=2)


def test_steps_fail_are_mocked_and_counted():
    async def test(world: World) -> None:
        world.fail_step(charge, error=ConnectionError("no bank"))
        world.mock_step("pack", "nothing")
        run = await world.client.start(order, 5)
        assert await run.result() == ["paid 5", "nothing", "drove a book"]
        assert [(call.step, call.attempt) for call in world.calls()] == [
            ("charge", 1), ("charge", 2), ("pack", 1), ("drive", 1),
        ]  # fmt: skip
        assert world.calls(pack)[0].workflow_id == run.id

    by_hand(test)


def test_two_that_wait_at_once_both_get_on():
    async def test(world: World) -> None:
        run = await world.client.start(wait, "go", id="w-1")

        async def send() -> None:
            await asyncio.sleep(0)
            await run.signal("go", "on")

        result, _ = await asyncio.gather(run.result(), send())
        assert result == "on"

    by_hand(test)


def test_what_is_cancelled_ends():
    async def test(world: World) -> None:
        run = await world.client.start(wait, "go", id="w-1")
        waiting = asyncio.get_running_loop().create_task(run.result())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await run.signal("go", "on")
        assert await run.result() == "on"

    by_hand(test)


def test_nothing_left_to_happen_is_said_and_not_waited_for():
    async def test(world: World) -> None:
        run = await world.client.start(wait, "go", id="w-1")
        with pytest.raises(sf.testing.SimulationFailed, match=r"nothing is left to happen.*w-1 \(wait\): running"):
            await run.result()
        with pytest.raises(sf.testing.SimulationFailed, match="nothing is left to happen"):
            await run.status()  # the world is over

    by_hand(test)


def test_a_result_with_a_timeout_is_a_timeout_of_virtual_time():
    async def test(world: World) -> None:
        run = await world.client.start(wait, "go", id="w-1")
        begun = world.now
        with pytest.raises(TimeoutError, match="was not closed within 3600 s"):
            await run.result(timeout=3600)
        assert timedelta(hours=1) <= world.now - begun < timedelta(hours=1, seconds=1)

    by_hand(test)


def test_what_the_test_raises_has_a_note_that_names_the_seed():
    async def test(world: World) -> None:
        await (await world.client.start(order, 5, id="order-1")).result()
        assert not world.calls(charge)

    with pytest.raises(AssertionError, match="assert not") as failed:
        by_hand(test, seed=5)
    (note,) = failed.value.__notes__
    assert note.startswith("seed 5, after ") and "the test failed" in note
    assert "Play it again: world(app, seed=5)" in note and "run order-1: RunCompleted" in note


def test_a_step_that_waits_for_the_tests_own_loop_is_told_so():
    real = sf.App("real")
    futures: list[asyncio.Future[None]] = []

    @real.step
    async def step() -> None:
        await futures[0]

    @real.workflow
    async def reach() -> None:
        await step()

    async def run() -> None:
        futures.append(asyncio.get_running_loop().create_future())
        async with sf.testing.world(real) as world:
            with pytest.raises(sf.testing.SimulationFailed, match=r"step step .* waits for a future, lock or event of"):
                await (await world.client.start(reach)).result()

    asyncio.run(run())
    assert not futures[0].done()


def test_a_world_that_is_closed_says_so():
    async def run() -> None:
        async with sf.testing.world(app) as world:
            handle = await world.client.start(sleep, 0)
        with pytest.raises(sf.StreamflowError, match="the simulated world is closed: await it inside its `async with`"):
            await handle.result()
        with pytest.raises(sf.StreamflowError, match="is closed"):
            await world.advance(1)

    asyncio.run(run())


def test_a_world_is_opened_by_async_with_and_once():
    world = sf.testing.world(app)
    said = r"`async with sf\.testing\.world\(app\) as world:`, in an async test; a test with"
    with pytest.raises(TypeError, match=said), world:  # type: ignore[attr-defined]
        pass
    with pytest.raises(AttributeError, match="no 'client' yet: world"):
        world.client  # type: ignore[attr-defined]  # that is the point

    async def run() -> None:
        async with world as opened:
            assert opened.seed == 0
        with pytest.raises(sf.StreamflowError, match="a world is opened once"):
            async with world:
                pass

    asyncio.run(run())


def test_an_option_that_does_not_exist_is_refused_at_the_call():
    with pytest.raises(
        TypeError, match=r"world\(\) has no option 'seeds': did you mean 'seed'\? Its options are seed, cra"
    ):
        sf.testing.world(app, seeds=range(3))  # type: ignore[call-arg]


def test_the_same_seed_is_the_same_story():
    async def play(seed: int) -> tuple[int, object]:
        async with sf.testing.world(app, seed=seed, crash_after_every_turn=True) as world:
            result = await (await world.client.start(order, 5)).result()
            return world.events, result

    first, again, other = (asyncio.run(play(seed)) for seed in (3, 3, 4))
    assert first == again
    assert first[0] != other[0]


def test_a_steps_own_time_is_virtual():
    async def test(world: World) -> None:
        world.mock_step(slow, "at once")
        week = 7 * 86_400
        world.mock_step(charge, lambda amount: asyncio.sleep(week, "paid late"))  # tidy: of the world's own time
        begun = world.now
        run = await world.client.start(order, 5)
        assert (await run.result())[0] == "paid late"
        assert timedelta(days=7) <= world.now - begun < timedelta(days=7, seconds=2)

    by_hand(test)
