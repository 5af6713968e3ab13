"""A timer: pending, then fired or cancelled, once; its record on the timers topic comes and goes with it."""

from __future__ import annotations

import itertools

import pytest

from streamflow.core.effects import DropTimer, SetTimer, TimerRecord
from streamflow.core.events import TimerCancelled, TimerFired, TimerSet
from streamflow.core.machines import timer
from streamflow.core.machines.table import IllegalTransition
from streamflow.core.machines.timer import TRANSITIONS, Timer, TimerState

RECORD = TimerRecord(workflow_id="w", kind="sleep", run=2, number=3, attempt=0, fire_at=500)
EVENTS = (TimerFired(number=3), TimerCancelled(number=3))


def a_timer(state: TimerState = TimerState.PENDING) -> Timer:
    return Timer(number=3, name="sleep", fire_at=500, state=state)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(TimerState, EVENTS)))
def test_every_pair_of_state_and_event_is_in_the_table_or_illegal(state, event):
    a = a_timer(state)
    expected = TRANSITIONS.get((state, type(event)))
    if expected is None:
        with pytest.raises(IllegalTransition, match=f"timer 3 of run w is {state}"):
            timer.evolve(a, event, "w", 2)
        assert a.state is state
    else:
        assert timer.evolve(a, event, "w", 2) == [DropTimer(RECORD)]
        assert a.state is expected


def test_setting_a_timer_publishes_it():
    made, effects = timer.create(TimerSet(number=3, name="sleep", fire_at=500), "w", 2)
    assert made == a_timer() and effects == [SetTimer(RECORD)]


def test_only_a_pending_timer_is_open_and_giving_it_up_drops_its_record():
    assert [state for state in TimerState if a_timer(state).is_open] == [TimerState.PENDING]
    assert a_timer().abandon("w", 2) == [DropTimer(RECORD)]
    assert a_timer().waits_for() == "sleep until 500"


def test_the_diagram_names_every_state_and_event():
    assert timer.__doc__
    words = [state.name for state in TimerState] + [event.__name__ for _, event in TRANSITIONS]
    assert [word for word in words if word not in timer.__doc__] == []
