"""Sets of tasks, which asyncio itself goes through, have the same order each time the same code runs."""

from __future__ import annotations

import asyncio

import pytest

from streamflow.workflow.loop import WorkflowLoop


class NoTimers:
    def set_timer(self, handle: asyncio.TimerHandle) -> None:
        raise NotImplementedError

    def cancel_timer(self, handle: asyncio.TimerHandle) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("count", [3, 40])
def test_the_members_of_a_group_are_cancelled_in_the_same_order_each_time(count: int) -> None:
    ballast: list[object] = []

    def order() -> list[int]:
        cancelled: list[int] = []

        async def member(number: int) -> None:
            ballast.append(asyncio.current_task())  # so that the next ones lie elsewhere in memory
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                cancelled.append(number)
                raise

        async def main() -> None:
            async with asyncio.TaskGroup() as group:
                for number in range(count):
                    group.create_task(member(number))
                await asyncio.sleep(0)
                raise ValueError("the group fails")

        loop = WorkflowLoop(NoTimers(), salt=4711)
        failed = loop.create_task(main())
        loop.drain()
        assert isinstance(failed.exception(), ExceptionGroup)
        loop.close()
        assert sorted(cancelled) == list(range(count))
        return cancelled

    assert len({tuple(order()) for _ in range(30)}) == 1
