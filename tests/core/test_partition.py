"""One partition: commands and outcomes in, one turn per run and pass out, and every input takes effect once.

More of it: test_partition_time.py, test_partition_ends.py, test_partition_blocked.py, test_partition_remote.py.
"""

from __future__ import annotations

import pytest

from streamflow.core.commands import (
    ATTACHED,
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
)
from streamflow.core.events import (
    SignalReceived,
    StepCompleted,
    StepDue,
    StepStarted,
    Turn,
)
from tests.core.programs import (
    ENDED,
    RESTART,
    SIGNAL,
    START,
    careful,
    closed,
    endless_on_go,
    one_step,
    sleeps,
    waits,
)
from tests.core.scripted import T0, Endless, World, kinds

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


def test_two_starts_of_one_id_in_one_pass_start_it_once():
    world = World(work=one_step)
    world.send(START, id="a")
    world.send(START, id="b")
    world.send(StartWorkflow(workflow="work", if_exists="error"), id="c")
    assert kinds(world.decide()).count("RunCreated") == 1
    assert sorted(world.replies) == [("a", b"null"), ("b", ATTACHED), ("c", "WorkflowExists")]


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


# -- at most once ------------------------------------------------------------------------------------------------------


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


# -- refusals and answers ----------------------------------------------------------------------------------------------


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


def test_a_turn_is_numbered_within_its_id_and_carries_its_term():
    world = World(work=one_step)
    world.start()
    world.owner(term=4)
    world.complete(0)
    assert [(turn.turn, turn.term) for turn in world.history] == [(1, 1), (2, 4)]
    assert all(isinstance(turn, Turn) for turn in world.history)
    assert StepDue(number=0, attempt=1) not in [event for turn in world.history for event in turn.events]


# -- what the other files look at more closely -------------------------------------------------------------------------


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


def test_runs_that_only_wait_leave_memory_the_ones_used_longest_ago_first():
    world = World(work=waits, busy=one_step)
    for workflow_id in ("a", "pinned", "b", "c"):
        world.start(to=workflow_id)
    world.start("busy", "busy")
    live = world.partition.live
    world.partition.evict_above(5, ())
    assert list(live) == ["a", "pinned", "b", "c", "busy"]
    world.partition.evict_above(4, ())
    assert list(live) == ["pinned", "b", "c", "busy"]
    world.partition.evict_above(2, {"pinned"})
    assert list(live) == ["busy", "pinned"], "the next look begins behind what cannot leave"
    world.partition.evict_above(0, {"pinned"})
    assert set(live) == {"pinned", "busy"}, "one is needed, the other has an attempt under way"


def test_evicting_what_is_not_there_is_nothing_and_closing_frees_all():
    world = World(work=sleeps)
    world.start()
    world.start(to="v")
    world.partition.evict("unknown")
    world.partition.close()
    assert world.partition.live == {} and all(script.closed for script in world.scripts)


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


# -- timers ------------------------------------------------------------------------------------------------------------


def test_a_timer_that_the_owner_finds_due_fires_without_a_command():
    world = World(work=sleeps)
    world.start()
    (timer,) = [effect.timer for effect in world.of(SetTimer)]
    world.partition.timer(timer)
    assert world.partition.has_work
    assert kinds(world.decide(timer.fire_at - world.now)) == ["TimerFired", "RunCompleted"]
    assert world.partition.consumed == world.partition.next_command
    world.partition.timer(timer)
    assert world.decide() == [] and [effect.timer for effect in world.of(DropTimer)] == [timer]


def test_a_timer_of_the_owner_does_not_fire_a_millisecond_early():
    world = World(work=sleeps)
    world.start()
    (timer,) = [effect.timer for effect in world.of(SetTimer)]
    world.partition.timer(timer)
    assert world.decide(timer.fire_at - world.now - 1) == []
    assert world.partition.at == timer.fire_at - 1
