"""An owner of all partitions, by hand: it answers as a worker would, or as a test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from msgspec.structs import replace

from streamflow.client import Client
from streamflow.codec.avro import decode_command, encode_reply, encode_status
from streamflow.config import Limits
from streamflow.core import commands as c
from streamflow.core.effects import Reply, StatusRecord
from streamflow.core.events import Turn
from streamflow.errors import ErrorInfo, RequestError
from streamflow.logs.base import COMMANDS, REPLIES, STATUS, Log, Outgoing
from streamflow.logs.open import open_log
from streamflow.projections.queries import answer
from streamflow.workflow.definitions import Registry

CLOSED = ("completed", "failed", "cancelled", "terminated")


class Owner:
    """Runs start as running, and go on only when the test says so. It is the `Source` of its queries."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.commands: list[c.Command] = []
        self.runs_: dict[str, StatusRecord] = {}
        self.clock = 1_700_000_000_000
        self.deaf = False
        """Takes commands and answers none."""
        self.quiet = False
        """Publishes no status."""
        self.applied: dict[str, bytes] = {}
        self.arrived = asyncio.Event()
        self.before: Callable[[c.Command], Any] = lambda command: None
        """Looks at a command first; raises the error to reject it with."""

    async def serve(self, partition: int) -> None:
        async for batch in self.log.follow(COMMANDS, partition, 0):
            for record in batch:
                command = decode_command(record.value or b"")
                self.commands.append(command)
                self.arrived.set()
                if not self.deaf:
                    await self.log.publish(self.take(command, partition))

    async def arrive(self, count: int) -> None:
        """Wait until so many commands have come."""
        while len(self.commands) < count:
            self.arrived.clear()
            await self.arrived.wait()

    def of_kind(self, kind: type) -> list[c.Command]:
        return [command for command in self.commands if isinstance(command.body, kind)]

    def take(self, command: c.Command, partition: int) -> list[Outgoing]:
        records: list[Outgoing] = []
        value: bytes | None = b"null"
        error: ErrorInfo | None = None
        try:
            self.before(command)
            if command.command_id in self.applied:
                value = self.applied[command.command_id]
            elif isinstance(command.body, c.Query):
                value = answer(
                    command.body, command.workflow_id, self if command.workflow_id else _Part(self, partition)
                )
            else:
                value = self.apply(command, records)
                self.applied[command.command_id] = value
        except RequestError as refused:
            error = ErrorInfo(type(refused).__name__, str(refused))
        if command.reply_to is not None:
            reply = Reply(
                command_id=command.command_id,
                workflow_id=command.workflow_id,
                accepted=error is None,
                error=error,
                value=value if error is None else None,
            )
            records.append(Outgoing(REPLIES, command.reply_to, command.command_id.encode(), encode_reply(reply)))
        return records

    def apply(self, command: c.Command, records: list[Outgoing]) -> bytes:
        id, body = command.workflow_id, command.body
        known = self.runs_.get(id)
        if isinstance(body, c.StartWorkflow):
            if known is None or (body.if_exists == "restart" and known.state in CLOSED):
                self.clock += 1
                fresh = StatusRecord(
                    workflow_id=id,
                    workflow=body.workflow,
                    run=1 if known is None else known.run + 1,
                    turn=0 if known is None else known.turn,
                    state="running",
                    args=body.args,
                    context=body.context,
                    created_at=self.clock,
                )
                records += self.change(fresh)
                return b"null"
            return c.ATTACHED
        if isinstance(body, c.CleanupWorkflow):
            del self.runs_[id]
            records.append(Outgoing(STATUS, self.home(id), id.encode(), None))
            return b"true"
        assert known is not None, id
        match body:
            case c.CancelWorkflow():
                records += self.change(replace(known, state="cancelled"))
            case c.TerminateWorkflow(reason=reason):
                records += self.change(replace(known, state="terminated", reason=reason))
            case c.SignalWorkflow(name="progress", value=value):
                records += self.change(replace(known, progress=value))
            case c.SignalWorkflow(value=value, error=None):
                records += self.change(replace(known, state="completed", result=value))
            case c.SignalWorkflow(error=error):
                records += self.change(replace(known, state="failed", error=ErrorInfo("ValueError", error or "")))
        return b"null"

    def change(self, status: StatusRecord) -> list[Outgoing]:
        status = self.runs_[status.workflow_id] = replace(status, turn=status.turn + 1)
        if self.quiet:
            return []
        id = status.workflow_id
        return [Outgoing(STATUS, self.home(id), id.encode(), encode_status(status))]

    async def finish(self, id: str, result: bytes = b"null") -> None:
        """The run completes by itself."""
        await self.log.publish(self.change(replace(self.runs_[id], state="completed", result=result)))

    def home(self, id: str) -> int:
        from streamflow.ids import partition_of

        return partition_of(id, self.log.partitions)

    # -- Source

    def status(self, workflow_id: str) -> StatusRecord | None:
        return self.runs_.get(workflow_id)

    def turns(self, workflow_id: str) -> Sequence[Turn]:
        return []

    def runs(self, *, descending: bool, after: tuple[int, str] | None) -> Iterator[StatusRecord]:
        yield from ()


class _Part:
    """The runs of one partition."""

    def __init__(self, owner: Owner, partition: int) -> None:
        self.owner, self.partition = owner, partition

    def status(self, workflow_id: str) -> StatusRecord | None:
        return None

    def turns(self, workflow_id: str) -> Sequence[Turn]:
        return []

    def runs(self, *, descending: bool, after: tuple[int, str] | None) -> Iterator[StatusRecord]:
        mine = [run for run in self.owner.runs_.values() if self.owner.home(run.workflow_id) == self.partition]
        for run in sorted(mine, key=lambda run: (run.created_at, run.workflow_id), reverse=descending):
            key = (run.created_at, run.workflow_id)
            if after is None or (key < after if descending else key > after):
                yield run


@asynccontextmanager
async def owned(
    app: Registry | None = None, *, url: str = "memory://", limits: Limits | None = None
) -> AsyncIterator[tuple[Owner, Client]]:
    """A client, and the owner that it talks to."""
    log = await open_log(url, app="shop")
    owner = Owner(log)
    serving = [asyncio.create_task(owner.serve(partition)) for partition in range(log.partitions)]
    try:
        async with Client(log, app, limits=limits or Limits()) as client:
            yield owner, client
    finally:
        for task in serving:
            task.cancel()
        await asyncio.wait(serving)
        await log.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left
