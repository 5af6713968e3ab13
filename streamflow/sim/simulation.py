"""One simulated story from a seed: random programs, workers that live badly, and in the end an account.

For `FAULTY_SECONDS` things go wrong; then they stop, and within bounded time every accepted run must be closed with
what the oracle says.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeAlias

from streamflow.client.client import Client
from streamflow.client.handle import Handle
from streamflow.client.requests import Surroundings
from streamflow.codec.payload import encode_value
from streamflow.errors import CommandRejected, StreamflowError, Unavailable, WorkflowCancelled, WorkflowTerminated
from streamflow.logs.base import COMMANDS, TOPICS
from streamflow.sim import programs
from streamflow.sim.cluster import Cluster, Weather
from streamflow.sim.host import Disk, Loss, SimHost
from streamflow.sim.lane import FATES_OF_ONE, FATES_OF_PARTS
from streamflow.sim.log import APP_GROUP, SimLog
from streamflow.sim.rules import Rules, Violated
from streamflow.sim.world import Process, World
from streamflow.worker.worker import Worker
from streamflow.workflow.stepinfo import StepInfo

FAULTY_SECONDS: Final = 120.0
HEALING_SECONDS: Final = 40 * 86_400.0
SETTLING_SECONDS: Final = 200.0
STEPS_MAX: Final = 100_000
FAULTS: Final = (20, 40)
RUNS: Final = (4, 12)
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
    lives: int = 0
    wanted: bool = True

    @property
    def is_up(self) -> bool:
        return self.process is not None and self.process.is_alive


class Simulation:
    """The story of one seed. `run` raises `Violated`, `Stuck` or `TooLong` where something is wrong."""

    def __init__(self, seed: int, *, without: frozenset[int] = frozenset()) -> None:
        self.seed = seed
        self.without = without
        """Faults, by number, that are left out: what is left when all that does not matter is."""
        self.world = World(seed)
        self.story = random.Random(f"story {seed}")
        self.cluster = Cluster(self.world, partitions=self.story.randint(1, 4))
        self.calm = self.cluster.weather = Weather(delay=self.story.choice((0.001, 0.001, 0.03, 0.3)))
        """How it is when nothing goes wrong; where brokers are far away, writes go in groups."""
        self.rules = Rules(self.cluster)
        self.machines = [Machine(f"m{number}") for number in range(self.story.randint(1, 3))]
        self.driver = self.world.process("driver")
        self.programs = {
            f"run-{number}": programs.make(self.story, prefix="") for number in range(self.story.randint(*RUNS))
        }
        self.stopped = {
            workflow_id: how
            for workflow_id in self.programs
            if (how := self.story.choice((None, None, None, None, "cancelled", "terminated"))) is not None
        }
        """Runs that the driver asks to stop, and how they may then end."""
        self.faults: list[str] = []
        """What went wrong, in order."""
        self.results: dict[str, Any] = {}
        self.failure: BaseException | None = None
        self.done = False
        self.world.after_each.append(self._check)

    def run(self) -> None:
        """From the first start to the last result."""
        for machine in self.machines:
            self.start(machine)
        self.driver.run(self._drive())
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
        for workflow_id, program in self.programs.items():
            if workflow_id in self.stopped and workflow_id not in self.results:
                continue  # it was stopped, as asked
            if self.results[workflow_id] != programs.expected(program):
                raise Violated(
                    f"run {workflow_id}: expected {programs.expected(program)!r}, found {self.results[workflow_id]!r}"
                )

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
            worker = machine.worker = Worker(programs.app, log, host=SimHost(process, machine.disk))
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
        kinds: list[Fault] = [self._outage, self._compact, *(self._storm for _ in range(6))]
        kinds += [self._leaderless, self._seize, self._lose_offsets, self._trim]
        if machine.is_up:
            kinds += [self._cut, self._strand]
            kinds += [self._crash, self._crash, self._crash, self._pause, self._pause, self._leave, self._jump]
        said = chance.choice(kinds)(machine, chance)
        self.faults.append(f"{number}: at {self.world.now:.3f} s {said}")
        self.world.note("fault", self.faults[-1])

    def _crash(self, machine: Machine, chance: random.Random) -> str:
        loss = chance.choice((Loss.NOTHING, Loss.NOTHING, Loss.UNFLUSHED, Loss.OLD, Loss.DAMAGED))
        self.kill(machine, loss)
        seconds = chance.choice((0.1, 1.0, 10.0, 20.0))
        self._later(seconds, lambda: self.restart(machine))
        return f"{machine.name} is killed for {seconds:g} s, on its disk: {loss}"

    def _pause(self, machine: Machine, chance: random.Random) -> str:
        assert machine.process is not None
        seconds = chance.choice((0.05, 1.0, 5.0, 12.0, 20.0))
        machine.process.stop(seconds)
        return f"{machine.name} is stopped for {seconds:g} s"

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
        seconds = chance.choice((0.0, 60.0, 60.0))
        self.cluster.compact(delete_retention=seconds)
        return f"the compacted topics are cleaned, of tombstones older than {seconds:g} s, too"

    def _strand(self, machine: Machine, chance: random.Random) -> str:
        """What is sent hangs in the network, then the sender is gone: it lands among the records of its successor."""
        seconds, process = chance.uniform(0.5, 4.0), machine.process
        said = self._weather(Weather(late=0.7), seconds)

        def go() -> None:
            if machine.is_up and machine.process is process:
                self.kill(machine, Loss.NOTHING)
                self._later(20.0, lambda: self.restart(machine))

        self._later(seconds, go)
        return f"{said}; then {machine.name} is killed for 20 s"

    def _cut(self, machine: Machine, chance: random.Random) -> str:
        """One process hears nothing of the brokers, while others go on."""
        process = chance.choice((machine.process, machine.process, self.driver))
        assert process is not None
        requests_arrive, seconds = chance.random() < 0.5, chance.choice((0.5, 5.0, 12.0, 20.0))
        self.cluster.cut(process, requests_arrive=requests_arrive)
        self._later(seconds, lambda: self.cluster.mend(process))
        return f"{process.name} hears no broker for {seconds:g} s{', but they hear it' if requests_arrive else ''}"

    def _leaderless(self, machine: Machine, chance: random.Random) -> str:
        place, seconds = (chance.choice(TOPICS), chance.randrange(self.cluster.partitions)), chance.choice((0.5, 10.0))
        self.cluster.leaderless.add(place)
        self._later(seconds, lambda: self.cluster.leaderless.discard(place))
        return f"{place[0]}[{place[1]}] has no leader for {seconds:g} s"

    def _seize(self, machine: Machine, chance: random.Random) -> str:
        return self.cluster.group(APP_GROUP).seize(chance)

    def _lose_offsets(self, machine: Machine, chance: random.Random) -> str:
        return self.cluster.lose_offsets(chance)

    def _trim(self, machine: Machine, chance: random.Random) -> str:
        """Commands that are consumed go, though somebody may be reading them."""
        reader = chance.choice(self.rules.readers)
        start = self.cluster.stream(COMMANDS, reader.partition).trim(chance.randint(0, reader.consumed))
        return f"commands[{reader.partition}] begins at offset {start}"

    def _storm(self, machine: Machine, chance: random.Random) -> str:
        """A while in which requests are slow, lost, late, torn, repeated or unanswered."""
        weather = Weather(delay=chance.choice((0.001, 0.1, 0.5)), spike=chance.choice((0.0, 0.05, 0.3)))
        for name in (*FATES_OF_ONE, "refused", "slow", "partial", "full"):
            if chance.random() < 0.4:
                setattr(weather, name, chance.choice((0.01, 0.05, 0.2)))
        for name in FATES_OF_PARTS:  # few writes have several records
            if chance.random() < 0.6:
                setattr(weather, name, chance.choice((0.1, 0.5)))
        return self._weather(weather, chance.uniform(1.0, 15.0))

    def _outage(self, machine: Machine, chance: random.Random) -> str:
        return self._weather(Weather(down=True), chance.choice((0.5, 5.0, 15.0)))

    def _weather(self, weather: Weather, seconds: float) -> str:
        self.cluster.weather = weather

        def clear() -> None:
            if self.cluster.weather is weather:
                self.cluster.weather = self.calm
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
        self.cluster.weather = self.calm
        self.cluster.mend_all()
        for machine in self.machines:
            self.restart(machine)

    # -- the driver --------------------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                client = await self._insist(lambda: stack.enter_async_context(self._client()))
                await asyncio.gather(*(self._accompany(client, name) for name in self.programs))
            self.done = True
        except BaseException as error:  # the story is over, whatever it was
            self.failure = error

    def _client(self) -> Client:
        log = SimLog(self.cluster, self.driver, programs.app.name)
        return Client(log, programs.app, surroundings=Surroundings(self.world.chance, self.driver.clock.now_ms))

    async def _accompany(self, client: Client, workflow_id: str) -> None:
        """Start one run, send its signals, perhaps stop it, and wait for how it ends."""
        program = self.programs[workflow_id]
        await asyncio.sleep(self.story.uniform(0, FAULTY_SECONDS / 2))
        handle = await self._insist(lambda: client.start(programs.play, program, id=workflow_id))
        stopping = self.stopped.get(workflow_id)
        beside = None
        if stopping is not None:
            beside = asyncio.get_running_loop().create_task(self._stop(handle, stopping))
        for name in programs.signals(program):
            await asyncio.sleep(self.story.uniform(0, 5.0))
            signal = partial(handle.signal, name, f"value of {name}", id=f"{workflow_id}{name}")
            await self._insist(signal, may_be_closed=stopping is not None)
        try:
            result = await self._insist(handle.result)
        except (WorkflowCancelled, WorkflowTerminated) as error:
            how = "cancelled" if isinstance(error, WorkflowCancelled) else "terminated"
            self.rules.ended(workflow_id, how)
            if how != stopping:
                raise Violated(f"run {workflow_id}: it was {how}, asked for was {stopping}") from error
        else:
            self.rules.seen(workflow_id, result, encode_value(result))
            self.results[workflow_id] = result
        if beside is not None:
            await beside

    async def _stop(self, handle: Handle[Any], how: str) -> None:
        await asyncio.sleep(self.story.uniform(0, FAULTY_SECONDS))
        await self._insist(handle.cancel if how == "cancelled" else handle.terminate, may_be_closed=True)

    async def _insist(self, ask: Callable[[], Any], *, may_be_closed: bool = False) -> Any:
        """Ask again while nobody answers."""
        while True:
            try:
                return await ask()
            except Unavailable:
                await asyncio.sleep(1.0)
            except (WorkflowCancelled, WorkflowTerminated):
                raise
            except CommandRejected as error:
                if may_be_closed:
                    return None
                raise Violated(f"the driver was refused: {error!r}") from error
            except StreamflowError as error:
                raise Violated(f"the driver was refused: {error!r}") from error

    # -- strangers ---------------------------------------------------------------------------------------------------

    def _stranger(self, chance: random.Random) -> None:
        """Somebody else writes commands: garbage, or one that was sent before, perhaps to another partition."""
        partition = chance.randrange(self.cluster.partitions)
        sent = [record for number in range(self.cluster.partitions)
                for record in self.cluster.stream(COMMANDS, number).records]  # fmt: skip
        if sent and chance.random() < 0.7:
            again = chance.choice(sent)
            self.cluster.land(COMMANDS, partition, [(again.key, again.value)])
            self.world.note("stranger", f"repeats a command on partition {partition}")
        else:
            self.cluster.land(COMMANDS, partition, [(b"stranger", chance.randbytes(chance.randint(0, 40)))])
            self.world.note("stranger", f"writes garbage to partition {partition}")

    # -- the checks --------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.world.chance.random() < STATE_CHECKED:
            for machine in self.machines:
                if machine.is_up and machine.worker is not None:
                    for processor in list(machine.worker.processors.values()):
                        self.rules.state(processor)
