"""Those who use the engine in a simulated world: they start runs, signal, stop, wait for, restart and delete them.

What a run may end with follows from its plan: the oracle's outcomes, or that it was stopped as it was asked to.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from streamflow.client.client import Client
from streamflow.client.handle import Handle
from streamflow.client.requests import Surroundings
from streamflow.codec.avro import encode_command
from streamflow.codec.payload import encode_value
from streamflow.core.commands import Command, StartWorkflow
from streamflow.errors import (
    CommandRejected,
    StreamflowError,
    Unavailable,
    WorkflowCancelled,
    WorkflowFailed,
    WorkflowNotFound,
    WorkflowTerminated,
)
from streamflow.logs.base import COMMANDS
from streamflow.sim import programs
from streamflow.sim.cluster import TWO_BELIEVE, Cluster
from streamflow.sim.log import SimLog
from streamflow.sim.programs import Program
from streamflow.sim.reading import Reader
from streamflow.sim.rules import Rules, Violated
from streamflow.sim.world import Process

RUNS: Final = (4, 12)
STARTED_SECONDS: Final = 60.0
"""All runs begin within it."""
STOPPED_SECONDS: Final = 120.0
"""Runs that are asked to stop are asked within it."""
ASKED_AGAIN_SECONDS: Final = 1.0
AWAY_SECONDS: Final = (0.0, 0.0, 300.0, 1_000.0)
"""How long nobody asks for the end of a brief run; by then it may be forgotten."""


@dataclass
class Plan:
    """What shall become of one run."""

    program: Program
    stop: str | None = None
    """How it is asked to end before its time: cancelled, terminated, timeout."""
    brief: bool = False
    """Whether it is forgotten soon after its end."""
    away: float = 0.0
    """How long nobody looks after it."""
    foreign: bool = False
    """Whether somebody starts it who has nothing but the schema of commands."""
    delay: float = 0.0
    timeout: float | None = None
    then: str | None = None
    """What follows: cleanup, again (cleaned up and started anew), restart (started anew as it is)."""
    second: Program | None = None
    """What the second run under its id plays."""


def plan(story: random.Random) -> Plan:
    """A random plan."""
    stop = story.choice((None, None, None, None, None, "cancelled", "terminated", "timeout"))
    then = story.choice((None, None, None, "cleanup", "again", "restart"))
    brief = story.random() < 0.15
    return Plan(
        program=_without_signals(story) if then == "again" else programs.make(story),
        stop=stop,
        brief=brief,
        away=story.choice(AWAY_SECONDS) if brief else 0.0,
        foreign=stop != "timeout" and story.random() < 0.2,
        delay=story.choice((0.0, 0.0, 0.0, 5.0, 700.0)),
        timeout=story.choice((0.5, 20.0, 1000.0)) if stop == "timeout" else None,
        then=then,
        second=_without_signals(story) if then in ("again", "restart") else None,
    )


def _without_signals(story: random.Random) -> Program:
    """A program for a run that might begin once more than it was told: a start may come late, after a clean-up."""
    while True:
        program = programs.make(story)
        if all(name.startswith("hurried") for name, _ in programs.signals(program)):
            return program


class Driver:
    """All clients, in one process of their own. `drive` returns when each run has come to what was planned."""

    def __init__(self, cluster: Cluster, process: Process, rules: Rules, story: random.Random) -> None:
        self.cluster, self.process, self.rules = cluster, process, rules
        self.story = story
        self.plans = {f"run-{number}": plan(story) for number in range(story.randint(*RUNS))}
        self.reader: Reader | None = None
        """Who looks at all the runs, if somebody does."""
        self._accompanied = asyncio.Event()

    @property
    def hangs(self) -> bool:
        """Whether a step of some run ends only when it is cancelled."""
        planned = [program for plan in self.plans.values() for program in (plan.program, plan.second) if program]
        return any(map(programs.hangs, planned))

    async def drive(self) -> None:
        """Accompany all runs to their ends. Raises `Violated`."""
        async with AsyncExitStack() as stack:
            client = await self.insist(lambda: stack.enter_async_context(self._client()))
            if self.reader is None:
                await self._accompany_all(client)
            else:
                await asyncio.gather(self._accompany_all(client), self._look(self.reader))

    async def _accompany_all(self, client: Client) -> None:
        await asyncio.gather(*(self._accompany(client, workflow_id) for workflow_id in self.plans))
        self._accompanied.set()

    async def _look(self, reader: Reader) -> None:
        """With a client of its own: what others ask of a run would let its watchers know more than was published."""
        async with AsyncExitStack() as stack:
            client = await self.insist(lambda: stack.enter_async_context(self._client()))
            await reader.look(client, self.plans)
            await self._accompanied.wait()
            await reader.look_at_last(client, self.plans)

    def _client(self) -> Client:
        log = SimLog(self.cluster, self.process, programs.app.name)
        surroundings = Surroundings(self.cluster.world.chance, self.process.clock.now_ms)
        return Client(log, programs.app, surroundings=surroundings)

    async def _accompany(self, client: Client, workflow_id: str) -> None:
        planned = self.plans[workflow_id]
        await asyncio.sleep(self.story.uniform(0, STARTED_SECONDS))
        handle = await self._start(client, workflow_id, planned)
        beside = None
        if planned.stop in ("cancelled", "terminated"):
            beside = asyncio.get_running_loop().create_task(self._stop(handle, planned.stop))
        await self._follow(handle, planned, planned.program, life=1)
        if beside is not None:
            await beside
        await self._afterwards(client, handle, planned)

    async def _start(self, client: Client, workflow_id: str, planned: Plan) -> Handle[Any]:
        workflow = programs.play_briefly if planned.brief else programs.play
        if planned.foreign:
            return await self._start_from_outside(client, workflow_id, workflow.name, planned)
        handle: Handle[Any] = await self.insist(
            lambda: client.start(
                workflow,
                planned.program,
                id=workflow_id,
                delay=planned.delay or None,
                timeout=planned.timeout,
            )
        )
        return handle

    async def _start_from_outside(self, client: Client, workflow_id: str, workflow: str, planned: Plan) -> Handle[Any]:
        """A producer in another language writes the command, to any partition, and knows nothing of what follows."""
        body = StartWorkflow(
            workflow=workflow, args=encode_value([planned.program]), delay_ms=round(planned.delay * 1000) or None
        )
        command = Command(command_id=f"start of {workflow_id}", workflow_id=workflow_id, sent_at=0, body=body)
        partition = self.story.randrange(self.cluster.partitions)
        self.cluster.land(COMMANDS, partition, [(workflow_id.encode(), encode_command(command))])
        handle = client.handle(workflow_id)
        while True:
            try:
                await self.insist(handle.status)
                return handle
            except WorkflowNotFound:
                if self.rules.was_deleted(workflow_id):
                    return handle
                await asyncio.sleep(ASKED_AGAIN_SECONDS)

    async def _follow(self, handle: Handle[Any], planned: Plan, program: Program, *, life: int) -> None:
        """Send its signals and wait for its end, which must be one that was planned."""
        for number, (name, value) in enumerate(programs.signals(program)):
            await asyncio.sleep(self.story.uniform(0, 5.0))
            signal = partial(handle.signal, name, value, id=f"{handle.id} {life} {number}")
            await self.insist(signal, may_be_closed=handle.id)
        await asyncio.sleep(planned.away)
        try:
            result = await self.insist(handle.result)
        except (WorkflowCancelled, WorkflowTerminated, WorkflowFailed) as error:
            how = {"WorkflowCancelled": "cancelled", "WorkflowTerminated": "terminated"}.get(type(error).__name__)
            if isinstance(error, WorkflowFailed) and error.error.type.endswith("TimeoutError"):
                how = "timeout"
            self.rules.ended(handle.id, how or "failed")
            # A request to stop whose outcome was unknown may come late, and meet the second run under the id.
            if how is None or how != planned.stop or (life == 2 and how == "timeout"):
                raise Violated(f"run {handle.id}: planned was {planned.stop}, a client was told {error!r}") from error
        except WorkflowNotFound as error:
            if not (planned.brief or life == 2) or not self.rules.was_deleted(handle.id):
                raise Violated(f"run {handle.id} is not found, and nobody deleted it") from error
            self.rules.mark("end of a brief run missed")
        else:
            self.rules.seen(handle.id, result, encode_value(result))
            # A start that comes late, after a clean-up, begins the first run once more.
            either = [program, planned.program] if planned.then == "again" else [program]
            if not any(programs.allows(each, result) for each in either):
                raise Violated(f"run {handle.id}: its program {program!r} does not allow its result {result!r}")

    async def _stop(self, handle: Handle[Any], how: str) -> None:
        await asyncio.sleep(self.story.uniform(0, STOPPED_SECONDS))
        await self.insist(handle.cancel if how == "cancelled" else handle.terminate, may_be_closed=handle.id)

    async def _afterwards(self, client: Client, handle: Handle[Any], planned: Plan) -> None:
        """The run is closed; some are deleted, some begin a second life under their id."""
        if planned.then is None or planned.brief:
            return
        if planned.then in ("cleanup", "again"):
            await self._clean_up(handle)
        if planned.second is not None:
            again = partial(client.start, programs.play, planned.second, id=handle.id, if_exists="restart")
            second = await self.insist(again)
            self.rules.mark(f"run begun {'after a clean-up' if planned.then == 'again' else 'again'}")
            await self._follow(second, planned, planned.second, life=2)

    async def _clean_up(self, handle: Handle[Any]) -> None:
        """Delete the run, which is closed.

        Refusals have no fence: an owner that was replaced, and has not heard of it, may say that the run is open still.
        Nobody else may, and whoever asks again comes to the successor.
        """
        while True:
            done = await self.insist(handle.cleanup, may_be_closed=handle.id)  # asked again, it may be gone already
            if done is True or self.rules.was_deleted(handle.id):
                self.rules.mark("run cleaned up")
                return
            if TWO_BELIEVE not in self.cluster.world.marks:
                raise Violated(f"run {handle.id} is closed and was not cleaned up")
            self.rules.mark("refused by an owner that was replaced")
            await asyncio.sleep(ASKED_AGAIN_SECONDS)

    async def insist(self, ask: Callable[[], Any], *, may_be_closed: str | None = None) -> Any:
        """Ask again while nobody answers. Of the run of that id it may be too late to ask anything."""
        while True:
            try:
                return await ask()
            except Unavailable:
                await asyncio.sleep(ASKED_AGAIN_SECONDS)
            except (WorkflowCancelled, WorkflowTerminated, WorkflowFailed):
                raise
            except WorkflowNotFound:
                if may_be_closed is not None:
                    return None
                raise
            except CommandRejected as error:
                if may_be_closed is not None and self.rules.has_ended(may_be_closed):
                    return None
                raise Violated(f"the driver was refused: {error!r}") from error
            except StreamflowError as error:
                raise Violated(f"the driver was refused: {error!r}") from error
