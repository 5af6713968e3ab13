"""A step: scheduled once, tried in numbered attempts, one outcome; at most once when it says so."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from streamflow.core.effects import (
    CancelAttempt,
    DispatchAttempt,
    DropTimer,
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
from streamflow.core.machines import step
from streamflow.core.machines.step import TRANSITIONS, Step, StepState
from streamflow.core.machines.table import IllegalTransition
from tests.core.scripted import ERROR

EVENTS = (
    StepDue(number=5, attempt=2),
    StepStarted(number=5, attempt=2),
    StepAttemptFailed(number=5, attempt=2, error=ERROR, retry_at=900),
    StepCompleted(number=5, attempt=2, result=b"1"),
    StepFailed(number=5, attempt=2, error=ERROR),
    StepCancelled(number=5),
)
OPEN = (StepState.DELAYED, StepState.OPEN, StepState.STARTED, StepState.BACKING_OFF)


def a_step(state: StepState = StepState.OPEN, **fields: object) -> Step:
    known: dict[str, Any] = {
        "number": 5,
        "name": "charge",
        "args": b"[7]",
        "fingerprint": 1,
        "scheduled_at": 100,
        "attempt": 2,
    }
    return Step(**known | {"due_at": 800, "state": state} | fields)


def timer_of(attempt: int, fire_at: int) -> TimerRecord:
    return TimerRecord(workflow_id="w", kind="step", run=3, number=5, attempt=attempt, fire_at=fire_at)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(StepState, EVENTS)))
def test_every_pair_of_state_and_event_is_in_the_table_or_illegal(state, event):
    subject = a_step(state)
    expected = TRANSITIONS.get((state, type(event)))
    if expected is None:
        with pytest.raises(IllegalTransition, match=f"step 5 of run w is {state}: {type(event).__name__}"):
            step.evolve(subject, event, "w", 3)
        assert subject == a_step(state)
    else:
        step.evolve(subject, event, "w", 3)
        assert subject.state is expected


@pytest.mark.parametrize("event", EVENTS[:-1])
def test_an_event_of_another_attempt_is_illegal(event):
    state = StepState.DELAYED if isinstance(event, StepDue) else StepState.OPEN
    with pytest.raises(IllegalTransition, match="is at attempt 1"):
        step.evolve(a_step(state, attempt=1), event, "w", 3)


def test_a_step_starts_at_once_unless_it_has_a_delay_or_runs_at_most_once():
    event = StepScheduled(number=5, name="charge", args=b"[7]", fingerprint=1)
    made, effects = step.create(event, "w", 3, 100)
    assert (made.state, made.queue, made.scheduled_at, effects) == ("open", None, 100, [StartAttempt(3, 5, 1)])
    assert made.runs_here

    made, effects = step.create(StepScheduled(**fields_of(event, start_at=400)), "w", 3, 100)
    assert (made.state, made.due_at, effects) == ("delayed", 400, [SetTimer(timer_of(1, 400))])

    made, effects = step.create(StepScheduled(**fields_of(event, at_most_once=True)), "w", 3, 100)
    assert (made.state, effects) == ("open", [RecordStart(3, 5, 1)])


def fields_of(event: StepScheduled, **changed: object) -> dict[str, Any]:
    return {name: getattr(event, name) for name in event.__struct_fields__} | changed


def test_with_a_queue_its_attempts_are_dispatched_and_carry_how_it_was_called():
    call = RemoteCall(step="pay", workflow="work", timeout_ms=9, retry=b"{}")
    event = StepScheduled(number=5, name="charge", args=b"[7]", fingerprint=1, queue="gpu", remote=call)
    made, effects = step.create(event, "w", 3, 100)
    task = StepTask(
        workflow_id="w",
        run=3,
        number=5,
        attempt=1,
        workflow="work",
        step="pay",
        name="charge",
        args=b"[7]",
        scheduled_at=100,
        timeout_ms=9,
        retry=b"{}",
    )
    assert effects == [DispatchAttempt("gpu", task)]
    assert made.has_attempt and not made.runs_here
    assert made.waits_for() == "step charge on queue gpu"

    assert step.evolve(made, StepAttemptFailed(number=5, attempt=1, error=ERROR, retry_at=900), "w", 3)
    due = step.evolve(made, StepDue(number=5, attempt=2), "w", 3)
    assert [each.task.attempt for each in due if isinstance(each, DispatchAttempt)] == [2]
    assert made.waits_for() == "step charge on queue gpu (attempt 2)"


def test_a_step_on_a_queue_that_says_no_more_is_called_by_its_name():
    (effect,) = a_step(queue="gpu").begin("w", 3)
    assert isinstance(effect, DispatchAttempt)
    assert (effect.task.step, effect.task.workflow, effect.task.timeout_ms) == ("charge", "", None)


def test_at_most_once_runs_only_behind_its_recorded_start():
    subject = a_step(at_most_once=True)
    assert step.evolve(subject, StepStarted(number=5, attempt=2), "w", 3) == [StartAttempt(3, 5, 2)]
    assert (StepState.STARTED, StepAttemptFailed) not in TRANSITIONS  # it is not tried again


def test_a_failed_attempt_waits_for_the_next_one():
    subject = a_step()
    effects = step.evolve(subject, EVENTS[2], "w", 3)
    assert effects == [SetTimer(timer_of(3, 900))]
    assert (subject.attempt, subject.due_at, subject.has_attempt, subject.is_open) == (3, 900, False, True)
    assert subject.awaits_timer(3) and not subject.awaits_timer(2)
    assert subject.waits_for() == "step charge (attempt 3 at 900)"

    effects = step.evolve(subject, StepDue(number=5, attempt=3), "w", 3)
    assert effects == [DropTimer(timer_of(3, 900)), StartAttempt(3, 5, 3)]
    assert subject.waits_for() == "step charge (attempt 3)"


@pytest.mark.parametrize("event", [EVENTS[3], EVENTS[4]])
def test_an_outcome_ends_the_step_and_frees_its_arguments(event):
    subject = a_step()
    assert step.evolve(subject, event, "w", 3) == []
    assert (subject.args, subject.is_open, subject.accepts(2)) == (b"", False, False)


def test_a_cancelled_step_cancels_its_attempt_or_drops_its_timer():
    assert step.evolve(a_step(), StepCancelled(number=5), "w", 3) == [CancelAttempt(3, 5)]
    delayed = a_step(StepState.DELAYED)
    assert step.evolve(delayed, StepCancelled(number=5), "w", 3) == [DropTimer(timer_of(2, 800))]


@pytest.mark.parametrize("state", list(StepState))
def test_outcomes_and_timers_count_only_for_the_attempt_that_is_there(state):
    subject = a_step(state)
    assert subject.is_open is (state in OPEN)
    assert subject.accepts(2) is subject.has_attempt is (state in ("open", "started"))
    assert subject.awaits_timer(2) is (state in ("delayed", "backing_off"))
    assert not subject.accepts(1) and not subject.awaits_timer(1)


def test_a_first_attempt_is_not_worth_a_number():
    assert a_step(attempt=1).waits_for() == "step charge"


def test_the_diagram_names_every_state_and_event():
    assert step.__doc__
    words = [state.name for state in StepState] + [event.__name__ for _, event in TRANSITIONS]
    assert [word for word in words if word not in step.__doc__] == []
