"""One file per state machine: its states, its table of legal transitions, and how an event changes it.

An event that its table does not hold is an `IllegalTransition`: the history, or the code that wrote it, is broken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

State = TypeVar("State")


class IllegalTransition(AssertionError):
    """An event that a machine's table does not allow in its state. Never the user's fault."""


def next_state(table: Mapping[tuple[State, type], State], state: State, event: object, *, who: str) -> State:
    """The state that `table` gives for `event` in `state`; `IllegalTransition` naming all three where it gives none."""
    try:
        return table[state, type(event)]
    except KeyError:
        raise IllegalTransition(f"{who} is {state}: {type(event).__name__} is not legal there, found {event}") from None
