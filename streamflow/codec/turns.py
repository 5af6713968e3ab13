"""Turns inside records: how large their events are, and how the turns of a run lie in a snapshot.

A snapshot holds each turn as its encoded record. A turn too large for that is held as consecutive parts, as in the
history; joined and encoded again they are the turn's very bytes, so whoever reads a snapshot has what the owner has.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from streamflow.codec.avro import decode_history, encode_history
from streamflow.codec.envelope import DecodeError
from streamflow.core.events import Event, RunSnapshot, Turn
from streamflow.core.reading import Assembler, split


def event_size(event: Event) -> int:
    """The encoded size of one event: that of a turn that holds it alone."""
    return len(encode_history(Turn(workflow_id="", turn=0, term=0, seq=0, at=0, consumed=0, events=[event])))


def for_snapshot(turns: Iterable[bytes], *, bytes_max: int) -> list[bytes]:
    """The encoded turns as a snapshot holds them, each in parts of about `bytes_max` where it is larger."""
    held: list[bytes] = []
    for value in turns:
        if len(value) <= bytes_max:
            held.append(value)
            continue
        turn = cast("Turn", decode_history(value))
        parts = split(turn, [event_size(event) for event in turn.events], bytes_max=bytes_max)
        for part in parts:
            part.seq -= len(parts) - 1  # a turn of several parts has the seq of its last one
            held.append(encode_history(part))
    return held


def turns_of(snapshot: RunSnapshot) -> list[tuple[Turn, bytes]]:
    """The turns that a whole snapshot holds, in order, each with its bytes; `DecodeError` if they are none."""
    parts = Assembler()
    turns: list[tuple[Turn, bytes]] = []
    for value in snapshot.turns:
        decoded = decode_history(value)
        whole = parts.add(decoded) if isinstance(decoded, Turn) else None
        if isinstance(whole, Turn):
            turns.append((whole, value if whole is decoded else encode_history(whole)))
    if parts.parts or not turns or turns[-1][0].turn != snapshot.turn:
        found = [turn.turn for turn, _ in turns]
        raise DecodeError(f"expected a snapshot to hold turns up to {snapshot.turn}, found {found[-3:]}")
    return turns
