"""Programs and worlds that several tests of the partition begin with."""

from __future__ import annotations

from streamflow.core.commands import (
    Body,
    CancelWorkflow,
    SignalWorkflow,
    StartWorkflow,
    TerminateWorkflow,
)
from streamflow.core.effects import (
    SetTimer,
    TimerRecord,
)
from streamflow.core.events import StepFailed
from tests.core.scripted import T0, Cancelled, Endless, Failure, World

START = StartWorkflow(workflow="work")


RESTART = StartWorkflow(workflow="work", if_exists="restart")


SIGNAL = SignalWorkflow(name="go", value=b"1")


TO_A_RUN: list[Body] = [CancelWorkflow(), TerminateWorkflow(), SIGNAL]
ENDED = ["completed", "failed", "cancelled", "terminated"]


def one_step(s, args):
    _, outcome = yield {s.step("charge")}
    return getattr(outcome, "result", b"failed")


def on_a_queue(s, args):
    _, outcome = yield {s.step("embed", b"[7]", queue="gpu")}
    return getattr(outcome, "result", b"failed")


def sleeps(s, args):
    yield {s.sleep(500)}
    return b"slept"


def waits(s, args):
    _, received = yield {s.signal("go")}
    return received.value


def ends(s, args):
    """Ends as its arguments say, after one step."""
    yield {s.step("charge")}
    if args == b"failed":
        raise Failure("no")
    return b"1"


def closed(state: str) -> World:
    """A run that ended in that state."""
    world = World(work=ends)
    world.start(args=state.encode())
    if state in ("completed", "failed"):
        world.complete(0)
    else:
        world.send(TerminateWorkflow(reason="enough"))
        world.decide()
    if state == "cancelled":
        world = World(work=ends)
        world.start(start_at=T0 + 10)
        world.send(CancelWorkflow())
        world.decide()
    assert world.run().state == state
    return world


def slept() -> tuple[World, TimerRecord]:
    world = World(work=sleeps)
    world.start()
    return world, world.of(SetTimer)[0].timer


def endless_on_go(s, args):
    yield {s.step("charge")}
    yield {s.signal("go")}
    raise Endless


def careful(s, args):
    _, outcome = yield {s.step("charge", at_most_once=True)}
    return b"failed" if isinstance(outcome, StepFailed) else outcome.result


def stubborn(s):
    while True:
        try:
            yield {s.step("charge")}
        except Cancelled:
            continue
