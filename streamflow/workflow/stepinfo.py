"""What a step may know of itself while it runs: `sf.step_info()`."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Any

from streamflow.errors import InvalidArguments


class StepInfo:
    """The attempt that is running. `idempotency_key` is the same for all attempts; `details` are of `sf.heartbeat`."""

    __slots__ = ("_cancelled", "attempt", "details", "number", "run", "step", "workflow_id")

    def __init__(self, *, workflow_id: str, run: int, step: str, number: int, attempt: int) -> None:
        self.workflow_id = workflow_id
        self.run = run
        self.step = step
        self.number = number
        self.attempt = attempt
        self.details: Any = None
        self._cancelled: threading.Event | None = None

    @property
    def idempotency_key(self) -> str:
        """Stable over attempts and workers, different for every step of every run."""
        return f"{self.workflow_id}/{self.run}/{self.number}"

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for this attempt any more; thread-safe, for plain functions to look at."""
        return self._cancelled is not None and self._cancelled.is_set()

    def give_threads(self) -> None:
        """Make `cancelled` visible to the thread that will run the attempt."""
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Tell the attempt that nobody waits for it."""
        if self._cancelled is None:
            self._cancelled = threading.Event()
        self._cancelled.set()


running: ContextVar[StepInfo] = ContextVar("streamflow_step")


def step_info() -> StepInfo:
    """The attempt that is running; `InvalidArguments` outside of a step that a worker runs."""
    try:
        return running.get()
    except LookupError:
        raise InvalidArguments(
            "sf.step_info() works only inside a step that a worker runs, not when the function is called directly"
        ) from None


def heartbeat(details: object = None) -> None:
    """Note how far a long attempt has come, as `sf.step_info().details`. Nothing is sent.

    That the attempt is alive is known without it: a worker that dies loses its place in the group, and its attempts
    begin again elsewhere. What hangs in a worker that lives is for `timeout=`.
    """
    step_info().details = details
