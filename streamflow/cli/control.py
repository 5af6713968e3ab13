"""The commands that act on a run: `signal`, `cancel`, `terminate`, `cleanup`."""

from __future__ import annotations

from typing import Any

import click

from streamflow.cli.session import Session, connected
from streamflow.cli.values import JSON, JsonCommand
from streamflow.cli.words import safe


@click.command("signal", cls=JsonCommand, short_help="Send a run a signal.")
@click.argument("id")
@click.argument("name")
@click.argument("value", metavar="[JSON]", type=JSON, required=False)
@click.option("--error", metavar="TEXT", help="Send an error instead of a value: the wait raises SignalError.")
@click.option("--signal-id", metavar="ID", help="Sending again under one id signals once.")
@connected
async def signal(session: Session, id: str, name: str, value: Any, error: str | None, signal_id: str | None) -> None:
    """Send a run a signal. Its value is JSON, null when left out, and read from stdin when it is -.

    \b
    Example:
      streamflow signal order-1 approved true --app shop
      streamflow signal order-1 note '"call me"' --app shop --signal-id note-7
      streamflow signal order-1 approved --error "fraud suspected" --app shop
    """
    if error is not None and value is not None:
        raise click.UsageError("A signal has a value or an --error, not both.", click.get_current_context())
    await session.answer(session.handle(id).signal(name, value, error=error, id=signal_id))
    _accepted(session, id, f"Signal {safe(name)} sent to {safe(id)}.", signal=name)


@click.command("cancel", short_help="Ask a run to unwind and stop.")
@click.argument("id")
@connected
async def cancel(session: Session, id: str) -> None:
    """Ask a run to unwind and stop: CancelledError is raised in its code, whose clean-up still runs.

    \b
    Example:
      streamflow cancel order-1 --app shop
    """
    await session.answer(session.handle(id).cancel())
    _accepted(session, id, f"{safe(id)} was asked to cancel; follow it with: streamflow watch {safe(id)}")


@click.command("terminate", short_help="Stop a run where it stands.")
@click.argument("id")
@click.option("--reason", metavar="TEXT", help="Why, for whoever looks at the run later.")
@connected
async def terminate(session: Session, id: str, reason: str | None) -> None:
    """Stop a run where it stands: no more of its code runs, not even clean-up. `cancel` is gentler.

    \b
    Example:
      streamflow terminate order-1 --reason "a duplicate of order-2" --app shop
    """
    await session.answer(session.handle(id).terminate(reason))
    _accepted(session, id, f"{safe(id)} is terminated.")


@click.command("cleanup", short_help="Delete a closed run and all that is known of it.")
@click.argument("id")
@click.option("--force", is_flag=True, help="Terminate the run first if it is open.")
@connected
async def cleanup(session: Session, id: str, force: bool) -> int:
    """Delete a closed run and all that is known of it: its steps, signals and history.

    \b
    Example:
      streamflow cleanup order-1 --app shop
    """
    cleaned = await session.answer(session.handle(id).cleanup(force=force))
    if session.output.as_json:
        session.output.document({"id": id, "cleaned": cleaned})
    elif cleaned:
        session.output.say(f"{safe(id)} is deleted.")
    if not cleaned:
        session.output.say(f"Error: {safe(id)} is still open, so it was kept: wait, cancel it, or say --force")
    return 0 if cleaned else 1


def _accepted(session: Session, id: str, text: str, **more: str) -> None:
    """Nothing to print but that it was accepted."""
    if session.output.as_json:
        session.output.document({"id": id, **more, "accepted": True})
    else:
        session.output.say(text)
