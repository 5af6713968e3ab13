"""Processes for steps with `process=True`.

Each process is a pool of one: a step that is given up has its process killed, and a process that dies takes only its
own step with it. (One pool of many knows neither which process runs what, nor how to lose one of them.)
"""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from streamflow.worker.threads import Ended, portable
from streamflow.workflow.code import qualified
from streamflow.workflow.stepinfo import StepInfo, running

Identity = tuple[str, int, str, int, int]
"""Workflow id, run, step, number, attempt."""


class Processes:
    """At most `size` processes, started when needed; jobs beyond them wait in order."""

    def __init__(self, size: int) -> None:
        self._slots = asyncio.Semaphore(size)
        self._idle: list[ProcessPoolExecutor] = []

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run the function in a process; a cancelled call kills it. What would end the event loop comes as `Ended`."""
        async with self._slots:
            pool, future = self._submit(function, *args)
            try:
                result = await asyncio.wrap_future(future)
            except BrokenProcessPool as error:
                _kill(pool)
                raise BrokenProcessPool(
                    "the step's process died: killed, out of memory, or the main module starts something when it is "
                    "imported (guard that with `if __name__ == '__main__':`)"
                ) from error
            except asyncio.CancelledError:
                _kill(pool)
                raise
            except Unpicklable as error:
                self._idle.append(pool)
                raise error.rebuilt() from error
            except (SystemExit, KeyboardInterrupt) as error:
                self._idle.append(pool)
                return Ended(error)
            except BaseException:
                self._idle.append(pool)
                raise
            self._idle.append(pool)
            return result

    def _submit(self, function: Callable[..., Any], *args: Any) -> tuple[ProcessPoolExecutor, Future[Any]]:
        while self._idle:
            pool = self._idle.pop()
            try:
                return pool, pool.submit(function, *args)
            except BrokenProcessPool:  # it was killed while it was idle: no attempt was lost
                _kill(pool)
        pool = _start()
        return pool, pool.submit(function, *args)

    def close(self) -> None:
        """End the idle processes; those that work are killed when their calls are cancelled. Idempotent."""
        while self._idle:
            _kill(self._idle.pop())


def _start() -> ProcessPoolExecutor:
    # spawn: a fork of a process with threads and RocksDB open may deadlock
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)


def _kill(pool: ProcessPoolExecutor) -> None:
    # kill_workers() is public since Python 3.14 only.
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()


# ---------------------------------------------------------------------------------------------- in the step's process


def _begin() -> None:
    # Ctrl-C reaches the whole foreground group; what becomes of the steps is the worker's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="streamflow-parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # the worker was killed: nobody will ever take the result


class Unpicklable(Exception):
    """Stands for an error that cannot be sent between processes as it is."""

    def __init__(self, kind: type[BaseException] | None, name: str, message: str, trace: str) -> None:
        super().__init__(kind, name, message, trace)
        self.kind, self.name, self.message, self.trace = kind, name, message, trace

    def rebuilt(self) -> BaseException:
        """An error of the same class with the same text, so that `Retry.on` and `raises` see what they expect."""
        if self.kind is None:
            return RuntimeError(f"{self.name}: {self.message}")
        made = self.kind.__new__(self.kind)
        made.args = (self.message,)
        return made

    def __str__(self) -> str:
        return self.trace


def run_in_process(
    module: str, qualname: str, identity: Identity, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the step's function; it is found by name, since the decorated function cannot be pickled."""
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    workflow_id, run, name, number, attempt = identity
    running.set(StepInfo(workflow_id=workflow_id, run=run, step=name, number=number, attempt=attempt))
    function = getattr(found, "function", found)
    try:
        return function(*args, **kwargs)
    except BaseException as error:  # whatever it is, the parent makes it the step's outcome
        raise _sendable(portable(error))  # noqa: B904 - it is that error


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
        return error
    except Exception:  # a constructor with other arguments, or an attribute that is no value: many classes are so
        kind: type[BaseException] | None = type(error)
        try:
            pickle.dumps(kind)
        except Exception:  # a class that its module does not have
            kind = None
        return Unpicklable(kind, qualified(type(error)), str(error), "".join(traceback.format_exception(error)))
