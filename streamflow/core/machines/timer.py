"""A timer of a run: a durable sleep, or the limit of a timeout.

PENDING ──TimerFired──▶ FIRED
   └────TimerCancelled─▶ CANCELLED
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from msgspec import Struct

from streamflow.core.effects import DropTimer, Effect, SetTimer, TimerRecord
from streamflow.core.events import TimerCancelled, TimerFired, TimerSet
from streamflow.core.machines.table import next_state


class TimerState(StrEnum):
    """Where a timer stands."""

    PENDING = "pending"
    FIRED = "fired"
    CANCELLED = "cancelled"


TRANSITIONS: Final[Mapping[tuple[TimerState, type[Struct]], TimerState]] = {
    (TimerState.PENDING, TimerFired): TimerState.FIRED,
    (TimerState.PENDING, TimerCancelled): TimerState.CANCELLED,
}


class Timer(Struct):
    """The timer `number` of a run, due at `fire_at`."""

    number: int
    name: str
    fire_at: int
    state: TimerState = TimerState.PENDING

    kind = "sleep"

    @property
    def is_open(self) -> bool:
        """Whether the run may still wait for it."""
        return self.state is TimerState.PENDING

    def record(self, workflow_id: str, run: int) -> TimerRecord:
        """The timer as the timers topic holds it."""
        return TimerRecord(
            workflow_id=workflow_id, kind="sleep", run=run, number=self.number, attempt=0, fire_at=self.fire_at
        )

    def abandon(self, workflow_id: str, run: int) -> list[Effect]:
        """What is left to do when the run closes while the timer is pending."""
        return [DropTimer(self.record(workflow_id, run))]

    def waits_for(self) -> str:
        """The timer's entry in `waiting_on`."""
        return f"{self.name} until {self.fire_at}"


def create(event: TimerSet, workflow_id: str, run: int) -> tuple[Timer, list[Effect]]:
    """The timer that the event sets."""
    timer = Timer(number=event.number, name=event.name, fire_at=event.fire_at)
    return timer, [SetTimer(timer.record(workflow_id, run))]


def evolve(timer: Timer, event: TimerFired | TimerCancelled, workflow_id: str, run: int) -> list[Effect]:
    """Apply the event: either way the timer is over and its record is dropped."""
    timer.state = next_state(TRANSITIONS, timer.state, event, who=f"timer {timer.number} of run {workflow_id}")
    return [DropTimer(timer.record(workflow_id, run))]
