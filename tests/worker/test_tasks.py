"""Attempts on a queue: how they are called where they are run, and how they are answered."""

from __future__ import annotations

from typing import Any

import pytest

import streamflow as sf
from streamflow.codec.avro import decode_command, encode_task
from streamflow.core.commands import ReportAttempt
from streamflow.core.effects import StepTask
from streamflow.core.events import StepAttemptFailed, StepCompleted, StepFailed
from streamflow.errors import ErrorInfo
from streamflow.ids import partition_of
from streamflow.worker.tasks import answer_to, read_task

ERROR = ErrorInfo("ValueError", "no")
BY = {level: sf.Retry(max_attempts=n) for n, level in enumerate(("app", "workflow", "step"), start=7)}
app = sf.App("shop", retry=BY["app"])


@app.step
async def embed(text: str) -> int:
    return len(text)


@app.step(retry=BY["step"])
async def picky() -> None: ...


@app.workflow
async def flow() -> None: ...


@app.workflow(retry=BY["workflow"])
async def patient() -> None: ...


def task(**fields: Any) -> StepTask:
    known: dict[str, Any] = {"workflow_id": "w", "run": 2, "number": 4, "attempt": 3, "workflow": "flow"}
    return StepTask(**known | {"step": "embed", "name": "embed", "args": b'["x"]', "scheduled_at": 5} | fields)


def test_the_function_is_found_by_its_registered_name_and_the_timeout_is_that_of_the_call():
    found, call, known = read_task(encode_task(task(name="title", timeout_ms=1500)), app)
    assert (found.name, call.step, call.name, call.timeout, known) == ("title", embed, "title", 1.5, True)
    assert read_task(encode_task(task()), app)[1].timeout is None


def test_the_nearest_retry_counts_and_that_of_the_call_travels():
    def retry(**fields: Any) -> sf.Retry:
        return read_task(encode_task(task(**fields)), app)[1].retry

    assert retry() == retry(workflow="elsewhere") == BY["app"]
    assert retry(workflow="patient") == BY["workflow"]
    assert retry(workflow="patient", step="picky") == BY["step"]
    assert retry(step="picky", retry=b'{"max_attempts":2,"initial":0.25}') == sf.Retry(max_attempts=2, initial=0.25)
    assert read_task(encode_task(task()), sf.Registry())[1].retry == sf.Retry()


def test_a_step_that_the_app_does_not_have_is_known_for_that():
    _, call, known = read_task(encode_task(task(step="gone", name="gone")), app)
    assert (known, call.name, call.retry) == (False, "gone", BY["app"])


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"junk",
        encode_task(task())[:-1],
        encode_task(task(workflow_id="")),
        encode_task(task(workflow_id="w" * 256)),
        encode_task(task(retry=b"{")),
        encode_task(task(retry=b"[]")),
        encode_task(task(retry=b'{"on":"Exception"}')),
        encode_task(task(retry=b'{"initial":-1}')),
        encode_task(task(retry=b'{"initial":"x"}')),
    ],
    ids=range(11),
)
def test_what_is_no_attempt_is_refused(value: bytes | None):
    with pytest.raises((ValueError, sf.InvalidArguments)):
        read_task(value, app)


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (StepCompleted(number=4, attempt=3, result=b"1", started_at=6), {"result": b"1"}),
        (StepFailed(number=4, attempt=3, error=ERROR, started_at=6), {"error": ERROR}),
        (
            StepAttemptFailed(number=4, attempt=3, error=ERROR, retry_at=150, started_at=6),
            {"error": ERROR, "retry_after_ms": 50},
        ),
        (
            StepAttemptFailed(number=4, attempt=3, error=ERROR, retry_at=50, started_at=6),
            {"error": ERROR, "retry_after_ms": 0},
        ),
    ],
    ids=["completed", "failed", "again", "again at once"],
)
def test_the_answer_goes_to_the_run_under_an_id_of_the_attempt(outcome: Any, said: dict[str, Any]):
    record = answer_to(task(workflow_id="order-7"), outcome, now=100, partitions=8)
    assert record[:3] == ("commands", partition_of("order-7", 8), b"order-7")
    command = decode_command(record.value or b"")
    assert (command.workflow_id, command.command_id) == ("order-7", "order-7\x002.outcome.4.3")
    assert (command.sent_at, command.reply_to) == (100, None)
    assert command.body == ReportAttempt(run=2, number=4, attempt=3, started_at=6, scheduled_at=5, **said)
