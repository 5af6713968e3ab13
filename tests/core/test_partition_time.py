"""Time in a partition: timers, deadlines, attempts that come late, and memory that runs leave meanwhile."""

from __future__ import annotations

import pytest

from streamflow.core.commands import (
    FireTimer,
    SignalWorkflow,
    StartWorkflow,
    TerminateWorkflow,
)
from streamflow.core.effects import (
    CancelAttempt,
    DropTimer,
    PublishStatus,
    SetTimer,
    StartAttempt,
)
from streamflow.core.events import (
    StepCompleted,
)
from streamflow.core.partition import CLOCK_SKEW_MS_MAX
from tests.core.programs import ENDED, SIGNAL, START, closed, one_step, sleeps, slept, waits
from tests.core.scripted import T0, World, kinds

# -- deadlines ---------------------------------------------------------------------------------------------------------


def test_a_deadline_counts_from_the_delayed_start_and_ends_with_the_run():
    world = World(work=one_step)
    created = world.start(delay_ms=700, timeout_ms=300)[0]
    assert created.deadline_at == T0 + 1_000
    start, deadline = (effect.timer for effect in world.of(SetTimer))
    world.fire(start)
    world.fire(deadline)
    assert kinds(world.decide(1_000)) == ["RunStarted", "StepScheduled", "RunFailed"]
    assert world.of(StartAttempt, CancelAttempt, SetTimer) == []


def test_a_deadline_that_comes_before_its_start_fails_the_run_unstarted():
    world = World(work=one_step)
    world.start(delay_ms=700, timeout_ms=0)
    start, deadline = (effect.timer for effect in world.of(SetTimer))
    for timer in (deadline, start):
        world.fire(timer)
    assert kinds(world.decide(700)) == ["RunFailed"]
    assert {effect.timer for effect in world.of(DropTimer)} == {start, deadline}


def test_the_deadline_of_the_run_before_does_not_count_for_the_next():
    world = World(work=one_step)
    world.start(timeout_ms=300)
    timer = world.of(SetTimer)[0].timer
    world.send(TerminateWorkflow())
    world.send(StartWorkflow(workflow="work", if_exists="restart", timeout_ms=900))
    world.decide()
    world.fire(timer)
    assert world.decide(300) == []
    assert world.run().state == "running"


# -- timers ------------------------------------------------------------------------------------------------------------


def test_a_timer_service_slightly_ahead_moves_the_partitions_time_so_that_no_timer_seems_early():
    world, timer = slept()
    world.fire(timer)
    assert kinds(world.decide()) == ["TimerFired", "RunCompleted"]
    assert world.history[-1].at == timer.fire_at
    assert world.start(to="v") and world.history[-1].at == timer.fire_at, "and it never runs backwards"


def test_all_inputs_of_a_pass_have_one_instant_so_that_the_fold_is_what_was_live():
    world, timer = slept()
    world.send(START, "v")
    world.send(SIGNAL)
    world.fire(timer)
    world.decide()
    assert {turn.at for turn in world.history[1:]} == {timer.fire_at}
    assert world.live("v") == world.run("v")
    assert world.live("v").created_at == timer.fire_at


def test_a_timer_service_far_ahead_cannot_race_the_partitions_time_forward():
    def naps(s, args):
        for _ in range(100):
            yield {s.sleep(CLOCK_SKEW_MS_MAX - 1)}

    world = World(work=naps)
    world.start()
    for _ in range(10):
        for effect in world.of(SetTimer):
            world.fire(effect.timer)
        world.decide()
    assert world.partition.at <= world.now + CLOCK_SKEW_MS_MAX


def test_a_made_up_instant_does_not_make_a_timer_due():
    world, timer = slept()
    world.send(FireTimer(kind="sleep", run=1, number=0, fire_at=0), reply_to=None)
    assert world.decide() == []
    world.send(FireTimer(kind="sleep", run=1, number=0, fire_at=timer.fire_at + 10**9), reply_to=None)
    assert world.decide(499) == []
    assert world.partition.at == T0 + 499


def test_time_never_runs_backwards():
    world = World(work=one_step)
    world.start()
    world.start(to="v")
    world.now -= 10_000
    world.complete(0)
    world.complete(0, to="v")
    assert [turn.at for turn in world.history] == [T0] * 4


# -- outcomes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ENDED)
def test_an_outcome_of_a_closed_run_is_dropped(state):
    world = closed(state)
    assert world.complete(0) == []
    assert world.partition.live == {}


def test_an_outcome_of_the_run_before_is_dropped_by_the_next():
    world = World(work=one_step)
    world.start()
    world.send(TerminateWorkflow())
    world.decide()
    world.start(if_exists="restart")
    assert world.complete(0, b"old", run=1) == []
    world.complete(0, b"new", run=2)
    assert world.run().result == b"new"


def test_two_outcomes_of_one_attempt_count_once():
    world = World(work=one_step)
    world.start()
    for result in (b"1", b"2"):
        world.outcome(StepCompleted(number=0, attempt=1, result=result))
    assert kinds(world.decide()) == ["StepCompleted", "RunCompleted"]
    assert world.run().result == b"1"


def test_outcomes_that_arrive_together_make_one_turn():
    def work(s, args):
        first, second = s.step("a"), s.step("b")
        yield {first}
        yield {second}

    world = World(work=work)
    world.start()
    for number in (0, 1):
        world.outcome(StepCompleted(number=number, attempt=1, result=b"1"))
    assert kinds(world.decide()) == ["StepCompleted", "StepCompleted", "RunCompleted"]
    assert len(world.history) == 2


# -- status ------------------------------------------------------------------------------------------------------------


def test_the_status_is_published_when_the_run_parks_or_wakes_and_not_between_steps():
    def work(s, args):
        yield {s.step("a")}
        yield {s.step("b")}
        yield {s.signal("go")}
        yield {s.step("c")}
        s.decisions.progress(b"1")
        yield {s.step("d")}

    world = World(work=work)
    world.start()
    published = []
    for happens in (0, 1, None, 3, 4):
        if happens is None:
            world.send(SIGNAL)
            world.decide()
        else:
            world.complete(happens)
        published.append([status.waiting_on for status in world.statuses])
    assert published == [[], [["signal go"]], [["step c"]], [["step d"]], [[]]]


def test_a_signal_that_nobody_waits_for_changes_no_status():
    world = World(work=sleeps)
    world.start()
    world.send(SIGNAL)
    assert kinds(world.decide()) == ["SignalReceived"]
    assert world.of(PublishStatus) == []


# -- eviction ----------------------------------------------------------------------------------------------------------


def test_the_order_of_runs_in_memory_is_that_of_use():
    world = World(work=waits)
    for id in ("a", "b", "c"):
        world.start(to=id)
    world.send(SignalWorkflow(name="other"), "a")
    world.decide()
    assert list(world.partition.live) == ["b", "c", "a"]


def test_an_attempt_may_be_under_way_while_its_run_is_not_in_memory():
    world = World(work=one_step)
    world.start()
    world.partition.evict("w")
    assert kinds(world.complete(0)) == ["StepCompleted", "RunCompleted"]


def test_a_timer_that_fires_early_after_eviction_leaves_the_run_as_it_was():
    world, timer = slept()
    world.partition.evict("w")
    world.now -= 10 * CLOCK_SKEW_MS_MAX
    world.fire(timer)
    assert world.decide() == []
    assert world.live() == world.run()
