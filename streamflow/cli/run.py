"""The command `start`."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from streamflow.cli.follow import exit_code, follow, say_failure
from streamflow.cli.session import Session, connected
from streamflow.cli.values import DURATION, INSTANT, JSON, JsonCommand
from streamflow.cli.views import FINISHED
from streamflow.cli.words import safe


@click.command("start", cls=JsonCommand, short_help="Start a run of a workflow.")
@click.argument("workflow")
@click.argument("args", metavar="[JSON_ARG]...", nargs=-1, type=JSON)
@click.option(
    "--id", metavar="ID", help="The run's id; made up when left out. Starting again under one id starts once."
)
@click.option("--delay", type=DURATION, help="Begin after this time: seconds, or 90s, 1h30m, 7d.")
@click.option("--at", type=INSTANT, help="Begin at this instant: ISO 8601 with a zone.")
@click.option("--timeout", type=DURATION, help="Fail the run when it takes longer.")
@click.option(
    "--if-exists",
    type=click.Choice(["attach", "error", "restart"]),
    default="attach",
    show_default=True,
    help="When a run of that id exists: attach to it, fail, or start it again if it is closed.",
)
@click.option("--wait", is_flag=True, help="Follow the run on stderr and print its result; its failure is exit code 1.")
@click.option("--traceback", "-v", is_flag=True, help="With --wait: show the workflow's traceback when it fails.")
@connected
async def start(
    session: Session,
    workflow: str,
    args: tuple[Any, ...],
    id: str | None,
    delay: float | None,
    at: datetime | None,
    timeout: float | None,
    if_exists: Any,
    wait: bool,
    traceback: bool,
) -> int:
    """Start a run of WORKFLOW and print its id. Each argument is one JSON value; - reads it from stdin.

    When the run exists already, stderr says that nothing was started, and in JSON "attached" is true.
    With --json and --wait each change of the run is printed, as `watch` does.

    \b
    Example:
      streamflow start fulfil '{"id": "o-1", "total": 5}' --app shop --id order-1
      streamflow start greet '"Ada"' 3 --app shop --wait
      streamflow start report --app shop --at 2031-05-01T06:00:00+02:00
      streamflow start fulfil - --app shop < order.json
    """
    if delay is not None and at is not None:
        raise click.UsageError("--delay and --at both say when to begin: give one.", click.get_current_context())
    output = session.output
    handle = await session.answer(
        session.client.start(workflow, *args, id=id, delay=delay, at=at, timeout=timeout, if_exists=if_exists)
    )
    if handle.attached:
        output.say(f"Run {safe(handle.id)} exists already: attached to it; nothing was started.")
    if not wait:
        if output.as_json:
            output.document({"id": handle.id, "workflow": workflow, "attached": handle.attached})
        else:
            output.text(safe(handle.id))
            output.hint(f"Follow it with: streamflow watch {safe(handle.id)} --app {session.app}")
        return 0
    last = await follow(session, handle, on_stderr=not output.as_json)
    if not output.as_json and last.state == FINISHED:
        output.value(last.result)
    elif not output.as_json:
        say_failure(output, last, traceback=traceback)
    return exit_code(last)
