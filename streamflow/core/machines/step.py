"""A step of a run: scheduled once, tried in numbered attempts, with one recorded outcome.

                 StepDue                StepStarted (at most once only)
    DELAYED ───────────────▶ OPEN ──────────────────▶ STARTED
                              │ ▲                        │
         StepAttemptFailed    │ │ StepDue                │
    BACKING_OFF ◀─────────────┘ │                        │
        └───────────────────────┘                        │
    OPEN, STARTED ──StepCompleted──▶ COMPLETED    ──StepFailed──▶ FAILED
    every open state ──StepCancelled──▶ CANCELLED

OPEN means that its attempt may run; a new owner runs it again (steps are at-least-once). A step that asked for at most
once has its start recorded first, and a new owner that finds it STARTED fails it instead.

A step with a queue goes through the same states, but its attempts are put on that queue's topic instead of being run
here: whoever takes them from there answers with a command, and a new owner need not start anything again.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from msgspec import Struct

from streamflow.core.effects import (
    CancelAttempt,
    DispatchAttempt,
    DropTimer,
    Effect,
    RecordStart,
    SetTimer,
    StartAttempt,
    StepTask,
    TimerRecord,
)
from streamflow.core.events import (
    RemoteCall,
    StepAttemptFailed,
    StepCancelled,
    StepCompleted,
    StepDue,
    StepFailed,
    StepScheduled,
    StepStarted,
)
from streamflow.core.machines.table import IllegalTransition, next_state


class StepState(StrEnum):
    """Where a step stands."""

    DELAYED = "delayed"
    OPEN = "open"
    STARTED = "started"
    BACKING_OFF = "backing_off"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


_S = StepState
TRANSITIONS: Final[Mapping[tuple[StepState, type[Struct]], StepState]] = {
    (_S.DELAYED, StepDue): _S.OPEN,
    (_S.DELAYED, StepCancelled): _S.CANCELLED,
    (_S.OPEN, StepStarted): _S.STARTED,
    (_S.OPEN, StepAttemptFailed): _S.BACKING_OFF,
    (_S.OPEN, StepCompleted): _S.COMPLETED,
    (_S.OPEN, StepFailed): _S.FAILED,
    (_S.OPEN, StepCancelled): _S.CANCELLED,
    (_S.STARTED, StepCompleted): _S.COMPLETED,
    (_S.STARTED, StepFailed): _S.FAILED,
    (_S.STARTED, StepCancelled): _S.CANCELLED,
    (_S.BACKING_OFF, StepDue): _S.OPEN,
    (_S.BACKING_OFF, StepCancelled): _S.CANCELLED,
}
_WAITS_FOR_TIMER: Final = (_S.DELAYED, _S.BACKING_OFF)
_RUNS: Final = (_S.OPEN, _S.STARTED)

StepEvent = StepDue | StepStarted | StepAttemptFailed | StepCompleted | StepFailed | StepCancelled


class Step(Struct):
    """The step `number` of a run. `attempt` is the one that runs or comes next; `due_at` its instant while it waits."""

    number: int
    name: str
    args: bytes
    fingerprint: int
    scheduled_at: int
    due_at: int = 0
    attempt: int = 1
    queue: str | None = None
    at_most_once: bool = False
    remote: RemoteCall | None = None
    state: StepState = StepState.OPEN

    kind = "step"

    @property
    def is_open(self) -> bool:
        """Whether an outcome may still come."""
        return self.state in _RUNS or self.state in _WAITS_FOR_TIMER

    @property
    def has_attempt(self) -> bool:
        """Whether an attempt is, or should be, running now."""
        return self.state in _RUNS

    @property
    def runs_here(self) -> bool:
        """Whether that attempt is the owner's to run."""
        return self.state in _RUNS and self.queue is None

    def accepts(self, attempt: int) -> bool:
        """Whether an outcome of `attempt` still counts: not one of an old attempt, a closed or a cancelled step."""
        return self.state in _RUNS and self.attempt == attempt

    def awaits_timer(self, attempt: int) -> bool:
        """Whether the timer before `attempt` is pending."""
        return self.state in _WAITS_FOR_TIMER and self.attempt == attempt

    def timer(self, workflow_id: str, run: int) -> TimerRecord:
        """The timer before the coming attempt, as the timers topic holds it."""
        return TimerRecord(
            workflow_id=workflow_id, kind="step", run=run, number=self.number, attempt=self.attempt, fire_at=self.due_at
        )

    def abandon(self, workflow_id: str, run: int) -> list[Effect]:
        """What is left to do when nobody waits for the step any more."""
        if self.has_attempt:
            return [CancelAttempt(run, self.number)]
        return [DropTimer(self.timer(workflow_id, run))]

    def waits_for(self) -> str:
        """The step's entry in `waiting_on`."""
        if self.has_attempt:
            where = f"step {self.name}" if self.queue is None else f"step {self.name} on queue {self.queue}"
            return where if self.attempt == 1 else f"{where} (attempt {self.attempt})"
        return f"step {self.name} (attempt {self.attempt} at {self.due_at})"

    def begin(self, workflow_id: str, run: int) -> list[Effect]:
        """Run the attempt that is open, or have it run; at most once means that its start is recorded first."""
        if self.queue is not None:
            return [DispatchAttempt(self.queue, self.task(workflow_id, run))]
        if self.at_most_once and self.state is StepState.OPEN:
            return [RecordStart(run, self.number, self.attempt)]
        return [StartAttempt(run, self.number, self.attempt)]

    def task(self, workflow_id: str, run: int) -> StepTask:
        """The attempt that is open, as the queue's topic holds it."""
        call = self.remote or RemoteCall(step=self.name, workflow="")
        return StepTask(
            workflow_id=workflow_id,
            run=run,
            number=self.number,
            attempt=self.attempt,
            workflow=call.workflow,
            step=call.step,
            name=self.name,
            args=self.args,
            scheduled_at=self.scheduled_at,
            timeout_ms=call.timeout_ms,
            retry=call.retry,
        )


def create(event: StepScheduled, workflow_id: str, run: int, at: int) -> tuple[Step, list[Effect]]:
    """The step that the event schedules: its first attempt starts now, or when its delay is over."""
    step = Step(
        number=event.number,
        name=event.name,
        args=event.args,
        fingerprint=event.fingerprint,
        scheduled_at=at,
        queue=event.queue,
        at_most_once=event.at_most_once,
        remote=event.remote,
    )
    if event.start_at is None:
        return step, step.begin(workflow_id, run)
    step.state = StepState.DELAYED
    step.due_at = event.start_at
    return step, [SetTimer(step.timer(workflow_id, run))]


def evolve(step: Step, event: StepEvent, workflow_id: str, run: int) -> list[Effect]:
    """Apply the event."""
    before = step.state
    after = next_state(TRANSITIONS, before, event, who=f"step {step.number} of run {workflow_id}")
    if not isinstance(event, StepCancelled) and event.attempt != step.attempt:
        raise IllegalTransition(f"step {step.number} of run {workflow_id} is at attempt {step.attempt}, found {event}")
    if after is StepState.OPEN or after is StepState.STARTED:
        dropped: list[Effect] = [DropTimer(step.timer(workflow_id, run))] if before in _WAITS_FOR_TIMER else []
        step.state = after
        return dropped + step.begin(workflow_id, run)
    if type(event) is StepAttemptFailed:
        step.state = after
        step.attempt += 1
        step.due_at = event.retry_at
        return [SetTimer(step.timer(workflow_id, run))]
    left = step.abandon(workflow_id, run) if after is StepState.CANCELLED else []
    step.state = after
    step.args = b""  # needed no more: the history has them
    return left
