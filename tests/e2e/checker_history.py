"""The history as the checker folds it: what became of each run, and what could not have happened.

Each event is held against what was before it. What is wrong is said as a `Violation` and folded all the same, so that
one mistake does not hide the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tests.e2e.checker_topics import Reading, Record, Value

LOST, DUPLICATED, EARLY, REORDERED, WRONG, UNEXPLAINED = (
    "lost", "duplicated", "early", "reordered", "wrong", "unexplained",
)  # fmt: skip
CATEGORIES: Final = (LOST, DUPLICATED, EARLY, REORDERED, WRONG, UNEXPLAINED)

CLOSING: Final = {
    "RunCompleted": "completed",
    "RunFailed": "failed",
    "RunCancelled": "cancelled",
    "RunTerminated": "terminated",
}
AFTER_CLOSING: Final = frozenset({"RetentionSet", "RunDeleted"})


class Violation(NamedTuple):
    """A promise that was broken; `what` names the run."""

    category: str
    what: str


class Where(NamedTuple):
    """Where a turn stands: its offset, when its record was in the log, and its own instant (both in ms)."""

    offset: int
    at: int
    turn_at: int


@dataclass
class StepFacts:
    """A step. `due` and `starts` say since when which attempt may run; `failures` and `outcome`, what was recorded."""

    event: Value
    scheduled: Where
    attempt: int = 1
    wait_until: int | None = None
    due: dict[int, Where] = field(default_factory=dict)
    starts: dict[int, Where] = field(default_factory=dict)
    failures: dict[int, tuple[Value, Where]] = field(default_factory=dict)
    outcome: tuple[Value, Where] | None = None


@dataclass
class RunFacts:
    """A run, folded."""

    id: str
    partition: int
    turn: int = 0
    turns: dict[int, Where] = field(default_factory=dict)
    log: list[tuple[int, list[Value]]] = field(default_factory=list)
    created: Value | None = None
    created_at: Where | None = None
    started_at: Where | None = None
    cancel_requested: bool = False
    decided: int = 0
    steps: dict[int, StepFacts] = field(default_factory=dict)
    timers: dict[int, int] = field(default_factory=dict)
    waits: dict[int, str] = field(default_factory=dict)
    signals: list[str] = field(default_factory=list)
    taken: set[int] = field(default_factory=set)
    applied: dict[str, tuple[Where, int | None]] = field(default_factory=dict)
    closed: Value | None = None
    closed_at: Where | None = None
    delete_at: int | None = None
    deleted_at: Where | None = None

    @property
    def started(self) -> bool:
        """Whether its code has begun."""
        return self.started_at is not None

    @property
    def state(self) -> str | None:
        """How it closed; None while it is open."""
        return None if self.closed is None else CLOSING[self.closed["kind"]]


class ClaimFacts(NamedTuple):
    """A claim that counts. The owner's name holds the id of its process."""

    offset: int
    at: int
    owner: str

    @property
    def pid(self) -> int:
        """The process, -1 where the name does not tell."""
        parts = self.owner.rsplit("-", 2)
        return int(parts[1]) if len(parts) == 3 and parts[1].isdigit() else -1


@dataclass
class PartitionFacts:
    """One history partition."""

    reading: Reading = field(default_factory=Reading)
    term_seen: int = 0
    claims: list[ClaimFacts] = field(default_factory=list)
    consumed: list[tuple[int, int]] = field(default_factory=list)
    """(consumed, offset of the record) of each turn where it moved."""
    turn_times: list[int] = field(default_factory=list)
    at: int = 0
    ignored: int = 0


class History:
    """All history partitions, folded."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.runs: dict[str, RunFacts] = {}
        self.partitions: dict[int, PartitionFacts] = {}
        self.violations: list[Violation] = []
        for record in records:
            self.take(record)

    def say(self, category: str, run: RunFacts, what: str) -> None:
        self.violations.append(Violation(category, f"run {run.id}, turn {run.turn}: {what}"))

    # -- records -----------------------------------------------------------------------------------------------------

    def take(self, record: Record) -> None:
        """Take the next record of its partition."""
        partition = self.partitions.setdefault(record.partition, PartitionFacts())
        value = record.value
        if value is None:
            self.violations.append(Violation(WRONG, f"history[{record.partition}] has a tombstone at {record.offset}"))
            return
        if not partition.reading.counts(value):
            partition.ignored += 1
            partition.term_seen = max(partition.term_seen, value["term"])
            return
        if value["kind"] == "Claim":
            if partition.claims and value["term"] != partition.term_seen + 1:
                self.violations.append(
                    Violation(
                        REORDERED,
                        f"history[{record.partition}] at {record.offset}: a claim of term {value['term']}, "
                        f"expected {partition.term_seen + 1}",
                    )
                )
            partition.term_seen = max(partition.term_seen, value["term"])
            partition.claims.append(ClaimFacts(record.offset, record.at, value["owner"]))
            return
        if value["kind"] == "Consumed":
            self._instant(record, partition, value)
            return
        whole = partition.reading.whole(value)
        if whole is None:
            return
        self._instant(record, partition, whole)
        if whole["kind"] == "RunSnapshot":
            self._snapshot(record, whole)
        else:
            partition.turn_times.append(record.at)
            self._turn(self._run(whole, record.partition), whole, Where(record.offset, record.at, whole["at"]))

    def _instant(self, record: Record, partition: PartitionFacts, whole: Value) -> None:
        """Consumed offsets and instants only grow."""
        who = f"run {whole['workflow_id']}, turn {whole['turn']}, " if "turn" in whole else ""
        where = f"{who}history[{record.partition}] at {record.offset}"
        before = partition.consumed[-1][0] if partition.consumed else 0
        if whole["consumed"] < before:
            self.violations.append(
                Violation(REORDERED, f"{where}: consumed went back from {before} to {whole['consumed']}")
            )
        elif whole["consumed"] > before:
            partition.consumed.append((whole["consumed"], record.offset))
        if whole["kind"] == "Turn":
            if whole["at"] < partition.at:
                self.violations.append(
                    Violation(REORDERED, f"{where}: its instant {whole['at']} is before {partition.at}")
                )
            partition.at = max(partition.at, whole["at"])

    def _run(self, value: Value, partition: int) -> RunFacts:
        return self.runs.setdefault(value["workflow_id"], RunFacts(value["workflow_id"], partition))

    def _snapshot(self, record: Record, whole: Value) -> None:
        """A snapshot says again what the turns said; where those were trimmed, it says it for the first time."""
        run = self._run(whole, record.partition)
        turns: list[Value] = []
        reading = Reading()
        for part in whole["turns"]:
            turn = reading.whole(part)
            if turn is not None:
                turns.append(turn)
        if not run.log:
            run.turn = turns[0]["turn"] - 1
            for turn in turns:
                self._turn(run, turn, Where(record.offset, turn["at"], turn["at"]))
        first = turns[0]["turn"] if turns else 0
        if [(turn["turn"], turn["events"]) for turn in turns] != [each for each in run.log if each[0] >= first]:
            self.say(WRONG, run, f"its snapshot at {record.offset} differs from its turns")

    def _turn(self, run: RunFacts, turn: Value, where: Where) -> None:
        if turn["turn"] != run.turn + 1:
            self.say(REORDERED, run, f"is followed by turn {turn['turn']}")
        run.turn = turn["turn"]
        run.turns[run.turn] = where
        run.log.append((run.turn, turn["events"]))
        for event in turn["events"]:
            self._event(run, event, where)
        for command in turn["commands"]:
            if command["command_id"] in run.applied:
                self.say(DUPLICATED, run, f"command {command['command_id']} takes effect a second time")
            run.applied[command["command_id"]] = (where, command["reply_to"])

    # -- events ------------------------------------------------------------------------------------------------------

    def _event(self, run: RunFacts, event: Value, where: Where) -> None:
        kind = event["kind"]
        if run.closed is not None and kind not in AFTER_CLOSING:
            self.say(DUPLICATED, run, f"{kind} after it was closed by {run.closed['kind']}")
        if kind.startswith("Step") and kind != "StepScheduled":
            self._step(run, event, where)
        elif kind.startswith("Timer") and kind != "TimerSet":
            self._timer(run, event, where)
        elif kind.startswith("Signal") and kind != "SignalAwaited":
            self._signal(run, event)
        elif kind in ("StepScheduled", "TimerSet", "SignalAwaited"):
            self._decision(run, event, where)
        elif kind in CLOSING:
            self._closing(run, event, where)
        else:
            self._other(run, event, where)

    def _decision(self, run: RunFacts, event: Value, where: Where) -> None:
        number = event["number"]
        if number != run.decided:
            self.say(DUPLICATED if number < run.decided else REORDERED, run,
                     f"{event['kind']} has number {number}, expected {run.decided}")  # fmt: skip
        run.decided = max(run.decided, number + 1)
        match event["kind"]:
            case "StepScheduled":
                step = StepFacts(event, where, wait_until=event["start_at"])
                if step.wait_until is None:
                    step.due[1] = where
                run.steps.setdefault(number, step)
            case "TimerSet":
                run.timers[number] = event["fire_at"]
            case _:
                run.waits[number] = event["name"]

    def _early(self, run: RunFacts, what: str, due_at: int | None, where: Where) -> None:
        if due_at is not None and min(where.at, where.turn_at) < due_at:
            self.say(EARLY, run, f"{what} {due_at - min(where.at, where.turn_at)} ms before its time")

    def _step(self, run: RunFacts, event: Value, where: Where) -> None:
        kind, number = event["kind"], event["number"]
        step = run.steps.get(number)
        if step is None:
            self.say(WRONG, run, f"{kind} of step {number}, which was never scheduled")
            return
        if step.outcome is not None:
            self.say(DUPLICATED, run, f"{kind} of step {number} after its outcome {step.outcome[0]['kind']}")
            return
        if kind == "StepCancelled":
            step.outcome = (event, where)
            return
        attempt = event["attempt"]
        if attempt != step.attempt:
            again = DUPLICATED if attempt < step.attempt else REORDERED
            self.say(again, run, f"{kind} of attempt {attempt} of step {number}, which is at attempt {step.attempt}")
            return
        if kind == "StepDue":
            if step.wait_until is None:
                self.say(DUPLICATED, run, f"attempt {attempt} of step {number} is due a second time")
            self._early(run, f"attempt {attempt} of step {number} is due", step.wait_until, where)
            step.wait_until, step.due[attempt] = None, where
            return
        if step.wait_until is not None:
            self.say(EARLY, run, f"{kind} of attempt {attempt} of step {number} before it was due")
        if kind == "StepStarted":
            if attempt in step.starts:
                self.say(DUPLICATED, run, f"attempt {attempt} of at-most-once step {number} is started again")
            step.starts.setdefault(attempt, where)
        elif kind == "StepAttemptFailed":
            step.failures[attempt] = (event, where)
            step.attempt, step.wait_until = attempt + 1, event["retry_at"]
        else:
            step.outcome = (event, where)

    def _timer(self, run: RunFacts, event: Value, where: Where) -> None:
        number = event["number"]
        if number not in run.timers:
            self.say(DUPLICATED, run, f"{event['kind']} of timer {number}, which is not pending")
            return
        fire_at = run.timers.pop(number)
        if event["kind"] == "TimerFired":
            self._early(run, f"timer {number} fired", fire_at, where)

    def _signal(self, run: RunFacts, event: Value) -> None:
        match event["kind"]:
            case "SignalReceived":
                if event["signal"] != len(run.signals):
                    self.say(REORDERED, run, f"signal {event['signal']} comes as number {len(run.signals)}")
                run.signals.append(event["name"])
            case "SignalTaken":
                if event["signal"] in run.taken:
                    self.say(DUPLICATED, run, f"signal {event['signal']} is taken a second time")
                if event["signal"] >= len(run.signals):
                    self.say(EARLY, run, f"signal {event['signal']} is taken before it came")
                elif run.waits.get(event["number"]) != run.signals[event["signal"]]:
                    self.say(WRONG, run, f"wait {event['number']} took the signal {run.signals[event['signal']]}")
                run.taken.add(event["signal"])
                run.waits.pop(event["number"], None)
            case _:
                run.waits.pop(event["number"], None)

    def _closing(self, run: RunFacts, event: Value, where: Where) -> None:
        deadline = None if run.created is None else run.created["deadline_at"]
        if event["kind"] == "RunFailed" and deadline is not None and event["error"]["type"] == "TimeoutError":
            self._early(run, "the run's own timeout passed", deadline, where)
        if run.closed is None:
            run.closed, run.closed_at = event, where

    def _other(self, run: RunFacts, event: Value, where: Where) -> None:
        match event["kind"]:
            case "RunCreated":
                if run.created is not None:
                    self.say(DUPLICATED, run, "it is created a second time")
                    return
                run.created, run.created_at = event, where
            case "RunStarted":
                if run.started:
                    self.say(DUPLICATED, run, "its code begins a second time")
                run.started_at = where
                self._early(run, "its code began", None if run.created is None else run.created["start_at"], where)
            case "CancelRequested":
                run.cancel_requested = True
            case "RetentionSet":
                run.delete_at = event["delete_at"]
            case "RunDeleted":
                if run.closed is None:
                    self.say(LOST, run, "it was deleted while it was open")
                run.deleted_at = where
            case "RunBlocked":
                self.say(WRONG, run, f"it is blocked: {event['error']['message']}")
