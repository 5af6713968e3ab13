"""Events: the closed union of facts, and the bounds of an instant."""

from __future__ import annotations

import typing
from datetime import UTC, datetime

import pytest

from streamflow.core import events
from streamflow.core.events import EVENTS, INSTANT_MS_MAX, Event, Turn, instant


def test_the_list_of_events_is_the_union():
    assert typing.get_args(Event) == EVENTS
    assert len(set(EVENTS)) == len(EVENTS)


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_is_a_fact_that_never_changes(event):
    assert event.__struct_config__.frozen and event.__doc__


def test_a_turn_can_be_given_its_place_when_it_is_handed_over():
    turn = Turn(workflow_id="w", turn=1, term=1, seq=0, at=0, consumed=0, events=[])
    turn.seq, turn.consumed = 7, 8
    assert (turn.seq, turn.consumed, turn.part, turn.last, turn.commands) == (7, 8, 0, True, [])


@pytest.mark.parametrize(("given", "kept"), [(-5, 0), (0, 0), (1_000, 1_000), (10**33, INSTANT_MS_MAX)])
def test_an_instant_stays_where_every_reader_can_show_it(given, kept):
    assert instant(given) == kept
    assert datetime.fromtimestamp(kept / 1000, UTC).year in range(1970, 10_000)


def test_every_event_of_the_module_is_in_the_union():
    others = {"Applied", "Claim", "Consumed", "RemoteCall", "RunSnapshot", "Struct", "Turn", "ErrorInfo"}
    named = {name for name, each in vars(events).items() if isinstance(each, type)} - others
    assert named == {event.__name__ for event in EVENTS}
