"""Steps on a queue: what the partition sends out, and what it takes from those who ran them."""

from __future__ import annotations

from streamflow.core.commands import CleanupWorkflow, ReportAttempt
from streamflow.core.effects import DispatchAttempt, SetTimer, StartAttempt
from tests.core.programs import on_a_queue
from tests.core.scripted import ERROR, T0, World, kinds


def test_an_attempt_on_a_queue_is_dispatched_and_ends_by_command():
    world = World(work=on_a_queue)
    world.start()
    (sent,) = world.of(DispatchAttempt)
    assert (sent.queue, sent.task.workflow_id, sent.task.number, sent.task.attempt) == ("gpu", "w", 0, 1)
    assert world.statuses[-1].waiting_on == ["step embed on queue gpu"]
    world.owner(term=2).recover("w")
    world.decide()
    assert world.of(DispatchAttempt, StartAttempt) == [], "it is on its topic: a new owner has nothing to start"
    assert world.live().open_attempts == 0, "so the run may leave memory"

    world.send(ReportAttempt(run=1, number=0, attempt=1, error=ERROR, retry_after_ms=50), reply_to=None)
    assert kinds(world.decide()) == ["StepAttemptFailed"]
    (timer,) = [effect.timer for effect in world.of(SetTimer)]
    assert (timer.fire_at, world.statuses[-1].waiting_on) == (T0 + 50, [f"step embed (attempt 2 at {T0 + 50})"])
    world.now = timer.fire_at
    world.fire(timer)
    assert kinds(world.decide()) == ["StepDue"]
    assert [each.task.attempt for each in world.of(DispatchAttempt)] == [2]
    assert world.statuses[-1].waiting_on == ["step embed on queue gpu (attempt 2)"]

    world.send(ReportAttempt(run=1, number=0, attempt=2, result=b"5"), reply_to=None)
    assert kinds(world.decide()) == ["StepCompleted", "RunCompleted"]
    assert world.run().result == b"5"


def test_the_answer_to_an_attempt_of_a_run_that_was_cleaned_up_is_not_for_the_next_one_of_its_id():
    world = World(work=on_a_queue)
    world.start()
    (first,) = world.of(DispatchAttempt)
    world.send(CleanupWorkflow(force=True))
    world.decide()
    world.now += 1
    world.start(id="again")
    second = world.of(DispatchAttempt)[-1]
    assert (second.task.run, second.task.number, second.task.attempt) == (1, 0, 1), "the numbers are the same again"

    late = ReportAttempt(run=1, number=0, attempt=1, result=b"5", scheduled_at=first.task.scheduled_at)
    world.send(late, id="late", reply_to=None)
    assert kinds(world.decide()) == []
    answer = ReportAttempt(run=1, number=0, attempt=1, result=b"6", scheduled_at=second.task.scheduled_at)
    world.send(answer, id="answer", reply_to=None)
    assert kinds(world.decide()) == ["StepCompleted", "RunCompleted"]
    assert world.run().result == b"6"
