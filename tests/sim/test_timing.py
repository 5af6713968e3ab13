"""What a run may ask for, when, and what is shown of it: held against programs of a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from streamflow.codec.avro import encode_status
from streamflow.codec.payload import encode_value
from streamflow.core.effects import StatusRecord
from streamflow.core.events import (
    Event,
    RunCompleted,
    RunCreated,
    RunStarted,
    SignalAwaited,
    SignalReceived,
    StepAttemptFailed,
    StepCompleted,
    StepScheduled,
    TimerFired,
    TimerSet,
    Turn,
)
from streamflow.core.retry import Retry
from streamflow.errors import ErrorInfo
from streamflow.logs.base import STATUS
from streamflow.sim import asked, programs
from streamflow.sim.cluster import Cluster
from streamflow.sim.driver import Plan
from streamflow.sim.rules import Violated
from streamflow.sim.shown import Statuses
from streamflow.sim.timing import Timing, bounds_ms
from streamflow.sim.world import World

AT = 1_900_000_000_000
BROKEN = ErrorInfo("streamflow.sim.programs.Broken", "attempt 1 of 1")


def turn(number: int, at: int, *events: Event) -> Turn:
    return Turn(workflow_id="a", turn=number, term=1, seq=number, at=AT + at, consumed=0, events=list(events))


def created(program: programs.Program, **options: Any) -> RunCreated:
    return RunCreated(workflow="play", args=encode_value([program]), **options)


def judge(planned: Plan, *turns: Turn) -> None:
    """Let the rules about time hear these turns. Raises `Violated`."""
    world = World(1)
    timing = Timing(world, {"a": planned})
    for each in turns:
        timing.turn(each, each.events)
    world.close()


def scheduled(number: int, name: str, *args: object, **options: Any) -> StepScheduled:
    return StepScheduled(number=number, name=name, args=encode_value(list(args)), fingerprint=0, **options)


@pytest.mark.parametrize(
    ("fire_at", "wrong"),
    [(3_000, ""), (3_001, ""), (2_999, "2999 ms"), (1_500, "1500 ms"), (3_002, "3002 ms")],
)
def test_a_sleep_is_as_long_as_its_program_says(fire_at: int, wrong: str):
    program = ["sequence", [["sleep", 3.0]]]
    turns = [turn(1, 0, created(program), RunStarted(), TimerSet(number=0, name="sleep", fire_at=AT + fire_at))]
    if wrong:
        with pytest.raises(Violated, match=wrong):
            judge(Plan(program), *turns)
    else:
        judge(Plan(program), *turns, turn(2, fire_at, TimerFired(number=0), RunCompleted(result=b'["slept"]')))


def test_a_run_that_completes_without_its_sleep_is_found():
    program = ["sequence", [["sleep", 3.0]]]
    begins = turn(1, 0, created(program), RunStarted())
    with pytest.raises(Violated, match="never asked for"):
        judge(Plan(program), begins, turn(2, 1, RunCompleted(result=b'["slept"]')))
    begins = turn(1, 0, created(program), RunStarted(), TimerSet(number=0, name="sleep", fire_at=AT + 3_000))
    with pytest.raises(Violated, match="never fired"):
        judge(Plan(program), begins, turn(2, 1, RunCompleted(result=b'["slept"]')))


def test_a_race_may_leave_things_out():
    program = ["sequence", [["race", [["sleep", 3.0], ["work", 1, 0.0, 0]]]]]
    begins = turn(1, 0, created(program), RunStarted(), scheduled(0, "work", 1, 0.0, 0))
    judge(
        Plan(program), begins, turn(2, 1, StepCompleted(number=0, attempt=1, result=b"2"), RunCompleted(result=b"[2]"))
    )


def test_a_wait_takes_a_signal_that_is_there():
    program = ["sequence", [["hurried", "hurried-x", 3.0]]]
    waits = TimerSet(number=0, name="timeout", fire_at=AT + 3_000), SignalAwaited(number=1, name="hurried-x")
    begins = turn(1, 0, created(program), RunStarted(), *waits)
    with pytest.raises(Violated, match="goes on waiting"):
        judge(Plan(program), begins, turn(2, 1, SignalReceived(signal=0, name="hurried-x")))


def test_a_run_begins_when_its_plan_says():
    program: programs.Program = ["sequence", [["chance"]]]
    planned = Plan(program, stop="timeout", delay=5.0, timeout=20.0)
    judge(planned, turn(1, 0, created(program, start_at=AT + 5_000, deadline_at=AT + 25_000)))
    for options in ({}, {"start_at": AT + 5_000}, {"start_at": AT + 5_000, "deadline_at": AT + 20_000}):
        with pytest.raises(Violated, match="planned was"):
            judge(planned, turn(1, 0, created(program, **options)))


@pytest.mark.parametrize(("wait", "wrong"), [(25, ""), (75, ""), (0, "its policy says 25"), (90, "75 ms at most")])
def test_a_failed_attempt_is_followed_by_its_delay(wait: int, wrong: str):
    program = ["sequence", [["work", 1, 0.0, 1]]]
    begins = turn(1, 0, created(program), RunStarted(), scheduled(0, "work", 1, 0.0, 1))
    failed = StepAttemptFailed(number=0, attempt=1, error=BROKEN, retry_at=AT + 10 + wait, started_at=AT + 10)
    if wrong:
        with pytest.raises(Violated, match=wrong):
            judge(Plan(program), begins, turn(2, 10, failed))
    else:
        judge(Plan(program), begins, turn(2, 10, failed))


def test_a_step_is_called_as_often_as_its_program_says_and_ends_as_its_code_does():
    program = ["sequence", [["work", 1, 0.0, 1]]]
    begins = turn(1, 0, created(program), RunStarted(), scheduled(0, "work", 1, 0.0, 1))
    with pytest.raises(Violated, match="does not ask for"):
        judge(Plan(program), begins, turn(2, 1, scheduled(1, "work", 1, 0.0, 1)))
    with pytest.raises(Violated, match="ends with StepCompleted"):
        judge(Plan(program), begins, turn(2, 1, StepCompleted(number=0, attempt=1, result=b"2")))


def test_the_bounds_of_a_delay_hold_those_that_the_product_draws():
    retry = Retry(initial=0.05, factor=1.5, max_delay=0.2)
    for attempt in range(1, 8):
        least, most = bounds_ms(attempt, initial=0.05, factor=1.5, most=0.2, jitter=0.5)
        drawn = [retry.delay(attempt, key) * 1000 for key in range(200)]
        assert least <= min(drawn) < least * 1.2 and most * 0.9 < max(drawn) <= most
    assert bounds_ms(7, initial=0.05, factor=1.5, most=0.2, jitter=0.5) == (100.0, 300.0)


def test_each_kind_of_a_program_asks_for_something():
    kinds: dict[str, programs.Program]
    kinds = {"large": ["large", 2], "group": ["group", [], 0.1], "guarded": ["guarded", ["chance"], "x", 0.0],
             "work": ["work", 1, 0.0, 0], "far": ["far", 1, 0.0, 0], "plain": ["plain", 1, 0],
             "later": ["later", 0.5, 1, 0.0, 0], "fail": ["fail", 1, 0.0], "slow": ["slow", 0.5],
             "once": ["once", 1, 0.0], "sleep": ["sleep", 0.5], "signals": ["signals", "x", 2],
             "hurried": ["hurried", "x", 0.5], "deaf": ["deaf", "x", 0.5], "bounded": ["bounded", 0.5],
             "now": ["now", 0.5], "chance": ["chance"], "line": ["line", [1, 2], 0.0],
             "race": ["race", [["chance"]]], "completed": ["completed", [[1, 0.0]]],
             "shielded": ["shielded", [[1, 0.0]]], "sequence": ["sequence", [["chance"]]],
             "gather": ["gather", [["chance"]]]}  # fmt: skip
    assert set(kinds) == {*programs.LEAVES, *programs.BRANCHES, "large"}
    assert all(asked.asks(program) for program in kinds.values())
    assert [kind for kind, program in kinds.items() if not asked.certain(program)] == ["race"]
    assert asked.asks(["line", [1, 1], 0.0]) == {
        ("step", "work", None, 1, 0.0, 0): 2,
        ("step", "work", None, 2, 0.0, 0): 2,
    }


# -- what is shown ---------------------------------------------------------------------------------------------------


def show(state: str, waiting_on: Sequence[str], *, number: int = 1, progress: bytes | None = None) -> None:
    """Publish a status of a run that sleeps and does a step. Raises `Violated`."""
    world = World(1)
    cluster = Cluster(world, partitions=1)
    statuses = Statuses(cluster)
    program = ["sequence", [["sleep", 3.0], ["work", 1, 0.0, 1]]]
    failed = StepAttemptFailed(number=1, attempt=1, error=BROKEN, retry_at=AT + 50)
    for each in (
        turn(1, 0, created(program), RunStarted(), TimerSet(number=0, name="sleep", fire_at=AT + 3_000),
             scheduled(1, "work", 1, 0.0, 1), failed),
        turn(2, 3_000, TimerFired(number=0)),
    ):  # fmt: skip
        statuses.turn(each, each.events)
    status = StatusRecord(workflow_id="a", workflow="play", run=1, turn=number, state=state, args=b"[]",
                          progress=progress, waiting_on=list(waiting_on), created_at=AT)  # fmt: skip
    cluster.land(STATUS, 0, [(b"a", encode_status(status))])
    world.close()


SLEEP, STEP = f"sleep until {AT + 3_000}", f"step work (attempt 2 at {AT + 50})"


def test_a_status_is_what_its_turn_leaves_to_be_shown():
    show("running", [SLEEP, STEP])
    show("running", [STEP], number=2)


@pytest.mark.parametrize(
    ("state", "waiting_on", "options", "wrong"),
    [
        ("scheduled", [SLEEP, STEP], {}, "the run is running"),
        ("running", [STEP], {}, "says that it waits for"),
        ("running", [STEP, SLEEP], {}, "says that it waits for"),
        ("running", [SLEEP, f"step work (attempt 1 at {AT + 50})"], {}, "attempt 1"),
        ("running", [f"sleep until {AT + 2_000}", STEP], {}, "sleep until"),
        ("running", ["sleep until 2030-03-17T17:46:42.000Z", STEP], {}, "sleep until"),
        ("running", [SLEEP, STEP], {"progress": b"1"}, "shows progress"),
        ("running", [STEP], {"number": 3}, "of no valid turn"),
    ],
)
def test_a_status_that_is_not_is_found(state: str, waiting_on: list[str], options: dict[str, Any], wrong: str):
    with pytest.raises(Violated, match=wrong):
        show(state, waiting_on, **options)


def test_what_clients_see_may_say_the_instant_as_a_date():
    show("running", ["sleep until 2030-03-17T17:46:43.000Z", STEP])
