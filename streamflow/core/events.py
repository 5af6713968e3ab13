"""Events: facts of one run's history, in the past tense, never refused. A turn is one atomic step forward of a run.

Field names are those of `schemas/History.avsc`. Every decision of a run (a step, a timer, a wait for a signal) has a
`number`, counted from 0 over the run; outcomes name the number that they belong to. Instants are milliseconds since
the epoch, payloads JSON bytes.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from msgspec import Struct

from streamflow.errors import ErrorInfo

INSTANT_MS_MAX: Final = 253_402_300_799_000
"""The last second of the year 9999: the latest instant that every reader can show."""


def instant(at: int) -> int:
    """The instant, kept between 1970 and 9999: a sleep of a million years must fit a record, and never end."""
    return min(max(at, 0), INSTANT_MS_MAX)


class RunCreated(Struct, frozen=True, kw_only=True):
    """The run exists. It begins at once, or when its start timer fires at `start_at`."""

    workflow: str
    args: bytes
    run: int = 1
    start_at: int | None = None
    deadline_at: int | None = None
    timeout_ms: int | None = None
    context: bytes | None = None


class RunStarted(Struct, frozen=True, kw_only=True):
    """The workflow's code began to run."""


class RemoteCall(Struct, frozen=True, kw_only=True):
    """How a step on a queue was called: what the process that runs it cannot find in its own code.

    `step` is the registered name, `workflow` whose retry policy counts where the step has none, `timeout_ms` bounds an
    attempt, `retry` is the policy of the call itself (a JSON object of its numbers), None where the code's counts.
    """

    step: str
    workflow: str
    timeout_ms: int | None = None
    retry: bytes | None = None


class StepScheduled(Struct, frozen=True, kw_only=True):
    """The code called a step. Its first attempt may start at once, or at `start_at`; `queue` says who runs it."""

    number: int
    name: str
    args: bytes
    fingerprint: int
    start_at: int | None = None
    queue: str | None = None
    at_most_once: bool = False
    remote: RemoteCall | None = None


class StepDue(Struct, frozen=True, kw_only=True):
    """The delay before `attempt` is over: the attempt may start."""

    number: int
    attempt: int


class StepStarted(Struct, frozen=True, kw_only=True):
    """An at-most-once attempt is about to start: recorded first, so that it is never started twice."""

    number: int
    attempt: int


class StepAttemptFailed(Struct, frozen=True, kw_only=True):
    """An attempt failed and the next one is due at `retry_at`."""

    number: int
    attempt: int
    error: ErrorInfo
    retry_at: int
    started_at: int = 0


class StepCompleted(Struct, frozen=True, kw_only=True):
    """An attempt returned `result`: the step is done."""

    number: int
    attempt: int
    result: bytes
    started_at: int = 0


class StepFailed(Struct, frozen=True, kw_only=True):
    """The last attempt failed: the step is done, and its error is raised in the code."""

    number: int
    attempt: int
    error: ErrorInfo
    started_at: int = 0


class StepCancelled(Struct, frozen=True, kw_only=True):
    """The code stopped waiting for the step; whatever its attempt still says is dropped."""

    number: int


class TimerSet(Struct, frozen=True, kw_only=True):
    """The code sleeps, or guards something with a timeout, until `fire_at`."""

    number: int
    name: str
    fire_at: int


class TimerFired(Struct, frozen=True, kw_only=True):
    """The timer came due."""

    number: int


class TimerCancelled(Struct, frozen=True, kw_only=True):
    """The code no longer needs the timer."""

    number: int


class SignalAwaited(Struct, frozen=True, kw_only=True):
    """The code waits for the next signal of that name."""

    number: int
    name: str


class SignalReceived(Struct, frozen=True, kw_only=True):
    """A signal arrived; it is kept until a wait takes it. `signal` counts from 0 over the run."""

    signal: int
    name: str
    value: bytes | None = None
    error: str | None = None


class SignalTaken(Struct, frozen=True, kw_only=True):
    """The wait `number` took the signal `signal`."""

    number: int
    signal: int


class SignalWaitCancelled(Struct, frozen=True, kw_only=True):
    """The code stopped waiting (a timeout, a cancelled task); a signal that comes is for the next wait."""

    number: int


class ProgressSet(Struct, frozen=True, kw_only=True):
    """The code reported progress."""

    value: bytes


class CancelRequested(Struct, frozen=True, kw_only=True):
    """Somebody asked the run to unwind."""


class RunCompleted(Struct, frozen=True, kw_only=True):
    """The code returned `result`."""

    result: bytes


class RunFailed(Struct, frozen=True, kw_only=True):
    """The code raised, or the run's own timeout passed."""

    error: ErrorInfo


class RunCancelled(Struct, frozen=True, kw_only=True):
    """The code unwound after a cancel request."""


class RunTerminated(Struct, frozen=True, kw_only=True):
    """Somebody stopped the run where it stood."""

    reason: str | None = None


class RunBlocked(Struct, frozen=True, kw_only=True):
    """The worker's code does not fit the history: kept as it is until fitting code comes."""

    error: ErrorInfo


class RunUnblocked(Struct, frozen=True, kw_only=True):
    """Fitting code came: the run goes on."""


class RunDeleted(Struct, frozen=True, kw_only=True):
    """The run was cleaned up: nothing of it is kept."""


class RetentionSet(Struct, frozen=True, kw_only=True):
    """The run, just closed, is kept until `delete_at`."""

    delete_at: int


Event: TypeAlias = (
    RunCreated
    | RunStarted
    | StepScheduled
    | StepDue
    | StepStarted
    | StepAttemptFailed
    | StepCompleted
    | StepFailed
    | StepCancelled
    | TimerSet
    | TimerFired
    | TimerCancelled
    | SignalAwaited
    | SignalReceived
    | SignalTaken
    | SignalWaitCancelled
    | ProgressSet
    | CancelRequested
    | RunCompleted
    | RunFailed
    | RunCancelled
    | RunTerminated
    | RunBlocked
    | RunUnblocked
    | RunDeleted
    | RetentionSet
)
EVENTS: tuple[type[Event], ...] = (
    RunCreated,
    RunStarted,
    StepScheduled,
    StepDue,
    StepStarted,
    StepAttemptFailed,
    StepCompleted,
    StepFailed,
    StepCancelled,
    TimerSet,
    TimerFired,
    TimerCancelled,
    SignalAwaited,
    SignalReceived,
    SignalTaken,
    SignalWaitCancelled,
    ProgressSet,
    CancelRequested,
    RunCompleted,
    RunFailed,
    RunCancelled,
    RunTerminated,
    RunBlocked,
    RunUnblocked,
    RunDeleted,
    RetentionSet,
)


class Applied(Struct, frozen=True, kw_only=True):
    """A command that a turn applied: kept so that it takes effect once and is answered by whoever owns the run."""

    command_id: str
    reply_to: int | None = None


class Claim(Struct, frozen=True, kw_only=True):
    """`owner` takes the partition: from here on only records of `term` count."""

    term: int
    owner: str
    at: int


class Turn(Struct, kw_only=True):
    """One run, one atomic step forward. `consumed` is the offset of the next command to consume, after this turn.

    Not frozen, for one reason: `seq` and `consumed` are known only when the whole pass is decided and handed over.

    A turn larger than a record is written as consecutive parts 0, 1, …; it counts only with the one where `last` is
    set, and its events are those of all parts in order.
    """

    workflow_id: str
    turn: int
    term: int
    seq: int
    at: int
    consumed: int
    events: list[Event]
    commands: list[Applied] = []
    part: int = 0
    last: bool = True


class RunSnapshot(Struct, frozen=True, kw_only=True):
    """A live run's turns copied forward, so that the head of the history can be trimmed. Split as a turn is."""

    workflow_id: str
    turn: int
    term: int
    seq: int
    at: int
    consumed: int
    turns: list[bytes]
    part: int = 0
    last: bool = True


class Consumed(Struct, frozen=True, kw_only=True):
    """How far commands are consumed where no turn says so: they were another partition's, or changed no run."""

    term: int
    seq: int
    at: int
    consumed: int


HistoryRecord: TypeAlias = Claim | Turn | RunSnapshot | Consumed
