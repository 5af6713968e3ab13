"""The live view of one run on a terminal: its status, its newest steps, with times that count."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Self

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from streamflow.cli import views, words
from streamflow.cli.words import STYLES, Clock, clock
from streamflow.errors import StreamflowError

if TYPE_CHECKING:
    from streamflow import Handle, RunStatus, StepView

STEPS_SHOWN: Final = 12
REFRESHES_PER_SECOND: Final = 8
STEPS_SECONDS_MIN: Final = 0.25
"""The steps are asked for at most this often, however fast the run goes."""

SYMBOLS: Final = {
    "completed": "✓",
    "failed": "✗",
    "cancelled": "⊘",
    "terminated": "■",
    "scheduled": "◷",
    "waiting": "◷",
    "paused": "‖",
    "blocked": "!",
    "backing_off": "↻",
}


class LiveView:
    """Shows what it is given until it is left; the last picture stays on the screen."""

    def __init__(self, console: Console, handle: Handle[Any]) -> None:
        self._handle = handle
        self._status: RunStatus | None = None
        self._steps: Sequence[StepView] = ()
        self._more_steps = False
        self._spinner = Spinner("dots", style="cyan")
        self._changed = asyncio.Event()
        self._live = Live(self, console=console, refresh_per_second=REFRESHES_PER_SECOND)
        self._refresher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._live.start()
        self._refresher = asyncio.create_task(self._keep_steps_fresh(), name=f"steps of {self._handle.id}")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._refresher is not None
        self._refresher.cancel()
        with suppress(asyncio.CancelledError):
            await self._refresher
        if kind is None:
            await self._load_steps()
        self._live.stop()

    def show(self, status: RunStatus) -> None:
        """The run has changed."""
        self._status = status
        self._changed.set()

    async def _keep_steps_fresh(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._load_steps()
            await asyncio.sleep(STEPS_SECONDS_MIN)

    async def _load_steps(self) -> None:
        # Steps are an extra: while no worker answers, or once the run is gone, the status alone is shown.
        with suppress(StreamflowError, TimeoutError):
            async with asyncio.timeout(2):
                page = await self._handle.steps(order="desc", limit=STEPS_SHOWN)
                self._steps = page.items[::-1]
                self._more_steps = page.cursor is not None

    def __rich__(self) -> RenderableType:
        if self._status is None:
            return self._line(self._spinner, Text(f"{words.safe(self._handle.id)}: waiting for an answer", style="dim"))
        now = clock(short=True)
        parts: list[RenderableType] = [self._heading(self._status, now), *self._facts(self._status, now)]
        if self._steps:
            parts += [Text(), self._step_table(now)]
        return Group(*parts)

    def _heading(self, status: RunStatus, now: Clock) -> RenderableType:
        style = STYLES.get(status.state, "")
        symbol: RenderableType = self._spinner
        if status.state in SYMBOLS:
            symbol = Text(SYMBOLS[status.state], style=style)
        title = Text.assemble(
            (words.safe(status.id), "bold"), f"  {words.safe(status.workflow)}  ", (status.state, style)
        )
        if took := views.run_duration(status, now):
            title.append(f"  {took}", style="dim")
        return self._line(symbol, title)

    def _facts(self, status: RunStatus, now: Clock) -> list[RenderableType]:
        facts: list[tuple[str, RenderableType]] = []
        if status.progress is not None:
            facts.append(("progress", _progress(status.progress)))
        facts += [("waiting on", Text(words.waiting(entry, now))) for entry in status.waiting_on]
        if status.state == views.FINISHED:
            facts.append(("result", Text(words.compact(status.result), style="green")))
        if status.error is not None:
            facts.append(("error", Text(views.error_text(status.error), style="red")))
        if status.reason:
            facts.append(("reason", Text(words.one_line(status.reason))))
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim", width=12)
        table.add_column(overflow="fold")
        last = ""
        for name, fact in facts:
            table.add_row(Text("  " + name if name != last else ""), fact)
            last = name
        return [table] if facts else []

    def _step_table(self, now: Clock) -> RenderableType:
        table = Table.grid(padding=(0, 2, 0, 0))
        justify: tuple[JustifyMethod, ...] = ("left", "right", "left", "left", "right")
        for side in justify:
            table.add_column(justify=side, no_wrap=True)
        table.add_column(overflow="fold")
        if self._more_steps:
            table.add_row("", "", Text("…", style="dim"))
        for step in self._steps:
            number, name, _, state, _, took, note = views.step_row(step, now)
            symbol: RenderableType = Text(SYMBOLS.get(step.state, "•"), style=state.style)
            if step.state == "running":
                symbol = self._spinner
            attempts = f" ×{step.attempts}" if step.attempts > 1 else ""
            table.add_row(
                Text("  ").append_text(symbol) if isinstance(symbol, Text) else self._line(Text(" "), symbol),
                Text(number.text, style="dim"),
                Text(name.text).append(attempts, style="yellow"),
                Text(state.text.replace("_", " "), style=state.style),
                Text(took.text, style="dim"),
                Text(note.text, style=note.style),
            )
        return table

    @staticmethod
    def _line(symbol: RenderableType, rest: RenderableType) -> Table:
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row(symbol, rest)
        return grid


def _progress(value: Any) -> RenderableType:
    """A bar for `{"done": 3, "total": 10}`, else the JSON."""
    if isinstance(value, dict):
        done, total = value.get("done"), value.get("total")
        if isinstance(done, int | float) and isinstance(total, int | float) and total > 0:
            grid = Table.grid(padding=(0, 2, 0, 0))
            rest = {name: each for name, each in value.items() if name not in {"done", "total"}}
            shown = f"{done:g} of {total:g}" + (f"  {words.compact(rest)}" if rest else "")
            grid.add_row(ProgressBar(total, done, width=30, complete_style="cyan", finished_style="green"), Text(shown))
            return grid
    return Text(words.compact(value))
