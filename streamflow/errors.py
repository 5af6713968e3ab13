"""Every error that streamflow raises, in one tree, sorted by who must act.

    StreamflowError
    ├── WorkflowError            the user's workflow or step ended badly; the run's history says why
    │   ├── WorkflowFailed       .id .error
    │   ├── WorkflowCancelled    .id
    │   ├── WorkflowTerminated   .id .reason
    │   ├── StepFailed           .step .attempts .error
    │   └── SignalError          .name .error
    ├── RequestError             the caller asked for something that cannot be: fix the call
    │   ├── InvalidArguments
    │   │   └── InvalidUrl       of a log, or of what its options name
    │   ├── WorkflowNotFound
    │   ├── WorkflowExists
    │   ├── CommandRejected
    │   └── PayloadTooLarge
    ├── NonDeterminismError      workflow code no longer fits its history: fix the code, the run waits (blocked)
    ├── NotInWorkflow            workflow code tried IO, a thread or a real clock: put it in a step
    ├── Unavailable              the log cannot be reached; nothing was lost; try again
    ├── Fenced                   another worker owns the partition now: stand down (internal)
    └── CorruptLog               the log's bytes are damaged or not ours: page someone

    NonRetryable, RetryAfter     raised *by* a step to steer its retries; never raised by streamflow

A text names the id, what was expected, what was found and what to do next.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error as the log keeps it: `type` is qualified by its module unless built in; `traceback` may be empty."""

    type: str
    message: str
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.type}: {self.message}" if self.message else self.type


class StreamflowError(Exception):
    """The root of everything that streamflow raises."""


class WorkflowError(StreamflowError):
    """A workflow, step or signal ended with an error of the user's code."""


class WorkflowFailed(WorkflowError):
    """The run `id` failed with `error`."""

    def __init__(self, id: str, error: ErrorInfo) -> None:
        super().__init__(id, error)
        self.id = id
        self.error = error

    def __str__(self) -> str:
        return f"workflow {self.id} failed: {self.error}"


class WorkflowCancelled(WorkflowError):
    """The run `id` was cancelled and unwound."""

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self.id = id

    def __str__(self) -> str:
        return f"workflow {self.id} was cancelled"


class WorkflowTerminated(WorkflowError):
    """The run `id` was stopped where it stood."""

    def __init__(self, id: str, reason: str | None = None) -> None:
        super().__init__(id, reason)
        self.id = id
        self.reason = reason

    def __str__(self) -> str:
        return f"workflow {self.id} was terminated" + (f": {self.reason}" if self.reason else "")


class StepFailed(WorkflowError):
    """The step named `step` failed for good after `attempts` attempts; `error` is the last one's."""

    def __init__(self, step: str, attempts: int, error: ErrorInfo) -> None:
        super().__init__(step, attempts, error)
        self.step = step
        self.attempts = attempts
        self.error = error

    def __str__(self) -> str:
        plural = "attempt" if self.attempts == 1 else "attempts"
        return f"step {self.step} failed after {self.attempts} {plural}: {self.error}"


class SignalError(WorkflowError):
    """The signal `name` was sent with `error=`."""

    def __init__(self, name: str, error: str) -> None:
        super().__init__(name, error)
        self.name = name
        self.error = error

    def __str__(self) -> str:
        return f"signal {self.name} was sent as an error: {self.error}"


class RequestError(StreamflowError):
    """What was asked for cannot be done; nothing changed."""


class InvalidArguments(RequestError):
    """A value does not fit its annotation, or an option is out of range."""


class InvalidUrl(InvalidArguments):
    """The URL of a log cannot be used, or a setting in it cannot, whatever the log holds."""


class WorkflowNotFound(RequestError):
    """No run of that id, or no workflow of that name."""


class WorkflowExists(RequestError):
    """A run of that id exists already."""


class CommandRejected(RequestError):
    """The run is in a state in which the command makes no sense."""


class PayloadTooLarge(RequestError):
    """A value is larger than one record may be."""


class NonDeterminismError(StreamflowError):
    """Workflow code asked for something else than its history holds; the run is blocked until fitting code comes."""


class NotInWorkflow(StreamflowError):
    """Workflow code tried IO, a thread, a process or a real clock; the text says to put it in a step."""


class Unavailable(StreamflowError):
    """The log cannot be reached or written now. Nothing that was acknowledged is lost; try again."""


class Fenced(StreamflowError):
    """Somebody else wrote to the partition that this worker thought to own; it stands down."""


class CorruptLog(StreamflowError):
    """The log holds bytes that no version of streamflow wrote there."""


class NonRetryable(StreamflowError):
    """Raise it in a step: no more attempts."""


class RetryAfter(StreamflowError):
    """Raise it in a step: the next attempt comes after `seconds`, whatever the retry policy says."""

    def __init__(self, seconds: float, message: str = "") -> None:
        super().__init__(seconds, message)
        self.seconds = seconds
        self.message = message

    def __str__(self) -> str:
        return self.message or f"retry after {self.seconds} s"
