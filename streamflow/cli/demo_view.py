"""How the demo shows what happens: live on a terminal, line by line in a pipe, or not at all."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Protocol

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

EVENTS_SHOWN: Final = 9
PLAIN_SECONDS: Final = 1.0
"""A pipe gets a line of counters this often."""

PHASES: Final = ("working", "backing off", "sleeping", "waiting", "completed")
_MEANING: Final = {
    "working": "a step is running",
    "backing off": "a payment failed and will be tried again",
    "sleeping": "a durable timer; no worker needed",
    "waiting": "for a person to approve",
    "completed": "",
}
_COLOURS: Final = {"working": "cyan", "backing off": "yellow", "sleeping": "blue", "waiting": "magenta"}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What there is to show at one moment."""

    seconds: float
    orders: int
    phases: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    failed_attempts: int = 0
    workers: Sequence[tuple[int, str]] = ()
    last_orders: Sequence[str] = ()


class View(Protocol):
    """Where the demo shows itself."""

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def tell(self, seconds: float, text: str, style: str = "") -> None:
        """Something happened."""
        ...

    def show(self, scene: Scene) -> None:
        """This is how things stand."""
        ...


class SilentView:
    """Shows nothing: `--json` prints the summary alone."""

    def __enter__(self) -> SilentView:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        return None

    def tell(self, seconds: float, text: str, style: str = "") -> None:
        """See `View`."""

    def show(self, scene: Scene) -> None:
        """See `View`."""


class PlainView(SilentView):
    """One line per event, and one per second with the counters."""

    def __init__(self) -> None:
        self._next = 0.0

    def tell(self, seconds: float, text: str, style: str = "") -> None:
        """See `View`."""
        click.echo(f"{seconds:5.1f} s  {text}")

    def show(self, scene: Scene) -> None:
        """See `View`."""
        if scene.seconds >= self._next:
            self._next = scene.seconds + PLAIN_SECONDS
            counters = ", ".join(f"{scene.phases[name]} {name}" for name in PHASES)
            click.echo(f"{scene.seconds:5.1f} s  orders: {counters}; {scene.steps} steps done")


class LiveView(SilentView):
    """A picture that changes in place."""

    def __init__(self, console: Console) -> None:
        self._events: deque[Text] = deque(maxlen=EVENTS_SHOWN)
        self._live = Live(console=console, auto_refresh=False)
        self._scene = Scene(seconds=0.0, orders=1)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._live.__exit__(kind, error, tb)

    def tell(self, seconds: float, text: str, style: str = "") -> None:
        """See `View`."""
        self._events.append(Text.assemble((f"{seconds:5.1f} s  ", "dim"), (text, style)))
        self.show(self._scene)

    def show(self, scene: Scene) -> None:
        """See `View`."""
        self._scene = scene
        self._live.update(self._picture(scene), refresh=True)

    def _picture(self, scene: Scene) -> RenderableType:
        done = scene.phases["completed"]
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"{done} of {scene.orders} orders completed", "bold"),
            ProgressBar(total=scene.orders, completed=done, width=40),
            Text(f"{scene.seconds:.1f} s", "dim"),
        )
        counters = Table.grid(padding=(0, 2))
        for name in PHASES[:-1]:
            counters.add_row(
                Text(name, _COLOURS[name]),
                Text(str(scene.phases[name]).rjust(4), "bold"),
                ProgressBar(total=scene.orders, completed=scene.phases[name], width=24, complete_style=_COLOURS[name]),
                Text(_MEANING[name], "dim"),
            )
        facts = Text.assemble(
            (f"{scene.steps}", "bold"), " steps done, ",
            (f"{scene.failed_attempts}", "bold"), " failed payments tried again",
        )  # fmt: skip
        workers = Text("   ").join(
            Text(f"worker {pid}: {state}", "red" if state == "killed" else "green") for pid, state in scene.workers
        )
        last = Text("last orders: " + ", ".join(scene.last_orders), "dim")
        return Group(bar, "", counters, "", facts, workers, last, "", *self._events, "")


def choose_view(*, as_json: bool) -> View:
    """The view that fits where the output goes."""
    if as_json:
        return SilentView()
    console = Console(highlight=False)
    return LiveView(console) if console.is_terminal and not console.is_dumb_terminal else PlainView()
