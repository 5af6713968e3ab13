"""The local state of one partition: how turns and run summaries lie in its store.

    P                                   partition: term, seq, consumed, at
    T <len><id> <turn, big-endian>      one turn, as the history holds it (parts joined)
    S <id>                              the run's summary: its status, and where its current run begins
    A <id>                              present while an owner must look at the run: open attempts, or blocked
    C <created at, big-endian> <id>     the runs in order of creation

Everything of one turn, the partition's own row and the applied offset go into one write batch, so that a store is
always the exact fold of a prefix of the history.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import msgspec
from msgspec import Struct

from streamflow.codec.avro import decode_history
from streamflow.core.effects import StatusRecord
from streamflow.core.events import Turn
from streamflow.core.machines.run import Run, RunState
from streamflow.store.base import Store

PARTITION_KEY = b"P"
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
    """A turn and what it makes of the store, taken when the turn was decided: the run may have moved on since."""

    workflow_id: str
    turn: int
    value: bytes
    summary: bytes | None
    attention: bool
    created_at: int
    begins: bool


_encode = msgspec.msgpack.Encoder().encode
_decode_summary = msgspec.msgpack.Decoder(Summary).decode
_decode_row = msgspec.msgpack.Decoder(PartitionRow).decode


def turns_prefix(workflow_id: str) -> bytes:
    """The prefix of a run's turns; the length keeps ids apart that begin alike."""
    raw = workflow_id.encode()
    return b"T" + len(raw).to_bytes(1, "big") + raw


def _creation_key(created_at: int, raw: bytes) -> bytes:
    return b"C" + created_at.to_bytes(8, "big") + raw


def change_of(run: Run, turn: Turn, value: bytes, *, status: StatusRecord | None = None) -> Change:
    """What the turn, just folded into `run`, changes in the store; `status` is the run's, where it is known already."""
    deleted = run.state is RunState.DELETED
    return Change(
        workflow_id=run.workflow_id,
        turn=turn.turn,
        value=value,
        summary=None if deleted else _encode(Summary(status or run.status(), run.first_turn)),
        attention=run.open_attempts > 0 or run.state is RunState.BLOCKED,
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

    def apply(self, changes: Sequence[Change], row: PartitionRow, *, applied_offset: int) -> None:
        """Write the changes of consecutive turns in one batch."""
        # The last word on each key counts, None to delete it: a run may go and come back within one batch.
        writes: dict[bytes, bytes | None] = {PARTITION_KEY: _encode(row)}
        for change in changes:
            raw = change.workflow_id.encode()
            if change.begins or change.summary is None:
                self._forget_creation(raw, writes)
            if change.summary is None:
                self._delete_run(change.workflow_id, raw, writes)
                continue
            writes[turns_prefix(change.workflow_id) + change.turn.to_bytes(4, "big")] = change.value
            writes[b"S" + raw] = change.summary
            if change.begins:
                writes[_creation_key(change.created_at, raw)] = b""
            if not change.attention:
                writes[b"A" + raw] = None
                self._attended.discard(change.workflow_id)
            elif change.workflow_id not in self._attended:  # a row less of three: the store takes 1.2 us for each
                writes[b"A" + raw] = b""
                if len(self._attended) == ATTENDED_MAX:
                    self._attended.clear()
                self._attended.add(change.workflow_id)
        puts = {key: value for key, value in writes.items() if value is not None}
        deletes = tuple([key for key, value in writes.items() if value is None])
        self.store.write(puts, deletes, applied_offset=applied_offset)

    def _forget_creation(self, raw: bytes, writes: dict[bytes, bytes | None]) -> None:
        """A run that begins anew, or goes, leaves its old place in the order of creation."""
        key = b"S" + raw
        found = writes[key] if key in writes else self.store.get(key)
        if found is not None:
            writes[_creation_key(_decode_summary(found).status.created_at, raw)] = None

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

    def needing_attention(self) -> list[str]:
        """The runs that a new owner must look at."""
        return [key[1:].decode() for key, _ in self.store.scan(b"A")]
