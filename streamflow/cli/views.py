"""A run's status, steps and events as rows of text; the same rows serve the terminal and the pipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from streamflow.cli import words
from streamflow.cli.output import Cell
from streamflow.cli.words import STYLES, Clock

if TYPE_CHECKING:
    from streamflow import ErrorInfo, HistoryEvent, RunStatus, StepView

FINISHED: Final = "completed"

STEP_COLUMNS: Final = ("#", "name", "kind", "state", "attempts", "duration", "error")
LIST_COLUMNS: Final = ("id", "workflow", "state", "created", "took", "detail")


def state_cell(state: str) -> Cell:
    """The state in its colour."""
    return Cell(words.safe(state), STYLES.get(state, ""))


def error_text(error: ErrorInfo) -> str:
    """Type and message on one line."""
    return words.one_line(str(error))


def status_rows(status: RunStatus, clock: Clock) -> Iterator[tuple[str, Cell]]:
    """Everything about a run, most wanted first."""
    yield "id", Cell(words.safe(status.id), "bold")
    yield "workflow", Cell(words.safe(status.workflow))
    yield "state", state_cell(status.state)
    if status.progress is not None:
        yield "progress", Cell(words.compact(status.progress))
    for entry in status.waiting_on:
        yield "waiting on", Cell(words.waiting(entry, clock))
    if status.state == FINISHED:
        yield "result", Cell(words.compact(status.result), "green")
    if status.error is not None:
        yield "error", Cell(error_text(status.error), "red")
    if status.reason:
        yield "reason", Cell(words.one_line(status.reason))
    if status.created_at is not None and status.started_at is None:
        yield "created", Cell(clock.instant(status.created_at))
    if status.started_at is not None:
        yield "started", Cell(clock.instant(status.started_at))
    if status.closed_at is not None:
        yield "closed", Cell(clock.instant(status.closed_at))
        yield "took", Cell(run_duration(status, clock))
    yield "arguments", Cell(words.compact(status.args))
    if status.context is not None:
        yield "context", Cell(words.compact(status.context))
    yield "turn", Cell(f"{status.turn} of run {status.run}")


def run_duration(status: RunStatus, clock: Clock) -> str:
    """How long the code has been at it, or was."""
    if status.started_at is None:
        return ""
    return words.duration(max(0.0, ((status.closed_at or clock.now) - status.started_at).total_seconds()))


def detail(status: RunStatus, clock: Clock) -> Cell:
    """The one thing to know about a run in this state, on one line."""
    if status.error is not None:
        return Cell(error_text(status.error), "red")
    if status.state == FINISHED:
        return Cell(words.compact(status.result), "dim")
    if status.reason:
        return Cell(words.one_line(status.reason))
    parts = [words.compact(status.progress)] if status.progress is not None and not status.is_closed else []
    if status.waiting_on:
        parts.append("waiting on " + ", ".join(words.waiting(entry, clock) for entry in status.waiting_on))
    return Cell("; ".join(parts))


def list_row(status: RunStatus, clock: Clock) -> tuple[Cell, ...]:
    """A run as a row under `LIST_COLUMNS`."""
    return (
        Cell(words.safe(status.id), "bold"),
        Cell(words.safe(status.workflow)),
        state_cell(status.state),
        Cell("" if status.created_at is None else clock.time(status.created_at)),
        Cell(run_duration(status, clock)),
        detail(status, clock),
    )


def step_row(step: StepView, clock: Clock) -> tuple[Cell, ...]:
    """A step as a row under `STEP_COLUMNS`."""
    note = "" if step.error is None else error_text(step.error)
    if step.next_attempt_at is not None:
        what = "until" if step.kind == "sleep" else "next attempt"
        note = f"{note}{'; ' if note else ''}{what} {clock.instant(step.next_attempt_at)}"
    return (
        Cell(str(step.number), "dim"),
        Cell(words.safe(step.name), "bold"),
        Cell(step.kind, "dim"),
        state_cell(step.state),
        Cell(str(step.attempts) if step.kind == "step" else ""),
        Cell(step_duration(step, clock)),
        Cell(note, "red" if step.error is not None else ""),
    )


def step_duration(step: StepView, clock: Clock) -> str:
    """From the start of its first attempt to its end, or to now; nothing before that start."""
    if step.started_at is None:
        return ""
    return words.duration(max(0.0, ((step.closed_at or clock.now) - step.started_at).total_seconds()))


def event_cells(event: HistoryEvent, clock: Clock) -> tuple[Cell, Cell, Cell, Cell]:
    """Turn, time, type and fields of an event."""
    fields: dict[str, Any] = event.fields
    # What says nothing to people is left to --json: absent values, flags that are off, the hash of the arguments.
    shown = [
        words.field(name, value, clock)
        for name, value in fields.items()
        if value is not None and value is not False and name != "fingerprint"
    ]
    return (
        Cell(str(event.turn), "dim"),
        Cell(clock.time(event.at), "dim"),
        Cell(event.type, "bold"),
        Cell(" ".join(shown)),
    )


def traceback_text(error: ErrorInfo) -> str:
    """The traceback as the worker recorded it, or its absence."""
    return words.safe(error.traceback.rstrip(), keep="\n") if error.traceback else "No traceback was recorded."
