"""The command `sim`: look for a seed under which an invariant of the engine breaks."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from streamflow.cli.output import Output
from streamflow.cli.session import json_option

if TYPE_CHECKING:
    from streamflow.sim.search import Verdict

SEEDS_DEFAULT: Final = "0..99"
SAID_EVERY: Final = 100
"""Seeds between two lines of progress."""


class _Range(click.ParamType[range]):
    name = "A..B"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> range:
        found = re.fullmatch(r"(\d+)\.\.(\d+)", str(value))
        if found is None or int(found[2]) < int(found[1]):
            self.fail(f"expected two numbers, the smaller one first, as in 0..99, found {value!r}", param, ctx)
        return range(int(found[1]), int(found[2]) + 1)


@click.command("sim", short_help="Run the engine in simulated worlds full of faults.")
@click.option("--seed", type=click.IntRange(min=0), help="One seed, with the story of what went wrong.")
@click.option("--seeds", type=_Range(), default=SEEDS_DEFAULT, show_default=True, help="All seeds from A to B.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Fresh seeds for so long.")
@click.option("--jobs", type=click.IntRange(min=1), default=os.cpu_count() or 1, help="Processes at once.")
@json_option
def sim(seed: int | None, seeds: range, minutes: float | None, jobs: int, as_json: bool) -> None:
    """Run the engine in simulated worlds full of faults, and check that it keeps its word.

    The product's own workers and clients run on virtual time over a simulated log and simulated disks: processes are
    killed, stopped and told to leave, requests get lost, late, torn and repeated, brokers go away, clocks jump. After
    every event the invariants are checked; at the end every run must have returned what its program says.

    The same seed is the same story, event by event, on any machine. A seed that fails is shown with the fewest faults
    that make it fail.

    \b
    Examples:
      streamflow sim --seeds 0..999
      streamflow sim --minutes 5
      streamflow sim --seed 4711
    """
    from streamflow.sim.search import minimise, search

    output = Output(as_json=as_json)
    wanted: Iterator[int] | range = seeds if seed is None else range(seed, seed + 1)
    begun_at = time.monotonic()
    if minutes is not None:
        wanted = _until(begun_at + 60 * minutes, time.time_ns() // 1_000_000)
    marks: Counter[str] = Counter()
    failed: list[Verdict] = []
    done = 0
    for verdict in search(wanted, jobs=1 if seed is not None else jobs):
        done += 1
        marks.update(verdict.marks)
        if verdict.failure is not None:
            output.say(f"seed {verdict.seed} FAILED: looking for the fewest faults that do it ...")
            failed.append(minimise(verdict))
            if not as_json:
                _show(output, failed[-1])
        elif seed is not None and not as_json:
            _tell(output, verdict)
        elif done % SAID_EVERY == 0:
            output.say(f"{done} worlds, {len(failed)} failed")
    seconds = time.monotonic() - begun_at
    if as_json:
        output.document({
            "worlds": done,
            "seconds": seconds,
            "commit": _commit(),
            "marks": dict(sorted(marks.items())),
            "failed": [vars(verdict) for verdict in failed],
        })  # fmt: skip
    else:
        rare = ", ".join(f"{name} {times:,}" for name, times in sorted(marks.items()))
        output.text(f"{done:,} worlds in {seconds:.1f} s, {len(failed)} failed; {rare}")
    if failed:
        raise click.exceptions.Exit(1)


def _until(end: float, first: int) -> Iterator[int]:
    for seed in count(first):
        if time.monotonic() >= end:
            return
        yield seed


def _tell(output: Output, verdict: Verdict) -> None:
    output.text("\n".join(verdict.faults))
    output.text(
        f"seed {verdict.seed}: all invariants held over {verdict.virtual_seconds:,.0f} s of its own time, "
        f"{verdict.steps:,} steps, trace {verdict.trace:08x}"
    )


def _show(output: Output, verdict: Verdict) -> None:
    output.text(f"\nseed {verdict.seed} (commit {_commit()}): {verdict.kind}: {verdict.failure}")
    output.text("The faults that are enough:\n  " + "\n  ".join(verdict.faults or ["none"]))
    output.text("The last events:\n  " + "\n  ".join(verdict.last))
    output.text(f"Again: streamflow sim --seed {verdict.seed}\n")


def _commit() -> str:
    ran = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.stdout.strip() or "unknown"
