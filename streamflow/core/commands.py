"""Commands: requests to a run that may be rejected. Anyone may write them; the owner of the partition applies them.

Field names are those of `schemas/Command.avsc`. Instants and durations are integers in milliseconds; payloads are JSON
bytes. Every field but the ones that a plain producer must know has a default.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from msgspec import Struct

from streamflow.errors import ErrorInfo

IfExists: TypeAlias = Literal["attach", "error", "restart"]
ATTACHED: Final = b'{"attached":true}'
"""The value of the answer to a start that found its run there already; that of one that started it is null."""

TimerKind: TypeAlias = Literal["start", "deadline", "sleep", "step", "retention"]


class StartWorkflow(Struct, frozen=True, kw_only=True):
    """Start a run of `workflow` under the command's workflow id, now, at `start_at` or `delay_ms` from now."""

    workflow: str
    args: bytes = b"[]"
    start_at: int | None = None
    delay_ms: int | None = None
    timeout_ms: int | None = None
    if_exists: str = "attach"
    context: bytes | None = None


class CancelWorkflow(Struct, frozen=True, kw_only=True):
    """Ask the code to unwind: `CancelledError` is raised at its awaits."""


class TerminateWorkflow(Struct, frozen=True, kw_only=True):
    """Stop the run where it stands; no more of its code runs."""

    reason: str | None = None


class SignalWorkflow(Struct, frozen=True, kw_only=True):
    """Send the run a signal; the command id is what makes sending it twice signal once."""

    name: str
    value: bytes | None = None
    error: str | None = None


class CleanupWorkflow(Struct, frozen=True, kw_only=True):
    """Delete a closed run and all that is known of it; an open one too when forced (it is terminated first)."""

    force: bool = False


class FireTimer(Struct, frozen=True, kw_only=True):
    """A timer is due. Ignored unless exactly that timer is pending. An owner fires its own without a command."""

    kind: str
    run: int
    number: int = 0
    attempt: int = 0
    fire_at: int = 0


class ReportAttempt(Struct, frozen=True, kw_only=True):
    """What became of an attempt on a queue. Ignored unless exactly that attempt is awaited.

    Without `error` it completed with `result` (None is the JSON value null). With one it failed: for good, or to be
    tried again `retry_after_ms` after the owner has taken this. `scheduled_at` is the attempt's, and tells the runs
    apart that began under one id after it was cleaned up; 0 is any.
    """

    run: int
    number: int
    attempt: int
    result: bytes | None = None
    error: ErrorInfo | None = None
    retry_after_ms: int | None = None
    started_at: int = 0
    scheduled_at: int = 0


class Query(Struct, frozen=True, kw_only=True):
    """A read, answered by the partition's owner: `status`, `steps`, `history` or `list`; `params` is a JSON object."""

    query: str
    params: bytes = b"{ }"  # with a space: Apicurio's registry takes no schema that has "{}" for a default


Body: TypeAlias = (
    StartWorkflow
    | CancelWorkflow
    | TerminateWorkflow
    | SignalWorkflow
    | CleanupWorkflow
    | FireTimer
    | ReportAttempt
    | Query
)
BODIES: tuple[type[Body], ...] = (
    StartWorkflow,
    CancelWorkflow,
    TerminateWorkflow,
    SignalWorkflow,
    CleanupWorkflow,
    FireTimer,
    ReportAttempt,
    Query,
)


class Command(Struct, frozen=True, kw_only=True):
    """The envelope. `reply_to` is the partition of the replies topic that the sender reads, None if it reads none."""

    command_id: str
    workflow_id: str
    sent_at: int
    body: Body
    reply_to: int | None = None
