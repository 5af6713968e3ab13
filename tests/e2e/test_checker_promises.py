"""The checker finds what is too early, out of order, or left at the end: each look can fail."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from tests.e2e.checker_promises import AFTERMATH_MS, ALLOWED, Allowed, Policies, errors_explained
from tests.e2e.checker_topics import Record, Value
from tests.e2e.test_checker import RUN, World, completed, created, edit, event, scheduled, turn_of

DELAY, LIMIT, BACKOFF, RETENTION = 200, 300, 400, 500
OTHER_RUN = "run-0-1"


def world(*, deleted: bool = False) -> World:
    """A delayed run with a timeout: two signals of one sender, a step cut off by its timeout, one that fails once."""
    it = World(policies=Policies({"overrun": LIMIT}, BACKOFF, 2.0, 10_000.0, 0.5, RETENTION))
    it.told(
        "intend", program=["x"], state="completed", result=3, signals={"a": 1, "b": 2}, ending=None,
        delay=DELAY / 1000, timeout=9.0,
    )  # fmt: skip
    it.claim()
    it.command("c1", "StartWorkflow")
    asked = it.now
    it.turns(created(start_at=asked + DELAY + 40, deadline_at=asked + 9_040), commands=("c1",))
    it.timer("start", 0, asked + DELAY + 40)
    it.reply("c1")
    it.told("started")
    it.now += DELAY + 50
    fire_at = it.now
    it.turns(event("RunStarted"), scheduled(0, "overrun"), scheduled(1), event("TimerSet", number=2, fire_at=fire_at))
    it.timer("start", 0, asked + DELAY + 40, gone=True)
    it.timer("sleep", 2, fire_at)
    for name in ("a", "b"):
        it.told("sending", command=name, life=0, at=it.now)
        it.command(f"s{name}", "SignalWorkflow", name)
    it.turns(
        event("SignalReceived", signal=0, name="a"), event("SignalReceived", signal=1, name="b"),
        event("TimerFired", number=2), commands=("sa", "sb"),
    )  # fmt: skip
    it.timer("sleep", 2, fire_at, gone=True)
    it.reply("sa")
    it.reply("sb")
    it.told("accepted", command="a")
    it.told("accepted", command="b")
    it.ran(0, step="overrun")
    began = it.now
    it.ran(1)
    it.ran(1, "failed", error="Broken")
    error = {"type": "soak.Broken", "message": "", "traceback": ""}
    it.turns(event("StepAttemptFailed", number=1, attempt=1, error=error, retry_at=it.now + BACKOFF))
    it.now = began + LIMIT
    it.ran(0, "failed", error="CancelledError", step="overrun")
    it.turns(event("StepFailed", number=0, attempt=1, started_at=began, error={**error, "type": "TimeoutError"}))
    it.now += BACKOFF
    it.turns(event("StepDue", number=1, attempt=2))
    it.ran(1, attempt=2)
    it.ran(1, "ended", attempt=2, result=3)
    it.turns(completed(1, b"3", attempt=2), scheduled(3, "undo"))
    it.ran(3)
    it.ran(3, "ended", result=0)
    delete_at = it.now + 20 + RETENTION
    it.turns(completed(3, b"0"), event("RunCompleted", result=b"3"), event("RetentionSet", delete_at=delete_at))
    it.timer("retention", 0, delete_at)
    it.status(result=b"3")
    it.told("saw", state="completed", result=3)
    it.journal.append({"what": "done"})
    if deleted:
        it.now = delete_at
        it.turns(event("RunDeleted"))
        it.timer("retention", 0, delete_at, gone=True)
        it.topics.status.append(Record(0, 9, it.now, RUN.encode(), None))
        it.now += 60_000
        it.claim()  # somebody wrote to the log long after
    return it


@pytest.mark.parametrize("deleted", [False, True])
def test_a_log_without_fault_passes(deleted: bool):
    report = world(deleted=deleted).check()
    assert report.violations == []
    assert report.deleted == deleted


# ------------------------------------------------------------------------------------------------------ doctored worlds


def swap_signals(it: World) -> None:
    """They came in the other order than they have on the topic."""
    edit(it, "SignalReceived", name="b")
    events = (it.topics.history[turn_of(it, "SignalReceived")[0]].value or {})["events"]
    events[1]["name"] = "a"


def land_otherwise(it: World) -> None:
    """The topic has them in the other order than they were sent, and so has the run."""
    one, other = it.topics.commands[1:3]
    it.topics.commands[1:3] = [Record(0, 1, one.at, b"", other.value), Record(0, 2, other.at, b"", one.value)]
    swap_signals(it)


def after_the_answer(it: World) -> None:
    """As above, long after, and by another life of the client: but the first one had been answered."""
    land_otherwise(it)
    sent = next(each for each in it.journal if each.get("command") == "b" and each["what"] == "sending")
    it.journal.remove(sent)
    at = next(index for index, each in enumerate(it.journal) if each["what"] == "accepted")
    it.journal.insert(at + 1, {**sent, "life": 1})


def take_the_second(it: World) -> None:
    for record in it.topics.commands:
        if record.value is not None and record.value["body"]["name"] == "b":
            record.value["body"]["name"] = "a"
    events = (it.topics.history[turn_of(it, "SignalReceived")[0]].value or {})["events"]
    events[1]["name"] = "a"
    events.insert(0, event("SignalAwaited", number=3, name="a"))
    events.append(event("SignalTaken", number=3, signal=1))


def retry_at(it: World, by: int) -> None:
    turn_of(it, "StepAttemptFailed")[1]["retry_at"] += by


def line(it: World, number: int, what: str, attempt: int = 1) -> Value:
    return next(x for x in it.effects if (x["number"], x["what"], x["attempt"]) == (number, what, attempt))


def give_up_early(it: World) -> None:
    turn_of(it, "StepFailed")[1]["started_at"] += 50


def delete_early(it: World) -> None:
    for record in it.topics.history:
        for each in (record.value or {}).get("events", ()):
            if each["kind"] == "RetentionSet":
                each["delete_at"] -= 30


def deleted_early(it: World) -> None:
    index, _ = turn_of(it, "RunDeleted")
    record = it.topics.history[index]
    it.topics.history[index] = Record(0, record.offset, record.at - 100, b"", record.value)


def unasked(it: World) -> None:
    for record in it.topics.history:
        events = (record.value or {}).get("events", [])
        events[:] = [each for each in events if each["kind"] != "RetentionSet"]


def open_and_deleted(it: World) -> None:
    for record in it.topics.history:
        events = (record.value or {}).get("events", [])
        events[:] = [each for each in events if each["kind"] != "RunCompleted"]


def left_over(it: World, kind: str = "sleep") -> None:
    """A tombstone is missing: the record before it is the last one of its key."""
    it.topics.timers[:] = [
        record for record in it.topics.timers if record.value is not None or f"\0{kind}".encode() not in record.key
    ]


def cut(it: World, keep: int) -> None:
    it.topics.history_left = it.topics.history[-keep:]


def gone_and_not_deleted(it: World) -> None:
    next(each for each in it.journal if each["what"] == "saw").update(state="gone", result=None)


DOCTORED: list[tuple[bool, str, str, Callable[[World], object]]] = [
    (False, "reordered", "in the order of the offsets [2, 1]", swap_signals),
    (False, "reordered", "signal b came before a, which was sent first", land_otherwise),
    (False, "reordered", "signal b came before a, which was sent first", after_the_answer),
    (False, "reordered", "signal 1 a is taken before an earlier a", take_the_second),
    (False, "early", "it is to begin", lambda it: edit(it, "RunCreated", start_at=it.topics.commands[0].at + 150)),
    (False, "early", "it is to begin", lambda it: edit(it, "RunCreated", start_at=None)),
    (False, "early", "before its delay had passed",
     lambda it: (it.topics.commands[0].value or {}).update(sent_at=it.topics.commands[0].at + 100)),
    (False, "early", "it ran code", lambda it: line(it, 0, "began").update(at=it.topics.commands[0].at + 100)),
    (False, "early", "its deadline is before", lambda it: edit(it, "RunCreated", deadline_at=None)),
    (False, "early", "its deadline is before",
     lambda it: edit(it, "RunCreated", deadline_at=it.topics.commands[0].at + 8_900)),
    (False, "early", "overrun, attempt 1 was given up after", give_up_early),
    (False, "early", "its code was cut off after 190 of 300 ms",
     lambda it: line(it, 0, "failed").update(at=line(it, 0, "began")["at"] + 190)),
    (False, "early", "is due 58 ms before its backoff", lambda it: retry_at(it, -260)),
    (False, "early", "before its backoff was over",
     lambda it: line(it, 1, "began", 2).update(at=line(it, 1, "failed")["at"] + 150)),
    (False, "early", "ms too soon", delete_early),
    (True, "early", "deleted before its retention", deleted_early),
    (True, "early", "and nobody asked for it", unasked),
    (True, "lost", "deleted while it was open", open_and_deleted),
    (False, "wrong", "its sleep timer 2 is left, and the run is completed", left_over),
    (False, "wrong", "its start timer 0 is left", lambda it: left_over(it, "start")),
    (True, "wrong", "its retention timer 0 is left, and the run was deleted", lambda it: left_over(it, "retention")),
    (False, "wrong", "its retention timer 0 says",
     lambda it: (it.topics.timers[-1].value or {}).update(fire_at=it.now)),
    (False, "lost", "waits for its deletion, and has no timer", lambda it: it.topics.timers.pop()),
    (False, "wrong", "there is no such run",
     lambda it: it.topics.timers.append(
         Record(0, 99, it.now, b"x", {**(it.topics.timers[-1].value or {}), "workflow_id": "nobody"}))),
    (True, "reordered", "its last status is of turn 8", lambda it: it.topics.status.pop()),
    (False, "lost", "who begins at the trimmed head finds none of its turns", lambda it: cut(it, 3)),
    (False, "lost", "the trimmed head finds none of its turns", lambda it: setattr(it.topics, "history_left", [])),
    (True, "wrong", "is back for who begins at the head",
     lambda it: setattr(it.topics, "history_left", it.topics.history[:-2])),
    (False, "lost", "its client was told that it is gone", gone_and_not_deleted),
    (False, "unexplained", "worker-1 said at ERROR: streamflow.worker: partition 3 failed",
     lambda it: it.said.update({"worker-1": f"{at(it.now)} ERROR   streamflow.worker: partition 3 failed: no"})),
]  # fmt: skip


def at(ms: int) -> str:
    """As a worker's log has it."""
    return f"{datetime.fromtimestamp(ms / 1000, UTC).astimezone():%Y-%m-%d %H:%M:%S},{ms % 1000:03}"


@pytest.mark.parametrize(
    ("deleted", "category", "what", "doctor"), DOCTORED, ids=[f"{each[1]}: {each[2]}" for each in DOCTORED]
)
def test_a_doctored_log_is_found_out(deleted: bool, category: str, what: str, doctor: Callable[[World], object]):
    it = world(deleted=deleted)
    doctor(it)
    violations = it.check().violations
    assert [each for each in violations if each.category == category and what in each.what], violations


# ---------------------------------------------------------------------------------------------------- what is no fault


def test_signals_whose_order_nobody_promised_may_come_in_any():
    it = world()
    land_otherwise(it)
    for each in it.journal:
        if each.get("command") == "b" and "life" in each:
            each["life"] = 1  # another life of the client: what the first one sent may still have been under way
    assert it.check().violations == []
    it = world()
    land_otherwise(it)
    late = it.topics.commands[2]
    it.topics.commands[2] = Record(0, 2, late.at + 5_000, b"", late.value)  # lost, and sent again
    assert [each for each in it.check().violations if each.category == "reordered"] == []
    it = world()
    land_otherwise(it)
    it.told("sending", command="a", life=1, at=it.now)  # the first one may have died with life 0
    assert [each for each in it.check().violations if each.category == "reordered"] == []


def test_a_timer_of_a_deposed_owner_that_came_behind_the_tombstone_is_no_fault_before_it_is_due():
    it = world()
    late = next(record for record in it.topics.timers if b"\0sleep" in record.key and record.value is not None)
    value = {**(late.value or {}), "fire_at": it.now + 3_600_000}
    it.topics.timers.append(Record(0, 99, it.now, late.key, value))
    assert it.check().violations == []
    value["fire_at"] = it.topics.history[-1].at
    assert "its sleep timer 2 is left, and the run is completed" in str(it.check().violations)
    value["fire_at"] = it.now + 3_600_000
    it.topics.timers[:] = [record for record in it.topics.timers if record.key != late.key or record.value is not None]
    assert "its sleep timer 2 is left, and the run is completed" in str(it.check().violations)


def test_a_process_that_was_paused_cuts_its_code_off_sooner():
    it = world()
    line(it, 0, "failed").update(at=line(it, 0, "began")["at"] + 50)
    assert "cut off after 50 of 300 ms" in str(it.check().violations)
    begun = line(it, 0, "began")["at"]
    it.faults.append({"kind": "worker paused", "group": "worker", "began": begun - 200, "ended": begun - 5})
    assert it.check().violations == []


def test_a_trimmed_log_with_a_snapshot_says_the_same():
    it = world()
    turns = [record.value for record in it.topics.history[1:]]
    last = turns[-1] or {}
    snapshot = {**last, "kind": "RunSnapshot", "seq": last["seq"] + 1, "turns": turns}
    it.topics.history.append(Record(0, 99, it.now, b"", snapshot))
    for keep in (1, 3):
        cut(it, keep)
        assert it.check().violations == []
    snapshot["turns"] = turns[:-1]
    assert "turns up to 7 or others" in str(it.check().violations)


def test_a_client_that_comes_late_finds_a_deleted_run_gone():
    it = world(deleted=True)
    gone_and_not_deleted(it)
    assert it.check().violations == []


def test_a_command_that_is_sent_again_to_a_deleted_run_is_refused():
    it = world(deleted=True)
    it.reply("sa", accepted=False)
    assert it.check().violations == []
    deleted_at = it.topics.history[turn_of(it, "RunDeleted")[0]].at
    it.topics.replies[-1] = Record(0, 9, deleted_at - 1, b"", it.topics.replies[-1].value)
    assert "took effect and was refused" in str(it.check().violations)


@pytest.mark.parametrize("level", ["WARNING", "ERROR", "CRITICAL"])
def test_only_what_a_fault_explains_may_be_said_at_error(level: str):
    said = {
        "worker-1": f"{at(50_000)} {level:7} streamflow.queue: no answer: odd\nTraceback (most recent call last):\n x"
    }
    fault = {"kind": "broker killed", "group": "broker", "began": 10_000, "ended": 20_000}
    allowed = [Allowed("streamflow.queue", "no answer", ("broker",), "a test")]

    def found(faults: list[Value], list_: list[Allowed]) -> int:
        return len(list(errors_explained(said, faults, list_)))

    expected = 0 if level == "WARNING" else 1
    assert found([fault], []) == found([], allowed) == expected
    assert found([fault], allowed) == expected, "the fault was over too long ago"
    late = {**fault, "ended": 50_000 - AFTERMATH_MS}
    assert found([late], allowed) == 0
    assert found([{**late, "group": "client"}], allowed) == expected
    assert found([late], [allowed[0]._replace(logger="other")]) == expected
    assert found([late], [allowed[0]._replace(text="odd")]) == expected


def test_each_reason_that_is_allowed_says_why():
    assert all(each.why and each.groups and each.text for each in ALLOWED)
