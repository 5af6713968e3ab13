"""The event loop of one simulated process: asyncio's own, but for time and for when its callbacks run.

The world runs it a callback at a time (`run_one`), in the order in which they became ready, as a real loop does. What
the world chooses is which process goes on, and when. A process that is stopped is not chosen; one that is killed never
again: nothing of it runs any more, not even a `finally`.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from asyncio import events
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from heapq import heappop
from typing import Any, Final, TypeVar, TypeVarTuple

from streamflow.sim.guard import LOOP_METHODS, loop_method

Ts = TypeVarTuple("Ts")
T = TypeVar("T")

CLOSED_MAX: Final = 10_000
"""Tasks of one process that are closed at the end; those that they begin meanwhile count, too."""
CLOSES_MAX: Final = 100
"""How often one coroutine is closed that waits once more each time."""
RESOLUTION_SECONDS: Final = 1e-6
"""Timers that are due within it are due: clocks that drift are converted to and fro."""


class ProcessLoop(asyncio.BaseEventLoop):
    """`now` gives the process's monotonic time in seconds; `later` is how long work in a thread takes, in seconds."""

    _ready: Any
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self, now: Callable[[], float], later: Callable[[], float]) -> None:
        super().__init__()
        self._now, self._later = now, later
        self.failures: list[dict[str, Any]] = []
        """What reached nobody: exceptions of callbacks, and of tasks that were dropped without a look."""
        self._alive: dict[asyncio.Task[Any], None] = {}
        self.set_exception_handler(lambda _, context: self.failures.append(context))

    def time(self) -> float:
        return self._now()

    @property
    def next_at(self) -> float | None:
        """When the next timer is due, by this loop's time; None without any."""
        while self._scheduled and self._scheduled[0].cancelled():
            heappop(self._scheduled)._scheduled = False  # type: ignore[attr-defined]
        return self._scheduled[0].when() if self._scheduled else None

    @property
    def is_ready(self) -> bool:
        """Whether a callback is ready."""
        return bool(self._ready)

    def wake(self) -> None:
        """Make the timers ready that are due now."""
        due = self._now() + RESOLUTION_SECONDS
        while (at := self.next_at) is not None and at <= due:
            handle = heappop(self._scheduled)
            handle._scheduled = False  # type: ignore[attr-defined]
            self._ready.append(handle)

    def run_one(self) -> None:
        """Run the callback that has been ready for longest."""
        handle = self._ready.popleft()
        if handle._cancelled:
            return
        hooks = sys.get_asyncgen_hooks()
        ours = (self._asyncgen_firstiter_hook, self._asyncgen_finalizer_hook)  # type: ignore[attr-defined]
        sys.set_asyncgen_hooks(*ours)
        events._set_running_loop(self)
        try:
            handle._run()
        finally:
            events._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        """Kept until it is done: of a killed process, too, since what is collected runs its `finally` blocks."""
        task: asyncio.Task[Any] = super().create_task(coro, **options)
        self._alive[task] = None
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._alive.pop(task, None)

    def throw_away(self) -> None:
        """The world is over: end all that was left, without anybody looking.

        What is closed runs its `finally` blocks, and they find the loop that they know: asyncio would make a real one,
        or refuse, and leave coroutines behind that nobody awaited. What they begin is closed, too.
        """
        events._set_running_loop(self)
        try:
            for _ in range(CLOSED_MAX):
                if not self._alive:
                    break
                task, _ = self._alive.popitem()
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                _close(task.get_coro())
        finally:
            events._set_running_loop(None)
        self._alive.clear()
        self._ready.clear()
        self._scheduled.clear()
        self.close()

    def is_running(self) -> bool:
        return events._get_running_loop() is self

    def run_in_executor(self, executor: Any, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """A thread's work is done some time later, in one piece."""
        future: asyncio.Future[T] = self.create_future()

        def work() -> None:
            if future.cancelled():
                return
            events._set_running_loop(None)  # a thread has none
            try:
                future.set_result(func(*args))
            except BaseException as error:  # as an executor does: it is the caller's
                future.set_exception(error)
            finally:
                events._set_running_loop(self)

        self.call_later(self._later(), work)
        return future

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def _write_to_self(self) -> None: ...

    def _process_events(self, event_list: Any) -> None: ...


def _close(coroutine: Any) -> None:
    """Close it, again if it waits once more."""
    for _ in range(CLOSES_MAX):
        with suppress(BaseException):  # whatever the code of a dead process says
            coroutine.close()
        # What closes a generator that nobody holds any more is a task, too, of something that is no coroutine.
        if not inspect.iscoroutine(coroutine) or inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED:
            return


for _name in LOOP_METHODS:  # BaseEventLoop has some of them, and leaves the rest to real loops
    setattr(ProcessLoop, _name, loop_method(_name))
