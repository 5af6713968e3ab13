"""What the processor of a partition counts; the metrics themselves are in metrics.py, the gauges in gauges.py.

Counted is what is durable, once a batch; blocked runs alone are counted when they are decided, since they are news.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Final

from streamflow.core.effects import StatusRecord
from streamflow.core.events import (
    Event,
    RunBlocked,
    RunCancelled,
    RunCompleted,
    RunCreated,
    RunFailed,
    RunTerminated,
)
from streamflow.core.inputs import CodeFactory
from streamflow.core.machines.run import RunState
from streamflow.core.partition import Decided, DecidedTurn
from streamflow.metrics import (
    APPEND_DURATION,
    DECIDE_DURATION,
    LATE_OUTCOMES,
    RESTORE_DURATION,
    RUNS_BLOCKED,
    RUNS_CLOSED,
    RUNS_STARTED,
    TURNS,
    UNKNOWN,
)

log_ = logging.getLogger("streamflow.worker")

BLOCKED: Final = RunState.BLOCKED
CLOSING: Final[dict[type[Event], str]] = {
    RunCompleted: "completed",
    RunFailed: "failed",
    RunCancelled: "cancelled",
    RunTerminated: "terminated",
}


# Looking up a child by its labels costs 2 us. There are as many as the app has workflows, by the rule for labels.
_started = cache(RUNS_STARTED.labels)
_closed = cache(RUNS_CLOSED.labels)


class Observer:
    """Counts for one life of a partition."""

    def __init__(self, code_of: Callable[[str], CodeFactory | None]) -> None:
        self.blocked: set[str] = set()
        """The runs of the partition that are blocked now, once it is active."""
        self._code_of = code_of
        self._begun_at = time.perf_counter()

    def active(self) -> None:
        """The partition is taken over."""
        RESTORE_DURATION.observe(time.perf_counter() - self._begun_at)

    def found(self, statuses: Iterable[StatusRecord | None]) -> None:
        """Runs that the last owner left open."""
        for status in statuses:
            if status is not None and status.state == BLOCKED:
                self.blocked.add(status.workflow_id)

    def decided(self, decided: Decided, begun_at: float) -> None:
        """A pass, begun at that moment of `time.perf_counter`, is over."""
        if decided.late:
            LATE_OUTCOMES.inc(decided.late)
        if decided.turns:
            DECIDE_DURATION.observe(time.perf_counter() - begun_at)

    def turn(self, item: DecidedTurn) -> None:
        """A turn is decided; a run that is blocked by it is said in the log."""
        if item.run.state is BLOCKED:
            workflow_id = item.turn.workflow_id
            for event in item.turn.events:  # found on load, it comes before the input that had the run loaded
                if isinstance(event, RunBlocked):
                    RUNS_BLOCKED.inc()
                    log_.error("run %s is blocked: %s", workflow_id, event.error.message)
            self.blocked.add(workflow_id)
        elif self.blocked:
            self.blocked.discard(item.turn.workflow_id)

    def appended(self, turns: Sequence[DecidedTurn], begun_at: float) -> None:
        """Turns, handed to the log at that moment, are durable."""
        APPEND_DURATION.observe(time.perf_counter() - begun_at)
        if not turns:
            return
        TURNS.inc(len(turns))
        for item in turns:
            for event in item.turn.events:
                kind = type(event)
                if kind in CLOSING:
                    _closed(self._label(item.run.workflow), CLOSING[kind]).inc()
                elif type(event) is RunCreated:
                    _started(self._label(event.workflow)).inc()

    def _label(self, workflow: str) -> str:
        """Anyone may name a workflow in a command: only those of the app are labels."""
        return UNKNOWN if self._code_of(workflow) is None else workflow
