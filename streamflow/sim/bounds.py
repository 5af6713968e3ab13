"""Nothing grows beyond its named limit (design.md, section 9, invariant 8), by more than the limit itself allows.

What a worker asks of the log and hands over to it is judged in its handle (`BoundedLog`), call by call; what it holds,
between its callbacks (`Bounds.look`). The size of a record is checked where it lands (`rules.py`).

| limit | what is checked |
|---|---|
| `decided_turns_unacknowledged_max` | no pass begins above it; one that began below it may add all its turns |
| `commands_read_max`, `queue_read_max`, `late_statuses_at_once_max`, those of timers and history | no more is read |
| `outgoing_records_max`, `steps_waiting_max` | above it no command is taken in; those taken before may add to it |
| `pass_inputs_max` | no more runs of an earlier owner wait to be looked at by one pass |
| `snapshot_runs_at_once` | no append copies more runs |
| `live_runs_max` | above it all runs are busy, whenever nothing is left to decide or under way |
| `published_offset_batches` | the published offset is no more appends behind |
| `max_parallel_steps` | no more attempts run at once, and no more of queues are taken |
| `queue_window_max` | no reader is further ahead of its oldest attempt, or knows more answered ones |

Not checked: threads and processes, since a simulated host plays them (tests/worker/test_threads.py); limits of time,
which bound nothing by themselves; `late_status_runs_max`, `late_status_records_back_max` and the limits of the
restorer, the state and the client that are thousands of times larger than a story.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Final, cast

from streamflow.codec.avro import decode_history
from streamflow.config import Limits
from streamflow.core.events import Claim, RunSnapshot, Turn
from streamflow.logs.base import COMMANDS, HISTORY, STATUS, TIMERS, Record
from streamflow.sim.cluster import Cluster
from streamflow.sim.log import SimLog
from streamflow.sim.machines import Machine
from streamflow.sim.rules import Violated
from streamflow.sim.world import Process
from streamflow.worker.executor import Executor
from streamflow.worker.processor import Processor, ProcessorState
from streamflow.worker.queues import QueueService
from streamflow.worker.restore import READ_LIMIT
from streamflow.worker.timers import READ_RECORDS_MAX

LOOKED_EVERY: Final = 16
"""Events from one look to the next: a look costs a third of one, and what grew too far does not shrink at once."""


class BoundedLog(SimLog):
    """The handle of a worker, where it is judged what is asked of the log at once. It raises nothing: `Bounds.look`
    does, since here it would be an error of the log's.
    """

    def __init__(self, cluster: Cluster, process: Process, app: str, *, bounds: Bounds) -> None:
        super().__init__(cluster, process, app)
        self._bounds = bounds
        self._appends: dict[int, list[tuple[asyncio.Future[int], int]]] = {}
        """What is under way to each partition, with its turns."""

    def append(
        self, partition: int, expected_offset: int, records: Sequence[tuple[bytes, bytes]]
    ) -> asyncio.Future[int]:
        decoded = [decode_history(value) for _, value in records]
        turns = [record for record in decoded if isinstance(record, Turn)]
        # Whoever claims has nothing under way: what its predecessor on this handle had is none of its own.
        before = [each for each in self._appends.get(partition, ()) if not each[0].done()] if turns else []
        count = sum(turn.part == 0 for turn in turns)
        where, limits = f"history[{partition}] {expected_offset}", self._bounds.limits
        self._bound(where, "unacknowledged turns before a pass", sum(turns for _, turns in before),
                    limits.decided_turns_unacknowledged_max)  # fmt: skip
        copied = {record.workflow_id for record in decoded if isinstance(record, RunSnapshot)}
        self._bound(where, "runs copied forward in one append", len(copied), limits.snapshot_runs_at_once)
        future = super().append(partition, expected_offset, records)
        if turns:
            self._appends[partition] = [*before, (future, count)]
        elif any(isinstance(record, Claim) for record in decoded):
            self._appends[partition] = []
        return future

    def follow(self, topic: str, partition: int, offset: int, *, limit: int = 1000) -> AsyncIterator[list[Record]]:
        limits = self._bounds.limits
        wanted = {
            COMMANDS: limits.commands_read_max,
            STATUS: limits.late_statuses_at_once_max,
            TIMERS: READ_RECORDS_MAX,
        }
        self._bound(f"{topic}[{partition}]", "records read at once", limit, wanted.get(topic, limits.queue_read_max))
        processor = self._bounds.processor(self._process, partition) if topic == COMMANDS else None
        if processor is not None:  # it has looked at its runs; what is left of them waits for one pass
            waiting = len(processor.core._wake)
            self._bound(f"{topic}[{partition}]", "runs to be looked at in one pass", waiting, limits.pass_inputs_max)
        batches = super().follow(topic, partition, offset, limit=limit)
        return self._commands(partition, batches) if topic == COMMANDS else batches

    async def _commands(self, partition: int, batches: AsyncIterator[list[Record]]) -> AsyncIterator[list[Record]]:
        """Whoever asks for the next commands has taken these in: at once, or when there was room."""
        async with aclosing(cast("AsyncGenerator[list[Record]]", batches)):
            async for records in batches:
                full, at = self._bounds.fullness(self._process, partition), self._process.callbacks
                yield records
                if full is not None and self._process.callbacks == at:
                    self._bound(f"{COMMANDS}[{partition}]", *full)

    async def read(self, topic: str, partition: int, offset: int, *, limit: int = 1000) -> list[Record]:
        if topic == HISTORY:
            self._bound(f"{topic}[{partition}]", "records read at once", limit, READ_LIMIT)
        return await super().read(topic, partition, offset, limit=limit)

    def _bound(self, where: str, what: str, found: int, most: int) -> None:
        if found > most and self._bounds.broken is None:
            self._bounds.broken = _violated(where, what, found, most)


class Bounds:
    """All limits of all workers of a world."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.machines: Sequence[Machine] = ()
        self.broken: Violated | None = None
        """What a handle has seen."""
        self._events = 0

    def log(self, cluster: Cluster, process: Process, app: str) -> SimLog:
        """The handle of a worker."""
        return BoundedLog(cluster, process, app, bounds=self)

    def look(self) -> None:
        """8. Called after each event; looks now and then."""
        if self.broken is not None:
            raise self.broken
        self._events += 1
        if self._events % LOOKED_EVERY:
            return
        for machine in self.machines:
            worker = machine.worker
            if not machine.is_up or worker is None or worker.executor is None:
                continue
            _executor(machine.name, worker.executor)
            if worker.services:
                _queues(worker.services, worker.limits, worker.max_parallel_steps)
            for processor in worker.processors.values():
                self._processor(processor)

    def processor(self, process: Process, partition: int) -> Processor | None:
        """That of a partition in a process, if there is one now."""
        worker = next((machine.worker for machine in self.machines if machine.process is process), None)
        return None if worker is None else worker.processors.get(partition)

    def fullness(self, process: Process, partition: int) -> tuple[str, int, int] | None:
        """What a partition has too much of to take in a command now; None if it may."""
        processor = self.processor(process, partition)
        if processor is None:
            return None
        limits = processor.limits
        for what, found, most in (
            ("outgoing records", processor.outbox_lag, limits.outgoing_records_max),
            ("unacknowledged turns", processor.turns_in_flight, limits.decided_turns_unacknowledged_max),
            ("attempts that wait", len(processor.executor.waiting), limits.steps_waiting_max),
        ):
            if found > most:
                return f"{what} when a command was taken in", found, most
        return None

    def _processor(self, processor: Processor) -> None:
        if processor.status is not ProcessorState.ACTIVE:
            return
        where, most = f"partition {processor.partition}", processor.limits.published_offset_batches
        _bound(where, "appends since the published offset", processor._unpublished, most)
        if not processor.turns_in_flight and not processor.core.has_work:
            _live(processor, where)


def _live(processor: Processor, where: str) -> None:
    """Above the limit no run is in memory that only waits."""
    live = processor.core.live
    if len(live) > processor.limits.live_runs_max:
        _bound(where, "runs in memory that only wait", sum(not each.run.open_attempts for each in live.values()), 0)


def _executor(where: str, executor: Executor) -> None:
    _bound(where, "attempts at once", len(executor.running), executor.max_parallel_steps)


def _queues(services: list[QueueService], limits: Limits, slots: int) -> None:
    taken = 0
    for service in services:
        for reader in service.readers.values():
            where = f"{reader.topic}[{reader.partition}]"
            _bound(where, "records beyond the oldest under way", reader.window, limits.queue_window_max)
            _bound(where, "answered attempts that are known", reader.remembered, limits.queue_window_max)
            taken += reader.under_way
    _bound(services[0].owner, "attempts taken from queues", taken, slots)


def _bound(where: str, what: str, found: int, most: int) -> None:
    if found > most:
        raise _violated(where, what, found, most)


def _violated(where: str, what: str, found: int, most: int) -> Violated:
    return Violated(f"{where}: {found:,} {what}, allowed are {most:,} (8)")
