"""What asyncio keeps in sets has the same order each time the same code runs; on other loops all is as it was."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamflow as sf
from streamflow.workflow.loop import WorkflowLoop
from tests.worker.harness import run, world
from tests.workflow import orders
from tests.workflow.test_loop import Timers

ROOT = Path(__file__).parents[2]
ALL_TASKS = "_all_tasks" if sys.version_info < (3, 12) else "_scheduled_tasks"


@pytest.mark.parametrize("name", orders.shapes)
def test_a_replay_in_another_memory_layout_decides_alike(name: str) -> None:
    async def test() -> None:
        order, state = await orders.play(name, random.Random(4711), replays=6)
        assert state == "completed"
        assert len(order) >= orders.COUNT

    run(test())


def test_another_process_decides_alike() -> None:
    played = []
    for hashing in "1", "2":
        ran = subprocess.run(
            [sys.executable, "-m", "tests.workflow.orders"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hashing, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        played.append(json.loads(ran.stdout))
    assert played[0] == played[1]
    assert played[0].keys() == orders.shapes.keys()


def test_as_completed_begins_what_it_is_given_in_the_order_given() -> None:
    async def test() -> None:
        steps, _ = await orders.play("completed_steps", random.Random(1), replays=0)
        coroutines, _ = await orders.play("completed_coroutines", random.Random(1), replays=0)
        numbers = list(range(orders.COUNT))
        assert steps == numbers
        assert coroutines[: orders.COUNT] == numbers
        assert coroutines[orders.COUNT :] == [100 + number for number in reversed(numbers)]

    run(test())


@pytest.mark.skipif(sys.version_info < (3, 13), reason="as_completed is an async iterator since Python 3.13")
def test_as_completed_gives_back_the_tasks_that_it_was_given() -> None:
    async def main() -> None:
        tasks = [asyncio.create_task(soon(number)) for number in range(orders.COUNT)]
        given = [task async for task in asyncio.as_completed([*tasks, *tasks])]  # type: ignore[attr-defined]
        assert given == tasks

    finish(main)


def test_futures_and_gatherings_have_a_place_that_stays() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        made = [place for _ in range(50) for place in (loop.create_future(), asyncio.gather(loop.create_future()))]
        places = [hash(each) for each in made]
        assert places == [hash(each) for each in made]
        assert len(set(places)) == len(places)

    finish(main)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="tasks are in a list since Python 3.14, in order of arrival")
def test_all_tasks_does_not_depend_on_the_tasks_of_other_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    chance, found = random.Random(4711), set()

    async def main() -> None:
        tasks = [asyncio.create_task(asyncio.Event().wait(), name=str(number)) for number in range(40)]
        for _ in range(50):
            chance.shuffle(tasks)
            monkeypatch.setattr(asyncio.tasks, ALL_TASKS, list(tasks))  # as if others had given the set another size
            found.add(tuple(task.get_name() for task in asyncio.all_tasks()))
            monkeypatch.undo()

    finish(main)
    assert [len(order) for order in found] == [40]


def test_other_loops_keep_their_sets() -> None:
    async def main() -> None:
        gathering = asyncio.gather(soon(1))
        assert hash(gathering) == object.__hash__(gathering)
        task = asyncio.create_task(soon(2))
        both: set[asyncio.Future[Any]] = {gathering, task}
        assert await asyncio.wait(both) == (both, set())
        ended = [await each for each in asyncio.as_completed({soon(3), soon(4)})]
        assert sorted(ended) == [3, 4]
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert type(asyncio.tasks.set([1])) is set  # type: ignore[attr-defined]

    asyncio.run(main())


async def soon(number: int) -> int:
    await asyncio.sleep(0)
    return number


def finish(main: Callable[[], Any]) -> None:
    loop = WorkflowLoop(Timers())
    task = loop.create_task(main())
    loop.drain()
    task.result()
    loop.close()


# ------------------------------------------------------------------------------------------------------------ refused


def outcome(function: Callable[[], Any]) -> str | None:
    """The error with which a run of that code ends, or None when it completed."""
    app = sf.Registry()
    app.workflow(name="flow")(function)
    errors: list[str | None] = []

    async def test() -> None:
        async with world(app) as it:
            await it.start("w", "flow")
            status = it.processor.state.status("w")
            assert status is not None and status.state in ("completed", "failed")
            errors.append(None if status.error is None else f"{status.error.type}: {status.error.message}")

    run(test())
    return errors[0]


def test_a_set_of_coroutines_is_refused() -> None:
    async def two() -> None:
        coroutines = {asyncio.sleep(0), asyncio.sleep(0)}
        try:
            next(iter(asyncio.as_completed(coroutines)))
        finally:
            for each in coroutines:
                each.close()

    async def one() -> None:
        for each in asyncio.as_completed({asyncio.sleep(0)}):
            await each

    async def of_tasks() -> None:
        for each in asyncio.as_completed({asyncio.create_task(asyncio.sleep(0)) for _ in range(2)}):
            await each

    refused = outcome(two)
    assert refused is not None
    assert refused.startswith("streamflow.errors.NotInWorkflow: a set of coroutines has another order in each replay")
    assert outcome(one) is None
    assert outcome(of_tasks) is None


def test_a_task_factory_of_the_codes_own_is_refused() -> None:
    async def own() -> None:
        asyncio.get_running_loop().set_task_factory(lambda loop, coro, **options: asyncio.Task(coro, loop=loop))

    async def none() -> None:
        asyncio.get_running_loop().set_task_factory(None)

    async def eager() -> None:
        asyncio.get_running_loop().set_task_factory(getattr(asyncio, "eager_task_factory", None))
        await asyncio.create_task(asyncio.sleep(0))

    refused = outcome(own)
    assert refused is not None
    assert refused.startswith("streamflow.errors.NotInWorkflow: loop.set_task_factory inside a workflow takes None or")
    assert outcome(none) is None
    assert outcome(eager) is None
