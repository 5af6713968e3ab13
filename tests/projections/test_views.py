"""Turns and statuses become views: every kind of step, every state, every payload."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from streamflow.core import events as e
from streamflow.core.effects import StatusRecord
from streamflow.errors import ErrorInfo
from streamflow.projections.views import HistoryEvent, StepView, history_events, moment, status_view, step_views

AT = 1_700_000_000_000
BOOM = ErrorInfo("ValueError", "boom")


def turns(*groups: list[e.Event]) -> list[e.Turn]:
    """One turn per group, a second apart."""
    return [
        e.Turn(workflow_id="w", turn=1 + n, term=1, seq=1 + n, at=AT + 1000 * n, consumed=0, events=group)
        for n, group in enumerate(groups)
    ]


def at(seconds: float) -> datetime:
    """That many seconds after the first turn."""
    return datetime.fromtimestamp(AT / 1000 + seconds, UTC)


def created(run: int = 1) -> e.RunCreated:
    return e.RunCreated(workflow="fulfil", args=b'["o-1"]', run=run)


def scheduled(number: int = 0, start_at: int | None = None) -> e.StepScheduled:
    return e.StepScheduled(number=number, name="charge", args=b'["o-1",5]', fingerprint=0, start_at=start_at)


def only(*groups: list[e.Event]) -> StepView:
    """The one step of these turns."""
    (step,) = step_views(turns(*groups))
    return step


def test_a_step_that_completes():
    step = only(
        [created(), e.RunStarted(), scheduled()],
        [e.StepCompleted(number=0, attempt=1, result=b'{"ok":true}', started_at=AT + 200)],
    )
    assert step == StepView(
        number=0,
        name="charge",
        kind="step",
        state="completed",
        args=["o-1", 5],
        result={"ok": True},
        error=None,
        attempts=1,
        scheduled_at=at(0),
        started_at=at(0.2),
        closed_at=at(1),
        next_attempt_at=None,
    )


def test_a_step_between_attempts():
    failed = e.StepAttemptFailed(number=0, attempt=1, error=BOOM, retry_at=AT + 5000, started_at=AT + 100)
    step = only([created(), scheduled()], [failed])
    assert (step.state, step.attempts, step.error) == ("backing_off", 1, BOOM)
    assert (step.started_at, step.next_attempt_at, step.closed_at) == (at(0.1), at(5), None)
    again = only([created(), scheduled()], [failed], [e.StepDue(number=0, attempt=2)])
    assert (again.state, again.attempts, again.started_at, again.next_attempt_at) == ("running", 2, at(0.1), None)
    done = only(
        [created(), scheduled()],
        [failed],
        [e.StepDue(number=0, attempt=2)],
        [e.StepCompleted(number=0, attempt=2, result=b"1", started_at=AT + 2500)],
    )
    assert (done.state, done.attempts, done.error, done.started_at) == ("completed", 2, None, at(0.1))
    lost = only([created(), scheduled()], [e.StepFailed(number=0, attempt=1, error=BOOM)])
    assert (lost.state, lost.error, lost.closed_at, lost.started_at) == ("failed", BOOM, at(1), at(0))


def test_a_delayed_step_has_not_started():
    step = only([created(), scheduled(start_at=AT + 9000)])
    assert (step.state, step.attempts, step.started_at, step.next_attempt_at) == ("scheduled", 0, None, at(9))
    begun = only([created(), scheduled(start_at=AT + 1000)], [e.StepDue(number=0, attempt=1)])
    assert (begun.state, begun.attempts, begun.started_at, begun.next_attempt_at) == ("running", 1, at(1), None)


def test_an_at_most_once_step_runs_from_its_recorded_start():
    step = only([created(), scheduled()], [e.StepStarted(number=0, attempt=1)])
    assert (step.state, step.attempts) == ("running", 1)


def test_sleeps_and_timeouts():
    set_ = e.TimerSet(number=0, name="timeout", fire_at=AT + 5000)
    waiting = only([created(), set_])
    assert (waiting.kind, waiting.name, waiting.state, waiting.args) == ("sleep", "timeout", "waiting", [])
    assert (waiting.next_attempt_at, waiting.attempts) == (at(5), 0)
    assert only([created(), set_], [e.TimerFired(number=0)]).state == "completed"
    cancelled = only([created(), set_], [e.TimerCancelled(number=0)])
    assert (cancelled.state, cancelled.closed_at, cancelled.next_attempt_at) == ("cancelled", at(1), None)


def test_signals():
    awaited = e.SignalAwaited(number=0, name="approved")
    assert (only([created(), awaited]).kind, only([created(), awaited]).state) == ("signal", "waiting")
    taken = only(
        [created(), e.SignalReceived(signal=0, name="other", value=b"1")],
        [awaited],
        [e.SignalReceived(signal=1, name="approved", value=b"true"), e.SignalTaken(number=0, signal=1)],
    )
    assert (taken.name, taken.state, taken.result, taken.closed_at) == ("approved", "completed", True, at(2))
    failed = only(
        [created(), awaited],
        [e.SignalReceived(signal=0, name="approved", error="no"), e.SignalTaken(number=0, signal=0)],
    )
    assert (failed.state, failed.error) == ("failed", ErrorInfo("streamflow.errors.SignalError", "no"))
    assert only([created(), awaited], [e.SignalWaitCancelled(number=0)]).state == "cancelled"


@pytest.mark.parametrize(
    "end", [e.RunCompleted(result=b"1"), e.RunFailed(error=BOOM), e.RunCancelled(), e.RunTerminated()], ids=repr
)
def test_what_a_closed_run_still_waited_for_is_cancelled(end: e.Event):
    steps = step_views(
        turns([created(), scheduled(0), scheduled(1)], [e.StepCompleted(number=0, attempt=1, result=b"1")], [end])
    )
    assert [(step.state, step.closed_at) for step in steps] == [("completed", at(1)), ("cancelled", at(2))]


def test_only_the_newest_run_counts():
    steps = step_views(turns([created(), scheduled(0), scheduled(1)], [e.RunCancelled()], [created(2), scheduled(0)]))
    assert [(step.number, step.state) for step in steps] == [(0, "running")]


def test_a_step_that_was_cancelled():
    assert only([created(), scheduled()], [e.StepCancelled(number=0)]).state == "cancelled"


def test_history_shows_every_event_of_every_run():
    shown = history_events(
        turns([created(), e.RunStarted()], [e.RunFailed(error=BOOM)], [created(2), e.ProgressSet(value=b"[1]")])
    )
    assert [(event.turn, event.type) for event in shown] == [
        (1, "RunCreated"),
        (1, "RunStarted"),
        (2, "RunFailed"),
        (3, "RunCreated"),
        (3, "ProgressSet"),
    ]
    assert shown[0].fields["args"] == ["o-1"]
    assert shown[2] == HistoryEvent(
        2, at(1), "RunFailed", {"error": {"type": "ValueError", "message": "boom", "traceback": ""}}
    )
    assert shown[4].fields == {"value": [1]}


@pytest.mark.parametrize("event", e.EVENTS, ids=lambda event: event.__name__)
def test_every_event_can_be_folded_and_shown(event: type[e.Event]):
    values: dict[str, Any] = {"error": BOOM, "name": "x", "workflow": "w", "args": b"[]", "result": b"1", "value": b"1"}
    made = event(**{name: values.get(name, 0) for name in event.__struct_fields__ if name not in {"start_at"}})
    before: list[e.Event] = [created(), scheduled(0), e.SignalReceived(signal=0, name="x")]
    assert history_events(turns(before, [made]))[-1].type == event.__name__
    assert isinstance(step_views(turns(before, [made])), list)


def record(**changes: Any) -> StatusRecord:
    fields: dict[str, Any] = {
        "workflow_id": "o-1",
        "workflow": "fulfil",
        "run": 1,
        "turn": 2,
        "state": "running",
        "args": b'["o-1"]',
        "created_at": AT,
        "started_at": AT + 1000,
        **changes,
    }
    return StatusRecord(**fields)


def test_a_status():
    status = status_view(record(progress=b'{"done":3}', context=b'"ctx"'))
    assert (status.id, status.workflow, status.run, status.turn, status.state) == ("o-1", "fulfil", 1, 2, "running")
    assert (status.args, status.progress, status.context, status.result) == (["o-1"], {"done": 3}, "ctx", None)
    assert (status.created_at, status.started_at, status.closed_at) == (at(0), at(1), None)
    assert not status.is_closed
    assert status_view(record(state="failed")).is_closed


def test_waiting_on_is_in_words():
    waiting = [
        f"sleep until {AT}",
        f"start until {AT + 1}",
        f"step charge (attempt 2 at {AT})",
        f"step until {AT}",
        f"signal sleep until {AT}",
        "and 7 more",
        f"timeout until {10**17}",
    ]
    assert status_view(record(waiting_on=waiting)).waiting_on == [
        "sleep until 2023-11-14T22:13:20.000Z",
        "start until 2023-11-14T22:13:20.001Z",
        "step charge (attempt 2 at 2023-11-14T22:13:20.000Z)",
        f"step until {AT}",
        f"signal sleep until {AT}",
        "and 7 more",
        "timeout until 9999-12-31T23:59:59.999Z",
    ]


@pytest.mark.parametrize("payload", [b"", b"{", b"\xff\xfe", b'"\\ud800"', b"nonsense"])
def test_what_is_no_json_is_shown_as_text(payload: bytes):
    shown = status_view(record(args=payload)).args
    assert shown == {"not_json": payload.decode("utf-8", "backslashreplace")}


def test_an_instant_that_a_datetime_cannot_say():
    assert moment(10**18).year == 9999
    assert moment(-(10**18)).year == 1
    assert moment(AT).tzinfo is UTC
