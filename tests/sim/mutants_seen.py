"""Mistakes that only what is seen from outside shows, not what the product wrote of itself: see mutants.py."""

from __future__ import annotations

from typing import Any
from unittest import mock

from msgspec.structs import replace

from streamflow.core.commands import CancelWorkflow, Command, StartWorkflow
from streamflow.core.effects import TimerRecord
from streamflow.core.events import CancelRequested, Event, StepCompleted, StepFailed
from streamflow.core.inputs import Inputs, Rejected
from streamflow.core.partition import Partition
from streamflow.core.replay import Execution
from streamflow.core.retry import Retry
from streamflow.errors import ErrorInfo
from streamflow.worker.executor import Attempt, Executor
from streamflow.worker.processor import Batch, Processor
from streamflow.worker.timers import TimerService
from streamflow.workflow.stepinfo import running
from tests.sim.mutating import Patch, both, mutation, swap

EARLY_MS = 900

# -- time ------------------------------------------------------------------------------------------------------------


@mutation("5", seeds=1)
def ignore_the_delay_of_a_start() -> Patch:
    """A run begins at once, and its history says so."""
    usual = Inputs._start

    def start(self: Inputs, execution: Execution, body: StartWorkflow) -> Rejected | bytes:
        return usual(self, execution, replace(body, delay_ms=None, start_at=None))

    return swap(Inputs, "_start", start)


@mutation("5", seeds=1)
def let_runs_time_out_at_once() -> Patch:
    """A run has a millisecond, and its history says so."""
    usual = Inputs._start

    def start(self: Inputs, execution: Execution, body: StartWorkflow) -> Rejected | bytes:
        return usual(self, execution, body if body.timeout_ms is None else replace(body, timeout_ms=1))

    return swap(Inputs, "_start", start)


@mutation("5", seeds=1)
def fire_timers_early_and_move_the_time_of_the_log() -> Patch:
    """Timers are found due 0.9 s early, and their turns say that it was later than it was."""
    look, usual = TimerService._look, Partition.timer

    def early(self: TimerService, now_ms: int) -> tuple[dict[bytes, bytes], int]:
        due, next_ms = look(self, now_ms + EARLY_MS)
        return due, next_ms - EARLY_MS

    def timer(self: Partition, due: TimerRecord) -> None:
        self._fire_at.append(due.fire_at)
        usual(self, due)

    return both(swap(TimerService, "_look", early), swap(Partition, "timer", timer))


# -- cancel ----------------------------------------------------------------------------------------------------------


@mutation("6", "outcome", "endless", seeds=1)
def record_a_cancel_and_tell_the_code_nothing() -> Patch:
    """A run goes on as if nobody had asked it to cancel."""
    usual = Execution._deliver

    def deliver(self: Execution, event: Event, at: int) -> None:
        if type(event) is not CancelRequested:
            usual(self, event, at)

    return swap(Execution, "_deliver", deliver)


@mutation("refused", seeds=1)
def refuse_each_cancel() -> Patch:
    """Whoever asks is told that the run is closed."""
    usual = Inputs.command

    def command(self: Inputs, execution: Execution, command: Command) -> Rejected | bytes | None:
        if isinstance(command.body, CancelWorkflow) and execution.run.run and not execution.run.is_closed:
            return Rejected("CommandRejected", "it is closed")
        return usual(self, execution, command)

    return swap(Inputs, "command", command)


# -- steps -----------------------------------------------------------------------------------------------------------


@mutation("2", seeds=1)
def complete_a_step_without_running_it() -> Patch:
    """What undoes is reported as done, and was never called."""
    usual = Executor.start

    def start(self: Executor, attempt: Attempt) -> None:
        if attempt.call.step.name != "undo":
            usual(self, attempt)
            return
        info = attempt.info
        done = StepCompleted(number=info.number, attempt=info.attempt, result=b"null")
        self._loop.call_soon(attempt.report, info, done)

    return swap(Executor, "start", start)


@mutation("3", seeds=1)
def give_up_what_runs_at_most_once() -> Patch:
    """A step that runs at most once is said to have been cut off, and never ran."""
    usual = Executor.start

    def start(self: Executor, attempt: Attempt) -> None:
        if not attempt.at_most_once:
            usual(self, attempt)
            return
        info, error = attempt.info, ErrorInfo(type="streamflow.errors.StepInterrupted", message="cut off")
        failed = StepFailed(number=info.number, attempt=info.attempt, error=error)
        self._loop.call_soon(attempt.report, info, failed)

    return swap(Executor, "start", start)


@mutation("3", seeds=1)
def try_again_what_may_be_tried_once() -> Patch:
    """A step whose retry says one attempt has two."""
    usual = Retry.next_delay

    def next_delay(self: Retry, error: Any, attempt: int, *rest: Any, **options: Any) -> float | None:
        once = self.max_attempts == 1 and attempt == 1
        return 0.0 if once else usual(self, error, attempt, *rest, **options)

    return swap(Retry, "next_delay", next_delay)


@mutation("3", seeds=1)
def call_a_step_twice() -> Patch:
    """An attempt calls its code, and once more, and the second result counts."""
    usual = Executor._run

    async def run(self: Executor, attempt: Attempt) -> None:
        step = attempt.call.step
        if step.is_async and not attempt.at_most_once and attempt.call.timeout is None and step.name == "echo":
            running.set(attempt.info)
            positional, named = step.signature.decode_args(attempt.args)
            await step.function(*positional, **named)
        await usual(self, attempt)

    return swap(Executor, "_run", run)


# -- what goes wrong inside ------------------------------------------------------------------------------------------


@mutation("logged", "endless", seeds=1)
def break_an_invariant_now_and_then() -> Patch:
    """The processor trips over itself, begins again from the log, and all comes right."""
    usual, calls = Processor._perform, 0

    def perform(self: Processor, batch: Batch) -> None:
        nonlocal calls
        calls += 1
        if calls % 23 == 0:
            raise KeyError("an internal error")
        usual(self, batch)

    return mock.patch.object(Processor, "_perform", perform)
