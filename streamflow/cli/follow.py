"""Following a run until it closes: JSON lines, a line for each change, or a live view on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from streamflow.cli import views
from streamflow.cli.output import Output
from streamflow.cli.session import Session
from streamflow.cli.words import clock, safe

if TYPE_CHECKING:
    from streamflow import Handle, RunStatus


async def follow(session: Session, handle: Handle[Any], *, on_stderr: bool = False) -> RunStatus:
    """Show each change of the run until it closes, on stdout or stderr; its last status."""
    changes = session.answers(handle.watch())
    output = session.output
    last: RunStatus | None = None
    if output.is_live(on_stderr):
        from streamflow.cli.live import LiveView

        async with LiveView(output.console(on_stderr=on_stderr), handle) as view:
            async for last in changes:
                view.show(last)
    else:
        async for last in changes:
            if output.as_json:
                output.line(last)
            else:
                click.echo(change_line(last), file=sys.stderr if on_stderr else sys.stdout)
    assert last is not None and last.is_closed, last
    return last


def change_line(status: RunStatus) -> str:
    """When it was seen, the state, the turn, and what there is to know."""
    now = clock(short=False)
    line = f"{now.time(now.now)}  {status.state:<10}  turn {status.turn:<4}  {views.detail(status, now).text}"
    return line.rstrip()


def exit_code(status: RunStatus) -> int:
    """0 when the run completed, else 1."""
    return 0 if status.state == views.FINISHED else 1


def say_failure(output: Output, status: RunStatus, *, traceback: bool) -> None:
    """Why there is no result."""
    if traceback and status.error is not None:
        output.say(views.traceback_text(status.error))
    why = "" if status.error is None else f": {views.error_text(status.error)}"
    output.say(f"Error: workflow {safe(status.id)} {'' if status.state == 'failed' else 'was '}{status.state}{why}")
