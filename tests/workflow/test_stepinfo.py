"""What a step knows of itself."""

from __future__ import annotations

import pytest

from streamflow.errors import InvalidArguments
from streamflow.workflow.stepinfo import StepInfo, heartbeat, running, step_info


def made(*, run: int = 1, number: int = 3, attempt: int = 1) -> StepInfo:
    return StepInfo(workflow_id="w", run=run, step="charge", number=number, attempt=attempt)


def test_the_idempotency_key_is_that_of_the_step_and_not_of_the_attempt():
    assert made().idempotency_key == made(attempt=2).idempotency_key == "w/1/3"
    assert len({made().idempotency_key, made(run=2).idempotency_key, made(number=4).idempotency_key}) == 3


def test_an_attempt_is_not_cancelled_until_it_is():
    for threads in (False, True):
        info = made()
        if threads:
            info.give_threads()
        assert not info.cancelled
        info.cancel()
        info.cancel()
        assert info.cancelled


def test_a_heartbeat_notes_how_far_the_attempt_has_come():
    with pytest.raises(InvalidArguments, match="only inside a step"):
        heartbeat(1)
    info = made()
    token = running.set(info)
    assert info.details is None
    heartbeat({"rows": 7})
    assert step_info().details == {"rows": 7}
    running.reset(token)


def test_outside_of_a_step_there_is_nothing_to_tell():
    with pytest.raises(InvalidArguments, match="only inside a step"):
        step_info()
    token = running.set(made())
    assert step_info().step == "charge"
    running.reset(token)
