"""The loop of a run: asyncio on it, its timers, what it refuses, and how it goes away."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import logging
import math
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest

from streamflow.errors import NotInWorkflow
from streamflow.workflow import loop as loop_module
from streamflow.workflow.loop import Evicted, LoopsForever, WorkflowLoop
from streamflow.workflow.refusing import OURS, REFUSED


class Timers:
    """A timer port that keeps what it was told."""

    def __init__(self) -> None:
        self.set: list[asyncio.TimerHandle] = []
        self.cancelled: list[asyncio.TimerHandle] = []

    def set_timer(self, handle: asyncio.TimerHandle) -> None:
        self.set.append(handle)

    def cancel_timer(self, handle: asyncio.TimerHandle) -> None:
        self.set.remove(handle)
        self.cancelled.append(handle)


@pytest.fixture
def timers() -> Timers:
    return Timers()


@pytest.fixture
def loop(timers: Timers) -> Iterator[WorkflowLoop]:
    loop = WorkflowLoop(timers)
    yield loop
    loop.close()


def fire_next(loop: WorkflowLoop, timers: Timers) -> None:
    handle = min(timers.set, key=lambda handle: handle.when())
    timers.set.remove(handle)
    loop.set_time(handle.when())
    loop.fire(handle)
    loop.drain()


def run(loop: WorkflowLoop, coro: Coroutine[Any, Any, Any]) -> Any:
    task = loop.create_task(coro)
    loop.drain()
    timers = loop.timers
    assert isinstance(timers, Timers)
    while not task.done():
        fire_next(loop, timers)
    return task.result()


async def after(seconds: float, result: Any = None) -> Any:
    await asyncio.sleep(seconds)  # tidy: on the run's loop, which has no clock
    if isinstance(result, BaseException):
        raise result
    return result


# ------------------------------------------------------------------------------------------------ asyncio on the loop


async def gather() -> Any:
    return await asyncio.gather(after(2, "a"), after(1, "b"), after(0, ValueError("c")), return_exceptions=True)


async def task_group_fails() -> Any:
    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012
        async with asyncio.TaskGroup() as group:
            group.create_task(after(1, ValueError("first")))
            other = group.create_task(after(5))
    errors = [str(error) for error in caught.value.exceptions]
    return errors, other.cancelled(), asyncio.get_running_loop().time()


async def wait_first() -> Any:
    tasks = [asyncio.create_task(after(n, n)) for n in (3, 1, 2)]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return [task.result() for task in done]


async def wait_exception() -> Any:
    tasks = [asyncio.create_task(after(n, error)) for n, error in ((1, None), (2, OSError()), (3, None))]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    return len(done), len(pending), isinstance(tasks[1].exception(), OSError)


async def wait_all() -> Any:
    done, pending = await asyncio.wait([asyncio.create_task(after(n, n)) for n in (3, 1, 2)])
    return sorted(task.result() for task in done), pending


async def as_completed() -> Any:
    return [await item for item in asyncio.as_completed([after(3, "c"), after(1, "a"), after(2, "b")])]


async def timeout() -> Any:
    try:
        async with asyncio.timeout(3):
            await after(4)
    except TimeoutError:
        return asyncio.get_running_loop().time()


async def wait_for() -> Any:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(after(5), 1)
    return await asyncio.wait_for(after(1, "in time"), 5)


async def shield() -> Any:
    inner = asyncio.create_task(after(2, "kept"))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(inner), 1)
    return await inner


async def synchronisation() -> Any:
    event, lock, semaphore, condition = asyncio.Event(), asyncio.Lock(), asyncio.Semaphore(2), asyncio.Condition()
    order: list[str] = []

    async def worker(name: str) -> None:
        await event.wait()
        async with semaphore, lock:
            await asyncio.sleep(1)  # tidy: on the run's loop, which has no clock
            order.append(name)
        async with condition:
            condition.notify_all()

    tasks = [asyncio.create_task(worker(name)) for name in "abc"]
    event.set()
    async with condition:
        await condition.wait_for(lambda: len(order) == 3)
    await asyncio.gather(*tasks)
    return "".join(order), asyncio.get_running_loop().time()


async def queue() -> Any:
    items: asyncio.Queue[int] = asyncio.Queue(maxsize=1)

    async def produce() -> None:
        for item in range(3):
            await items.put(item)

    producer = asyncio.create_task(produce())
    taken = [await items.get() for _ in range(3)]
    await producer
    return taken


async def cancellation() -> Any:
    task = asyncio.create_task(after(9))
    await asyncio.sleep(0)  # tidy: on the run's loop, which has no clock
    task.cancel("why")
    try:
        await task
    except asyncio.CancelledError as error:
        return error.args, task.cancelled()


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="unset")


async def context_variables() -> Any:
    async def set_it() -> None:
        VARIABLE.set("in the task")

    await asyncio.create_task(set_it())
    context = contextvars.copy_context()
    await asyncio.create_task(set_it(), context=context)
    return VARIABLE.get(), context[VARIABLE]


async def names() -> Any:
    tasks = [asyncio.create_task(after(0)), asyncio.create_task(after(0), name="mine"), asyncio.create_task(after(0))]
    current = asyncio.current_task()
    assert current is not None
    return [task.get_name() for task in (current, *tasks)]


@pytest.mark.parametrize(
    ("main", "expected"),
    [
        (task_group_fails, (["first"], True, 1.0)),
        (wait_first, [1]),
        (wait_exception, (2, 1, True)),
        (wait_all, ([1, 2, 3], set())),
        (as_completed, ["a", "b", "c"]),
        (timeout, 3.0),
        (wait_for, "in time"),
        (shield, "kept"),
        (synchronisation, ("abc", 3.0)),
        (queue, [0, 1, 2]),
        (cancellation, (("why",), True)),
        (context_variables, ("unset", "in the task")),
        (names, ["task-1", "task-2", "mine", "task-4"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_asyncio_on_the_loop(loop: WorkflowLoop, main: Callable[[], Any], expected: Any) -> None:
    assert run(loop, main()) == expected


def test_gather(loop: WorkflowLoop) -> None:
    first, second, third = run(loop, gather())
    assert (first, second, str(third)) == ("a", "b", "c")


def test_callbacks_run_in_order_of_arrival(loop: WorkflowLoop) -> None:
    order: list[int] = []

    def first() -> None:
        order.append(1)
        loop.call_soon(order.append, 3)

    loop.call_soon(first)
    loop.call_soon(order.append, 2)
    loop.call_soon(order.append, 0).cancel()
    loop.drain()
    assert order == [1, 2, 3]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_eager_tasks(loop: WorkflowLoop) -> None:
    async def main() -> Any:
        eager = asyncio.eager_task_factory  # type: ignore[attr-defined,unused-ignore]
        asyncio.get_running_loop().set_task_factory(eager)
        quick, slow = asyncio.create_task(names()), asyncio.create_task(after(1, "slow"))
        return quick.done(), slow.done(), await slow

    assert run(loop, main()) == (True, False, "slow")


# ---------------------------------------------------------------------------------------------------- time and timers


def test_time_stands_still_and_never_goes_back(loop: WorkflowLoop) -> None:
    loop.set_time(5)
    loop.set_time(3)
    assert loop.time() == 5


def test_a_timer_goes_to_the_port_and_comes_back(loop: WorkflowLoop, timers: Timers) -> None:
    loop.set_time(10)
    fired: list[str] = []
    handle = loop.call_later(5, fired.append, "now")
    assert timers.set == [handle]
    assert handle.when() == 15
    loop.drain()
    assert not fired
    fire_next(loop, timers)
    handle.cancel()
    assert (fired, timers.cancelled) == (["now"], [])


def test_a_cancelled_timer_is_taken_back_and_does_not_fire(loop: WorkflowLoop, timers: Timers) -> None:
    handle = loop.call_at(5, pytest.fail)
    handle.cancel()
    handle.cancel()
    assert (timers.set, timers.cancelled) == ([], [handle])
    loop.fire(handle)
    loop.drain()


@pytest.mark.parametrize("delay", [0, -1, math.inf, math.nan])
def test_what_is_due_or_never_due_needs_no_timer(loop: WorkflowLoop, timers: Timers, delay: float) -> None:
    fired: list[bool] = []
    assert isinstance(loop.call_later(delay, fired.append, True), asyncio.TimerHandle)
    loop.drain()
    assert fired == [] if delay == math.inf else [True]
    assert not timers.set


def test_sleep_zero_sets_no_timer(loop: WorkflowLoop, timers: Timers) -> None:
    assert run(loop, after(0, "done")) == "done"
    assert not timers.set


# -------------------------------------------------------------------------------------------------- what is forbidden


def test_every_method_of_an_event_loop_is_either_ours_or_refused() -> None:
    public = {name for name, _ in inspect.getmembers(asyncio.AbstractEventLoop) if not name.startswith("_")}
    assert {name for name in public if name in vars(WorkflowLoop)} == OURS == public - REFUSED


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_forbidden(loop: WorkflowLoop, name: str) -> None:
    with pytest.raises(NotInWorkflow, match=rf"loop\.{name} .*@app\.step"):
        getattr(loop, name)(None, None)


def test_to_thread_is_forbidden_and_asyncio_run_is_refused(loop: WorkflowLoop) -> None:
    async def main() -> None:
        with pytest.raises(NotInWorkflow, match=r"run_in_executor starts a thread"):
            await asyncio.to_thread(pytest.fail)
        coro = after(0)
        with pytest.raises(RuntimeError, match="cannot be called from a running event loop"):
            asyncio.run(coro)
        coro.close()

    run(loop, main())


# ------------------------------------------------------------------------------------------------------- driving it


async def check_restored(loop: WorkflowLoop) -> None:
    outer, task, hooks = asyncio.get_running_loop(), asyncio.current_task(), sys.get_asyncgen_hooks()

    async def main() -> bool:
        return asyncio.get_running_loop() is loop and asyncio.current_task() is not task

    inner = loop.create_task(main())
    loop.drain()
    assert inner.result()
    assert (asyncio.get_running_loop(), asyncio.current_task()) == (outer, task)
    assert sys.get_asyncgen_hooks() == hooks
    assert gc.isenabled()


def test_in_a_task_and_a_callback_of_a_real_loop(loop: WorkflowLoop) -> None:
    async def real() -> None:
        await check_restored(loop)
        asyncio.get_running_loop().call_soon(loop.drain)
        task = loop.create_task(after(0, "done"))
        await asyncio.sleep(0)  # tidy: on the run's loop, which has no clock
        assert task.done()
        assert asyncio.current_task() is not None

    asyncio.run(real())


def test_drain_within_its_own_drain_is_refused(loop: WorkflowLoop) -> None:
    async def main() -> None:
        loop.call_soon(int)
        with pytest.raises(RuntimeError, match="already running"):
            loop.drain()
        with pytest.raises(RuntimeError, match="running"):
            loop.close()

    run(loop, main())


def test_loops_forever_leaves_drain_whatever_the_code_catches(timers: Timers) -> None:
    async def main() -> None:
        while alive:
            with contextlib.suppress(BaseException):
                await asyncio.sleep(0)  # tidy: on the run's loop, which has no clock

    alive = [True]
    loop = WorkflowLoop(timers, callbacks_max=1_000)
    loop.create_task(main())
    with pytest.raises(LoopsForever, match="1000 callbacks"):
        loop.drain()
    assert not issubclass(LoopsForever, Exception)
    alive.clear()
    loop.close()


def test_exit_stays_in_its_task_and_an_interrupt_leaves(loop: WorkflowLoop) -> None:
    ended = loop.create_task(after(0, SystemExit(3)))
    loop.drain()
    assert isinstance(ended.exception(), SystemExit)
    loop.create_task(after(0, KeyboardInterrupt())).add_done_callback(lambda task: task.exception())
    rest: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        loop.drain()
    loop.call_soon(rest.append, 1)
    loop.drain()
    assert rest == [1]


def test_unhandled_exceptions_are_kept_and_logged_once(loop: WorkflowLoop, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("unhandled")

    with caplog.at_level(logging.ERROR, "streamflow.workflow"):
        loop.call_soon(fail)
        loop.drain()
        loop.replaying = True
        loop.call_soon(fail)
        loop.drain()
    assert [str(error) for error in loop.exceptions()] == ["unhandled"] * 2
    assert len(caplog.records) == 1


def test_an_exception_handler_is_asked_and_may_fail(loop: WorkflowLoop, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: seen.append(context))
    loop.call_exception_handler({"message": "one"})
    loop.set_exception_handler(lambda _loop, _context: 1 / 0)
    loop.call_exception_handler({"message": "two"})
    assert [context["message"] for context in seen] == ["one"]
    assert "Unhandled error in exception handler" in caplog.text
    with pytest.raises(TypeError):
        loop.set_exception_handler(5)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- async generators


async def numbers(log: list[str]) -> AsyncIterator[int]:
    try:
        yield 1
        yield 2
    finally:
        await asyncio.sleep(0)  # tidy: on the run's loop, which has no clock
        log.append("closed")


def test_an_abandoned_generator_is_closed_in_the_same_drain(loop: WorkflowLoop) -> None:
    log: list[str] = []

    async def main() -> None:
        async for _ in numbers(log):
            break
        for _ in range(5):
            await asyncio.sleep(0)  # tidy: on the run's loop, which has no clock

    run(loop, main())
    assert log == ["closed"]


def test_shutdown_asyncgens(loop: WorkflowLoop) -> None:
    log: list[str] = []

    async def main() -> None:
        generator = numbers(log)
        await anext(generator)
        await loop.shutdown_asyncgens()

    run(loop, main())
    assert log == ["closed"]


# ------------------------------------------------------------------------------------------------------------ eviction


async def parked(loop: WorkflowLoop, log: list[str]) -> None:
    generator = numbers(log)
    unawaited = after(1)
    token = VARIABLE.set("parked")
    try:
        await anext(generator)
        async with asyncio.timeout(100), asyncio.TaskGroup() as group:
            group.create_task(after(10))
            group.create_task(stubborn(log))
            async for _ in numbers(log):
                async with asyncio.Lock():
                    await asyncio.gather(after(20), after(30), loop.create_future())
    finally:
        log.append("finally")
        try:
            await asyncio.sleep(5)  # tidy: on the run's loop, which has no clock
            log.append("slept")
        finally:
            loop.create_task(after(3))
            log.append("created")
        await unawaited
        VARIABLE.reset(token)


async def stubborn(log: list[str]) -> None:
    try:
        await asyncio.sleep(50)  # tidy: on the run's loop, which has no clock
    except BaseException:
        await asyncio.sleep(0)  # tidy: on the run's loop, which has no clock
        log.append("went on")


def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    return seen


def test_evicting_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    gc.collect()  # what other tests left is not ours
    seen, log = unraisable(monkeypatch), list[str]()
    alive: list[weakref.ref[Any]] = []
    gc.disable()  # all of it must go by reference counts
    try:
        for _ in range(1_000):
            timers = Timers()
            loop = WorkflowLoop(timers)
            alive += [weakref.ref(loop), weakref.ref(loop.create_task(parked(loop, log)))]
            loop.drain()
            set_before = len(timers.set)
            loop.close()
            assert (len(timers.set), timers.cancelled) == (set_before, [])  # a durable timer outlives the eviction
            del loop, timers
        remaining = sum(reference() is not None for reference in alive)
    finally:
        gc.enable()
    gc.collect()
    assert not any(reference() for reference in alive)
    assert not remaining
    assert not seen
    assert capfd.readouterr().err == ""
    assert not caplog.records
    assert set(log) == {"finally"}


def test_a_task_that_never_began_is_dropped_silently(timers: Timers, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = unraisable(monkeypatch)
    loop = WorkflowLoop(timers)
    loop.create_task(after(1))
    loop.close()
    assert not seen


def test_a_closed_loop_ignores_callbacks_and_starts_nothing(timers: Timers) -> None:
    loop = WorkflowLoop(timers)
    future = loop.create_future()
    handle = loop.call_later(5, pytest.fail)
    loop.close()
    loop.close()
    assert loop.is_closed()
    loop.call_soon(pytest.fail)
    future.set_result(None)
    loop.fire(handle)
    handle.cancel()
    loop.drain()
    for start in (loop.create_future, lambda: loop.create_task(after(1)), lambda: loop.call_later(1, int)):
        with pytest.raises(Evicted):
            start()
    assert not timers.cancelled


def test_code_that_swallows_everything_does_not_hold_up_the_eviction(
    timers: Timers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[object] = []
    monkeypatch.setattr(loop_module, "_unkillable", kept)

    async def immortal() -> None:
        while alive:
            with contextlib.suppress(BaseException):
                await asyncio.sleep(1)  # tidy: on the run's loop, which has no clock

    alive = [True]
    loop = WorkflowLoop(timers)
    loop.create_task(immortal())
    loop.drain()
    loop.close()
    assert len(kept) == 1
    assert "goes on whatever is raised" in caplog.text
    alive.clear()


def test_an_empty_loop_is_small(timers: Timers) -> None:
    loop = WorkflowLoop(timers)
    parts = [loop] + [getattr(loop, name) for name in WorkflowLoop.__slots__ if name != "timers"]
    assert sum(map(sys.getsizeof, parts)) < 1_536
    loop.close()
