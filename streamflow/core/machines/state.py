"""What a run is: its states, the table of what may happen in each, and all that is kept of it.

    (none) ──RunCreated──▶ SCHEDULED ──RunStarted──▶ RUNNING ◀──RunUnblocked── BLOCKED
                               │                        │ └────RunBlocked────────▲ │
                               └────────────────────────┴──────────────────────────┘
                                      RunCompleted, RunFailed, RunCancelled, RunTerminated
                                                        ▼
                           COMPLETED, FAILED, CANCELLED, TERMINATED ──RunCreated──▶ SCHEDULED (the next run)
                                                        └──────────RunDeleted──▶ DELETED ──RunCreated──▶ SCHEDULED

A closed run takes RetentionSet once and stays. RUNNING takes CancelRequested and ProgressSet and stays; BLOCKED takes
CancelRequested and stays, and neither completes nor is cancelled, since that is for its code to do. SCHEDULED does not
complete.

This file reads; run.py changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from itertools import islice
from typing import Final, TypeAlias

from msgspec import Struct, field

from streamflow.core.effects import StatusRecord, TimerRecord
from streamflow.core.events import (
    CancelRequested,
    ProgressSet,
    RunBlocked,
    RunCancelled,
    RunCompleted,
    RunCreated,
    RunDeleted,
    RunFailed,
    RunStarted,
    RunTerminated,
    RunUnblocked,
)
from streamflow.core.machines import signal, step, timer
from streamflow.errors import ErrorInfo

Decision: TypeAlias = step.Step | timer.Timer | signal.Wait


class RunState(StrEnum):
    """Where a run stands; the values are those of `RunStatus.state`."""

    NONE = "none"
    SCHEDULED = "scheduled"
    RUNNING = "running"
    BLOCKED = "blocked"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TERMINATED = "terminated"
    DELETED = "deleted"


_S = RunState
CLOSED: Final = frozenset({_S.COMPLETED, _S.FAILED, _S.CANCELLED, _S.TERMINATED})
TRANSITIONS: Final[Mapping[tuple[RunState, type[Struct]], RunState]] = {
    (_S.NONE, RunCreated): _S.SCHEDULED,
    (_S.SCHEDULED, RunStarted): _S.RUNNING,
    (_S.SCHEDULED, RunFailed): _S.FAILED,
    (_S.SCHEDULED, RunCancelled): _S.CANCELLED,
    (_S.SCHEDULED, RunTerminated): _S.TERMINATED,
    (_S.RUNNING, RunBlocked): _S.BLOCKED,
    (_S.RUNNING, RunCompleted): _S.COMPLETED,
    (_S.RUNNING, RunFailed): _S.FAILED,
    (_S.RUNNING, RunCancelled): _S.CANCELLED,
    (_S.RUNNING, RunTerminated): _S.TERMINATED,
    (_S.RUNNING, CancelRequested): _S.RUNNING,
    (_S.RUNNING, ProgressSet): _S.RUNNING,
    (_S.BLOCKED, RunUnblocked): _S.RUNNING,
    (_S.BLOCKED, RunFailed): _S.FAILED,
    (_S.BLOCKED, RunTerminated): _S.TERMINATED,
    (_S.BLOCKED, CancelRequested): _S.BLOCKED,
    (_S.DELETED, RunCreated): _S.SCHEDULED,
    **{(closed, RunCreated): _S.SCHEDULED for closed in sorted(CLOSED)},
    **{(closed, RunDeleted): _S.DELETED for closed in sorted(CLOSED)},
}

WAITING_ON_MAX: Final = 10
"""Entries of `waiting_on`: enough to see what a run is at; a fan-out of thousands must not fill its status."""


class RunRecord(Struct):
    """What is known of one run. `turn` is the number of its last turn; `first_turn` the one in which it was created.

    `open_attempts` counts those that the owner runs itself: a run without any may leave memory.
    """

    workflow_id: str
    state: RunState = RunState.NONE
    workflow: str = ""
    run: int = 0
    turn: int = 0
    first_turn: int = 0
    args: bytes = b"[]"
    context: bytes | None = None
    result: bytes | None = None
    error: ErrorInfo | None = None
    reason: str | None = None
    progress: bytes | None = None
    cancel_requested: bool = False
    created_at: int = 0
    started_at: int | None = None
    closed_at: int | None = None
    start_timer_at: int | None = None
    deadline_at: int | None = None
    delete_at: int | None = None
    decided: int = 0
    occurrences: dict[str, list[int]] = {}
    decisions: dict[int, Decision] = {}
    open_attempts: int = 0
    mailbox: signal.Mailbox = field(default_factory=signal.Mailbox)
    commands: dict[str, None] = {}

    @property
    def is_closed(self) -> bool:
        """Whether its code has ended, for whatever reason."""
        return self.state in CLOSED or self.state is RunState.DELETED

    def step(self, number: int) -> step.Step | None:
        """The step of that number, if it is one and still open."""
        found = self.decisions.get(number)
        return found if isinstance(found, step.Step) else None

    def timer_pending(self, kind: str, number: int, attempt: int) -> bool:
        """Whether exactly that timer is pending."""
        match kind:
            case "start":
                return self.state is RunState.SCHEDULED and self.start_timer_at is not None
            case "deadline":
                return not self.is_closed and self.deadline_at is not None
            case "retention":
                return self.delete_at is not None
            case "sleep":
                return isinstance(self.decisions.get(number), timer.Timer)
            case _:
                waiting = self.step(number)
                return waiting is not None and waiting.awaits_timer(attempt)

    def timer_due_at(self, kind: str, number: int) -> int:
        """When that pending timer is due."""
        match kind:
            case "start":
                due_at = self.start_timer_at
            case "deadline":
                due_at = self.deadline_at
            case "retention":
                due_at = self.delete_at
            case _:
                decision = self.decisions[number]
                assert not isinstance(decision, signal.Wait), decision
                due_at = decision.fire_at if isinstance(decision, timer.Timer) else decision.due_at
        assert due_at is not None, (kind, number)
        return due_at

    def waiting_on(self) -> list[str]:
        """What the run waits for, in words, oldest first, at most `WAITING_ON_MAX` entries."""
        if self.state is RunState.SCHEDULED and self.start_timer_at is not None:
            return [f"start until {self.start_timer_at}"]
        if self.is_closed:
            return []
        if self.state is RunState.BLOCKED:
            return ["fitting code"]
        shown = [decision.waits_for() for decision in islice(self.decisions.values(), WAITING_ON_MAX)]
        if len(self.decisions) > WAITING_ON_MAX:
            shown.append(f"and {len(self.decisions) - WAITING_ON_MAX} more")
        return shown

    def status(self) -> StatusRecord:
        """The run as `<app>.status` shows it."""
        return StatusRecord(
            workflow_id=self.workflow_id,
            workflow=self.workflow,
            run=self.run,
            turn=self.turn,
            state=self.state._value_,  # `value` is a property in Python: 0.3 us
            args=self.args,
            result=self.result,
            error=self.error,
            progress=self.progress,
            waiting_on=self.waiting_on(),
            context=self.context,
            created_at=self.created_at,
            started_at=self.started_at,
            closed_at=self.closed_at,
            reason=self.reason,
        )

    def own_timer(self, kind: str, fire_at: int) -> TimerRecord:
        """The run's start, deadline or retention timer, as the timers topic holds it."""
        return TimerRecord(workflow_id=self.workflow_id, kind=kind, run=self.run, number=0, attempt=0, fire_at=fire_at)
