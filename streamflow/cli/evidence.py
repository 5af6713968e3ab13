"""What really happened, told by two witnesses that do not ask the engine: the log, and lines that the steps wrote.

A step that is wrapped in `recorded()` appends a line to a file when an attempt starts and when it ends:

    order-0017 3 1 started 1767225600123 4711 .      workflow id, number, attempt, what, ms since the epoch, process

`History` folds the history topic with the reading rule that every reader follows. `examine` compares the two:

- A step is *lost* when it was scheduled and has not exactly one outcome in the log.
- A step was *run again* when an attempt of it started after its completion was in the log. That must never happen.
- An attempt was *repeated* when it started more than once: a worker died before the outcome was durable. That may
  happen, steps are at-least-once until then.
- An attempt is *unknown* when the log never scheduled it: it started before its turn was durable.
- A step is *unperformed* when the log says completed, and no line says that an attempt finished.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import streamflow as sf
from streamflow.codec.avro import decode_history
from streamflow.codec.turns import turns_of
from streamflow.core.events import (
    Claim,
    Consumed,
    Event,
    RunCancelled,
    RunCompleted,
    RunCreated,
    RunFailed,
    RunSnapshot,
    RunTerminated,
    SignalAwaited,
    SignalTaken,
    SignalWaitCancelled,
    StepAttemptFailed,
    StepCancelled,
    StepCompleted,
    StepDue,
    StepFailed,
    StepScheduled,
    TimerCancelled,
    TimerFired,
    TimerSet,
    Turn,
)
from streamflow.core.reading import Assembler, ReadingRule
from streamflow.logs.base import HISTORY, Log

LINES_VARIABLE: Final = "STREAMFLOW_STEP_LINES"
"""The environment variable that names the file of the lines; without it nothing is written."""

END: Final = " ."
"""The last characters of each line that is whole."""

STARTED, FINISHED, FAILED = "started", "finished", "failed"


# ---------------------------------------------------------------------------------------------------- the steps' lines


class Line(NamedTuple):
    """One line that a step wrote."""

    workflow_id: str
    number: int
    attempt: int
    what: str
    at_ms: int
    pid: int


@cache
def _file(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def write_line(what: str) -> None:
    """Append a line about the running step's attempt: one write, so that lines of several processes never mix.

    A kill can cut even that at the end of a page. So a line brings the line break before it, and ends with a mark.
    """
    path = os.environ.get(LINES_VARIABLE)
    if path:
        info = sf.step_info()
        at_ms = time.time_ns() // 1_000_000
        text = f"{info.workflow_id} {info.number} {info.attempt} {what} {at_ms} {os.getpid()}"
        os.write(_file(path), f"\n{text}{END}".encode())


@contextmanager
def recorded() -> Iterator[None]:
    """Write when the attempt in the block starts, and how it ends; killed in between, it leaves only its start."""
    write_line(STARTED)
    try:
        yield
    except BaseException:
        write_line(FAILED)
        raise
    write_line(FINISHED)


def read_lines(path: Path) -> list[Line]:
    """The lines so far; one that a kill cut in the middle does not count."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if text.endswith(END):
            workflow_id, number, attempt, what, at_ms, pid = text.removesuffix(END).rsplit(" ", 5)
            lines.append(Line(workflow_id, int(number), int(attempt), what, int(at_ms), int(pid)))
    return lines


# --------------------------------------------------------------------------------------------------------- the history


@dataclass(slots=True)
class StepFacts:
    """A step as the log has it. `outcomes` holds (event, at) of each outcome: exactly one when all is well."""

    name: str
    failed_attempts: int = 0
    backing_off: bool = False
    outcomes: list[tuple[Event, int]] = field(default_factory=list)

    @property
    def completed_at(self) -> int | None:
        """When its completion was decided, in ms since the epoch; None while it is not."""
        return next((at for event, at in self.outcomes if isinstance(event, StepCompleted)), None)


@dataclass(slots=True)
class RunFacts:
    """A run as the log has it. `closed` is the class of the event that closed it."""

    workflow: str
    steps: dict[int, StepFacts] = field(default_factory=dict)
    timers: dict[int, int] = field(default_factory=dict)
    waits: dict[int, str] = field(default_factory=dict)
    closed: type[Event] | None = None
    closed_at: int = 0

    @property
    def phase(self) -> str:
        """In a word, what the run does now."""
        if self.closed is not None:
            return "completed" if self.closed is RunCompleted else self.closed.__name__.removeprefix("Run").lower()
        open_steps = [step for step in self.steps.values() if not step.outcomes]
        if any(not step.backing_off for step in open_steps):
            return "working"
        if open_steps:
            return "backing off"
        # A wait with a timeout has a timer too, so the wait is looked at first.
        return "waiting" if self.waits else "sleeping" if self.timers else "working"


class History:
    """All history partitions of an app, folded record by record, in offset order per partition."""

    def __init__(self) -> None:
        self.runs: dict[str, RunFacts] = {}
        self.claims: list[tuple[int, Claim]] = []
        self.records = 0
        self._rules: dict[int, tuple[ReadingRule, Assembler]] = {}

    def owners(self) -> dict[int, list[str]]:
        """Who claimed each partition, one after another."""
        owners: dict[int, list[str]] = {}
        for partition, claim in self.claims:
            owners.setdefault(partition, []).append(claim.owner)
        return owners

    def take(self, partition: int, value: bytes) -> Turn | None:
        """Take the next record of the partition; the turn when one is whole with it."""
        self.records += 1
        rule, parts = self._rules.setdefault(partition, (ReadingRule(), Assembler()))
        record = decode_history(value)
        if not rule.accepts(record):
            return None
        if isinstance(record, Claim):
            parts.drop()
            self.claims.append((partition, record))
            return None
        if isinstance(record, Consumed):
            return None
        whole = parts.add(record)
        if isinstance(whole, RunSnapshot):  # the run so far: what there was of it before may be trimmed
            self.runs.pop(whole.workflow_id, None)
            for turn, _ in turns_of(whole):
                self._take_turn(turn)
            return None
        if whole is not None:
            self._take_turn(whole)
        return whole

    def _take_turn(self, turn: Turn) -> None:
        for event in turn.events:
            if isinstance(event, RunCreated) or turn.workflow_id in self.runs:  # else its beginning was trimmed
                self._take_event(turn, event)

    def _take_event(self, turn: Turn, event: Event) -> None:
        if isinstance(event, RunCreated):
            self.runs[turn.workflow_id] = RunFacts(event.workflow)
            return
        run = self.runs[turn.workflow_id]
        match event:
            case StepScheduled():
                run.steps[event.number] = StepFacts(event.name)
            case StepAttemptFailed():
                run.steps[event.number].failed_attempts += 1
                run.steps[event.number].backing_off = True
            case StepDue():
                run.steps[event.number].backing_off = False
            case StepCompleted() | StepFailed() | StepCancelled():
                run.steps[event.number].outcomes.append((event, turn.at))
            case TimerSet():
                run.timers[event.number] = event.fire_at
            case TimerFired() | TimerCancelled():
                run.timers.pop(event.number, None)
            case SignalAwaited():
                run.waits[event.number] = event.name
            case SignalTaken() | SignalWaitCancelled():
                run.waits.pop(event.number, None)
            case RunCompleted() | RunFailed() | RunCancelled() | RunTerminated():
                run.closed, run.closed_at = type(event), turn.at
            case _:
                pass  # what the checks and the view do not need

    def phases(self) -> Counter[str]:
        """How many runs are in which phase."""
        return Counter(run.phase for run in self.runs.values())

    @property
    def completed(self) -> int:
        """How many runs have completed."""
        return sum(run.closed is RunCompleted for run in self.runs.values())


async def read_history(log: Log) -> History:
    """The whole history of the log's app, as far as it is durable now."""
    history = History()
    for partition in range(log.partitions):
        offset = await log.start_offset(HISTORY, partition)
        while batch := await log.read(HISTORY, partition, offset):
            for record in batch:
                assert record.value is not None, record
                history.take(partition, record.value)
            offset = batch[-1].offset + 1
    return history


# -------------------------------------------------------------------------------------------------------- both together


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the two witnesses say together. The lists name steps; the first four must be empty."""

    lost: list[str]
    run_again: list[str]
    unknown: list[str]
    unperformed: list[str]
    runs: int
    runs_completed: int
    steps: int
    failed_attempts: int
    repeated_attempts: int

    @property
    def all_well(self) -> bool:
        """Whether no promise was broken."""
        return not (self.lost or self.run_again or self.unknown or self.unperformed)


def examine(history: History, lines: Iterable[Line], *, with_ends: bool = True) -> Findings:
    """Compare the log with the lines. `with_ends=False`: the steps wrote only when they started."""
    started: dict[tuple[str, int], list[Line]] = {}
    finished: set[tuple[str, int]] = set()
    for line in lines:
        if line.what == STARTED:
            started.setdefault((line.workflow_id, line.number), []).append(line)
        elif line.what == FINISHED:
            finished.add((line.workflow_id, line.number))
    steps = {
        (workflow_id, number): step for workflow_id, run in history.runs.items() for number, step in run.steps.items()
    }
    run_again, repeated = [], 0
    for key, starts in started.items():
        completed_at = steps[key].completed_at if key in steps else None
        late = [line for line in starts if completed_at is not None and line.at_ms > completed_at]
        run_again += [_name(key, f"attempt {line.attempt} at {line.at_ms}") for line in late]
        repeated += len(starts) - len(late) - len({line.attempt for line in starts if line not in late})
    performed = finished if with_ends else set(started)
    return Findings(
        lost=[_name(key, f"{len(step.outcomes)} outcomes") for key, step in steps.items() if len(step.outcomes) != 1],
        run_again=run_again,
        unknown=[_name(key) for key in started if key not in steps],
        unperformed=[
            _name(key, step.name)
            for key, step in steps.items()
            if step.completed_at is not None and key not in performed
        ],
        runs=len(history.runs),
        runs_completed=history.completed,
        steps=len(steps),
        failed_attempts=sum(step.failed_attempts for step in steps.values()),
        repeated_attempts=repeated,
    )


def _name(key: tuple[str, int], more: str = "") -> str:
    workflow_id, number = key
    return f"step {number} of {workflow_id}" + (f" ({more})" if more else "")
