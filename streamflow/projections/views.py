"""What is shown of runs: the public views, and the pure functions that make them of records of the log.

Rules of this file:

- A view is a fold of turns alone: two folds of the same turns are equal, whoever makes them.
- Nothing here refuses a payload. What anybody wrote to the log is shown: JSON as what it says, anything else as text
  under `not_json`, and under `nested_too_deeply` what no reader of JSON need survive.
- Only the newest run of a workflow id counts for its steps: a `RunCreated` begins afresh. The history shows all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Generic, TypeVar

import msgspec

from streamflow.codec.nesting import nests_too_deeply
from streamflow.core.effects import StatusRecord
from streamflow.core.events import (
    Event,
    RunCancelled,
    RunCompleted,
    RunCreated,
    RunFailed,
    RunTerminated,
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
from streamflow.errors import ErrorInfo

T = TypeVar("T")

CLOSED_STATES: Final = frozenset({"completed", "failed", "cancelled", "terminated"})
STATES: Final = ("scheduled", "running", "paused", "blocked", "completed", "failed", "cancelled", "terminated")


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run as of its turn `turn`. `args` is None when it was too large to be shown; `waiting_on` is for people."""

    id: str
    workflow: str
    run: int
    state: str
    turn: int
    args: Any
    result: Any
    error: ErrorInfo | None
    progress: Any
    waiting_on: list[str]
    context: Any
    started_at: datetime | None
    closed_at: datetime | None
    created_at: datetime | None = None
    reason: str | None = None

    @property
    def is_closed(self) -> bool:
        """Whether the run's code has ended, for whatever reason."""
        return self.state in CLOSED_STATES


@dataclass(frozen=True, slots=True)
class StepView:
    """One thing that the run's code waits for, or has waited for, numbered from 0 in the order of the calls.

    `kind` is step, sleep (a sleep, or the limit of a timeout, named so) or signal. `state` is scheduled (a delay before
    the first attempt), running, backing_off (before the next attempt), waiting (sleeps and signals), completed, failed
    or cancelled. `attempts` counts those that began. `started_at` is that of the first one, as the worker that ran it
    says; while none has ended, when it could begin. `next_attempt_at` is when the next attempt is due, or the sleep
    ends.
    """

    number: int
    name: str
    kind: str
    state: str
    args: Any
    result: Any
    error: ErrorInfo | None
    attempts: int
    scheduled_at: datetime
    started_at: datetime | None
    closed_at: datetime | None
    next_attempt_at: datetime | None
    child_id: str | None = None


@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """One recorded event; `fields` are those of its schema, payloads decoded, instants in milliseconds."""

    turn: int
    at: datetime
    type: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a listing; `cursor` asks for the next one, None at the end. A page may hold fewer than asked for."""

    items: list[T]
    cursor: str | None


_LAST: Final = datetime.max.replace(tzinfo=UTC)
_FIRST: Final = datetime.min.replace(tzinfo=UTC)


def moment(at: int) -> datetime:
    """Milliseconds since the epoch as an aware datetime in UTC, or the nearest that a datetime can say."""
    try:
        return datetime.fromtimestamp(at / 1000, UTC)
    except (OverflowError, ValueError, OSError):
        return _LAST if at > 0 else _FIRST


def instant(at: int | None) -> datetime | None:
    """`moment`, or None for None."""
    return None if at is None else moment(at)


def shown(payload: bytes | None) -> Any:
    """A payload as what its JSON says; what is no JSON is marked."""
    if payload is None:
        return None
    if nests_too_deeply(payload):
        return {"nested_too_deeply": payload.decode("utf-8", "backslashreplace")}
    try:
        return msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {"not_json": payload.decode("utf-8", "backslashreplace")}


_WAITS_UNTIL: Final = re.compile(
    r"(start|sleep|timeout)( until )(\d+)$|(step .*)( \(attempt \d+ at )(\d+)\)$", re.DOTALL
)


def _in_words(waiting: str) -> str:
    """An entry of `waiting_on` with its instant as people write it."""
    found = _WAITS_UNTIL.match(waiting)
    if found is None:
        return waiting
    if found[1]:
        return f"{found[1]}{found[2]}{_iso(int(found[3]))}"
    return f"{found[4]}{found[5]}{_iso(int(found[6]))})"


def _iso(at: int) -> str:
    return moment(at).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def status_view(record: StatusRecord) -> RunStatus:
    """The status as users see it."""
    return RunStatus(
        id=record.workflow_id,
        workflow=record.workflow,
        run=record.run,
        state=record.state,
        turn=record.turn,
        args=shown(record.args),
        result=shown(record.result),
        error=record.error,
        progress=shown(record.progress),
        waiting_on=[_in_words(entry) for entry in record.waiting_on],
        context=shown(record.context),
        started_at=instant(record.started_at),
        closed_at=instant(record.closed_at),
        created_at=instant(record.created_at or None),
        reason=record.reason,
    )


class StepFold:
    """One step while turns are folded; payloads stay bytes, since most folds show only one page of steps."""

    __slots__ = (
        "args",
        "attempts",
        "closed_at",
        "error",
        "kind",
        "name",
        "next_attempt_at",
        "number",
        "result",
        "scheduled_at",
        "started_at",
        "state",
    )

    def __init__(self, number: int, name: str, kind: str, state: str, at: int) -> None:
        self.number = number
        self.name = name
        self.kind = kind
        self.state = state
        self.scheduled_at = at
        self.args: bytes = b"[]"
        self.result: bytes | None = None
        self.error: ErrorInfo | None = None
        self.attempts = 0
        self.started_at: int | None = None
        self.closed_at: int | None = None
        self.next_attempt_at: int | None = None

    def begin(self, attempt: int, at: int) -> None:
        """Attempt `attempt` may run."""
        self.state = "running"
        self.attempts = attempt
        self.next_attempt_at = None
        if self.started_at is None:
            self.started_at = at

    def attempted(self, attempt: int, started_at: int) -> None:
        """Attempt `attempt` has ended; only now is it known when it began."""
        self.attempts = attempt
        if attempt == 1 and started_at:
            self.started_at = started_at

    def close(self, state: str, at: int) -> None:
        """Nothing more will come of it."""
        self.state = state
        self.closed_at = at
        self.next_attempt_at = None

    def view(self) -> StepView:
        """The step as users see it."""
        return StepView(
            number=self.number,
            name=self.name,
            kind=self.kind,
            state=self.state,
            args=shown(self.args),
            result=shown(self.result),
            error=self.error,
            attempts=self.attempts,
            scheduled_at=moment(self.scheduled_at),
            started_at=instant(self.started_at),
            closed_at=instant(self.closed_at),
            next_attempt_at=instant(self.next_attempt_at),
        )


class _RunFold:
    """The steps of one run, and its signals, which a wait names by number."""

    def __init__(self) -> None:
        self.steps: dict[int, StepFold] = {}
        self.signals: dict[int, SignalReceived] = {}

    def apply(self, event: Event, at: int) -> None:
        handler = _FOLD.get(type(event))
        if handler is not None:
            handler(self, event, at)


def fold_steps(turns: Iterable[Turn]) -> list[StepFold]:
    """The steps of the newest run of which these are the turns, in the order of their numbers."""
    fold = _RunFold()
    for turn in turns:
        for event in turn.events:
            fold.apply(event, turn.at)
    return [fold.steps[number] for number in sorted(fold.steps)]


def step_views(turns: Sequence[Turn]) -> list[StepView]:
    """The steps of the newest run of which these are the turns, in the order of their numbers."""
    return [step.view() for step in fold_steps(turns)]


def _created(fold: _RunFold, event: RunCreated, at: int) -> None:
    fold.steps = {}
    fold.signals = {}


def _step_scheduled(fold: _RunFold, event: StepScheduled, at: int) -> None:
    step = fold.steps[event.number] = StepFold(event.number, event.name, "step", "scheduled", at)
    step.args = event.args
    if event.start_at is None:
        step.begin(1, at)
    else:
        step.next_attempt_at = event.start_at


def _step_begins(fold: _RunFold, event: StepDue | StepStarted, at: int) -> None:
    fold.steps[event.number].begin(event.attempt, at)


def _step_backs_off(fold: _RunFold, event: StepAttemptFailed, at: int) -> None:
    step = fold.steps[event.number]
    step.attempted(event.attempt, event.started_at)
    step.state = "backing_off"
    step.error = event.error
    step.next_attempt_at = event.retry_at


def _step_completed(fold: _RunFold, event: StepCompleted, at: int) -> None:
    step = fold.steps[event.number]
    step.attempted(event.attempt, event.started_at)
    step.result = event.result
    step.error = None
    step.close("completed", at)


def _step_failed(fold: _RunFold, event: StepFailed, at: int) -> None:
    step = fold.steps[event.number]
    step.attempted(event.attempt, event.started_at)
    step.error = event.error
    step.close("failed", at)


def _cancelled(fold: _RunFold, event: StepCancelled | TimerCancelled | SignalWaitCancelled, at: int) -> None:
    fold.steps[event.number].close("cancelled", at)


def _timer_set(fold: _RunFold, event: TimerSet, at: int) -> None:
    step = fold.steps[event.number] = StepFold(event.number, event.name, "sleep", "waiting", at)
    step.started_at = at
    step.next_attempt_at = event.fire_at


def _timer_fired(fold: _RunFold, event: TimerFired, at: int) -> None:
    fold.steps[event.number].close("completed", at)


def _signal_awaited(fold: _RunFold, event: SignalAwaited, at: int) -> None:
    step = fold.steps[event.number] = StepFold(event.number, event.name, "signal", "waiting", at)
    step.started_at = at


def _signal_received(fold: _RunFold, event: SignalReceived, at: int) -> None:
    fold.signals[event.signal] = event


def _signal_taken(fold: _RunFold, event: SignalTaken, at: int) -> None:
    step = fold.steps[event.number]
    signal = fold.signals.pop(event.signal)
    if signal.error is None:
        step.result = signal.value
        step.close("completed", at)
    else:
        step.error = ErrorInfo(type="streamflow.errors.SignalError", message=signal.error)
        step.close("failed", at)


def _run_closed(fold: _RunFold, event: Event, at: int) -> None:
    """What a run still waited for when it closed is abandoned."""
    for step in fold.steps.values():
        if step.closed_at is None:
            step.close("cancelled", at)


_FOLD: Final[dict[type, Callable[[_RunFold, Any, int], None]]] = {
    RunCreated: _created,
    StepScheduled: _step_scheduled,
    StepDue: _step_begins,
    StepStarted: _step_begins,
    StepAttemptFailed: _step_backs_off,
    StepCompleted: _step_completed,
    StepFailed: _step_failed,
    StepCancelled: _cancelled,
    TimerSet: _timer_set,
    TimerFired: _timer_fired,
    TimerCancelled: _cancelled,
    SignalAwaited: _signal_awaited,
    SignalReceived: _signal_received,
    SignalTaken: _signal_taken,
    SignalWaitCancelled: _cancelled,
    RunCompleted: _run_closed,
    RunFailed: _run_closed,
    RunCancelled: _run_closed,
    RunTerminated: _run_closed,
}


def history_event(turn: Turn, event: Event) -> HistoryEvent:
    """One event of `turn` as users see it."""
    fields: dict[str, Any] = {}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if isinstance(value, bytes):
            value = shown(value)
        elif isinstance(value, ErrorInfo):
            value = {"type": value.type, "message": value.message, "traceback": value.traceback}
        fields[name] = value
    return HistoryEvent(turn=turn.turn, at=moment(turn.at), type=type(event).__name__, fields=fields)


def history_events(turns: Iterable[Turn]) -> list[HistoryEvent]:
    """All events of these turns, oldest first."""
    return [history_event(turn, event) for turn in turns for event in turn.events]
