"""What one command or one outcome does to one run.

Rules of this file:

- An outcome counts only for the attempt that runs now, a timer only while it is pending: everything else is dropped.
- A refused command is a value (`Rejected`), never an exception, and changes nothing.
- Nothing of a run is looked at but its own state: which runs there are, and what becomes a turn, is `partition.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias, assert_never

from msgspec import Struct
from msgspec.structs import replace

from streamflow.core.commands import (
    ATTACHED,
    CancelWorkflow,
    CleanupWorkflow,
    Command,
    FireTimer,
    Query,
    ReportAttempt,
    SignalWorkflow,
    StartWorkflow,
    TerminateWorkflow,
)
from streamflow.core.effects import (
    DropTimer,
    TimerRecord,
)
from streamflow.core.events import (
    CancelRequested,
    RunCancelled,
    RunCreated,
    RunDeleted,
    RunFailed,
    RunStarted,
    RunTerminated,
    SignalReceived,
    StepAttemptFailed,
    StepCompleted,
    StepDue,
    StepFailed,
    StepStarted,
    TimerFired,
    instant,
)
from streamflow.core.machines.run import Run, RunState
from streamflow.core.machines.step import StepState
from streamflow.core.replay import Code, Execution
from streamflow.core.reports import outcome_of
from streamflow.errors import ErrorInfo

StepOutcome: TypeAlias = StepStarted | StepCompleted | StepFailed | StepAttemptFailed
CodeFactory: TypeAlias = Callable[[Execution, Run], Code]


class Rejected(Struct, frozen=True):
    """A command that cannot be: `type` is the `RequestError` to raise at the sender."""

    type: str
    message: str


class Inputs:
    """Applies commands and outcomes to executions. `late` counts the outcomes from queues that nobody awaited."""

    def __init__(self, code_of: Callable[[str], CodeFactory | None], timeout_of: Callable[[str], int | None]) -> None:
        self.code_of = code_of
        self.timeout_of = timeout_of  # milliseconds, of a start that says none itself
        self.late = 0

    def outcome(self, execution: Execution, run_number: int, outcome: StepOutcome) -> bool:
        """Take what became of an attempt; False when nobody awaits it any more."""
        run = execution.run
        step = run.step(outcome.number)
        if run.run != run_number or step is None or not step.accepts(outcome.attempt):
            return False
        if type(outcome) is StepStarted:
            # A blocked run has no code that could run the attempt: its start must not be used up.
            if step.state is StepState.OPEN and run.state is RunState.RUNNING:
                execution.take(outcome)
        elif type(outcome) is StepAttemptFailed:
            execution.take(replace(outcome, retry_at=instant(outcome.retry_at)))
        else:
            execution.take(outcome)
        return True

    def _report(self, execution: Execution, report: ReportAttempt) -> None:
        """An attempt on a queue has ended, says whoever ran it; late or again it has no effect."""
        step = execution.run.step(report.number)
        # Of an attempt that the owner runs itself only its own executor knows what became of it.
        is_remote = step is not None and step.queue is not None and report.scheduled_at in (0, step.scheduled_at)
        if not is_remote or not self.outcome(execution, report.run, outcome_of(report, execution.at)):
            self.late += 1

    # -- commands ----------------------------------------------------------------------------------------------------

    def command(self, execution: Execution, command: Command) -> Rejected | bytes | None:
        """Apply a command: the value of its answer, why it is refused, or None where nobody asks."""
        run = execution.run
        body = command.body
        assert not isinstance(body, Query), "a query changes nothing: it is answered without the core"
        if isinstance(body, FireTimer):
            self.timer(execution, body)
            return None
        if isinstance(body, ReportAttempt):
            self._report(execution, body)
            return None
        if command.command_id in run.commands:
            return b"null" if not isinstance(body, CleanupWorkflow) else b"true"
        if isinstance(body, StartWorkflow):
            return self._start(execution, body)
        if run.state is RunState.NONE or run.state is RunState.DELETED:
            return Rejected("WorkflowNotFound", f"there is no run {run.workflow_id}: check the id, or start it first")
        if isinstance(body, CleanupWorkflow):
            return self._cleanup(execution, body)
        if run.is_closed:
            doing = DOING[type(body)]
            return Rejected(
                "CommandRejected",
                f"run {run.workflow_id} is {run.state}: only an open run can be {doing}; start a new one",
            )
        match body:
            case CancelWorkflow():
                self._cancel(execution)
            case TerminateWorkflow(reason=reason):
                execution.take(RunTerminated(reason=reason))
            case SignalWorkflow(name=name, value=value, error=error):
                signal = run.mailbox.received
                execution.take(SignalReceived(signal=signal, name=name, value=value, error=error))
            case _:
                assert_never(body)
        return b"null"

    def _start(self, execution: Execution, body: StartWorkflow) -> Rejected | bytes:
        run = execution.run
        if run.state is not RunState.NONE and run.state is not RunState.DELETED:
            if run.workflow != body.workflow:
                return Rejected(
                    "WorkflowExists",
                    f"run {run.workflow_id} is of workflow {run.workflow}, not {body.workflow}: choose another id",
                )
            if body.if_exists == "error":
                return Rejected(
                    "WorkflowExists",
                    f"run {run.workflow_id} exists already, {run.state}: choose another id, or if_exists='attach'",
                )
            if body.if_exists != "restart" or not run.is_closed:
                return ATTACHED
        if self.code_of(body.workflow) is None:
            return Rejected(
                "WorkflowNotFound",
                f"no workflow {body.workflow} on this worker: register it on the app that the worker serves, "
                f"or check the name (run {run.workflow_id} was not started)",
            )
        start_at = body.start_at if body.delay_ms is None else execution.at + body.delay_ms
        start_at = None if start_at is None else instant(start_at)
        timeout_ms = self.timeout_of(body.workflow) if body.timeout_ms is None else body.timeout_ms
        begins_at = execution.at if start_at is None else max(start_at, execution.at)
        execution.restart()
        execution.take(
            RunCreated(
                workflow=body.workflow,
                args=body.args,
                run=run.run + 1,
                start_at=start_at,
                timeout_ms=timeout_ms,
                deadline_at=None if timeout_ms is None else instant(begins_at + timeout_ms),
                context=body.context,
            )
        )
        if start_at is None:
            self._begin(execution)
        return b"null"

    def _begin(self, execution: Execution) -> None:
        """The run's code begins."""
        attach_code(execution, self.code_of)  # where there is none, the caller finds the execution diverged
        execution.take(RunStarted())

    def _cancel(self, execution: Execution) -> None:
        run = execution.run
        if run.state is RunState.SCHEDULED:
            execution.take(RunCancelled())
        elif not run.cancel_requested:
            execution.take(CancelRequested())

    def _cleanup(self, execution: Execution, body: CleanupWorkflow) -> bytes:
        if not execution.run.is_closed:
            if not body.force:
                return b"false"
            execution.take(RunTerminated(reason="cleaned up"))
        execution.take(RunDeleted())
        return b"true"

    def timer(self, execution: Execution, fired: FireTimer) -> None:
        """A timer is due: ignore it unless it is pending, and then have its record dropped."""
        run = execution.run
        pending = run.run == fired.run and run.timer_pending(fired.kind, fired.number, fired.attempt)
        # Another instant: it is of a run that was cleaned up before this one began under its id.
        if not pending or run.timer_due_at(fired.kind, fired.number) != fired.fire_at:
            stale = TimerRecord(
                workflow_id=run.workflow_id,
                kind=fired.kind,
                run=fired.run,
                number=fired.number,
                attempt=fired.attempt,
                fire_at=fired.fire_at,
            )
            execution.effects.append(DropTimer(stale))
            return
        if run.timer_due_at(fired.kind, fired.number) > execution.at:
            return  # somebody else's command, or a clock far ahead: the service sends it again when it is due
        match fired.kind:
            case "start":
                self._begin(execution)
            case "deadline":
                execution.take(RunFailed(error=_deadline_error(run)))
            case "sleep":
                execution.take(TimerFired(number=fired.number))
            case "retention":
                execution.take(RunDeleted())
            case _:
                execution.take(StepDue(number=fired.number, attempt=fired.attempt))


DOING: Final[Mapping[type[Struct], str]] = {
    CancelWorkflow: "cancelled",
    TerminateWorkflow: "terminated",
    SignalWorkflow: "signalled",
}


def attach_code(execution: Execution, code_of: Callable[[str], CodeFactory | None]) -> bool:
    """Give the execution its workflow's code; without any it diverges."""
    run = execution.run
    factory = code_of(run.workflow)
    if factory is None:
        execution.diverge(
            f"run {run.workflow_id} is of workflow {run.workflow}, which this worker's app does not have: "
            f"start a worker whose app registers it"
        )
        return False
    execution.code = factory(execution, run)
    return True


def _deadline_error(run: Run) -> ErrorInfo:
    return ErrorInfo(type="TimeoutError", message=f"run {run.workflow_id} did not end within its timeout")
