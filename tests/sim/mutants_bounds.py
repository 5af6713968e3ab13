"""Limits that the product does not keep: see mutants.py. Invariant 8 is checked in streamflow/sim/bounds.py."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest import mock

from msgspec.structs import replace

from streamflow.logs.base import COMMANDS
from streamflow.worker.executor import Attempt, Executor
from streamflow.worker.processor import Processor
from streamflow.worker.queues import QueueReader
from streamflow.worker.trimming import Trimmer
from tests.sim.mutating import Patch, mutation, swap


@mutation("8", seeds=5)
def decide_however_much_is_unacknowledged() -> Patch:
    """A pass does not look at how many turns are under way."""
    usual = Processor._pass

    def decide(self: Processor) -> None:
        in_flight, self.turns_in_flight = self.turns_in_flight, 0
        usual(self)
        self.turns_in_flight += in_flight

    return swap(Processor, "_pass", decide)


@mutation("8", seeds=7)
def take_commands_however_much_is_outgoing() -> Patch:
    """Whether records for other topics get away is not looked at."""

    def is_full(self: Processor) -> bool:
        return (
            self._staged > 0
            or self.turns_in_flight > self.limits.decided_turns_unacknowledged_max
            or self.executor.is_full
        )

    return swap(Processor, "_is_full", is_full)


@mutation("8", seeds=21)
def take_commands_however_many_attempts_wait() -> Patch:
    """The executor is never full."""
    return mock.patch.object(Executor, "is_full", False)


@mutation("8", seeds=6)
def evict_nothing() -> Patch:
    """Runs stay in memory until they are closed."""
    return swap(Processor, "_evict", lambda self: None)


@mutation("8", seeds=1)
def look_at_all_runs_in_one_pass() -> Patch:
    """A new owner looks at all runs at once that have something to do."""

    async def recover_and_consume(self: Processor) -> None:
        for workflow_id in self.state.needing_attention():
            self.core.recover(workflow_id)
            self._staged = 1
            self._wake()
        self.fires.set()
        await self._consume()

    return swap(Processor, "_recover_and_consume", recover_and_consume)


@mutation("8", seeds=1)
def publish_no_offset_alone() -> Patch:
    """The published offset moves with what is published, and never else."""

    def publish(self: Processor, records: list[Any], published: int | None) -> None:
        self._unpublished += published is not None
        if records:
            self._unpublished = 0
            self._send(records, published)

    return swap(Processor, "_publish", publish)


@mutation("8", seeds=1)
def read_commands_without_a_limit() -> Patch:
    """The log gives as many as it likes."""

    async def consume(self: Processor) -> None:
        async for records in self.log.follow(COMMANDS, self.partition, self.core.consumed):
            await self._take(records)

    return swap(Processor, "_consume", consume)


@mutation("8", seeds=1)
def copy_all_runs_in_one_append() -> Patch:
    """Trimming copies forward all that it finds."""
    usual = Trimmer._copy_forward

    async def copy_forward(self: Trimmer, start: int, cut: int) -> None:
        self.limits = replace(self.limits, snapshot_runs_at_once=1_000)
        await usual(self, start, cut)

    return swap(Trimmer, "_copy_forward", copy_forward)


@mutation("8", seeds=5)
def run_all_attempts_at_once() -> Patch:
    """The number of slots is not looked at."""

    def start(self: Executor, attempt: Attempt) -> None:
        self.attempts[attempt.key] = attempt
        self._begin(attempt)

    return swap(Executor, "start", start)


@mutation("8", seeds=5)
def take_more_attempts_than_there_are_slots() -> Patch:
    """Whoever reads a queue begins all that it reads."""
    usual = QueueReader.__init__

    def init(self: QueueReader, *args: Any, **options: Any) -> None:
        usual(self, *args, **options | {"slots": asyncio.Semaphore(1_000)})

    return swap(QueueReader, "__init__", init)


@mutation("8", seeds=4)
def take_attempts_far_ahead() -> Patch:
    """A reader does not wait for the oldest attempt."""

    async def follow(self: QueueReader) -> None:
        async for records in self.log.follow(self.topic, self.partition, self._next, limit=self.limits.queue_read_max):
            for record in records:
                await self.slots.acquire()
                self._take(record)

    return swap(QueueReader, "_follow", follow)


@mutation("8", seeds=4)
def remember_all_answered_attempts() -> Patch:
    """What was answered is never forgotten."""

    def answered_now(self: QueueReader, key: Any, taken: Any) -> None:
        if self._taken.get(key) is taken:
            del self._taken[key]
        self._answered[key, taken.serial] = None
        self._close(taken.offset)

    return swap(QueueReader, "_answered_now", answered_now)
