"""One partition: commands and outcomes in, one turn per run and pass out, and every input takes effect once.

More of it: test_partition_time.py, test_partition_ends.py, test_partition_blocked.py, test_partition_remote.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from streamflow.core.commands import (
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
    SendReply,
    SetTimer,
    StartAttempt,
    TimerRecord,
)
from streamflow.core.events import (
    INSTANT_MS_MAX,
    SignalReceived,
    StepAttemptFailed,
    StepCompleted,
    StepDue,
    StepFailed,
    StepStarted,
    Turn,
)
from streamflow.core.partition import CLOCK_SKEW_MS_MAX
from tests.core.programs import (
    ENDED,
    RESTART,
    SIGNAL,
    START,
    TO_A_RUN,
    closed,
    endless_on_go,
    on_a_queue,
    one_step,
    sleeps,
    slept,
    waits,
)
from tests.core.scripted import ERROR, T0, Cancelled, Endless, World, fired, kinds

# -- start -------------------------------------------------------------------------------------------------------------


def test_a_start_creates_the_run_and_is_answered_with_its_turn():
    world = World(work=one_step)
    assert kinds(world.start(args=b"[7]", context=b'"c"')) == ["RunCreated", "RunStarted", "StepScheduled"]
    assert world.of(StartAttempt) == [StartAttempt(1, 0, 1)]
    assert world.replies == [("c0", b"null")]
    (status,) = world.statuses
    assert (status.state, status.args, status.context, status.turn) == ("running", b"[7]", b'"c"', 1)
    assert status.waiting_on == ["step charge"]
    assert not world.partition.has_work


def test_a_start_of_an_unknown_workflow_is_refused_and_leaves_nothing():
    world = World()
    assert world.start("nothing") == []
    assert world.replies == [("c0", "WorkflowNotFound")]
    assert world.history == [] and world.partition.live == {}


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (START, b"null"),
        (StartWorkflow(workflow="work", if_exists="error"), "WorkflowExists"),
        (RESTART, b"null"),
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
    assert world.decide() == [] and world.replies == [("attach", b"null")]
    assert kinds(world.start(id="again", if_exists="restart"))[0] == "RunCreated"
    run = world.run()
    assert (run.run, run.state, run.result, run.error, run.reason) == (2, "running", None, None, None)
    assert world.live() == run


def test_two_starts_of_one_id_in_one_pass_start_it_once():
    world = World(work=one_step)
    world.send(START, id="a")
    world.send(START, id="b")
    world.send(StartWorkflow(workflow="work", if_exists="error"), id="c")
    assert kinds(world.decide()).count("RunCreated") == 1
    assert sorted(world.replies) == [("a", b"null"), ("b", b"null"), ("c", "WorkflowExists")]


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


@pytest.mark.parametrize("evicted", [False, True])
def test_signals_sent_before_a_delayed_start_are_there_when_its_code_waits(evicted):
    world = World(work=waits)
    world.start(delay_ms=700)
    timer = world.of(SetTimer)[0].timer
    world.send(SIGNAL)
    assert kinds(world.decide()) == ["SignalReceived"]
    if evicted:
        world.partition.evict("w")
    world.fire(timer)
    assert kinds(world.decide(700)) == ["RunStarted", "SignalAwaited", "SignalTaken", "RunCompleted"]
    assert world.run().result == b"1"


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


# -- timers ------------------------------------------------------------------------------------------------------------


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
    [{"run": 2}, {"number": 1}, {"kind": "start"}, {"kind": "deadline"}, {"kind": "step"}, {"kind": "nonsense"}],
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


# -- outcomes ----------------------------------------------------------------------------------------------------------


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


# -- at most once ------------------------------------------------------------------------------------------------------


def careful(s, args):
    _, outcome = yield {s.step("charge", at_most_once=True)}
    return b"failed" if isinstance(outcome, StepFailed) else outcome.result


def test_an_at_most_once_step_runs_only_when_its_start_is_recorded():
    world = World(work=careful)
    world.start()
    assert world.of(RecordStart, StartAttempt) == [RecordStart(1, 0, 1)]
    for _ in range(2):
        world.outcome(StepStarted(number=0, attempt=1))
    assert kinds(world.decide()) == ["StepStarted"]
    assert world.of(RecordStart, StartAttempt) == [StartAttempt(1, 0, 1)]
    assert kinds(world.complete(0)) == ["StepCompleted", "RunCompleted"]


@pytest.mark.parametrize(("started", "result"), [(False, None), (True, b"failed")])
def test_a_new_owner_records_the_start_or_fails_the_step_that_may_have_run(started, result):
    world = World(work=careful)
    world.start()
    if started:
        world.outcome(StepStarted(number=0, attempt=1))
        world.decide()
    world.owner()
    world.partition.recover("w")
    failed = world.decide()
    assert kinds(failed) == (["StepFailed", "RunCompleted"] if started else [])
    assert world.of(RecordStart) == ([] if started else [RecordStart(1, 0, 1)])
    assert world.run().result == result
    if started:
        assert "runs at most once" in failed[0].error.message


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


# -- a new owner -------------------------------------------------------------------------------------------------------


def test_a_new_owner_runs_open_attempts_again_and_nothing_else():
    def work(s, args):
        yield {s.step("a"), s.step("b", start_at=T0 + 10), s.sleep(10), s.signal("go")}

    world = World(work=work)
    world.start()
    world.owner().recover("w")
    assert world.partition.has_work
    assert world.decide() == []
    assert world.effects == [StartAttempt(1, 0, 1)]


@pytest.mark.parametrize("state", [*ENDED, "scheduled", "unknown"])
def test_a_run_that_does_not_run_has_nothing_to_recover(state):
    if state in ENDED:
        world = closed(state)
    else:
        world = World(work=one_step)
        world.start(to="w" if state == "scheduled" else "v", delay_ms=5)
    world.owner().recover("w")
    assert world.decide() == [] and world.effects == []


def test_a_recovered_attempt_that_is_given_up_in_the_same_pass_does_not_start():
    world = World(work=one_step)
    world.start()
    world.owner().recover("w")
    world.send(TerminateWorkflow())
    assert kinds(world.decide()) == ["RunTerminated"]
    assert world.of(StartAttempt, CancelAttempt) == []


# -- commands to a run -------------------------------------------------------------------------------------------------


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


def test_a_refusal_that_nobody_asked_to_hear_goes_to_the_dead_letters():
    world = World(work=one_step)
    world.send(SIGNAL, reply_to=None)
    decided = world.decide_only()
    (dead,) = decided.dead
    assert (dead.offset, dead.command.body) == (0, SIGNAL)
    assert dead.reason.startswith("WorkflowNotFound: there is no run w")
    assert decided.answers == [] and decided.turns == []


def test_an_accepted_command_without_reply_to_is_not_answered():
    world = World(work=one_step)
    world.send(START, reply_to=None)
    world.decide()
    assert world.of(SendReply) == []


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


# -- each command once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("one_pass", [False, True])
def test_a_command_sent_twice_takes_effect_once_and_is_answered_twice(evicted, one_pass):
    world = World(work=one_step)
    world.start(id="start")
    answered = []
    for _ in range(2):
        world.send(SIGNAL, id="signal")
        if not one_pass:
            world.decide()
            answered += world.replies
        if evicted:
            world.partition.evict("w")
    if one_pass:
        world.decide()
        answered += world.replies
    assert sorted(answered) == [("signal", b"null")] * 2
    received = [event for turn in world.history for event in turn.events if isinstance(event, SignalReceived)]
    assert len(received) == 1


def test_an_offset_that_was_consumed_is_skipped():
    world = World(work=one_step)
    command = world.send(START)
    world.decide()
    world.partition.command(0, command)
    assert not world.partition.has_work
    world.partition.skip(4)
    world.partition.skip(2)
    world.partition.command(4, command)
    assert not world.partition.has_work and world.partition.next_command == 5


def test_only_the_last_turn_of_a_pass_moves_the_consumed_offset():
    world = World(work=one_step)
    for id in ("a", "b", "c"):
        world.send(START, id)
    world.decide()
    assert [turn.consumed for turn in world.history] == [0, 0, 3]
    world.complete(0, to="b")
    assert world.history[-1].consumed == 3


# -- steps on a queue ------------------------------------------------------------------------------------------------


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


def test_a_turn_is_numbered_within_its_id_and_carries_its_term():
    world = World(work=one_step)
    world.start()
    world.owner(term=4)
    world.complete(0)
    assert [(turn.turn, turn.term) for turn in world.history] == [(1, 1), (2, 4)]
    assert all(isinstance(turn, Turn) for turn in world.history)
    assert StepDue(number=0, attempt=1) not in [event for turn in world.history for event in turn.events]


# -- what the other files look at more closely -------------------------------------------------------------------------


def test_an_open_run_is_cleaned_up_only_by_force():
    world = World(work=one_step)
    world.start()
    world.send(CleanupWorkflow(), id="a")
    assert world.decide() == [] and world.replies == [("a", b"false")]
    world.send(CleanupWorkflow(force=True), id="b")
    assert kinds(world.decide()) == ["RunTerminated", "RunDeleted"]
    assert world.statuses == [None] and world.of(CancelAttempt) == [CancelAttempt(1, 0)]


def test_a_command_of_the_run_before_does_not_count_again_for_the_next():
    world = World(work=one_step)
    world.start(id="first")
    world.send(TerminateWorkflow(), id="stop")
    world.decide()
    world.start(id="again", if_exists="restart")
    for evicted in (False, True):
        if evicted:
            world.partition.evict("w")
        for id, body in (("stop", TerminateWorkflow()), ("again", RESTART), ("first", START)):
            world.send(body, id=id)
        assert world.decide() == []
        assert [value for _, value in world.replies] == [b"null"] * 3
    assert list(world.live().commands) == ["first", "stop", "again"]
    assert world.history[-1].commands[-1].command_id == "again"


def test_code_that_diverges_keeps_what_it_decided_before_and_the_input_at_which_it_did():
    world = World(work=endless_on_go)
    world.start()
    world.outcome(StepCompleted(number=0, attempt=1, result=b"1"))
    world.send(SIGNAL, id="signal")
    assert kinds(world.decide()) == ["StepCompleted", "SignalAwaited", "SignalReceived", "RunBlocked"]
    assert world.live() == world.run()
    assert world.run().waiting_on() == ["fitting code"]
    assert world.replies == [("signal", b"null")], "the signal was taken in"
    world.send(SIGNAL, id="signal")
    assert world.decide() == []


def test_evicting_what_is_not_there_is_nothing_and_closing_frees_all():
    world = World(work=sleeps)
    world.start()
    world.start(to="v")
    world.partition.evict("unknown")
    world.partition.close()
    assert world.partition.live == {} and all(script.closed for script in world.scripts)


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


def test_a_second_cancel_is_accepted_and_changes_nothing():
    world = World(work=lambda s, args: stubborn(s))
    world.start()
    for id in ("a", "b"):
        world.send(CancelWorkflow(), id=id)
    assert kinds(world.decide()).count("CancelRequested") == 1
    assert sorted(world.replies) == [("a", b"null"), ("b", b"null")]


def stubborn(s):
    while True:
        try:
            yield {s.step("charge")}
        except Cancelled:
            continue


def test_a_run_of_which_no_code_is_there_is_blocked_and_says_so_once():
    world = World(work=waits)
    world.start()
    world.programs.clear()
    for expected in (["RunBlocked"], []):
        world.owner().recover("w")
        assert kinds(world.decide()) == expected
    assert world.effects == [] and world.run().state == "blocked"


def test_code_that_diverges_on_a_step_failed_by_a_new_owner_is_blocked_at_once():
    def work(s, args):
        first, second = (s.step(name, at_most_once=True) for name in "ab")
        yield {first, second}
        raise Endless

    world = World(work=work)
    world.start()
    for number in (0, 1):
        world.outcome(StepStarted(number=number, attempt=1))
    world.decide()
    world.owner().recover("w")
    assert kinds(world.decide()) == ["StepFailed", "RunBlocked"]
    assert world.live() == world.run()
