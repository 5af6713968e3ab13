"""Effects: what the runtime does once a turn is durable. Data, derived from turns alone: they can be derived again.

`TimerRecord`, `StepTask`, `StatusRecord`, `Reply` and `DeadLetter` are also what leaves the partition on the topics of
these names; their field names are those of the schemas.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from streamflow.core.commands import Command
from streamflow.errors import ErrorInfo


class TimerRecord(Struct, frozen=True, kw_only=True):
    """A pending timer: `kind` is start, deadline, sleep, step (before `attempt`) or retention (of a closed run)."""

    workflow_id: str
    kind: str
    run: int
    number: int
    attempt: int
    fire_at: int

    @property
    def key(self) -> bytes:
        """The key on the timers topic: the workflow id and, behind a NUL that the rest never has, the timer's id.

        With the instant, since numbers repeat where a run was cleaned up and one of its id begins: a tombstone of the
        earlier one that comes late must not take the timer of the other.
        """
        return f"{self.workflow_id}\0{self.run}.{self.kind}.{self.number}.{self.attempt}.{self.fire_at}".encode()

    @staticmethod
    def fire_at_of(key: bytes) -> int:
        """When the timer of that key is due. Raises `ValueError` where the key is none of a timer."""
        return int(key.rpartition(b".")[2])


class StepTask(Struct, frozen=True, kw_only=True):
    """An attempt for whoever serves the step's queue: `name` is that of the call, `step` the registered one."""

    workflow_id: str
    run: int
    number: int
    attempt: int
    workflow: str
    step: str
    name: str
    args: bytes
    scheduled_at: int
    timeout_ms: int | None = None
    retry: bytes | None = None


class StatusRecord(Struct, frozen=True, kw_only=True):
    """What `<app>.status` shows of a run after `turn`."""

    workflow_id: str
    workflow: str
    run: int
    turn: int
    state: str
    args: bytes
    result: bytes | None = None
    error: ErrorInfo | None = None
    progress: bytes | None = None
    waiting_on: list[str] = []
    context: bytes | None = None
    created_at: int = 0
    started_at: int | None = None
    closed_at: int | None = None
    reason: str | None = None


class Reply(Struct, frozen=True, kw_only=True):
    """The answer to a command. `value` is JSON; `error.type` names the `RequestError` to raise."""

    command_id: str
    workflow_id: str
    accepted: bool
    error: ErrorInfo | None = None
    value: bytes | None = None


class DeadLetter(Struct, frozen=True, kw_only=True):
    """A command that could not be decoded or applied, as it came, with where it stood and why."""

    topic: str
    partition: int
    offset: int
    key: bytes
    value: bytes | None
    reason: str
    at: int


class SetTimer(Struct, frozen=True):
    """Publish the timer."""

    timer: TimerRecord


class DropTimer(Struct, frozen=True):
    """Publish the timer's tombstone."""

    timer: TimerRecord


class StartAttempt(Struct, frozen=True):
    """Run attempt `attempt` of the step `number` of run number `run`."""

    run: int
    number: int
    attempt: int


class DispatchAttempt(Struct, frozen=True):
    """Put an attempt on the queue's topic: a step worker runs it and answers with a command."""

    queue: str
    task: StepTask


class RecordStart(Struct, frozen=True):
    """Record that `attempt` of the at-most-once step `number` starts; `StartAttempt` follows when that is durable."""

    run: int
    number: int
    attempt: int


class CancelAttempt(Struct, frozen=True):
    """Nobody waits for the step `number` of run number `run` any more: cancel its attempt if it runs here.

    One that was put on a queue is not called back: it runs in vain, and its outcome is dropped.
    """

    run: int
    number: int


class PublishStatus(Struct, frozen=True):
    """Publish the run's status; None is a tombstone."""

    status: StatusRecord | None


class SendReply(Struct, frozen=True):
    """Answer a command on partition `reply_to` of the replies topic."""

    reply_to: int
    reply: Reply


class Forward(Struct, frozen=True):
    """The command came to the wrong partition: publish it on the right one."""

    partition: int
    command: Command


Effect: TypeAlias = (
    SetTimer
    | DropTimer
    | StartAttempt
    | DispatchAttempt
    | RecordStart
    | CancelAttempt
    | PublishStatus
    | SendReply
    | Forward
)
