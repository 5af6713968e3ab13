"""Trimming: the owner copies live runs forward and lets the head of its history go; old commands and answers, too.

    look ──▶ copy forward, some runs at a time ──▶ publish what is derived ──▶ flush the store ──▶ cut

Rules of this file:

- The cut comes last. Before it every run that had a record below it has a durable snapshot above it, and everything
  derived from what goes is published. Dying at any point leaves a log that is whole; what was done is done again, or
  was enough.
- The cut is at a record that counts, and that is no claim: the first record kept must tell term, seq and the commands
  consumed. Such are the oldest records of runs, and what this owner appends: its records follow each other without a
  gap from its claim on, so the offset of its next one is known, and is used once that one is durable.
- It pays: at least half of what goes is of no run any more (and at least `trim_records_min` records go), so each turn
  is copied about once for every record that vanishes, however long the runs live.
- Never in the way: a few runs at a time, with the event loop and appends of turns in between.

A run's earlier runs under the same id are not copied, unless something derived from them may have to be derived again.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from streamflow.codec.avro import encode_history
from streamflow.codec.turns import for_snapshot
from streamflow.config import RECORD_BYTES_MAX
from streamflow.core.events import RunDeleted
from streamflow.errors import Fenced, InvalidArguments, Unavailable
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, HISTORY, REPLIES

if TYPE_CHECKING:
    from streamflow.worker.processor import Processor

log_ = logging.getLogger("streamflow.worker")

SNAPSHOT_OVERHEAD_BYTES: Final = 2_000
"""What the record of a snapshot holds beside its turns, with the key: two ids and some numbers."""
SNAPSHOT_TURNS_BYTES_MAX: Final = RECORD_BYTES_MAX - SNAPSHOT_OVERHEAD_BYTES
COPIED_BYTES_MAX: Final = RECORD_BYTES_MAX
"""Turns copied in one append after which the next run waits for the next one: some milliseconds of encoding."""
LOOKED_AT_ONCE: Final = 256
"""Runs looked at between two turns of the event loop: some two milliseconds."""
NEVER: Final = 1 << 62


class Snapshot(Struct, frozen=True):
    """What is to be copied forward of a run: the turns from `first_turn` to `turn`, in pieces that fit a record."""

    workflow_id: str
    first_turn: int
    turn: int
    turns: list[bytes]


class Trimmer:
    """Trims the topics of one owned partition. `run` it while the processor is active."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.partition = processor.partition
        self.log = processor.log
        self.state = processor.state
        self.limits = processor.limits
        self._looked_at = self._look_at = NEVER
        self._large = asyncio.Event()
        self._moved = asyncio.Event()

    def moved(self, end: int) -> None:
        """Something is durable or published; what is applied ends at `end`."""
        self._moved.set()
        if end >= self._look_at:
            self._large.set()

    async def run(self) -> None:
        """Trim whenever it is worth it, until cancelled. What fails is tried again when it is due the next time."""
        clock, next_at = self.processor.clock, 0
        try:
            start = await self.log.start_offset(HISTORY, self.partition)
        except Unavailable:
            start = self.state.applied_offset
        self._looked_at = start
        self._look_at = start + self.limits.trim_records_min
        self.moved(self.state.applied_offset)
        while True:
            try:
                if clock.now_ms() >= next_at:
                    next_at = clock.now_ms() + round(self.limits.trim_seconds * 1000)
                    await self._trim_by_age()
                    if self.state.applied_offset - self._looked_at >= self.limits.trim_records_min:
                        self._large.set()
                if self._large.is_set():
                    self._large.clear()
                    self._look_at = NEVER
                    await self._trim_history()
            except Fenced:
                return  # the processor has seen it, too
            except (Unavailable, InvalidArguments) as error:  # the latter where a cluster grants no deletion of records
                log_.warning("partition %d is not trimmed now: %s", self.partition, error)
                self._look_at = self.state.applied_offset + self.limits.trim_records_min
            await clock.wait(self._large, max(0, next_at - clock.now_ms()) / 1000)

    # -- the history -------------------------------------------------------------------------------------------------

    async def _trim_history(self) -> None:
        start = await self.log.start_offset(HISTORY, self.partition)
        looked_at = self.state.applied_offset
        cut, live = await self._look(start, looked_at)
        if cut is not None:
            await self._copy_forward(start, cut)
            await self._publish_up_to(cut)
            await self._flush()
            await self.log.trim(HISTORY, self.partition, cut)
            log_.info("partition %d: trimmed %d records of its history", self.partition, cut - start)
        # A look costs something for each live run: of many, it comes when as many records came, or with the next tick.
        self._looked_at = looked_at
        self._look_at = looked_at + max(self.limits.trim_records_min, live // 2)
        self.moved(self.state.applied_offset)

    async def _look(self, start: int, end: int) -> tuple[int | None, int]:
        """The highest cut that is worth it, None if none is, and how many records live runs have, roughly."""
        cut: int | None = None
        live = 0
        position = start
        while rows := self.state.oldest(position, before=end, limit=LOOKED_AT_ONCE):
            position = rows[-1][0] + 1  # no two runs have a record in common
            for offset, workflow_id in rows:
                if self._pays(offset - start, live):
                    cut = offset
                summary = self.state.summary(workflow_id)
                assert summary is not None, workflow_id
                live += summary.status.turn - summary.first_turn + 1
            await asyncio.sleep(0)
        return (end if self._pays(end - start, live) else cut), live

    def _pays(self, removed: int, live: int) -> bool:
        return removed >= self.limits.trim_records_min and 2 * live <= removed

    async def _copy_forward(self, start: int, cut: int) -> None:
        """Append snapshots of all runs whose oldest record lies before the cut."""
        while rows := self.state.oldest(start, before=cut, limit=self.limits.snapshot_runs_at_once):
            start = rows[0][0]  # those before have moved: a look from there does not walk over what they left
            snapshots: list[Snapshot] = []
            size = 0
            for _, workflow_id in rows:
                snapshot = self._snapshot(workflow_id)
                if snapshot is not None:
                    snapshots.append(snapshot)
                    size += sum(map(len, snapshot.turns))
                if size >= COPIED_BYTES_MAX:
                    break
            if snapshots:
                await self.processor.copy_forward(snapshots)
            else:
                await self._next_move()  # their deletion is under way
            await asyncio.sleep(0)
        while self.state.applied_offset <= cut:
            await self._next_move()  # the record at the cut is still to come

    def _snapshot(self, workflow_id: str) -> Snapshot | None:
        """The run with all of its turns up to now, also those under way: they come before the snapshot. None for one
        that is being deleted.
        """
        under_way = self.processor.under_way(workflow_id)
        if any(type(event) is RunDeleted for turn in under_way for event in turn.events):
            return None
        summary = self.state.summary(workflow_id)
        assert summary is not None, workflow_id
        first = summary.first_turn if self.state.offsets(summary).begun < self.processor.published else 0
        turns = self.state.encoded_turns(workflow_id, first) + [encode_history(turn) for turn in under_way]
        return Snapshot(
            workflow_id=workflow_id,
            first_turn=first,
            turn=under_way[-1].turn if under_way else summary.status.turn,
            turns=for_snapshot(turns, bytes_max=SNAPSHOT_TURNS_BYTES_MAX),
        )

    async def _publish_up_to(self, cut: int) -> None:
        """Wait until all that is derived from what goes is published.

        The processor knows; asking the log instead would tell it that an owner begins anew from what it answers, and
        forget that a publish has failed of which the processor is yet to hear.
        """
        while self.processor.published < cut:
            if not self.processor.publishes:
                self.processor.publish_offset()
            await self._next_move()

    async def _flush(self) -> None:
        """Let the store survive the machine: one that is older than the start of the log is of no use any more."""
        flushing = asyncio.get_running_loop().create_task(asyncio.to_thread(self.state.store.flush))
        try:
            await asyncio.shield(flushing)
        except asyncio.CancelledError:
            await asyncio.wait((flushing,))  # whoever cancels closes the store next
            raise

    async def _next_move(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    # -- the other topics --------------------------------------------------------------------------------------------

    async def _trim_by_age(self) -> None:
        """Let go what is older than anybody wants it. Harmless where the log does so by itself."""
        now_ms = self.processor.clock.now_ms()
        for topic, kept_seconds in (
            (COMMANDS, self.limits.commands_kept_seconds),
            (REPLIES, self.limits.replies_kept_seconds),
            (DEAD_LETTERS, self.limits.dead_letters_kept_seconds),
        ):
            before = await self.log.offset_at(topic, self.partition, now_ms - round(kept_seconds * 1000))
            if topic == COMMANDS:
                before = min(before, self.state.row().consumed)
            if before > await self.log.start_offset(topic, self.partition):
                await self.log.trim(topic, self.partition, before)
