"""The client: starts runs, hands out handles, lists. It talks to the workers through the log alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar, TypeVarTuple, get_args, overload

from streamflow.client.handle import Handle
from streamflow.client.listing import merged
from streamflow.client.requests import SURROUNDINGS, Requests, Surroundings, place
from streamflow.client.statuses import Statuses
from streamflow.codec.payload import encode_value
from streamflow.codec.registry import Schemas
from streamflow.config import LIMITS, Limits
from streamflow.core.commands import ATTACHED, IfExists, Query, StartWorkflow
from streamflow.core.retry import Duration
from streamflow.errors import InvalidArguments, StreamflowError
from streamflow.ids import check_id, partition_of
from streamflow.logs.base import Log
from streamflow.projections.queries import check
from streamflow.projections.views import Page, RunStatus
from streamflow.workflow.code import check_size, to_ms
from streamflow.workflow.definitions import Registry, Workflow, check_duration, check_instant

T = TypeVar("T")
Args = TypeVarTuple("Args")

DELAY_SECONDS_MAX: Final = 100 * 366 * 86_400.0
"""The longest delay or timeout: a century. Beyond it lies a mistake in the unit, or an instant past all clocks."""


class Client:
    """Runs of one app on one log. Made by `App.connect`, `App.serve` and `sf.connect`; not to be shared by threads."""

    def __init__(
        self,
        log: Log,
        app: Registry | None = None,
        *,
        limits: Limits = LIMITS,
        schemas: Schemas | None = None,
        surroundings: Surroundings = SURROUNDINGS,
    ) -> None:
        self._log = log
        self._app = app
        self._chance = surroundings.chance
        self._requests = Requests(log, limits=limits, surroundings=surroundings)
        self._statuses = Statuses(log, schemas)

    async def open(self) -> None:
        """Begin to listen for answers; idempotent. The first request does it too."""
        await self._requests.open()

    async def close(self) -> None:
        """Stop listening; what still waits raises `Unavailable`. Idempotent. The log stays open."""
        why = f"{place(self._log)}: the client was closed: connect again"
        await self._requests.close(why)
        await self._statuses.close(why)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @overload
    async def start(
        self,
        workflow: Callable[[*Args], Coroutine[Any, Any, T]],
        /,
        *args: *Args,
        id: str | None = None,
        delay: Duration | None = None,
        at: datetime | None = None,
        timeout: Duration | None = None,
        on_complete: object = None,
        context: object = None,
        if_exists: IfExists = "attach",
    ) -> Handle[T]: ...
    @overload
    async def start(
        self,
        workflow: str,
        /,
        *args: Any,
        id: str | None = None,
        delay: Duration | None = None,
        at: datetime | None = None,
        timeout: Duration | None = None,
        on_complete: object = None,
        context: object = None,
        if_exists: IfExists = "attach",
    ) -> Handle[Any]: ...
    async def start(  # type: ignore[misc]  # mypy takes no *args: Any for an implementation of *args: *Ts
        self,
        workflow: Any,
        /,
        *args: Any,
        id: str | None = None,
        delay: Duration | None = None,
        at: datetime | None = None,
        timeout: Duration | None = None,
        on_complete: object = None,
        context: object = None,
        if_exists: IfExists = "attach",
    ) -> Handle[Any]:
        """Start a run and return once that is durable and accepted.

        `workflow` is a workflow or its name. `id` (random by default) is that of the run; `if_exists` says what to
        do when there is one: "attach" to it, "error" (`WorkflowExists`), or "restart" it if it is closed. `delay` or
        `at` (not both) is when its code begins; `timeout` bounds the run from there. `context` is JSON for its status.
        """
        definition = self._definition(workflow)
        name = workflow if definition is None else definition.name
        workflow_id = self._chance.randbytes(16).hex() if id is None else check_id(id, what="id")
        if on_complete is not None:
            raise StreamflowError(f"run {workflow_id}: on_complete is not part of this version: leave it out")
        if not isinstance(if_exists, str) or if_exists not in get_args(IfExists):
            raise InvalidArguments(
                f"run {workflow_id}: if_exists must be one of {', '.join(get_args(IfExists))}, found {if_exists!r}"
            )
        body = StartWorkflow(
            workflow=name,
            args=_encode_args(name, definition, args),
            **_when(workflow_id, delay, at),
            timeout_ms=_timeout_ms(workflow_id, timeout, definition),
            if_exists=if_exists,
            context=None if context is None else _encode_context(workflow_id, context),
        )
        # Registered before the command is sent, so that not even the first status is missed.
        partition = partition_of(workflow_id, self._log.partitions)
        await self._statuses.listen(partition)
        handle: Handle[Any] = Handle(
            workflow_id,
            partition,
            self._requests,
            self._statuses,
            app=self._app,
            signature=None if definition is None else definition.signature,
            must_ask=if_exists == "restart",
        )
        answer = await self._requests.ask(workflow_id, partition, body)
        handle._attached = answer == ATTACHED
        return handle

    @overload
    def handle(self, id: str) -> Handle[Any]: ...
    @overload
    def handle(self, id: str, workflow: Callable[..., Coroutine[Any, Any, T]]) -> Handle[T]: ...
    def handle(self, id: str, workflow: Any = None) -> Handle[Any]:
        """The run of that id, which nobody has looked up yet; `workflow`, where given, says what its result is."""
        definition = None if workflow is None else self._definition(workflow)
        return Handle(
            check_id(id, what="id"),
            partition_of(id, self._log.partitions),
            self._requests,
            self._statuses,
            app=self._app,
            signature=None if definition is None else definition.signature,
            must_ask=True,
        )

    async def list(
        self,
        workflow: str | Workflow[..., Any] | None = None,
        state: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[RunStatus]:
        """A page of the app's runs by creation, the newest first unless `order` is "asc"."""
        name = workflow.name if isinstance(workflow, Workflow) else workflow
        filters = {"workflow": name, "state": state}
        check(Query(query="list", params=encode_value({**filters, "order": order, "limit": limit, "cursor": cursor})))

        async def ask(partition: int, query: Query) -> bytes | None:
            return await self._requests.ask("", partition, query)

        return await merged(ask, self._log.partitions, order=order, limit=limit, cursor=cursor, filters=filters)

    def _definition(self, workflow: object) -> Workflow[..., Any] | None:
        """The workflow that is meant, None for a name whose code is not at hand."""
        if isinstance(workflow, Workflow):
            return workflow
        if not isinstance(workflow, str):
            raise InvalidArguments(
                f"workflow must be a function decorated with @app.workflow, or its name, found {workflow!r}"
            )
        check_id(workflow, what="workflow name")
        return None if self._app is None else self._app.workflows.get(workflow)


def _encode_args(name: str, definition: Workflow[..., Any] | None, args: tuple[Any, ...]) -> bytes:
    encoded = encode_value(list(args)) if definition is None else definition.signature.encode_args(args, {})
    check_size(encoded, what=f"the arguments of workflow {name}")
    return encoded


def _encode_context(workflow_id: str, context: object) -> bytes:
    encoded = encode_value(context)
    check_size(encoded, what=f"the context of run {workflow_id}")
    return encoded


def _when(workflow_id: str, delay: Duration | None, at: datetime | None) -> dict[str, int | None]:
    """The fields of the command that say when the code begins."""
    if delay is not None and at is not None:
        raise InvalidArguments(f"run {workflow_id}: delay and at exclude each other, found both; give one")
    if delay is not None:
        return {"delay_ms": _bounded_ms(delay, what=f"delay of run {workflow_id}")}
    if at is not None:
        return {"start_at": to_ms(check_instant(at, what=f"at of run {workflow_id}"))}
    return {}


def _timeout_ms(workflow_id: str, timeout: Duration | None, definition: Workflow[..., Any] | None) -> int | None:
    """The nearest of the call's and the workflow's own."""
    if timeout is None:
        timeout = None if definition is None else definition.timeout
    if timeout is None:
        return None
    what = f"timeout of run {workflow_id}"
    limit = _bounded_ms(timeout, what=what)
    if limit == 0:
        raise InvalidArguments(f"{what} must be more than 0 seconds, found {timeout!r}")
    return limit


def _bounded_ms(duration: Duration, *, what: str) -> int:
    found = check_duration(duration, what=what)
    if found > DELAY_SECONDS_MAX:
        raise InvalidArguments(f"{what} must be at most {DELAY_SECONDS_MAX:,.0f} seconds, found {duration!r}")
    return math.ceil(round(found * 1000, 3))
