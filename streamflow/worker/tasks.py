"""Attempts on a queue, as their topic has them: what is to be called, and the command that answers."""

from __future__ import annotations

from typing import assert_never

from streamflow.codec.avro import decode_task, encode_command
from streamflow.core.commands import Command, ReportAttempt
from streamflow.core.effects import StepTask
from streamflow.core.events import StepAttemptFailed, StepCompleted, StepFailed
from streamflow.core.retry import Retry
from streamflow.ids import check_id, partition_of
from streamflow.logs.base import COMMANDS, Outgoing
from streamflow.metrics import UNKNOWN
from streamflow.worker.executor import AttemptOutcome
from streamflow.workflow.code import StepCall
from streamflow.workflow.definitions import DEFAULT_RETRY, Registry, Step
from streamflow.workflow.remote import decode_retry


def read_task(value: bytes | None, app: Registry) -> tuple[StepTask, StepCall, bool]:
    """The attempt, how it is called here, and whether this app has its step; `ValueError` says why it is none.

    Anyone may write to the topic, so nothing of it is trusted.
    """
    task = decode_task(value or b"")
    check_id(task.workflow_id, what="workflow_id")
    step = app.steps.get(task.step)
    workflow = app.workflows.get(task.workflow)
    known = step is not None
    if step is None:
        step = Step(
            _not_here, name=UNKNOWN, retry=None, timeout=None, queue=None, process=False, raises=(), at_most_once=False
        )
    app_retry: Retry = getattr(app, "retry", DEFAULT_RETRY)
    retry = step.retry or (None if workflow is None else workflow.retry) or app_retry
    call = StepCall(
        step=step,
        name=task.name,
        retry=retry if task.retry is None else decode_retry(task.retry),
        timeout=None if task.timeout_ms is None else task.timeout_ms / 1000,
        delay=None,
        at=None,
        queue=None,
        check_args=True,
    )
    return task, call, known


async def _not_here() -> None:
    """Stands for a step that this worker's app does not have; it is never called."""


def answer_to(task: StepTask, outcome: AttemptOutcome, *, now: int, partitions: int) -> Outgoing:
    """The command that tells the run's owner what became of the attempt. Its id is that of the attempt."""
    match outcome:
        case StepCompleted(result=result, started_at=started_at):
            body = ReportAttempt(
                run=task.run,
                number=task.number,
                attempt=task.attempt,
                result=result,
                started_at=started_at,
                scheduled_at=task.scheduled_at,
            )
        case StepFailed(error=error, started_at=started_at):
            body = ReportAttempt(
                run=task.run,
                number=task.number,
                attempt=task.attempt,
                error=error,
                started_at=started_at,
                scheduled_at=task.scheduled_at,
            )
        case StepAttemptFailed(error=error, retry_at=retry_at, started_at=started_at):
            body = ReportAttempt(
                run=task.run,
                number=task.number,
                attempt=task.attempt,
                error=error,
                retry_after_ms=max(retry_at - now, 0),
                started_at=started_at,
                scheduled_at=task.scheduled_at,
            )
        case _:
            assert_never(outcome)
    command = Command(
        command_id=f"{task.workflow_id}\0{task.run}.outcome.{task.number}.{task.attempt}",
        workflow_id=task.workflow_id,
        sent_at=now,
        body=body,
    )
    partition = partition_of(task.workflow_id, partitions)
    return Outgoing(COMMANDS, partition, task.workflow_id.encode(), encode_command(command))
