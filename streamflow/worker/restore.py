"""Restore: bring a partition's store to the end of its history, through the reading rule; the same fold as live.

The head of a history may be trimmed. Then there may be turns of runs whose beginning is gone: they are skipped, since
the owner trimmed only when a snapshot of each such run was in the log, further on, with these turns in it. A run that
is still without its beginning at the end of the log shows that something else removed it.
"""

from __future__ import annotations

import logging
import time
from asyncio import sleep
from collections.abc import Callable
from typing import Final, NoReturn

from streamflow.codec.avro import decode_history, encode_history
from streamflow.codec.envelope import DecodeError, UnknownSchema
from streamflow.codec.turns import turns_of
from streamflow.core.events import INSTANT_MS_MAX, Claim, Consumed, RunCreated, RunDeleted, RunSnapshot, Turn
from streamflow.core.machines.run import Run, RunState
from streamflow.core.machines.table import IllegalTransition
from streamflow.core.reading import Assembler, ReadingRule
from streamflow.errors import CorruptLog, Unavailable
from streamflow.ids import ID_BYTES_MAX
from streamflow.logs.base import HISTORY, Log, Record
from streamflow.worker.state import Entry, Headless, PartitionRow, PartitionState, change_of, restored_of

log_ = logging.getLogger("streamflow.worker")

RUNS_FOLDED_MAX: Final = 10_000
"""Runs kept in memory while restoring: beyond it they are folded again from the store."""
PROGRESS_SECONDS: Final = 1.0
"""How often a long restore says how far it is."""
TURN_MAX: Final = 2**32 - 1
"""The last turn that has a place in the store: at a thousand a second it takes 50 days of one run."""
READ_LIMIT: Final = 2_000
"""Records read at once."""
FOLD_MAX: Final = 500
"""Records folded at once, into one write batch: some 12 ms during which the event loop waits. A worker restores all its
partitions side by side, and gives some of them to the next worker meanwhile, which takes a few rounds of the loop."""
TOLD_MIN: Final = 1_000
"""Records whose restore is worth a line at its end."""


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
        self.trimmed = False
        """Whether the log begins later than at its first record, so that turns may be without their beginning."""
        self.headless = state.headless()
        self._monotonic = monotonic
        self._parts_offset = 0
        self._runs: dict[str, Run] = {}
        self._entries: list[Entry] = []

    def row(self) -> PartitionRow:
        """Where the partition stands after what was folded."""
        seq = self.rule.seq - len(self.parts.parts)
        return PartitionRow(self.rule.term, seq, self.rule.started, self.consumed, self.at)

    async def run(self, log: Log) -> None:
        """Fold everything up to the end that the log has now."""
        # The start first: whatever was trimmed by then, its snapshots lie before the end that is asked for next.
        start = await self._check_start(log)
        end = await log.end_offset(HISTORY, self.partition)
        self.trimmed = start > 0
        self.offset = max(self.offset, start)
        begun_at = said_at = self._monotonic()
        first = self.offset
        while self.offset < end:
            records = await log.read(HISTORY, self.partition, self.offset, limit=READ_LIMIT)
            if not records or records[0].offset != self.offset:
                await self._check_start(log)
            if not records:
                self.offset = end  # offsets that no reader ever sees
                break
            for first_of in range(0, len(records), FOLD_MAX):
                self.fold(records[first_of : first_of + FOLD_MAX])
                await sleep(0)
            now = self._monotonic()
            if now - said_at >= PROGRESS_SECONDS:
                said_at = now
                done, rate = self.offset - first, (self.offset - first) / (now - begun_at)
                log_.info("partition %d: restored %d of %d records (%.0f/s)", self.partition, done, end - first, rate)
        if self.offset - first >= TOLD_MIN:
            done, seconds = self.offset - first, self._monotonic() - begun_at
            log_.info("partition %d: restored %d records in %.3f s", self.partition, done, seconds)
        if self.headless:
            raise CorruptLog(
                f"history partition {self.partition} begins at offset {start}, and holds turns of run "
                f"{min(self.headless)} without its beginning or a snapshot of it ({len(self.headless)} such runs): "
                f"only the engine may trim the history; restore the log from a copy"
            )

    async def _check_start(self, log: Log) -> int:
        """Where the log begins; `Unavailable` if what should be read next is gone: the store must begin anew."""
        start = await log.start_offset(HISTORY, self.partition)
        if 0 < self.offset < start:
            raise Unavailable(
                f"history partition {self.partition} was trimmed up to offset {start}, while it was read up to "
                f"{self.offset}: reading it again from its new start"
            )
        return start

    def fold(self, records: list[Record]) -> None:
        """Fold records that follow each other and write the result in one batch."""
        for record in records:
            self._one(record)
        # Parts without their last one stay unapplied: a reader that begins again must see all of them.
        applied = self._parts_offset if self.parts.parts else self.offset
        self.state.apply(self._entries, self.row(), applied_offset=applied)
        self._entries = []
        if len(self._runs) > RUNS_FOLDED_MAX:
            self._runs.clear()

    def _one(self, record: Record) -> None:
        if record.value is None:
            self._refuse(record, "expected a claim or a turn, found a tombstone")
        try:
            decoded = decode_history(record.value)
        except UnknownSchema as error:  # no damage: nothing is to be restored from a copy
            raise CorruptLog(
                f"history partition {self.partition}, offset {record.offset}: {error} "
                f"Nothing is damaged: a newer version of streamflow has written it, so upgrade this worker"
            ) from None
        except DecodeError as error:
            self._refuse(record, f"expected a claim or a turn, {error}")
        self.offset = record.offset + 1
        if not self.rule.accepts(decoded):
            if self.rule.gap:
                self.parts.drop()  # the rest of them never counts
            return
        if isinstance(decoded, Claim | Consumed):
            self.parts.drop()
            self.at = max(self.at, decoded.at)
            if isinstance(decoded, Consumed):
                self.consumed = max(self.consumed, decoded.consumed)
            return
        if decoded.part == 0:
            self._parts_offset = record.offset
        whole = self.parts.add(decoded)
        if whole is None:
            return
        try:
            if isinstance(whole, Turn):
                self._turn(whole, record.value if whole is decoded else encode_history(whole))
            else:
                self._snapshot(whole)
        except (DecodeError, IllegalTransition, IndexError, KeyError, ValueError) as error:
            kind = "turn" if isinstance(whole, Turn) else "the snapshot of turn"
            self._refuse(record, f"{kind} {whole.turn} of run {whole.workflow_id} does not follow: {error}")
        self.consumed = max(self.consumed, whole.consumed)
        self.at = max(self.at, whole.at)

    def _refuse(self, record: Record, why: str) -> NoReturn:
        raise CorruptLog(
            f"history partition {self.partition}, offset {record.offset}: {why}. "
            f"Only the partition's owner may write there: find out who did, and restore the log from a copy"
        ) from None

    def _turn(self, turn: Turn, value: bytes) -> None:
        _check_place(turn)
        run = self._runs.get(turn.workflow_id)
        if run is None:
            run = Run(workflow_id=turn.workflow_id)
            if turn.turn > 1:
                for earlier in self.state.current_turns(turn.workflow_id):
                    run.fold(earlier)
            if run.state is RunState.NONE and self._is_headless(turn):
                return
            self._runs[turn.workflow_id] = run
        if run.state not in (RunState.NONE, RunState.DELETED) and turn.turn != run.turn + 1:
            raise ValueError(f"expected turn {run.turn + 1} of the run")
        run.fold(turn)
        self._entries.append(change_of(run, turn, value, offset=self._parts_offset))

    def _is_headless(self, turn: Turn) -> bool:
        """Whether the beginning of the run of this turn was trimmed, and a snapshot will bring all of it."""
        workflow_id = turn.workflow_id
        headless = self.trimmed and turn.turn > 1 and not any(type(event) is RunCreated for event in turn.events)
        self._await_snapshot(workflow_id, headless and type(turn.events[-1]) is not RunDeleted)
        return headless

    def _await_snapshot(self, workflow_id: str, awaited: bool) -> None:
        if awaited != (workflow_id in self.headless):
            (self.headless.add if awaited else self.headless.discard)(workflow_id)
            self._entries.append(Headless(workflow_id, awaited))

    def _snapshot(self, snapshot: RunSnapshot) -> None:
        turns = turns_of(snapshot)
        run = Run(workflow_id=snapshot.workflow_id)
        for turn, _ in turns:
            _check_place(turn)
            if run.turn and turn.turn != run.turn + 1:
                raise ValueError(f"expected turn {run.turn + 1} in it, found turn {turn.turn}")
            if turn.workflow_id != snapshot.workflow_id:
                raise ValueError(f"expected turns of that run in it, found one of run {turn.workflow_id}")
            run.fold(turn)
        self._runs[snapshot.workflow_id] = run
        self._await_snapshot(snapshot.workflow_id, False)
        numbered = [(turn.turn, value) for turn, value in turns]
        self._entries.append(restored_of(run, numbered, offset=self._parts_offset))


def _check_place(turn: Turn) -> None:
    """Whether the numbers of a turn are such as an owner gives; `ValueError` if the store could not even sort them."""
    for name, least, most in (("turn", 1, TURN_MAX), ("at", 0, INSTANT_MS_MAX)):
        if not least <= (found := getattr(turn, name)) <= most:
            raise ValueError(f"expected {name} to be {least} to {most}, found {found}")
    if not 1 <= len(turn.workflow_id.encode()) <= ID_BYTES_MAX:
        raise ValueError(f"expected a workflow id of 1 to {ID_BYTES_MAX} bytes")


async def first_turns_since(log: Log, partition: int, offset: int, end: int) -> dict[str, int]:
    """For each run with a turn from `offset` on, the first such turn: what is derived again begins there."""
    first_turns: dict[str, int] = {}
    while offset < end:
        records = await log.read(HISTORY, partition, offset, limit=READ_LIMIT)
        if not records:
            break
        offset = records[-1].offset + 1
        for record in records:
            decoded = decode_history(record.value or b"")
            if isinstance(decoded, Turn):
                # The least: a record that does not count may come first, and an id may begin anew.
                first = min(first_turns.get(decoded.workflow_id, decoded.turn), decoded.turn)
                first_turns[decoded.workflow_id] = first
    return first_turns
