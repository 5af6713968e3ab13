"""A pool of daemon threads for plain `def` steps.

Why not `ThreadPoolExecutor`: the interpreter joins its threads at exit, so that one step that never returns would keep
a stopped worker alive for ever. A step's thread owes nothing to anybody once its attempt is given up.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any

Job = tuple[Callable[[], Any], contextvars.Context, asyncio.AbstractEventLoop, "asyncio.Future[Any]"]


class DaemonThreads:
    """At most `size` threads, started when needed; jobs beyond them wait in order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._started = 0

    def run(self, function: Callable[[], Any], context: contextvars.Context) -> asyncio.Future[Any]:
        """Run the function in a thread, in `context`; the future belongs to the running loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._jobs.put((function, context, loop, future))
        if not self._idle.acquire(blocking=False) and self._started < self.size:
            self._started += 1
            threading.Thread(target=self._work, name=f"streamflow-step-{self._started}", daemon=True).start()
        return future

    def close(self) -> None:
        """Let idle threads end; busy ones end with their job, or with the process."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            function, context, loop, future = job
            result: Any = None
            error: BaseException | None = None
            try:
                result = context.run(function)
            except BaseException as raised:  # whatever the step raises is its outcome
                error = raised
            self._idle.release()
            try:
                loop.call_soon_threadsafe(_settle, future, result, error)  # enters the event loop here
            except RuntimeError:
                return  # the loop is closed: the worker has stopped


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, (StopIteration, asyncio.CancelledError)):
        # A future cannot carry StopIteration, and a cancellation of its own is not ours.
        wrapped = RuntimeError(f"the step raised {type(error).__name__}: {error}")
        wrapped.__cause__ = error
        future.set_exception(wrapped)
    else:
        future.set_exception(error)
