"""Runs whose code does not fit their history: kept as they are, with their inputs, until fitting code comes."""

from __future__ import annotations

import pytest

from streamflow.core.commands import CancelWorkflow, CleanupWorkflow, SignalWorkflow, StartWorkflow, TerminateWorkflow
from streamflow.core.effects import SetTimer, StartAttempt
from streamflow.core.events import (
    StepAttemptFailed,
    StepCompleted,
)
from tests.core.programs import (
    SIGNAL,
    endless_on_go,
    one_step,
    waits,
)
from tests.core.scripted import ERROR, T0, Endless, World, kinds

# -- blocked -----------------------------------------------------------------------------------------------------------


def blocked() -> World:
    """A run whose worker does not know its workflow any more."""
    world = World(work=waits)
    world.start(timeout_ms=10_000)
    world.programs.clear()
    world.partition.evict("w")
    world.send(SignalWorkflow(name="other"))
    assert kinds(world.decide()) == ["RunBlocked", "SignalReceived"]
    assert world.statuses[0].state == "blocked"
    assert world.statuses[0].error.type == "streamflow.errors.NonDeterminismError"
    return world


@pytest.mark.parametrize("evicted", [False, True])
def test_a_blocked_run_keeps_its_inputs_and_goes_on_with_fitting_code(evicted):
    world = blocked()
    world.send(SIGNAL)
    assert kinds(world.decide()) == ["SignalReceived"]
    assert world.statuses == [], "nothing that it shows has changed"
    world.programs["work"] = waits
    if evicted:
        world.partition.evict("w")
    world.send(SignalWorkflow(name="other"))
    assert kinds(world.decide()) == ["SignalReceived"], "only who recovers it tries its code again"
    world.partition.recover("w")
    assert kinds(world.decide()) == ["RunUnblocked", "SignalTaken", "RunCompleted"]
    assert world.run().result == b"1"


def test_a_blocked_run_stays_blocked_while_no_code_fits_and_says_so_once():
    world = blocked()
    for _ in range(2):
        world.owner().recover("w")
        assert world.decide() == [] and world.effects == []
    assert world.run().state == "blocked"


def test_a_blocked_run_is_cancelled_when_its_code_is_back():
    world = blocked()
    world.send(CancelWorkflow())
    assert kinds(world.decide()) == ["CancelRequested"]
    world.programs["work"] = waits
    world.partition.recover("w")
    assert kinds(world.decide()) == ["RunUnblocked", "RunCancelled"]


@pytest.mark.parametrize("how", ["terminate", "deadline", "cleanup"])
def test_a_blocked_run_can_be_ended_without_its_code(how):
    world = blocked()
    match how:
        case "terminate":
            world.send(TerminateWorkflow())
        case "cleanup":
            world.send(CleanupWorkflow(force=True))
        case "deadline":
            run = world.run()
            world.fire(run.own_timer("deadline", run.deadline_at))
    expected = {"terminate": ["RunTerminated"], "deadline": ["RunFailed"], "cleanup": ["RunTerminated", "RunDeleted"]}
    assert kinds(world.decide(10_000)) == expected[how]


def test_steps_of_a_blocked_run_go_on_and_are_there_when_it_does():
    def work(s, args):
        first, second = s.step("a"), s.step("b")
        yield {first}
        yield {second}
        return b"1"

    world = World(work=work)
    world.start()
    world.outcome(StepAttemptFailed(number=1, attempt=1, error=ERROR, retry_at=T0 + 5))
    world.decide()
    timer = world.of(SetTimer)[0].timer
    world.programs.clear()
    world.partition.evict("w")
    assert kinds(world.complete(0)) == ["RunBlocked", "StepCompleted"]
    world.fire(timer)
    assert kinds(world.decide(5)) == ["StepDue"]
    world.programs["work"] = work
    world.owner().recover("w")
    assert kinds(world.decide()) == ["RunUnblocked"]
    assert world.of(StartAttempt) == [StartAttempt(1, 1, 2)]
    assert kinds(world.complete(1, attempt=2)) == ["StepCompleted", "RunCompleted"]


def test_a_run_that_diverges_can_be_terminated_in_the_same_pass():
    world = World(work=endless_on_go)
    world.start()
    world.complete(0)
    world.send(SIGNAL)
    world.send(TerminateWorkflow())
    assert kinds(world.decide()) == ["SignalReceived", "RunBlocked", "RunTerminated"]
    assert world.run().state == "terminated"


def test_a_restart_whose_code_diverges_does_not_take_back_the_end_before_it():
    def work(s, args):
        if args == b"[2]":
            raise Endless
        return (yield from one_step(s, args))

    world = World(work=work)
    world.start()
    world.outcome(StepCompleted(number=0, attempt=1, result=b"1"))
    world.send(StartWorkflow(workflow="work", if_exists="restart", args=b"[2]"))
    assert kinds(world.decide()) == ["StepCompleted", "RunCompleted", "RunCreated", "RunStarted", "RunBlocked"]
    assert world.live() == world.run()


def test_a_run_that_diverges_on_its_first_turn_is_created_and_blocked():
    def work(s, args):
        if args:
            raise Endless
        yield set()

    world = World(work=work)
    assert kinds(world.start()) == ["RunCreated", "RunStarted", "RunBlocked"]
    assert world.replies == [("c0", b"null")]
