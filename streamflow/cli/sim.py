"""The command `sim`: look for a seed under which an invariant of the engine breaks."""

from __future__ import annotations

import math
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from streamflow.cli.output import Output
from streamflow.cli.session import json_option

if TYPE_CHECKING:
    from streamflow.sim.search import Verdict

SEEDS_DEFAULT: Final = range(100)
SAID_EVERY: Final = 100
"""Seeds between two lines of progress."""
JOBS_MAX: Final = 256
"""Processes, of some 70 MB each; more than there are cores make it slower."""
MINIMISED_MAX: Final = 5
"""Failing seeds for which the fewest faults are looked for, some forty worlds each: where more fail, the product is
broken in a way that these show."""


_NUMBER: Final = r"[0-9]{1,30}"
"""More digits than any seed has; with thousands of them Python makes no number."""


class _Range(click.ParamType[range]):
    name = "A..B"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> range:
        found = re.fullmatch(rf"({_NUMBER})\.\.({_NUMBER})", str(value))
        if found is None or int(found[2]) < int(found[1]):
            self.fail(f"expected two numbers, the smaller one first, as in 0..99, found {str(value)!r:.80}", param, ctx)
        return range(int(found[1]), int(found[2]) + 1)


class _Faults(click.ParamType[frozenset[int]]):
    name = "N,N…"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> frozenset[int]:
        if isinstance(value, frozenset):
            return value
        if re.fullmatch(rf"{_NUMBER}(,{_NUMBER})*", str(value)) is None:
            self.fail(f"expected the numbers of faults, as in 3,7,9, found {str(value)!r:.80}", param, ctx)
        return frozenset(map(int, str(value).split(",")))


class _Minutes(click.ParamType[float]):
    name = "M"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            minutes = float(str(value))
        except ValueError:
            minutes = math.nan
        if not (math.isfinite(minutes) and minutes > 0):
            self.fail(f"expected a number above 0, as in 5 or 0.5, found {value!r}", param, ctx)
        return minutes


@click.command("sim", short_help="Run the engine in simulated worlds full of faults.")
@click.option("--seed", type=click.IntRange(min=0), help="One seed, with the story of what went wrong.")
@click.option("--without", type=_Faults(), help="With --seed: leave out the faults of these numbers.")
@click.option("--seeds", type=_Range(), help="All seeds from A to B.  [default: 0..99]")
@click.option("--fresh", type=click.IntRange(min=1), metavar="N", help="N seeds that were never played before.")
@click.option("--minutes", type=_Minutes(), help="Fresh seeds for so long.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1, max=JOBS_MAX),
    default=min(os.cpu_count() or 1, JOBS_MAX),
    show_default="as many as there are cores",
    help="Processes at once.",
)
@json_option
def sim(
    seed: int | None,
    without: frozenset[int] | None,
    seeds: range | None,
    fresh: int | None,
    minutes: float | None,
    jobs: int,
    as_json: bool,
) -> None:
    """Run the engine in simulated worlds full of faults, and check that it keeps its word.

    The product's own workers and clients run on virtual time over a simulated log and simulated disks: processes are
    killed, stopped and told to leave, requests get lost, late, torn and repeated, brokers go away, clocks jump. As
    each record lands the invariants are checked, the workers' whole states now and then; at the end every run must have
    returned what its program says.

    The same seed is the same story, event by event, on any machine with the same versions of Python and the libraries.
    A seed that fails is shown with the fewest faults that make it fail, and the command that plays just these. A search
    of 300 worlds and more must also have met every situation that it is for: those that never occurred are named.

    \b
    Examples:
      streamflow sim --seeds 0..999
      streamflow sim --minutes 5
      streamflow sim --seed 4711
      streamflow sim --seed 4711 --without 3,7,9
    """
    from streamflow.sim.search import play, search

    _refuse_two(seed=seed, seeds=seeds, fresh=fresh, minutes=minutes)
    if without is not None and seed is None:
        raise click.UsageError("--without leaves out faults of one seed: name it with --seed")
    output = Output(as_json=as_json)
    begun_at = time.monotonic()
    if seed is not None:
        found = _Found(output, tells=not as_json, minimised_max=1 if without is None else 0)
        found.take(play(seed, without=without or frozenset()))
    else:
        found = _Found(output, tells=False, minimised_max=MINIMISED_MAX)
        wanted = _wanted(output, seeds, fresh, None if minutes is None else begun_at + 60 * minutes)
        try:
            for verdict in search(wanted, jobs=jobs):
                found.take(verdict)
        except KeyboardInterrupt:
            found.sum_up(time.monotonic() - begun_at)
            raise
    if not found.sum_up(time.monotonic() - begun_at):
        raise click.exceptions.Exit(1)


class _Found:
    """What the worlds have shown; failing ones are shown when they come."""

    def __init__(self, output: Output, *, tells: bool, minimised_max: int) -> None:
        self._output = output
        self._tells = tells
        """Whether the story is told of a world where all held."""
        self._minimised_max = minimised_max
        self._marks: Counter[str] = Counter()
        self._failed: list[Verdict] = []
        self._worlds = 0

    def take(self, verdict: Verdict) -> None:
        """One more world is over."""
        self._worlds += 1
        self._marks.update(verdict.marks)
        if verdict.failure is not None:
            self._fail(verdict)
        elif self._tells:
            _tell(self._output, verdict)
        elif self._worlds % SAID_EVERY == 0:
            self._output.say(f"{self._worlds} worlds, {len(self._failed)} failed")

    def _fail(self, verdict: Verdict) -> None:
        from streamflow.sim.search import minimise

        self._output.say(f"seed {verdict.seed} FAILED: {_replay(verdict)}")
        if len(self._failed) < self._minimised_max:
            self._output.say("  looking for the fewest faults that do it ...")
            verdict = minimise(verdict)
        self._failed.append(verdict)
        if not self._output.as_json:
            _show(self._output, verdict)

    def sum_up(self, seconds: float) -> bool:
        """Say what was found; whether all is well."""
        from streamflow.sim.situations import SITUATIONS, WORLDS_MIN, missing

        judged = self._worlds >= WORLDS_MIN
        absent = {name: SITUATIONS[name] for name in missing(self._marks)} if judged else {}
        if self._output.as_json:
            self._output.document({
                "worlds": self._worlds,
                "seconds": seconds,
                "code": _code(),
                "marks": dict(sorted(self._marks.items())),
                "missing": absent if judged else None,
                "failed": [vars(verdict) | {"again": _replay(verdict)} for verdict in self._failed],
            })  # fmt: skip
        else:
            self._say(seconds, absent)
        return not self._failed and not absent

    def _say(self, seconds: float, absent: dict[str, str]) -> None:
        text, worlds = self._output.text, _counted(self._worlds, "world")
        met = ", ".join(f"{name} {times:,}" for name, times in sorted(self._marks.items()))
        text(f"{worlds} in {seconds:.1f} s, {len(self._failed)} failed{met and '; ' + met}")
        for name, why in absent.items():
            text(f"NEVER OCCURRED in {worlds}: {name} ({why})")
        if absent:
            text("What never occurs is not tested: the simulator, or the product, has changed so that it cannot.")
        for verdict in self._failed:
            text(f"FAILED {_replay(verdict)}")


def _refuse_two(**ways: object) -> None:
    given = [f"--{name}" for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} both say which seeds to play: give one of them")


def _wanted(output: Output, seeds: range | None, fresh: int | None, end: float | None) -> Iterable[int]:
    """The seeds to play: until `end`, an instant of the monotonic clock, if there is one."""
    if fresh is None and end is None:
        return SEEDS_DEFAULT if seeds is None else seeds
    first = time.time_ns() // 1_000_000
    if fresh is not None:
        output.say(f"fresh seeds: streamflow sim --seeds {first}..{first + fresh - 1} ({_code()})")
        return range(first, first + fresh)
    assert end is not None
    output.say(f"fresh seeds from {first} on ({_code()})")
    return _until(end, first)


def _until(end: float, first: int) -> Iterator[int]:
    for seed in count(first):
        if time.monotonic() >= end and seed > first:  # nothing would be shown by none
            return
        yield seed


def _tell(output: Output, verdict: Verdict) -> None:
    output.text("\n".join(verdict.faults))
    output.text(
        f"seed {verdict.seed}: all invariants held over {verdict.virtual_seconds:,.0f} s of its own time, "
        f"{_counted(verdict.steps, 'step')}, trace {verdict.trace:08x}"
    )


def _show(output: Output, verdict: Verdict) -> None:
    output.text(f"\nseed {verdict.seed} ({_code()}): {verdict.kind}: {verdict.failure}")
    if verdict.failed_first not in (None, verdict.failure):
        output.text(f"With all its faults: {verdict.failed_first}")
    output.text("The faults that are enough:\n  " + "\n  ".join(verdict.faults or ["none"]))
    output.text("The last events:\n  " + "\n  ".join(verdict.last))
    output.text(f"Again: {_replay(verdict)}")
    if verdict.failed_first is not None and verdict.without:
        output.text(f"Again with all its faults: streamflow sim --seed {verdict.seed}")
    output.text("")


def _replay(verdict: Verdict) -> str:
    """The command that plays just this."""
    without = f" --without {','.join(map(str, verdict.without))}" if verdict.without else ""
    return f"streamflow sim --seed {verdict.seed}{without}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _code() -> str:
    """Which code ran: the commit of its repository, else its version."""
    from streamflow import __version__

    here = Path(__file__)

    def git(*args: str) -> str | None:
        try:
            ran = subprocess.run(["git", *args], cwd=here.parent, capture_output=True, text=True, check=False)
        except OSError:  # there is no git
            return None
        return ran.stdout.strip() if ran.returncode == 0 else None

    # An installed package may lie inside of a repository that is about something else.
    found = (
        git("describe", "--always", "--dirty", "--exclude=*") if git("ls-files", "--error-unmatch", here.name) else ""
    )
    return f"commit {found}" if found else f"version {__version__}"
