"""The commands that wait: `watch` and `result`."""

from __future__ import annotations

import click

from streamflow.cli import views
from streamflow.cli.follow import exit_code, follow
from streamflow.cli.session import Session, connected
from streamflow.cli.values import DURATION
from streamflow.cli.words import duration, safe
from streamflow.errors import WorkflowFailed


@click.command("watch", short_help="Follow a run until it closes.")
@click.argument("id")
@click.option("--traceback", "-v", is_flag=True, help="Show the workflow's traceback when it fails.")
@connected
async def watch(session: Session, id: str, traceback: bool) -> int:
    """Follow a run until it closes: live on a terminal, a line for each change in a pipe.

    The exit code is 0 when the run completed, 1 when it failed, was cancelled or terminated.

    \b
    Example:
      streamflow watch order-1 --app shop
      streamflow watch order-1 --app shop --json | jq -c '[.turn, .state, .progress]'
    """
    last = await follow(session, session.handle(id))
    if traceback and last.error is not None:
        session.output.say(views.traceback_text(last.error))
    return exit_code(last)


@click.command("result", short_help="Wait for a run and print its result.")
@click.argument("id")
@click.option("--timeout", type=DURATION, help="Give up waiting after this time; the run goes on.")
@click.option("--traceback", "-v", is_flag=True, help="Show the workflow's traceback when it failed.")
@connected
async def result(session: Session, id: str, timeout: float | None, traceback: bool) -> None:
    """Wait until a run closes and print its result, which is JSON. A run that failed is an error, exit code 1.

    \b
    Example:
      streamflow result order-1 --app shop
      streamflow result order-1 --app shop --timeout 30s | jq .payment
    """
    handle = session.handle(id)
    await session.answer(handle.status())
    try:
        found = await handle.result(timeout)
    except TimeoutError:
        waited = duration(timeout or 0)
        raise click.ClickException(f"{safe(id)} is still open after {waited}; it goes on") from None
    except WorkflowFailed as error:
        if traceback:
            session.output.say(views.traceback_text(error.error))
        raise
    session.output.value(found)
