"""Looking for seeds that fail: one seed to its verdict, the fewest faults that still fail, many seeds on many cores."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final

from streamflow.sim.rules import Violated
from streamflow.sim.simulation import Simulation
from streamflow.sim.world import Stuck, TooLong

LOGGED: Final = "the product logged an error: "
ERRORS_KEPT_MAX: Final = 10
CHUNK_SEEDS: Final = 2
"""Seeds that a process is given at once; twice as many chunks as there are processes are under way."""


@dataclass
class Verdict:
    """What became of one seed. `failure` says which invariant broke and how; None when all held."""

    seed: int
    failure: str | None
    kind: str = ""
    """The class of what was raised."""
    rule: str = ""
    """What noticed it: the number of an invariant, or outcome, refused, endless, logged, or else the class."""
    trace: int = 0
    steps: int = 0
    virtual_seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    last: list[str] = field(default_factory=list)
    """The last events, oldest first."""
    marks: dict[str, int] = field(default_factory=dict)
    without: list[int] = field(default_factory=list)
    """The faults, by number, that were left out."""
    failed_first: str | None = None
    """The failure of the whole story, where this is a smaller one."""


def play(seed: int, *, without: frozenset[int] = frozenset()) -> Verdict:
    """Let the story of a seed happen. The product's own log lines are not shown: there would be thousands."""
    with quietly():
        return _play(Simulation(seed, without=without))


def _play(simulation: Simulation) -> Verdict:
    failure: Exception | None = None
    try:
        with listening() as errors:
            simulation.run()
        reported = simulation.unhandled()
        if reported is not None:
            raise AssertionError(f"an exception reached nobody: {reported}")
        if errors:  # it began again from the log, as it should, and all came right; yet it was wrong
            raise Violated(f"{LOGGED}{errors[0]}")
    except Exception as error:  # whatever it is, it is this seed's verdict
        failure = error.with_traceback(None)
    world = simulation.world
    verdict = Verdict(
        seed=simulation.seed,
        failure=None if failure is None else str(failure) or repr(failure),
        kind="" if failure is None else type(failure).__name__,
        rule="" if failure is None else _rule(failure),
        trace=world.trace,
        steps=world.steps,
        virtual_seconds=world.now,
        faults=simulation.faults,
        last=list(world.last),
        marks=dict(world.marks),
        without=sorted(simulation.without),
    )
    world.close()
    return verdict


def _rule(failure: Exception) -> str:
    if isinstance(failure, (TooLong, Stuck)):
        return "endless"
    if not isinstance(failure, Violated):
        return type(failure).__name__
    if str(failure).startswith(LOGGED):
        return "logged"
    number = re.search(r"\((\d+)\)\Z", str(failure))
    if number is not None:
        return number[1]
    return "refused" if str(failure).startswith("the driver was refused") else "outcome"


def minimise(verdict: Verdict) -> Verdict:
    """The same seed with as few faults as still make it fail of the same rule."""
    first, size = verdict.failure, max(1, len(verdict.faults) // 2)
    while True:
        left = [int(fault.partition(":")[0]) for fault in verdict.faults]
        for start in range(0, len(left), size):
            tried = play(verdict.seed, without=frozenset([*verdict.without, *left[start : start + size]]))
            if (tried.kind, tried.rule) == (verdict.kind, verdict.rule) and len(tried.faults) < len(verdict.faults):
                verdict = tried
        if size == 1:
            return replace(verdict, failed_first=first)
        size //= 2


def search(seeds: Iterable[int], *, jobs: int) -> Iterator[Verdict]:
    """Verdicts of all seeds, in their order; `jobs` processes at once.

    Seeds are taken when they are about to be played. Raises `BrokenProcessPool` when one of the processes dies.
    """
    if jobs == 1:
        yield from map(play, seeds)
        return
    left = iter(seeds)
    under_way: deque[Future[list[Verdict]]] = deque()
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent)

    def hand_out() -> None:
        if chunk := list(islice(left, CHUNK_SEEDS)):
            under_way.append(pool.submit(_play_all, chunk))

    try:
        for _ in range(2 * jobs):
            hand_out()
        while under_way:
            verdicts = under_way.popleft().result()
            hand_out()
            yield from verdicts
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Of a process of the pool: its parent may be killed, and then nobody tells it that there is nothing left to do."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a process of the pool"

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def _play_all(seeds: list[int]) -> list[Verdict]:
    return list(map(play, seeds))


@contextmanager
def quietly() -> Iterator[None]:
    """As worlds are to be played: without log lines, and without the collector."""
    with quiet(), no_collector():
        yield


class _Errors(logging.Handler):
    """Keeps what is said of errors, of each of a few the text."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.said) < ERRORS_KEPT_MAX:
            cause = "" if record.exc_info is None else f" ({record.exc_info[1]!r})"
            self.said.append(f"{record.name}: {record.getMessage()}{cause}")


@contextmanager
def listening() -> Iterator[list[str]]:
    """What the product logs as an error meanwhile; nothing else of it is heard by anybody."""
    product, handler, before = logging.getLogger("streamflow"), _Errors(), logging.root.manager.disable
    propagates = product.propagate
    logging.disable(logging.WARNING)
    product.propagate = False
    product.addHandler(handler)
    try:
        yield handler.said
    finally:
        product.removeHandler(handler)
        product.propagate = propagates
        logging.disable(before)


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
