"""Virtual time, and processes that are stopped and killed."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import AsyncIterator
from operator import mul

import pytest

from streamflow.sim.world import Process, Stuck, TooLong, World


def ended(task: asyncio.Task[object]) -> bool:
    return task.done()


def test_a_month_passes_in_no_time():
    world = World(1)
    process = world.process("one")
    task = process.run(asyncio.sleep(30 * 86_400.0))  # tidy: of the world's own time
    world.run(task.done, seconds=40 * 86_400.0, steps=100)
    assert world.now == pytest.approx(30 * 86_400.0)
    world.close()


def test_a_clock_that_drifts_wakes_by_its_own_time():
    world = World(1)
    process = world.process("slow")
    process.drift = 0.5
    task = process.run(asyncio.sleep(10.0))  # tidy: of the world's own time
    world.run(task.done, seconds=100.0, steps=100)
    assert world.now == pytest.approx(20.0)
    world.close()


def test_nothing_of_a_stopped_process_runs_until_it_goes_on():
    world = World(1)
    process = world.process("one")
    woke_at: list[float] = []

    async def sleep() -> None:
        await asyncio.sleep(1.0)  # tidy: of the world's own time
        woke_at.append(world.now)

    task = process.run(sleep())
    world.at(0.5, lambda: process.stop(10.0))
    world.run(task.done, seconds=100.0, steps=1_000)
    assert woke_at == [pytest.approx(10.5)]
    world.close()


def test_nothing_of_a_killed_process_runs_not_even_a_finally():
    world = World(1)
    process = world.process("one")
    said: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(1.0)  # tidy: of the world's own time
        finally:
            said.append("finally")

    process.run(work())
    world.at(0.5, process.kill)
    with pytest.raises(Stuck):
        world.run(lambda: False, seconds=100.0, steps=1_000)
    assert said == []
    world.close()


def test_threads_and_async_generators_work_in_a_process():
    world = World(1)
    process = world.process("one")

    async def numbers() -> AsyncIterator[int]:
        for number in range(3):
            await asyncio.sleep(0.1)  # tidy: of the world's own time
            yield number

    async def main() -> list[int]:
        return [await asyncio.to_thread(mul, 2, number) async for number in numbers()]

    task = process.run(main())
    world.run(task.done, seconds=10.0, steps=1_000)
    assert task.result() == [0, 2, 4]
    world.close()


def test_a_world_that_does_not_end_says_so():
    world = World(1)
    process = world.process("one")

    async def spin() -> None:
        for _ in range(1_000_000):
            await asyncio.sleep(0.1)  # tidy: of the world's own time

    process.run(spin())
    with pytest.raises(TooLong, match="after 5 s"):
        world.run(lambda: False, seconds=5.0, steps=10_000)
    with pytest.raises(TooLong, match="after 10 steps"):
        world.run(lambda: False, seconds=5_000.0, steps=10)
    world.close()


@pytest.mark.parametrize("waits", [1, 3])
def test_what_a_dead_process_begins_when_it_is_thrown_away_is_of_its_own_loop(waits: int):
    world, loops = World(1), list[asyncio.AbstractEventLoop]()

    async def never() -> None:
        pytest.fail("a dead process went on")

    async def serve() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            loops.append(asyncio.get_running_loop())
            for _ in range(waits):
                try:
                    await asyncio.gather(never(), never())
                except GeneratorExit:
                    continue

    process = world.process("one")
    process.run(serve())
    world.run(lambda: process.callbacks > 0, seconds=1.0, steps=10)
    process.kill()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        world.close()
        gc.collect()
    assert loops == [process.loop] and said == []


def test_a_generator_that_a_dead_process_was_about_to_close_is_thrown_away():
    world, said = World(1), list[str]()

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            said.append("closed")

    async def serve() -> None:
        async for _ in numbers():
            break  # its loop closes it, in a task
        process.after(2, process.kill)  # there is the task, and has not begun
        await asyncio.Event().wait()

    process = world.process("one")
    process.run(serve())
    world.run(lambda: not process.is_alive, seconds=1.0, steps=10)
    assert said == []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        world.close()
        gc.collect()
    assert warned == []


def test_chance_decides_who_goes_first():
    def order(seed: int) -> list[str]:
        world, said = World(seed), list[str]()

        async def say(process: Process) -> None:
            for _ in range(5):
                said.append(process.name)
                await asyncio.sleep(0)

        tasks = [process.run(say(process)) for process in (world.process("a"), world.process("b"))]
        world.run(lambda: all(map(ended, tasks)), seconds=1.0, steps=1_000)
        world.close()
        return said

    assert len({tuple(order(seed)) for seed in range(20)}) > 1
    assert order(7) == order(7)
