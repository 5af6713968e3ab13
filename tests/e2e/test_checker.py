"""The checker of the soak finds each kind of broken promise: a faultless log passes, each doctored one fails."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import streamflow as sf
from streamflow.codec.avro import encode_history
from streamflow.core.events import RunCreated, RunSnapshot, StepFailed, Turn
from streamflow.errors import ErrorInfo
from tests.e2e.checker import Report, check, longest_pauses, matches, pauses
from tests.e2e.checker_history import History
from tests.e2e.checker_promises import Policies
from tests.e2e.checker_topics import Reading, Record, Topics, Value, decode, read_lines
from tests.e2e.soak_app import Program, expected, make, signals
from tests.e2e.soak_driver import JOURNAL, Driver, intend, read_journal
from tests.e2e.soak_faults import KINDS, plan

RUN = "run-0-0"
OWNER, OTHER = 101, 102


def claim(term: int, pid: int = OWNER) -> Value:
    return {"kind": "Claim", "term": term, "owner": f"host-{pid}-abcdef", "at": 0}


def event(kind: str, **fields: Any) -> Value:
    return {"kind": kind, **fields}


def scheduled(number: int, name: str = "work", **more: Any) -> Value:
    fields = {"name": name, "args": b"[]", "start_at": None, "queue": None, "at_most_once": False}
    return event("StepScheduled", number=number, **{**fields, **more})


def created(**more: Any) -> Value:
    return event("RunCreated", **{"args": b'[["x"]]', "start_at": None, "deadline_at": None, "run": 1, **more})


def completed(number: int, result: bytes = b"2", attempt: int = 1) -> Value:
    return event("StepCompleted", number=number, attempt=attempt, result=result)


@dataclass
class World:
    """A log of one partition and its witnesses. Time goes on by 10 ms with each record; `broken` are the findings."""

    topics: Topics = field(default_factory=Topics)
    effects: list[Value] = field(default_factory=list)
    journal: list[Value] = field(default_factory=list)
    faults: list[Value] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)
    policies: Policies = field(default_factory=Policies)
    now: int = 1_000
    term: int = 0
    seq: int = 0
    turn: int = 0
    consumed: int = 0

    def _append(self, into: list[Record], value: Value | None, key: bytes = b"") -> None:
        self.now += 10
        into.append(Record(0, len(into), self.now, key, value))

    def claim(self, pid: int = OWNER) -> None:
        self.term, self.seq = self.term + 1, 0
        self._append(self.topics.history, claim(self.term, pid))

    def turns(self, *events: Value, commands: tuple[str, ...] = (), **more: Any) -> None:
        self.seq, self.turn = self.seq + 1, self.turn + 1
        self.now += 10
        value = {
            "kind": "Turn", "workflow_id": RUN, "turn": self.turn, "term": self.term, "seq": self.seq, "at": self.now,
            "consumed": self.consumed, "events": list(events), "part": 0, "last": True,
            "commands": [{"command_id": command, "reply_to": 0} for command in commands], **more,
        }  # fmt: skip
        self._append(self.topics.history, value)

    def command(self, command_id: str, kind: str, name: str = "go") -> None:
        body = {"kind": kind, "name": name}
        value = {"command_id": command_id, "workflow_id": RUN, "reply_to": 0, "sent_at": self.now, "body": body}
        self._append(self.topics.commands, value)
        self.consumed = len(self.topics.commands)

    def reply(self, command_id: str, *, accepted: bool = True) -> None:
        self._append(self.topics.replies, {"command_id": command_id, "workflow_id": RUN, "accepted": accepted})

    def timer(self, kind: str, number: int, fire_at: int, *, gone: bool = False) -> None:
        fields = {"workflow_id": RUN, "kind": kind, "run": 1, "number": number, "attempt": 0, "fire_at": fire_at}
        key = f"{RUN}\0{kind}.{number}.{fire_at}".encode()
        self._append(self.topics.timers, None if gone else fields, key)

    def status(self, state: str = "completed", result: bytes | None = b"[2, 7]", turn: int | None = None) -> None:
        value = {"workflow_id": RUN, "turn": self.turn if turn is None else turn, "state": state, "result": result}
        self._append(self.topics.status, value, RUN.encode())

    def ran(self, number: int, what: str = "began", *, attempt: int = 1, pid: int = OWNER, **more: Any) -> None:
        self.now += 10
        line = {"what": what, "id": RUN, "number": number, "attempt": attempt, "step": "work", "at": self.now}
        self.effects.append({**line, "pid": pid, **more})

    def told(self, what: str, **more: Any) -> None:
        self.journal.append({"what": what, "id": RUN, **more})

    def check(self) -> Report:
        return check(self.topics, self.effects, self.journal, self.faults, self.policies, self.said)


def world() -> World:
    """A run that keeps every promise: a step that failed once, a sleep, an at-most-once step, a signal, a clean-up."""
    it = World()
    result = [2, {"any": [7, "interrupted"]}]
    it.told("intend", program=["x"], state="completed", result=result, signals={"go": "v"}, ending=None)
    it.claim()
    it.command("c1", "StartWorkflow")
    it.turns(created(), event("RunStarted"), scheduled(0), commands=("c1",))
    it.reply("c1")
    it.told("started")
    it.ran(0)
    it.ran(0, "failed", error="Broken")
    error = {"type": "soak.Broken", "message": "", "traceback": ""}
    it.turns(event("StepAttemptFailed", number=0, attempt=1, error=error, retry_at=it.now + 5))
    it.turns(event("StepDue", number=0, attempt=2))
    it.ran(0, attempt=2)
    it.ran(0, "ended", attempt=2, result=2)
    it.turns(completed(0, attempt=2), event("TimerSet", number=1, name="", fire_at=it.now + 5))
    it.turns(event("TimerFired", number=1), scheduled(2, "once", at_most_once=True))
    it.turns(event("StepStarted", number=2, attempt=1))
    it.ran(2)
    it.ran(2, "ended", result=7)
    it.turns(completed(2, b"7"), event("SignalAwaited", number=3, name="go"))
    it.command("c2", "SignalWorkflow")
    it.turns(
        event("SignalReceived", signal=0, name="go"), event("SignalTaken", number=3, signal=0), scheduled(4, "undo"),
        commands=("c2",),
    )  # fmt: skip
    it.reply("c2")
    it.told("accepted", command="go")
    it.ran(4)
    it.ran(4, "ended", result=2)
    it.turns(completed(4), event("RunCompleted", result=b"[2, 7]"))
    it.status()
    it.told("saw", state="completed", result=[2, 7])
    it.journal.append({"what": "done"})
    return it


def test_a_log_without_fault_passes():
    report = world().check()
    assert report.violations == []
    assert (report.accepted, report.closed, report.steps, report.retried, report.claims) == (1, 1, 3, 1, 1)
    assert len(report.turn_times[0]) == report.turns == 9


# ------------------------------------------------------------------------------------------------------ doctored worlds


def turn_of(it: World, kind: str) -> tuple[int, Value]:
    """The index of the record whose turn has the first event of that kind, and that event."""
    for index, record in enumerate(it.topics.history):
        for each in (record.value or {}).get("events", ()):
            if each["kind"] == kind:
                return index, each
    raise LookupError(kind)


def drop(it: World, kind: str) -> None:
    index, found = turn_of(it, kind)
    (it.topics.history[index].value or {})["events"].remove(found)


def add(it: World, kind: str, *events: Value) -> None:
    """Put events behind the one of that kind, in its turn."""
    index, found = turn_of(it, kind)
    into = (it.topics.history[index].value or {})["events"]
    into[into.index(found) + 1 : into.index(found) + 1] = events


def edit(it: World, kind: str, **fields: Any) -> None:
    turn_of(it, kind)[1].update(fields)


def edit_turn(it: World, kind: str, **fields: Any) -> None:
    value = it.topics.history[turn_of(it, kind)[0]].value
    assert value is not None
    value.update(fields)


def move(records: list[Record], index: int, by: int) -> None:
    record = records[index]
    records[index] = Record(record.partition, record.offset, record.at + by, record.key, record.value)


def line(it: World, number: int, what: str = "began") -> Value:
    return next(each for each in it.effects if each["number"] == number and each["what"] == what)


def cancel_refused(it: World) -> None:
    """The run takes a cancel in, and completes."""
    add(it, "TimerFired", event("CancelRequested"))


def consumed_without_effect(it: World) -> None:
    """A signal lies before what was consumed while the run was open, and no turn has it."""
    signal = it.topics.commands[0].value or {}
    lost = {**signal, "command_id": "c9", "body": {"kind": "SignalWorkflow", "name": "go"}}
    records = [it.topics.commands[0], Record(0, 1, 1_000, b"", lost), it.topics.commands[1]]
    it.topics.commands[:] = records
    edit_turn(it, "SignalReceived", consumed=3)
    edit_turn(it, "RunCompleted", consumed=3)


def accepted_without_effect(it: World) -> None:
    it.command("c9", "TerminateWorkflow")
    it.reply("c9")


def once_twice(it: World) -> None:
    it.effects.append({**line(it, 2), "pid": OTHER, "at": line(it, 2)["at"] + 1})


def again_after_outcome(it: World) -> None:
    it.effects.append({**line(it, 4), "at": it.now})


def again_in_time(it: World) -> None:
    it.effects.append({**line(it, 4), "at": line(it, 4)["at"] + 1})


def task(it: World, by: int) -> None:
    index, _ = turn_of(it, "StepScheduled")
    at = it.topics.history[index].at + by
    it.topics.steps.append(Record(0, 0, at, b"", {"workflow_id": RUN, "number": 0, "attempt": 1}))


def written_when_deposed(it: World) -> None:
    """A turn of a deposed owner between those of its successor: it does not count, so a turn is missing."""
    edit_turn(it, "StepDue", term=0)


def undone_twice(it: World) -> None:
    edit(it, "StepScheduled", name="undo")


def tombstone(it: World) -> None:
    it.topics.history.append(Record(0, 99, it.now, b"", None))


def without_outcomes(it: World) -> None:
    drop(it, "StepCompleted")
    drop(it, "StepCompleted")


def never_undone(it: World) -> None:
    for record in it.topics.history:
        for each in (record.value or {}).get("events", ()):
            if each.get("name") == "undo":
                each["name"] = "other"


def ended(it: World, command: str, state: str) -> None:
    it.journal[0]["state"] = state
    it.told("accepted", command=command)


def twice_applied(it: World) -> None:
    edit_turn(it, "RunCompleted", commands=[{"command_id": "c2", "reply_to": 0}])


def saw(it: World, **fields: Any) -> None:
    next(each for each in it.journal if each["what"] == "saw").update(fields)


def failed(it: World) -> None:
    _, found = turn_of(it, "RunCompleted")
    found.clear()
    found.update(event("RunFailed", error={"type": "x", "message": "", "traceback": ""}))


def interrupted(it: World) -> None:
    index, _ = turn_of(it, "SignalAwaited")
    found = (it.topics.history[index].value or {})["events"][0]
    error = {"type": "streamflow.errors.StepInterrupted", "message": "", "traceback": ""}
    found.clear()
    found.update(event("StepFailed", number=2, attempt=1, error=error))


DOCTORED: list[tuple[str, str, Callable[[World], object]]] = [
    ("lost", "never ended", lambda it: it.topics.history.pop()),
    ("lost", "not in the history", lambda it: it.topics.history.clear()),
    ("lost", "step 2 once has no outcome", without_outcomes),
    ("lost", "took a cancel in, and is completed", cancel_refused),
    ("lost", "signal go was accepted and never came", lambda it: edit(it, "SignalReceived", name="other")),
    ("lost", "was accepted and had no effect", accepted_without_effect),
    ("lost", "consumed without effect", consumed_without_effect),
    ("lost", "the answer to command c2 was never sent", lambda it: it.topics.replies.pop()),
    ("lost", "not seen the end", lambda it: it.journal.pop()),
    ("lost", "cleanup ran 0 of 1", never_undone),
    ("lost", "accepted, and it is completed", lambda it: ended(it, "cancel", "cancelled")),
    ("duplicated", "after its outcome", lambda it: add(it, "StepCompleted", completed(0, attempt=2))),
    ("duplicated", "attempt 1 of step 0, which is at attempt 2", lambda it: add(it, "StepDue", completed(0))),
    ("duplicated", "due a second time", lambda it: add(it, "StepDue", event("StepDue", number=0, attempt=2))),
    ("duplicated", "takes effect a second time", twice_applied),
    ("duplicated", "timer 1, which is not pending", lambda it: add(it, "TimerFired", event("TimerFired", number=1))),
    ("duplicated", "created a second time", lambda it: add(it, "RunCreated", created())),
    ("duplicated", "begins a second time", lambda it: add(it, "RunStarted", event("RunStarted"))),
    ("duplicated", "after it was closed", lambda it: add(it, "RunCompleted", event("RunTerminated", reason=None))),
    ("duplicated", "has number 0, expected 1", lambda it: add(it, "StepScheduled", scheduled(0))),
    ("duplicated", "is started again", lambda it: add(it, "StepStarted", event("StepStarted", number=2, attempt=1))),
    ("duplicated", "began 2 times", once_twice),
    ("duplicated", "signal go was received 2 times",
     lambda it: add(it, "SignalTaken", event("SignalReceived", signal=1, name="go"))),
    ("duplicated", "is taken a second time",
     lambda it: add(it, "SignalTaken", event("SignalTaken", number=3, signal=0))),
    ("duplicated", "its cleanup ran 2 of 1", undone_twice),
    ("early", "timer 1 fired", lambda it: edit(it, "TimerSet", fire_at=10**9)),
    ("early", "timer 1 fired", lambda it: move(it.topics.history, turn_of(it, "TimerFired")[0], -100)),
    ("early", "attempt 2 of step 0 is due", lambda it: edit(it, "StepAttemptFailed", retry_at=10**9)),
    ("early", "before it was due", lambda it: drop(it, "StepDue")),
    ("early", "its code began", lambda it: edit(it, "RunCreated", start_at=10**9)),
    ("early", "before its turn was in the log", lambda it: line(it, 4).update(at=1)),
    ("early", "ran without its turn", lambda it: line(it, 4).update(attempt=2)),
    ("early", "its history does not have it", lambda it: line(it, 4).update(number=9)),
    ("early", "was answered", lambda it: move(it.topics.replies, 1, -100)),
    ("early", "the status of turn 9 came", lambda it: move(it.topics.status, 0, -100)),
    ("early", "put on a queue 1 ms before", lambda it: task(it, -1)),
    ("early", "is taken before it came", lambda it: edit(it, "SignalTaken", signal=1)),
    ("reordered", "is followed by turn 4", lambda it: edit_turn(it, "StepDue", turn=4)),
    ("reordered", "a status of turn 9, its history has 2", written_when_deposed),
    ("reordered", "consumed went back", lambda it: edit_turn(it, "RunCompleted", consumed=0)),
    ("reordered", "its instant 1 is before", lambda it: edit_turn(it, "RunCompleted", at=1)),
    ("reordered", "a claim of term 7, expected 2",
     lambda it: it.topics.history.append(Record(0, 99, it.now, b"", claim(7)))),
    ("reordered", "a status of turn 12", lambda it: it.status(turn=12)),
    ("reordered", "its last status is of turn 3", lambda it: it.status("running", None, turn=3)),
    ("reordered", "its last status is of turn None", lambda it: it.topics.status.clear()),
    ("reordered", "signal 4 comes as number 0", lambda it: edit(it, "SignalReceived", signal=4)),
    ("wrong", "expected [2, ", lambda it: edit(it, "RunCompleted", result=b"[3, 7]")),
    ("wrong", "expected completed, found failed", failed),
    ("wrong", "its client saw cancelled", lambda it: saw(it, state="cancelled")),
    ("wrong", "its client saw completed with 5", lambda it: saw(it, result=5)),
    ("wrong", "its code gave 2, recorded is 5", lambda it: edit(it, "StepCompleted", result=b"5")),
    ("wrong", "its last status says completed b'1'", lambda it: it.status(result=b"1")),
    ("wrong", "other arguments", lambda it: edit(it, "RunCreated", args=b"[1]")),
    ("wrong", "it is blocked",
     lambda it: add(it, "TimerFired", event("RunBlocked", error={"message": "it does not fit"}))),
    ("wrong", "which nobody sent", lambda it: it.topics.commands.pop()),
    ("wrong", "took effect and was refused", lambda it: it.reply("c2", accepted=False)),
    ("wrong", "dead-letters[0] at 0: of no use",
     lambda it: it.topics.dead_letters.append(Record(0, 0, 0, b"", {"reason": "of no use"}))),
    ("wrong", "has a tombstone", tombstone),
    ("wrong", "never scheduled", lambda it: add(it, "StepDue", completed(8))),
    ("wrong", "took the signal other", lambda it: edit(it, "SignalReceived", name="other")),
    ("wrong", "and is its owner's", lambda it: task(it, 0)),
    ("unexplained", "no code ended before", lambda it: line(it, 4, "ended").update(what="failed", error="x")),
    ("unexplained", "and no code did so", lambda it: line(it, 0, "failed").update(error="Other")),
    ("unexplained", "ran 2 times; 0 owners", again_in_time),
    ("unexplained", "after its outcome was in the log", again_after_outcome),
    ("unexplained", "and no other owner came", interrupted),
]  # fmt: skip


@pytest.mark.parametrize(("category", "what", "doctor"), DOCTORED, ids=[f"{each[0]}: {each[1]}" for each in DOCTORED])
def test_a_doctored_log_is_found_out(category: str, what: str, doctor: Callable[[World], object]):
    it = world()
    doctor(it)
    violations = it.check().violations
    assert [each for each in violations if each.category == category and what in each.what], violations


# ---------------------------------------------------------------------------------------------------- what is no fault


def test_an_attempt_that_runs_again_is_explained_by_another_owner():
    it = World()
    it.claim()
    it.command("c1", "StartWorkflow")
    it.turns(created(), event("RunStarted"), scheduled(0), commands=("c1",))
    it.reply("c1")
    it.ran(0)
    it.claim(OTHER)
    it.ran(0, pid=OTHER)
    it.ran(0, "ended", pid=OTHER, result=2)
    it.turns(completed(0), event("RunCompleted", result=b"[2, 7]"))
    it.status()
    assert it.check().violations == []
    it.ran(0, pid=OWNER)  # paused before it began, it wakes up when all is over
    report = it.check()
    assert len(report.violations) == 1 and "ran 3 times; 1 owners" in report.violations[0].what
    del it.effects[0]
    report = it.check()
    assert (report.violations, report.repeated) == ([], 1)


def test_an_attempt_on_a_queue_may_run_again_after_a_fault_only():
    it = World()
    it.claim()
    it.command("c1", "StartWorkflow")
    it.turns(created(), event("RunStarted"), scheduled(0, queue="soak"), commands=("c1",))
    it.reply("c1")
    it.ran(0, pid=7)
    it.ran(0, pid=8)
    it.ran(0, "ended", pid=8, result=2)
    it.turns(completed(0), event("RunCompleted", result=b"[2, 7]"))
    it.status()
    assert [violation.category for violation in it.check().violations] == ["unexplained"]
    it.faults.append({"kind": "client killed", "group": "client", "began": 0, "ended": it.now})
    assert len(it.check().violations) == 1
    it.faults.append({"kind": "broker killed", "group": "broker", "began": 0, "ended": 1_000})
    assert it.check().violations == []


def test_what_a_deposed_owner_wrote_does_not_count():
    it = world()
    stale = dict(it.topics.history[-1].value or {}, term=0, turn=10)
    it.topics.history.append(Record(0, 99, it.now, b"", stale))
    report = it.check()
    assert (report.violations, report.ignored) == ([], 1)


def test_a_turn_in_parts_counts_with_its_last_one():
    it = world()
    history = it.topics.history
    index, _ = turn_of(it, "RunCompleted")
    whole = history[index].value or {}
    first = {**whole, "events": whole["events"][:1], "last": False}
    history[index:] = [
        Record(0, index, it.now, b"", first),
        Record(0, index + 1, it.now, b"", {**whole, "events": whole["events"][1:], "part": 1, "seq": whole["seq"] + 1}),
    ]
    it.status()
    assert it.check().violations == []
    history.pop()
    assert "never ended" in str(it.check().violations)


def test_a_snapshot_must_say_what_the_turns_said():
    it = world()
    turns = [record.value for record in it.topics.history[1:]]
    last = turns[-1] or {}
    snapshot = {**last, "kind": "RunSnapshot", "seq": last["seq"] + 1, "turns": turns}
    it.topics.history.append(Record(0, 99, it.now, b"", snapshot))
    assert it.check().violations == []
    whole = it.topics.history
    it.topics.history = [it.topics.history[-1]]  # what was before it is trimmed
    assert History(it.topics.history).runs[RUN].state == "completed"
    it.topics.history = whole
    snapshot["turns"] = turns[:-1]
    assert "differs from its turns" in str(it.check().violations)


# -------------------------------------------------------------------------------------------------------- its own parts


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ([("c", 1), (1, 1), (1, 2)], [True, True, True]),
        ([("c", 1), (1, 1), (1, 1), (1, 2)], [True, True, False, True]),
        ([("c", 1), (1, 1), (1, 3), (1, 2), (1, 4), ("c", 2), (2, 1)], [True, True, False, False, False, True, True]),
        ([("c", 1), ("c", 1), (1, 1)], [True, False, True]),
        ([("c", 2), (1, 1), ("c", 1), (2, 1)], [True, False, False, True]),
        ([(4, 17), (4, 18), (3, 19)], [True, True, False]),
    ],
)
def test_the_reading_rule(terms: list[tuple[Any, int]], expected: list[bool]):
    reading = Reading()
    values = [
        claim(second) if first == "c" else {"kind": "Turn", "term": first, "seq": second} for first, second in terms
    ]
    assert [reading.counts(value) for value in values] == expected


def test_records_are_decoded_by_the_schemas_alone():
    error = ErrorInfo(type="ValueError", message="no")
    turn = Turn(
        workflow_id="r", turn=1, term=2, seq=3, at=4, consumed=5,
        events=[RunCreated(workflow="w", args=b"[]"), StepFailed(number=0, attempt=1, error=error)],
    )  # fmt: skip
    found = decode("History", encode_history(turn))
    assert (found["kind"], found["term"], found["events"][1]["error"]["message"]) == ("Turn", 2, "no")
    snapshot = RunSnapshot(workflow_id="r", turn=1, term=2, seq=4, at=4, consumed=5, turns=[encode_history(turn)])
    assert decode("History", encode_history(snapshot))["turns"] == [found]
    with pytest.raises(ValueError, match="expected Status in single-object framing"):
        decode("Status", encode_history(turn))


def test_the_checker_imports_nothing_of_the_product():
    program = (
        "import sys, tests.e2e.checker as c, tests.e2e.checker_topics as t; t.decode.__name__, c.check; "
        "print(sorted(m for m in sys.modules if m.partition('.')[0] == 'streamflow'))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_results_match_their_pattern():
    assert matches([1, {"any": [2, "interrupted"]}, ["a"]], [1, "interrupted", ["a"]])
    assert not matches([1, {"any": [2, 3]}], [1, 4])
    assert not matches([1], [1, 1])
    assert not matches([1], [True])
    assert not matches([1], None)


def test_pauses_are_those_during_a_fault():
    times = {0: [0, 1_000, 5_000, 6_000], 1: [0, 2_500]}
    faults = [
        {"kind": "a", "began": 1_500, "ended": 2_000},
        {"kind": "a", "began": 5_500, "ended": 5_600},
        {"kind": "b", "began": 5_500, "ended": 5_600},
        {"kind": "c", "began": 9_000, "ended": 9_100},
    ]
    assert longest_pauses(times, faults) == {"a": 4.0, "b": 1.0, "c": 0.0}
    assert pauses(times, 2) == [(0, 1_000, 5_000), (1, 0, 2_500)]


# ----------------------------------------------------------------------------------------------- the soak's pure parts


def test_a_seed_always_means_the_same_faults_and_each_kind_comes():
    faults, again = plan(7), plan(7)
    first = [next(faults) for _ in range(100)]
    assert first == [next(again) for _ in range(100)]
    assert first != [fault for fault, _ in zip(plan(8), range(100), strict=False)]
    assert {fault.kind for fault in first[: len(KINDS)]} == set(KINDS)
    assert all(low <= fault.lasts <= high for fault in first for low, high in [fault.kind.lasts])


def test_random_runs_have_an_oracle_and_every_ending():
    chance, endings = random.Random(1), set()
    for number in range(200):
        line = intend(chance, f"run-0-{number}")
        assert json.loads(json.dumps(line)) == line
        assert set(line["signals"]) == (set() if line["ending"] else set(signals(line["program"])))
        assert (line["result"] is None) == (line["ending"] is not None)
        endings.add(line["state"])
    assert endings == {"completed", "cancelled", "terminated", "failed"}


def test_the_oracle_knows_every_kind():
    def kinds(program: Program) -> set[str]:
        kind, *rest = program
        return {kind}.union(*map(kinds, rest[0])) if kind in ("sequence", "gather") else {kind}

    chance = random.Random(3)
    programs = [make(chance) for _ in range(300)]
    assert len(set().union(*map(kinds, programs))) == 13
    assert all(isinstance(expected(program), list) for program in programs)
    assert expected(["sequence", [["work", 3, 0, 1], ["once", 4, 0]]]) == [6, {"any": [4, "interrupted"]}]


def test_a_journal_is_read_up_to_where_it_was_cut_off(tmp_path: Any):
    path = tmp_path / "journal"
    lines = [
        {"what": "intend", "id": "a"}, {"what": "started", "id": "a"}, {"what": "intend", "id": "b"},
        {"what": "accepted", "id": "a", "command": "go"}, {"what": "refused", "id": "a", "command": "cancel"},
        {"what": "saw", "id": "a"},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(each) + "\n" for each in lines) + '{"what": "saw", "id"')
    known = read_journal(path)
    assert known["a"].started and known["a"].saw and known["a"].answered == {"go", "cancel"}
    assert not known["b"].started and not known["b"].saw
    assert read_lines(path, tmp_path / "none") == lines
    assert read_journal(tmp_path / "none") == {}


def test_a_client_that_goes_on_writes_no_line_behind_half_of_one(tmp_path: Path) -> None:
    """A kill cuts a write at the end of a page (seen once in some thousand kills)."""
    journal = tmp_path / JOURNAL
    journal.write_text('{"what": "intend", "id": "a"}\n{"what": "started", "id": "a')
    Driver(Mock(spec=sf.Client), tmp_path, random.Random(1)).write({"what": "intend", "id": "b"})
    known = read_journal(journal)
    assert list(known) == ["a", "b"] and not known["a"].started
