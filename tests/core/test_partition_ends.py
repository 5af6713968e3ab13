"""Runs that end and begin again under one id, and passes that were lost in part."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamflow.core.commands import CancelWorkflow, CleanupWorkflow, SignalWorkflow, TerminateWorkflow
from streamflow.core.effects import (
    CancelAttempt,
    DropTimer,
    SetTimer,
    StartAttempt,
    TimerRecord,
)
from streamflow.core.events import (
    RunCreated,
    SignalReceived,
    StepCompleted,
)
from streamflow.core.machines.run import Run
from streamflow.core.partition import COMMANDS_REMEMBERED_MAX
from tests.core.programs import (
    RESTART,
    SIGNAL,
    START,
    TO_A_RUN,
    closed,
    one_step,
    sleeps,
    slept,
    waits,
)
from tests.core.scripted import T0, World, kinds

# -- restart -----------------------------------------------------------------------------------------------------------


def test_a_restart_in_the_pass_of_the_end_can_be_loaded_again():
    world = World(work=one_step)
    world.start()
    world.outcome(StepCompleted(number=0, attempt=1, result=b"1"))
    world.send(RESTART)
    assert kinds(world.decide()) == [
        "StepCompleted",
        "RunCompleted",
        "RunCreated",
        "RunStarted",
        "StepScheduled",
    ]
    assert world.of(StartAttempt) == [StartAttempt(2, 0, 1)]
    live = world.live()
    assert (live.run, live.first_turn) == (2, 2)
    assert [turn.turn for turn in world.turns("w")] == [2]
    world.partition.evict("w")
    assert kinds(world.complete(0, b"2", run=2)) == ["StepCompleted", "RunCompleted"]
    assert world.run().result == b"2"


def test_terminate_and_restart_in_one_pass_cancel_the_old_attempt_and_start_the_new_one():
    world = World(work=one_step)
    world.start()
    world.send(TerminateWorkflow())
    world.send(RESTART)
    world.decide()
    assert world.of(StartAttempt, CancelAttempt) == [CancelAttempt(1, 0), StartAttempt(2, 0, 1)]
    assert world.live() == world.run()


# -- retention ---------------------------------------------------------------------------------------------------------


def retention_timers(world: World) -> list[TimerRecord]:
    return [effect.timer for effect in world.of(SetTimer) if effect.timer.kind == "retention"]


@pytest.mark.parametrize("state", ["completed", "cancelled", "terminated", "deadline"])
def test_a_run_is_deleted_when_its_retention_is_over_however_it_ended(state):
    world = World(work=waits)
    world.retention["work"] = 5_000
    world.start(timeout_ms=100)
    match state:
        case "deadline":
            world.fire(world.run().own_timer("deadline", T0 + 100))
            world.now = T0 + 100
        case "completed":
            world.send(SIGNAL)
        case "cancelled":
            world.send(CancelWorkflow())
        case _:
            world.send(TerminateWorkflow())
    assert kinds(world.decide())[-1] == "RetentionSet"
    (timer,) = retention_timers(world)
    assert timer.fire_at == world.run().delete_at == world.now + 5_000
    world.retention["work"] = 5  # what counts is what the workflow said when the run closed
    world.fire(timer)
    assert world.decide() == [], "it is not due"
    world.now = timer.fire_at
    world.fire(timer)
    assert kinds(world.decide()) == ["RunDeleted"]
    assert world.statuses == [None] and world.of(DropTimer) == [DropTimer(timer)]
    assert world.turns("w") == [] and world.partition.live == {}


def test_a_run_that_closed_under_no_retention_stays():
    world = World(work=sleeps)
    world.start()
    world.send(TerminateWorkflow())
    assert kinds(world.decide()) == ["RunTerminated"] and retention_timers(world) == []
    world.retention["work"] = 5
    world.send(TerminateWorkflow())
    assert world.decide() == [] and world.run().delete_at is None


def test_a_restart_ends_the_retention_of_the_run_before_and_the_next_one_has_its_own():
    world = World(work=one_step)
    world.retention["work"] = 5_000
    world.start()
    world.complete(0)
    (first,) = retention_timers(world)
    world.send(RESTART)
    world.decide()
    assert DropTimer(first) in world.of(DropTimer)
    world.now = first.fire_at
    world.fire(first)
    assert world.decide() == [] and world.run().state == "running"
    world.complete(0, run=2)
    (second,) = retention_timers(world)
    assert (second.run, second.fire_at) == (2, world.now + 5_000)


def test_a_run_that_ends_and_begins_again_in_one_pass_is_kept_once_it_ends():
    world = World(work=one_step)
    world.retention["work"] = 5_000
    world.start()
    world.outcome(StepCompleted(number=0, attempt=1, result=b"1"))
    world.send(RESTART)
    assert "RetentionSet" not in kinds(world.decide())
    world.send(CleanupWorkflow(force=True))
    assert kinds(world.decide()) == ["RunTerminated", "RunDeleted"] and retention_timers(world) == []


# -- commands of earlier runs ------------------------------------------------------------------------------------------


def test_how_many_commands_of_earlier_runs_are_remembered_is_bounded():
    world = World(work=waits)
    world.start()
    for number in range(COMMANDS_REMEMBERED_MAX + 5):
        world.send(SignalWorkflow(name="other"), id=f"s{number}")
    world.decide()
    world.send(TerminateWorkflow())
    world.decide()
    world.start(id="again", if_exists="restart")
    assert len(world.live().commands) == COMMANDS_REMEMBERED_MAX + 1
    assert world.live() == world.run()


# -- cleanup -----------------------------------------------------------------------------------------------------------


def test_a_cleanup_that_did_nothing_is_not_remembered_as_done():
    world = World(work=one_step)
    world.start()
    world.send(SIGNAL)
    world.send(CleanupWorkflow(), id="clean")
    world.decide()
    assert ("clean", b"false") in world.replies
    world.send(CleanupWorkflow(), id="clean")
    world.decide()
    assert world.replies == [("clean", b"false")]


def test_a_cleanup_sent_twice_in_one_pass_is_one():
    world = closed("completed")
    for _ in range(2):
        world.send(CleanupWorkflow(), id="clean")
    assert kinds(world.decide()) == ["RunDeleted"]
    assert world.replies == [("clean", b"true")] * 2


@pytest.mark.parametrize("durable", [False, True])
def test_a_deleted_id_begins_anew(durable):
    world = closed("completed")
    world.send(CleanupWorkflow())
    if durable:
        world.decide()
    world.send(START, id="again")
    world.decide()
    run = world.run()
    assert (run.state, run.run) == ("running", 1 if durable else 2)
    assert world.live() == run
    assert world.statuses[-1].state == "running"
    world.partition.evict("w")
    assert kinds(world.complete(0, run=run.run)) == ["StepCompleted", "RunCompleted"]


def test_a_stale_timer_and_a_new_timer_of_its_name_in_one_pass_leave_the_new_one():
    world, timer = slept()
    world.send(CleanupWorkflow(force=True))
    world.decide()
    world.fire(timer)
    world.send(START)
    world.decide()
    again = TimerRecord(workflow_id="w", kind="sleep", run=1, number=0, attempt=0, fire_at=T0 + 1_000)
    assert world.of(SetTimer, DropTimer) == [DropTimer(timer), SetTimer(again)]


# -- each command once -------------------------------------------------------------------------------------------------


def hears_two(s, args):
    for _ in range(2):
        yield {s.signal("go")}
    yield {s.step("charge")}


def sent_commands(*bodies):
    return st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(bodies), st.integers(0, 9)), max_size=14)


def lose(sent, seed: int) -> World:
    """Decide on the commands in passes of which any suffix of the turns may be lost; then the next owner takes over."""
    chance = random.Random(seed)
    world = World(work=hears_two)
    for to, body, id in sent:
        world.send(body, to, id=f"{to}{id}{type(body).__name__}")
        if chance.random() < 0.4:
            decided = world.decide_only()
            durable = chance.randint(0, len(decided.turns))
            world.keep(decided.turns[:durable])
            if durable < len(decided.turns):
                take_again(world)
    world.decide()
    return world


@settings(max_examples=100, deadline=None)
@given(sent=sent_commands(START, RESTART, SIGNAL, CancelWorkflow(), TerminateWorkflow()), seed=st.integers(0, 2**32))
def test_when_only_a_part_of_a_pass_became_durable_no_command_is_applied_twice(sent, seed):
    world = lose(sent, seed)
    first: dict[tuple[str, str], int] = {}
    for place, turn in enumerate(world.history):
        again = any(isinstance(event, RunCreated) and event.run > 1 for event in turn.events)
        for each in turn.commands:
            known = first.setdefault((turn.workflow_id, each.command_id), place)
            assert known == place or again, "only a new run's first turn names earlier commands again"
    for id in "abc":
        signals = [
            e for turn in world.history if turn.workflow_id == id for e in turn.events if type(e) is SignalReceived
        ]
        assert len(signals) <= len({number for to, body, number in sent if to == id and body is SIGNAL})


@settings(max_examples=60, deadline=None)
@given(sent=sent_commands(START, RESTART, SIGNAL), seed=st.integers(0, 2**32))
def test_when_only_a_part_of_a_pass_became_durable_the_rest_is_taken_again(sent, seed):
    sent = [*((id, START, 99) for id in "abc"), *sent]
    calm = World(work=hears_two)
    for to, body, id in sent:
        calm.send(body, to, id=f"{to}{id}{type(body).__name__}")
    calm.decide()
    lossy = lose(sent, seed)
    assert [shape(lossy.run(id)) for id in "abc"] == [shape(calm.run(id)) for id in "abc"]


def take_again(world: World) -> None:
    """A new owner, that reads the commands from where the durable turns say."""
    owner = world.owner()
    for offset in range(owner.consumed, len(world.commands)):
        owner.command(offset, world.commands[offset])


def shape(run: Run) -> object:
    """What must not depend on how the commands were spread over passes."""
    return (run.state, run.run, run.decided, run.mailbox, run.cancel_requested, sorted(run.commands))


# -- ends in one pass --------------------------------------------------------------------------------------------------


def test_what_comes_in_the_same_pass_after_the_run_ended_finds_it_closed():
    world = World(work=sleeps)
    world.start()
    timer = world.of(SetTimer)[0].timer
    world.fire(timer)
    for id, body in enumerate(TO_A_RUN):
        world.send(body, id=str(id))
    world.fire(timer)
    world.outcome(StepCompleted(number=0, attempt=1, result=b"1"))
    assert kinds(world.decide(500)) == ["TimerFired", "RunCompleted"]
    assert world.replies == [(str(id), "CommandRejected") for id in range(3)]


def test_a_cancel_that_comes_before_the_outcome_in_one_pass_goes_first():
    world = World(work=one_step)
    world.start()
    world.send(CancelWorkflow())
    world.outcome(StepCompleted(number=0, attempt=1, result=b"1"))
    assert kinds(world.decide()) == ["CancelRequested", "RunCancelled"]


# -- consuming --------------------------------------------------------------------------------------------------------


def test_a_pass_without_turns_consumes_too():
    world = World(work=one_step)
    world.send(SIGNAL)
    world.decide()
    world.start()
    assert [turn.consumed for turn in world.history] == [2]
    assert world.partition.consumed == 2
