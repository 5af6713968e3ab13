"""What a step worker says of an attempt, and what the owner makes of it."""

from __future__ import annotations

from streamflow.core.commands import ReportAttempt
from streamflow.core.events import INSTANT_MS_MAX, StepAttemptFailed, StepCompleted, StepFailed
from streamflow.core.reports import outcome_of
from tests.core.scripted import ERROR

AT = 1_000


def report(**fields):
    return ReportAttempt(run=1, number=4, attempt=2, **fields)


def test_without_an_error_it_completed():
    done = StepCompleted(number=4, attempt=2, result=b"5", started_at=900)
    assert outcome_of(report(result=b"5", started_at=900), AT) == done
    assert outcome_of(report(), AT) == StepCompleted(number=4, attempt=2, result=b"null", started_at=0)


def test_with_an_error_it_failed_for_good_or_is_tried_again_later():
    assert outcome_of(report(error=ERROR, result=b"5"), AT) == StepFailed(number=4, attempt=2, error=ERROR)
    again = StepAttemptFailed(number=4, attempt=2, error=ERROR, retry_at=1_050)
    assert outcome_of(report(error=ERROR, retry_after_ms=50), AT) == again


def test_a_clock_ahead_and_delays_beyond_all_bounds_are_held_against_the_owners_time():
    assert outcome_of(report(started_at=AT + 1), AT).started_at == AT
    assert outcome_of(report(started_at=-1), AT).started_at == 0
    for delay, retry_at in ((-5, AT), (1 << 62, INSTANT_MS_MAX)):
        failed = outcome_of(report(error=ERROR, retry_after_ms=delay), AT)
        assert isinstance(failed, StepAttemptFailed) and failed.retry_at == retry_at
