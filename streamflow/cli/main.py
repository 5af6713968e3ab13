"""The group of commands. A command's module is imported when it is called, so that `--help` answers at once.

What every command shares is here: exit codes (1 failure, 2 usage, 130 Ctrl-C), one line for what went wrong.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, Final, NamedTuple

import click

from streamflow.errors import InvalidUrl, StreamflowError

EXIT_INTERRUPTED: Final = 130
"""128 + SIGINT, as shells report it."""


class Entry(NamedTuple):
    """Where a command lives and what the overview says of it, which is the first sentence of its own help."""

    module: str
    attribute: str
    summary: str


COMMANDS: Final[dict[str, dict[str, Entry]]] = {
    "Begin": {
        "demo": Entry("demo", "demo", "See a workflow survive its worker, on one SQLite file or on Kafka."),
        "worker": Entry("worker", "worker", "Serve an app: run its workflows and steps until stopped."),
        "broker": Entry("broker", "broker", "Start a real Apache Kafka for development, without Docker."),
    },
    "Runs": {
        "start": Entry("run", "start", "Start a run of a workflow."),
        "watch": Entry("watch", "watch", "Follow a run until it closes."),
        "result": Entry("watch", "result", "Wait for a run and print its result."),
        "signal": Entry("control", "signal", "Send a run a signal."),
        "cancel": Entry("control", "cancel", "Ask a run to unwind and stop."),
        "terminate": Entry("control", "terminate", "Stop a run where it stands."),
        "cleanup": Entry("control", "cleanup", "Delete a closed run and all that is known of it."),
    },
    "Look": {
        "status": Entry("inspect", "status", "Show where a run stands and what it waits for."),
        "steps": Entry("inspect", "steps", "Show the steps of a run."),
        "history": Entry("inspect", "history", "Show the recorded events of a run."),
        "list": Entry("inspect", "list_runs", "List the runs of an app."),
    },
    "Operate": {
        "topics": Entry("topics", "topics", "Create, check or describe the topics of an app on Kafka."),
    },
    "Measure": {
        "bench": Entry("bench", "bench", "Measure how fast streamflow is on this machine."),
        "sim": Entry("sim", "sim", "Run the engine in simulated worlds full of faults."),
    },
}
_ENTRIES: Final = {name: entry for section in COMMANDS.values() for name, entry in section.items()}


class LazyGroup(click.Group):
    """Knows its commands by name, and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_ENTRIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _ENTRIES.get(cmd_name)
        if entry is None:
            return None
        command = getattr(import_module(f"streamflow.cli.{entry.module}"), entry.attribute)
        assert isinstance(command, click.Command), (cmd_name, command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _ENTRIES and not name.startswith("-"):
            ctx.fail(f"No such command {name!r}.{_did_you_mean(name)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, _ENTRIES))
        for section, entries in COMMANDS.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(width), entry.summary) for name, entry in entries.items()])

    def invoke(self, ctx: click.Context) -> Any:
        # Ids and errors are the user's text: a terminal that cannot show a character shows its code instead.
        for stream in (sys.stdout, sys.stderr):
            if reconfigure := getattr(stream, "reconfigure", None):
                reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except StreamflowError as error:
            from streamflow.cli.words import one_line

            # Wherever a URL comes from and whoever takes it apart, librdkafka included: a wrong one is a wrong call.
            failure = click.UsageError if isinstance(error, InvalidUrl) else click.ClickException
            raise failure(one_line(str(error))) from error
        except KeyboardInterrupt:
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


def _did_you_mean(name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, _ENTRIES, n=2)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"streamflow {version('streamflow-engine')}")
        except PackageNotFoundError:
            click.echo("streamflow, not installed (run from its sources)")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show the version."
)
def cli() -> None:
    """Durable workflows in plain asyncio Python, kept in one SQLite file or on Apache Kafka.

    \b
    First time here:
      streamflow demo
    With an app of your own, in shop.py:
      streamflow worker shop:app
      streamflow start fulfil '{"id": "o-1"}' --app shop --id order-1
      streamflow watch order-1 --app shop

    Without --url and $STREAMFLOW_URL the log is the file streamflow.db in this folder. Data goes to stdout, talk to
    stderr. Exit codes: 1 for a failure, 2 for a wrong call, 130 after Ctrl-C.
    """
