"""What one command, timer or outcome does to one run."""

from __future__ import annotations

from typing import Any

import pytest

from streamflow.core.commands import (
    ATTACHED,
    CancelWorkflow,
    CleanupWorkflow,
    Query,
    ReportAttempt,
    StartWorkflow,
    TerminateWorkflow,
)
from streamflow.core.effects import (
    CancelAttempt,
    DropTimer,
    RecordStart,
    SetTimer,
    StartAttempt,
    TimerRecord,
)
from streamflow.core.events import (
    INSTANT_MS_MAX,
    StepAttemptFailed,
    StepCompleted,
    StepFailed,
    StepStarted,
)
from streamflow.core.partition import CLOCK_SKEW_MS_MAX
from tests.core.programs import (
    ENDED,
    RESTART,
    SIGNAL,
    START,
    TO_A_RUN,
    careful,
    closed,
    on_a_queue,
    one_step,
    slept,
    stubborn,
)
from tests.core.scripted import ERROR, T0, Cancelled, World, fired, kinds


def test_a_start_of_an_unknown_workflow_is_refused_and_leaves_nothing():
    world = World()
    assert world.start("nothing") == []
    assert world.replies == [("c0", "WorkflowNotFound")]
    assert world.history == [] and world.partition.live == {}


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (START, ATTACHED),
        (StartWorkflow(workflow="work", if_exists="error"), "WorkflowExists"),
        (RESTART, ATTACHED),
        (StartWorkflow(workflow="other"), "WorkflowExists"),
    ],
)
def test_a_start_of_a_run_that_is_open_attaches_or_is_refused_and_changes_nothing(body, answer):
    world = World(work=one_step, other=one_step)
    world.start()
    before = world.run()
    world.send(body)
    assert world.decide() == []
    assert world.replies == [("c1", answer)]
    assert world.run() == before


@pytest.mark.parametrize("state", ENDED)
def test_a_closed_run_is_restarted_only_if_asked(state):
    world = closed(state)
    world.send(START, id="attach")
    assert world.decide() == [] and world.replies == [("attach", ATTACHED)]
    assert kinds(world.start(id="again", if_exists="restart"))[0] == "RunCreated"
    run = world.run()
    assert (run.run, run.state, run.result, run.error, run.reason) == (2, "running", None, None, None)
    assert world.live() == run


def test_a_delayed_start_waits_for_its_timer():
    ways: list[dict[str, Any]] = [{"delay_ms": 700}, {"start_at": T0 + 700}]
    for options in ways:
        world = World(work=one_step)
        assert kinds(world.start(**options)) == ["RunCreated"]
        (timer,) = [effect.timer for effect in world.of(SetTimer)]
        assert (timer.kind, timer.fire_at) == ("start", T0 + 700)
        assert world.statuses[0].state == "scheduled"
        world.fire(timer)
        assert kinds(world.decide(700)) == ["RunStarted", "StepScheduled"]
        assert world.of(DropTimer) == [DropTimer(timer)]
        world.fire(timer)
        assert world.decide() == [] and world.of(DropTimer) == [DropTimer(timer)]


@pytest.mark.parametrize(("body", "state"), [(CancelWorkflow(), "cancelled"), (TerminateWorkflow(), "terminated")])
def test_a_delayed_start_can_be_stopped_before_any_of_its_code_runs(body, state):
    world = World(work=one_step)
    world.start(delay_ms=700, timeout_ms=100)
    world.send(body)
    world.decide()
    assert world.run().state == state
    assert sorted(effect.timer.kind for effect in world.of(DropTimer)) == ["deadline", "start"]
    assert world.scripts == []


def test_a_delayed_start_whose_code_is_gone_by_then_is_blocked():
    world = World(work=one_step)
    world.start(delay_ms=700)
    timer = world.of(SetTimer)[0].timer
    world.programs.clear()
    world.fire(timer)
    assert kinds(world.decide(700)) == ["RunStarted", "RunBlocked"]
    assert "workflow work, which this worker's app does not have" in world.run().error.message


@pytest.mark.parametrize("options", [{"delay_ms": 2**63 - 1}, {"start_at": 2**63 - 1}, {"timeout_ms": 2**63 - 1}])
def test_an_instant_that_no_record_can_hold_does_not_stop_the_partition(options):
    world = World(work=one_step)
    (created,) = world.start(**options)[:1]
    assert INSTANT_MS_MAX in (created.start_at, created.deadline_at)


def test_a_timer_fires_once_and_a_late_copy_only_drops_its_record_again():
    world, timer = slept()
    world.fire(timer)
    assert kinds(world.decide(500)) == ["TimerFired", "RunCompleted"]
    world.fire(timer)
    assert world.decide() == []
    assert world.of(DropTimer) == [DropTimer(timer)]
    assert world.partition.live == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"run": 2},
        {"number": 1},
        {"kind": "start"},
        {"kind": "deadline"},
        {"kind": "step"},
        {"kind": "nonsense"},
        {"fire_at": 77},
    ],
)
def test_a_timer_that_is_not_pending_is_ignored_and_its_record_dropped(wrong):
    world, timer = slept()
    fields = {name: getattr(timer, name) for name in timer.__struct_fields__}
    stale = TimerRecord(**fields | wrong)
    world.fire(stale)
    assert world.decide(500) == []
    assert world.of(DropTimer) == [DropTimer(stale)]
    assert world.run().state == "running"


def test_a_timer_of_a_run_that_nobody_knows_is_dropped():
    world, timer = slept()
    world.send(fired(timer), "unknown", reply_to=None)
    world.decide(500)
    assert [effect.timer.workflow_id for effect in world.of(DropTimer)] == ["unknown"]
    assert world.dead == [] and list(world.partition.live) == ["w"]


def test_an_early_timer_is_ignored_and_stays_pending():
    world, timer = slept()
    world.now -= CLOCK_SKEW_MS_MAX
    world.fire(timer)
    assert world.decide() == [] and world.effects == []
    world.fire(timer)
    assert kinds(world.decide(CLOCK_SKEW_MS_MAX + 500)) == ["TimerFired", "RunCompleted"]


def test_a_deadline_fails_the_run_and_abandons_what_it_waits_for():
    world = World(work=one_step)
    world.start(timeout_ms=300)
    (timer,) = [effect.timer for effect in world.of(SetTimer)]
    assert (timer.kind, timer.fire_at) == ("deadline", T0 + 300)
    world.fire(timer)
    assert kinds(world.decide(300)) == ["RunFailed"]
    assert world.run().error.type == "TimeoutError"
    assert world.of(CancelAttempt) == [CancelAttempt(1, 0)]
    assert world.complete(0) == []


def test_a_failed_attempt_is_tried_again_when_its_timer_fires():
    world = World(work=one_step)
    world.start()
    world.outcome(StepAttemptFailed(number=0, attempt=1, error=ERROR, retry_at=T0 + 50))
    assert kinds(world.decide()) == ["StepAttemptFailed"]
    timer = world.of(SetTimer)[0].timer
    assert world.statuses[0].waiting_on == [f"step charge (attempt 2 at {T0 + 50})"]
    world.fire(timer)
    assert kinds(world.decide(50)) == ["StepDue"]
    assert world.of(DropTimer, StartAttempt) == [DropTimer(timer), StartAttempt(1, 0, 2)]
    assert world.complete(0) == [], "the first attempt is too late"
    assert kinds(world.complete(0, attempt=2)) == ["StepCompleted", "RunCompleted"]


def test_a_retry_beyond_all_calendars_is_kept_within_a_record():
    world = World(work=one_step)
    world.start()
    world.outcome(StepAttemptFailed(number=0, attempt=1, error=ERROR, retry_at=10**33))
    assert world.decide()[0].retry_at == INSTANT_MS_MAX


@pytest.mark.parametrize(
    ("run", "outcome"),
    [
        (2, StepCompleted(number=0, attempt=1, result=b"1")),
        (1, StepCompleted(number=0, attempt=2, result=b"1")),
        (1, StepCompleted(number=9, attempt=1, result=b"1")),
        (1, StepFailed(number=1, attempt=1, error=ERROR)),
    ],
)
def test_an_outcome_that_is_not_of_the_attempt_that_runs_is_dropped(run, outcome):
    def work(s, args):
        yield {s.step("charge"), s.sleep(10)}

    world = World(work=work)
    world.start()
    world.outcome(outcome, run=run)
    assert world.decide() == [] and world.effects == []


def test_a_blocked_run_does_not_use_up_the_start_of_an_at_most_once_step():
    world = World(work=careful)
    world.start()
    world.programs.clear()
    world.partition.evict("w")
    world.outcome(StepStarted(number=0, attempt=1))
    assert kinds(world.decide()) == ["RunBlocked"]
    world.programs["work"] = careful
    world.owner().recover("w")
    assert kinds(world.decide()) == ["RunUnblocked"]
    assert world.of(RecordStart, StartAttempt) == [RecordStart(1, 0, 1)]


@pytest.mark.parametrize("body", [*TO_A_RUN, CleanupWorkflow(), CleanupWorkflow(force=True)])
def test_a_command_to_a_run_that_nobody_knows_is_refused(body):
    world = World(work=one_step)
    world.send(body)
    assert world.decide() == []
    assert world.replies == [("c0", "WorkflowNotFound")]
    assert world.partition.live == {} and world.dead == []


@pytest.mark.parametrize("body", TO_A_RUN)
@pytest.mark.parametrize("state", ENDED)
def test_a_closed_run_refuses_what_only_an_open_one_can_do(state, body):
    world = closed(state)
    world.send(body, id="late")
    assert world.decide() == []
    assert world.replies == [("late", "CommandRejected")]


def test_terminating_stops_the_code_where_it_stands():
    def work(s, args):
        try:
            yield {s.step("charge"), s.sleep(10)}
        except Cancelled:
            raise AssertionError("no more of the code runs") from None

    world = World(work=work)
    world.start()
    world.send(TerminateWorkflow(reason="enough"))
    assert kinds(world.decide()) == ["RunTerminated"]
    assert world.run().reason == "enough"
    assert len(world.of(CancelAttempt)) == len(world.of(DropTimer)) == 1
    assert world.scripts[0].closed and world.partition.live == {}


def test_a_query_never_reaches_the_core():
    world = World(work=one_step)
    world.send(Query(query="status"))
    with pytest.raises(AssertionError, match="answered without the core"):
        world.decide()


@pytest.mark.parametrize("field", ["run", "number", "attempt"])
def test_an_outcome_that_nobody_awaits_is_counted_and_dropped(field):
    world = World(work=on_a_queue, local=one_step)
    world.start()
    late = ReportAttempt(**{"run": 1, "number": 0, "attempt": 1, "result": b"5"} | {field: 9})
    for to in ("w", "nobody"):
        world.send(late, to, reply_to=None)
    decided = world.decide_only()
    assert (decided.turns, decided.dead, decided.answers, decided.late) == ([], [], [], 2)
    world.start("local", "x")
    world.send(ReportAttempt(run=1, number=0, attempt=1, result=b"5"), "x", reply_to=None)
    assert world.decide_only().late == 1, "what runs here is not for others to end"
    world.send(ReportAttempt(run=1, number=0, attempt=1), reply_to=None)
    assert kinds(world.decide()) == ["StepCompleted", "RunCompleted"]


def test_an_open_run_is_cleaned_up_only_by_force():
    world = World(work=one_step)
    world.start()
    world.send(CleanupWorkflow(), id="a")
    assert world.decide() == [] and world.replies == [("a", b"false")]
    world.send(CleanupWorkflow(force=True), id="b")
    assert kinds(world.decide()) == ["RunTerminated", "RunDeleted"]
    assert world.statuses == [None] and world.of(CancelAttempt) == [CancelAttempt(1, 0)]


@pytest.mark.parametrize("state", ENDED)
def test_cleaning_up_a_closed_run_deletes_it(state):
    world = closed(state)
    world.send(CleanupWorkflow(), id="clean")
    decided = world.decide_only()
    assert decided.turns[0].deleted and decided.turns[0].closed
    world.keep(decided.turns)
    assert kinds(world.history[-1].events) == ["RunDeleted"]
    assert world.statuses == [None] and world.replies == [("clean", b"true")]
    assert world.turns("w") == [] and world.partition.live == {}


def test_a_retention_timer_deletes_its_run():
    world = World(work=one_step)
    world.retention["work"] = 5
    world.start()
    world.complete(0)
    world.fire(world.run().own_timer("retention", T0 + 5))
    assert kinds(world.decide()) == ["RunDeleted"]


def test_a_second_cancel_is_accepted_and_changes_nothing():
    world = World(work=lambda s, args: stubborn(s))
    world.start()
    world.send(CancelWorkflow(), id="a")
    world.send(CancelWorkflow(), id="b")
    assert kinds(world.decide()).count("CancelRequested") == 1
    assert sorted(world.replies) == [("a", b"null"), ("b", b"null")]


def test_a_recorded_start_is_taken_once():
    world = World(work=careful)
    world.start()
    started = StepStarted(number=0, attempt=1)
    world.outcome(started)
    assert kinds(world.decide()) == ["StepStarted"]
    world.outcome(started)
    assert world.decide() == []


def test_a_signal_is_kept_and_a_copy_of_its_command_changes_nothing():
    world = World(work=one_step)
    world.start()
    for _ in range(2):
        world.send(SIGNAL, id="s")
    assert kinds(world.decide()) == ["SignalReceived"]
