"""A run: every event goes to its table or its decision, and the fold of the turns is the run."""

from __future__ import annotations

import itertools

import pytest

from streamflow.core.effects import CancelAttempt, DropTimer, SetTimer, StartAttempt, TimerRecord
from streamflow.core.events import (
    EVENTS,
    Applied,
    CancelRequested,
    ProgressSet,
    RetentionSet,
    RunBlocked,
    RunCancelled,
    RunCompleted,
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
    StepStarted,
    TimerCancelled,
    TimerFired,
    TimerSet,
)
from streamflow.core.machines.run import APPLY, CLOSED, TRANSITIONS, Run, RunState, identity
from streamflow.core.machines.table import IllegalTransition
from tests.core.scripted import ERROR, T0, created, scheduled, turn

RUN_EVENTS = (
    created(),
    RunStarted(),
    RunCompleted(result=b"1"),
    RunFailed(error=ERROR),
    RunCancelled(),
    RunTerminated(reason="why"),
    RunBlocked(error=ERROR),
    RunUnblocked(),
    RunDeleted(),
    CancelRequested(),
    ProgressSet(value=b"1"),
)
DECIDING = (scheduled(), TimerSet(number=0, name="sleep", fire_at=9), SignalAwaited(number=0, name="go"))
OUTCOMES = (
    StepDue(number=0, attempt=1),
    StepStarted(number=0, attempt=1),
    StepAttemptFailed(number=0, attempt=1, error=ERROR, retry_at=9),
    StepCompleted(number=0, attempt=1, result=b"1"),
    StepFailed(number=0, attempt=1, error=ERROR),
    StepCancelled(number=0),
    TimerFired(number=0),
    TimerCancelled(number=0),
    SignalTaken(number=0, signal=0),
    SignalWaitCancelled(number=0),
)


def a_run(*events: object, at: int = T0) -> Run:
    """A run that began, with those events."""
    run = Run(workflow_id="w")
    for event in (created(), RunStarted(), *events):
        run.apply(event, at)  # type: ignore[arg-type]  # events, in a list of mixed types
    return run


@pytest.mark.parametrize(("state", "event"), list(itertools.product(RunState, RUN_EVENTS)))
def test_every_pair_of_state_and_event_is_in_the_table_or_illegal(state, event):
    run = Run(workflow_id="w", state=state)
    expected = TRANSITIONS.get((state, type(event)))
    if expected is None:
        with pytest.raises(IllegalTransition, match=f"run w is {state}: {type(event).__name__} is not legal"):
            run.apply(event, T0)
    else:
        run.apply(event, T0)
        assert run.state is expected


@pytest.mark.parametrize(("state", "event"), list(itertools.product(RunState, DECIDING)))
def test_only_running_code_decides(state, event):
    run = Run(workflow_id="w", state=state)
    if state is RunState.RUNNING:
        run.apply(event, T0)
        assert list(run.decisions) == [0] and run.decided == 1
    else:
        with pytest.raises(IllegalTransition, match="it cannot decide"):
            run.apply(event, T0)


@pytest.mark.parametrize("decided", DECIDING)
def test_decisions_are_numbered_without_a_gap(decided):
    run = a_run(scheduled(0))
    with pytest.raises(IllegalTransition, match="with 1 decisions: it cannot decide"):
        run.apply(decided, T0)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_an_outcome_of_what_is_not_open_or_of_another_kind_is_illegal(outcome):
    for run in (a_run(), a_run(next(each for each in DECIDING if not fits(each, outcome)))):
        with pytest.raises(IllegalTransition, match="has no open"):
            run.apply(outcome, T0)


def fits(decided: object, outcome: object) -> bool:
    kinds = {"StepScheduled": "Step", "TimerSet": "Timer", "SignalAwaited": "Signal"}
    return type(outcome).__name__.startswith(kinds[type(decided).__name__])


@pytest.mark.parametrize("state", list(RunState))
def test_a_signal_is_kept_from_the_creation_of_the_run_to_its_end(state):
    run = Run(workflow_id="w", state=state)
    received = SignalReceived(signal=0, name="go")
    if state in ("scheduled", "running", "blocked"):
        run.apply(received, T0)
        assert run.mailbox.received == 1
    else:
        with pytest.raises(IllegalTransition, match="it cannot receive"):
            run.apply(received, T0)


def test_every_event_has_its_place():
    assert set(APPLY) == set(EVENTS)


def test_a_new_run_is_scheduled_with_its_timers():
    run = Run(workflow_id="w", turn=4)
    effects = run.apply(created(run=2, start_at=T0 + 5, deadline_at=T0 + 9, context=b"1"), T0)
    timers = [
        TimerRecord(workflow_id="w", kind="start", run=2, number=0, attempt=0, fire_at=T0 + 5),
        TimerRecord(workflow_id="w", kind="deadline", run=2, number=0, attempt=0, fire_at=T0 + 9),
    ]
    assert effects == [SetTimer(timer) for timer in timers]
    assert (run.created_at, run.first_turn, run.context) == (T0, 5, b"1")
    assert run.apply(RunStarted(), T0 + 5) == [DropTimer(timers[0])]
    assert (run.started_at, run.start_timer_at) == (T0 + 5, None)
    assert run.apply(RunFailed(error=ERROR), T0 + 9) == [DropTimer(timers[1])]


@pytest.mark.parametrize("state", list(RunState))
def test_only_a_closed_run_is_given_its_retention_and_only_once(state):
    run = Run(workflow_id="w", run=3, state=state)
    retention = RetentionSet(delete_at=T0 + 5)
    if state in CLOSED:
        timer = TimerRecord(workflow_id="w", kind="retention", run=3, number=0, attempt=0, fire_at=T0 + 5)
        assert run.apply(retention, T0) == [SetTimer(timer)]
        assert run.state is state and run.delete_at == T0 + 5
    with pytest.raises(IllegalTransition, match=f"run w is {state}, kept until"):
        run.apply(retention, T0)


@pytest.mark.parametrize("event", [RunDeleted(), created(run=2)])
def test_the_retention_ends_with_the_run_or_where_the_next_one_begins(event):
    run = a_run(RunCompleted(result=b"1"), RetentionSet(delete_at=T0 + 5))
    timer = TimerRecord(workflow_id="w", kind="retention", run=1, number=0, attempt=0, fire_at=T0 + 5)
    assert run.apply(event, T0 + 1) == [DropTimer(timer)]
    assert run.delete_at is None


def test_a_scheduled_run_that_is_stopped_drops_both_of_its_timers():
    run = Run(workflow_id="w")
    set_timers = run.apply(created(start_at=5, deadline_at=9), T0)
    dropped = run.apply(RunTerminated(), T0)
    assert [effect.timer for effect in dropped] == [effect.timer for effect in set_timers]  # type: ignore[union-attr]


def test_closing_abandons_what_is_open_and_forgets_what_only_an_open_run_needs():
    run = a_run(
        scheduled(0),
        TimerSet(number=1, name="sleep", fire_at=9),
        SignalAwaited(number=2, name="go"),
        SignalReceived(signal=0, name="stop"),
    )
    effects = run.apply(RunCancelled(), T0 + 1)
    assert [type(effect) for effect in effects] == [CancelAttempt, DropTimer]
    assert (run.decisions, run.occurrences, run.open_attempts, run.closed_at) == ({}, {}, 0, T0 + 1)
    assert run.mailbox == type(run.mailbox)()


def test_how_a_run_ended_is_kept_with_it():
    assert a_run(RunCompleted(result=b"7")).result == b"7"
    assert a_run(RunFailed(error=ERROR)).error == ERROR
    assert a_run(RunTerminated(reason="why")).reason == "why"
    assert a_run(RunCancelled()).error is None


def test_a_blocked_run_shows_why_until_it_goes_on():
    run = a_run(RunBlocked(error=ERROR))
    assert (run.state, run.error) == ("blocked", ERROR)
    run.apply(RunUnblocked(), T0)
    assert (run.state, run.error) == ("running", None)


def test_a_cancel_request_and_progress_are_kept():
    run = a_run(CancelRequested(), ProgressSet(value=b"1"), ProgressSet(value=b"2"))
    assert run.cancel_requested and run.progress == b"2"


def test_attempts_that_run_are_counted():
    run = a_run()
    counts = []
    for event in (
        scheduled(0),
        scheduled(1, start_at=T0 + 9),
        StepDue(number=1, attempt=1),
        StepAttemptFailed(number=0, attempt=1, error=ERROR, retry_at=T0 + 9),
        StepCompleted(number=1, attempt=1, result=b"1"),
        StepDue(number=0, attempt=2),
        StepCancelled(number=0),
    ):
        run.apply(event, T0)
        counts.append(run.open_attempts)
    assert counts == [1, 1, 2, 1, 0, 1, 0]
    assert run.decisions == {}


def test_a_decision_is_an_occurrence_of_its_kind_and_name_also_when_it_is_over():
    run = a_run(
        scheduled(0),
        TimerSet(number=1, name="charge", fire_at=9),
        scheduled(2),
        SignalAwaited(number=3, name="go"),
        StepCompleted(number=0, attempt=1, result=b"1"),
        TimerCancelled(number=1),
        SignalWaitCancelled(number=3),
    )
    assert run.occurrences == {"step:charge": [0, 2], "sleep:charge": [1], "signal:go": [3]}
    assert identity("step", "charge") == "step:charge"


def test_a_timer_and_a_wait_leave_the_run_when_they_are_over():
    run = a_run(
        TimerSet(number=0, name="sleep", fire_at=9),
        SignalAwaited(number=1, name="go"),
        SignalReceived(signal=0, name="go"),
    )
    assert [type(effect) for effect in run.apply(TimerFired(number=0), T0)] == [DropTimer]
    assert run.apply(SignalTaken(number=1, signal=0), T0) == []
    assert run.decisions == {}


# -- folding -----------------------------------------------------------------------------------------------------------


def test_folding_a_turn_gives_the_effects_of_its_events_and_remembers_its_commands():
    run = Run(workflow_id="w")
    effects = run.fold(turn(created(), RunStarted(), scheduled(), commands=[Applied(command_id="c1")]))
    assert effects == [StartAttempt(1, 0, 1)]
    assert (run.turn, run.first_turn, run.commands) == (1, 1, {"c1": None})
    run.fold(turn(CancelRequested(), number=2, at=T0 + 1, commands=[Applied(command_id="c2")]))
    assert (run.turn, run.first_turn, list(run.commands)) == (2, 1, ["c1", "c2"])


def test_a_run_folds_alike_from_its_own_first_turn_and_from_that_of_the_run_before():
    first = turn(created(), RunStarted(), commands=[Applied(command_id="c1")])
    closes = turn(RunCompleted(result=b"1"), number=2)
    again = turn(created(run=2), RunStarted(), number=3, commands=[Applied(command_id=id) for id in ("c1", "c2")])
    whole, current = Run(workflow_id="w"), Run(workflow_id="w")
    for each in (first, closes, again):
        whole.fold(each)
    current.fold(again)
    assert whole == current
    assert (whole.run, whole.first_turn, list(whole.commands)) == (2, 3, ["c1", "c2"])


def test_a_first_turn_may_begin_with_the_end_of_the_run_before_it():
    first = turn(created(), RunStarted(), scheduled())
    both = turn(StepCompleted(number=0, attempt=1, result=b"1"), RunCompleted(result=b"1"), created(run=2), number=2)
    whole, current = Run(workflow_id="w"), Run(workflow_id="w")
    for each in (first, both):
        whole.fold(each)
    assert current.fold(both) == []
    assert whole == current and current.run == 2
