"""A pool of daemon threads for plain `def` steps.

Why not `ThreadPoolExecutor`: the interpreter joins its threads at exit, so that one step that never returns would keep
a stopped worker alive for ever. A step's thread owes nothing to anybody once its attempt is given up.

Rules of this file:

- All counting is done on the event loop's thread; a thread of the pool only takes jobs and runs them.
- A job that is given up before a thread took it never runs.
- A thread whose job was given up while it ran is *stuck* until the job returns. The pool starts another one in its
  place, so that steps which hang do not take the others with them, up to `stuck_max` of them.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

log = logging.getLogger("streamflow.worker")


class StepThreads(Protocol):
    """Where plain functions run."""

    def run(self, function: Callable[[], Any], context: contextvars.Context) -> asyncio.Future[Any]:
        """Run the function in `context`; the future belongs to the running loop."""
        ...

    def give_up(self, future: asyncio.Future[Any]) -> None:
        """Nobody waits for it any more: cancel it if it has not begun."""
        ...

    def close(self) -> None:
        """Take no more. Idempotent."""
        ...


class _Job:
    __slots__ = ("begun", "context", "function", "future", "loop")

    def __init__(self, function: Callable[[], Any], context: contextvars.Context) -> None:
        self.function = function
        self.context = context
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.begun = False


class DaemonThreads:
    """At most `size` threads that are not stuck, started when needed; jobs beyond them wait in order."""

    def __init__(self, size: int, *, stuck_max: int) -> None:
        self.size = size
        self.stuck_max = stuck_max
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._open: dict[asyncio.Future[Any], _Job] = {}
        self._stuck: set[asyncio.Future[Any]] = set()
        self._threads = 0
        self._made = 0

    def run(self, function: Callable[[], Any], context: contextvars.Context) -> asyncio.Future[Any]:
        """Run the function in a thread, in `context`; the future belongs to the running loop."""
        job = _Job(function, context)
        self._open[job.future] = job
        self._jobs.put(job)
        self._grow()
        return job.future

    def give_up(self, future: asyncio.Future[Any]) -> None:
        """Nobody waits for the job any more; its thread, if it has one, does not count until it is back."""
        future.cancel()
        job = self._open.get(future)
        if job is None or not job.begun:
            return
        if len(self._stuck) >= self.stuck_max:
            log.error(
                "%d threads are stuck in steps that were given up, and no more are started in their place: plain "
                "functions must return when sf.step_info().cancelled, or have timeouts of their own",
                len(self._stuck),
            )
            return
        self._stuck.add(future)
        self._grow()

    def close(self) -> None:
        """Let idle threads end; busy ones end with their job, or with the process. Idempotent."""
        for _ in range(self._threads):
            self._jobs.put(None)
        self._threads = 0

    def _grow(self) -> None:
        if self._threads < len(self._open) and self._threads < self.size + len(self._stuck):
            self._threads += 1
            self._made += 1
            threading.Thread(target=self._work, name=f"streamflow-step-{self._made}", daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            result: Any = None
            error: BaseException | None = None
            # In this order, as `give_up` cancels first and looks then: one of the two sees the other.
            job.begun = True
            if not job.future.cancelled():
                try:
                    result = job.context.run(job.function)
                except BaseException as raised:  # whatever the step raises is its outcome
                    error = raised
            try:
                job.loop.call_soon_threadsafe(self._settle, job, result, error)  # enters the event loop here
            except RuntimeError:
                return  # the loop is closed: the worker has stopped
            del job, result, error  # an idle thread must keep nothing of the last step alive

    def _settle(self, job: _Job, result: Any, error: BaseException | None) -> None:
        future = job.future
        del self._open[future]
        if future in self._stuck:
            self._stuck.remove(future)
            if self._threads > self.size + len(self._stuck):
                self._threads -= 1
                self._jobs.put(None)
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(portable(error))


def portable(error: BaseException) -> BaseException:
    """The error as a future may carry it: not StopIteration, and no cancellation, which would be taken for its own."""
    if not isinstance(error, (StopIteration, asyncio.CancelledError)):
        return error
    wrapped = RuntimeError(f"the step raised {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


class Ended:
    """A task that raises SystemExit or KeyboardInterrupt ends the event loop; so it returns it in this."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error
