"""A run as its client holds it: `Handle`.

What a handle knows of its run comes from the status topic; what it must know now, it asks the partition's owner. A
handle of a run that this client has just started need not ask: the first status that comes is that run's. Every other
handle asks once, since a run that is closed already publishes nothing more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final, Generic, Literal, TypeVar

from streamflow.client.answers import history_in, status_in, steps_in
from streamflow.client.requests import Requests
from streamflow.client.statuses import Feed, Interest, Statuses, position
from streamflow.codec.payload import Signature, decode_value, encode_value
from streamflow.core.commands import CancelWorkflow, CleanupWorkflow, Query, SignalWorkflow, TerminateWorkflow
from streamflow.core.effects import StatusRecord
from streamflow.core.retry import Duration
from streamflow.errors import (
    ErrorInfo,
    InvalidArguments,
    StreamflowError,
    WorkflowCancelled,
    WorkflowFailed,
    WorkflowNotFound,
    WorkflowTerminated,
)
from streamflow.ids import check_id
from streamflow.projections.queries import LIMIT_MAX, check
from streamflow.projections.views import CLOSED_STATES, HistoryEvent, Page, RunStatus, StepView, status_view
from streamflow.workflow.code import check_size
from streamflow.workflow.definitions import Registry, check_duration

T_co = TypeVar("T_co", covariant=True)

STATUS_GRACE_SECONDS: Final = 0.05
"""How long a handle waits for the first status of a run that it has just started before it asks: it comes with the
answer to the start, unless the start attached to a run that publishes nothing now."""

SIGNAL_PREFIX: Final = "signal:"
"""Before the id of a signal, to make it a command id: no other command's id begins so."""


class Handle(Generic[T_co]):
    """One run, by its workflow id. Made by `Client.start` and `Client.handle`."""

    def __init__(
        self,
        id: str,
        partition: int,
        requests: Requests,
        statuses: Statuses,
        *,
        app: Registry | None,
        signature: Signature | None,
        must_ask: bool,
    ) -> None:
        self._id = id
        self._partition = partition
        self._requests = requests
        self._statuses = statuses
        self._app = app
        self._signature = signature
        self._interest: Interest = statuses.interest(id)
        self._attached = False
        # What is known of an earlier run of the id must not be taken for the one that this handle is for.
        self._must_ask = must_ask or self._interest.record is not None
        self._since: tuple[int, int] = (0, 0)
        """(created_at, run) of the run that is meant: what is older belongs to earlier runs of the id."""

    @property
    def id(self) -> str:
        """The workflow id."""
        return self._id

    @property
    def attached(self) -> bool:
        """Whether the start that gave this handle found the run there already, and so started nothing."""
        return self._attached

    def __repr__(self) -> str:
        return f"<run {self._id}>"

    # -- waiting -----------------------------------------------------------------------------------------------------

    async def result(self, timeout: Duration | None = None) -> T_co:
        """Wait until the run is closed, and return what it returned.

        Raises `WorkflowFailed`, `WorkflowCancelled`, `WorkflowTerminated`, `WorkflowNotFound`, or `TimeoutError` after
        `timeout` (seconds or a timedelta); the run goes on then.
        """
        if timeout is None:
            return self._outcome(await self._closed())
        limit = check_duration(timeout, what="timeout of result()")
        timer = asyncio.timeout(limit)
        try:
            async with timer:
                record = await self._closed()
        except TimeoutError:
            if not timer.expired():
                raise
            raise TimeoutError(f"run {self._id} was not closed within {limit:g} s; it goes on") from None
        return self._outcome(record)

    async def status(self) -> RunStatus:
        """The run as its partition's owner knows it now."""
        return status_view(await self._learn())

    async def published(self) -> RunStatus | None:
        """The run as its last published status has it, for when no worker lives to ask; None where there is none."""
        record = await self._statuses.published(self._id, self._partition)
        return None if record is None else status_view(record)

    def watch(self) -> Changes:
        """The status now, then each change, until the run is closed; survives restarts of the workers.

        Any number of watchers. One that is slower than its run may miss statuses in between, never the last.
        """
        return Changes(self)

    async def _closed(self) -> StatusRecord:
        """The status that closes the run that is meant."""
        interest = self._interest
        if self._must_ask:
            await self._learn()
        elif interest.record is None:
            await self._first_status()
        while True:
            record = interest.record
            if interest.deleted:
                await self._learn()
                continue
            if record is not None and record.state in CLOSED_STATES and position(record)[:2] >= self._since:
                return record
            await interest.changed()

    async def _first_status(self) -> None:
        """Wait a little for the status of a run that was just started, then ask."""
        try:
            async with asyncio.timeout(STATUS_GRACE_SECONDS):
                while self._interest.record is None:
                    await self._interest.changed()
        except TimeoutError:
            await self._learn()

    async def _learn(self) -> StatusRecord:
        """Ask the owner for the status. The follower is begun before, so that no change after it is missed."""
        interest = self._interest
        await self._statuses.listen(self._partition)
        was_deleted = interest.deleted
        try:
            answer = await self._requests.ask(self._id, self._partition, Query(query="status"))
        except WorkflowNotFound:
            if was_deleted:
                raise WorkflowNotFound(f"run {self._id} was cleaned up: nothing of it is left") from None
            raise
        record = status_in(answer, f"run {self._id}")
        interest.confirm(record)
        if self._must_ask:
            self._must_ask = False
            self._since = position(record)[:2]
        return record

    def _outcome(self, record: StatusRecord) -> T_co:
        match record.state:
            case "completed":
                result: T_co = self._result(record)
                return result
            case "failed":
                raise WorkflowFailed(self._id, record.error or ErrorInfo("", "for a reason that was not recorded"))
            case "cancelled":
                raise WorkflowCancelled(self._id)
            case _:
                raise WorkflowTerminated(self._id, record.reason)

    def _result(self, record: StatusRecord) -> Any:
        """Typed by the annotation of the workflow where it is at hand, else as JSON says it."""
        signature = self._signature
        if signature is None and self._app is not None and record.workflow in self._app.workflows:
            signature = self._app.workflows[record.workflow].signature
        result = b"null" if record.result is None else record.result
        return decode_value(result) if signature is None else signature.decode_result(result)

    # -- reading -----------------------------------------------------------------------------------------------------

    async def steps(
        self, order: Literal["asc", "desc"] = "asc", limit: int = 100, cursor: str | None = None
    ) -> Page[StepView]:
        """A page of the run's steps, sleeps and signals, by number."""
        answer = await self._query("steps", order=order, limit=limit, cursor=cursor)
        return steps_in(answer, f"run {self._id}", cursor)

    async def history(self) -> list[HistoryEvent]:
        """The recorded events, oldest first, of all runs under this id."""
        events: list[HistoryEvent] = []
        cursor: str | None = None
        while True:
            answer = await self._query("history", limit=LIMIT_MAX, cursor=cursor)
            page = history_in(answer, f"run {self._id}", cursor)
            events += page.items
            cursor = page.cursor
            if cursor is None:
                return events

    async def _query(self, query: str, **params: object) -> bytes | None:
        asked = Query(query=query, params=encode_value(params))
        check(asked)
        return await self._requests.ask(self._id, self._partition, asked)

    # -- changing ----------------------------------------------------------------------------------------------------

    async def signal(self, name: str, value: object = None, *, error: str | None = None, id: str | None = None) -> None:
        """Send a signal; `error` makes the wait raise `SignalError`. Sent twice under one `id`, it signals once."""
        check_id(name, what="signal name")
        if error is not None and value is not None:
            raise InvalidArguments(f"signal {name}: value and error exclude each other, found both; give one")
        if error is not None and not isinstance(error, str):
            raise InvalidArguments(f"signal {name}: error must be a str, found {type(error).__name__}")
        encoded = encode_value(value)
        check_size(encoded, what=f"the value of signal {name}")
        body = SignalWorkflow(name=name, value=encoded if error is None else None, error=error)
        command_id = None if id is None else SIGNAL_PREFIX + check_id(id, what="id of a signal")
        await self._requests.ask(self._id, self._partition, body, command_id=command_id)

    async def cancel(self) -> None:
        """Ask the run to unwind: `CancelledError` is raised at its awaits. A closed run raises `CommandRejected`."""
        await self._requests.ask(self._id, self._partition, CancelWorkflow())

    async def terminate(self, reason: str | None = None) -> None:
        """Stop the run where it stands. A closed run raises `CommandRejected`."""
        if reason is not None and not isinstance(reason, str):
            raise InvalidArguments(f"reason must be a str, found {type(reason).__name__}")
        if reason is not None:
            check_size(encode_value(reason), what="reason")
        await self._requests.ask(self._id, self._partition, TerminateWorkflow(reason=reason))

    async def restart(self, from_: object = None) -> None:
        """Run a closed run again, keeping outcomes. Not part of this version."""
        raise StreamflowError(
            f"run {self._id}: restart() is not part of this version: start it anew with "
            f'client.start(…, id={self._id!r}, if_exists="restart")'
        )

    async def cleanup(self, force: bool = False) -> bool:
        """Delete a closed run, its steps and signals; False while it is open, unless forced."""
        if not isinstance(force, bool):
            raise InvalidArguments(f"force must be a bool, found {force!r}")
        value = await self._requests.ask(self._id, self._partition, CleanupWorkflow(force=force), if_gone=b"true")
        return value is None or decode_value(value) is not False


class Changes(AsyncIterator[RunStatus]):
    """The statuses of one watcher: `async for status in handle.watch()`. It holds nothing that must be closed."""

    def __init__(self, handle: Handle[Any]) -> None:
        self._handle = handle
        self._feed: Feed | None = None
        self._ended = False

    def __aiter__(self) -> Changes:
        return self

    async def __anext__(self) -> RunStatus:
        if self._ended:
            raise StopAsyncIteration
        record = await (self._first() if self._feed is None else self._next(self._feed))
        self._ended = record.state in CLOSED_STATES
        return status_view(record)

    async def aclose(self) -> None:
        """End it; there for `contextlib.aclosing`."""
        self._ended = True

    async def _first(self) -> StatusRecord:
        handle = self._handle
        feed = handle._interest.open_feed()
        record = await handle._learn()
        # What came over the topic meanwhile may be newer than the answer.
        newest = handle._interest.record
        if newest is not None and position(newest) > position(record):
            record = newest
        feed.records.clear()
        self._feed = feed
        return record

    async def _next(self, feed: Feed) -> StatusRecord:
        handle = self._handle
        while not feed.records:
            if handle._interest.deleted:
                await handle._learn()
                continue
            await handle._interest.changed()
        return feed.records.popleft()
