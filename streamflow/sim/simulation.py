"""One simulated story from a seed: random programs, workers that live badly, and in the end an account.

For `FAULTY_SECONDS` things go wrong; then they stop, and within bounded time every accepted run must be closed with
what the oracle says.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from streamflow.client.client import Client
from streamflow.client.handle import Handle
from streamflow.client.requests import Surroundings
from streamflow.codec.payload import encode_value
from streamflow.errors import CommandRejected, StreamflowError, Unavailable, WorkflowCancelled, WorkflowTerminated
from streamflow.logs.base import COMMANDS
from streamflow.sim import programs
from streamflow.sim.cluster import Cluster
from streamflow.sim.faults import Faults
from streamflow.sim.log import SimLog
from streamflow.sim.machines import Machines
from streamflow.sim.rules import Rules, Violated
from streamflow.sim.world import World
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
        self.machines = Machines(
            self.cluster,
            programs.app,
            programs.app.name,
            self.story.randint(1, 3),
            chance=self.story,
            prepare=lambda: programs.observer.set(self._began),
        )
        self._faults = Faults(self.machines, seed)
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
        self.results: dict[str, Any] = {}
        self.failure: BaseException | None = None
        self.done = False
        self.world.after_each.append(self._check)

    def run(self) -> None:
        """From the first start to the last result."""
        for machine in self.machines.all:
            self.machines.start(machine)
        self.driver.run(self._drive())
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
        for workflow_id, program in self.programs.items():
            if workflow_id in self.stopped and workflow_id not in self.results:
                continue  # it was stopped, as asked
            if self.results[workflow_id] != programs.expected(program):
                raise Violated(
                    f"run {workflow_id}: expected {programs.expected(program)!r}, found {self.results[workflow_id]!r}"
                )

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

    def _began(self, info: StepInfo) -> None:
        try:
            self.rules.began(info.workflow_id, info.run, info.number, info.attempt)
        except Violated as error:
            self.failure = error  # raised here, it would be the step's

    # -- the driver --------------------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        try:
            log = SimLog(self.cluster, self.driver, programs.app.name)
            surroundings = Surroundings(self.world.chance, self.driver.clock.now_ms)
            async with Client(log, programs.app, surroundings=surroundings) as client:
                await asyncio.gather(*(self._accompany(client, name) for name in self.programs))
            self.done = True
        except BaseException as error:  # the story is over, whatever it was
            self.failure = error

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
            for processor in self.machines.processors():
                self.rules.state(processor)
