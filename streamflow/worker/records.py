"""Turns and snapshots as records of the history, in parts where one is too large for a record."""

from __future__ import annotations

from typing import Final

from streamflow.codec.avro import encode_history
from streamflow.codec.turns import event_size
from streamflow.config import RECORD_BYTES_MAX
from streamflow.core.events import RunSnapshot, Turn
from streamflow.core.partition import Partition
from streamflow.core.reading import split, split_snapshot
from streamflow.ids import ID_BYTES_MAX
from streamflow.worker.trimming import SNAPSHOT_TURNS_BYTES_MAX, Snapshot

TURN_OVERHEAD_BYTES: Final = 2_000
"""What a record holds beside the events: ids, framing, command ids."""


def turn_records(turn: Turn, seq: int) -> list[bytes]:
    """The values of its records, numbered from behind `seq`; the turn has the number of the last one."""
    turn.seq = seq + 1
    value = encode_history(turn)
    if len(value) <= RECORD_BYTES_MAX - ID_BYTES_MAX:
        return [value]
    sizes = [event_size(event) for event in turn.events]
    parts = split(turn, sizes, bytes_max=RECORD_BYTES_MAX - TURN_OVERHEAD_BYTES)
    turn.seq = seq + len(parts)
    return list(map(encode_history, parts))


def snapshot_records(item: Snapshot, core: Partition) -> list[bytes]:
    """The values of the records of what is copied forward now, numbered from behind the partition's `seq`."""
    snapshot = RunSnapshot(
        workflow_id=item.workflow_id,
        turn=item.turn,
        term=core.term,
        seq=core.seq + 1,
        at=core.at,
        consumed=core.consumed,
        turns=item.turns,
    )
    return list(map(encode_history, split_snapshot(snapshot, bytes_max=SNAPSHOT_TURNS_BYTES_MAX)))
