"""Workers that are stricter about replay than those of production.

In production code may change between two turns, and the engine lets a step go that the code does not ask for any more.
In a test the code does not change. So whatever a run's history holds, its code must ask for again when it is replayed;
else it decides by something that is not in the history, and the run is blocked.
"""

from __future__ import annotations

from functools import partial
from typing import cast

from streamflow.core.inputs import CodeFactory
from streamflow.core.machines.run import Run
from streamflow.core.replay import Execution
from streamflow.errors import NonDeterminismError
from streamflow.worker.worker import Worker
from streamflow.workflow.code import RunCode
from streamflow.workflow.definitions import Workflow


class StrictCode(RunCode):
    """The code of a run; compared with its history when its replay is over."""

    __slots__ = ("_replayed",)

    def drain(self, at: int, replaying: bool) -> None:
        """Run until everything waits. Raises `NonDeterminismError` when a replay has left something out."""
        replayed, self._replayed = getattr(self, "_replayed", False), replaying
        if replayed and not replaying:
            self._compare()
        super().drain(at, replaying)

    def _compare(self) -> None:
        asked = cast("Execution", self.decisions).asked
        for key, numbers in self.run.occurrences.items():
            if asked.get(key, 0) < len(numbers):
                kind, _, name = key.partition(":")
                raise NonDeterminismError(
                    f"run {self.run.workflow_id} ({self.run.workflow}) does not replay: its history has the {kind} "
                    f"{name!r} {_times(len(numbers))}, the same code now asked for it {_times(asked.get(key, 0))}.\n"
                    f"  It decides by something that is not in the history: chance, a clock, a global, the order of a "
                    f"set.\n"
                    f"  Use sf.random(), sf.uuid4() and sf.now(), or let a step find out."
                )


class StrictWorker(Worker):
    """The product's worker, but for the code that it makes."""

    def _code_of(self, workflow: str) -> CodeFactory | None:
        definition = self.app.workflows.get(workflow)
        return None if definition is None else partial(_make_code, definition)


def _make_code(definition: Workflow[..., object], execution: Execution, run: Run) -> RunCode:
    return StrictCode(definition, execution, run)


def _times(count: int) -> str:
    return {0: "not at all", 1: "once", 2: "twice"}.get(count, f"{count} times")
