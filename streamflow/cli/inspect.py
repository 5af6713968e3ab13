"""The commands that look: `status`, `steps`, `history`, `list`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from streamflow.cli import views
from streamflow.cli.output import Output
from streamflow.cli.session import Session, connected
from streamflow.cli.words import safe
from streamflow.errors import Unavailable

if TYPE_CHECKING:
    from streamflow import RunStatus

F = TypeVar("F", bound=Callable[..., Any])

STATES: Final = ("scheduled", "running", "paused", "blocked", "completed", "failed", "cancelled", "terminated")
PAGE: Final = 100
PAGE_MAX: Final = 1000

STATUS_SECONDS: Final = 5.0
"""How long `status` waits for a worker before it shows what was published last: longer than an answer takes under load,
shorter than people wait. A worker that restores much answers later, and then the published status is as good."""


def _paged(default_order: str) -> Callable[[F], F]:
    """The options of a page."""

    def add(function: F) -> F:
        for option in (
            click.option("--cursor", help="Go on behind an earlier page."),
            click.option(
                "--order",
                type=click.Choice(["asc", "desc"]),
                default=default_order,
                show_default=True,
                help="asc is oldest first, desc newest first.",
            ),
            click.option(
                "--limit", type=click.IntRange(1, PAGE_MAX), default=PAGE, show_default=True, help="Rows at most."
            ),
        ):
            function = option(function)
        return function

    return add


def _say_more(output: Output, cursor: str | None) -> None:
    if cursor is not None:
        output.say(f"There are more: --cursor {cursor}")


@click.command("status", short_help="Show where a run stands and what it waits for.")
@click.argument("id")
@click.option("--traceback", "-v", is_flag=True, help="Show the workflow's traceback too.")
@connected
async def status(session: Session, id: str, traceback: bool) -> None:
    """Show where a run stands and what it waits for.

    The worker that owns the run is asked. When none answers, the last published status is shown: stderr says so, and in
    JSON "answered" is false.

    \b
    Example:
      streamflow status order-1 --app shop
      streamflow status order-1 --app shop --json | jq -r .state
    """
    found, answered = await session.answer(_status(session, id))
    if not answered:
        session.output.say(
            f"No worker of app {session.app} answered within {STATUS_SECONDS:g} s: this is the last published status "
            f"of {safe(id)}, and nothing moves until one runs (streamflow worker MODULE:APP)"
        )
    if session.output.as_json:
        session.output.document(asdict(found) | {"answered": answered})
        return
    session.output.fields(views.status_rows(found, session.clock()))
    if traceback and found.error is not None and found.error.traceback:
        session.output.text(views.traceback_text(found.error))


async def _status(session: Session, id: str) -> tuple[RunStatus, bool]:
    """The status, and whether a worker gave it; else it is the one that was published last."""
    handle = session.handle(id)
    try:
        async with asyncio.timeout(STATUS_SECONDS):
            return await handle.status(), True
    except TimeoutError:
        published = await handle.published()
    if published is None:
        raise Unavailable(
            f"no worker answered for run {id} within {STATUS_SECONDS:g} s, and no status of it is published: check the "
            f"id, and whether a worker for app {session.app} is running on {session.place}"
        )
    return published, False


@click.command("steps", short_help="Show the steps of a run.")
@click.argument("id")
@_paged("asc")
@connected
async def steps(session: Session, id: str, limit: int, order: Any, cursor: str | None) -> None:
    """Show the steps of a run: also its sleeps, its waits for signals and its children.

    \b
    Example:
      streamflow steps order-1 --app shop
      streamflow steps order-1 --app shop --order desc --limit 5
    """
    page = await session.answer(session.handle(id).steps(order=order, limit=limit, cursor=cursor))
    if session.output.as_json:
        session.output.document({"items": page.items, "cursor": page.cursor})
        return
    clock = session.clock()
    rows = [views.step_row(step, clock) for step in page.items]
    session.output.table(views.STEP_COLUMNS, rows, right=("#", "attempts", "duration"))
    _say_more(session.output, page.cursor)


@click.command("history", short_help="Show the recorded events of a run.")
@click.argument("id")
@connected
async def history(session: Session, id: str) -> None:
    """Show the recorded events of a run, oldest first, one a line: turn, time, event, fields.

    \b
    Example:
      streamflow history order-1 --app shop
      streamflow history order-1 --app shop | grep StepAttemptFailed
    """
    events = await session.answer(session.handle(id).history())
    if session.output.as_json:
        session.output.document(events)
        return
    clock = session.clock()
    rows = [views.event_cells(event, clock) for event in events]
    session.output.table(("turn", "at", "event", "fields"), rows, right=("turn",))


@click.command("list", short_help="List the runs of an app.")
@click.option("--workflow", help="Only runs of this workflow.")
@click.option("--state", type=click.Choice(STATES), help="Only runs in this state.")
@_paged("desc")
@connected
async def list_runs(
    session: Session, workflow: str | None, state: Any, limit: int, order: Any, cursor: str | None
) -> None:
    """List the runs of an app, newest first.

    \b
    Example:
      streamflow list --app shop
      streamflow list --app shop --workflow fulfil --state failed --json | jq -r '.items[].id'
    """
    page = await session.answer(
        session.client.list(workflow=workflow, state=state, order=order, limit=limit, cursor=cursor)
    )
    if session.output.as_json:
        session.output.document({"items": page.items, "cursor": page.cursor})
        return
    clock = session.clock()
    if not page.items:
        session.output.say("No runs." if (workflow, state) == (None, None) else "No such runs.")
    else:
        rows = [views.list_row(each, clock) for each in page.items]
        session.output.table(views.LIST_COLUMNS, rows, right=("took",))
    _say_more(session.output, page.cursor)
