"""The checks of the demo and of the recovery benchmark can fail: each broken promise, made on purpose, is found."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from streamflow.cli.evidence import (
    FINISHED,
    LINES_VARIABLE,
    STARTED,
    Findings,
    History,
    Line,
    examine,
    read_history,
    read_lines,
    recorded,
)
from streamflow.codec.avro import encode_history
from streamflow.core.events import (
    Claim,
    Event,
    HistoryRecord,
    RunCompleted,
    RunCreated,
    RunSnapshot,
    RunStarted,
    SignalAwaited,
    SignalTaken,
    StepAttemptFailed,
    StepCompleted,
    StepDue,
    StepScheduled,
    TimerFired,
    TimerSet,
    Turn,
)
from streamflow.errors import ErrorInfo
from streamflow.logs.base import HISTORY
from streamflow.logs.open import open_log
from streamflow.workflow import stepinfo

SCHEDULED = StepScheduled(number=0, name="charge", args=b"[]", fingerprint=0)
COMPLETED = StepCompleted(number=0, attempt=1, result=b"1")
CREATED = RunCreated(workflow="fulfil", args=b"[]")
ENDED = RunCompleted(result=b"null")
ERROR = ErrorInfo("ConnectionError", "no answer")


class Story:
    """A history of one run, written record by record, and the lines of its steps."""

    def __init__(self) -> None:
        self.history = History()
        self.term = self.seq = self.turn = 0
        self.claim("one")

    def take(self, record: HistoryRecord) -> None:
        self.history.take(0, encode_history(record))

    def claim(self, owner: str) -> None:
        self.term, self.seq = self.term + 1, 0
        self.take(Claim(term=self.term, owner=owner, at=0))

    def at(self, at: int, *events: Event) -> Story:
        self.seq, self.turn = self.seq + 1, self.turn + 1
        self.take(
            Turn(workflow_id="o", turn=self.turn, term=self.term, seq=self.seq, at=at, consumed=0, events=list(events))
        )
        return self


def started(at: int, attempt: int = 1, number: int = 0) -> Line:
    return Line("o", number, attempt, STARTED, at, 7)


def finished(at: int, attempt: int = 1, number: int = 0) -> Line:
    return Line("o", number, attempt, FINISHED, at, 7)


def good() -> Story:
    return Story().at(100, CREATED, RunStarted(), SCHEDULED).at(200, COMPLETED, ENDED)


def test_all_is_well() -> None:
    found = examine(good().history, [started(110), finished(190)])
    assert found == Findings(
        lost=[], run_again=[], unknown=[], unperformed=[], runs=1, runs_completed=1, steps=1, failed_attempts=0,
        repeated_attempts=0,
    )  # fmt: skip
    assert found.all_well


def test_a_step_without_an_outcome_is_lost() -> None:
    story = Story().at(100, CREATED, RunStarted(), SCHEDULED).at(200, ENDED)
    found = examine(story.history, [started(110)])
    assert found.lost == ["step 0 of o (0 outcomes)"]
    assert not found.all_well


def test_a_step_with_two_outcomes_is_lost() -> None:
    found = examine(good().at(300, COMPLETED).history, [started(110), finished(190)])
    assert found.lost == ["step 0 of o (2 outcomes)"]


def test_an_attempt_behind_the_completion_is_run_again() -> None:
    found = examine(good().history, [started(110), finished(190), started(201), finished(210)])
    assert found.run_again == ["step 0 of o (attempt 1 at 201)"]
    assert found.repeated_attempts == 0
    assert not found.all_well


def test_an_attempt_cut_off_before_the_completion_is_repeated_and_no_fault() -> None:
    found = examine(good().history, [started(110), started(150), finished(190)])
    assert found.repeated_attempts == 1
    assert found.all_well


def test_a_retry_is_no_repetition() -> None:
    story = Story().at(100, CREATED, RunStarted(), SCHEDULED)
    story.at(120, StepAttemptFailed(number=0, attempt=1, error=ERROR, retry_at=150))
    assert story.history.runs["o"].phase == "backing off"
    story.at(150, StepDue(number=0, attempt=2)).at(200, StepCompleted(number=0, attempt=2, result=b"1"), ENDED)
    found = examine(story.history, [started(110), started(155, attempt=2), finished(190, attempt=2)])
    assert (found.repeated_attempts, found.failed_attempts) == (0, 1)
    assert found.all_well


def test_an_attempt_that_the_log_never_scheduled_is_unknown() -> None:
    found = examine(good().history, [started(110), finished(190), started(120, number=1)])
    assert found.unknown == ["step 1 of o"]
    assert not found.all_well


def test_a_completion_without_a_finished_attempt_is_unperformed() -> None:
    found = examine(good().history, [started(110)])
    assert found.unperformed == ["step 0 of o (charge)"]
    assert not found.all_well
    assert examine(good().history, [started(110)], with_ends=False).all_well
    assert not examine(good().history, [], with_ends=False).all_well


def test_records_of_a_fenced_owner_do_not_count() -> None:
    story = Story().at(100, CREATED, RunStarted(), SCHEDULED)
    story.claim("two")
    stale = Turn(workflow_id="o", turn=2, term=1, seq=2, at=150, consumed=0, events=[COMPLETED, ENDED])
    story.take(stale)
    assert examine(story.history, []).lost
    story.at(200, COMPLETED, ENDED)
    assert not examine(story.history, []).lost
    assert [claim.owner for _, claim in story.history.claims] == ["one", "two"]


def test_the_phase_of_a_run() -> None:
    story = Story().at(100, CREATED, RunStarted(), SCHEDULED)
    run = story.history.runs["o"]
    phases = [run.phase]
    for events in (
        (COMPLETED, TimerSet(number=1, name="sleep", fire_at=500)),
        (TimerFired(number=1), SignalAwaited(number=2, name="approved")),
        (SignalTaken(number=2, signal=0), ENDED),
    ):
        story.at(200, *events)
        phases.append(run.phase)
    assert phases == ["working", "sleeping", "waiting", "completed"]
    assert story.history.phases() == {"completed": 1}
    assert story.history.completed == 1


def test_lines_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "steps.txt"
    assert read_lines(path) == []
    with recorded():
        pass  # without the variable nothing is written, so that the steps can be called anywhere
    monkeypatch.setenv(LINES_VARIABLE, str(path))
    info = stepinfo.StepInfo(workflow_id="an order", run=1, step="charge", number=3, attempt=2)
    token = stepinfo.running.set(info)
    try:
        with recorded():
            pass
        with path.open("a") as file:
            file.write("\nan order 3 2 started 170000 12")  # cut off by a kill; another process goes on
        with pytest.raises(ConnectionError), recorded():
            raise ConnectionError
    finally:
        stepinfo.running.reset(token)
    with path.open("a") as file:
        file.write("\nan order 3 2 sta")
    assert [(line.workflow_id, line.number, line.attempt, line.what) for line in read_lines(path)] == [
        ("an order", 3, 2, "started"),
        ("an order", 3, 2, "finished"),
        ("an order", 3, 2, "started"),
        ("an order", 3, 2, "failed"),
    ]


async def read_from_memory() -> History:
    log = await open_log("memory://evidence", app="shop", partitions=2)
    try:
        claim = Claim(term=1, owner="one", at=0)
        turn = Turn(workflow_id="o", turn=1, term=1, seq=1, at=5, consumed=0, events=[CREATED, RunStarted(), ENDED])
        await log.append(1, 0, [(b"", encode_history(claim)), (b"o", encode_history(turn))])
        assert await log.end_offset(HISTORY, 0) == 0
        return await read_history(log)
    finally:
        await log.close()


def test_all_partitions_of_a_log_are_read() -> None:
    history = asyncio.run(read_from_memory())
    assert history.records == 2
    assert history.runs["o"].closed is RunCompleted


def test_a_history_whose_head_is_trimmed_is_told_from_the_snapshots():
    def turn(number: int, *events: Event) -> Turn:
        return Turn(workflow_id="w", turn=number, term=1, seq=number, at=number, consumed=0, events=list(events))

    first, second = turn(1, CREATED, RunStarted(), SCHEDULED), turn(2, COMPLETED)
    history = History()
    assert history.take(0, encode_history(second)) == second and history.runs == {}
    held = [encode_history(first), encode_history(second)]
    snapshot = RunSnapshot(workflow_id="w", turn=2, term=1, seq=3, at=3, consumed=0, turns=held)
    assert history.take(0, encode_history(snapshot)) is None
    assert [step.completed_at for step in history.runs["w"].steps.values()] == [2]
    history.take(0, encode_history(turn(4, ENDED)))
    assert history.completed == 1
