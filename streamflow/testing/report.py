"""What a failed simulation says: what broke, when, under which seed, how to play it again, and what happened last."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any, Final

import streamflow
from streamflow.core.events import Event, Turn
from streamflow.projections.views import RunStatus, history_event

EVENTS_SHOWN: Final = 25
FIELD_CHARS_MAX: Final = 60
RUNS_SHOWN: Final = 10
LIBRARIES: Final = (str(Path(streamflow.__file__).parent), str(Path(asyncio.__file__).parent))
TELLING: Final = ("name", "number", "attempt", "value", "result", "error", "retry_at", "fire_at", "reason")
"""The fields of events that a reader wants, of those that they have."""


class SimulationFailed(AssertionError):
    """A simulated test failed. The original exception, if there is one, is the `__cause__`.

    `seed` and `again` play it again; `faults` went wrong, in order; `last` are the last events, oldest first.
    """

    def __init__(
        self,
        message: str,
        *,
        seed: int,
        again: str,
        faults: Sequence[str],
        last: Sequence[str],
        virtual_seconds: float,
    ) -> None:
        super().__init__(message)
        self.seed = seed
        self.again = again
        self.faults = list(faults)
        self.last = list(last)
        self.virtual_seconds = virtual_seconds


def describe(
    what: str,
    *,
    seed: int,
    now: datetime,
    virtual_seconds: float,
    again: str,
    faults: Sequence[str],
    open_runs: Iterable[RunStatus],
    last: Sequence[str],
) -> str:
    """The text of a failure."""
    lines = [
        f"seed {seed}, after {virtual_seconds:,.3f} s of the world's time ({now:%Y-%m-%d %H:%M:%S} UTC): {what}",
        "",
        f"Play it again: {again}",
    ]
    if faults:
        lines += ["", "What went wrong on purpose:", *(f"  {fault}" for fault in faults)]
    runs = list(open_runs)
    if runs:
        lines += ["", "Runs that are not closed:", *(f"  {run_line(run)}" for run in runs[:RUNS_SHOWN])]
        if len(runs) > RUNS_SHOWN:
            lines.append(f"  and {len(runs) - RUNS_SHOWN} more")
    if last:
        lines += ["", "The last events, by the world's time in seconds:", *(f"  {event}" for event in last)]
    return "\n".join(lines)


def run_line(run: RunStatus) -> str:
    """One run, its state, and what it waits for."""
    waiting = f", waits for {', '.join(run.waiting_on)}" if run.waiting_on else ""
    why = f": {run.reason}" if run.reason else f": {run.error}" if run.error is not None else ""
    return f"{run.id} ({run.workflow}): {run.state}{waiting}{why}"


def event_line(turn: Turn, event: Event) -> str:
    """One recorded event in a few words."""
    shown = history_event(turn, event)
    said = []
    for name in TELLING:
        value: Any = shown.fields.get(name)
        if value is None:
            continue
        if name == "error" and isinstance(value, dict):
            value = f"{value['type']}: {value['message']}"
        if name.endswith("_at"):
            value = f"{(value - turn.at) / 1000:+g} s"
        said.append(f"{name}={textwrap.shorten(str(value), FIELD_CHARS_MAX, placeholder='…')}")
    return f"{shown.type} {' '.join(said)}".rstrip()


def event_name(event: Event) -> str:
    """The type of an event, and the name in it, if there is one."""
    return f"{type(event).__name__} {getattr(event, 'name', '')}".rstrip()


def waits_at(coroutine: object) -> str | None:
    """Where a coroutine waits, by the innermost line that its author wrote; None if it is none, or does not wait."""
    found: str | None = None
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        code = frame.f_code
        if found is None or not code.co_filename.startswith(LIBRARIES):
            found = f"{PurePath(code.co_filename).name}:{frame.f_lineno}, in {code.co_name}"
        coroutine = getattr(coroutine, "cr_await", None)
    return found


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of its text."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
