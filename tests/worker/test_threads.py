"""The threads of plain steps: as few as needed, and one that hangs takes no other with it."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from streamflow.worker.threads import DaemonThreads
from tests.waiting import until

CONTEXT = contextvars.Context()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("streamflow-step-")}


def test_threads_are_started_when_needed_and_at_most_size_of_them():
    async def test():
        threads = DaemonThreads(2, stuck_max=0)
        gate = threading.Event()
        first = await threads.run(threading.get_ident, CONTEXT.copy())
        assert await threads.run(threading.get_ident, CONTEXT.copy()) == first, "the idle one is taken"
        order: list[int] = []

        def job(n: int) -> None:
            gate.wait()
            order.append(n)

        futures = [threads.run(lambda n=n: job(n), CONTEXT.copy()) for n in range(5)]  # type: ignore[misc]
        assert threads._threads == 2
        gate.set()
        await asyncio.gather(*futures)
        assert sorted(order) == [0, 1, 2, 3, 4]
        threads.close()
        threads.close()

    run(test())


def test_idle_threads_end_when_the_pool_is_closed():
    async def test():
        before = names()
        threads = DaemonThreads(3, stuck_max=0)
        barrier = threading.Barrier(3)
        await asyncio.gather(*(threads.run(barrier.wait, CONTEXT.copy()) for _ in range(3)))
        threads.close()
        for thread in threading.enumerate():
            if thread.name in names() - before:
                await asyncio.to_thread(thread.join)
        assert names() <= before

    run(test())


def test_a_job_that_is_given_up_before_a_thread_took_it_never_runs():
    ran: list[int] = []

    async def test():
        threads = DaemonThreads(1, stuck_max=0)
        gate = threading.Event()
        busy = threads.run(gate.wait, CONTEXT.copy())
        waits = threads.run(lambda: ran.append(1), CONTEXT.copy())
        threads.give_up(waits)
        gate.set()
        await busy
        await threads.run(lambda: ran.append(2), CONTEXT.copy())
        assert ran == [2] and not threads._open
        threads.close()

    run(test())


def test_a_stuck_thread_is_replaced_and_ends_when_it_comes_back(caplog: pytest.LogCaptureFixture):
    async def test():
        threads = DaemonThreads(1, stuck_max=1)
        begun, gate = threading.Event(), threading.Event()

        def hangs() -> None:
            begun.set()
            gate.wait()

        stuck = threads.run(hangs, CONTEXT.copy())
        await asyncio.to_thread(begun.wait)
        threads.give_up(stuck)
        assert await threads.run(lambda: "free", CONTEXT.copy()) == "free"
        begun.clear()
        second = threads.run(hangs, CONTEXT.copy())
        await asyncio.to_thread(begun.wait)
        with caplog.at_level(logging.ERROR):
            threads.give_up(second)
        assert "1 threads are stuck in steps that were given up" in caplog.text
        waits = threads.run(lambda: "at last", CONTEXT.copy())
        assert threads._threads == 2
        gate.set()
        assert await waits == "at last"
        await until(lambda: not threads._stuck)
        assert threads._threads == 1
        threads.close()

    run(test())


def test_a_job_runs_in_the_context_that_it_is_given():
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)

    async def test():
        threads = DaemonThreads(1, stuck_max=0)
        context = CONTEXT.copy()
        context.run(variable.set, 7)
        assert await threads.run(variable.get, context) == 7
        assert variable.get() == 0
        threads.close()

    run(test())


def test_a_thread_that_comes_back_after_the_loop_is_closed_just_ends():
    gate = threading.Event()
    threads: list[threading.Thread] = []

    def hangs() -> None:
        threads.append(threading.current_thread())
        gate.wait()

    async def test():
        pool = DaemonThreads(1, stuck_max=0)
        future = pool.run(hangs, CONTEXT.copy())
        await until(lambda: threads)
        pool.give_up(future)
        pool.close()

    run(test())
    gate.set()
    threads[0].join()
