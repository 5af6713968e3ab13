"""The executor: every attempt ends in one outcome, whatever its code does."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from streamflow.config import Limits
from streamflow.core.events import StepAttemptFailed, StepCompleted
from streamflow.worker.executor import Executor
from streamflow.workflow.stepinfo import step_info
from tests.worker import steps
from tests.worker.executing import NOW, Bench, FixedClock, a_step, bench, error_of, run, settle

# ------------------------------------------------------------------------------------------------------ the three kinds


def test_an_async_step_runs_on_the_loop_and_a_plain_one_in_a_thread():
    async def where_async() -> int:
        return threading.get_ident()

    def where_plain() -> int:
        return threading.get_ident()

    async def test():
        async with bench() as it:
            assert await it.of(a_step(where_async)) == StepCompleted(
                number=0, attempt=1, result=str(threading.get_ident()).encode(), started_at=NOW
            )
            outcome = await it.of(a_step(where_plain))
            assert isinstance(outcome, StepCompleted)
            assert int(outcome.result) != threading.get_ident()

    run(test())


def test_a_process_step_is_found_by_name_and_knows_its_identity():
    async def test():
        async with bench() as it:
            first = await it.of(steps.add, 1, 2)
            second = await it.of(steps.who)
        assert isinstance(first, StepCompleted) and isinstance(second, StepCompleted)
        assert first.result == b"3"
        assert second.result != f'[{os.getpid()},"w/1/1"]'.encode()
        assert second.result.endswith(b',"w/1/1"]')

    run(test())


def test_a_process_that_dies_fails_its_own_attempt_and_the_next_gets_a_new_one():
    async def test():
        async with bench() as it:
            died = it.start(steps.die)
            innocent = it.start(steps.add, 2, 3)
            outcome = await it.outcome(died)
            assert isinstance(outcome, StepAttemptFailed)
            assert outcome.error.type == "concurrent.futures.process.BrokenProcessPool"
            assert "if __name__ == '__main__'" in outcome.error.message
            assert (await it.outcome(innocent)).result == b"5"  # type: ignore[union-attr]
            assert (await it.of(steps.add, 1, 1)).result == b"2"  # type: ignore[union-attr]

    run(test())


def test_a_process_killed_while_idle_costs_no_attempt():
    async def test():
        async with bench() as it:
            first = await it.of(steps.who)
            assert isinstance(first, StepCompleted)
            pid = int(first.result[1:].split(b",")[0])
            pool: Any = it.executor.processes._idle[0]
            os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(pool._executor_manager_thread.join)
            assert isinstance(await it.of(steps.add, 1, 1), StepCompleted)

    run(test())


def test_a_process_that_outlives_its_timeout_is_killed_and_frees_its_place():
    async def test():
        async with bench(max_parallel_steps=1) as it:
            # A process that is there already: the step runs in it, where a new one would be starting for longer.
            first = await it.of(steps.who)
            pool: Any = it.executor.processes._idle[0]
            (pid,), reaper = pool._processes, pool._executor_manager_thread
            assert isinstance(first, StepCompleted) and first.result.startswith(b"[%d," % pid)
            outcome = await it.of(steps.hang, timeout=0.5)
            assert error_of(outcome).type == "TimeoutError"
            await asyncio.to_thread(reaper.join, 20)
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
            assert isinstance(await it.of(steps.add, 1, 1), StepCompleted)

    run(test())


@pytest.mark.parametrize(
    ("kind", "type_", "message"),
    [
        ("plain", "ValueError", "plain"),
        ("awkward", "tests.worker.steps.Awkward", "3 at home"),
        ("exit", "SystemExit", "4"),
        ("interrupt", "KeyboardInterrupt", ""),
        ("cancelled", "RuntimeError", "the step raised CancelledError: gone"),
        ("local", "RuntimeError", "tests.worker.steps.Nameless: no name"),
    ],
)
def test_whatever_a_process_step_raises_comes_back_as_its_error(kind: str, type_: str, message: str):
    async def test():
        async with bench() as it:
            error = error_of(await it.of(steps.fail, kind))
            assert (error.type, error.message) == (type_, message)
            assert "in fail" in error.traceback

    run(test())


def test_a_step_that_a_process_could_not_find_is_refused_where_it_is_decorated():
    def local() -> None: ...

    async def asynchronous() -> None: ...

    for function in (local, lambda: None):
        with pytest.raises(ValueError, match="at the top of"):
            a_step(function, process=True, name="x")
    with pytest.raises(ValueError, match="async def"):
        a_step(asynchronous, process=True)


# ----------------------------------------------------------------------------------------------------------- the places


def test_at_most_so_many_attempts_run_at_once_first_come_first_served():
    gates: list[asyncio.Event] = []
    begun: list[int] = []

    async def wait(n: int) -> None:
        begun.append(n)
        await gates[n].wait()

    async def test():
        gates.extend(asyncio.Event() for _ in range(5))
        step = a_step(wait)
        async with bench(max_parallel_steps=2) as it:
            for n in range(5):
                it.start(step, n)
            await settle()
            assert begun == [0, 1]
            gates[1].set()
            await settle()
            assert begun == [0, 1, 2]
            for gate in gates:
                gate.set()
            await asyncio.gather(*map(it.outcome, range(5)))
            assert begun == [0, 1, 2, 3, 4]
            assert not it.executor.running and not it.executor.attempts and not it.executor.waiting

    run(test())


def test_a_cancelled_attempt_that_waits_never_begins_and_leaves_the_queue_at_once():
    begun: list[int] = []

    async def test():
        gate = asyncio.Event()

        async def wait(n: int) -> None:
            begun.append(n)
            await gate.wait()

        step = a_step(wait)
        async with bench(max_parallel_steps=1, steps_waiting_max=1) as it:
            first, second, third = (it.start(step, n) for n in range(3))
            await settle()
            room = asyncio.Event()
            was_full = it.executor.is_full
            it.executor.wake_when_room(room)
            it.cancel(second)
            assert was_full and room.is_set() and not it.executor.is_full
            gate.set()
            await it.outcome(first)
            await it.outcome(third)
            assert begun == [0, 2]

    run(test())


def test_a_full_executor_tells_everybody_who_waits_when_there_is_room_again():
    async def test():
        gate = asyncio.Event()

        async def wait() -> None:
            await gate.wait()

        step = a_step(wait)
        async with bench(max_parallel_steps=1, steps_waiting_max=0) as it:
            it.start(step)
            last = it.start(step)
            rooms = [asyncio.Event(), asyncio.Event()]
            for room in rooms:
                it.executor.wake_when_room(room)
            gate.set()
            await it.outcome(last)
            assert all(room.is_set() for room in rooms)

    run(test())


def test_an_attempt_cancelled_before_its_first_step_gives_its_place_back():
    async def fine() -> int:
        return 1

    async def test():
        step = a_step(fine)
        async with bench(max_parallel_steps=1) as it:
            it.cancel(it.start(step))
            assert isinstance(await it.of(step), StepCompleted)
            it.cancel(it.start(step, timeout=5))
            assert isinstance(await it.of(step, timeout=5), StepCompleted)
            assert list(it.outcomes) == [1, 3]

    run(test())


# ------------------------------------------------------------------------------------------------- timeouts and cancels


def test_a_timeout_ends_an_attempt_whose_code_ignores_cancellation():
    async def test():
        released = asyncio.Event()

        async def stubborn() -> None:
            while not released.is_set():
                try:
                    await released.wait()
                except asyncio.CancelledError:
                    continue

        async with bench() as it:
            outcome = await it.of(a_step(stubborn), timeout=0.01)
            assert isinstance(outcome, StepAttemptFailed)
            assert outcome.error.type == "TimeoutError"
            assert outcome.error.message == "attempt 1 of step stubborn took longer than 0.01 s"
            assert outcome.retry_at == NOW + 1000
            released.set()
            await settle()
            assert not it.executor._abandoned

    run(test())


def test_a_timeout_ends_an_attempt_that_blocks_in_a_thread_and_the_thread_is_told():
    begun, released, done = threading.Event(), threading.Event(), threading.Event()
    seen: list[bool] = []

    def blocks() -> None:
        begun.set()
        released.wait()
        seen.append(step_info().cancelled)
        done.set()

    async def test():
        async with bench(max_parallel_steps=1) as it:
            number = it.start(a_step(blocks), timeout=0.01)
            await asyncio.sleep(0)
            assert begun.wait(20)  # blocks the loop: no timer fires before the thread is in the step
            assert error_of(await it.outcome(number)).type == "TimeoutError"
            # Its thread is stuck, which costs the next step nothing.
            assert isinstance(await it.of(a_step(lambda: 1, name="next")), StepCompleted)
            released.set()
            await asyncio.to_thread(done.wait)
            assert seen == [True]

    run(test())


def test_a_cancelled_attempt_reports_nothing_and_its_thread_can_see_it():
    begun, released, done = threading.Event(), threading.Event(), threading.Event()
    seen: list[bool] = []

    def blocks() -> None:
        begun.set()
        info = step_info()
        seen.append(info.cancelled)
        released.wait()
        seen.append(info.cancelled)
        done.set()

    async def test():
        async with bench() as it:
            number = it.start(a_step(blocks))
            await asyncio.to_thread(begun.wait)
            it.cancel(number)
            released.set()
            await asyncio.to_thread(done.wait)
            await settle()
            assert seen == [False, True]
            assert not it.outcomes and not it.executor.running

    run(test())


def test_only_the_attempts_of_the_owner_that_goes_are_cancelled():
    async def test():
        gate = asyncio.Event()

        async def wait() -> None:
            await gate.wait()

        async with bench() as it:
            gone = object()
            it.start(a_step(wait), owner=gone)
            stays = it.start(a_step(wait))
            await settle()
            it.executor.drop(gone)
            gate.set()
            await it.outcome(stays)
            await settle()
            assert list(it.outcomes) == [stays]

    run(test())


# ----------------------------------------------------------------------------------------- what does not end the worker


async def cancels() -> None:
    raise asyncio.CancelledError("mine")


async def exits() -> None:
    raise SystemExit(3)


def exits_in_thread() -> None:
    raise SystemExit(3)


def interrupts_in_thread() -> None:
    raise KeyboardInterrupt


def stops_in_thread() -> None:
    raise StopIteration(1)


@pytest.mark.parametrize("timeout", [None, 20])
@pytest.mark.parametrize(
    ("function", "type_"),
    [
        (cancels, "asyncio.exceptions.CancelledError"),
        (exits, "SystemExit"),
        (exits_in_thread, "SystemExit"),
        (interrupts_in_thread, "KeyboardInterrupt"),
        (stops_in_thread, "RuntimeError"),
    ],
)
def test_what_a_step_raises_is_its_outcome_and_the_worker_goes_on(
    function: Callable[..., Any], type_: str, timeout: float | None
):
    async def test():
        async with bench() as it:
            assert error_of(await it.of(a_step(function), timeout=timeout)).type == type_
            assert isinstance(await it.of(a_step(lambda: 1, name="next")), StepCompleted)

    run(test())


@pytest.mark.parametrize("timeout", [None, 20])
def test_ctrl_c_on_the_loop_ends_the_worker_and_is_never_recorded_as_a_failure(timeout: float | None):
    async def interrupted() -> None:
        signal.raise_signal(signal.SIGINT)

    reported: list[object] = []

    async def test():
        asyncio.get_running_loop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        async with bench() as it:
            it.report = lambda info, outcome: reported.append(outcome)  # type: ignore[method-assign]
            it.start(a_step(interrupted), timeout=timeout)
            await asyncio.Event().wait()

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(test())
    finally:
        signal.signal(signal.SIGINT, before)
    assert not reported


def test_an_event_loop_that_is_torn_down_makes_no_step_fail():
    reported: list[object] = []

    async def endless() -> None:
        await asyncio.Event().wait()

    def endless_in_thread() -> None:
        while not step_info().cancelled:
            threading.Event().wait(0.001)

    async def test():
        executor = Executor(FixedClock(), max_parallel_steps=8, limits=Limits())
        it = Bench(executor)
        it.report = lambda info, outcome: reported.append(outcome)  # type: ignore[method-assign]
        it.start(a_step(endless))
        it.start(a_step(endless), timeout=60)
        it.start(a_step(endless_in_thread))
        await settle()
        # Returns without stopping anything: asyncio.run cancels all tasks.

    asyncio.run(test())
    assert not reported


def test_a_step_that_cancels_its_own_task_fails_all_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("streamflow.worker.executor.TEARDOWN_SECONDS", 0.001)

    async def suicide() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    async def test():
        async with bench() as it:
            assert error_of(await it.of(a_step(suicide))).type == "asyncio.exceptions.CancelledError"

    run(test())


def test_a_step_sees_the_context_of_the_worker_and_leaves_nothing_in_it():
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

    async def spoil() -> str:
        seen = variable.get()
        variable.set("spoilt")
        return seen

    async def test():
        variable.set("the worker's")
        async with bench(max_parallel_steps=1) as it:
            numbers = [it.start(a_step(spoil)) for _ in range(3)]
            outcomes = [await it.outcome(number) for number in numbers]
            assert [outcome.result for outcome in outcomes] == [b'"the worker\'s"'] * 3  # type: ignore[union-attr]

    run(test())


def test_a_closed_executor_starts_nothing_and_closing_twice_is_fine():
    async def test():
        async with bench() as it:
            it.executor.close()
            it.start(a_step(lambda: 1, name="late"))
            await settle()
            assert not it.outcomes and not it.executor.running
            it.executor.close()

    run(test())
