"""One simulated story from a seed: random programs, workers that live badly, and in the end an account.

For `FAULTY_SECONDS` things go wrong; then they stop, and within bounded time every accepted run must be closed with
what the oracle says.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any, Final

from streamflow.codec.avro import decode_command
from streamflow.codec.envelope import DecodeError
from streamflow.config import Limits
from streamflow.logs.base import COMMANDS
from streamflow.sim import programs
from streamflow.sim.bounds import Bounds
from streamflow.sim.cluster import Cluster, Weather
from streamflow.sim.driver import Driver
from streamflow.sim.faults import Faults
from streamflow.sim.kept import Kept
from streamflow.sim.machines import Machine, Machines
from streamflow.sim.reading import READ, Reader
from streamflow.sim.rules import Rules, Violated
from streamflow.sim.shown import Statuses
from streamflow.sim.timing import Timing
from streamflow.sim.world import World
from streamflow.worker.processor import ProcessorState
from streamflow.workflow.stepinfo import StepInfo

FAULTY_SECONDS: Final = 120.0
HEALING_SECONDS: Final = 40 * 86_400.0
SETTLING_SECONDS: Final = 200.0
STEPS_MAX: Final = 100_000
FAULTS: Final = (20, 40)
STRANGERS_MAX: Final = 8
"""Commands that others write to the topic."""
STATE_CHECKED: Final = 0.002
"""How often, per event, the state of an owner is compared with the log's."""


def limits(story: random.Random, *, hang: bool) -> Limits:
    """Limits that are met, some of them, in a story as small as these.

    Where steps `hang` until they are cancelled, a worker that waits for a free slot would wait for ever: above
    `steps_waiting_max` it hears of no cancel and of no timer.
    """
    return Limits(
        live_runs_max=story.choice((1, 4, 512)),
        decided_turns_unacknowledged_max=story.choice((1, 8, 4096)),
        pass_inputs_max=story.choice((1, 256)),
        commands_read_max=story.choice((1, 16, 512)),
        published_offset_batches=story.choice((1, 100)),
        queue_read_max=story.choice((1, 16)),
        queue_window_max=story.choice((1, 8, 256)),
        steps_waiting_max=20_000 if hang else story.choice((0, 1, 20_000)),
        outgoing_records_max=story.choice((4, 20_000)),
        trim_records_min=story.choice((8, 60, 20_000)),
        snapshot_runs_at_once=story.choice((1, 32)),
        trim_seconds=story.choice((5.0, 600.0)),
        commands_kept_seconds=story.choice((70.0, 7 * 86_400.0)),
        replies_kept_seconds=story.choice((70.0, 3_600.0)),
        late_statuses_at_once_max=story.choice((1, 32)),
    )


class Simulation:
    """The story of one seed. `run` raises `Violated`, `Stuck` or `TooLong` where something is wrong."""

    def __init__(self, seed: int, *, without: frozenset[int] = frozenset()) -> None:
        self.seed = seed
        self.without = without
        """Faults, by number, that are left out: what is left when all that does not matter is."""
        self.world = World(seed)
        self.story = random.Random(f"story {seed}")
        self.cluster = Cluster(self.world, partitions=self.story.randint(1, 4))
        # Where brokers are far away, writes go in groups.
        self.cluster.weather = Weather(delay=self.story.choice((0.001, 0.001, 0.03, 0.3)))
        self.rules = Rules(self.cluster)
        self.driver = Driver(self.cluster, self.world.process("driver"), self.rules, self.story)
        self.limits = limits(self.story, hang=self.driver.hangs)
        self.bounds = Bounds(self.limits)
        self.kept = Kept(self.rules)
        self.machines = Machines(
            self.cluster,
            programs.app,
            programs.app.name,
            self.story.randint(1, 3),
            chance=self.story,
            prepare=lambda: programs.observer.set(self._began),
            log=self.bounds.log,
            failed=self._died,
            options={"limits": self.limits, "max_parallel_steps": self.story.choice((1, 4, 64))},
        )
        self._serve_the_queue()
        self.bounds.machines = self.machines.all
        self._faults = Faults(self.machines, seed)
        self.failure: BaseException | None = None
        self.done = False
        self.world.after_each.append(self._check)
        self.rules.claimed.append(self._claimed)
        self.statuses = Statuses(self.cluster)
        self.rules.turned += [Timing(self.world, self.driver.plans).turn, self.statuses.turn]
        reading = random.Random(f"reader {seed}")
        if reading.random() < READ:
            self.driver.reader = Reader(self.cluster, self.statuses, self.rules, reading, self.driver.insist)
        if self.story.random() < 0.5:  # else long sleeps pass, and faults come days after the beginning
            self.world.leap_to = lambda: None

    def run(self) -> None:
        """From the first start to the last result."""
        for machine in self.machines.all:
            self.machines.start(machine)
        self.driver.process.run(self._drive())
        for number in range(self.story.randint(*FAULTS)):
            at = self.story.uniform(0, FAULTY_SECONDS)
            if number not in self.without:
                self.world.at(at, partial(self._faults.fault, number))
        for number in range(self.story.randint(0, STRANGERS_MAX)):
            chance = random.Random(f"stranger {number} of {self.seed}")
            self.world.at(chance.uniform(0, FAULTY_SECONDS), partial(self._stranger, chance))
        self.world.at(FAULTY_SECONDS, self._faults.heal)
        self.world.run(lambda: self.done or self.failure is not None, seconds=HEALING_SECONDS, steps=STEPS_MAX)
        if self.failure is not None:
            raise self.failure
        self._settle()
        self.rules.projections()

    async def _drive(self) -> None:
        try:
            await self.driver.drive()
            self.done = True
        except BaseException as error:  # the story is over, whatever it was
            self.failure = error

    @property
    def faults(self) -> list[str]:
        """What went wrong, in order."""
        return self._faults.said

    def unhandled(self) -> str | None:
        """What some process's event loop was told of and nobody handled, the first of it."""
        for process in self.world.processes:
            for context in process.loop.failures:
                return f"{process.name}: {context['message']}: {context.get('exception')!r}"
        return None

    def _settle(self) -> None:
        """Wait until nothing has been written for a while: all that is derived is published."""
        end = self.world.now + SETTLING_SECONDS
        self.world.at(end, lambda: None)
        self.world.run(lambda: self.world.now >= end, seconds=2 * SETTLING_SECONDS, steps=STEPS_MAX)

    # -- processes ---------------------------------------------------------------------------------------------------

    def _serve_the_queue(self) -> None:
        """By step workers of its own, or by the owner of partitions beside them."""
        owners = len(self.machines.all)
        for number in range(self.story.randint(0, 2)):
            options: dict[str, Any] = {"queues": [programs.QUEUE], "owns_partitions": False}
            self.machines.all.append(Machine(f"q{number}", options=options))
        if len(self.machines.all) == owners:
            self.machines.all[0].options["queues"] = [programs.QUEUE]

    def _died(self, error: BaseException) -> None:
        self.failure = self.failure or error

    def _began(self, info: StepInfo) -> None:
        try:
            self.rules.began(info.workflow_id, info.run, info.number, info.attempt)
        except Violated as error:
            self.failure = error  # raised here, it would be the step's

    # -- strangers ---------------------------------------------------------------------------------------------------

    def _stranger(self, chance: random.Random) -> None:
        """Somebody else writes commands: garbage, or one that was sent before, perhaps to another partition."""
        partition = chance.randrange(self.cluster.partitions)
        sent = [
            record
            for number in range(self.cluster.partitions)
            for record in self.cluster.stream(COMMANDS, number).records
            if self._may_come_again(record.value)
        ]
        if sent and chance.random() < 0.7:
            again = chance.choice(sent)
            self.cluster.land(COMMANDS, partition, [(again.key, again.value)])
            self.world.note("stranger", f"repeats a command on partition {partition}")
        else:
            self.cluster.land(COMMANDS, partition, [(b"stranger", chance.randbytes(chance.randint(0, 40)))])
            self.world.note("stranger", f"writes garbage to partition {partition}")

    def _may_come_again(self, value: bytes | None) -> bool:
        """Whether the command's run is kept: who has forgotten a run would begin it once more."""
        try:
            planned = self.driver.plans.get(decode_command(value or b"").workflow_id)
        except DecodeError:
            return True
        return planned is not None and not planned.brief and planned.then is None

    # -- what is rare ------------------------------------------------------------------------------------------------

    def _claimed(self, partition: int, offset: int) -> None:
        """A partition has a new owner."""
        if 0 < self.cluster.published.get(partition, 0) < offset:
            self.rules.mark("outbox derived again")
        others = [
            processor
            for processor in self.machines.processors()
            if processor.partition == partition and processor.status is ProcessorState.ACTIVE
        ]
        if others:
            self.rules.mark("two owners at once")
        if any(processor.turns_in_flight for processor in others):
            self.rules.mark("take-over with unacknowledged turns")

    # -- the checks --------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        self.bounds.look()
        self.kept.look()
        if self.world.chance.random() < STATE_CHECKED:
            for processor in self.machines.processors():
                self.rules.state(processor)
