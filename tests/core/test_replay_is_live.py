"""Replay is what was live: random programs under random happenings, kept in memory, evicted, or with a new owner."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from streamflow.core.commands import CancelWorkflow, SignalWorkflow, StartWorkflow, TerminateWorkflow
from streamflow.core.effects import (
    DropTimer,
    SetTimer,
    TimerRecord,
)
from streamflow.core.events import (
    RunStarted,
    SignalReceived,
    SignalTaken,
    StepAttemptFailed,
    StepCancelled,
    StepCompleted,
    StepFailed,
    StepScheduled,
    TimerFired,
)
from streamflow.core.machines.run import Run
from streamflow.core.replay import Execution, fingerprint
from tests.core.scripted import ERROR, T0, Cancelled, Failure, Program, Script, World, created, kinds, turn

ASKS = ("step", "step", "delayed", "once", "sleep", "signal", "any", "all", "up", "limit", "say")
HAPPENINGS = ("ok", "ok", "ok", "ok", "no", "retry", "timers", "timers", "signal", "signal", "cancel", "kill")


def program_of(seed: int) -> Program:
    """A random program: steps, sleeps, waits and timeouts, in sequence and at once, some given up."""

    def work(s: Script, args: bytes):
        chance = random.Random(seed)
        pending: list[int] = []
        heard = b""
        try:
            for _ in range(chance.randint(2, 9)):
                match chance.choice(
                    ("step", "step", "delayed", "once", "sleep", "signal", "any", "all", "up", "limit", "say")
                ):
                    case "step":
                        pending.append(s.step(chance.choice("ab"), b"[%d]" % chance.randint(0, 9)))
                    case "delayed":
                        pending.append(s.step(chance.choice("ab"), start_at=s.at + chance.randint(1, 50)))
                    case "once":
                        pending.append(s.step("once", at_most_once=True))
                    case "sleep":
                        pending.append(s.sleep(chance.randint(0, 50)))
                    case "signal":
                        pending.append(s.signal(chance.choice("xy")))
                    case "any" if pending:
                        number, outcome = yield set(pending)
                        heard += repr((number, outcome, s.at)).encode()
                        pending.remove(number)
                    case "all":
                        while pending:
                            number, outcome = yield set(pending)
                            heard += repr((number, s.at)).encode()
                            pending.remove(number)
                    case "up" if pending:
                        s.give_up(pending.pop(chance.randrange(len(pending))))
                    case "limit":
                        wait, limit = s.signal(chance.choice("xy")), s.sleep(chance.randint(1, 50), "timeout")
                        number, _ = yield {wait, limit}
                        s.give_up(wait if number == limit else limit)
                    case "say":
                        s.decisions.progress(b'"%d"' % len(heard))
        except Cancelled:
            if chance.random() < 0.7:
                yield {s.step("undo")}
                raise
        if chance.random() < 0.2:
            raise Failure(str(len(heard)))
        return heard

    return work


def poke(chance: random.Random, source: World, worlds: list[World]) -> None:
    """Something happens to the run, the same in every world; `source` knows what may."""
    if "w" not in source.partition.live:
        for world in worlds:
            world.send(StartWorkflow(workflow="work", if_exists="restart"))
        return
    run = source.live()
    steps = [each for number in run.decisions if (each := run.step(number))]
    number = chance.choice(steps).number if steps else 0
    attempt = chance.choice((1, 1, 1, 2))
    what = chance.choice(
        ("ok", "ok", "ok", "ok", "no", "retry", "timers", "timers", "signal", "signal", "cancel", "kill")
    )
    rare = chance.random()
    for world in worlds:
        match what:
            case "ok":
                outcome = StepCompleted(number=number, attempt=attempt, result=b"1")
                world.outcome(outcome, run=run.run)
            case "no":
                world.outcome(StepFailed(number=number, attempt=attempt, error=ERROR), run=run.run)
            case "retry" if steps and not steps[0].at_most_once:
                failed = StepAttemptFailed(
                    number=steps[0].number, attempt=attempt, error=ERROR, retry_at=source.now + 9
                )
                world.outcome(failed, run=run.run)
            case "timers":
                for timer in sorted(world.timers.values(), key=lambda timer: timer.key):  # type: ignore[attr-defined]
                    world.fire(timer)
            case "signal":
                name = "x" if number % 2 else "y"
                world.send(SignalWorkflow(name=name, value=b"%d" % number))
            case "cancel" if rare < 0.2:
                world.send(CancelWorkflow())
            case "kill" if rare < 0.1:
                world.send(TerminateWorkflow())


def follow_timers(world: World) -> None:
    """What the timer service keeps."""
    timers: dict[bytes, TimerRecord] = world.__dict__.setdefault("timers", {})
    for effect in world.of(SetTimer, DropTimer):
        if isinstance(effect, SetTimer):
            timers[effect.timer.key] = effect.timer
        else:
            timers.pop(effect.timer.key, None)


@settings(max_examples=80, deadline=None)
@given(program=st.integers(0, 2**32), happenings=st.integers(0, 2**32))
def test_replay_is_what_was_live_whether_runs_stay_in_memory_are_evicted_or_change_their_owner(program, happenings):
    chance = random.Random(happenings)
    live, evicted, moved = worlds = [World(work=program_of(program)) for _ in range(3)]
    for world in worlds:
        world.send(StartWorkflow(workflow="work"))
    for _ in range(chance.randint(3, 25)):
        later = chance.choice((0, 1, 20, 60))
        for world in worlds:
            world.decide(later)
            follow_timers(world)
        assert live.history == evicted.history == moved.history
        assert live.effects == evicted.effects == moved.effects
        if "w" in live.partition.live:
            assert live.live() == live.run(), "the fold of the history is the run"
        evicted.partition.evict("w")
        moved.partition.close()
        owner = moved.owner()
        owner.consumed = owner.next_command = len(moved.commands)  # what was refused is not taken again here
        for _ in range(chance.choice((1, 1, 2, 3))):
            poke(chance, live, worlds)
    assert live.dead == evicted.dead == moved.dead


@settings(max_examples=60, deadline=None)
@given(program=st.integers(0, 2**32), happenings=st.integers(0, 2**32))
def test_code_sees_on_replay_what_it_saw_live_at_the_same_instants(program, happenings):
    chance = random.Random(happenings)
    world = World(work=program_of(program))
    world.send(StartWorkflow(workflow="work"))
    for _ in range(12):
        world.decide(chance.choice((0, 1, 20, 60)))
        follow_timers(world)
        if "w" not in world.partition.live:
            return
        before = world.scripts[-1].seen
        execution = Execution(world.run(), at=world.now)
        execution.code = script = Script(program_of(program), execution, execution.run)
        execution.replay(world.turns("w"))
        assert script.seen == before
        assert execution.flush() == ([], []), "and decides nothing anew"
        poke(chance, world, [world])


def test_a_recorded_order_is_kept_even_where_another_would_do():
    history = [
        turn(created(), RunStarted(), scheduled_as("a", 0), scheduled_as("b", 1)),
        turn(StepCompleted(number=1, attempt=1, result=b"b"), number=2, at=T0 + 5),
        turn(SignalReceived(signal=0, name="go"), StepCompleted(number=0, attempt=1, result=b"a"), number=3, at=T0 + 9),
    ]

    def work(s, args):
        first, second = s.step("a"), s.step("b")
        yield {first, second}
        yield {first, second}
        yield {s.sleep(1)}

    run = Run(workflow_id="w")
    for each in history:
        run.fold(each)
    execution = Execution(run, at=T0 + 20)
    execution.code = script = Script(work, execution, run)
    execution.replay(history)
    seen: list[Any] = script.seen
    assert [(at, type(outcome), outcome.number) for at, outcome in seen] == [
        (T0 + 5, StepCompleted, 1),
        (T0 + 9, StepCompleted, 0),
    ]
    assert kinds(execution.events) == ["TimerSet"]
    assert not {TimerFired, SignalTaken, StepCancelled} & {type(event) for event in execution.events}


def scheduled_as(name: str, number: int) -> StepScheduled:
    return StepScheduled(number=number, name=name, args=b"[]", fingerprint=fingerprint(b"[]"))
