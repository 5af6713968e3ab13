"""Workflows that go through what asyncio keeps in sets; in which order shows in the steps that they call.

Run as a program it prints these orders as JSON, so that two processes can be compared.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import streamflow as sf
from streamflow.core.commands import SignalWorkflow
from streamflow.core.events import StepScheduled
from streamflow.store.memory import MemoryStore
from streamflow.workflow.loop import WorkflowLoop
from tests.worker.harness import World, run, settle, turns, world
from tests.workflow.test_loop import Timers

COUNT = 12
"""Enough that two orders of that many are never the same by chance."""

app = sf.Registry()
shapes: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {}


@app.step
async def work(number: int) -> int:
    return number


def shape(function: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """A workflow that plays the function, then waits for the signal go."""

    async def flow() -> str:
        await function()
        await sf.wait_signal("go")
        return "played"

    shapes[function.__name__] = function
    app.workflow(name=function.__name__)(flow)


async def helper(number: int) -> int:
    return await work(number)


@shape
async def completed_steps() -> None:
    ended = [await each for each in asyncio.as_completed([work(number) for number in range(COUNT)])]
    assert sorted(ended) == list(range(COUNT)), ended


@shape
async def completed_coroutines() -> None:
    for each in asyncio.as_completed([helper(number) for number in range(COUNT)], timeout=1_000):
        await work(100 + await each)


@shape
async def completed_futures() -> None:
    futures = [asyncio.get_running_loop().create_future() for _ in range(COUNT)]
    for number, future in enumerate(futures):
        future.set_result(number)
    for each in asyncio.as_completed(futures):
        await work(await each)


@shape
async def shields() -> None:
    done, pending = await asyncio.wait([asyncio.shield(work(number)) for number in range(COUNT)])
    assert isinstance(done, set) and pending == set()
    for each in done:
        await work(100 + each.result())


@shape
async def gatherings() -> None:
    done, _ = await asyncio.wait([asyncio.gather(work(number), helper(100 + number)) for number in range(COUNT)])
    for each in done:
        await work(200 + each.result()[0])


@shape
async def futures() -> None:
    loop = asyncio.get_running_loop()
    made: set[asyncio.Future[int]] = {loop.create_future() for _ in range(COUNT)}
    for number, future in enumerate(made):
        loop.call_soon(future.set_result, number)
    done, _ = await asyncio.wait(made)
    for each in done:
        await work(each.result())


@shape
async def first_completed() -> None:
    pending = {asyncio.shield(work(number)) for number in range(COUNT)}
    numbers = {each: number for number, each in enumerate(pending)}
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            await work(100 + each.result())
        if len(pending) > COUNT // 2:
            for other in pending:
                await work(200 + numbers[other])


async def undoing(number: int) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await work(number)


@shape
async def failing_group() -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(COUNT):
                group.create_task(undoing(number))
            await work(100)
            raise ValueError("the group fails")
    except* ValueError:
        pass


if sys.version_info >= (3, 12):

    @shape
    async def failing_group_of_eager_tasks() -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        await shapes["failing_group"]()


@shape
async def all_tasks() -> None:
    tasks = [asyncio.create_task(undoing(number)) for number in range(COUNT)]
    await work(100)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await asyncio.wait(tasks)


# ------------------------------------------------------------------------------------------------------------ playing


@contextmanager
def another_layout(chance: random.Random) -> Iterator[None]:
    """What is made within lies elsewhere in memory, and among other tasks of the process."""

    async def nothing() -> None:
        await asyncio.Event().wait()

    loop = WorkflowLoop(Timers(), salt=chance.getrandbits(32))
    coroutines = [coroutine() for _ in range(200) for coroutine in (nothing, lambda: work(1), lambda: helper(1))]
    made: list[Any] = [*coroutines, *(loop.create_future() for _ in range(200))]
    tasks = [loop.create_task(nothing()) for _ in range(chance.randrange(400))]
    loop.drain()
    chance.shuffle(made)
    while made:  # what is freed last is taken first
        each = made.pop()
        if not isinstance(each, asyncio.Future):
            each.close()
            coroutines.remove(each)
        del each
    yield
    loop.close()
    assert all(task.done() for task in tasks)


async def complete_all(it: World) -> None:
    """Complete the steps, the last one first, until none is called any more."""
    while it.executor.attempts:
        for (workflow_id, number), attempt in reversed(list(it.executor.attempts.items())):
            it.executor.complete(workflow_id, number, attempt.args.strip(b"[]"))
        await settle()


async def order_of(it: World) -> list[int]:
    """With what the run called its steps, in order."""
    events = [event for turn in turns(await it.history_of("w")) for event in turn.events]
    return [int(event.args.strip(b"[]")) for event in events if isinstance(event, StepScheduled)]


async def play(name: str, chance: random.Random, *, replays: int) -> tuple[list[int], str | None]:
    """The order of a shape, and the state of its run at the end, after so many replays from the history alone."""
    async with world(app) as it:
        with another_layout(chance):
            await it.start("w", name)
            await complete_all(it)
        order = await order_of(it)
        for _ in range(replays):
            with another_layout(chance):
                await it.begin_again(store=MemoryStore())
        await it.send("w", SignalWorkflow(name="go"))
        assert await order_of(it) == order
        return order, await it.state_of("w")


async def main() -> None:
    chance = random.SystemRandom()
    print(json.dumps({name: await play(name, chance, replays=0) for name in shapes}))


if __name__ == "__main__":
    run(main())
