"""Transition tables: what a machine may do in which state, as data that can be printed and walked by a test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from msgspec import Struct

State = TypeVar("State")


class IllegalTransition(AssertionError):
    """An event that a machine's table does not allow in its state. Never the user's fault."""


def next_state(table: Mapping[tuple[State, type[Struct]], State], state: State, event: Struct, *, who: str) -> State:
    """The state that `table` gives for `event` in `state`; `IllegalTransition` naming all three where it gives none."""
    try:
        return table[state, type(event)]
    except KeyError:
        raise IllegalTransition(f"{who} is {state}: {type(event).__name__} is not legal there, found {event}") from None
