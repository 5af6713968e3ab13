"""What is kept of a run, and what can be read of it."""

from __future__ import annotations

from typing import Any

import pytest

from streamflow.core.effects import TimerRecord
from streamflow.core.machines import state
from streamflow.core.machines.signal import Wait
from streamflow.core.machines.state import CLOSED, TRANSITIONS, WAITING_ON_MAX, RunRecord, RunState
from streamflow.core.machines.step import Step, StepState
from streamflow.core.machines.timer import Timer


def a_run(at: RunState = RunState.RUNNING, **fields: object) -> RunRecord:
    decisions = {
        0: Step(number=0, name="charge", args=b"[]", fingerprint=1, scheduled_at=1),
        1: Timer(number=1, name="sleep", fire_at=500),
        2: Wait(number=2, name="go"),
        3: Step(number=3, name="ship", args=b"[]", fingerprint=1, scheduled_at=1, due_at=700, state=StepState.DELAYED),
    }
    known: dict[str, Any] = {"workflow_id": "w", "run": 2, "state": at, "decisions": decisions}
    return RunRecord(**known | fields)


def test_a_run_is_closed_once_its_code_has_ended_and_then_only_begins_anew_or_goes():
    ended = [each for each in RunState if a_run(each).is_closed]
    assert ended == ["completed", "failed", "cancelled", "terminated", "deleted"]
    assert frozenset(ended) == CLOSED | {RunState.DELETED}
    for each in CLOSED:
        assert sorted(after for (before, _), after in TRANSITIONS.items() if before is each) == ["deleted", "scheduled"]


def test_every_state_but_the_first_can_be_reached_and_none_but_the_closed_is_a_dead_end():
    assert set(TRANSITIONS.values()) == set(RunState) - {RunState.NONE}
    assert {before for before, _ in TRANSITIONS} == set(RunState)


def test_the_diagram_names_every_state_and_event():
    assert state.__doc__
    words = [each.name for each in RunState if each is not RunState.NONE]
    words += [event.__name__ for _, event in TRANSITIONS]
    assert [word for word in words if word not in state.__doc__] == []


@pytest.mark.parametrize(
    ("kind", "number", "attempt", "due_at"),
    [("sleep", 1, 0, 500), ("step", 3, 1, 700), ("deadline", 0, 0, 900), ("retention", 0, 0, 950)],
)
def test_a_pending_timer_is_known_with_its_instant(kind, number, attempt, due_at):
    run = a_run(deadline_at=900, delete_at=950)
    assert run.timer_pending(kind, number, attempt)
    assert run.timer_due_at(kind, number) == due_at


@pytest.mark.parametrize(
    ("kind", "number", "attempt"),
    [
        ("sleep", 0, 0),
        ("sleep", 9, 0),
        ("step", 3, 2),
        ("step", 0, 1),
        ("step", 1, 1),
        ("step", 9, 1),
        ("start", 0, 0),
        ("retention", 0, 0),
    ],
)
def test_a_timer_that_is_not_exactly_the_pending_one_is_not_pending(kind, number, attempt):
    assert not a_run(start_timer_at=5).timer_pending(kind, number, attempt)


def test_a_start_timer_is_pending_until_the_run_begins_and_a_deadline_until_it_closes():
    waiting = a_run(RunState.SCHEDULED, start_timer_at=300, deadline_at=None)
    assert waiting.timer_pending("start", 0, 0) and waiting.timer_due_at("start", 0) == 300
    assert not waiting.timer_pending("deadline", 0, 0)
    assert not a_run(RunState.SCHEDULED).timer_pending("start", 0, 0)
    assert not a_run(RunState.FAILED, deadline_at=900).timer_pending("deadline", 0, 0)


def test_what_a_run_waits_on_is_said_in_words_and_bounded():
    assert a_run().waiting_on() == [
        "step charge",
        "sleep until 500",
        "signal go",
        "step ship (attempt 1 at 700)",
    ]
    assert a_run(RunState.SCHEDULED, start_timer_at=300).waiting_on() == ["start until 300"]
    assert a_run(RunState.COMPLETED).waiting_on() == []
    assert a_run(RunState.BLOCKED).waiting_on() == ["fitting code"]
    many = {number: Wait(number=number, name="go") for number in range(WAITING_ON_MAX + 3)}
    assert a_run(decisions=many).waiting_on() == ["signal go"] * WAITING_ON_MAX + ["and 3 more"]


def test_steps_are_found_by_number_and_nothing_else_is_a_step():
    run = a_run()
    assert [run.step(number) is not None for number in range(5)] == [True, False, False, True, False]


def test_the_status_shows_the_run():
    status = a_run(workflow="work", turn=4, progress=b"1", reason="why").status()
    assert (status.workflow_id, status.workflow, status.run, status.turn) == ("w", "work", 2, 4)
    assert (status.state, status.progress, status.reason) == ("running", b"1", "why")
    assert status.waiting_on == a_run().waiting_on()


def test_the_runs_own_timers_carry_its_number():
    expected = TimerRecord(workflow_id="w", kind="deadline", run=2, number=0, attempt=0, fire_at=9)
    assert a_run().own_timer("deadline", 9) == expected
