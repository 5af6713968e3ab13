"""Ending tasks: they are over when it returns, however they end."""

from __future__ import annotations

import asyncio

from streamflow.errors import Unavailable
from streamflow.worker.ending import end, error_of
from tests.worker.harness import run


async def waits(failing: bool) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        if failing:
            raise ValueError("on the way out")


def test_tasks_are_over_whether_they_obey_fail_or_were_done():
    async def test():
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(waits(False)), loop.create_task(waits(True)), loop.create_task(asyncio.sleep(0))]
        await asyncio.sleep(0)
        await end(*tasks)
        assert [task.done() for task in tasks] == [True] * 3
        await end()

    run(test())


def test_a_write_that_was_cancelled_failed_of_the_logs_end():
    async def test():
        cancelled, failed, done = (asyncio.get_running_loop().create_future() for _ in range(3))
        cancelled.cancel()
        failed.set_exception(error := ValueError("no"))
        done.set_result(None)
        assert isinstance(error_of(cancelled), Unavailable)
        assert (error_of(failed), error_of(done)) == (error, None)

    run(test())
