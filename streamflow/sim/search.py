"""Looking for seeds that fail: one seed to its verdict, the fewest faults that still fail, many seeds on many cores."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from streamflow.sim.simulation import Simulation


@dataclass
class Verdict:
    """What became of one seed. `failure` says which invariant broke and how; None when all held."""

    seed: int
    failure: str | None
    kind: str = ""
    """The class of what was raised."""
    trace: int = 0
    steps: int = 0
    virtual_seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    last: list[str] = field(default_factory=list)
    """The last events, oldest first."""
    marks: dict[str, int] = field(default_factory=dict)


def play(seed: int, *, without: frozenset[int] = frozenset()) -> Verdict:
    """Let the story of a seed happen. The product's own log lines are not shown: there would be thousands."""
    with quietly():
        return _play(Simulation(seed, without=without))


def _play(simulation: Simulation) -> Verdict:
    failure: Exception | None = None
    try:
        simulation.run()
        reported = simulation.unhandled()
        if reported is not None:
            raise AssertionError(f"an exception reached nobody: {reported}")
    except Exception as error:  # whatever it is, it is this seed's verdict
        failure = error.with_traceback(None)
    world = simulation.world
    verdict = Verdict(
        seed=simulation.seed,
        failure=None if failure is None else str(failure) or repr(failure),
        kind="" if failure is None else type(failure).__name__,
        trace=world.trace,
        steps=world.steps,
        virtual_seconds=world.now,
        faults=simulation.faults,
        last=list(world.last),
        marks=dict(world.marks),
    )
    world.close()
    return verdict


def minimise(verdict: Verdict) -> Verdict:
    """The same seed with as few faults as still make it fail in the same way."""
    numbers = [int(fault.partition(":")[0]) for fault in verdict.faults]
    without: set[int] = set()
    size = max(1, len(numbers) // 2)
    while True:
        left = [number for number in numbers if number not in without]
        for start in range(0, len(left), size):
            tried = play(verdict.seed, without=frozenset(without | set(left[start : start + size])))
            if tried.kind == verdict.kind and len(tried.faults) < len(verdict.faults):
                without |= set(left[start : start + size])
                verdict = tried
        if size == 1:
            return verdict
        size //= 2


def search(seeds: Iterable[int], *, jobs: int) -> Iterator[Verdict]:
    """Verdicts of all seeds, in their order; `jobs` processes at once."""
    if jobs == 1:
        yield from map(play, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(play, seeds, chunksize=4)


@contextmanager
def quietly() -> Iterator[None]:
    """As worlds are to be played: without log lines, and without the collector."""
    with quiet(), no_collector():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Show no log line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def no_collector(generation: int = 2) -> Iterator[None]:
    """Switch the garbage collector off, and at the end collect what is at most as old as `generation` says.

    What is collected runs code (generators are closed), at a moment that depends on all that went before here.

    So nothing is collected while a world goes on, and all that it leaves once it is over.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dead processes leave coroutines that nobody awaited
            gc.collect(generation)
        if was_on:
            gc.enable()
