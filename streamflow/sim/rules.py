"""What must hold, whatever happens (design.md, section 9): checked after every event, from the log alone.

The reading rule is written here once more, so that a mistake in the product's own does not hide itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Final

from streamflow.codec.avro import decode_command, decode_history, decode_reply, decode_status, decode_timer
from streamflow.codec.envelope import DecodeError
from streamflow.config import RECORD_BYTES_MAX
from streamflow.core.commands import CancelWorkflow, CleanupWorkflow, Command, Query, StartWorkflow
from streamflow.core.effects import StatusRecord
from streamflow.core.events import (
    CancelRequested,
    Claim,
    Consumed,
    Event,
    HistoryRecord,
    RunBlocked,
    RunCancelled,
    RunCompleted,
    RunCreated,
    RunDeleted,
    RunFailed,
    RunSnapshot,
    RunStarted,
    RunTerminated,
    StepAttemptFailed,
    StepCancelled,
    StepCompleted,
    StepDue,
    StepFailed,
    StepScheduled,
    StepStarted,
    TimerFired,
    TimerSet,
    Turn,
)
from streamflow.core.machines.run import Run
from streamflow.core.reading import join
from streamflow.errors import CorruptLog
from streamflow.ids import partition_of
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, HISTORY, REPLIES, STATUS, TIMERS
from streamflow.sim.cluster import Cluster
from streamflow.store.memory import MemoryStore
from streamflow.worker.processor import Processor, ProcessorState
from streamflow.worker.restore import Restorer
from streamflow.worker.state import PartitionState

STATES: Final[Mapping[str, type[Any]]] = {
    "completed": RunCompleted,
    "failed": RunFailed,
    "cancelled": RunCancelled,
    "terminated": RunTerminated,
}
"""How a run is closed, by the state that its status shows."""

OVERDUE_SECONDS: Final = 7_200.0
"""Timers that were due so long ago are over: clocks are an hour off at most."""
DRIFT_MAX: Final = 0.0011
CLOCK_ERROR_MS: Final = 2
"""Clocks are read in milliseconds, and a callback goes on at the instant at which it began."""


class Violated(AssertionError):
    """An invariant does not hold."""


@dataclass
class Facts:
    """One run, as its valid turns tell it."""

    turn: int = 0
    run: int = 0
    closed: Any = None
    unwinds: bool = False
    """Whether it was asked to cancel."""
    start_at: int = 0
    deadline_at: int = 0
    term: int = 0
    """Whose last turn it was."""
    terms: dict[int, int] = field(default_factory=dict)
    """Whose turn scheduled a step, or its next attempt; of one that runs at most once: whose turn began it."""
    past: list[Facts] = field(default_factory=list)
    """What there was under the id each time that all of it was deleted: what is left of that may still be seen."""
    turn_deleted: int = 0
    """The turn that deleted it."""
    turns_deleted: int = 0
    """How many turns it had then; a status of one of them may come late."""
    steps: dict[int, StepScheduled] = field(default_factory=dict)
    queued: set[tuple[int, int]] = field(default_factory=set)
    """The steps (run, number) that are or were on a queue, in all runs of this life."""
    attempts: dict[int, int] = field(default_factory=dict)
    """The attempt that may run now, by step."""
    outcomes: dict[int, object] = field(default_factory=dict)
    timers: dict[int, int] = field(default_factory=dict)
    fired: set[int] = field(default_factory=set)
    started: set[int] = field(default_factory=set)
    """The steps that run at most once and were begun."""
    commands: set[str] = field(default_factory=set)
    due: dict[int, int] = field(default_factory=dict)
    """When the next attempt of a step may begin, by step, where that is later than its turn."""
    done: set[bytes] = field(default_factory=set)
    """What was begun that must be undone, and was not yet."""
    turns: list[Turn] = field(default_factory=list)
    """All of its turns."""
    ends: list[Event] = field(default_factory=list)
    """How runs of its id have ended."""
    begun: dict[tuple[int, int], int] = field(default_factory=dict)
    """How often the code of a step has begun, by attempt."""

    def begin(self, created: RunCreated) -> None:
        """Another run begins under the id."""
        self.run, self.closed, self.unwinds = created.run, None, False
        self.start_at, self.deadline_at = created.start_at or 0, created.deadline_at or 0
        self.steps, self.attempts, self.outcomes, self.timers = {}, {}, {}, {}
        self.fired, self.started = set(), set()
        self.begun, self.due, self.done, self.terms = {}, {}, set(), {}

    def deleted(self) -> None:
        """Nothing is left of it, but that there was something."""
        before = copy(self)
        past = [*self.past, before]
        before.past, before.turns = [], []
        turn, turns = self.turn, max(self.turn, self.turns_deleted)
        ends = self.ends  # whoever asked before may hear of them later
        self.__init__(past=past, turn_deleted=turn, turns_deleted=turns, ends=ends)  # type: ignore[misc]

    @property
    def lives(self) -> list[Facts]:
        """The newest first."""
        return [self, *reversed(self.past)]


class _Reader:
    """One history partition by the reading rule."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.term = self.seq = self.consumed = self.at = 0
        self.broken = False
        self.parts: list[Turn] = []
        self.owner = ""


def _what(step: StepScheduled) -> bytes:
    """The first argument of a step."""
    return step.args[1:-1].partition(b",")[0]


class Rules:
    """All invariants over one cluster."""

    def __init__(self, cluster: Cluster, *, ours: bool = True) -> None:
        self.cluster = cluster
        self.ours = ours
        """Whether the app is that of programs.py: it is known what its steps stand for, and that its workflows decide
        alike each time."""
        self.runs: dict[str, Facts] = {}
        self.readers = [_Reader(partition) for partition in range(cluster.partitions)]
        self.turned: list[Callable[[Turn, list[Any]], None]] = []
        """Called with each valid turn and its events."""
        self.counted: list[Callable[[int, int, Turn | RunSnapshot | Consumed], None]] = []
        """Called with partition, offset and each record that counts but claims; of a turn before `turned`."""
        self.claimed: list[Callable[[int, int], None]] = []
        """Called with partition and offset of each claim that counts."""
        self._timers_dropped: set[bytes] = set()
        self._asked: dict[str, Command] = {}
        self._statuses: dict[str, int] = {}
        cluster.landed.append(self._landed)

    def mark(self, situation: str) -> None:
        self.cluster.world.marks[situation] += 1

    def _landed(self, topic: str, partition: int, offset: int) -> None:
        record = self.cluster.stream(topic, partition).records[-1]
        assert record.offset == offset, (record, offset)
        size = len(record.key) + len(record.value or b"")
        if size > RECORD_BYTES_MAX:
            raise Violated(f"{topic}[{partition}] {offset} has {size:,} bytes: no broker would take it (8)")
        if topic == HISTORY:
            assert record.value is not None, record
            self._history(self.readers[partition], decode_history(record.value), offset)
        elif topic == STATUS and record.value is not None:
            self._status(record.value)
        elif topic == COMMANDS:
            self._command(partition, record.value)
        elif topic == TIMERS and record.value is not None:
            self._timer(record.value)
        elif topic == TIMERS:
            if record.key in self._timers_dropped:
                self.mark("timer dropped again")
            self._timers_dropped.add(record.key)
        elif topic == REPLIES and record.value is not None:
            self._reply(record.value)
        elif topic == DEAD_LETTERS:
            self.mark("dead letter")

    # -- 1: one owner ------------------------------------------------------------------------------------------------

    def _history(self, reader: _Reader, record: HistoryRecord, offset: int) -> None:
        """1. Terms only grow; of a term only what follows its claim without a gap counts."""
        if isinstance(record, Claim):
            if record.term > reader.term:
                if reader.parts:
                    self.mark("part of a split turn lost")
                reader.term, reader.seq, reader.broken, reader.parts = record.term, 0, False, []
                reader.owner = record.owner
                for hear in self.claimed:
                    hear(reader.partition, offset)
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
        for count in self.counted:
            count(reader.partition, offset, record)
        if isinstance(record, RunSnapshot):
            self.mark("snapshot")
            return
        if isinstance(record, Consumed):
            if record.consumed <= reader.consumed:
                raise Violated(
                    f"history[{reader.partition}] at {offset}: {record.consumed} are consumed, as before (1)"
                )
            reader.consumed = record.consumed
            self.mark("consumed without a turn")
            return
        if record.part == 0:
            reader.parts = []
        if record.part == 1:
            self.mark("split turn")
        reader.parts.append(record)
        if record.last:
            parts, reader.parts = reader.parts, []
            whole = join(parts)
            assert isinstance(whole, Turn), whole
            self._turn(reader, whole)

    # -- 3, 5: once, in time, closed for good ------------------------------------------------------------------------

    def _turn(self, reader: _Reader, turn: Turn) -> None:
        facts = self.runs.setdefault(turn.workflow_id, Facts())
        where = f"run {turn.workflow_id}, turn {turn.turn}"
        # Begun again before its deletion is durable, it goes on counting.
        if turn.turn != facts.turn + 1 and not (facts.turn == 0 and turn.turn == facts.turn_deleted + 1):
            raise Violated(f"{where}: expected turn {facts.turn + 1}: its turns have a hole or repeat (1)")
        if turn.consumed < reader.consumed:
            raise Violated(f"{where}: consumed went back from {reader.consumed} to {turn.consumed} (1)")
        if turn.at < reader.at:
            raise Violated(f"{where}: its time is {reader.at - turn.at} ms before that of the turn before it (1)")
        if turn.at > (latest := self._latest_ms()):
            raise Violated(f"{where}: its time is {turn.at - latest:.0f} ms ahead of all clocks (5)")
        facts.turn, facts.term, reader.consumed, reader.at = turn.turn, turn.term, turn.consumed, turn.at
        facts.turns.append(turn)
        for event in turn.events:
            self._event(facts, event, turn.at, where)
            if isinstance(event, RunCreated):
                self._as_asked(event, turn, where)
        # A run that begins again under its id takes along what was applied before, or that would be applied again.
        begins = any(type(event) is RunCreated for event in turn.events)
        if begins and not facts.turns:  # the run before it was deleted in the same turn
            facts.turn = turn.turn
            facts.turns.append(turn)
        for command in turn.commands:
            if command.command_id in facts.commands and not begins:
                raise Violated(f"{where}: command {command.command_id} takes effect a second time (3)")
            facts.commands.add(command.command_id)
        for hear in self.turned:
            hear(turn, turn.events)

    def _latest_ms(self) -> float:
        """5. What no clock has shown yet is early, whatever an owner believes. Who took over from one whose wall clock
        was far ahead goes on from there by a monotonic one, which may drift.
        """
        world = self.cluster.world
        least, most = world.wall_offsets
        drift = world.now * DRIFT_MAX if most - least > 1.0 else 0.0
        return (world.epoch + world.now + most + drift) * 1000 + CLOCK_ERROR_MS

    def _as_asked(self, created: RunCreated, turn: Turn, where: str) -> None:
        """5. A run begins and ends in time by what its command asks for, not only by what its owner wrote of it."""
        commands = [self._asked[each.command_id] for each in turn.commands if each.command_id in self._asked]
        asked = next((each.body for each in reversed(commands) if isinstance(each.body, StartWorkflow)), None)
        if asked is None:
            return
        start_at = asked.start_at if asked.delay_ms is None else turn.at + asked.delay_ms
        if created.start_at != start_at:
            raise Violated(f"{where}: it is to begin at {created.start_at}, asked was {start_at} (5)")
        begins_at = max(start_at or 0, turn.at)
        if asked.timeout_ms is not None and created.deadline_at != begins_at + asked.timeout_ms:
            raise Violated(f"{where}: it is to end by {created.deadline_at}, asked was {asked.timeout_ms} ms (5)")

    def _event(self, facts: Facts, event: Any, at: int, where: str) -> None:
        if isinstance(event, RunCreated):
            if facts.run and facts.closed is None:
                raise Violated(f"{where}: created again while it is open (5)")
            facts.begin(event)
        elif facts.closed is not None and not isinstance(event, RunDeleted) and type(event).__name__ != "RetentionSet":
            raise Violated(f"{where}: {type(event).__name__} after it closed (5)")
        match event:
            case RunCompleted() | RunFailed() | RunCancelled() | RunTerminated():
                self._ended(facts, event, at, where)
            case RunDeleted():
                facts.deleted()
                self.mark("run deleted")
            case StepScheduled(number=number):
                if number in facts.steps:
                    raise Violated(f"{where}: step {number} is scheduled twice (3)")
                facts.steps[number] = event
                if event.queue is not None:
                    facts.queued.add((facts.run, number))
                facts.terms[number] = facts.term
                self._next_attempt(facts, number, 1, event.start_at or 0, at)
                if event.name == "do" and self.ours:
                    facts.done.add(_what(event))
                elif (
                    event.name == "undo" and self.ours
                ):  # its end is not waited for by who was cancelled beside it in a gather
                    facts.done.discard(_what(event))
            case StepDue(number=number, attempt=attempt):
                if at < facts.due.get(number, 0):
                    raise Violated(
                        f"{where}: attempt {attempt} of step {number} is due {facts.due[number] - at} ms early (5)"
                    )
                facts.attempts[number] = attempt
                facts.terms[number] = facts.term
            case StepStarted(number=number):
                facts.terms[number] = facts.term
                facts.started.add(number)
            case StepAttemptFailed(number=number, attempt=attempt, retry_at=retry_at):
                self._outcome(facts, number, attempt, where)
                self._next_attempt(facts, number, attempt + 1, retry_at, at)
                if facts.attempts[number] > attempt:  # begun at once
                    facts.terms[number] = facts.term
                if facts.steps[number].name == "fail" and self.ours:
                    raise Violated(f"{where}: step {number}, which may be tried once, is tried again (3)")
            case StepCompleted(number=number, attempt=attempt) | StepFailed(number=number, attempt=attempt):
                self._outcome(facts, number, attempt, where)
                facts.outcomes[number] = event
                if isinstance(event, StepCompleted) and (number, attempt) not in facts.begun:
                    raise Violated(f"{where}: step {number} completed, and its code never began (2)")
                if isinstance(event, StepFailed) and event.error.type.endswith("StepInterrupted"):
                    if number not in facts.started or facts.terms[number] >= facts.term:
                        raise Violated(f"{where}: step {number} is given up, and its worker did not die in it (3)")
                    self.mark("step cut off")
            case CancelRequested():
                facts.unwinds = True
            case RunStarted():
                if at < facts.start_at:
                    raise Violated(f"{where}: it begins {facts.start_at - at} ms early (5)")
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
            case RunBlocked(error=error) if self.ours:
                raise Violated(f"{where}: the code has not changed, and does not fit its history: {error.message} (4)")

    def _ended(
        self, facts: Facts, event: RunCompleted | RunFailed | RunCancelled | RunTerminated, at: int, where: str
    ) -> None:
        """5, 6. A run is over: in time, as it was asked to, and with what it had begun undone."""
        facts.closed = event
        facts.ends.append(event)
        if isinstance(event, RunCompleted) and facts.unwinds and self.ours:
            raise Violated(f"{where}: it was asked to cancel, and completed (6)")
        timed_out = self.ours and isinstance(event, RunFailed) and event.error.type == "TimeoutError"
        if timed_out and at < facts.deadline_at:
            raise Violated(f"{where}: its time is over {facts.deadline_at - at} ms early (5)")
        if isinstance(event, RunCancelled) and facts.unwinds:
            self.mark("run cancelled at work")
        # Terminated, or out of time, it stops where it stands.
        if facts.done and isinstance(event, RunCompleted | RunCancelled):
            raise Violated(f"{where}: it is closed, and {min(facts.done)!r} was never undone (6)")

    @staticmethod
    def _next_attempt(facts: Facts, number: int, attempt: int, due: int, at: int) -> None:
        """The attempt may begin now; or when it is due, which is then recorded first."""
        facts.due[number] = due
        facts.attempts[number] = attempt if due <= at else attempt - 1

    def _outcome(self, facts: Facts, number: int, attempt: int, where: str) -> None:
        if number in facts.outcomes:
            raise Violated(f"{where}: step {number} has a second outcome (3)")
        if facts.attempts.get(number) != attempt:
            raise Violated(
                f"{where}: step {number} has an outcome of attempt {attempt}, expected {facts.attempts.get(number)} (3)"
            )

    def _command(self, partition: int, value: bytes | None) -> None:
        """Nothing of a command must hold, since anyone writes them; only what is rare is counted."""
        try:
            command = decode_command(value or b"")
        except DecodeError:
            return
        if partition_of(command.workflow_id, self.cluster.partitions) != partition:
            self.mark("command on the wrong partition")
        self._asked[command.command_id] = command
        facts = self.runs.get(command.workflow_id)
        if facts is not None and command.command_id in facts.commands:
            self.mark("command repeated")

    # -- 2: durable first --------------------------------------------------------------------------------------------

    def began(self, workflow_id: str, run: int, number: int, attempt: int) -> None:
        """2. A step's code begins: its turn must be durable and valid."""
        facts = self.runs.get(workflow_id)
        lives = [] if facts is None else facts.lives
        known = [life for life in lives if life.run > run or (life.run == run and number in life.steps)]
        if not known:
            raise Violated(
                f"run {workflow_id}: attempt {attempt} of step {number} began before its turn was durable (2)"
            )
        due = [life for life in known if life.run > run or attempt <= life.attempts[number]]
        if not due:
            raise Violated(f"run {workflow_id}: attempt {attempt} of step {number} began before it was due (2)")
        # An attempt may outlive its run, and the history of it: then nobody can tell whose it is.
        if due[0].run == run:
            # A queue gives an attempt again without a new owner; in which life it was queued is not seen here.
            here = all(life.run == run and life.steps[number].queue is None for life in due)
            given_again = any((run, number) in life.queued for life in due[1:])
            self._begun(due[0], workflow_id, number, attempt, len(due) - 1, here=here, given_again=given_again)

    def _begun(
        self, facts: Facts, workflow_id: str, number: int, attempt: int, others: int, *, here: bool, given_again: bool
    ) -> None:
        """3. What may run once at most does; of the others an attempt may run again, if its outcome was lost.

        `given_again`: an earlier life had a step of that number on a queue, and this may be that one.
        """
        scheduled = facts.steps[number]
        times = facts.begun[number, attempt] = facts.begun.get((number, attempt), 0) + 1
        if times > 1:
            if scheduled.at_most_once and times > 1 + others and not given_again:
                raise Violated(f"run {workflow_id}: step {number} began {times} times, and may once (3)")
            self.mark("attempt begun again" if scheduled.queue is None else "queued attempt begun again")
        owners = (
            1 + others + self.readers[partition_of(workflow_id, self.cluster.partitions)].term - facts.terms[number]
        )
        if here and attempt == facts.attempts[number] and times > owners:
            raise Violated(f"run {workflow_id}: attempt {attempt} of step {number} began {times} times under "
                           f"{owners} owners (3)")  # fmt: skip

    def has_ended(self, workflow_id: str) -> bool:
        """Whether a run of that id has ever ended."""
        return bool(self._ends(workflow_id))

    def exists(self, workflow_id: str) -> bool:
        """Whether there is, or was, such a run."""
        return workflow_id in self.runs

    def was_deleted(self, workflow_id: str) -> bool:
        """Whether all of it was deleted at some time."""
        return workflow_id in self.runs and bool(self.runs[workflow_id].past)

    def ended(self, workflow_id: str, how: str) -> None:
        """2. A client was told that the run was cancelled or terminated, or failed: its history must say so."""
        told: type[Any] = {"cancelled": RunCancelled, "terminated": RunTerminated}.get(how, RunFailed)
        if not any(isinstance(end, told) for end in self._ends(workflow_id)):
            raise Violated(f"run {workflow_id}: a client was told {how}, history: {self._ends(workflow_id)} (2)")
        self.mark(f"run {how}")

    def seen(self, workflow_id: str, result: object, encoded: bytes) -> None:
        """2. A client has a result: the turn that says so must be durable and valid."""
        if not any(isinstance(end, RunCompleted) and end.result == encoded for end in self._ends(workflow_id)):
            raise Violated(f"run {workflow_id}: a client saw {result!r}, history: {self._ends(workflow_id)} (2)")

    def _ends(self, workflow_id: str) -> list[Event]:
        # Of all runs under the id: before a client is heard, a start that comes late may have begun the next.
        return self.runs[workflow_id].ends if workflow_id in self.runs else []

    def _status(self, value: bytes) -> None:
        """2. A status is visible: so must be its turn."""
        status = decode_status(value)
        if status.turn < self._statuses.get(status.workflow_id, 0):
            self.mark("old status came late")
        self._statuses[status.workflow_id] = status.turn
        facts = self.runs.get(status.workflow_id)
        if facts is None or status.turn > max(facts.turn, facts.turns_deleted):
            raise Violated(
                f"run {status.workflow_id}: a status of turn {status.turn} is visible, valid are "
                f"{0 if facts is None else facts.turn} turns (2)"
            )

    def _timer(self, value: bytes) -> None:
        """2. A timer is set: so must be what it is for."""
        timer = decode_timer(value)
        facts = self.runs.get(timer.workflow_id)
        for life in [] if facts is None else facts.lives:
            known: dict[str, Mapping[int, object]] = {"sleep": life.timers, "step": life.steps}
            if timer.run < life.run or (timer.run == life.run and timer.number in known.get(timer.kind, {0: None})):
                return  # or it is of a run that is over
        raise Violated(f"run {timer.workflow_id}: {timer} is set before its turn was durable (2)")

    def _reply(self, value: bytes) -> None:
        """2. A sender is told that its command was accepted: the turn that says so must be durable and valid."""
        reply = decode_reply(value)
        command, facts = self._asked.get(reply.command_id), self.runs.get(reply.workflow_id)
        if command is None or not reply.accepted or isinstance(command.body, Query | CleanupWorkflow):
            return
        # These may find that there is nothing left to do: the run exists, or unwinds already.
        for life in [] if facts is None else facts.lives:
            attached = isinstance(command.body, StartWorkflow) and life.run > 0
            attached |= isinstance(command.body, CancelWorkflow) and life.unwinds
            if attached or reply.command_id in life.commands:
                return
        raise Violated(f"run {reply.workflow_id}: {command.body} was accepted before its turn was durable (2)")

    # -- 4: the state is the log -------------------------------------------------------------------------------------

    def state(self, processor: Processor) -> None:
        """4. The state rebuilt from the log is byte for byte the owner's at that offset."""
        stream = self.cluster.stream(HISTORY, processor.partition)
        if processor.status is not ProcessorState.ACTIVE:
            return
        if stream.start and processor.core.term < self.readers[processor.partition].term:
            return  # it is none any more; what its successor has copied and let go, it has not read in the new place
        offset = processor.state.applied_offset
        fresh = PartitionState(MemoryStore())
        restorer = Restorer(fresh, processor.partition)
        restorer.trimmed = stream.start > 0
        records = stream.records[: stream.index(offset)]
        if not records:
            return
        try:
            restorer.fold(records)
        except (AssertionError, CorruptLog) as error:
            raise Violated(
                f"partition {processor.partition} up to offset {offset}: nobody could restore its log: {error!r} (4)"
            ) from error
        found, rebuilt = dict(processor.state.store.scan(b"")), dict(fresh.store.scan(b""))
        if found != rebuilt:
            keys = sorted(key for key in found.keys() | rebuilt.keys() if found.get(key) != rebuilt.get(key))
            raise Violated(
                f"partition {processor.partition} at offset {offset}: the state differs from that of the log in "
                f"{len(keys)} rows, first {keys[0]!r}: {found.get(keys[0])!r} and {rebuilt.get(keys[0])!r} (4)"
            )
        self.mark("state compared" if not stream.start else "state compared with a trimmed log")

    # -- 7: projections ----------------------------------------------------------------------------------------------

    def projections(self) -> None:
        """7. At the end, the newest status of each run is what a fresh fold of its turns says, and timers are gone
        that are over.
        """
        newest: dict[str, StatusRecord | None] = {}
        timers: dict[bytes, bytes | None] = {}
        for (topic, _), stream in self.cluster.streams.items():
            if topic == STATUS:
                for record in stream.records:
                    newest[record.key.decode()] = None if record.value is None else decode_status(record.value)
            elif topic == TIMERS:
                timers.update((record.key, record.value) for record in stream.records)
        over_at = (self.cluster.world.epoch + self.cluster.world.now - OVERDUE_SECONDS) * 1000
        for key, value in timers.items():
            if value is not None and decode_timer(value).fire_at < over_at:
                raise Violated(f"timer {key!r} is on its topic long after it was due (7)")
        for workflow_id, facts in self.runs.items():
            run = Run(workflow_id=workflow_id)
            for turn in facts.turns:
                run.fold(turn)
            wanted, found = run.status() if facts.turns else None, newest.get(workflow_id)
            if found != wanted:
                raise Violated(f"run {workflow_id}: its last status is {found}, expected {wanted} (7)")
            if found is not None and (found.state in STATES) != (facts.closed is not None):
                raise Violated(f"run {workflow_id}: its status says {found.state}, its history {facts.closed!r} (7)")
            if found is not None and facts.closed is not None and type(facts.closed) is not STATES[found.state]:
                raise Violated(f"run {workflow_id}: its status says {found.state}, its history {facts.closed!r} (7)")
