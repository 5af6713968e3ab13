"""What must hold, whatever happens (design.md, section 9): checked after every event, from the log alone.

The reading rule is written here once more, so that a mistake in the product's own does not hide itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from streamflow.codec.avro import decode_history, decode_status
from streamflow.core.events import (
    Claim,
    RunCancelled,
    RunCompleted,
    RunCreated,
    RunDeleted,
    RunFailed,
    RunSnapshot,
    RunTerminated,
    StepAttemptFailed,
    StepCancelled,
    StepCompleted,
    StepDue,
    StepFailed,
    StepScheduled,
    TimerFired,
    TimerSet,
    Turn,
)
from streamflow.logs.base import HISTORY, STATUS
from streamflow.sim.cluster import Cluster
from streamflow.store.memory import MemoryStore
from streamflow.worker.processor import Processor, ProcessorState
from streamflow.worker.restore import Restorer
from streamflow.worker.state import PartitionState


class Violated(AssertionError):
    """An invariant does not hold."""


@dataclass
class Facts:
    """One run, as its valid turns tell it."""

    turn: int = 0
    run: int = 0
    closed: Any = None
    steps: dict[int, StepScheduled] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)
    """The attempt that may run now, by step."""
    outcomes: dict[int, object] = field(default_factory=dict)
    timers: dict[int, int] = field(default_factory=dict)
    fired: set[int] = field(default_factory=set)
    commands: set[str] = field(default_factory=set)


class _Reader:
    """One history partition by the reading rule."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.term = self.seq = self.consumed = 0
        self.broken = False
        self.parts: list[Turn] = []


class Rules:
    """All invariants over one cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.runs: dict[str, Facts] = {}
        self.readers = [_Reader(partition) for partition in range(cluster.partitions)]
        self.marks = cluster.marks
        """How often each rare situation occurred."""
        cluster.landed.append(self._landed)

    def mark(self, situation: str) -> None:
        self.cluster.mark(situation)

    def _landed(self, topic: str, partition: int, offset: int) -> None:
        record = self.cluster.stream(topic, partition).records[-1]
        assert record.offset == offset, (record, offset)
        if topic == HISTORY:
            assert record.value is not None, record
            self._history(self.readers[partition], decode_history(record.value))
        elif topic == STATUS and record.value is not None:
            self._status(record.value)

    # -- 1: one owner ------------------------------------------------------------------------------------------------

    def _history(self, reader: _Reader, record: Claim | Turn | RunSnapshot) -> None:
        """1. Terms only grow; of a term only what follows its claim without a gap counts."""
        if isinstance(record, Claim):
            if record.term > reader.term:
                if reader.parts:
                    self.mark("part of a split turn lost")
                reader.term, reader.seq, reader.broken, reader.parts = record.term, 0, False, []
            else:
                self.mark("claim lost")
            return
        if record.term != reader.term:
            self.mark("zombie append")
            return
        if reader.broken or record.seq <= reader.seq:
            self.mark("repeated append" if not reader.broken else "append after a gap")
            return
        if record.seq != reader.seq + 1:
            reader.broken, reader.parts = True, []
            self.mark("gap")
            return
        reader.seq = record.seq
        if isinstance(record, RunSnapshot):
            self.mark("snapshot")
            return
        if record.part == 0:
            reader.parts = []
        reader.parts.append(record)
        if record.last:
            parts, reader.parts = reader.parts, []
            self._turn(reader, record, [event for part in parts for event in part.events],
                       [command for part in parts for command in part.commands])  # fmt: skip

    # -- 3, 5: once, in time, closed for good ------------------------------------------------------------------------

    def _turn(self, reader: _Reader, turn: Turn, events: list[Any], commands: list[Any]) -> None:
        facts = self.runs.setdefault(turn.workflow_id, Facts())
        where = f"run {turn.workflow_id}, turn {turn.turn}"
        if turn.turn != facts.turn + 1:
            raise Violated(f"{where}: expected turn {facts.turn + 1}: its turns have a hole or repeat (1)")
        if turn.consumed < reader.consumed:
            raise Violated(f"{where}: consumed went back from {reader.consumed} to {turn.consumed} (1)")
        facts.turn, reader.consumed = turn.turn, turn.consumed
        for event in events:
            self._event(facts, event, turn.at, where)
        for command in commands:
            if command.command_id in facts.commands:
                raise Violated(f"{where}: command {command.command_id} takes effect a second time (3)")
            facts.commands.add(command.command_id)

    def _event(self, facts: Facts, event: Any, at: int, where: str) -> None:
        if isinstance(event, RunCreated):
            if facts.run and facts.closed is None:
                raise Violated(f"{where}: created again while it is open (5)")
            turn = facts.turn
            facts.__init__(turn=turn, run=event.run, commands=facts.commands)  # type: ignore[misc]
        elif facts.closed is not None and not isinstance(event, RunDeleted) and type(event).__name__ != "RetentionSet":
            raise Violated(f"{where}: {type(event).__name__} after it closed (5)")
        match event:
            case RunCompleted() | RunFailed() | RunCancelled() | RunTerminated():
                facts.closed = event
            case StepScheduled(number=number):
                if number in facts.steps:
                    raise Violated(f"{where}: step {number} is scheduled twice (3)")
                facts.steps[number] = event
                facts.attempts[number] = 1
            case StepDue(number=number, attempt=attempt):
                facts.attempts[number] = attempt
            case StepAttemptFailed(number=number, attempt=attempt):
                self._outcome(facts, number, attempt, where)
                facts.attempts[number] = attempt + 1
            case StepCompleted(number=number, attempt=attempt) | StepFailed(number=number, attempt=attempt):
                self._outcome(facts, number, attempt, where)
                facts.outcomes[number] = event
            case StepCancelled(number=number):
                facts.outcomes[number] = event
            case TimerSet(number=number, fire_at=fire_at):
                facts.timers[number] = fire_at
            case TimerFired(number=number):
                if at < facts.timers[number]:
                    raise Violated(f"{where}: timer {number} fired {facts.timers[number] - at} ms early (5)")
                if number in facts.fired:
                    raise Violated(f"{where}: timer {number} fired twice (5)")
                facts.fired.add(number)

    def _outcome(self, facts: Facts, number: int, attempt: int, where: str) -> None:
        if number in facts.outcomes:
            raise Violated(f"{where}: step {number} has a second outcome (3)")
        if facts.attempts.get(number) != attempt:
            raise Violated(
                f"{where}: step {number} has an outcome of attempt {attempt}, expected {facts.attempts.get(number)} (3)"
            )

    # -- 2: durable first --------------------------------------------------------------------------------------------

    def began(self, workflow_id: str, run: int, number: int, attempt: int) -> None:
        """2. A step's code begins: its turn must be durable and valid."""
        facts = self.runs.get(workflow_id)
        if facts is None or facts.run < run or (facts.run == run and number not in facts.steps):
            raise Violated(
                f"run {workflow_id}: attempt {attempt} of step {number} began before its turn was durable (2)"
            )
        if facts.run == run and attempt > facts.attempts[number]:
            raise Violated(f"run {workflow_id}: attempt {attempt} of step {number} began before it was due (2)")

    def ended(self, workflow_id: str, how: str) -> None:
        """2. A client was told that the run was cancelled or terminated: its history must say so."""
        closed = self.runs[workflow_id].closed if workflow_id in self.runs else None
        told = {"cancelled": RunCancelled.__name__, "terminated": RunTerminated.__name__}[how]
        if type(closed).__name__ != told:
            raise Violated(f"run {workflow_id}: a client was told {how}, the history says {closed!r} (2)")
        self.mark(f"run {how}")

    def seen(self, workflow_id: str, result: object, encoded: bytes) -> None:
        """2. A client has a result: the turn that says so must be durable and valid."""
        closed = self.runs[workflow_id].closed if workflow_id in self.runs else None
        if not isinstance(closed, RunCompleted) or closed.result != encoded:
            raise Violated(f"run {workflow_id}: a client saw {result!r}, the history says {closed!r} (2)")

    def _status(self, value: bytes) -> None:
        """2. A status is visible: so must be its turn."""
        status = decode_status(value)
        facts = self.runs.get(status.workflow_id)
        if facts is None or status.turn > facts.turn:
            raise Violated(
                f"run {status.workflow_id}: a status of turn {status.turn} is visible, valid are "
                f"{0 if facts is None else facts.turn} turns (2)"
            )

    # -- 4: the state is the log -------------------------------------------------------------------------------------

    def state(self, processor: Processor) -> None:
        """4. The state rebuilt from the log is byte for byte the owner's at that offset."""
        stream = self.cluster.stream(HISTORY, processor.partition)
        if processor.status is not ProcessorState.ACTIVE or stream.start:
            return
        offset = processor.state.applied_offset
        fresh = PartitionState(MemoryStore())
        restorer = Restorer(fresh, processor.partition)
        records = stream.records[: stream.index(offset)]
        if not records:
            return
        restorer.fold(records)
        found, rebuilt = dict(processor.state.store.scan(b"")), dict(fresh.store.scan(b""))
        if found != rebuilt:
            keys = sorted(key for key in found.keys() | rebuilt.keys() if found.get(key) != rebuilt.get(key))
            raise Violated(
                f"partition {processor.partition} at offset {offset}: the state differs from that of the log in "
                f"{len(keys)} rows, first {keys[0]!r}: {found.get(keys[0])!r} and {rebuilt.get(keys[0])!r} (4)"
            )
        self.mark("state compared")

    # -- 7: projections ----------------------------------------------------------------------------------------------

    def projections(self) -> None:
        """7. At the end, the newest status of each run is that of its last turn."""
        newest: dict[str, int] = {}
        for (topic, _), stream in self.cluster.streams.items():
            if topic == STATUS:
                for record in stream.records:
                    newest[record.key.decode()] = 0 if record.value is None else decode_status(record.value).turn
        for workflow_id, facts in self.runs.items():
            if newest.get(workflow_id) != facts.turn:
                raise Violated(
                    f"run {workflow_id}: its last status is of turn {newest.get(workflow_id)}, its last turn "
                    f"{facts.turn} (7)"
                )
