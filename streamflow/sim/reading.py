"""Somebody who only looks: lists runs, and watches some, in some of the worlds.

What a list or a watcher may show while things go wrong is what some valid turn left to be shown (`shown.py`): an owner
that is none any more may still answer. Once nothing goes wrong, a list shows all runs that there are.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, Literal

from streamflow.client.client import Client
from streamflow.client.handle import Handle
from streamflow.errors import Unavailable, WorkflowNotFound
from streamflow.ids import partition_of
from streamflow.logs.base import STATUS
from streamflow.projections.views import CLOSED_STATES, Page, RunStatus
from streamflow.sim import programs
from streamflow.sim.cluster import Cluster
from streamflow.sim.rules import Rules, Violated
from streamflow.sim.shown import Position, Statuses

READ: Final = 0.25
"""In how many of the worlds somebody looks: the stories of the others are the same without."""
LISTS: Final = (1, 4)
WATCHED: Final = 0.4
"""How many of the runs are watched."""
BEGUN_SECONDS: Final = 100.0
"""All lists, and watchers, begin within it."""
CALM_AT_SECONDS: Final = 250.0
"""By then nothing goes wrong any more, and whoever was stopped, or cut off, knows what it has missed."""
ASKED_AGAIN_SECONDS: Final = 3.0
KNOWN_SECONDS: Final = 5.0
"""What was durable so long ago its owner has applied."""
Order = Literal["asc", "desc"]


class Reader:
    """Looks at the runs of one world. All raise `Violated`."""

    def __init__(
        self,
        cluster: Cluster,
        statuses: Statuses,
        rules: Rules,
        chance: random.Random,
        insist: Callable[..., Any],
    ) -> None:
        self.cluster, self.statuses, self.rules, self.chance = cluster, statuses, rules, chance
        self._insist = insist

    async def look(self, client: Client, ids: Mapping[str, object]) -> None:
        """List, and watch, while the runs go on."""
        watched = [workflow_id for workflow_id in ids if self.chance.random() < WATCHED]
        lists = [self._list_some(client, ids) for _ in range(self.chance.randint(*LISTS))]
        await asyncio.gather(*lists, *(self._watch(client.handle(workflow_id)) for workflow_id in watched))

    async def look_at_last(self, client: Client, ids: Mapping[str, object]) -> None:
        """7. When all is calm: each run that there is all the time is listed, once, under what it is."""
        await asyncio.sleep(max(CALM_AT_SECONDS - self.cluster.world.now, KNOWN_SECONDS))
        order, limit = self._order(), self.chance.choice((1, 3, 100))
        state = self.chance.choice((None, None, "completed"))
        before = self._there(state)
        await asyncio.sleep(KNOWN_SECONDS)
        found: list[RunStatus] = []
        cursor: str | None = None
        while True:
            page = await self._insist(partial(client.list, state=state, order=order, limit=limit, cursor=cursor))
            found += page.items
            cursor = page.cursor
            if cursor is None:
                break
        self._judge(found, ids, order, state, None)
        missing = before & self._there(state) - {status.id for status in found}
        if missing:
            raise Violated(f"a list of all runs, {state=}, {limit=}, {order=}, has no {min(missing)} (7)")
        self.rules.mark("all runs listed")

    # -- lists -------------------------------------------------------------------------------------------------------

    async def _list_some(self, client: Client, ids: Mapping[str, object]) -> None:
        await asyncio.sleep(self.chance.uniform(0, BEGUN_SECONDS))
        order, limit = self._order(), self.chance.choice((1, 5, 100))
        state = self.chance.choice((None, "scheduled", "running", "completed", "cancelled"))
        workflow = self.chance.choice((None, None, programs.play, "play_briefly"))
        page: Page[RunStatus] = await self._insist(
            lambda: client.list(workflow=workflow, state=state, order=order, limit=limit)
        )
        name = workflow if isinstance(workflow, str | None) else workflow.name
        if len(page.items) > limit:
            raise Violated(f"a list has {len(page.items)} runs, asked for were {limit} (7)")
        self._judge(page.items, ids, order, state, name)
        self.rules.mark("some runs listed")

    def _judge(
        self,
        found: list[RunStatus],
        ids: Mapping[str, object],
        order: Order,
        state: str | None,
        workflow: str | None,
    ) -> None:
        """7. Each that is listed is a run, as it was after some turn; they come in order, and are of what was asked."""
        for status in found:
            if status.id not in ids or not self.rules.exists(status.id):
                raise Violated(f"a list shows {status.id}, and there never was such a run (7)")
            if state not in (None, status.state) or workflow not in (None, status.workflow):
                raise Violated(f"a list of {state=}, {workflow=} shows {status.id}: {status.state} of "
                               f"{status.workflow} (7)")  # fmt: skip
            self.statuses.seen(status)
        keys = [(status.created_at, status.id.encode()) for status in found]
        if keys != sorted(set(keys), reverse=order == "desc"):
            raise Violated(f"a list is not in order {order}, or shows a run twice: {keys} (7)")

    def _there(self, state: str | None) -> set[str]:
        return {
            workflow_id
            for workflow_id in self.rules.runs
            if (shown := self.statuses.current(workflow_id)) is not None and state in (None, shown.state)
        }

    def _order(self) -> Order:
        return "asc" if self.chance.random() < 0.5 else "desc"

    # -- watching ----------------------------------------------------------------------------------------------------

    async def _watch(self, handle: Handle[Any]) -> None:
        await asyncio.sleep(self.chance.uniform(0, BEGUN_SECONDS))
        while True:
            try:
                await self._watch_once(handle)
                return
            except Unavailable:
                await asyncio.sleep(ASKED_AGAIN_SECONDS)
            except WorkflowNotFound:
                if self.rules.was_deleted(handle.id):
                    return
                await asyncio.sleep(ASKED_AGAIN_SECONDS)  # it has not begun yet

    async def _watch_once(self, handle: Handle[Any]) -> None:
        """7. A watcher is shown one status after the other, none twice or too late, and the last one closes the run."""
        where, seen, state, since = f"a watcher of run {handle.id}", list[Position](), "", 0
        async for status in handle.watch():
            position = self.statuses.seen(status)
            if not seen:
                since = len(self.statuses.landed.get(handle.id, ()))
            elif position <= seen[-1]:
                raise Violated(f"{where} was shown {position} after {seen[-1]} (7)")
            if state in CLOSED_STATES:
                raise Violated(f"{where} was shown something after its end (7)")
            seen.append(position)
            state = status.state
        if state not in CLOSED_STATES:
            raise Violated(f"{where} was told that there is no more, and it is {state} (7)")
        self._complete(handle.id, seen, since, where)
        self.rules.mark("run watched to its end")

    def _complete(self, workflow_id: str, seen: list[Position], since: int, where: str) -> None:
        """7. What came over the topic after the first answer, and was news, was shown, and nothing else."""
        landed = self.statuses.landed.get(workflow_id, [])
        if any(position is None for _, position in landed):
            return  # whoever hears of a deletion asks the owner, whose answer may be ahead of the topic
        if strange := set(seen[1:]) - {position for _, position in landed}:
            raise Violated(f"{where} was shown {min(strange)}, which was never published (7)")
        stream = self.cluster.stream(STATUS, partition_of(workflow_id, self.cluster.partitions))
        there = {record.offset for record in stream.records}  # the others may have been cleaned away before they came
        newest = seen[0]
        for offset, position in landed[since:]:
            if position is None or position <= newest:
                continue
            newest = position
            if offset in there and newest < seen[-1] and newest not in seen:
                raise Violated(f"{where} was shown {seen}, and not {newest}, which was published (7)")
