"""What a test may say of its world."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from typing import Final, TypedDict

from streamflow.core.retry import Duration
from streamflow.errors import InvalidArguments
from streamflow.sim.faults import KINDS
from streamflow.sim.world import EPOCH_SECONDS
from streamflow.worker.worker import check_queues
from streamflow.workflow.app import App
from streamflow.workflow.definitions import check_duration, check_instant

STEPS_MAX: Final = 200_000
"""Events and bursts of one world: ten seconds to half a minute. Who needs more has an endless loop, or much to test."""
PARTITIONS: Final = 2
STEP_DELAY_SECONDS: Final = 0.05
"""How long at most a step of a scenario is held up, twice: much longer than what the world itself takes between two
steps, some milliseconds, and short for the limits that workflows set."""


@dataclass(frozen=True)
class Faults:
    """Random faults, drawn from the seed: `count` of them, near to where something happens.

    `kinds` are of "crash" (killed, with what its disk then loses), "pause" (stopped for up to 20 s), "leave" (SIGTERM),
    "jump" (of a wall clock), "storm" (writes lost, late, torn, repeated), "outage" (no broker answers), "cut" (one
    process hears no broker), "leaderless" (one partition is away), "strand" (killed while what it sent hangs in the
    network), "seize" (a partition goes to another worker, unasked), "offsets" (committed ones go back) and "compact".
    `without` leaves out single faults by the numbers that a failure shows, to find those that matter.
    """

    count: int = 10
    kinds: Collection[str] = KINDS
    without: Collection[int] = frozenset()

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            raise InvalidArguments(f"count of Faults must be an int of at least 0, found {self.count!r}")
        if isinstance(self.kinds, str):
            raise InvalidArguments(
                f"kinds of Faults must be many, found {self.kinds!r}: write kinds={{{self.kinds!r}}}"
            )
        known = isinstance(self.kinds, Collection) and all(isinstance(each, str) for each in self.kinds)
        kinds = frozenset(self.kinds if known else ())
        if not kinds or not kinds <= KINDS:
            raise InvalidArguments(f"kinds of Faults must be some of {', '.join(sorted(KINDS))}, found {self.kinds!r}")
        if isinstance(self.without, str | bytes) or not isinstance(self.without, Collection):
            raise InvalidArguments(
                f"without of Faults must be numbers of faults, as a failure lists them, found {self.without!r}"
            )
        if unknown := [each for each in self.without if type(each) is not int or each not in range(self.count)]:
            raise InvalidArguments(
                f"without of Faults must be numbers of its {self.count} faults, counted from 0, found {unknown[0]!r}"
            )
        object.__setattr__(self, "kinds", kinds)
        object.__setattr__(self, "without", frozenset(self.without))

    def __repr__(self) -> str:
        said = [f"{self.count}"]
        if frozenset(self.kinds) != KINDS:
            said.append(f"kinds={sorted(self.kinds)}")
        if self.without:
            said.append(f"without={sorted(self.without)}")
        return f"Faults({', '.join(said)})"


class WorldOptions(TypedDict, total=False):
    """The keywords of all that make a world, beside its seed. `Options` has their defaults; see `simulate`."""

    crash_after_every_turn: bool
    faults: Faults | int
    workers: int
    partitions: int
    queues: Iterable[str] | None
    start_at: datetime | None
    step_delay: Duration
    steps_max: int


def check_names(function: str, options: Iterable[str], *others: str) -> None:
    """Refuse options that a function has not, as Python would, but by names that its caller knows; `others` it has
    besides those of every world."""
    known = [*others, *WorldOptions.__annotations__]
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            meant = f": did you mean {close[0]!r}?" if close else "."
            raise TypeError(f"{function}() has no option {name!r}{meant} Its options are {', '.join(known)}")


@dataclass(frozen=True)
class Options:
    """All of it, checked. See `simulate`."""

    app: App
    seed: int = 0
    crash_after_every_turn: bool = False
    faults: Faults | int = 0
    workers: int = 1
    partitions: int = PARTITIONS
    queues: Iterable[str] | None = None
    start_at: datetime | None = None
    step_delay: Duration = STEP_DELAY_SECONDS
    steps_max: int = STEPS_MAX

    def __post_init__(self) -> None:
        if not isinstance(self.app, App):
            raise InvalidArguments(f"app must be a streamflow.App, found {self.app!r}")
        if not isinstance(self.crash_after_every_turn, bool):
            raise InvalidArguments(f"crash_after_every_turn must be a bool, found {self.crash_after_every_turn!r}")
        for name in ("workers", "partitions", "steps_max"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidArguments(f"{name} must be an int of at least 1, found {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InvalidArguments(f"seed must be an int, found {self.seed!r}; many seeds are seeds=range(50)")
        check_duration(self.step_delay, what="step_delay")
        if self.queues is not None:
            object.__setattr__(self, "queues", check_queues(self.queues))

    @property
    def trouble(self) -> Faults:
        """The faults, however they were given."""
        return self.faults if isinstance(self.faults, Faults) else Faults(self.faults)

    @property
    def step_delay_seconds(self) -> float:
        """How long at most a step is held up."""
        return check_duration(self.step_delay, what="step_delay")

    @property
    def served(self) -> list[str]:
        """The queues that the workers serve: those that steps of the app name, unless others were given."""
        if self.queues is not None:
            return list(self.queues)
        return sorted({step.queue for step in self.app.steps.values() if step.queue is not None})

    @property
    def epoch(self) -> float:
        """Where the wall clock begins, in seconds since 1970."""
        return EPOCH_SECONDS if self.start_at is None else check_instant(self.start_at, what="start_at").timestamp()

    def said(self) -> str:
        """The arguments that are not the defaults, as one would write them."""
        return "".join(
            f", {name}={getattr(self, name)!r}"
            for name, default in self.__dataclass_fields__.items()
            if name not in ("app", "seed") and getattr(self, name) != default.default
        )


@dataclass(frozen=True)
class WorldByHand(Options):
    """Those of `world`: who moves time by hand is not surprised by steps that take some."""

    step_delay: Duration = 0.0
