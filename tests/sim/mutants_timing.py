"""Times that the product gets wrong before it writes them down, and attempts that it counts wrong: see mutants.py.

Its own fold finds none of them: the history is in order, and not what the program asked for (streamflow/sim/timing.py).
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from msgspec.structs import replace as replace_fields

import streamflow.client.client
from streamflow.core.effects import Effect, StatusRecord
from streamflow.core.events import Event, ProgressSet, SignalTaken, StepAttemptFailed, StepCompleted, StepFailed
from streamflow.core.machines.run import Run
from streamflow.core.machines.signal import Mailbox
from streamflow.core.machines.timer import Timer
from streamflow.core.retry import Retry
from streamflow.worker.executor import Attempt, Executor
from streamflow.workflow.code import RunCode, StepCall
from streamflow.workflow.loop import WorkflowLoop
from tests.sim.mutating import Patch, mutation, swap

# -- sleeps and timeouts of the code ---------------------------------------------------------------------------------


@mutation("5", seeds=1)
def sleep_half_as_long() -> Patch:
    """Each `call_at` of the code is due after half of its time, and the history says so."""
    usual = WorkflowLoop.call_at

    def call_at(self: WorkflowLoop, when: float, *args: Any, **options: Any) -> asyncio.TimerHandle:
        return usual(self, self.time() + (when - self.time()) / 2, *args, **options)

    return swap(WorkflowLoop, "call_at", call_at)


@mutation("5", seeds=1)
def sleep_a_second_longer() -> Patch:
    """Timers are rounded up to whole seconds, and one more."""
    usual = WorkflowLoop.call_at

    def call_at(self: WorkflowLoop, when: float, *args: Any, **options: Any) -> asyncio.TimerHandle:
        return usual(self, when + 1.0 if when > self.time() else when, *args, **options)

    return swap(WorkflowLoop, "call_at", call_at)


@mutation("5", seeds=1)
def time_out_at_once() -> Patch:
    """Whoever waits with a timeout gets it after a millisecond."""
    usual = WorkflowLoop.call_at

    def call_at(self: WorkflowLoop, when: float, callback: Any, *args: Any, **options: Any) -> asyncio.TimerHandle:
        is_sleep = getattr(callback, "__name__", "") == "_set_result_unless_cancelled"
        return usual(self, when if is_sleep else min(when, self.time() + 0.001), callback, *args, **options)

    return swap(WorkflowLoop, "call_at", call_at)


@mutation("3", seeds=1)
def keep_a_signal_from_who_waits_in_a_hurry() -> Patch:
    """A wait with a timeout runs into it, while its signal is there."""
    usual = Mailbox.match

    def match(self: Mailbox) -> SignalTaken | None:
        kept = {name: waits for name, waits in self.waiting.items() if name.startswith("hurried")}
        for name in kept:
            del self.waiting[name]
        try:
            return usual(self)
        finally:
            self.waiting.update(kept)

    return swap(Mailbox, "match", match)


# -- the start of a run ----------------------------------------------------------------------------------------------


@mutation("5", seeds=1)
def ask_for_half_the_delay_of_a_start() -> Patch:
    """The client sends half of the delay, and of the timeout, that it was given."""
    usual = streamflow.client.client._bounded_ms

    def bounded_ms(duration: Any, *, what: str) -> int:
        return usual(duration, what=what) // 2

    return swap(streamflow.client.client, "_bounded_ms", bounded_ms)


@mutation("5", seeds=1)
def give_no_run_a_timeout() -> Patch:
    """The client forgets the timeout of a run."""
    return swap(streamflow.client.client, "_timeout_ms", lambda workflow_id, timeout, definition: None)


# -- steps -----------------------------------------------------------------------------------------------------------


@mutation("5", seeds=3)
def ignore_the_delay_of_a_step() -> Patch:
    """A step that is to begin later begins at once."""
    usual = RunCode.call_step

    async def call_step(self: RunCode, call: StepCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await usual(self, replace(call, delay=None), args, kwargs)

    return swap(RunCode, "call_step", call_step)


@mutation("5", seeds=2)
def cut_off_an_attempt_early() -> Patch:
    """An attempt has half of its time."""
    usual = Executor._bounded

    async def bounded(self: Executor, attempt: Attempt, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        limit = attempt.call.timeout
        attempt.call = replace(attempt.call, timeout=None if limit is None else limit / 2)
        return await usual(self, attempt, args, kwargs)

    return swap(Executor, "_bounded", bounded)


@mutation("5", seeds=2)
def try_again_at_once() -> Patch:
    """There is no time between a failed attempt and the next."""
    return swap(Retry, "delay", lambda self, attempt, *key: 0.0)


@mutation("5", seeds=2)
def try_again_much_later() -> Patch:
    """The delay before the next attempt is in units of ten seconds."""
    usual = Retry.delay

    def delay(self: Retry, attempt: int, *key: object) -> float:
        return 10.0 * usual(self, attempt, *key)

    return swap(Retry, "delay", delay)


@mutation("5", seeds=2)
def spread_attempts_too_far() -> Patch:
    """The jitter counts twice."""
    usual = Retry.delay

    def delay(self: Retry, attempt: int, *key: object) -> float:
        return usual(self if self.jitter != 0.5 else replace(self, jitter=1.0), attempt, *key)

    return swap(Retry, "delay", delay)


@mutation("3", seeds=2)
def try_once_more_than_the_policy_says() -> Patch:
    """The attempts are counted without the first."""
    usual = Retry.next_delay

    def next_delay(self: Retry, error: Any, attempt: int, *rest: Any, **options: Any) -> float | None:
        counted = attempt - 1 if self.max_attempts == attempt and attempt > 1 else attempt
        return usual(self, error, counted, *rest, **options)

    return swap(Retry, "next_delay", next_delay)


@mutation("3", seeds=2)
def give_up_an_attempt_too_early() -> Patch:
    """Of a policy with two attempts only one is made."""
    usual = Retry.next_delay

    def next_delay(self: Retry, error: Any, attempt: int, *rest: Any, **options: Any) -> float | None:
        return None if self.max_attempts == attempt + 1 else usual(self, error, attempt, *rest, **options)

    return swap(Retry, "next_delay", next_delay)


@mutation("3", seeds=3)
def take_a_failure_for_a_result() -> Patch:
    """An attempt fails, and what it would have returned is recorded."""
    usual = Executor._failure

    def failure(
        self: Executor, attempt: Attempt, error: BaseException, started_at: int
    ) -> StepFailed | StepAttemptFailed | StepCompleted:
        found = usual(self, attempt, error, started_at)
        if not isinstance(found, StepAttemptFailed) or attempt.call.step.name != "plain_work":
            return found
        value = attempt.args[1:-1].partition(b",")[0]
        return StepCompleted(number=found.number, attempt=found.attempt, result=b"%d" % (2 * int(value)))

    return swap(Executor, "_failure", failure)


# -- what is shown ---------------------------------------------------------------------------------------------------


@mutation("7", seeds=1)
def show_what_is_over() -> Patch:
    """A run that has come to nothing that it waits for is shown to wait for a step."""
    usual = Run.status

    def status(self: Run) -> StatusRecord:
        found = usual(self)
        return replace_fields(found, waiting_on=["step work"]) if self.decided and not self.decisions else found

    return swap(Run, "status", status)


@mutation("7", seeds=1)
def show_no_instants() -> Patch:
    """Until when a run sleeps is not said."""
    return swap(Timer, "waits_for", lambda self: self.name)


@mutation("7", seeds=1)
def show_another_progress() -> Patch:
    """What a run reports is not what is kept of it, in the fold of each owner alike."""
    usual = Run.apply

    def apply(self: Run, event: Event, at: int) -> list[Effect]:
        return usual(self, ProgressSet(value=b'{"drawn":2}') if type(event) is ProgressSet else event, at)

    return swap(Run, "apply", apply)


@mutation("7", seeds=1)
def show_a_run_as_scheduled_that_has_begun() -> Patch:
    """The state that is shown lags behind, until the run is closed."""
    usual = Run.status

    def status(self: Run) -> StatusRecord:
        found = usual(self)
        return replace_fields(found, state="scheduled") if found.state == "running" else found

    return swap(Run, "status", status)
