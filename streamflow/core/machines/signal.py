"""Signals of a run: a wait takes the oldest signal of its name that no other wait took, now or when it comes.

    WAITING ──SignalTaken─────────▶ TAKEN
       └──────SignalWaitCancelled──▶ CANCELLED

Which wait takes which signal is recorded (`SignalTaken`), so replay need not work it out again, and other code than
the one that waited first cannot change it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from msgspec import Struct

from streamflow.core.effects import Effect
from streamflow.core.events import SignalAwaited, SignalReceived, SignalTaken, SignalWaitCancelled
from streamflow.core.machines.table import IllegalTransition, next_state


class WaitState(StrEnum):
    """Where a wait for a signal stands."""

    WAITING = "waiting"
    TAKEN = "taken"
    CANCELLED = "cancelled"


TRANSITIONS: Final[Mapping[tuple[WaitState, type[Struct]], WaitState]] = {
    (WaitState.WAITING, SignalTaken): WaitState.TAKEN,
    (WaitState.WAITING, SignalWaitCancelled): WaitState.CANCELLED,
}


class Wait(Struct):
    """The wait `number` of a run for a signal `name`."""

    number: int
    name: str
    state: WaitState = WaitState.WAITING

    kind = "signal"

    @property
    def is_open(self) -> bool:
        """Whether the run may still wait for it."""
        return self.state is WaitState.WAITING

    def abandon(self, workflow_id: str, run: int) -> list[Effect]:
        """Nothing outside the run knows of a wait."""
        return []

    def waits_for(self) -> str:
        """The wait's entry in `waiting_on`."""
        return f"signal {self.name}"


class Mailbox(Struct):
    """A run's signals that no wait has taken and its open waits, both by name, oldest first."""

    received: int = 0
    untaken: dict[str, deque[int]] = {}
    waiting: dict[str, deque[int]] = {}

    def receive(self, event: SignalReceived) -> None:
        """Keep the signal until a wait takes it."""
        if event.signal != self.received:
            raise IllegalTransition(f"signal {event.signal} received, expected number {self.received}")
        self.received += 1
        self.untaken.setdefault(event.name, deque()).append(event.signal)

    def match(self) -> SignalTaken | None:
        """The next take that is due: the oldest open wait (by number) whose name has an untaken signal."""
        if not self.untaken or not self.waiting:
            return None
        due = [(waits[0], name) for name, waits in self.waiting.items() if name in self.untaken]
        if not due:
            return None
        number, name = min(due)
        return SignalTaken(number=number, signal=self.untaken[name][0])


def create(event: SignalAwaited, mailbox: Mailbox) -> Wait:
    """The wait that the event opens."""
    mailbox.waiting.setdefault(event.name, deque()).append(event.number)
    return Wait(number=event.number, name=event.name)


def evolve(wait: Wait, event: SignalTaken | SignalWaitCancelled, mailbox: Mailbox, workflow_id: str) -> None:
    """Apply the event: the wait is over; a taken signal is gone from the mailbox."""
    wait.state = next_state(TRANSITIONS, wait.state, event, who=f"wait {wait.number} of run {workflow_id}")
    _remove(mailbox.waiting, wait.name, wait.number)
    if isinstance(event, SignalTaken):
        _remove(mailbox.untaken, wait.name, event.signal)


def _remove(queues: dict[str, deque[int]], name: str, item: int) -> None:
    queue = queues.get(name)
    if queue is None or item not in queue:
        raise IllegalTransition(f"signal {name}: {item} is not there, found {list(queue or ())}")
    queue.remove(item)
    if not queue:
        del queues[name]
