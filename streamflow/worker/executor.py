"""The executor runs attempts of steps: asyncio, thread or process, at most `max_parallel_steps` at once.

Rules of this file:

- An attempt starts only when its caller says so, that is once the turn that scheduled it is durable.
- Every attempt ends in exactly one outcome, reported once, or in none when it was cancelled from outside.
- The error is judged here, where it is an object: retried or not, and when, is part of the outcome.
- A timeout ends the attempt even if its code does not: the code is cancelled and left alone.
- What ends the process (Ctrl-C, the event loop being torn down) is no outcome: the attempt runs again elsewhere.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from streamflow.config import Limits
from streamflow.core.events import StepAttemptFailed, StepCompleted, StepFailed, instant
from streamflow.errors import InvalidArguments, PayloadTooLarge
from streamflow.metrics import step_tally
from streamflow.worker.processes import Processes, run_in_process
from streamflow.worker.threads import DaemonThreads, Ended, StepThreads
from streamflow.workflow.code import StepCall, check_size, error_info, is_interrupt
from streamflow.workflow.stepinfo import StepInfo, running

log = logging.getLogger("streamflow.worker")

TEARDOWN_SECONDS: Final = 1.0
"""A step cancelled by nobody we know is reported this late: if its event loop is being torn down, it never is."""

NEVER_RETRIED: Final = (InvalidArguments, PayloadTooLarge)
"""Values that do not fit: they would not fit the next time."""

StandIn: TypeAlias = "Callable[[StepCall], StepCall]"
"""What a simulated host runs in the place of a call."""
AttemptOutcome: TypeAlias = StepCompleted | StepFailed | StepAttemptFailed


class Now(Protocol):
    """A clock in milliseconds."""

    def now_ms(self) -> int: ...


class Attempt:
    """One attempt to run; `report` takes its outcome. `at_most_once` is what the history says, not today's code."""

    __slots__ = (
        "args",
        "at_most_once",
        "begun",
        "call",
        "cancelled",
        "info",
        "key",
        "report",
        "scheduled_at",
        "task",
    )

    def __init__(
        self,
        *,
        owner: object,
        info: StepInfo,
        call: StepCall,
        args: bytes,
        scheduled_at: int,
        at_most_once: bool,
        report: Callable[[StepInfo, AttemptOutcome], None],
    ) -> None:
        self.info = info
        self.key = AttemptKey(owner, info.workflow_id, info.run, info.number)
        self.call = call
        self.args = args
        self.scheduled_at = scheduled_at
        self.at_most_once = at_most_once
        self.report = report
        self.task: asyncio.Task[None] | None = None
        self.begun = False
        self.cancelled = False


class AttemptKey(NamedTuple):
    """There is one attempt of a step at a time."""

    owner: object
    workflow_id: str
    run: int
    number: int


class Executor:
    """Runs attempts; one per worker process."""

    def __init__(
        self,
        clock: Now,
        *,
        max_parallel_steps: int,
        limits: Limits,
        threads: StepThreads | None = None,
        stand_in: StandIn | None = None,
    ) -> None:
        self.clock = clock
        self.max_parallel_steps = max_parallel_steps
        self.limits = limits
        self.attempts: dict[AttemptKey, Attempt] = {}
        self.running: dict[asyncio.Task[Any], Attempt] = {}
        self.waiting: OrderedDict[AttemptKey, Attempt] = OrderedDict()
        self.threads: StepThreads = threads or DaemonThreads(
            min(limits.step_threads_max, max_parallel_steps), stuck_max=limits.stuck_threads_max
        )
        self.processes = Processes(min(os.cpu_count() or 1, max_parallel_steps))
        self._stand_in = stand_in
        self._inner: dict[asyncio.Future[Any], Attempt] = {}
        self._abandoned: set[asyncio.Future[Any]] = set()
        self._wanting_room: set[asyncio.Event] = set()
        self._loop = asyncio.get_running_loop()
        # Attempts begin in the context of the worker, never in that of the attempt which happened to end before.
        self._context = contextvars.copy_context()
        self._closed = False

    @property
    def is_full(self) -> bool:
        """Whether so many attempts wait that nobody should decide on more."""
        return len(self.waiting) > self.limits.steps_waiting_max

    def wake_when_room(self, event: asyncio.Event) -> None:
        """Set the event once the executor is not full any more."""
        self._wanting_room.add(event)

    def start(self, attempt: Attempt) -> None:
        """Run the attempt as soon as there is a free slot."""
        if self._closed:
            return
        assert attempt.key not in self.attempts, attempt.key
        if self._stand_in is not None:
            attempt.call = self._stand_in(attempt.call)
        self.attempts[attempt.key] = attempt
        if len(self.running) < self.max_parallel_steps:
            self._begin(attempt)
        else:
            self.waiting[attempt.key] = attempt

    def refuse(self, attempt: Attempt, error: Exception) -> None:
        """Report an attempt that cannot begin here as failed, judged as if its code had raised the error."""
        self._report(attempt, self._failure(attempt, error, self.clock.now_ms()))

    def cancel(self, owner: object, workflow_id: str, run: int, number: int) -> None:
        """Nobody waits for the step any more: cancel its attempt; it reports nothing."""
        attempt = self.attempts.pop(AttemptKey(owner, workflow_id, run, number), None)
        if attempt is None:
            return
        attempt.cancelled = True
        attempt.info.cancel()
        if attempt.task is not None:
            step_tally(attempt.call.step.name).cancelled += 1
            attempt.task.cancel()
            if not attempt.begun:
                self._done(attempt)  # nothing of a task runs that is cancelled before its first step
        else:
            del self.waiting[attempt.key]
            self._tell_room()

    def drop(self, owner: object) -> None:
        """The owner is gone: cancel all of its attempts."""
        for key in [key for key in self.attempts if key.owner is owner]:
            self.cancel(*key)

    def close(self) -> None:
        """Cancel everything and free threads and processes. Idempotent."""
        self._closed = True
        for key in list(self.attempts):
            self.cancel(*key)
        for future in list(self._abandoned):
            future.cancel()
        self.threads.close()
        self.processes.close()

    def running_in(self, task: asyncio.Task[Any]) -> StepInfo | None:
        """The step whose code runs in that task, if it is one's; asked by the watchdog from its own thread."""
        attempt = self.running.get(task) or self._inner.get(task)
        if attempt is not None:
            return attempt.info
        if hasattr(task, "get_context"):  # since Python 3.12: a task that the step itself made
            found: StepInfo | None = task.get_context().get(running)
            return found
        return None

    def _begin(self, attempt: Attempt) -> None:
        task = self._loop.create_task(self._run(attempt), context=self._context.copy())
        attempt.task = task
        self.running[task] = attempt

    async def _run(self, attempt: Attempt) -> None:
        attempt.begun = True
        call, info = attempt.call, attempt.info
        started_at, begun_at = self.clock.now_ms(), time.perf_counter()
        tally = step_tally(call.step.name)
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
            check_size(result, what=f"the result of step {call.name} of run {info.workflow_id}")
            outcome = StepCompleted(number=info.number, attempt=info.attempt, result=result, started_at=started_at)
            tally.completed += 1
        except GeneratorExit as error:
            if self._closed or self._loop.is_closed():
                raise  # the coroutine is thrown away
            outcome = self._failure(attempt, error, started_at)  # the step raised it
        except asyncio.CancelledError as error:
            if attempt.cancelled:
                return
            outcome = self._failure(attempt, error, started_at)
            if attempt.task is not None and attempt.task.cancelling():
                self._loop.call_later(TEARDOWN_SECONDS, self._report, attempt, outcome)
                return
        except BaseException as error:  # whatever a step raises is its outcome; SystemExit must not end the worker
            if call.step.is_async and is_interrupt(error):
                raise
            outcome = self._failure(attempt, error, started_at)
        finally:
            tally.duration.observe(time.perf_counter() - begun_at)
            self._done(attempt)
        self._report(attempt, outcome)

    def _report(self, attempt: Attempt, outcome: AttemptOutcome) -> None:
        if not attempt.cancelled and not self._closed:
            attempt.report(attempt.info, outcome)

    def _done(self, attempt: Attempt) -> None:
        if attempt.task is not None:
            self.running.pop(attempt.task, None)
        if self.attempts.get(attempt.key) is attempt:
            del self.attempts[attempt.key]
        while self.waiting and len(self.running) < self.max_parallel_steps and not self._loop.is_closed():
            self._begin(self.waiting.popitem(last=False)[1])
        self._tell_room()

    def _tell_room(self) -> None:
        if self._wanting_room and not self.is_full:
            for event in self._wanting_room:
                event.set()
            self._wanting_room.clear()

    async def _bounded(self, attempt: Attempt, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run what may outlive its attempt: anything with a timeout, threads and processes."""
        step, timeout = attempt.call.step, attempt.call.timeout
        future: asyncio.Future[Any]
        if step.is_async:
            code: Callable[[], Awaitable[Any]] = functools.partial(step.function, *args, **kwargs)
            future = self._loop.create_task(_contained(code))
            self._inner[future] = attempt
            future.add_done_callback(self._inner.pop)
        elif step.process:
            info = attempt.info
            identity = (info.workflow_id, info.run, info.step, info.number, info.attempt)
            job = (run_in_process, step.__module__, step.__qualname__, identity, args, kwargs)
            future = self._loop.create_task(self.processes.run(*job))
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
            value = future.result()
            if type(value) is Ended:
                raise value.error
            return value
        self._abandon(attempt, future)
        step_tally(step.name).timeouts += 1
        raise TimeoutError(f"attempt {attempt.info.attempt} of step {attempt.call.name} took longer than {timeout} s")

    def _abandon(self, attempt: Attempt, future: asyncio.Future[Any]) -> None:
        """Cancel the code and keep it only until it ends; what it still says is dropped."""
        attempt.info.cancel()
        self._abandoned.add(future)
        future.add_done_callback(self._forget)
        if isinstance(future, asyncio.Task):
            future.cancel()
        else:
            self.threads.give_up(future)

    def _forget(self, future: asyncio.Future[Any]) -> None:
        self._abandoned.discard(future)
        if not future.cancelled():
            future.exception()  # retrieved, so that asyncio does not report it as lost

    def _failure(self, attempt: Attempt, error: BaseException, started_at: int) -> StepFailed | StepAttemptFailed:
        """The outcome of a failed attempt: tried again, and when, or failed for good."""
        call, info = attempt.call, attempt.info
        now = self.clock.now_ms()
        delay: float | None = None
        if not attempt.at_most_once and not isinstance(error, NEVER_RETRIED):
            try:
                elapsed = (now - attempt.scheduled_at) / 1000
                delay = call.retry.next_delay(error, info.attempt, elapsed, info.workflow_id, info.run, info.number)
            except BaseException as broken:  # Retry.when is the user's code: its error replaces the step's
                if is_interrupt(broken):
                    raise
                broken.__context__ = error
                error = broken
        recorded = error_info(error)
        if delay is None:
            step_tally(call.step.name).failed += 1
            return StepFailed(number=info.number, attempt=info.attempt, error=recorded, started_at=started_at)
        step_tally(call.step.name).retried += 1
        return StepAttemptFailed(
            number=info.number,
            attempt=info.attempt,
            error=recorded,
            retry_at=instant(now + math.ceil(delay * 1000)),
            started_at=started_at,
        )


async def _contained(code: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return await code()
    except (SystemExit, KeyboardInterrupt) as error:
        if is_interrupt(error):
            raise
        return Ended(error)
