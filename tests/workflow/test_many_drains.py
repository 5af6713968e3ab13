"""Many drains share one pair of hooks, and still each loop closes its own async generators alone."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from streamflow.workflow.loop import WorkflowLoop, many_drains
from tests.workflow.test_loop import Timers


class Held:
    """A generator that one run begins and one drops, and what it did."""

    def __init__(self) -> None:
        self.generator: AsyncIterator[int] | None = None
        self.log: list[str] = []

    async def numbers(self) -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)  # tidy: on the run's loop, which has no clock
            self.log.append("closed")

    async def begin(self) -> None:
        self.generator = self.numbers()
        assert await anext(self.generator) == 1

    async def drop(self) -> None:
        self.generator = None


@pytest.fixture
def loops() -> Iterator[tuple[WorkflowLoop, WorkflowLoop]]:
    made = WorkflowLoop(Timers()), WorkflowLoop(Timers())
    yield made
    for loop in made:
        loop.close()


@pytest.mark.parametrize(("dropped_by", "log"), [(0, ["closed"]), (1, [])])
def test_a_generator_is_closed_by_the_run_that_began_it_or_not_at_all(
    loops: tuple[WorkflowLoop, WorkflowLoop], dropped_by: int, log: list[str]
) -> None:
    held = Held()
    before = sys.get_asyncgen_hooks()
    with many_drains():
        within = sys.get_asyncgen_hooks()
        beginning = loops[0].create_task(held.begin())
        loops[0].drain()
        dropping = loops[dropped_by].create_task(held.drop())
        loops[dropped_by].drain()
        assert sys.get_asyncgen_hooks() == within != before
    assert beginning.done() and dropping.done()
    assert sys.get_asyncgen_hooks() == before
    assert held.log == log


def test_a_generator_dropped_between_two_drains_does_not_run(loops: tuple[WorkflowLoop, WorkflowLoop]) -> None:
    held = Held()
    with many_drains():
        loops[0].create_task(held.begin())
        loops[0].drain()
        held.generator = None
        loops[0].drain()
    assert held.log == []


def test_a_generator_begun_outside_of_all_drains_is_nobodys() -> None:
    held = Held()
    with many_drains():
        with contextlib.suppress(StopIteration):
            held.begin().send(None)
        held.generator = None
    assert held.log == []
