"""Workflow code against its history: what may change between two loads of a run, and what may not."""

from __future__ import annotations

from typing import Any

import pytest

from streamflow.core.commands import CancelWorkflow, SignalWorkflow, TerminateWorkflow
from streamflow.core.effects import (
    CancelAttempt,
    DispatchAttempt,
    DropTimer,
    Effect,
    PublishStatus,
    RecordStart,
    SetTimer,
    StartAttempt,
    StepTask,
    TimerRecord,
)
from streamflow.core.events import (
    INSTANT_MS_MAX,
    RunCancelled,
    StepAttemptFailed,
    StepFailed,
)
from streamflow.core.machines.run import Run
from streamflow.core.replay import IGNORED, SHOWN_BYTES_MAX, Execution, _without_pairs, fingerprint
from tests.core.scripted import ERROR, T0, Cancelled, Endless, Failure, Program, Script, World, kinds


def result_of(outcome):
    return outcome.result


def one_step(s: Script, args: bytes):
    _, outcome = yield {s.step("charge")}
    return result_of(outcome)


def reload(world: World, program: Program) -> None:
    """The run leaves memory; it is loaded again with other code."""
    world.programs["work"] = program
    world.partition.evict("w")


# -- live --------------------------------------------------------------------------------------------------------------


def test_code_decides_and_its_outcomes_come_back_under_their_numbers():
    def work(s, args):
        first, second = s.step("charge"), s.step("ship")
        number, outcome = yield {second}
        assert (number, outcome.result) == (second, b"shipped")
        _, outcome = yield {first}
        return outcome.result

    world = World(work=work)
    assert kinds(world.start()) == ["RunCreated", "RunStarted", "StepScheduled", "StepScheduled"]
    assert kinds(world.complete(0, b"charged")) == ["StepCompleted"]
    assert kinds(world.complete(1, b"shipped")) == ["StepCompleted", "RunCompleted"]
    assert world.run().result == b"charged"


def test_a_run_that_closes_is_kept_for_the_retention_of_its_workflow():
    world = World(work=one_step)
    world.retention["work"] = 700
    world.start()
    assert kinds(world.complete(0)) == ["StepCompleted", "RunCompleted", "RetentionSet"]
    assert world.run().delete_at == T0 + 700


def test_a_failed_step_is_an_outcome_and_what_the_code_raises_fails_the_run():
    def work(s, args):
        _, outcome = yield {s.step("charge")}
        assert isinstance(outcome, StepFailed)
        raise Failure("card refused")

    world = World(work=work)
    world.start()
    world.outcome(StepFailed(number=0, attempt=1, error=ERROR))
    assert kinds(world.decide()) == ["StepFailed", "RunFailed"]
    assert world.run().error.message == "card refused"


def test_cancelling_unwinds_the_code_which_may_still_run_steps():
    def work(s, args):
        try:
            yield {s.step("charge")}
        except Cancelled:
            yield {s.step("refund")}
            raise
        return b""

    for evicted in (False, True):
        world = World(work=work)
        world.start()
        world.send(CancelWorkflow())
        assert kinds(world.decide()) == ["CancelRequested", "StepScheduled"]
        if evicted:
            world.partition.evict("w")
        assert kinds(world.complete(1)) == ["StepCompleted", "RunCancelled"]
        assert world.run().state == "cancelled"


def test_progress_is_reported_once():
    def work(s, args):
        s.decisions.progress(b"1")
        yield {s.step("charge")}
        s.decisions.progress(b"2")
        return b""

    world = World(work=work)
    assert "ProgressSet" in kinds(world.start())
    world.partition.evict("w")
    assert kinds(world.complete(0)) == ["StepCompleted", "ProgressSet", "RunCompleted"]


def test_an_instant_beyond_all_calendars_is_kept_within_a_record():
    def work(s, args):
        yield {s.sleep(10**33), s.step("charge", start_at=10**33)}

    world = World(work=work)
    sleep, step = world.start()[2:]
    assert sleep.fire_at == step.start_at == INSTANT_MS_MAX


def test_after_its_end_code_asks_in_vain():
    def work(s, args):
        yield {s.step("charge")}
        return b"1"

    world = World(work=work)
    world.start()
    world.complete(0)
    decisions: Any = world.scripts[0].decisions
    options = {"start_at": None, "queue": None, "at_most_once": False, "check_args": True}
    assert decisions.step("charge", b"", **options) == decisions.timer("sleep", 1) == decisions.wait("go") == IGNORED
    decisions.cancel(0)
    decisions.progress(b"1")
    decisions.close_run(RunCancelled())
    assert decisions.flush() == ([], [])


def test_giving_up_what_is_over_is_nothing():
    def work(s, args):
        first = s.step("charge")
        yield {first}
        s.decisions.cancel(first)
        yield {s.signal("go")}

    world = World(work=work)
    world.start()
    assert kinds(world.complete(0)) == ["StepCompleted", "SignalAwaited"]


def test_each_kind_of_decision_can_be_given_up():
    def work(s, args):
        asked = [s.step("charge"), s.sleep(50), s.signal("go")]
        yield {s.step("first")}
        for number in asked:
            s.give_up(number)
        yield {s.step("last")}

    world = World(work=work)
    world.start()
    assert kinds(world.complete(3))[1:4] == ["StepCancelled", "TimerCancelled", "SignalWaitCancelled"]
    assert [type(effect) for effect in world.of(CancelAttempt, DropTimer)] == [CancelAttempt, DropTimer]


def test_a_loop_without_an_await_blocks_the_run_and_keeps_the_input():
    def work(s, args):
        yield {s.step("charge")}
        raise Endless

    world = World(work=work)
    world.start()
    assert kinds(world.complete(0)) == ["StepCompleted", "RunBlocked"]
    assert "loops without an await" in world.run().error.message


# -- signals -----------------------------------------------------------------------------------------------------------


def test_signals_are_taken_in_order_of_arrival_also_those_that_came_before_the_wait():
    def work(s, args):
        values = []
        yield {s.step("charge")}
        for _ in range(3):
            _, received = yield {s.signal("go")}
            values.append(received.value)
        return b",".join(values)

    for evicted in (False, True):
        world = World(work=work)
        world.start()
        for value in (b"1", b"2"):
            world.send(SignalWorkflow(name="go", value=value))
        assert kinds(world.decide()) == ["SignalReceived", "SignalReceived"]
        if evicted:
            world.partition.evict("w")
        assert kinds(world.complete(0)) == ["StepCompleted", *["SignalAwaited", "SignalTaken"] * 2, "SignalAwaited"]
        if evicted:
            world.partition.evict("w")
        world.send(SignalWorkflow(name="go", value=b"3"))
        assert kinds(world.decide()) == ["SignalReceived", "SignalTaken", "RunCompleted"]
        assert world.run().result == b"1,2,3"


def test_a_wait_that_timed_out_leaves_the_signal_to_the_next_one():
    def work(s, args):
        wait, limit = s.signal("go"), s.sleep(100, "timeout")
        number, _ = yield {wait, limit}
        assert number == limit
        s.give_up(wait)
        _, received = yield {s.signal("go")}
        return received.value

    for evicted in (False, True):
        world = World(work=work)
        world.start()
        world.fire(world.of(SetTimer)[0].timer)
        assert kinds(world.decide(100)) == ["TimerFired", "SignalWaitCancelled", "SignalAwaited"]
        if evicted:
            world.partition.evict("w")
        world.send(SignalWorkflow(name="go", value=b"7"))
        assert kinds(world.decide()) == ["SignalReceived", "SignalTaken", "RunCompleted"]
        assert world.run().result == b"7"


def test_two_waits_of_one_name_take_the_signals_in_the_order_of_the_waits():
    def work(s, args):
        first, second = s.signal("go"), s.signal("go")
        got = dict([(yield {first, second}), (yield {first, second})])
        return got[first].value + got[second].value

    world = World(work=work)
    world.start()
    for value in (b"a", b"b"):
        world.send(SignalWorkflow(name="go", value=value))
    world.decide()
    assert world.run().result == b"ab"


# -- replay with other code --------------------------------------------------------------------------------------------


def two_steps(s: Script, args: bytes):
    _, first = yield {s.step("charge")}
    _, second = yield {s.step("ship")}
    return first.result + second.result


def half_done() -> World:
    """`two_steps` with its first step done."""
    world = World(work=two_steps)
    world.start()
    world.complete(0, b"c")
    return world


def test_code_that_did_not_change_decides_nothing_anew():
    world = half_done()
    reload(world, two_steps)
    assert kinds(world.complete(1, b"s")) == ["StepCompleted", "RunCompleted"]
    assert world.run().result == b"cs"


def test_an_inserted_step_is_new_and_the_others_keep_their_outcomes():
    def work(s, args):
        _, first = yield {s.step("charge")}
        _, new = yield {s.step("audit")}
        _, second = yield {s.step("ship")}
        return first.result + new.result + second.result

    world = half_done()
    reload(world, work)
    assert kinds(world.complete(1, b"s")) == ["StepScheduled", "StepCompleted"]
    assert kinds(world.complete(2, b"a")) == ["StepCompleted", "RunCompleted"], "ship was done before it was asked for"
    assert world.run().result == b"cas"


def test_a_removed_step_is_no_longer_waited_for():
    def work(s, args):
        _, second = yield {s.step("ship")}
        return second.result

    world = half_done()
    reload(world, work)
    assert kinds(world.complete(1, b"s")) == ["StepCompleted", "RunCompleted"]
    assert world.run().result == b"s"


def test_reordered_steps_find_their_own_outcomes():
    def work(s, args):
        ship, charge = s.step("ship"), s.step("charge")
        got = dict([(yield {ship, charge}), (yield {ship, charge})])
        return got[charge].result + got[ship].result

    world = half_done()
    reload(world, work)
    world.complete(1, b"s")
    assert world.run().result == b"cs"


def test_a_decision_is_told_by_kind_name_and_occurrence():
    def work(s, args):
        results = []
        for name in ("charge", "ship", "charge", "charge"):
            _, outcome = yield {s.step(name)}
            results.append(outcome.result)
        yield {s.sleep(5, "charge")}
        return b"".join(results)

    def other(s, args):
        order = [s.step("charge"), s.step("charge"), s.step("ship"), s.step("charge")]
        got: dict[int, bytes] = {}
        for _ in order:
            number, outcome = yield set(order) - set(got)
            got[number] = outcome.result
        yield {s.sleep(5, "charge")}
        return b"".join(got[number] for number in order)

    world = World(work=work)
    world.start()
    for number, result in enumerate([b"1", b"s", b"2", b"3"]):
        world.complete(number, result)
    timer = world.of(SetTimer)[0].timer
    reload(world, other)
    world.fire(timer)
    assert kinds(world.decide(5)) == ["TimerFired", "RunCompleted"]
    assert world.run().result == b"12s3"


def test_a_signal_that_came_before_the_code_began_is_there_when_it_waits():
    def work(s, args):
        _, received = yield {s.signal("go")}
        return received.value

    for evicted in (False, True):
        world = World(work=work)
        world.start(delay_ms=50)
        timer = world.of(SetTimer)[0].timer
        world.send(SignalWorkflow(name="go", value=b"7"))
        world.decide()
        if evicted:
            world.partition.evict("w")
        world.fire(timer)
        world.decide(50)
        assert world.run().result == b"7"


def test_a_signal_that_was_taken_early_keeps_its_value():
    def work(s, args):
        _, received = yield {s.signal("go")}
        yield {s.step("charge")}
        return received.value

    def inserted(s, args):
        yield {s.sleep(10)}
        return (yield from work(s, args))

    world = World(work=work)
    world.start()
    world.send(SignalWorkflow(name="go", value=b"7"))
    world.decide()
    reload(world, inserted)
    assert kinds(world.complete(1)) == ["TimerSet", "StepCompleted"]
    world.fire(world.of(SetTimer)[0].timer)
    assert kinds(world.decide(10)) == ["TimerFired", "RunCompleted"]
    assert world.run().result == b"7"


def test_code_that_ends_within_its_history_ends_the_run():
    def work(s, args):
        yield {s.step("charge")}
        return b"short"

    world = half_done()
    reload(world, work)
    world.complete(1)
    assert (world.run().state, world.run().result) == ("completed", b"short")


def test_what_new_code_decides_while_it_replays_has_the_instant_of_its_turn():
    def work(s, args):
        s.step("audit")
        return (yield from two_steps(s, args))

    world = half_done()
    reload(world, work)
    world.send(SignalWorkflow(name="hello"))
    assert kinds(world.decide(5_000)) == ["StepScheduled", "SignalReceived"]
    assert world.live().step(2).scheduled_at == T0 + 5_000
    assert world.live() == world.run()


def changed_args(args: bytes, **options) -> Program:
    def work(s, _):
        _, first = yield {s.step("charge", args, **options)}
        _, second = yield {s.step("ship")}
        return first.result + second.result

    return work


def test_changed_arguments_block_the_run_and_show_both_sides():
    world = World(work=changed_args(b'["old"]'))
    world.start()
    world.complete(0)
    reload(world, changed_args(b'["new"]'))
    assert kinds(world.complete(1)) == ["RunBlocked", "StepCompleted"]
    message = world.run().error.message
    assert 'history:   call 1 of charge with ["old"]' in message
    assert 'this code: call 1 of charge with ["new"]' in message
    assert "charge.options(check_args=False)" in message and "run w (work)" in message


def test_changed_arguments_that_are_meant_are_no_difference():
    world = World(work=changed_args(b'["old"]'))
    world.start()
    world.complete(0)
    reload(world, changed_args(b'["new"]', check_args=False))
    assert kinds(world.complete(1)) == ["StepCompleted", "RunCompleted"]


def test_arguments_are_checked_too_when_a_step_is_asked_for_long_after_its_outcome():
    def late(s, args):
        yield {s.signal("go")}
        return (yield from changed_args(b'["new"]')(s, args))

    world = World(work=changed_args(b'["old"]'))
    world.start()
    world.complete(0)
    reload(world, late)
    world.send(SignalWorkflow(name="go"))
    assert kinds(world.decide()) == ["SignalAwaited", "SignalReceived", "RunBlocked"]


def test_long_arguments_are_shown_in_part():
    world = World(work=changed_args(b"[" + b"1" * 10_000 + b"]"))
    world.start()
    reload(world, changed_args(b"[]"))
    world.complete(0)
    assert "1… (10002 bytes)" in world.run().error.message
    assert len(world.run().error.message) < 2 * SHOWN_BYTES_MAX + 500


@pytest.mark.parametrize("asked_late", [False, True])
def test_code_that_waits_for_what_the_history_gave_up_is_blocked_and_does_not_hang(asked_late):
    def gives_up(s, args):
        step, limit = s.step("charge"), s.sleep(100, "timeout")
        yield {step, limit}
        s.give_up(step)
        yield {s.signal("go")}

    def waits(s, args):
        if asked_late:
            yield {s.signal("go")}
        yield {s.step("charge")}

    world = World(work=gives_up)
    world.start()
    world.fire(world.of(SetTimer)[0].timer)
    assert "StepCancelled" in kinds(world.decide(100))
    reload(world, waits)
    world.send(SignalWorkflow(name="go"))
    assert "RunBlocked" in kinds(world.decide())
    assert "decision 0, step:charge:\n  history:   it was given up" in world.run().error.message
    reload(world, gives_up)
    world.partition.recover("w")
    assert kinds(world.decide()) == ["RunUnblocked", "SignalTaken", "RunCompleted"]


def test_code_that_never_waits_for_what_was_given_up_goes_on():
    def gives_up(s, args):
        step, limit = s.step("charge"), s.sleep(100, "timeout")
        yield {step, limit}
        s.give_up(step)
        yield {s.signal("go")}
        return b"1"

    world = World(work=gives_up)
    world.start()
    world.fire(world.of(SetTimer)[0].timer)
    world.decide(100)
    world.partition.evict("w")
    world.send(SignalWorkflow(name="go"))
    assert kinds(world.decide()) == ["SignalReceived", "SignalTaken", "RunCompleted"]


def test_an_early_outcome_that_nobody_waits_for_any_more_stays_early():
    def drops(s, args):
        yield {s.sleep(10)}
        s.give_up(s.step("charge"))
        yield {s.step("ship")}
        return b"1"

    world = half_done()
    reload(world, drops)
    world.send(SignalWorkflow(name="hello"))
    world.decide()
    world.fire(world.of(SetTimer)[0].timer)
    assert kinds(world.decide(10)) == ["TimerFired"]
    assert kinds(world.complete(1)) == ["StepCompleted", "RunCompleted"]


def test_a_history_knows_only_its_current_run():
    world = World(work=one_step)
    world.start()
    world.complete(0, b"first")
    world.start(if_exists="restart")
    execution = Execution(Run(workflow_id="w"), at=T0)
    for each in world.history:
        execution.run.fold(each)
    execution.code = script = Script(one_step, execution, execution.run)
    execution.replay(world.history)
    assert script.seen == [] and execution.flush() == ([], [])


def test_a_fingerprint_tells_arguments_apart_in_64_bits():
    assert fingerprint(b"[1]") == fingerprint(b"[1]") != fingerprint(b"[2]")
    assert -(2**63) <= fingerprint(b"") < 2**63


# -- effects of one turn that cancel out -------------------------------------------------------------------------------

TIMER = TimerRecord(workflow_id="w", kind="sleep", run=1, number=0, attempt=0, fire_at=5)
TASK = StepTask(
    workflow_id="w", run=1, number=3, attempt=2, workflow="work", step="s", name="s", args=b"[]", scheduled_at=0
)
PAIRS: dict[str, tuple[list[Effect], list[int]]] = {
    "nothing was given up": ([SetTimer(TIMER), StartAttempt(1, 0, 1)], [0, 1]),
    "a timer set and dropped": ([SetTimer(TIMER), StartAttempt(1, 1, 1), DropTimer(TIMER)], [1]),
    "a timer of an earlier turn": ([DropTimer(TIMER)], [0]),
    "a stale timer dropped, then one of its name set": ([DropTimer(TIMER), SetTimer(TIMER)], [0, 1]),
    "set, dropped and set again": ([SetTimer(TIMER), DropTimer(TIMER), SetTimer(TIMER)], [2]),
    "an attempt started and cancelled": ([StartAttempt(1, 3, 2), CancelAttempt(1, 3)], []),
    "a start recorded and cancelled": ([RecordStart(1, 3, 2), CancelAttempt(1, 3)], []),
    "the attempt of the run before cancelled, that of this one started": (
        [CancelAttempt(1, 0), StartAttempt(2, 0, 1)],
        [0, 1],
    ),
    "an attempt put on a queue and cancelled": ([DispatchAttempt("gpu", TASK), CancelAttempt(1, 3)], []),
    "another step's": ([StartAttempt(1, 3, 2), CancelAttempt(1, 4)], [0, 1]),
    "others are not touched": ([PublishStatus(None), DropTimer(TIMER)], [0, 1]),
}


@pytest.mark.parametrize(("effects", "left"), PAIRS.values(), ids=PAIRS)
def test_what_was_begun_and_given_up_in_one_turn_has_no_effect(effects, left):
    assert _without_pairs(effects) == [effects[place] for place in left]


def test_a_timeout_that_was_not_needed_never_reaches_the_timers_topic():
    def work(s, args):
        yield {s.step("charge")}
        wait, limit = s.signal("go"), s.sleep(100, "timeout")
        yield {wait, limit}
        s.give_up(limit)
        s.give_up(s.step("ship"))
        return b""

    world = World(work=work)
    world.start()
    world.send(SignalWorkflow(name="go"))
    world.complete(0)
    assert world.run().state == "completed"
    assert world.of(SetTimer, DropTimer, StartAttempt, CancelAttempt) == []


def test_code_of_a_run_that_was_stopped_from_outside_is_freed_and_sees_nothing_of_it():
    world = World(work=one_step)
    world.start()
    world.send(TerminateWorkflow())
    world.decide()
    (script,) = world.scripts
    assert script.closed and script.seen == []


def test_code_sees_nothing_of_attempts_between_a_step_and_its_outcome():
    world = World(work=one_step)
    world.start()
    world.outcome(StepAttemptFailed(number=0, attempt=1, error=ERROR, retry_at=T0))
    world.decide()
    assert world.scripts[0].seen == []
