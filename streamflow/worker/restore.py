"""Restore: bring a partition's store to the end of its history, through the reading rule; the same fold as live."""

from __future__ import annotations

import logging
import time
from asyncio import sleep
from collections.abc import Callable
from typing import Final, NoReturn

from streamflow.codec.avro import decode_history, encode_history
from streamflow.codec.envelope import DecodeError
from streamflow.core.events import Claim, RunSnapshot, Turn
from streamflow.core.machines.run import Run
from streamflow.core.machines.table import IllegalTransition
from streamflow.core.reading import Assembler, ReadingRule
from streamflow.errors import CorruptLog
from streamflow.logs.base import HISTORY, Log, Record
from streamflow.worker.state import Change, PartitionRow, PartitionState, change_of

log_ = logging.getLogger("streamflow.worker")

RUNS_FOLDED_MAX: Final = 10_000
"""Runs kept in memory while restoring: beyond it they are folded again from the store."""
PROGRESS_SECONDS: Final = 1.0
"""How often a long restore says how far it is."""
READ_LIMIT: Final = 2_000
"""Records folded at once, into one write batch: some 50 ms during which the event loop waits."""


class Restorer:
    """Folds history records into a partition's state."""

    def __init__(
        self, state: PartitionState, partition: int, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        row = state.row()
        self.state = state
        self.partition = partition
        self.rule = ReadingRule(term=row.term, seq=row.seq, started=row.started)
        self.parts = Assembler()
        self.consumed = row.consumed
        self.at = row.at
        self.offset = state.applied_offset
        self._monotonic = monotonic
        self._parts_offset = 0
        self._runs: dict[str, Run] = {}
        self._changes: list[Change] = []

    def row(self) -> PartitionRow:
        """Where the partition stands after what was folded."""
        seq = self.rule.seq - len(self.parts.parts)
        return PartitionRow(self.rule.term, seq, self.rule.started, self.consumed, self.at)

    async def run(self, log: Log) -> None:
        """Fold everything up to the end that the log has now."""
        end = await log.end_offset(HISTORY, self.partition)
        start = await log.start_offset(HISTORY, self.partition)
        self.offset = max(self.offset, start)
        begun_at = said_at = self._monotonic()
        first = self.offset
        while self.offset < end:
            records = await log.read(HISTORY, self.partition, self.offset, limit=READ_LIMIT)
            if not records:
                self.offset = end  # offsets that no reader ever sees
                break
            self.fold(records)
            await sleep(0)
            now = self._monotonic()
            if now - said_at >= PROGRESS_SECONDS:
                said_at = now
                done, rate = self.offset - first, (self.offset - first) / (now - begun_at)
                log_.info("partition %d: restored %d of %d records (%.0f/s)", self.partition, done, end - first, rate)

    def fold(self, records: list[Record]) -> None:
        """Fold records that follow each other and write the result in one batch."""
        for record in records:
            self._one(record)
        # Parts without their last one stay unapplied: a reader that begins again must see all of them.
        applied = self._parts_offset if self.parts.parts else self.offset
        self.state.apply(self._changes, self.row(), applied_offset=applied)
        self._changes = []
        if len(self._runs) > RUNS_FOLDED_MAX:
            self._runs.clear()

    def _one(self, record: Record) -> None:
        if record.value is None:
            self._refuse(record, "expected a claim or a turn, found a tombstone")
        try:
            decoded = decode_history(record.value)
        except DecodeError as error:
            self._refuse(record, f"expected a claim or a turn, {error}")
        self.offset = record.offset + 1
        if not self.rule.accepts(decoded):
            if self.rule.gap:
                self.parts.drop()  # the rest of them never counts
            return
        if isinstance(decoded, Claim):
            self.parts.drop()
            self.at = max(self.at, decoded.at)
            return
        if isinstance(decoded, RunSnapshot):
            self._refuse(record, "found a snapshot, which only newer versions write: upgrade")
        if decoded.part == 0:
            self._parts_offset = record.offset
        turn = self.parts.add(decoded)
        if turn is not None:
            try:
                self._turn(turn, record.value if turn is decoded else encode_history(turn))
            except (IllegalTransition, IndexError, KeyError, ValueError) as error:
                self._refuse(record, f"turn {turn.turn} of run {turn.workflow_id} does not follow: {error}")

    def _refuse(self, record: Record, why: str) -> NoReturn:
        raise CorruptLog(
            f"history partition {self.partition}, offset {record.offset}: {why}. "
            f"Only the partition's owner may write there: find out who did, and restore the log from a copy"
        ) from None

    def _turn(self, turn: Turn, value: bytes) -> None:
        run = self._runs.get(turn.workflow_id)
        if run is None:
            run = Run(workflow_id=turn.workflow_id)
            if turn.turn > 1:
                for earlier in self.state.current_turns(turn.workflow_id):
                    run.fold(earlier)
            self._runs[turn.workflow_id] = run
        run.fold(turn)
        self._changes.append(change_of(run, turn, value))
        self.consumed = max(self.consumed, turn.consumed)
        self.at = max(self.at, turn.at)
