"""A run: one execution of a workflow under one workflow id. How an event changes it; state.py has its states and table.

The run routes each event to its own table or to the machine of the decision (step, timer, wait) that the event names,
and returns the effects. It holds all that the partition must know of an open run except the code's own memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Never, TypeAlias, TypeVar

from msgspec import Struct

from streamflow.core.effects import DropTimer, Effect, SetTimer
from streamflow.core.events import (
    CancelRequested,
    Event,
    ProgressSet,
    RetentionSet,
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
from streamflow.core.machines import signal, step, timer
from streamflow.core.machines.state import CLOSED, TRANSITIONS, WAITING_ON_MAX, Decision, RunRecord, RunState
from streamflow.core.machines.table import IllegalTransition, next_state

__all__ = ["CLOSED", "TRANSITIONS", "WAITING_ON_MAX", "Run", "RunState", "identity"]

StepEvent: TypeAlias = step.StepEvent
TimerEvent: TypeAlias = TimerFired | TimerCancelled
WaitEvent: TypeAlias = SignalTaken | SignalWaitCancelled
D = TypeVar("D", step.Step, timer.Timer, signal.Wait)


class Run(RunRecord):
    """The state of one run, as the fold of its turns."""

    def apply(self, event: Event, at: int) -> list[Effect]:
        """Change by one event of the instant `at`; the effects are for the owner, once the turn is durable."""
        handler: Callable[[Run, Event, int], list[Effect]]
        handler = APPLY[type(event)]  # type: ignore[assignment]  # each takes the kind that it is listed under
        return handler(self, event, at)

    def fold(self, turn: Turn) -> list[Effect]:
        """Apply a whole turn, as a restore does.

        The first turn of a run may begin with the end of the run before it, which whoever reads from here does not
        know: that part is skipped. The commands of a run's first turn are all that count from there on.
        """
        effects: list[Effect] = []
        self.turn = turn.turn - 1
        events = turn.events
        if self.state is RunState.NONE and type(events[0]) is not RunCreated:
            events = events[[type(event) for event in events].index(RunCreated) :]
        for event in events:
            effects += self.apply(event, turn.at)
        self.turn = turn.turn
        if self.first_turn == self.turn:
            self.commands = {}
        self.commands.update((command.command_id, None) for command in turn.commands)
        return effects


def _created(run: Run, event: RunCreated, at: int) -> list[Effect]:
    state = next_state(TRANSITIONS, run.state, event, who=f"run {run.workflow_id}")
    effects = _no_longer_kept(run)
    if run.state is not RunState.NONE:
        fresh = Run(workflow_id=run.workflow_id, turn=run.turn, commands=run.commands)
        for name in run.__struct_fields__:
            setattr(run, name, getattr(fresh, name))
    run.state = state
    run.workflow = event.workflow
    run.run = event.run
    run.first_turn = run.turn + 1
    run.args = event.args
    run.context = event.context
    run.created_at = at
    run.start_timer_at = event.start_at
    run.deadline_at = event.deadline_at
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
    return _no_longer_kept(run)


def _retention_set(run: Run, event: RetentionSet, at: int) -> list[Effect]:
    if run.state not in CLOSED or run.delete_at is not None:
        raise IllegalTransition(f"run {run.workflow_id} is {run.state}, kept until {run.delete_at}: it cannot {event}")
    run.delete_at = event.delete_at
    return [SetTimer(run.own_timer("retention", event.delete_at))]


def _no_longer_kept(run: Run) -> list[Effect]:
    """The closed run goes, or makes room for the next one of its id: its retention timer has nothing to end."""
    if run.delete_at is None:
        return []
    timer_record = run.own_timer("retention", run.delete_at)
    run.delete_at = None
    return [DropTimer(timer_record)]


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
    run.open_attempts += decision.runs_here
    return effects


def _step_changed(run: Run, event: StepEvent, at: int) -> list[Effect]:
    decision = _decision(run, event, step.Step)
    run.open_attempts -= decision.runs_here
    effects = step.evolve(decision, event, run.workflow_id, run.run)
    if decision.is_open:
        run.open_attempts += decision.runs_here
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


APPLY: Final[Mapping[type[Struct], Callable[[Run, Never, int], list[Effect]]]] = {
    RunCreated: _created,
    RunStarted: _started,
    RunCompleted: _closed,
    RunFailed: _closed,
    RunCancelled: _closed,
    RunTerminated: _closed,
    RunBlocked: _blocked,
    RunUnblocked: _blocked,
    RunDeleted: _deleted,
    RetentionSet: _retention_set,
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
