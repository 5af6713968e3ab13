"""What the writing half of a log asks of the wire beneath it: a lane takes records, and says later what became of them.

The product's lane is an idempotent Kafka producer (`kafka_lane.py`); the simulator plays one together with its brokers
(`sim/lane.py`). What both say is the same, so `writing.py`, which makes the port's promises of it, knows neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from streamflow.errors import StreamflowError

CLOSE_SECONDS: Final = 5.0
"""How long who closes waits for what is under way."""


class Refusal(NamedTuple):
    """Why a record is not known to be in the log. `error`: what its caller is told, where trying again is no use."""

    text: str
    error: StreamflowError | None = None


class NotTaken(Exception):
    """A lane took not all of what it was given: it is full, or has failed."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text)
        self.refusal = refusal


class Sent:
    """Records that were handed over together. `left` counts those without an acknowledgement."""

    __slots__ = ("error", "found", "left")

    def __init__(self, count: int) -> None:
        self.left = count
        self.error: Refusal | None = None
        """Of the record that failed first."""
        self.found: int | None = None
        """The offset at which a record was found that was expected elsewhere; -1 if the broker did not say."""

    def acknowledged(self, offset: int | None, expected: int) -> bool:
        """One of them is in the log; `expected` is -1 where any offset will do. True: nothing is left to wait for.

        Nothing but the expected offset proves that nobody wrote before; duplicates come without any offset.
        """
        if expected >= 0 and offset != expected and self.found is None:
            self.found = -1 if offset is None else offset
        self.left -= 1
        return not self.left

    def refused(self, refusal: Refusal) -> bool:
        """One of them may be in the log or not. True: nothing is left to wait for."""
        self.error = self.error or refusal
        self.left -= 1
        return not self.left


class Lane(Protocol):
    """One producer. It calls `delivered(lane, sent)` on the event loop with all of whose records something is known.

    It calls it with nothing, too: when it has failed. A lane is never repaired: after an error whose outcome is unknown
    it is dropped with all that it still holds, and its owner makes another.
    """

    name: str
    dropped: bool
    failed: bool
    """Whether this producer can go on no more; of what it took, nothing more is heard."""
    closed: asyncio.Future[None]
    """Done when nothing of it is left to wait for."""

    def message(self, key: bytes, value: bytes | None, sent: Sent, expected: int = -1) -> dict[str, Any]:
        """One record of `sent`, as `send` takes it; with `expected` its acknowledgement must name that offset."""
        ...

    def send(self, topic: str, partition: int, messages: list[dict[str, Any]]) -> None:
        """Hand over records that belong together. Raises `NotTaken` when not all of them were taken."""
        ...

    def drop(self) -> None:
        """Forget what is not acknowledged, and end. What is under way may still reach the log."""
        ...

    def close(self) -> None:
        """End once all is acknowledged; `closed` is done then."""
        ...


MakeLane = Callable[[str, Callable[[Any, list[Sent]], None]], Lane]
"""A lane from its name and what it calls with (itself, sent)."""
