"""The executor runs attempts of steps: asyncio, thread or process, at most `max_parallel_steps` at once.

Rules of this file:

- An attempt starts only when its caller says so, that is once the turn that scheduled it is durable.
- Every attempt ends in exactly one outcome, reported once, or in none when it was cancelled from outside.
- The error is judged here, where it is an object: retried or not, and when, is part of the outcome.
- A timeout ends the attempt even if its code does not: the code is cancelled and left alone.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import importlib
import logging
import math
import multiprocessing
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from streamflow.config import Limits
from streamflow.core.events import StepAttemptFailed, StepCompleted, StepFailed
from streamflow.metrics import STEPS_RUN
from streamflow.worker.threads import DaemonThreads
from streamflow.workflow.code import StepCall, check_size, error_info
from streamflow.workflow.stepinfo import StepInfo, running

log = logging.getLogger("streamflow.worker")

_completed = STEPS_RUN.labels("completed")
_failed = STEPS_RUN.labels("failed")
_retried = STEPS_RUN.labels("retried")

AttemptOutcome = StepCompleted | StepFailed | StepAttemptFailed


class Now(Protocol):
    """A clock in milliseconds."""

    def now_ms(self) -> int: ...


class Attempt:
    """One attempt to run; `report` takes its outcome."""

    __slots__ = ("args", "call", "cancelled", "info", "owner", "report", "scheduled_at", "task")

    def __init__(
        self,
        *,
        owner: object,
        info: StepInfo,
        call: StepCall,
        args: bytes,
        scheduled_at: int,
        report: Callable[[StepInfo, AttemptOutcome], None],
    ) -> None:
        self.owner = owner
        self.info = info
        self.call = call
        self.args = args
        self.scheduled_at = scheduled_at
        self.report = report
        self.task: asyncio.Task[None] | None = None
        self.cancelled = False


class Executor:
    """Runs attempts; one per worker process."""

    def __init__(self, clock: Now, *, max_parallel_steps: int, limits: Limits) -> None:
        self.clock = clock
        self.max_parallel_steps = max_parallel_steps
        self.attempts: dict[tuple[object, str, int], Attempt] = {}
        self.running: dict[asyncio.Task[Any], Attempt] = {}
        self.waiting: deque[Attempt] = deque()
        self.threads = DaemonThreads(min(limits.step_threads_max, max_parallel_steps))
        self._processes: ProcessPoolExecutor | None = None
        self._abandoned: set[asyncio.Future[Any]] = set()
        self._loop = asyncio.get_running_loop()

    def start(self, attempt: Attempt) -> None:
        """Run the attempt as soon as there is a free slot."""
        key = (attempt.owner, attempt.info.workflow_id, attempt.info.number)
        self.attempts[key] = attempt
        if len(self.running) < self.max_parallel_steps:
            self._begin(attempt)
        else:
            self.waiting.append(attempt)

    def cancel(self, owner: object, workflow_id: str, number: int) -> None:
        """Nobody waits for the step any more: cancel its attempt; it reports nothing."""
        attempt = self.attempts.pop((owner, workflow_id, number), None)
        if attempt is None:
            return
        attempt.cancelled = True
        attempt.info.cancel()
        if attempt.task is not None:
            attempt.task.cancel()

    def drop(self, owner: object) -> None:
        """The owner is gone: cancel all of its attempts."""
        for key in [key for key in self.attempts if key[0] is owner]:
            self.cancel(*key)

    def close(self) -> None:
        """Cancel everything and free threads and processes."""
        for key in list(self.attempts):
            self.cancel(*key)
        self.threads.close()
        if self._processes is not None:
            self._processes.shutdown(wait=False, cancel_futures=True)

    def _begin(self, attempt: Attempt) -> None:
        task = self._loop.create_task(self._run(attempt))
        attempt.task = task
        self.running[task] = attempt

    async def _run(self, attempt: Attempt) -> None:
        call, info = attempt.call, attempt.info
        started_at = self.clock.now_ms()
        running.set(info)
        outcome: AttemptOutcome
        try:
            signature = call.step.signature
            args, kwargs = signature.decode_args(attempt.args)
            if call.step.is_async and call.timeout is None:
                value = await call.step.function(*args, **kwargs)
            else:
                value = await self._bounded(attempt, args, kwargs)
            result = signature.encode_result(value)
            check_size(result, what=f"the result of step {call.name}")
            outcome = StepCompleted(number=info.number, attempt=info.attempt, result=result, started_at=started_at)
            _completed.inc()
        except asyncio.CancelledError as error:
            if attempt.cancelled:
                return
            outcome = self._failure(attempt, error, started_at)
        except GeneratorExit:
            raise
        except BaseException as error:  # whatever a step raises is its outcome; SystemExit must not end the worker
            outcome = self._failure(attempt, error, started_at)
        finally:
            self._done(attempt)
        if not attempt.cancelled:
            attempt.report(info, outcome)

    def _done(self, attempt: Attempt) -> None:
        if attempt.task is not None:
            self.running.pop(attempt.task, None)
        key = (attempt.owner, attempt.info.workflow_id, attempt.info.number)
        if self.attempts.get(key) is attempt:
            del self.attempts[key]
        while self.waiting and len(self.running) < self.max_parallel_steps:
            waiting = self.waiting.popleft()
            if not waiting.cancelled:
                self._begin(waiting)

    async def _bounded(self, attempt: Attempt, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run what may outlive its attempt: anything with a timeout, threads and processes."""
        step, timeout = attempt.call.step, attempt.call.timeout
        future: asyncio.Future[Any]
        if step.is_async:
            future = asyncio.ensure_future(step.function(*args, **kwargs))
        elif step.process:
            future = self._in_process(attempt, args, kwargs)
        else:
            attempt.info.give_threads()
            context = contextvars.copy_context()
            future = self.threads.run(functools.partial(step.function, *args, **kwargs), context)
        try:
            done, _ = await asyncio.wait((future,), timeout=timeout)
        except asyncio.CancelledError:
            self._abandon(attempt, future)
            raise
        if done:
            return future.result()
        self._abandon(attempt, future)
        raise TimeoutError(f"attempt {attempt.info.attempt} of step {attempt.call.name} took longer than {timeout} s")

    def _abandon(self, attempt: Attempt, future: asyncio.Future[Any]) -> None:
        """Cancel the code and keep it only until it ends; what it still says is dropped."""
        attempt.info.cancel()
        self._abandoned.add(future)
        future.add_done_callback(self._forget)
        future.cancel()

    def _forget(self, future: asyncio.Future[Any]) -> None:
        self._abandoned.discard(future)
        if not future.cancelled():
            future.exception()  # retrieved, so that asyncio does not report it as lost

    def _in_process(self, attempt: Attempt, args: tuple[Any, ...], kwargs: dict[str, Any]) -> asyncio.Future[Any]:
        if self._processes is None:
            # spawn: a fork of a process with threads and RocksDB open may deadlock
            self._processes = ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))
        step, info = attempt.call.step, attempt.info
        identity = (info.workflow_id, info.run, info.step, info.number, info.attempt)
        try:
            future = self._processes.submit(run_in_process, step.__module__, step.__qualname__, identity, args, kwargs)
        except BrokenProcessPool:
            self._processes = None
            return self._in_process(attempt, args, kwargs)
        return asyncio.wrap_future(future)

    def _failure(self, attempt: Attempt, error: BaseException, started_at: int) -> StepFailed | StepAttemptFailed:
        """The outcome of a failed attempt: tried again, and when, or failed for good."""
        if isinstance(error, BrokenProcessPool):
            self._processes = None  # its process died; the next attempt gets a new pool
        call, info = attempt.call, attempt.info
        now = self.clock.now_ms()
        delay: float | None = None
        if not call.step.at_most_once:
            try:
                elapsed = (now - attempt.scheduled_at) / 1000
                delay = call.retry.next_delay(error, info.attempt, elapsed, info.workflow_id, info.run, info.number)
            except Exception as broken:  # Retry.when is the user's code: its error replaces the step's
                broken.__context__ = error
                error = broken
        recorded = error_info(error)
        if delay is None:
            _failed.inc()
            return StepFailed(number=info.number, attempt=info.attempt, error=recorded, started_at=started_at)
        _retried.inc()
        return StepAttemptFailed(
            number=info.number,
            attempt=info.attempt,
            error=recorded,
            retry_at=now + math.ceil(delay * 1000),
            started_at=started_at,
        )


def run_in_process(
    module: str, qualname: str, identity: tuple[str, int, str, int, int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the step's function in a pool process; found by name, since the decorated function cannot be pickled."""
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    workflow_id, run, name, number, attempt = identity
    running.set(StepInfo(workflow_id=workflow_id, run=run, step=name, number=number, attempt=attempt))
    function = getattr(found, "function", found)
    return function(*args, **kwargs)
