"""Where results go: data to stdout, talk to stderr. JSON when asked for, rich on a terminal, plain text in a pipe.

Plain text is for `grep` and `awk`: no colours, nothing cut off, columns aligned and two or more blanks apart.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console

NOTHING: Final = "-"
"""Stands for an absent value, so that plain columns can be counted."""


class Cell(NamedTuple):
    """A piece of text with its style on a terminal."""

    text: str
    style: str = ""


class Output:
    """Writes what a command has found, in the form that was asked for."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.is_terminal = not as_json and _is_terminal(sys.stdout)

    def document(self, value: Any) -> None:
        """One JSON document: indented for people, on one line for programs."""
        data = to_json(value)
        if sys.stdout.isatty():
            import msgspec

            data = msgspec.json.format(data, indent=2)
        click.echo(data.decode())

    def line(self, value: Any) -> None:
        """One of several JSON documents, each on its line."""
        click.echo(to_json(value).decode())

    def text(self, text: str) -> None:
        """A line of plain text."""
        click.echo(text)

    def value(self, value: Any) -> None:
        """A JSON value that is itself what was asked for."""
        if self.is_terminal:
            self.console().print_json(to_json(value).decode())
        else:
            self.line(value)

    def fields(self, rows: Iterable[tuple[str, Cell]]) -> None:
        """Names and values, one pair a line; a repeated name is shown once."""
        rows = list(rows)
        width = max(len(name) for name, _ in rows) + 2
        last = ""
        for name, cell in rows:
            shown = "" if name == last else name
            last = name
            if not self.is_terminal:
                click.echo(f"{shown:{width}}{cell.text}")
                continue
            from rich.table import Table
            from rich.text import Text

            grid = Table.grid(padding=0)
            grid.add_column(width=width)
            grid.add_column(overflow="fold")
            grid.add_row(Text(shown, style="dim"), Text(cell.text, style=cell.style))
            self.console().print(grid)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, right: Sequence[str] = ()) -> None:
        """Rows under their headings; `right` names the columns of numbers."""
        if self.is_terminal:
            self._rich_table(columns, rows, right)
            return
        texts = [list(columns), *([cell.text or NOTHING for cell in row] for row in rows)]
        widths = [max(len(row[index]) for row in texts) for index in range(len(columns))]
        for row in texts:
            cells = [
                text.rjust(width) if column in right else text.ljust(width)
                for text, width, column in zip(row, widths, columns, strict=True)
            ]
            click.echo("  ".join(cells).rstrip())

    def _rich_table(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], right: Sequence[str]) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
        last = len(columns) - 1
        for index, column in enumerate(columns):
            table.add_column(
                column,
                justify="right" if column in right else "left",
                overflow="fold",
                # Short columns keep their width; what does not fit folds inside the last one.
                no_wrap=index != last and max((len(row[index].text) for row in rows), default=0) <= 36,
            )
        for row in rows:
            table.add_row(*[Text(cell.text, style=cell.style) for cell in row])
        self.console().print(table)

    def console(self, *, on_stderr: bool = False) -> Console:
        """A console that takes text as it is."""
        from rich.console import Console

        return Console(highlight=False, markup=False, emoji=False, stderr=on_stderr)

    def is_live(self, on_stderr: bool) -> bool:
        """Whether that stream is a terminal on which a picture can be redrawn."""
        stream = sys.stderr if on_stderr else sys.stdout
        return not self.as_json and _is_terminal(stream)

    def hint(self, text: str) -> None:
        """Talk that only a person at a terminal wants."""
        if sys.stderr.isatty():
            self.say(text)

    def say(self, text: str) -> None:
        """Talk: to stderr, never mixed with data."""
        click.echo(text, err=True)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def to_json(value: Any) -> bytes:
    """A value of ours as JSON; instants become ISO 8601."""
    import msgspec

    return msgspec.json.encode(value, enc_hook=_other)


def _other(value: Any) -> Any:
    """What a model of the user's says of itself (pydantic), else its text."""
    dump = getattr(value, "model_dump", None)
    return dump(mode="json") if dump is not None else str(value)
