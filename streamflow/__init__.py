"""streamflow: durable workflows in plain asyncio Python, kept in the Kafka that you already run, or in one SQLite file.

Names are looked up when they are first used, so that importing a part of the package does not load the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if not __debug__:
    raise RuntimeError(
        "streamflow does not run under python -O or PYTHONOPTIMIZE: its assertions guard the log against damage; "
        "start python without them"
    )

if TYPE_CHECKING:
    from streamflow import testing as testing
    from streamflow.client import Client, Handle
    from streamflow.core.retry import Retry
    from streamflow.errors import (
        CommandRejected,
        CorruptLog,
        ErrorInfo,
        Fenced,
        InvalidArguments,
        NonDeterminismError,
        NonRetryable,
        NotInWorkflow,
        PayloadTooLarge,
        RequestError,
        RetryAfter,
        SignalError,
        StepFailed,
        StreamflowError,
        Unavailable,
        WorkflowCancelled,
        WorkflowError,
        WorkflowExists,
        WorkflowFailed,
        WorkflowNotFound,
        WorkflowTerminated,
    )
    from streamflow.projections.views import (
        HistoryEvent,
        Page,
        RunStatus,
        StepView,
    )
    from streamflow.serve import connect
    from streamflow.workflow.app import App
    from streamflow.workflow.context import (
        WorkflowInfo,
        continue_as_new,
        info,
        log,
        now,
        progress,
        promise,
        random,
        sleep_until,
        start,
        uuid4,
        wait_signal,
    )
    from streamflow.workflow.definitions import Registry, Step, Workflow
    from streamflow.workflow.stepinfo import StepInfo, heartbeat, step_info

_PLACES: Final = {
    "streamflow.client": "Client Handle",
    "streamflow.core.retry": "Retry",
    "streamflow.errors": (
        "CommandRejected CorruptLog ErrorInfo Fenced InvalidArguments NonDeterminismError NonRetryable NotInWorkflow "
        "PayloadTooLarge RequestError RetryAfter SignalError StepFailed StreamflowError Unavailable WorkflowCancelled "
        "WorkflowError WorkflowExists WorkflowFailed WorkflowNotFound WorkflowTerminated"
    ),
    "streamflow.projections.views": "HistoryEvent Page RunStatus StepView",
    "streamflow.serve": "connect",
    "streamflow.workflow.app": "App",
    "streamflow.workflow.context": (
        "WorkflowInfo continue_as_new info log now progress promise random sleep_until start uuid4 wait_signal"
    ),
    "streamflow.workflow.definitions": "Registry Step Workflow",
    "streamflow.workflow.stepinfo": "StepInfo heartbeat step_info",
}
_HOME: Final = {name: module for module, names in _PLACES.items() for name in names.split()}

__version__: Final = "0.1.0"
__all__ = [
    "App",
    "Client",
    "CommandRejected",
    "CorruptLog",
    "ErrorInfo",
    "Fenced",
    "Handle",
    "HistoryEvent",
    "InvalidArguments",
    "NonDeterminismError",
    "NonRetryable",
    "NotInWorkflow",
    "Page",
    "PayloadTooLarge",
    "Registry",
    "RequestError",
    "Retry",
    "RetryAfter",
    "RunStatus",
    "SignalError",
    "Step",
    "StepFailed",
    "StepInfo",
    "StepView",
    "StreamflowError",
    "Unavailable",
    "Workflow",
    "WorkflowCancelled",
    "WorkflowError",
    "WorkflowExists",
    "WorkflowFailed",
    "WorkflowInfo",
    "WorkflowNotFound",
    "WorkflowTerminated",
    "__version__",
    "connect",
    "continue_as_new",
    "heartbeat",
    "info",
    "log",
    "now",
    "progress",
    "promise",
    "random",
    "sleep_until",
    "start",
    "step_info",
    "testing",
    "uuid4",
    "wait_signal",
]


def __getattr__(name: str) -> Any:
    if name == "testing":
        return import_module("streamflow.testing")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(home), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
