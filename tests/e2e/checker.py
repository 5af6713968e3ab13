"""What a soak left behind, judged by a second implementation: topics, effects and the client's journal, held together.

Three witnesses: the topics (`checker_topics.py` reads, `checker_history.py` folds them), the lines that each step's
code wrote when it ran, and the journal of the client, which says what it was promised and what must come of each run.
Each violation is of one of six categories:

- lost: an accepted run without its end, a step without its outcome, an acknowledged command without its effect,
  a run that who begins at the head of a trimmed log does not find
- duplicated: a second outcome of an attempt or a position, a command or a timer that takes effect twice, an
  at-most-once step that began twice
- early: a timer before its instant; a start, an attempt, a deletion before its delay, backoff, retention has passed,
  the end of an attempt before its timeout; code, an answer or a status before its turn was in the log
- reordered: signals otherwise than sent; turns, consumed offsets and terms out of order; a status newer than its
  history, a last status that is not the last turn's
- wrong: another result than the oracle's, another result than the step gave, a dead letter, a blocked run, a
  timer that is left for a closed run, a deleted run that is back
- unexplained: a completion that no code told of; code that ran again although nothing happened that explains it; a
  line at ERROR in the log of a worker
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from tests.e2e.checker_history import (
    CATEGORIES,
    DUPLICATED,
    EARLY,
    LOST,
    REORDERED,
    UNEXPLAINED,
    WRONG,
    History,
    RunFacts,
    StepFacts,
    Violation,
    Where,
)
from tests.e2e.checker_promises import (
    SETTLED_MS,
    Policies,
    backoffs_in_time,
    errors_explained,
    retentions_in_time,
    signals_in_order,
    starts_in_time,
    timeouts_in_time,
    timers_left,
    trimmed,
)
from tests.e2e.checker_topics import Record, Topics, Value

AFTERMATH_MS: Final = 20_000
"""How long after a fault an attempt on a queue may be run again because of it: brokers and groups settle meanwhile."""
INTERRUPTED: Final = "streamflow.errors.StepInterrupted"
GONE: Final = "gone"
"""What the client notes who comes for the end of a run that was deleted meanwhile."""
UNDO: Final = "undo"
"""The step that the soak's workflow runs in its `finally`."""

Key = tuple[str, int]


@dataclass
class Report:
    """What was found, and how much was looked at."""

    violations: list[Violation]
    accepted: int = 0
    closed: int = 0
    steps: int = 0
    retried: int = 0
    deleted: int = 0
    repeated: int = 0
    """Attempts whose code ran more than once, each with a reason."""
    turns: int = 0
    claims: int = 0
    ignored: int = 0
    """History records that do not count: of owners that were deposed."""
    turn_times: dict[int, list[int]] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """How many violations of each category."""
        found = Counter(violation.category for violation in self.violations)
        return {category: found[category] for category in CATEGORIES}


def check(
    topics: Topics,
    effects: Sequence[Value] = (),
    journal: Sequence[Value] = (),
    faults: Sequence[Value] = (),
    policies: Policies | None = None,
    said: Mapping[str, str] | None = None,
) -> Report:
    """Hold them together. `faults` say `began` and `ended` in ms, and the `group` of processes that they hurt;
    `policies` what the app promises about its steps, `said` what each process wrote to its log."""
    checker = Checker(topics, effects, journal, faults, policies or Policies())
    for part in (
        checker.runs, checker.commands, checker.statuses, checker.tasks, checker.effects, checker.letters,
        checker.promises,
    ):  # fmt: skip
        checker.violations += part()
    checker.violations += errors_explained(said or {}, faults)
    history = checker.history
    return Report(
        violations=checker.violations,
        accepted=sum(line["what"] == "started" for line in journal),
        closed=sum(run.closed is not None for run in history.runs.values()),
        steps=sum(len(run.steps) for run in history.runs.values()),
        retried=sum(len(step.failures) for run in history.runs.values() for step in run.steps.values()),
        deleted=sum(run.deleted_at is not None for run in history.runs.values()),
        repeated=checker.repeated,
        turns=sum(run.turn for run in history.runs.values()),
        claims=sum(len(partition.claims) for partition in history.partitions.values()),
        ignored=sum(partition.ignored for partition in history.partitions.values()),
        turn_times={number: partition.turn_times for number, partition in history.partitions.items()},
    )


def longest_pauses(turn_times: dict[int, list[int]], faults: Iterable[Value]) -> dict[str, float]:
    """For each kind of fault, the longest time in s in which some partition wrote no turn while or after it lasted.

    A pause counts for the faults that it overlaps, up to `AFTERMATH_MS` after their end; where faults overlap it counts
    for each of them.
    """
    longest: dict[str, float] = {}
    for fault in faults:
        pause = 0
        for times in turn_times.values():
            for before, after in pairwise(times):
                if before < fault["ended"] and after > fault["began"]:
                    pause = max(pause, after - before)
        longest[fault["kind"]] = max(longest.get(fault["kind"], 0.0), pause / 1000)
    return longest


def pauses(turn_times: dict[int, list[int]], count: int) -> list[tuple[int, int, int]]:
    """The longest times without a turn: (partition, begin, end) in ms, the longest first."""
    found = [(number, *pair) for number, times in turn_times.items() for pair in pairwise(times)]
    return sorted(found, key=lambda pause: pause[1] - pause[2])[:count]


def matches(pattern: Any, value: Any) -> bool:
    """Whether a result is what the oracle says; {"any": […]} leaves a choice."""
    if isinstance(pattern, dict):
        return any(matches(each, value) for each in pattern["any"])
    if isinstance(pattern, list):
        same = isinstance(value, list) and len(value) == len(pattern)
        return same and all(matches(*pair) for pair in zip(pattern, value, strict=True))
    return type(pattern) is type(value) and bool(pattern == value)


class Checker:
    """The parts of `check`; each gives what it finds wrong."""

    def __init__(
        self,
        topics: Topics,
        effects: Sequence[Value],
        journal: Sequence[Value],
        faults: Sequence[Value],
        policies: Policies,
    ) -> None:
        self.topics = topics
        self.history = History(topics.history)
        self.violations = list(self.history.violations)
        self.journal = journal
        self.faults = faults
        self.policies = policies
        self.repeated = 0
        self._ended_at = max([record.at for record in topics.history], default=0)
        self._lines: dict[Key, list[Value]] = {}
        for line in sorted(effects, key=lambda line: int(line["at"])):
            self._lines.setdefault((line["id"], line["number"]), []).append(line)

    # -- runs against the journal --------------------------------------------------------------------------------------

    def runs(self) -> Iterator[Violation]:
        """Every accepted run ended, once, as the oracle says; every step of a run has its outcome."""
        told: dict[str, list[Value]] = {}
        for line in self.journal:
            told.setdefault(line.get("id", ""), []).append(line)
        is_done = any(line["what"] == "done" for line in self.journal)
        if self.journal and not is_done:
            yield Violation(LOST, "the client: it has not seen the end of all its runs")
        for workflow_id, lines in told.items():
            if workflow_id:
                yield from self._told(workflow_id, lines)
        for run in self.history.runs.values():
            if run.created is None:
                yield Violation(WRONG, f"run {run.id}: its turns do not begin with its creation")
            if run.closed is None:
                yield Violation(LOST, f"run {run.id}: it was created and never ended, its last turn is {run.turn}")
            if run.state in ("completed", "cancelled"):
                for number, step in run.steps.items():
                    if step.outcome is None:
                        yield Violation(LOST, f"run {run.id}: step {number} {step.event['name']} has no outcome")
            if run.cancel_requested and run.state not in (None, "cancelled"):
                yield Violation(LOST, f"run {run.id}: it took a cancel in, and is {run.state}")
            for name, count in Counter(run.signals).items():
                if count > 1:
                    yield Violation(DUPLICATED, f"run {run.id}: signal {name} was received {count} times")

    def _told(self, workflow_id: str, lines: list[Value]) -> Iterator[Violation]:
        """What the client was told of one run."""
        run = self.history.runs.get(workflow_id)
        intended = next((line for line in lines if line["what"] == "intend"), None)
        kinds = {line["what"] for line in lines}
        if "started" in kinds and (run is None or run.created is None):
            yield Violation(LOST, f"run {workflow_id}: its start was accepted, and it is not in the history")
        if run is None or intended is None:
            return
        if run.created is not None and json.loads(run.created["args"]) != [intended["program"]]:
            yield Violation(WRONG, f"run {workflow_id}: it was created with other arguments than its client's")
        if run.closed is not None:
            yield from self._end(run, intended)
        for line in lines:
            if line["what"] == "accepted" and line["command"] in intended["signals"]:
                if line["command"] not in run.signals:
                    yield Violation(LOST, f"run {workflow_id}: signal {line['command']} was accepted and never came")
            elif line["what"] == "accepted" and run.state not in (None, intended["state"]):
                yield Violation(LOST, f"run {workflow_id}: its {line['command']} was accepted, and it is {run.state}")
            elif line["what"] == "saw" and line["state"] == GONE:
                if run.deleted_at is None:
                    yield Violation(LOST, f"run {workflow_id}: its client was told that it is gone, it is {run.state}")
            elif line["what"] == "saw":
                result = None if run.closed is None else json.loads(run.closed.get("result", b"null"))
                if (line["state"], line["result"]) != (run.state, result):
                    said = f"{line['state']} with {line['result']!r}"
                    yield Violation(WRONG, f"run {workflow_id}: its client saw {said}, it is {run.state}: {result!r}")

    def _end(self, run: RunFacts, intended: Value) -> Iterator[Violation]:
        assert run.closed is not None
        if run.state != intended["state"]:
            why = run.closed.get("error") or {}
            yield Violation(WRONG, f"run {run.id}: expected {intended['state']}, found {run.state} {why}")
        elif run.state == "completed" and not matches(intended["result"], json.loads(run.closed["result"])):
            found = run.closed["result"].decode()
            yield Violation(WRONG, f"run {run.id}: expected {json.dumps(intended['result'])}, found {found}")
        undone = [step for step in run.steps.values() if step.event["name"] == UNDO]
        completed = [step for step in undone if step.outcome is not None and step.outcome[0]["kind"] == "StepCompleted"]
        expected = 1 if run.started and run.state in ("completed", "cancelled") else 0
        if (len(undone), len(completed)) != (expected, expected):
            category = LOST if len(completed) < expected else DUPLICATED
            yield Violation(
                category, f"run {run.id}: {run.state}, its cleanup ran {len(completed)} of {expected} times"
            )

    # -- commands and answers ----------------------------------------------------------------------------------------

    def commands(self) -> Iterator[Violation]:
        """A command that was answered or consumed has had its effect; an answer is never before it."""
        commands: dict[str, Record] = {}
        for record in self.topics.commands:
            if record.value is not None:
                commands.setdefault(record.value["command_id"], record)
        replies: dict[str, list[Record]] = {}
        for record in self.topics.replies:
            if record.value is not None:
                replies.setdefault(record.value["command_id"], []).append(record)
        applied = {
            command_id: (run, where, reply_to)
            for run in self.history.runs.values()
            for command_id, (where, reply_to) in run.applied.items()
        }
        for command_id, (run, where, reply_to) in applied.items():
            if command_id not in commands:
                yield Violation(WRONG, f"run {run.id}: it applied command {command_id}, which nobody sent")
            answers = replies.get(command_id, [])
            if reply_to is not None and not any(record.partition == reply_to for record in answers):
                yield Violation(LOST, f"run {run.id}: the answer to command {command_id} was never sent")
            for answer in answers:
                assert answer.value is not None
                if not answer.value["accepted"]:
                    # Sent again when the run was deleted: nothing is known of it then, its commands included.
                    if run.deleted_at is not None and answer.at >= run.deleted_at.at:
                        continue
                    yield Violation(WRONG, f"run {run.id}: command {command_id} took effect and was refused")
                elif answer.at < where.at:
                    late = f"{where.at - answer.at} ms before its turn was in the log"
                    yield Violation(EARLY, f"run {run.id}: command {command_id} was answered {late}")
        for command_id, command in commands.items():
            if command_id not in applied:
                yield from self._without_turn(command_id, command, replies.get(command_id, []))

    def _without_turn(self, command_id: str, record: Record, answers: list[Record]) -> Iterator[Violation]:
        """A command that no turn applied: it must have had no effect to have, whatever it was answered."""
        assert record.value is not None
        kind, run = record.value["body"]["kind"], self.history.runs.get(record.value["workflow_id"])
        accepted = any(answer.value is not None and answer.value["accepted"] for answer in answers)
        has_effect = {
            "StartWorkflow": run is not None and run.created is not None,
            "CancelWorkflow": run is not None and (run.cancel_requested or run.state == "cancelled"),
            "TerminateWorkflow": False,
            "SignalWorkflow": False,
        }.get(kind)
        if has_effect is None or has_effect:
            return
        name = record.value["workflow_id"]
        if accepted:
            yield Violation(LOST, f"run {name}: {kind} {command_id} was accepted and had no effect")
        elif run is not None and self._was_open_when_consumed(run, record):
            yield Violation(LOST, f"run {name}: {kind} {command_id} at {record.offset} was consumed without effect")

    def _was_open_when_consumed(self, run: RunFacts, record: Record) -> bool:
        """Whether the pass that consumed the command ended between the run's creation and its end."""
        moves = self.history.partitions[run.partition].consumed
        index = bisect_right(moves, record.offset, key=lambda move: move[0])
        if index == len(moves) or record.partition != run.partition or run.created_at is None:
            return False
        offset = moves[index][1]
        return run.created_at.offset <= offset and (run.closed_at is None or run.closed_at.offset > offset)

    # -- statuses ------------------------------------------------------------------------------------------------------

    def statuses(self) -> Iterator[Violation]:
        """No status is newer than its history; the last one of each run is that of its last turn."""
        last: dict[str, Value | None] = {}
        for record in self.topics.status:
            workflow_id = record.key.decode()
            last[workflow_id] = status = record.value
            run = self.history.runs.get(workflow_id)
            if status is None:
                continue
            if run is None or status["turn"] > run.turn:
                turns = 0 if run is None else run.turn
                yield Violation(
                    REORDERED, f"run {workflow_id}: a status of turn {status['turn']}, its history has {turns}"
                )
                continue
            where = run.turns.get(status["turn"])
            if where is not None and record.at < where.at:
                yield Violation(
                    EARLY,
                    f"run {workflow_id}: the status of turn {status['turn']} came {where.at - record.at} ms before it",
                )
        for run in self.history.runs.values():
            final = last.get(run.id)
            if run.deleted_at is not None and (final is None or run.deleted_at.at + SETTLED_MS > self._ended_at):
                continue
            if final is None or final["turn"] != run.turn:
                found = None if final is None else final["turn"]
                yield Violation(
                    REORDERED, f"run {run.id}: its last status is of turn {found}, its last turn {run.turn}"
                )
            elif run.closed is not None:
                result = run.closed.get("result")
                if (final["state"], final["result"]) != (run.state, result):
                    said = f"its last status says {final['state']} {final['result']}"
                    yield Violation(WRONG, f"run {run.id}: {said}, its history {run.state} {result}")

    # -- attempts on queues, dead letters ------------------------------------------------------------------------------

    def tasks(self) -> Iterator[Violation]:
        """An attempt is put on a queue once its turn is in the log, and only if its step says so."""
        for record in self.topics.steps:
            if record.value is None:
                continue
            task = record.value
            step = self._step(task["workflow_id"], task["number"])
            due = None if step is None else step.due.get(task["attempt"])
            name = f"run {task['workflow_id']}: attempt {task['attempt']} of step {task['number']}"
            if step is None or due is None:
                yield Violation(EARLY, f"{name} was put on a queue without its turn")
            elif record.at < due.at:
                yield Violation(EARLY, f"{name} was put on a queue {due.at - record.at} ms before its turn")
            elif step.event["queue"] is None:
                yield Violation(WRONG, f"{name} was put on a queue, and is its owner's")

    def letters(self) -> Iterator[Violation]:
        """Nobody sent what cannot be applied."""
        for record in self.topics.dead_letters:
            reason = None if record.value is None else record.value["reason"]
            yield Violation(WRONG, f"dead-letters[{record.partition}] at {record.offset}: {reason}")

    def _step(self, workflow_id: str, number: int) -> StepFacts | None:
        run = self.history.runs.get(workflow_id)
        return None if run is None else run.steps.get(number)

    def promises(self) -> Iterator[Violation]:
        """What `checker_promises.py` looks at."""
        yield from signals_in_order(self.history, self.topics, self.journal)
        yield from starts_in_time(self.history, self.topics, self.journal, self._lines)
        yield from timeouts_in_time(self.history, self._lines, self.faults, self.policies)
        yield from backoffs_in_time(self.history, self._lines, self.policies)
        yield from retentions_in_time(self.history, self.policies)
        yield from timers_left(self.history, self.topics)
        yield from trimmed(self.history, self.topics)

    # -- effects -------------------------------------------------------------------------------------------------------

    def effects(self) -> Iterator[Violation]:
        """The code of each attempt ran when it might, as often as something explains, and did what was recorded."""
        for (workflow_id, number), lines in self._lines.items():
            run, step = self.history.runs.get(workflow_id), self._step(workflow_id, number)
            name = f"run {workflow_id}: step {number} {lines[0]['step']}"
            if run is None or step is None:
                yield Violation(EARLY, f"{name} ran, and its history does not have it")
                continue
            begun: dict[int, list[Value]] = {}
            for line in lines:
                if line["what"] == "began":
                    begun.setdefault(line["attempt"], []).append(line)
            if step.event["at_most_once"] and sum(map(len, begun.values())) > 1:
                yield Violation(
                    DUPLICATED, f"{name} runs at most once, and began {sum(map(len, begun.values()))} times"
                )
            for attempt, starts in begun.items():
                yield from self._began(run, step, f"{name}, attempt {attempt}", attempt, starts)
        for run in self.history.runs.values():
            for number, step in run.steps.items():
                lines = self._lines.get((run.id, number), [])
                name = f"run {run.id}: step {number} {step.event['name']}"
                outcomes = [*step.failures.values(), *([] if step.outcome is None else [step.outcome])]
                for event, where in outcomes:
                    yield from self._outcome(run, step, name, event, where, lines)

    def _began(
        self, run: RunFacts, step: StepFacts, name: str, attempt: int, starts: list[Value]
    ) -> Iterator[Violation]:
        due = step.starts.get(attempt) if step.event["at_most_once"] else step.due.get(attempt)
        if due is None or starts[0]["at"] < due.at:
            early = (
                "without its turn" if due is None else f"{due.at - starts[0]['at']} ms before its turn was in the log"
            )
            yield Violation(EARLY, f"{name} ran {early}")
            return
        is_remote = step.event["queue"] is not None
        self.repeated += len(starts) > 1
        claims = self._claims(run, due.offset, starts[-1]["at"])
        if len(starts) > 1:
            if is_remote:
                explained = claims or self._disturbed(starts[0]["at"], starts[-1]["at"])
            else:  # each new owner begins it once, and a deposed one that it had begun late
                explained = len(starts) - 1 <= claims
            if not explained:
                yield Violation(
                    UNEXPLAINED, f"{name} ran {len(starts)} times; {claims} owners took the partition meanwhile"
                )
        recorded = step.failures.get(attempt)
        if recorded is None and step.outcome is not None and step.outcome[0].get("attempt") == attempt:
            recorded = step.outcome
        for start in starts:
            if recorded is None or start["at"] <= recorded[1].at:
                continue
            if is_remote:
                explained = self._disturbed(due.at, start["at"])
            else:
                explained = self._is_deposed(run, start["pid"], recorded[1])
            if not explained:
                late = f"{start['at'] - recorded[1].at} ms after its outcome was in the log"
                yield Violation(UNEXPLAINED, f"{name} ran in process {start['pid']} {late}")

    def _outcome(
        self, run: RunFacts, step: StepFacts, name: str, event: Value, where: Where, lines: list[Value]
    ) -> Iterator[Violation]:
        if event["kind"] == "StepCancelled":
            return
        mine = [line for line in lines if line["attempt"] == event["attempt"] and line["at"] <= where.at]
        name = f"{name}, attempt {event['attempt']}"
        if event["kind"] == "StepCompleted":
            results = [line["result"] for line in mine if line["what"] == "ended"]
            if not results:
                yield Violation(UNEXPLAINED, f"{name} is completed, and no code ended before")
            elif json.loads(event["result"]) not in results:
                yield Violation(WRONG, f"{name}: its code gave {results[0]!r}, recorded is {event['result'].decode()}")
            return
        error = event["error"]
        kind = error["type"].rpartition(".")[2]
        if error["type"] == INTERRUPTED:
            started = step.starts.get(event["attempt"])
            if started is None or not self._claims(run, started.offset, where.at):
                yield Violation(UNEXPLAINED, f"{name} was interrupted, and no other owner came")
        elif kind == "TimeoutError":
            if not any(line["what"] == "began" for line in mine):
                yield Violation(UNEXPLAINED, f"{name} overran its timeout, and no code began")
        elif not any(line["what"] == "failed" and line["error"] == kind for line in mine):
            yield Violation(UNEXPLAINED, f"{name} failed with {error['type']}: {error['message']}, and no code did so")

    def _claims(self, run: RunFacts, offset: int, until: int) -> int:
        """How many owners took the run's partition behind that offset, until that time."""
        claims = self.history.partitions[run.partition].claims
        return sum(claim.offset > offset and claim.at <= until for claim in claims)

    def _is_deposed(self, run: RunFacts, pid: int, recorded: Where) -> bool:
        """Whether the process had lost the partition, or not yet won it, when the outcome was recorded."""
        before = [claim for claim in self.history.partitions[run.partition].claims if claim.offset < recorded.offset]
        return bool(before) and before[-1].pid != pid and any(claim.pid == pid for claim in before)

    def _disturbed(self, begin: int, end: int) -> bool:
        """Whether a fault that hurts queues was under way, or hardly over."""
        return any(
            fault["group"] in ("step worker", "broker", "worker")
            and fault["began"] <= end
            and fault["ended"] + AFTERMATH_MS >= begin
            for fault in self.faults
        )
