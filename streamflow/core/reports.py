"""What step workers report: from the command that anybody may have sent to the outcome of an attempt.

Nothing of it is trusted but what it says of the attempt: the clock of the sender may differ from ours, so instants are
held against the owner's, and the delay before another attempt counts from when the report is taken.
"""

from __future__ import annotations

from typing import TypeAlias

from streamflow.core.commands import ReportAttempt
from streamflow.core.events import StepAttemptFailed, StepCompleted, StepFailed, instant

Reported: TypeAlias = StepCompleted | StepFailed | StepAttemptFailed


def outcome_of(report: ReportAttempt, at: int) -> Reported:
    """The outcome that the report means, taken at the instant `at`."""
    started_at = min(instant(report.started_at), at)
    if report.error is None:
        result = b"null" if report.result is None else report.result
        return StepCompleted(number=report.number, attempt=report.attempt, result=result, started_at=started_at)
    if report.retry_after_ms is None:
        return StepFailed(number=report.number, attempt=report.attempt, error=report.error, started_at=started_at)
    return StepAttemptFailed(
        number=report.number,
        attempt=report.attempt,
        error=report.error,
        retry_at=instant(at + max(report.retry_after_ms, 0)),
        started_at=started_at,
    )
