"""A run: one execution of a workflow under one workflow id.

    (none) ──RunCreated──▶ SCHEDULED ──RunStarted──▶ RUNNING ◀──RunUnblocked── BLOCKED
                               │                        │ └────RunBlocked────────▲ │
                               └────────────────────────┴──────────────────────────┘
                                      RunCompleted, RunFailed, RunCancelled, RunTerminated
                                                        ▼
                           COMPLETED, FAILED, CANCELLED, TERMINATED ──RunCreated──▶ SCHEDULED (the next run)
                                                        └──────────RunDeleted──▶ DELETED

The run routes each event to its own table or to the machine of the decision (step, timer, wait) that the event names,
and returns the effects. It holds all that the partition must know of an open run except the code's own memory.
"""

from __future__ import annotations

from enum import StrEnum
from collections.abc import Callable
from typing import Any, Final, TypeAlias, TypeVar

from msgspec import Struct, field

from streamflow.core.effects import DropTimer, Effect, SetTimer, StatusRecord, TimerRecord
from streamflow.core.events import (
    CancelRequested,
    Event,
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
    SignalAwaited,
    SignalReceived,
    SignalTaken,
    SignalWaitCancelled,
    StepAttemptFailed,
    StepCancelled,
    StepCompleted,
    StepDue,
    StepFailed,
    StepScheduled,
    StepStarted,
    TimerCancelled,
    TimerFired,
    TimerSet,
    Turn,
)
from streamflow.core.machines import IllegalTransition, next_state, signal, step, timer
from streamflow.errors import ErrorInfo


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
TRANSITIONS: Final = {
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

StepEvent: TypeAlias = step.StepEvent
TimerEvent: TypeAlias = TimerFired | TimerCancelled
WaitEvent: TypeAlias = SignalTaken | SignalWaitCancelled
Decision: TypeAlias = step.Step | timer.Timer | signal.Wait
D = TypeVar("D", step.Step, timer.Timer, signal.Wait)


class Run(Struct):
    """The state of one run, as the fold of its turns. `turn` is the number of its last one."""

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
    decided: int = 0
    occurrences: dict[str, list[int]] = {}
    decisions: dict[int, Decision] = {}
    open_attempts: int = 0
    mailbox: signal.Mailbox = field(default_factory=signal.Mailbox)
    commands: set[str] = set()

    @property
    def is_closed(self) -> bool:
        """Whether its code has ended, for whatever reason."""
        return self.state in CLOSED or self.state is RunState.DELETED

    def apply(self, event: Event, at: int) -> list[Effect]:
        """Change by one event of the instant `at`; the effects are for the owner to perform once the turn is durable."""
        return APPLY[type(event)](self, event, at)

    def fold(self, turn: Turn) -> list[Effect]:
        """Apply a whole turn, as a restore does."""
        effects: list[Effect] = []
        for event in turn.events:
            effects += self.apply(event, turn.at)
        self.commands.update(command.command_id for command in turn.commands)
        self.turn = turn.turn
        return effects

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
            case _:
                decision = self.decisions[number]
                due_at = decision.fire_at if isinstance(decision, timer.Timer) else getattr(decision, "due_at", None)
        assert due_at is not None, (kind, number)
        return due_at

    def waiting_on(self) -> list[str]:
        """What the run waits for, in words, oldest first, at most `WAITING_ON_MAX` entries."""
        if self.state is RunState.SCHEDULED and self.start_timer_at is not None:
            return [f"start until {self.start_timer_at}"]
        if self.is_closed:
            return []
        shown: list[str] = []
        for decision in self.decisions.values():
            if len(shown) == WAITING_ON_MAX:
                shown.append(f"and {len(self.decisions) - WAITING_ON_MAX} more")
                break
            shown.append(decision.waits_for())
        return shown

    def status(self) -> StatusRecord:
        """The run as `<app>.status` shows it."""
        return StatusRecord(
            workflow_id=self.workflow_id,
            workflow=self.workflow,
            run=self.run,
            turn=self.turn,
            state=self.state.value,
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
        """The run's start or deadline timer, as the timers topic holds it."""
        return TimerRecord(
            workflow_id=self.workflow_id, kind=kind, run=self.run, number=0, attempt=0, fire_at=fire_at
        )


def _created(run: Run, event: RunCreated, at: int) -> list[Effect]:
    state = next_state(TRANSITIONS, run.state, event, who=f"run {run.workflow_id}")
    fresh = Run(
        workflow_id=run.workflow_id,
        state=state,
        workflow=event.workflow,
        run=event.run,
        turn=run.turn,
        first_turn=run.turn + 1,
        args=event.args,
        context=event.context,
        created_at=at,
        start_timer_at=event.start_at,
        deadline_at=event.deadline_at,
        commands=run.commands,
    )
    for name in run.__struct_fields__:
        setattr(run, name, getattr(fresh, name))
    effects: list[Effect] = []
    if event.start_at is not None:
        effects.append(SetTimer(run.own_timer("start", event.start_at)))
    if event.deadline_at is not None:
        effects.append(SetTimer(run.own_timer("deadline", event.deadline_at)))
    return effects


def _started(run: Run, event: RunStarted, at: int) -> list[Effect]:
    run.state = next_state(TRANSITIONS, run.state, event, who=f"run {run.workflow_id}")
    run.started_at = at
    if run.start_timer_at is None:
        return []
    timer_record = run.own_timer("start", run.start_timer_at)
    run.start_timer_at = None
    return [DropTimer(timer_record)]


def _closed(run: Run, event: Event, at: int) -> list[Effect]:
    """The run is over: what it still waited for is abandoned."""
    effects: list[Effect] = []
    if run.start_timer_at is not None:
        effects.append(DropTimer(run.own_timer("start", run.start_timer_at)))
    if run.deadline_at is not None:
        effects.append(DropTimer(run.own_timer("deadline", run.deadline_at)))
    for decision in run.decisions.values():
        effects += decision.abandon(run.workflow_id, run.run)
    run.state = next_state(TRANSITIONS, run.state, event, who=f"run {run.workflow_id}")
    run.closed_at = at
    run.start_timer_at = run.deadline_at = None
    run.decisions = {}
    run.occurrences = {}
    run.open_attempts = 0
    run.mailbox = signal.Mailbox()
    run.error = None
    match event:
        case RunCompleted(result=result):
            run.result = result
        case RunFailed(error=error):
            run.error = error
        case RunTerminated(reason=reason):
            run.reason = reason
    return effects


def _blocked(run: Run, event: RunBlocked | RunUnblocked, at: int) -> list[Effect]:
    run.state = next_state(TRANSITIONS, run.state, event, who=f"run {run.workflow_id}")
    run.error = event.error if isinstance(event, RunBlocked) else None
    return []


def _cancel_requested(run: Run, event: CancelRequested, at: int) -> list[Effect]:
    run.state = next_state(TRANSITIONS, run.state, event, who=f"run {run.workflow_id}")
    run.cancel_requested = True
    return []


def _progress(run: Run, event: ProgressSet, at: int) -> list[Effect]:
    run.state = next_state(TRANSITIONS, run.state, event, who=f"run {run.workflow_id}")
    run.progress = event.value
    return []


def _deleted(run: Run, event: RunDeleted, at: int) -> list[Effect]:
    run.state = next_state(TRANSITIONS, run.state, event, who=f"run {run.workflow_id}")
    return []


def identity(kind: str, name: str) -> str:
    """The key under which the occurrences of a decision are counted: its kind and its name."""
    return f"{kind}:{name}"


def _decided(run: Run, decision: Decision) -> None:
    """Take a new decision: numbers follow each other, and each is an occurrence of its kind and name."""
    if run.state is not RunState.RUNNING or decision.number != run.decided:
        raise IllegalTransition(
            f"run {run.workflow_id} is {run.state} with {run.decided} decisions: it cannot decide {decision}"
        )
    run.decided += 1
    run.decisions[decision.number] = decision
    run.occurrences.setdefault(identity(decision.kind, decision.name), []).append(decision.number)


def _step_scheduled(run: Run, event: StepScheduled, at: int) -> list[Effect]:
    decision, effects = step.create(event, run.workflow_id, run.run, at)
    _decided(run, decision)
    run.open_attempts += decision.has_attempt
    return effects


def _step_changed(run: Run, event: StepEvent, at: int) -> list[Effect]:
    decision = _decision(run, event, step.Step)
    run.open_attempts -= decision.has_attempt
    effects = step.evolve(decision, event, run.workflow_id, run.run)
    if decision.is_open:
        run.open_attempts += decision.has_attempt
    else:
        del run.decisions[event.number]
    return effects


def _timer_set(run: Run, event: TimerSet, at: int) -> list[Effect]:
    decision, effects = timer.create(event, run.workflow_id, run.run)
    _decided(run, decision)
    return effects


def _timer_changed(run: Run, event: TimerEvent, at: int) -> list[Effect]:
    effects = timer.evolve(_decision(run, event, timer.Timer), event, run.workflow_id, run.run)
    del run.decisions[event.number]
    return effects


def _signal_awaited(run: Run, event: SignalAwaited, at: int) -> list[Effect]:
    _decided(run, signal.create(event, run.mailbox))
    return []


def _signal_received(run: Run, event: SignalReceived, at: int) -> list[Effect]:
    if run.is_closed or run.state is RunState.NONE:
        raise IllegalTransition(f"run {run.workflow_id} is {run.state}: it cannot receive {event}")
    run.mailbox.receive(event)
    return []


def _wait_changed(run: Run, event: WaitEvent, at: int) -> list[Effect]:
    signal.evolve(_decision(run, event, signal.Wait), event, run.mailbox, run.workflow_id)
    del run.decisions[event.number]
    return []


def _decision(run: Run, event: StepEvent | TimerEvent | WaitEvent, kind: type[D]) -> D:
    """The open decision that the event names."""
    found = run.decisions.get(event.number)
    if not isinstance(found, kind):
        raise IllegalTransition(f"run {run.workflow_id} has no open {kind.kind} {event.number}: {event} is not legal")
    return found


APPLY: Final = {
    RunCreated: _created,
    RunStarted: _started,
    RunCompleted: _closed,
    RunFailed: _closed,
    RunCancelled: _closed,
    RunTerminated: _closed,
    RunBlocked: _blocked,
    RunUnblocked: _blocked,
    RunDeleted: _deleted,
    CancelRequested: _cancel_requested,
    ProgressSet: _progress,
    StepScheduled: _step_scheduled,
    StepDue: _step_changed,
    StepStarted: _step_changed,
    StepAttemptFailed: _step_changed,
    StepCompleted: _step_changed,
    StepFailed: _step_changed,
    StepCancelled: _step_changed,
    TimerSet: _timer_set,
    TimerFired: _timer_changed,
    TimerCancelled: _timer_changed,
    SignalAwaited: _signal_awaited,
    SignalReceived: _signal_received,
    SignalTaken: _wait_changed,
    SignalWaitCancelled: _wait_changed,
}
