"""The local state of one partition: how turns and run summaries lie in its store.

    P                                   partition: term, seq, consumed, at
    T <len><id> <turn, big-endian>      one turn, as the history holds it (parts joined)
    S <id>                              the run's summary: its status, and where its current run begins
    A <id>                              present while an owner must look at the run: open attempts, or blocked
    C <created at, big-endian> <id>     the runs in order of creation, with the history offsets of the oldest record
                                        that the run needs and of the one in which its current run begins
    O <offset, big-endian> <id>         the runs by their oldest record: who is to be copied before the head can go
    X <id>                              its beginning was trimmed; a snapshot further on has it (while restoring only)

Everything of one turn, the partition's own row and the applied offset go into one write batch, so that a store is
always the exact fold of a prefix of the history.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias, cast

import msgspec
from msgspec import Struct

from streamflow.codec.avro import decode_history
from streamflow.core.effects import StatusRecord
from streamflow.core.events import Turn
from streamflow.core.machines.run import Run, RunState
from streamflow.store.base import Store

PARTITION_KEY = b"P"
OFFSETS: Final = struct.Struct(">QQ")
ATTENDED_MAX = 10_000
"""Runs whose `A` row is known to be there, so that their turns need not write it again; 1 MB of ids at most."""


class PartitionRow(Struct, frozen=True, array_like=True):
    """Where the partition stands after the applied offset."""

    term: int = 0
    seq: int = 0
    started: bool = False
    consumed: int = 0
    at: int = 0


class Summary(Struct, frozen=True, array_like=True):
    """What is known of a run without its turns."""

    status: StatusRecord
    first_turn: int


class Change(Struct, frozen=True):
    """A turn and what it makes of the store, taken when the turn was decided: the run may have moved on since.

    `offset` is that of its record, of the first one if it has several parts.
    """

    workflow_id: str
    offset: int
    turn: int
    value: bytes
    summary: bytes | None
    attention: bool
    created_at: int
    begins: bool


class Copied(Struct, frozen=True):
    """A snapshot at `offset`: turns before `first_turn` are let go, the others need no older record any more."""

    workflow_id: str
    offset: int
    first_turn: int


class Restored(Struct, frozen=True):
    """A snapshot at `offset` as a restore reads it: all that there is of the run up to its last turn."""

    workflow_id: str
    offset: int
    turns: list[tuple[int, bytes]]
    summary: bytes
    attention: bool
    created_at: int


class Headless(Struct, frozen=True):
    """Turns of the run were read whose beginning is trimmed, and a snapshot is awaited; or it is no more."""

    workflow_id: str
    awaited: bool


Entry: TypeAlias = Change | Copied | Restored | Headless


class Offsets(NamedTuple):
    """Where a run lies in the history: its oldest record, and the one in which its current run begins."""

    oldest: int
    begun: int


_encode = msgspec.msgpack.Encoder().encode
_decode_summary = msgspec.msgpack.Decoder(Summary).decode
_decode_row = msgspec.msgpack.Decoder(PartitionRow).decode


def turns_prefix(workflow_id: str) -> bytes:
    """The prefix of a run's turns; the length keeps ids apart that begin alike."""
    raw = workflow_id.encode()
    return b"T" + len(raw).to_bytes(1, "big") + raw


def _creation_key(created_at: int, raw: bytes) -> bytes:
    return b"C" + created_at.to_bytes(8, "big") + raw


def _offset_key(offset: int, raw: bytes) -> bytes:
    return b"O" + offset.to_bytes(8, "big") + raw


def restored_of(run: Run, turns: list[tuple[int, bytes]], *, offset: int) -> Restored:
    """What a snapshot, whose turns were folded into `run`, makes of the store."""
    return Restored(
        workflow_id=run.workflow_id,
        offset=offset,
        turns=turns,
        summary=_encode(Summary(run.status(), run.first_turn)),
        attention=_needs_attention(run),
        created_at=run.created_at,
    )


def _needs_attention(run: Run) -> bool:
    return run.open_attempts > 0 or run.state is RunState.BLOCKED


def change_of(run: Run, turn: Turn, value: bytes, *, offset: int, status: StatusRecord | None = None) -> Change:
    """What the turn, just folded into `run`, changes in the store; `status` is the run's, where it is known already."""
    deleted = run.state is RunState.DELETED
    return Change(
        workflow_id=run.workflow_id,
        offset=offset,
        turn=turn.turn,
        value=value,
        summary=None if deleted else _encode(Summary(status or run.status(), run.first_turn)),
        attention=_needs_attention(run),
        created_at=run.created_at,
        begins=run.first_turn == turn.turn,
    )


class PartitionState:
    """Typed access to one partition's store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._attended: set[str] = set()

    @property
    def applied_offset(self) -> int:
        """Offset of the next history record to apply."""
        return self.store.applied_offset

    def row(self) -> PartitionRow:
        """Where the partition stands."""
        found = self.store.get(PARTITION_KEY)
        return PartitionRow() if found is None else _decode_row(found)

    def apply(self, entries: Sequence[Entry], row: PartitionRow, *, applied_offset: int) -> None:
        """Write what consecutive records change in one batch."""
        # The last word on each key counts, None to delete it: a run may go and come back within one batch.
        writes: dict[bytes, bytes | None] = {PARTITION_KEY: _encode(row)}
        for entry in entries:
            raw = entry.workflow_id.encode()
            match entry:
                case Change():
                    self._change(entry, raw, writes)
                case Copied():
                    self._copied(entry, raw, writes)
                case Restored():
                    self._restored(entry, raw, writes)
                case Headless():
                    writes[b"X" + raw] = b"" if entry.awaited else None
        puts = {key: value for key, value in writes.items() if value is not None}
        deletes = tuple([key for key, value in writes.items() if value is None])
        self.store.write(puts, deletes, applied_offset=applied_offset)

    def _change(self, change: Change, raw: bytes, writes: dict[bytes, bytes | None]) -> None:
        known: Offsets | None = None
        # The first turn of an id has nothing to leave: not to ask the store is a twentieth of a restore.
        if (change.begins and change.turn > 1) or change.summary is None:
            known = self._leave(raw, writes)
        if change.summary is None:
            self._delete_run(change.workflow_id, raw, writes)
            return
        writes[turns_prefix(change.workflow_id) + change.turn.to_bytes(4, "big")] = change.value
        writes[b"S" + raw] = change.summary
        if change.begins:
            oldest = change.offset if known is None else known.oldest
            self._settle(raw, change.created_at, Offsets(oldest, change.offset), writes)
        if not change.attention:
            if not change.begins or known is not None:  # a run that is new has no such row
                writes[b"A" + raw] = None
            self._attended.discard(change.workflow_id)
        elif change.workflow_id not in self._attended:  # a row less of three: the store takes 1.2 us for each
            writes[b"A" + raw] = b""
            if len(self._attended) == ATTENDED_MAX:
                self._attended.clear()
            self._attended.add(change.workflow_id)

    def _copied(self, copied: Copied, raw: bytes, writes: dict[bytes, bytes | None]) -> None:
        prefix = turns_prefix(copied.workflow_id)
        for key, _ in self.store.scan(prefix):
            if key >= prefix + copied.first_turn.to_bytes(4, "big"):
                break
            writes[key] = None
        created_at = self._created_at(raw, writes)
        assert created_at is not None, f"run {copied.workflow_id} was copied forward and is not there"
        self._leave(raw, writes)
        self._settle(raw, created_at, Offsets(copied.offset, copied.offset), writes)

    def _restored(self, restored: Restored, raw: bytes, writes: dict[bytes, bytes | None]) -> None:
        self._leave(raw, writes)
        self._delete_run(restored.workflow_id, raw, writes)
        prefix = turns_prefix(restored.workflow_id)
        for turn, value in restored.turns:
            writes[prefix + turn.to_bytes(4, "big")] = value
        writes[b"S" + raw] = restored.summary
        writes[b"A" + raw] = b"" if restored.attention else None
        self._settle(raw, restored.created_at, Offsets(restored.offset, restored.offset), writes)

    def _settle(self, raw: bytes, created_at: int, offsets: Offsets, writes: dict[bytes, bytes | None]) -> None:
        """The run takes its place in the order of creation and in that of the history."""
        writes[_creation_key(created_at, raw)] = OFFSETS.pack(*offsets)
        writes[_offset_key(offsets.oldest, raw)] = b""

    def _leave(self, raw: bytes, writes: dict[bytes, bytes | None]) -> Offsets | None:
        """A run that begins anew, moves forward or goes leaves its places; where it lay, None if it is new."""
        created_at = self._created_at(raw, writes)
        if created_at is None:
            return None
        key = _creation_key(created_at, raw)
        found = writes[key] if key in writes else self.store.get(key)
        assert found is not None, key
        offsets = Offsets(*OFFSETS.unpack(found))
        writes[key] = writes[_offset_key(offsets.oldest, raw)] = None
        return offsets

    def _created_at(self, raw: bytes, writes: dict[bytes, bytes | None]) -> int | None:
        key = b"S" + raw
        found = writes[key] if key in writes else self.store.get(key)
        return None if found is None else _decode_summary(found).status.created_at

    def _delete_run(self, workflow_id: str, raw: bytes, writes: dict[bytes, bytes | None]) -> None:
        prefix = turns_prefix(workflow_id)
        gone = [key for key in writes if key.startswith(prefix)]
        gone += [key for key, _ in self.store.scan(prefix)]
        for key in (*gone, b"S" + raw, b"A" + raw):
            writes[key] = None
        self._attended.discard(workflow_id)

    # -- reads: the `Source` of the queries --------------------------------------------------------------------------

    def summary(self, workflow_id: str) -> Summary | None:
        """What is known of the run, None when there is none."""
        found = self.store.get(b"S" + workflow_id.encode())
        return None if found is None else _decode_summary(found)

    def status(self, workflow_id: str) -> StatusRecord | None:
        """The run's durable status."""
        found = self.summary(workflow_id)
        return None if found is None else found.status

    def turns(self, workflow_id: str) -> list[Turn]:
        """All turns of the run that are durable and applied, oldest first."""
        return self._turns(workflow_id, 0)

    def current_turns(self, workflow_id: str) -> list[Turn]:
        """The turns since the run last began: those of earlier runs under its id do not count for it."""
        found = self.summary(workflow_id)
        return [] if found is None else self._turns(workflow_id, found.first_turn)

    def _turns(self, workflow_id: str, first: int) -> list[Turn]:
        prefix = turns_prefix(workflow_id)
        rows = self.store.scan(prefix, start=prefix + first.to_bytes(4, "big"))
        return [cast("Turn", decode_history(value)) for _, value in rows]

    def runs(self, *, descending: bool, after: tuple[int, str] | None) -> Iterator[StatusRecord]:
        """All runs by (created_at, workflow_id), behind the position `after`."""
        start = None if after is None else _creation_key(max(after[0], 0), after[1].encode())
        for key, _ in self.store.scan(b"C", start=start, reverse=descending):
            if key == start:
                continue
            found = self.summary(key[9:].decode())
            if found is not None:
                yield found.status

    def needs_attention(self, workflow_id: str) -> bool:
        """Whether the run has open attempts, or is blocked."""
        return self.store.get(b"A" + workflow_id.encode()) is not None

    def needing_attention(self) -> list[str]:
        """The runs that a new owner must look at."""
        return [key[1:].decode() for key, _ in self.store.scan(b"A")]

    # -- reads: what trimming needs ----------------------------------------------------------------------------------

    def oldest(self, start: int, *, before: int, limit: int) -> list[tuple[int, str]]:
        """The runs by the offset of their oldest record, with it, from offset `start` on and below `before`."""
        rows = self.store.scan(b"O", start=_offset_key(start, b""), limit=limit)
        found = [(int.from_bytes(key[1:9], "big"), key[9:].decode()) for key, _ in rows]
        return [row for row in found if row[0] < before]

    def offsets(self, summary: Summary) -> Offsets:
        """Where the run with this summary lies in the history."""
        found = self.store.get(_creation_key(summary.status.created_at, summary.status.workflow_id.encode()))
        assert found is not None, summary
        return Offsets(*OFFSETS.unpack(found))

    def encoded_turns(self, workflow_id: str, first: int) -> list[bytes]:
        """The run's turns from number `first` on, as the history holds them."""
        prefix = turns_prefix(workflow_id)
        return [value for _, value in self.store.scan(prefix, start=prefix + first.to_bytes(4, "big"))]

    def headless(self) -> set[str]:
        """The runs whose beginning was trimmed and whose snapshot was not read yet."""
        return {key[1:].decode() for key, _ in self.store.scan(b"X")}
