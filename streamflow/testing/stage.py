"""One world for one test: the workers of an app, brokers, and a process from which the test talks to them.

How time passes: while somebody has something to do, event by event; when all is quiet, it leaps to the next instant at
which something is due: a durable timer, a timer of a step's own code, or one of the scenario. When there is none, and
nothing is under way, nothing is left to happen, and whoever waits is told so instead of waiting for ever.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from math import inf
from typing import Any, Final

from streamflow.client.client import Client
from streamflow.client.requests import Surroundings
from streamflow.codec.avro import decode_status, decode_timer
from streamflow.config import Limits
from streamflow.core.events import RunBlocked, Turn
from streamflow.errors import InvalidArguments, NonDeterminismError
from streamflow.ids import partition_of
from streamflow.logs.base import HISTORY, STATUS, TIMERS
from streamflow.projections.views import RunStatus, status_view
from streamflow.sim import faults as sim_faults
from streamflow.sim.cluster import Cluster, Weather
from streamflow.sim.guard import attempt_name, watching
from streamflow.sim.host import Disk, Loss, SimHost
from streamflow.sim.log import SimLog
from streamflow.sim.machines import Machine, Machines
from streamflow.sim.rules import Rules
from streamflow.sim.search import no_collector, quiet
from streamflow.sim.world import Process, Stuck, TooLong, World
from streamflow.testing.options import Options
from streamflow.testing.report import (
    EVENTS_SHOWN,
    RUNS_SHOWN,
    SimulationFailed,
    describe,
    event_line,
    event_name,
    run_line,
    waits_at,
)
from streamflow.testing.steps import Steps
from streamflow.testing.strict import StrictWorker
from streamflow.worker.executor import Executor
from streamflow.workflow.guard import forbid_io
from streamflow.workflow.stepinfo import StepInfo, running

QUIET_SECONDS: Final = 20.0
"""Time leaps when nothing has landed for so long: longer than a hand-over of partitions, with its retries."""
AT_ONCE_SECONDS: Final = 1.0
"""What is due so soon need not be leapt to."""
IDLE_SECONDS: Final = 90.0
"""Nothing is left to happen when nothing has landed for so long: late writes land after up to a minute."""
FAULT_CHANCE: Final = 0.5
"""How likely a landed record of the history brings the next fault with it."""
FAULT_DELAYS: Final = (0.002, 0.02, 0.2, 2.0)
"""How long after that record at most, in seconds: in the midst of what it sets off, or later."""
CRASH_SECONDS_MAX: Final = 0.5
"""When a crash that waits for the end of an attempt comes anyway, since there is none."""
CHECK_CHANCE: Final = 0.002
TURNS_USUAL: Final = 500
"""Of a story with more, checks are as much rarer as they are dearer: each folds the whole log. A run that never ends
would take minutes to be told so."""
LATELY_SHARE: Final = 0.25
"""Of a story that did not end, the part that is looked at for who keeps it going."""
SUPERVISOR_SECONDS: Final = 40.0
SETTLING_SECONDS: Final = 100.0
"""After faults: late writes land after up to a minute. After mere crashes, a fifth of it."""
EVENTS_KEPT: Final = 400
NOISY: Final = ("streamflow.worker", "streamflow.client", "streamflow.logs")
"""Loggers that warn of faults."""
CLIENT_LIMITS: Final = Limits(request_seconds=3_600.0)
"""The test's own requests are patient: an hour of virtual time costs little."""


class Host(SimHost):
    """A simulated host that forbids workflow code what a real one forbids it."""

    def enter(self, executor: Executor, limits: Limits) -> None:
        forbid_io()
        super().enter(executor, limits)


class Stage:
    """See the module. `again` says how this story is played again."""

    def __init__(self, options: Options, again: str) -> None:
        self.options, self.again = options, again
        self.world = World(options.seed, epoch=options.epoch)
        self.world.last = deque(maxlen=EVENTS_KEPT)
        self.cluster = Cluster(self.world, partitions=options.partitions)
        self.world.leap_to = self._leap
        self.rules = Rules(self.cluster, ours=False)
        self.rules.turned.append(self._turned)
        self.cluster.landed.append(self._landed)
        self.world.after_each.append(self._check)
        self.chance = random.Random(f"test {options.seed}")
        self.steps = Steps(
            options.app,
            seed=options.seed,
            delay=options.step_delay_seconds,
            now=lambda: self.now,
            began=self._began,
            ended=self._ended,
            failed=self.fail,
        )
        self.trouble = options.trouble
        self.machines = Machines(
            self.cluster,
            options.app,
            options.app.name,
            options.workers,
            chance=self.chance if "jump" in self.trouble.kinds and self.trouble.count else None,
            host=partial(Host, around=self.steps.around),
            worker=StrictWorker,
            options={"queues": options.served},
            failed=self.fail,
        )
        # No ambushes: nothing may be trimmed, copied or sent to a queue here, and the fault would never come.
        self.faults = sim_faults.Faults(self.machines, options.seed, kinds=frozenset(self.trouble.kinds), ambushed=0.0)
        self.driver = self.world.process("test")
        log = SimLog(self.cluster, self.driver, options.app.name, weather=Weather())
        surroundings = Surroundings(self.world.chance, self.driver.clock.now_ms)
        self.client = Client(log, options.app, limits=CLIENT_LIMITS, surroundings=surroundings)
        self.crashes = 0
        self.failure: BaseException | None = None
        self.scenario: object = None
        """Its coroutine, if there is one."""
        self._told: deque[tuple[int, str, str]] = deque(maxlen=EVENTS_KEPT)
        """What runs did last, as (steps of the world, run, event)."""
        self._timers: dict[bytes, int] = {}
        self._statuses: dict[str, RunStatus] = {}
        self._drawn = 0
        self._turns = 0
        self._doomed: dict[str, bool] = {}
        """Processes that are about to crash, and whether the end of the next attempt there is the moment."""
        self._active_at = 0.0
        """When something was due last, or is next."""
        self._calm = False
        """Whether time only passes, for what is under way to arrive."""

    # -- from begin to end -------------------------------------------------------------------------------------------

    @contextmanager
    def open(self) -> Iterator[None]:
        """The world, until the block ends."""
        with ExitStack() as stack:
            stack.enter_context(no_collector(0))
            stack.enter_context(_chance_of(self.options.seed))
            stack.callback(self._close)
            if self.trouble.count or self.options.crash_after_every_turn:
                stack.enter_context(_only_errors())
            for machine in self.machines.all:
                self.machines.start(machine)
            if self.trouble.count:
                self.world.at(self._soon(), self._fault)
                self._supervise()
            yield

    def _close(self) -> None:
        """Code that is thrown away complains; nobody needs to hear it."""
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.world.close()
            gc.collect(0)

    def run(self, until: Callable[[], bool]) -> None:
        """Let the world go on until that holds. Raises what ended it before: `Stuck`, `TooLong`, or worse."""
        left = self.options.steps_max - self.world.steps
        with watching(self.fail):
            try:
                self.world.run(lambda: until() or self.failure is not None, seconds=float("inf"), steps=left)
            except TooLong:
                raise TooLong(self._too_long()) from None
        if self.failure is not None:
            raise self.failure

    def settle(self) -> None:
        """Let nothing more go wrong, and what is under way arrive; then look whether all that must agree does."""
        end = self.world.now + SETTLING_SECONDS / (1 if self.trouble.count else 5)
        self.trouble = replace(self.trouble, count=self._drawn, without=())
        self.faults.heal()
        self._calm = True
        self.run(lambda: self.world.now >= end)
        if self.world.now - self.cluster.landed_at > QUIET_SECONDS / 2:  # else some run is busy for ever
            self.rules.projections()

    def check_unhandled(self) -> None:
        """Raise what some event loop was told of and nobody handled."""
        for process in self.world.processes:
            for context in process.loop.failures:
                raise AssertionError(f"in {process.name}, an exception reached nobody: {context['message']}") from (
                    context.get("exception")
                )

    def fail(self, error: BaseException) -> None:
        """The story is over: whoever runs the world is told. The first failure counts."""
        self.failure = self.failure or error

    def failed(self, what: str) -> SimulationFailed:
        """The error that tells of a failure."""
        return SimulationFailed(
            self.describe(what),
            seed=self.options.seed,
            again=self.again,
            faults=self.faults.said,
            last=self.last,
            virtual_seconds=self.world.now,
        )

    def describe(self, what: str) -> str:
        """What a failure says."""
        return describe(
            what,
            seed=self.options.seed,
            now=self.now,
            virtual_seconds=self.world.now,
            again=self.again,
            faults=self.faults.said,
            open_runs=self.open_runs,
            last=self.last,
        )

    # -- what is known of it -----------------------------------------------------------------------------------------

    @property
    def now(self) -> datetime:
        return datetime.fromtimestamp(self.world.epoch + self.world.now, UTC)

    @property
    def last(self) -> list[str]:
        """The last events that mean something to a user."""
        told = [line for line in self.world.last if " brokers: " not in line]
        return told[-EVENTS_SHOWN:]

    @property
    def open_runs(self) -> list[RunStatus]:
        """Runs that are not closed, as their last published statuses have them."""
        return [status for status in self._statuses.values() if not status.is_closed]

    def is_served(self) -> bool:
        """Whether every partition has an owner that is ready."""
        owned = {processor.partition for processor in self.machines.processors() if processor.status == "active"}
        return len(owned) == self.cluster.partitions

    # -- crashes and faults ------------------------------------------------------------------------------------------

    def machine(self, number: int) -> Machine:
        """That worker's machine."""
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self.machines.all):
            raise InvalidArguments(
                f"there are {len(self.machines.all)} workers, numbered from 0, found no worker {number!r}"
            )
        return self.machines.all[number]

    def crash(self, machine: Machine, *, keep_disk: bool) -> None:
        """Kill the worker and start it again at once; the group hears of it at once, too."""
        if machine.process is not None and machine.process.is_alive:
            self.machines.kill(machine, Loss.NOTHING)
        if not keep_disk:
            machine.disk = Disk()
        for group in self.cluster.groups.values():
            for member in list(group.members.values()):
                if not member.process.is_alive:
                    group.remove(member)
        self.crashes += 1
        self.machines.restart(machine)

    def _doom(self, owner: str) -> None:
        """A turn is durable: its owner crashes before it knows, soon after, or when a step of it has run.

        The last is the hardest on steps: what they did is done, and nobody will ever hear of it.
        """
        if owner in self._doomed:
            return
        kind = self.chance.choice(("before", "after", "step"))
        self._doomed[owner] = kind == "step"
        delay = {"before": 0.0, "after": self.chance.uniform(0, 0.005), "step": CRASH_SECONDS_MAX}[kind]
        self.world.at(self.world.now + delay, partial(self._crash_owner, owner))

    def _crash_owner(self, process: str) -> None:
        if self._doomed.pop(process, None) is None:
            return
        keep_disk = self.chance.random() < 0.5
        for machine in self.machines.all:
            if machine.process is not None and machine.process.name == process and not self._calm:
                self.world.note("crash", f"{process} restarts {'on its' if keep_disk else 'on an empty'} disk")
                self.crash(machine, keep_disk=keep_disk)

    def _ended(self) -> None:
        """An attempt's function has returned, and its process is running."""
        loop = asyncio.get_running_loop()
        for machine in self.machines.all:
            process = machine.process
            if process is not None and process.loop is loop and process.is_alive and self._doomed.get(process.name):
                self.machines.kill(machine, Loss.NOTHING)  # here, before the outcome is on its way
                self.world.at(self.world.now, partial(self._crash_owner, process.name))

    def _soon(self) -> float:
        return self.world.now + self.chance.uniform(0, self.chance.choice(FAULT_DELAYS))

    def _fault(self) -> None:
        if self._drawn >= self.trouble.count:
            return
        number, self._drawn = self._drawn, self._drawn + 1
        if number not in self.trouble.without:
            self.faults.fault(number)

    def _supervise(self) -> None:
        """Whoever is down for long is started again: one who was told to leave may take his time."""
        for machine in self.machines.all:
            since = None if machine.process is None else machine.process.silent_since
            if not machine.is_up and since is not None and self.world.now - since > SUPERVISOR_SECONDS:
                self.machines.restart(machine)
        self.world.at(self.world.now + SUPERVISOR_SECONDS, self._supervise)

    # -- what is heard of it -----------------------------------------------------------------------------------------

    def _landed(self, topic: str, partition: int, offset: int) -> None:
        record = self.cluster.stream(topic, partition).records[-1]
        if topic == TIMERS:
            self._timers.pop(record.key, None)
            if record.value is not None:
                self._timers[record.key] = decode_timer(record.value).fire_at
        elif topic == STATUS:
            self._statuses.pop(record.key.decode(), None)
            if record.value is not None:
                self._statuses[record.key.decode()] = status_view(decode_status(record.value))
        elif topic == HISTORY and self._drawn < self.trouble.count and self.chance.random() < FAULT_CHANCE:
            self.world.at(self._soon(), self._fault)

    def _turned(self, turn: Turn, events: list[Any]) -> None:
        self._turns += 1
        for event in events:
            self.world.note(f"run {turn.workflow_id}", event_line(turn, event))
            self._told.append((self.world.steps, turn.workflow_id, event_name(event)))
            if isinstance(event, RunBlocked):
                why = event.error.message if event.error is not None else "it cannot go on"
                self.fail(NonDeterminismError(why))
        if self.options.crash_after_every_turn and not self._calm:
            self._doom(self.rules.readers[partition_of(turn.workflow_id, self.cluster.partitions)].owner)

    def _began(self, info: StepInfo) -> None:
        self.world.note(f"run {info.workflow_id}", f"step {info.step} begins, attempt {info.attempt}")
        try:
            self.rules.began(info.workflow_id, info.run, info.number, info.attempt)
        except AssertionError as error:
            self.fail(error)  # raised here alone, it would be the step's
            raise

    def _check(self) -> None:
        if self.world.chance.random() < CHECK_CHANCE * min(1.0, TURNS_USUAL / (self._turns + 1)):
            for processor in self.machines.processors():
                self.rules.state(processor)

    # -- time --------------------------------------------------------------------------------------------------------

    def _leap(self) -> float | None:
        """When the next thing is due, if nothing but housekeeping lies before it. See `World.leap_to`."""
        now = self.world.now
        quiet = now - max(self.cluster.landed_at, self._active_at)
        if (
            self._calm
            or quiet < QUIET_SECONDS
            or now < self.cluster.hangs_until
            or self.cluster.weather.down
            or not all(machine.is_up and machine.process is not None for machine in self.machines.all)
            or any(process.is_alive and process.is_stopped for process in self.world.processes)
            or any(group.asked_at for group in self.cluster.groups.values())
        ):
            return None
        due = [*self._durable(), *(at for process in self.world.processes for at in _own_timers(process))]
        if self.driver.wakes_at < inf:
            due.append(self.driver.wakes_at)
        if not due and quiet > IDLE_SECONDS:
            raise Stuck(self._stuck())
        earliest = min(due, default=None)
        if earliest is None:
            return None
        self._active_at = max(earliest, now)  # what it sets off is under way for a while
        return earliest if earliest > now + AT_ONCE_SECONDS else None

    def _durable(self) -> Iterator[float]:
        """When the durable timers are due, by each worker's clock."""
        offsets = {machine.process.wall_offset for machine in self.machines.all if machine.process is not None}
        for fire_at in self._timers.values():
            for offset in sorted(offsets):
                yield fire_at / 1000 - self.world.epoch - offset

    def _stuck(self) -> str:
        return (
            f"nothing is left to happen, while the test still waits: {self._open() or 'every run is closed'}"
            f"{self._waits_at()}. No timer is due, no step is at work that could end by itself, and nobody sends "
            f"anything{self._unserved()}"
        )

    def _too_long(self) -> str:
        """A culprit: the run that did most lately, or nobody's run."""
        lately = [each for each in self._told if each[0] > self.world.steps * (1 - LATELY_SHARE)]
        if lately:
            ((run, _), *_) = Counter(run for _, run, _ in lately).most_common(1)
            ((event, times), *_) = Counter(event for _, each, event in lately if each == run).most_common(1)
            who = f"run {run} is the busiest, lately with {event} {times} times"
        else:
            who = "no run got any further lately: a step's own code goes on, or the scenario"
        return (
            f"not done after {self.options.steps_max:,} events: a loop that never ends, or more than steps_max allows; "
            f"{who}. Not closed: {self._open() or 'no run'}{self._at_work()}{self._waits_at()}"
        )

    def _open(self) -> str:
        """Which runs wait for what."""
        runs = [run_line(run) for run in self.open_runs]
        more = [f"and {len(runs) - RUNS_SHOWN} more"] if len(runs) > RUNS_SHOWN else []
        return "; ".join(runs[:RUNS_SHOWN] + more)

    def _at_work(self) -> str:
        """Which attempts run; statuses may not say so yet."""
        workers = [machine.worker for machine in self.machines.all if machine.is_up and machine.worker is not None]
        executors = [worker.executor for worker in workers if worker.executor is not None]
        running = [attempt.info for executor in executors for attempt in executor.running.values()]
        said = ", ".join(attempt_name(info) for info in running[:RUNS_SHOWN])
        return f"; at work: {said}" if said else ""

    def _waits_at(self) -> str:
        where = waits_at(self.scenario)
        return "" if where is None else f"; the scenario waits at {where}"

    def _unserved(self) -> str:
        """The queues of steps that no worker serves: it may be meant so."""
        queues = sorted({step.queue for step in self.options.app.steps.values() if step.queue} - {*self.options.served})
        return f"; no worker serves queue {', '.join(queues)} (see queues=)" if queues else ""


@contextmanager
def _chance_of(seed: int) -> Iterator[None]:
    """Code that draws from the module `random` draws the same when the seed is played again, right or wrong."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


@contextmanager
def _only_errors() -> Iterator[None]:
    """Where things go wrong on purpose, nobody reads the product's warnings of it."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _own_timers(process: Process) -> Iterator[float]:
    """When timers of steps' code are due, in the world's time: those set in the context of an attempt."""
    if not process.can_run:
        return
    for handle in process.loop._scheduled:
        if not handle.cancelled() and handle._context.get(running) is not None:  # type: ignore[attr-defined]
            yield process.in_world(handle.when())
