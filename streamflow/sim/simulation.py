"""One simulated story from a seed: random programs, workers that live badly, and in the end an account.

For `FAULTY_SECONDS` things go wrong; then they stop, and within bounded time every accepted run must be closed with
what the oracle says.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeAlias

from streamflow.codec.avro import decode_command
from streamflow.codec.envelope import DecodeError
from streamflow.config import Limits
from streamflow.errors import Unavailable
from streamflow.logs.base import COMMANDS
from streamflow.sim import programs
from streamflow.sim.cluster import Cluster, Weather
from streamflow.sim.driver import Driver
from streamflow.sim.host import Disk, Loss, SimHost
from streamflow.sim.log import SimLog
from streamflow.sim.rules import Rules, Violated
from streamflow.sim.world import Process, World
from streamflow.worker.processor import ProcessorState
from streamflow.worker.worker import Worker
from streamflow.workflow.stepinfo import StepInfo

FAULTY_SECONDS: Final = 120.0
HEALING_SECONDS: Final = 40 * 86_400.0
SETTLING_SECONDS: Final = 200.0
STEPS_MAX: Final = 100_000
FAULTS: Final = (20, 40)
KILLED_WITHIN: Final = 400
"""A process that is killed or stopped runs up to so many callbacks more: it may happen at any of its awaits."""
STRANGERS_MAX: Final = 8
"""Commands that others write to the topic."""
STATE_CHECKED: Final = 0.002
"""How often, per event, the state of an owner is compared with the log's."""


Fault: TypeAlias = "Callable[[Machine, random.Random], str]"


@dataclass
class Machine:
    """Where one worker lives after another."""

    name: str
    disk: Disk = field(default_factory=Disk)
    process: Process | None = None
    worker: Worker | None = None
    owns: bool = True
    """Whether it is a candidate for partitions; otherwise it serves the step queue alone."""
    serves: bool = False
    """Whether it serves the step queue beside its partitions."""
    lives: int = 0
    wanted: bool = True

    @property
    def is_up(self) -> bool:
        return self.process is not None and self.process.is_alive


def limits(story: random.Random) -> Limits:
    """Limits that are met, some of them, in a story as small as these."""
    return Limits(
        live_runs_max=story.choice((1, 4, 512)),
        decided_turns_unacknowledged_max=story.choice((1, 8, 4096)),
        pass_inputs_max=story.choice((1, 256)),
        commands_read_max=story.choice((1, 16, 512)),
        published_offset_batches=story.choice((1, 100)),
        queue_read_max=story.choice((1, 16)),
        queue_window_max=story.choice((1, 8, 256)),
        outgoing_records_max=story.choice((4, 20_000)),
        trim_records_min=story.choice((8, 60, 20_000)),
        snapshot_runs_at_once=story.choice((1, 32)),
        trim_seconds=story.choice((5.0, 600.0)),
        commands_kept_seconds=story.choice((70.0, 7 * 86_400.0)),
        replies_kept_seconds=story.choice((70.0, 3_600.0)),
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
        self.rules = Rules(self.cluster)
        self.limits = limits(self.story)
        self.parallel = self.story.choice((1, 4, 64))
        self.machines = [Machine(f"m{number}") for number in range(self.story.randint(1, 3))]
        self.machines += [Machine(f"q{number}", owns=False) for number in range(self.story.randint(0, 2))]
        if all(machine.owns for machine in self.machines):
            self.machines[0].serves = True
        self.driver = Driver(self.cluster, self.world.process("driver"), self.rules, self.story)
        self.faults: list[str] = []
        """What went wrong, in order."""
        self.failure: BaseException | None = None
        self.done = False
        self.world.after_each.append(self._check)
        self.rules.claimed.append(self._claimed)
        if self.story.random() < 0.5:  # else long sleeps pass, and faults come days after the beginning
            self.world.leap_to = lambda: None

    def run(self) -> None:
        """From the first start to the last result."""
        for machine in self.machines:
            self.start(machine)
        self.driver.process.run(self._drive())
        for number in range(self.story.randint(*FAULTS)):
            at = self.story.uniform(0, FAULTY_SECONDS)
            if number not in self.without:
                self.world.at(at, partial(self.fault, number))
        for number in range(self.story.randint(0, STRANGERS_MAX)):
            chance = random.Random(f"stranger {number} of {self.seed}")
            self.world.at(chance.uniform(0, FAULTY_SECONDS), partial(self._stranger, chance))
        self.world.at(FAULTY_SECONDS, self.heal)
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

    def start(self, machine: Machine) -> None:
        """A worker process on that machine."""
        machine.lives += 1
        process = machine.process = self.world.process(f"{machine.name}-{machine.lives}")
        process.wall_offset = self.story.choice((0.0, 0.0, 0.0, -2.0, 3.0))
        process.drift = self.story.choice((1.0, 1.0, 0.999, 1.001))
        self.world.note(process.name, "starts")
        process.run(self._serve(machine, process))

    async def _serve(self, machine: Machine, process: Process) -> None:
        programs.observer.set(self._began)
        while True:
            log = SimLog(self.cluster, process, programs.app.name)
            worker = machine.worker = Worker(
                programs.app,
                log,
                host=SimHost(process, machine.disk),
                limits=self.limits,
                max_parallel_steps=self.parallel,
                queues=[programs.QUEUE] if machine.serves or not machine.owns else [],
                owns_partitions=machine.owns,
            )
            try:
                await worker.start()
                await worker.wait()
                return
            except Unavailable as error:  # a supervisor would start it again
                self.world.note(process.name, f"could not serve: {error}")
                await asyncio.sleep(1.0)

    def _began(self, info: StepInfo) -> None:
        try:
            self.rules.began(info.workflow_id, info.run, info.number, info.attempt)
        except Violated as error:
            self.failure = error  # raised here, it would be the step's

    def kill(self, machine: Machine, loss: Loss) -> None:
        """The process dies, and its disk may lose something."""
        assert machine.process is not None
        machine.process.kill()
        if machine.worker is not None and any(each.turns_in_flight for each in machine.worker.processors.values()):
            self.rules.mark("killed with unacknowledged turns")
        machine.worker = None
        machine.disk.lose(loss, machine.process)

    def restart(self, machine: Machine) -> None:
        """Start it again, if it is down and should be up."""
        if machine.wanted and not machine.is_up:
            self.start(machine)

    # -- faults ------------------------------------------------------------------------------------------------------

    def fault(self, number: int) -> None:
        """Something goes wrong. What, is drawn for each number apart, so that faults can be left out."""
        chance = random.Random(f"fault {number} of {self.seed}")
        machine = chance.choice(self.machines)
        kinds: list[Fault] = [self._storm, self._storm, self._outage, self._compact]
        if machine.is_up:
            kinds += [self._crash, self._crash, self._crash, self._pause, self._pause, self._leave, self._jump]
        said = chance.choice(kinds)(machine, chance)
        self.faults.append(f"{number}: at {self.world.now:.3f} s {said}")
        self.world.note("fault", self.faults[-1])

    def _crash(self, machine: Machine, chance: random.Random) -> str:
        process = machine.process
        assert process is not None
        loss = chance.choice((Loss.NOTHING, Loss.NOTHING, Loss.UNFLUSHED, Loss.OLD, Loss.DAMAGED))
        seconds = chance.choice((0.1, 1.0, 10.0, 20.0))

        def strike() -> None:
            if machine.process is process and process.is_alive:
                self.kill(machine, loss)
                self._later(seconds, lambda: self.restart(machine))

        callbacks = chance.randint(0, KILLED_WITHIN)
        process.after(callbacks, strike)
        return f"{machine.name} is killed after {callbacks} callbacks, for {seconds:g} s, on its disk: {loss}"

    def _pause(self, machine: Machine, chance: random.Random) -> str:
        assert machine.process is not None
        seconds = chance.choice((0.05, 1.0, 5.0, 12.0, 20.0))
        callbacks = chance.randint(0, KILLED_WITHIN)
        machine.process.after(callbacks, partial(machine.process.stop, seconds))
        return f"{machine.name} is stopped after {callbacks} callbacks, for {seconds:g} s"

    def _leave(self, machine: Machine, chance: random.Random) -> str:
        """SIGTERM, and another life later."""
        process, worker = machine.process, machine.worker
        if process is None or worker is None:
            return f"{machine.name} has not begun yet"

        async def leave() -> None:
            await worker.stop()
            process.kill()

        process.run(leave())
        seconds = chance.uniform(10.0, 30.0)
        self._later(seconds, lambda: self.restart(machine))
        return f"{machine.name} is asked to leave for {seconds:.1f} s"

    def _jump(self, machine: Machine, chance: random.Random) -> str:
        assert machine.process is not None
        machine.process.wall_offset += chance.choice((-3600.0, -5.0, 5.0, 60.0))
        return f"the wall clock of {machine.name} jumps to {machine.process.wall_offset:+g} s"

    def _compact(self, machine: Machine, chance: random.Random) -> str:
        self.cluster.compact()
        return "the compacted topics are cleaned"

    def _storm(self, machine: Machine, chance: random.Random) -> str:
        """A while in which requests are slow, lost, late, torn, repeated or unanswered."""
        weather = Weather(delay=chance.choice((0.001, 0.01, 0.1)), spike=chance.choice((0.0, 0.05, 0.3)))
        for name in ("lost", "late", "torn", "unacknowledged", "repeated", "refused"):
            if chance.random() < 0.4:
                setattr(weather, name, chance.choice((0.01, 0.05, 0.2)))
        return self._weather(weather, chance.uniform(1.0, 15.0))

    def _outage(self, machine: Machine, chance: random.Random) -> str:
        return self._weather(Weather(down=True), chance.choice((0.5, 5.0, 15.0)))

    def _weather(self, weather: Weather, seconds: float) -> str:
        self.cluster.weather = weather

        def clear() -> None:
            if self.cluster.weather is weather:
                self.cluster.weather = Weather()
                self.world.note("weather", "clear")

        self._later(seconds, clear)
        usual = vars(Weather())
        changed = ", ".join(f"{name} {value:g}" for name, value in vars(weather).items() if value != usual[name])
        return f"for {seconds:.1f} s: {changed or 'nothing'}"

    def _later(self, seconds: float, event: Callable[[], None]) -> None:
        self.world.at(self.world.now + seconds, event)

    def heal(self) -> None:
        """From here on nothing goes wrong any more."""
        self.world.note("world", "heals")
        self.world.leap_to = self.cluster.next_due
        self.cluster.weather = Weather()
        for machine in self.machines:
            self.restart(machine)

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
            for machine in self.machines
            if machine.is_up and machine.worker is not None
            if (processor := machine.worker.processors.get(partition)) is not None
            if processor.status is ProcessorState.ACTIVE
        ]
        if others:
            self.rules.mark("two owners at once")
        if any(processor.turns_in_flight for processor in others):
            self.rules.mark("take-over with unacknowledged turns")

    # -- the checks --------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.world.chance.random() < STATE_CHECKED:
            for machine in self.machines:
                if machine.is_up and machine.worker is not None:
                    for processor in list(machine.worker.processors.values()):
                        self.rules.state(processor)
