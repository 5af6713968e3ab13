"""The reading rule: which records of a history partition count. Every reader uses this one class.

A record counts only if its term is the newest claimed one and its seq is exactly the last one plus one. A repeat is
dropped; after a gap nothing of that term counts any more, until a newer claim. A reader that starts at the head of a
trimmed log takes its first record as valid, since the cut is always made at a valid one. Only the first claim of a term
counts. (Why: two owners can write at once for a moment, and a producer may repeat its own batch; see DESIGN.md.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from streamflow.core.events import Applied, Claim, Event, HistoryRecord, RunSnapshot, Turn

SEQ_AFTER_GAP: Final = 2**62
"""Stands for the last seq once a gap was seen: no record follows it. A number, so that (term, seq) is all to keep."""
APPLIED_BYTES: Final = 16
"""What an applied command takes in a record beside its id, at most."""


class ReadingRule:
    """The fence as a reader sees it: `term` and `seq` of the last valid record."""

    __slots__ = ("seq", "started", "term")

    def __init__(self, *, term: int = 0, seq: int = 0, started: bool = False) -> None:
        self.term = term
        self.seq = seq
        self.started = started

    @property
    def gap(self) -> bool:
        """Whether records of the term are missing, so that none counts any more."""
        return self.seq == SEQ_AFTER_GAP

    def accepts(self, record: HistoryRecord) -> bool:
        """Whether the next record of the partition counts; records come in offset order, each once per reader."""
        if not self.started:
            self.started = True
            self.term = record.term
            self.seq = 0 if isinstance(record, Claim) else record.seq
            return True
        if isinstance(record, Claim):
            if record.term <= self.term:
                return False
            self.term, self.seq = record.term, 0
            return True
        if record.term != self.term or record.seq <= self.seq:
            return False
        if record.seq != self.seq + 1:
            self.seq = SEQ_AFTER_GAP
            return False
        self.seq = record.seq
        return True


class Assembler:
    """Joins the parts of turns and snapshots too large for one record; the parts of one follow each other."""

    __slots__ = ("parts",)

    def __init__(self) -> None:
        self.parts: list[Turn | RunSnapshot] = []

    def add(self, part: Turn | RunSnapshot) -> Turn | RunSnapshot | None:
        """The whole turn or snapshot when `part` is its last part, else None."""
        if part.part == 0:
            self.parts = []  # what came before was cut off by a crash, and never counted
            if part.last:
                return part
        elif len(self.parts) != part.part or self.parts[-1].turn != part.turn or type(self.parts[-1]) is not type(part):
            self.parts = []
            return None
        self.parts.append(part)
        if not part.last:
            return None
        whole, self.parts = join(self.parts), []
        return whole

    def drop(self) -> None:
        """A claim: parts of the old owner without their last one never count."""
        self.parts = []


def split(turn: Turn, sizes: list[int], *, bytes_max: int) -> list[Turn]:
    """Cut a turn into parts of at most `bytes_max` bytes of events and commands, given each event's size.

    An event larger than that stays alone in its part: its size was checked before it was decided.
    """
    assert len(sizes) == len(turn.events), (len(sizes), len(turn.events))
    groups: list[tuple[list[Event], list[Applied]]] = [([], [])]
    filled = 0
    command_sizes = [len(command.command_id.encode()) + APPLIED_BYTES for command in turn.commands]
    for index, size in enumerate(sizes + command_sizes):
        if filled and filled + size > bytes_max:
            groups.append(([], []))
            filled = 0
        filled += size
        if index < len(sizes):
            groups[-1][0].append(turn.events[index])
        else:
            groups[-1][1].append(turn.commands[index - len(sizes)])
    return [
        Turn(
            workflow_id=turn.workflow_id,
            turn=turn.turn,
            term=turn.term,
            seq=turn.seq + part,
            at=turn.at,
            consumed=turn.consumed,
            events=events,
            commands=commands,
            part=part,
            last=part == len(groups) - 1,
        )
        for part, (events, commands) in enumerate(groups)
    ]


def split_snapshot(snapshot: RunSnapshot, *, bytes_max: int) -> list[RunSnapshot]:
    """Cut a snapshot into parts with at most `bytes_max` bytes of turns; what is larger stays alone in its part."""
    groups: list[list[bytes]] = [[]]
    filled = 0
    for turn in snapshot.turns:
        if filled and filled + len(turn) > bytes_max:
            groups.append([])
            filled = 0
        filled += len(turn)
        groups[-1].append(turn)
    last = len(groups) - 1
    return [
        replace(snapshot, seq=snapshot.seq + part, turns=turns, part=part, last=part == last)
        for part, turns in enumerate(groups)
    ]


def join(parts: Sequence[Turn | RunSnapshot]) -> Turn | RunSnapshot:
    """The turn or snapshot of which these are all the parts, in order."""
    last = parts[-1]
    assert last.last and [part.part for part in parts] == list(range(len(parts))), parts
    if isinstance(last, RunSnapshot):
        turns = [turn for part in parts if isinstance(part, RunSnapshot) for turn in part.turns]
        return replace(last, turns=turns, part=0)
    of_turn = [part for part in parts if isinstance(part, Turn)]
    return Turn(
        workflow_id=last.workflow_id,
        turn=last.turn,
        term=last.term,
        seq=last.seq,
        at=last.at,
        consumed=last.consumed,
        events=[event for part in of_turn for event in part.events],
        commands=[command for part in of_turn for command in part.commands],
    )
