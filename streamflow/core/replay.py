"""Workflow code against its history: decisions are matched by identity, outcomes delivered in recorded order.

Rules of this file:

- A decision is identified by its kind, its name and its occurrence (the third `charge` of the run), never by its
  position. Inserted, removed and reordered unrelated decisions are therefore safe for runs in flight.
- Outcomes reach the code one at a time, in the order of the history, and the code runs until all of it waits after
  each. Live and replay go through the same two methods, `_deliver` and `_settle`, so they cannot differ.
- A recorded decision that the code asks for only after its outcome went by (the code was changed) gets the outcome as
  soon as the code waits: `early` keeps it. One that was given up (cancelled) has no outcome: code that waits for it
  diverges, where it would hang otherwise.
- Which wait takes which signal is decided between two outcomes, never while the code runs, and is recorded.
- Decisions that the history does not hold are new: they are part of the next turn, also those found while replaying.

Theory of operation. `Execution` stands between the run (the fold of the history) and the code. The code calls the
`Decisions` methods while it is drained; each emits an event, applied to the run at once, or finds the recorded one.
`take` brings a new input in; `replay` walks the recorded turns first. What goes wrong with the code itself (arguments
that changed, a loop without an await) is no event but `diverged`: the caller drops the execution and blocks the run.
Two instants must be kept apart: events have that of the turn that they will be part of (`at`), while the code sees that
of the input that it is given, which on replay lies in the past.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeAlias, assert_never

from streamflow.core.effects import (
    CancelAttempt,
    DispatchAttempt,
    DropTimer,
    Effect,
    RecordStart,
    SetTimer,
    StartAttempt,
)
from streamflow.core.events import (
    CancelRequested,
    Event,
    ProgressSet,
    RemoteCall,
    RetentionSet,
    RunCancelled,
    RunCompleted,
    RunCreated,
    RunFailed,
    RunStarted,
    RunTerminated,
    SignalAwaited,
    SignalReceived,
    SignalTaken,
    SignalWaitCancelled,
    StepCancelled,
    StepCompleted,
    StepFailed,
    StepScheduled,
    TimerCancelled,
    TimerFired,
    TimerSet,
    Turn,
    instant,
)
from streamflow.core.machines import signal, step, timer
from streamflow.core.machines.run import CLOSED, Run
from streamflow.errors import NonDeterminismError

Outcome: TypeAlias = StepCompleted | StepFailed | TimerFired | SignalTaken
IGNORED: Final = -1
"""The number of a decision that is asked for when the run is over: nothing will ever come of it."""


class Diverged(BaseException):
    """Unwinds workflow code that does not fit its history. Not an `Exception`, so that the code does not catch it."""


class Code(Protocol):
    """The workflow's code of one live run. Deterministic: what it asks for depends only on what it is given."""

    def begin(self, args: bytes) -> None:
        """Get ready to run from the start; nothing runs before `drain`."""

    def resolve(self, number: int, outcome: Outcome, signal: SignalReceived | None) -> bool:
        """Give the code the outcome of decision `number`; False when the code has not asked for that decision."""

    def cancel(self) -> None:
        """Raise `CancelledError` in the code, at the next drain."""

    def drain(self, at: int, replaying: bool) -> None:
        """Run until all of it waits, at the instant `at`. Raises `NonDeterminismError` when it will never wait."""

    def close(self) -> None:
        """Free everything; no more of the code runs."""


class Decisions(Protocol):
    """What workflow code may ask of the engine, while it is drained."""

    def step(
        self,
        name: str,
        args: bytes,
        *,
        start_at: int | None,
        queue: str | None,
        at_most_once: bool,
        check_args: bool,
        remote: RemoteCall | None = None,
    ) -> int:
        """Schedule a step; the number under which its outcome will come."""

    def timer(self, name: str, fire_at: int) -> int:
        """Set a durable timer."""

    def wait(self, name: str) -> int:
        """Wait for the next signal of that name."""

    def cancel(self, number: int) -> None:
        """Nobody waits for the decision any more."""

    def progress(self, value: bytes) -> None:
        """Report progress."""

    def close_run(self, event: RunCompleted | RunFailed | RunCancelled) -> None:
        """The code has ended."""


def fingerprint(args: bytes) -> int:
    """64 bits that identify a step's arguments: enough to notice a change, small enough to keep."""
    return int.from_bytes(hashlib.blake2b(args, digest_size=8).digest(), "big", signed=True)


class Execution:
    """One run and its code. `events` are the inputs and decisions since the last turn, `effects` follow from them."""

    __slots__ = (
        "asked",
        "at",
        "closing",
        "code",
        "diverged",
        "early",
        "effects",
        "events",
        "expected",
        "inputs",
        "payloads",
        "queue",
        "recorded",
        "replaying",
        "run",
    )

    def __init__(self, run: Run, *, at: int) -> None:
        self.run = run
        self.code: Code | None = None
        self.at = at
        self.events: list[Event] = []
        self.inputs: list[Event] = []
        self.effects: list[Effect] = []
        self.asked: dict[str, int] = {}
        self.early: dict[int, Outcome] = {}
        self.queue: deque[Outcome] = deque()
        self.payloads: dict[int, SignalReceived] = {}
        self.recorded: dict[int, StepScheduled] = {}
        self.expected: dict[int, str] = {}
        self.replaying = False
        self.closing: RunCompleted | RunFailed | RunCancelled | None = None
        self.diverged: NonDeterminismError | None = None

    # -- from outside ------------------------------------------------------------------------------------------------

    def take(self, event: Event) -> None:
        """Apply a new input and let the code decide on it."""
        self.inputs.append(event)
        self.emit(event)
        if type(event) is SignalReceived:
            self.payloads[event.signal] = event  # also where no code runs yet: its first wait will take it
        if self.code is None:
            return
        if self.run.is_closed:
            self.close()  # from outside (terminated, its deadline): no more of the code runs
            return
        self._deliver(event, self.at)

    def keep_signals(self, turns: Sequence[Turn]) -> None:
        """Load a run whose code has not begun: its first waits will ask for the signals that came already."""
        for _, event in _of_current_run(turns):
            if type(event) is SignalReceived:
                self.payloads[event.signal] = event

    def replay(self, turns: Sequence[Turn]) -> None:
        """Bring the code to where the recorded turns of this run left it, then let it decide what they do not hold."""
        assert self.code is not None and not self.run.is_closed, self.run.workflow_id
        self.replaying = True
        history = _of_current_run(turns)
        self.recorded = {event.number: event for _, event in history if type(event) is StepScheduled}
        for at, event in history:
            if type(event) in DELIVERED:
                self._deliver(event, at)
                if self.diverged is not None:
                    return
        self.replaying = False
        if self.closing is not None:
            self._finish(self.closing)
        else:
            self._settle(self.at)

    def diverge(self, why: str) -> None:
        """The code cannot go on: `why` is what the blocked run will show."""
        self.diverged = NonDeterminismError(why)

    def restart(self) -> None:
        """Forget the code of the run before: the next one begins."""
        self.close()
        self.asked, self.early, self.payloads, self.recorded, self.expected = {}, {}, {}, {}, {}
        self.queue.clear()
        self.closing = None

    def emit(self, event: Event) -> None:
        """Apply an event that the code need not see."""
        self.effects += self.run.apply(event, self.at)
        self.events.append(event)

    def retain(self, retention_of: Callable[[str], int | None]) -> None:
        """A run that has closed since the last flush is kept as long as its workflow's retention, in ms, says now."""
        if self.run.state in CLOSED and any(type(event) in CLOSING for event in self.events):
            retention_ms = retention_of(self.run.workflow)
            if retention_ms is not None:
                self.emit(RetentionSet(delete_at=instant(self.at + retention_ms)))

    def flush(self) -> tuple[list[Event], list[Effect]]:
        """The events and effects since the last flush, those effects left out that cancel each other."""
        events, effects = self.events, _without_pairs(self.effects)
        self.events, self.effects, self.inputs = [], [], []
        return events, effects

    def close(self) -> None:
        """Free the code; the run leaves memory."""
        if self.code is not None:
            self.code.close()
            self.code = None

    # -- from the code, while it is drained --------------------------------------------------------------------------

    def step(
        self,
        name: str,
        args: bytes,
        *,
        start_at: int | None,
        queue: str | None,
        at_most_once: bool,
        check_args: bool,
        remote: RemoteCall | None = None,
    ) -> int:
        """Schedule a step, or find the recorded one; its arguments must then be the recorded ones."""
        if self._is_over():
            return IGNORED
        number = self._recorded("step:" + name)
        if number is None:
            number = self.run.decided
            event = StepScheduled(
                number=number,
                name=name,
                args=args,
                fingerprint=fingerprint(args),
                start_at=None if start_at is None else instant(start_at),
                queue=queue,
                at_most_once=at_most_once,
                remote=remote,
            )
            self.emit(event)
            return number
        before = self.recorded.pop(number)
        if check_args and before.fingerprint != fingerprint(args):
            raise self._diverge(before, args)
        return number

    def timer(self, name: str, fire_at: int) -> int:
        """Set a timer, or find the recorded one; the recorded instant stays."""
        if self._is_over():
            return IGNORED
        number = self._recorded("sleep:" + name)
        if number is None:
            number = self.run.decided
            self.emit(TimerSet(number=number, name=name, fire_at=instant(fire_at)))
        return number

    def wait(self, name: str) -> int:
        """Wait for a signal, or find the recorded wait."""
        if self._is_over():
            return IGNORED
        number = self._recorded("signal:" + name)
        if number is None:
            number = self.run.decided
            self.emit(SignalAwaited(number=number, name=name))
        return number

    def cancel(self, number: int) -> None:
        """Give the decision up, unless it is over."""
        self.expected.pop(number, None)
        decision = self.run.decisions.get(number)
        if self._is_over() or decision is None:
            return
        match decision:
            case step.Step():
                self.emit(StepCancelled(number=number))
            case timer.Timer():
                self.emit(TimerCancelled(number=number))
            case signal.Wait():
                self.emit(SignalWaitCancelled(number=number))
            case _:
                assert_never(decision)

    def progress(self, value: bytes) -> None:
        """Report progress; what the history holds is not reported again."""
        if not self.replaying and not self._is_over():
            self.emit(ProgressSet(value=value))

    def close_run(self, event: RunCompleted | RunFailed | RunCancelled) -> None:
        """The code has ended; while replaying, only the end of the walk tells whether the history knows that."""
        if self._is_over():
            return
        self.closing = event
        if not self.replaying:
            self._finish(event)

    # -- both --------------------------------------------------------------------------------------------------------

    def _is_over(self) -> bool:
        return self.closing is not None or self.diverged is not None

    def _recorded(self, key: str) -> int | None:
        """The number of the next occurrence of the decision, None when the history does not hold it."""
        index = self.asked.get(key, 0)
        self.asked[key] = index + 1
        numbers = self.run.occurrences.get(key)
        if numbers is None or index >= len(numbers):
            return None
        number = numbers[index]
        early = self.early.pop(number, None)
        if early is not None:
            self.queue.append(early)
        elif number not in self.run.decisions:
            self.expected[number] = key
        return number

    def _deliver(self, event: Event, at: int) -> None:
        """Give the code one input, of the instant `at`, and let it run until it waits."""
        assert self.code is not None
        match event:
            case StepCompleted() | StepFailed() | TimerFired():  # first, as nearly all are of these
                self._resolve(event)
            case RunStarted():
                self.code.begin(self.run.args)
            case SignalReceived():
                self.payloads[event.signal] = event
            case SignalTaken():
                self._resolve(event)
            case CancelRequested():
                self.code.cancel()
            case _:
                return
        self._settle(at)

    def _resolve(self, outcome: Outcome) -> None:
        assert self.code is not None
        payload = self.payloads.get(outcome.signal) if type(outcome) is SignalTaken else None
        if not self.code.resolve(outcome.number, outcome, payload):
            self.early[outcome.number] = outcome
            return
        self.expected.pop(outcome.number, None)
        if payload is not None:
            del self.payloads[payload.signal]

    def _settle(self, at: int) -> None:
        """Run the code until it waits for something that is not there yet."""
        assert self.code is not None
        while True:
            try:
                self.code.drain(at, self.replaying)
            except NonDeterminismError as error:
                self.diverged = self.diverged or error
            if self._is_over():
                return
            if self.queue:
                self._resolve(self.queue.popleft())
                continue
            # While replaying, the takes are recorded: the walk delivers them.
            taken = None if self.replaying else self.run.mailbox.match()
            if taken is None:
                if self.expected and not self.replaying:
                    self._diverge_from_given_up()
                return
            self.emit(taken)
            self._resolve(taken)

    def _finish(self, event: RunCompleted | RunFailed | RunCancelled) -> None:
        self.emit(event)
        self.queue.clear()

    def _diverge(self, before: StepScheduled, args: bytes) -> Diverged:
        run = self.run
        occurrence = run.occurrences["step:" + before.name].index(before.number) + 1
        self.diverged = NonDeterminismError(
            f"run {run.workflow_id} ({run.workflow}) no longer fits its history at step {before.number}:\n"
            f"  history:   call {occurrence} of {before.name} with {_shown(before.args)};\n"
            f"  this code: call {occurrence} of {before.name} with {_shown(args)}.\n"
            f"  The run is blocked and kept as it is. Bring back code that makes the recorded call, or say\n"
            f"  {before.name}.options(check_args=False)(…) if the change is meant."
        )
        return Diverged(str(self.diverged))

    def _diverge_from_given_up(self) -> None:
        number, key = next(iter(self.expected.items()))
        self.diverge(
            f"run {self.run.workflow_id} ({self.run.workflow}) no longer fits its history "
            f"at decision {number}, {key}:\n"
            f"  history:   it was given up (a timeout, a cancelled task);\n"
            f"  this code: waits for its outcome, which will never come.\n"
            f"  The run is blocked and kept as it is. Bring back code that gives it up."
        )


DELIVERED: Final = frozenset(
    {RunStarted, StepCompleted, StepFailed, TimerFired, SignalReceived, SignalTaken, CancelRequested}
)
"""The events of a history that reach the code; the others are its own decisions, or between the engine and a step."""

CLOSING: Final = frozenset({RunCompleted, RunFailed, RunCancelled, RunTerminated})

SHOWN_BYTES_MAX: Final = 300
"""How much of the arguments an error shows."""


def _of_current_run(turns: Sequence[Turn]) -> list[tuple[int, Event]]:
    """The events since the run last began, each with its instant: the id may have had runs before."""
    events: list[tuple[int, Event]] = []
    for turn in turns:
        for event in turn.events:
            if type(event) is RunCreated:
                events.clear()
            events.append((turn.at, event))
    return events


def _shown(args: bytes) -> str:
    text = args.decode("utf-8", "replace")
    return text if len(text) <= SHOWN_BYTES_MAX else f"{text[:SHOWN_BYTES_MAX]}… ({len(args)} bytes)"


def _without_pairs(effects: list[Effect]) -> list[Effect]:
    """Drop what was begun and given up in one turn: a timer set and dropped, an attempt started and cancelled.

    Only in that order. What is given up and then begun under the same name (a step of the next run) are two things.
    """
    if len(effects) < 2 or not any(type(effect) is DropTimer or type(effect) is CancelAttempt for effect in effects):
        return effects
    begun: dict[bytes | tuple[int, int], int] = {}
    left: dict[int, Effect] = {}
    for place, effect in enumerate(effects):
        left[place] = effect
        match effect:
            case SetTimer(timer=record):
                begun[record.key] = place
            case StartAttempt(run=run, number=number) | RecordStart(run=run, number=number):
                begun[run, number] = place
            case DispatchAttempt(task=task):
                begun[task.run, task.number] = place
            case DropTimer(timer=record) if record.key in begun:
                del left[begun.pop(record.key)], left[place]
            case CancelAttempt(run=run, number=number) if (run, number) in begun:
                del left[begun.pop((run, number))], left[place]
    return list(left.values())
