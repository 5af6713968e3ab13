"""What is let go, and what counts as done: nothing that whoever takes over still needs (design.md, sections 6 and 8).

Trimming, snapshots and committed offsets do no harm by themselves; who begins anew from them finds what is missing. So
they are judged when they happen, against what the rules know of all that ever landed:

- A snapshot holds the very turns that it stands for, all since the run began, and those whose effects are still due.
- Below a cut nothing is left that is needed: no turn of a run that has no copy above it, nothing that follows from
  there and has not landed; and the first record left counts.
- All that follows from the turns below a published offset has landed. An owner that derives it again may leave out
  what later turns have overtaken: older statuses, attempts that nobody awaits, all but the tombstone of a deleted run.
- Commands that are deleted are consumed; attempts below what a queue has committed are answered, or awaited no more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Final, ParamSpec

from streamflow.codec.avro import decode_command, decode_history, decode_status, decode_task
from streamflow.codec.envelope import DecodeError
from streamflow.core.commands import ReportAttempt
from streamflow.core.effects import DispatchAttempt, DropTimer, SetTimer, StepTask
from streamflow.core.events import Consumed, Event, RunCreated, RunDeleted, RunSnapshot, Turn
from streamflow.core.machines.run import Run
from streamflow.core.reading import join
from streamflow.ids import partition_of
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, HISTORY, REPLIES, STATUS, TIMERS, steps_topic
from streamflow.sim.rules import Rules, Violated

GONE: Final = "gone"
"""Stands for a tombstone among what is due."""

P = ParamSpec("P")
Due = tuple[str, bytes, Hashable]
"""Topic and key of a record that follows from a turn; and what of the key it is, where one may stand for another."""
Attempt = tuple[str, int, int, int, int]


class Kept:
    """What is needed still, in one cluster. `look` raises what was seen to be wrong."""

    def __init__(self, rules: Rules) -> None:
        self.rules, self.cluster = rules, rules.cluster
        self.broken: Violated | None = None
        partitions = range(self.cluster.partitions)
        self._runs: dict[str, Run] = {}
        self._shown: dict[str, object] = {}
        """What the newest status of each run must show: where none of it is new, there need be no newer one."""
        self._begun: dict[str, int] = {}
        """The turn at which the newest run of each id began."""
        self._places: dict[str, dict[int, int]] = {}
        """Where each turn of a run lies, by number: the newest copy of it."""
        self._first: list[int] = [0 for _ in partitions]
        """Where the turn or snapshot begins that is landing."""
        self._parts: list[list[RunSnapshot]] = [[] for _ in partitions]
        self._counting: list[set[int]] = [set() for _ in partitions]
        """Offsets of all records that count, but claims."""
        self._consumed = [0 for _ in partitions]
        self._due: list[dict[Due, tuple[int, str]]] = [{} for _ in partitions]
        """What follows from turns and has not landed: the offset of its turn, and the run."""
        self._queued: dict[tuple[str, int], dict[int, StepTask]] = {}
        """Attempts on queues that are not known to be done with, by place and offset."""
        self._answered: set[Attempt] = set()
        rules.counted.append(self._counted)
        rules.turned.append(self._turned)
        self.cluster.landed.append(self._landed)
        self.cluster.trimmed.append(self._noting(self._trimmed))
        self.cluster.moved.append(self._noting(self._published))
        self.cluster.queue_committed.append(self._noting(self._done_with))

    def look(self) -> None:
        """Called after each event. Raises the first that was wrong."""
        if self.broken is not None:
            raise self.broken

    def _noting(self, judge: Callable[P, None]) -> Callable[P, None]:
        """Where it is judged inside of a process, an error raised there would be the process's."""

        def judged(*args: P.args, **options: P.kwargs) -> None:
            try:
                judge(*args, **options)
            except Violated as error:
                self.broken = self.broken or error

        return judged

    # -- what lands --------------------------------------------------------------------------------------------------

    def _counted(self, partition: int, offset: int, record: Turn | RunSnapshot | Consumed) -> None:
        self._counting[partition].add(offset)
        self._consumed[partition] = max(self._consumed[partition], record.consumed)
        if isinstance(record, Consumed):
            return
        if record.part == 0:
            self._first[partition], self._parts[partition] = offset, []
        if isinstance(record, RunSnapshot):
            self._parts[partition].append(record)
            if record.last:
                whole = join(self._parts[partition])
                assert isinstance(whole, RunSnapshot), whole
                self._copied(partition, whole)

    def _turned(self, turn: Turn, events: list[Event]) -> None:
        workflow_id, partition = turn.workflow_id, partition_of(turn.workflow_id, self.cluster.partitions)
        due, offset = self._due[partition], self.cluster.stream(HISTORY, partition).end - 1
        is_gone = False
        for event in events:
            if isinstance(event, RunCreated):
                self._begun[workflow_id] = turn.turn
                is_gone = False
            elif isinstance(event, RunDeleted):
                self._forget(partition, workflow_id)
                self.cluster.reached("a run was deleted", self.cluster.sender)
                is_gone = True
        if is_gone:  # and nothing begins anew under its id within the turn, whose status would be the last word
            due[STATUS, workflow_id.encode(), 0] = offset, workflow_id
            return
        run = self._runs.setdefault(workflow_id, Run(workflow_id=workflow_id))
        self._places.setdefault(workflow_id, {})[turn.turn] = self._first[partition]
        set_now: set[bytes] = set()
        for effect in run.fold(turn):
            match effect:
                case SetTimer(timer=timer):
                    due[TIMERS, timer.key, None] = offset, workflow_id
                    set_now.add(timer.key)
                case DropTimer(timer=timer) if timer.key in set_now:
                    del due[TIMERS, timer.key, None]  # neither need ever be seen
                case DropTimer(timer=timer):
                    due[TIMERS, timer.key, GONE] = offset, workflow_id
                case DispatchAttempt(queue=queue, task=task):
                    due[steps_topic(queue), workflow_id.encode(), task] = offset, workflow_id
        shown = (run.run, run.state, run.progress, None if run.open_attempts else run.waiting_on())
        if shown != self._shown.get(workflow_id):
            self._shown[workflow_id] = shown
            due[STATUS, workflow_id.encode(), turn.turn] = offset, workflow_id
        for applied in turn.commands:
            if applied.reply_to is not None and 0 <= applied.reply_to < self.cluster.partitions:
                due[REPLIES, applied.command_id.encode(), None] = offset, workflow_id

    def _forget(self, partition: int, workflow_id: str) -> None:
        """The run is deleted: of what followed from its turns only its end matters."""
        known: dict[str, Any]
        for known in (self._runs, self._begun, self._places, self._shown):
            known.pop(workflow_id, None)
        for each in [each for each, (_, whose) in self._due[partition].items() if whose == workflow_id]:
            del self._due[partition][each]

    def _landed(self, topic: str, partition: int, offset: int) -> None:
        if topic in (HISTORY, DEAD_LETTERS):
            return
        record = self.cluster.stream(topic, partition).records[-1]
        match topic:
            case "timers":
                self._due[partition].pop((TIMERS, record.key, None), None)
                if record.value is None:
                    self._due[partition].pop((TIMERS, record.key, GONE), None)
            case "status":
                turn = 0 if record.value is None else decode_status(record.value).turn
                due = self._due[partition]
                for each in [each for each in due if each[:2] == (STATUS, record.key)]:
                    if isinstance(each[2], int) and each[2] <= turn:
                        del due[each]
            case "replies":
                for due in self._due:
                    due.pop((REPLIES, record.key, None), None)
            case "commands":
                self._answer(record.value)
            case _:
                self._dispatched(topic, partition, offset, record.value)

    def _answer(self, value: bytes | None) -> None:
        try:
            command = decode_command(value or b"")
        except DecodeError:
            return
        body = command.body
        if isinstance(body, ReportAttempt):
            self._answered.add((command.workflow_id, body.run, body.number, body.attempt, body.scheduled_at))

    def _dispatched(self, topic: str, partition: int, offset: int, value: bytes | None) -> None:
        try:
            task = decode_task(value or b"")
        except DecodeError:
            return
        self._due[partition].pop((topic, task.workflow_id.encode(), task), None)
        self._queued.setdefault((topic, partition), {})[offset] = task

    # -- what is judged ----------------------------------------------------------------------------------------------

    def _copied(self, partition: int, snapshot: RunSnapshot) -> None:
        """4. A snapshot is the turns that it stands for."""
        workflow_id, offset = snapshot.workflow_id, self._first[partition]
        where = f"run {workflow_id}, its snapshot at {offset}"
        held: list[Turn] = []
        parts: list[Turn] = []
        for value in snapshot.turns:
            decoded = decode_history(value)
            assert isinstance(decoded, Turn), decoded
            parts.append(decoded)
            if decoded.last:
                whole = join(parts)
                assert isinstance(whole, Turn), whole
                held.append(whole)
                parts = []
        facts = self.rules.runs.get(workflow_id)
        wanted = [] if facts is None else facts.turns[-len(held) :]
        if not held or held != wanted:
            wrong = [each.turn for each in held if each not in wanted]
            raise Violated(
                f"{where} holds {len(held)} turns up to {held[-1].turn if held else 0}, of which {wrong} are not those "
                f"of its {len(wanted)} last ones (4)"
            )
        places, first = self._places[workflow_id], held[0].turn
        if first > self._begun[workflow_id]:
            raise Violated(f"{where} begins with turn {first}, and the run with {self._begun[workflow_id]} (4)")
        self._nothing_due(partition, places[first], f"{where} leaves out turns", of=workflow_id)
        self._places[workflow_id] = {each.turn: offset for each in held}
        self.cluster.reached("a run was copied forward", self.cluster.sender)

    def _trimmed(self, topic: str, partition: int, start: int) -> None:
        """1, 4, 6, 7. What goes is not needed any more."""
        where = f"{topic}[{partition}] is cut off at {start}"
        if topic == COMMANDS and start > self._consumed[partition]:
            raise Violated(f"{where}, and consumed up to {self._consumed[partition]} (6)")
        if topic == HISTORY and start:
            self._cut(partition, start, where)
        elif (topic, partition) in self._queued:
            self._done_with(topic, partition, start)

    def _cut(self, partition: int, start: int, where: str) -> None:
        records = self.cluster.stream(HISTORY, partition).records
        if not records or records[0].offset not in self._counting[partition]:
            raise Violated(f"{where}, where no record is that counts (1)")
        for workflow_id, places in self._places.items():
            if partition_of(workflow_id, self.cluster.partitions) == partition:
                begun = self._begun[workflow_id]
                lost = [turn for turn, offset in places.items() if turn >= begun and offset < start]
                if lost:
                    raise Violated(f"{where}, and turns {lost} of run {workflow_id} lie before it (4)")
        self._nothing_due(partition, start, where)

    def _published(self, partition: int, offset: int) -> None:
        """7. All that follows from what lies below a published offset is there."""
        self._nothing_due(partition, offset, f"history[{partition}] is said to be published up to {offset}")

    def _nothing_due(self, partition: int, before: int, where: str, *, of: str | None = None) -> None:
        for (topic, key, what), (offset, workflow_id) in self._due[partition].items():
            if offset >= before or of not in (None, workflow_id):
                continue
            if isinstance(what, StepTask) and not self._is_awaited(what):
                continue
            if of is not None and topic == STATUS and what == 0:
                continue  # the end of an earlier life under the id: no turn of this one brings it again, copied or not
            raise Violated(f"{where}, and {topic} has nothing for {key!r} that follows from {offset} (7)")

    def _done_with(self, topic: str, partition: int, below: int) -> None:
        """6. Attempts that are done with have an answer, if anybody waits for it."""
        queued = self._queued.get((topic, partition), {})
        for offset in [offset for offset in queued if offset < below]:
            task = queued.pop(offset)
            attempt = (task.workflow_id, task.run, task.number, task.attempt, task.scheduled_at)
            if attempt not in self._answered and self._is_awaited(task):
                raise Violated(
                    f"{topic}[{partition}] {offset}: attempt {task.attempt} of step {task.number} of run "
                    f"{task.workflow_id} is done with, all below {below} is; nobody has answered it (6)"
                )

    def _is_awaited(self, task: StepTask) -> bool:
        run = self._runs.get(task.workflow_id)
        step = None if run is None or run.run != task.run else run.step(task.number)
        return step is not None and step.accepts(task.attempt) and step.scheduled_at == task.scheduled_at
