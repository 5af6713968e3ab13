"""What turns have sent out, derived again from some turn on."""

from __future__ import annotations

import pytest

from streamflow.core.commands import CancelWorkflow, ReportAttempt, TerminateWorkflow
from streamflow.core.derive import effects_since
from streamflow.core.effects import DispatchAttempt, DropTimer, SendReply, SetTimer
from tests.core.programs import SIGNAL, one_step, sleeps
from tests.core.scripted import ERROR, World


def test_effects_are_derived_again_from_a_turn_on():
    world = World(work=sleeps)
    world.start(id="start")
    first = world.of(SetTimer)
    world.send(SIGNAL, id="signal")
    world.send(CancelWorkflow(), id="cancel", reply_to=None)
    world.decide()
    again = world.of(DropTimer)
    run, effects = effects_since(world.turns("w"), 1)
    assert run == world.run()
    assert [each for each in effects if isinstance(each, SetTimer | DropTimer)] == first + again
    assert [each.reply.command_id for each in effects if isinstance(each, SendReply)] == ["start", "signal"]
    _, effects = effects_since(world.turns("w"), 2)
    assert [each for each in effects if not isinstance(each, SendReply)] == again


def test_deriving_again_answers_only_the_commands_of_the_current_run():
    world = World(work=one_step)
    world.start(id="first")
    world.send(TerminateWorkflow())
    world.decide()
    world.start(id="again", if_exists="restart")
    _, effects = effects_since(world.turns("w"), 1)
    assert [each.reply.command_id for each in effects if isinstance(each, SendReply)] == ["again"]


def test_without_turns_there_is_nothing_to_derive():
    with pytest.raises(AssertionError):
        effects_since([], 1)


def test_only_attempts_that_are_still_awaited_are_put_on_their_queue_again():
    def work(s, args):
        first, second = s.step("embed", queue="gpu"), s.step("rank", queue="cpu")
        yield {first}
        yield {second}
        return b"1"

    def dispatched():
        _, effects = effects_since(world.turns("w"), 1)
        return [(each.queue, each.task.attempt) for each in effects if isinstance(each, DispatchAttempt)]

    world = World(work=work)
    world.start()
    assert dispatched() == [("gpu", 1), ("cpu", 1)]
    world.send(ReportAttempt(run=1, number=0, attempt=1, result=b"1"), reply_to=None)
    world.send(ReportAttempt(run=1, number=1, attempt=1, error=ERROR, retry_after_ms=5), reply_to=None)
    world.decide()
    (timer,) = [effect.timer for effect in world.of(SetTimer)]
    assert dispatched() == [], "one is done, the other waits for its next attempt"
    world.now = timer.fire_at
    world.fire(timer)
    world.decide()
    assert dispatched() == [("cpu", 2)]
    world.send(TerminateWorkflow())
    world.decide()
    assert dispatched() == []
