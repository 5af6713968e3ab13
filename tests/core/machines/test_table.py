"""Transition tables: what is in them happens, what is not is refused by name."""

from __future__ import annotations

import pytest
from msgspec import Struct

from streamflow.core import machines
from streamflow.core.machines.table import IllegalTransition, next_state


class Opened(Struct):
    """An event."""


class Shut(Struct):
    """An event that the table does not hold."""


def test_the_table_gives_the_next_state():
    assert next_state({("closed", Opened): "open"}, "closed", Opened(), who="door 7") == "open"


@pytest.mark.parametrize(("state", "event"), [("open", Opened()), ("closed", Shut())])
def test_what_the_table_does_not_hold_names_who_in_which_state_found_what(state, event):
    with pytest.raises(IllegalTransition, match=f"door 7 is {state}: {type(event).__name__} is not legal there"):
        next_state({("closed", Opened): "open"}, state, event, who="door 7")


def test_an_illegal_transition_is_a_broken_promise_and_never_a_users_error():
    assert issubclass(IllegalTransition, AssertionError)
    assert machines.IllegalTransition is IllegalTransition and machines.next_state is next_state
