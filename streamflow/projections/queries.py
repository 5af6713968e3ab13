"""The queries of `<app>.commands`, answered by the partition's owner from its durable state.

    status   {}                                          a RunStatus
    steps    {order, limit, cursor}                      a page of StepViews
    history  {limit, cursor}                             a page of HistoryEvents, oldest first
    list     {workflow, state, order, limit, cursor}     a page of RunStatus of this partition, by creation

Rules of this file:

- Pure: an answer depends on the query and the source alone. What is wrong with a query is a `RequestError`.
- An answer fits one record of the log: a page is cut short and says where the next one begins; what does not fit
  alone has its payloads replaced by previews that say so.
- An answer costs a bounded amount of work, since the owner gives it between two passes: a list stops after so many
  runs looked at, and its page may then be short, or even empty, with a cursor.
- A cursor is a position, not an offset into a listing: what is added or deleted meanwhile shifts nothing.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Final, Literal, Protocol, TypeVar

import msgspec
from msgspec import Meta, Struct

from streamflow.config import PAYLOAD_BYTES_MAX, RECORD_BYTES_MAX
from streamflow.core.commands import Query
from streamflow.core.effects import StatusRecord
from streamflow.core.events import Turn
from streamflow.errors import InvalidArguments, WorkflowNotFound
from streamflow.projections.views import (
    STATES,
    HistoryEvent,
    RunStatus,
    StepView,
    fold_steps,
    history_event,
    status_view,
)

LIMIT_MAX: Final = 1000
"""Items of one page: more neither fit a record as a rule nor a screen."""

LIMIT_DEFAULT: Final = 100
"""Items of a page when the query does not say."""

RUNS_SCANNED_MAX: Final = 2000
"""Runs that one list query looks at: some 20 ms of the owner's time."""

STATUS_BYTES_MAX: Final = RECORD_BYTES_MAX - 10_000
"""A status answer: the largest result still fits with all that goes around it, so a result is never cut."""

PAGE_BYTES_MAX: Final = PAYLOAD_BYTES_MAX - 1000
"""The items of a page; the rest is for its cursor and its brackets."""

PREVIEW_CHARACTERS: Final = 500
"""How much is shown of a payload that is too large."""

Order = Literal["asc", "desc"]
View = TypeVar("View", RunStatus, StepView, HistoryEvent)


class Source(Protocol):
    """The durable state of one partition."""

    def status(self, workflow_id: str) -> StatusRecord | None:
        """The run's status, None when there is no such run."""
        ...

    def turns(self, workflow_id: str) -> Sequence[Turn]:
        """The run's turns, oldest first."""
        ...

    def runs(self, *, descending: bool, after: tuple[int, str] | None) -> Iterator[StatusRecord]:
        """All runs by (created_at, workflow_id), behind the position `after`."""
        ...


_Limit = Annotated[int, Meta(ge=1, le=LIMIT_MAX)]


class _StatusParams(Struct, forbid_unknown_fields=True):
    pass


class _StepsParams(Struct, forbid_unknown_fields=True):
    order: Order = "asc"
    limit: _Limit = LIMIT_DEFAULT
    cursor: str | None = None


class _HistoryParams(Struct, forbid_unknown_fields=True):
    limit: _Limit = LIMIT_DEFAULT
    cursor: str | None = None


class _ListParams(Struct, forbid_unknown_fields=True):
    workflow: str | None = None
    state: str | None = None
    order: Order = "desc"
    limit: _Limit = LIMIT_DEFAULT
    cursor: str | None = None


_Params = TypeVar("_Params", _StatusParams, _StepsParams, _HistoryParams, _ListParams)
_encode = msgspec.json.Encoder().encode


def answer(query: Query, workflow_id: str, source: Source) -> bytes:
    """The JSON that answers `query`; raises a `RequestError` that says what is wrong with it."""
    match query.query:
        case "status":
            return _status(query, workflow_id, source)
        case "steps":
            return _steps(query, workflow_id, source)
        case "history":
            return _history(query, workflow_id, source)
        case "list":
            return _list(query, source)
        case other:
            raise InvalidArguments(f"unknown query {other[:80]!r}: known are status, steps, history and list")


def check(query: Query) -> None:
    """Refuse a query that every owner would refuse, whatever its state."""
    match query.query:
        case "status":
            _params(query, _StatusParams)
        case "steps":
            _steps_params(query)
        case "history":
            _history_params(query)
        case "list":
            _list_params(query)
        case other:
            raise InvalidArguments(f"unknown query {other[:80]!r}: known are status, steps, history and list")


def list_cursor(order: Order, status: RunStatus) -> str:
    """The cursor behind `status` in a listing by creation."""
    created_at = 0 if status.created_at is None else round(status.created_at.timestamp() * 1000)
    return _cursor("list", order, created_at, status.id)


def _status(query: Query, workflow_id: str, source: Source) -> bytes:
    _params(query, _StatusParams)
    return _fitting(status_view(_known(workflow_id, source)), _smaller_status, STATUS_BYTES_MAX)


def _steps_params(query: Query) -> tuple[_StepsParams, int | None]:
    params = _params(query, _StepsParams)
    if params.cursor is None:
        return params, None
    (after,) = _position(params.cursor, "steps", params.order, int)
    return params, after


def _steps(query: Query, workflow_id: str, source: Source) -> bytes:
    params, after = _steps_params(query)
    _known(workflow_id, source)
    steps = fold_steps(source.turns(workflow_id))
    if params.order == "desc":
        steps.reverse()
    if after is not None:
        steps = [step for step in steps if (step.number > after if params.order == "asc" else step.number < after)]

    def views() -> Iterator[tuple[StepView, str]]:
        for step in steps:
            yield step.view(), _cursor("steps", params.order, step.number)

    return _page(views(), params.limit, _smaller_step)


def _history_params(query: Query) -> tuple[_HistoryParams, tuple[int, int]]:
    params = _params(query, _HistoryParams)
    if params.cursor is None:
        return params, (-1, -1)
    return params, _position(params.cursor, "history", "asc", int, int)


def _history(query: Query, workflow_id: str, source: Source) -> bytes:
    params, after = _history_params(query)
    _known(workflow_id, source)

    def views() -> Iterator[tuple[HistoryEvent, str]]:
        for turn in source.turns(workflow_id):
            for index, event in enumerate(turn.events):
                if (turn.turn, index) > after:
                    yield history_event(turn, event), _cursor("history", "asc", turn.turn, index)

    return _page(views(), params.limit, _smaller_event)


def _list_params(query: Query) -> tuple[_ListParams, tuple[int, str] | None]:
    params = _params(query, _ListParams)
    if params.state is not None and params.state not in STATES:
        raise InvalidArguments(f"state must be one of {', '.join(STATES)}, found {params.state!r}")
    if params.cursor is None:
        return params, None
    return params, _position(params.cursor, "list", params.order, int, str)


def _list(query: Query, source: Source) -> bytes:
    params, after = _list_params(query)

    def views() -> Iterator[tuple[RunStatus | None, str]]:
        for record in source.runs(descending=params.order == "desc", after=after):
            fits = params.workflow in (None, record.workflow) and params.state in (None, record.state)
            behind = _cursor("list", params.order, record.created_at, record.workflow_id)
            yield status_view(record) if fits else None, behind

    return _page(views(), params.limit, _smaller_status)


def _known(workflow_id: str, source: Source) -> StatusRecord:
    status = source.status(workflow_id)
    if status is None:
        raise WorkflowNotFound(f"there is no run {workflow_id}: check the id, or start it first")
    return status


def _params(query: Query, type_: type[_Params]) -> _Params:
    try:
        return msgspec.json.decode(query.params, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        text = str(error).replace(" - at `$.", " for `")
        raise InvalidArguments(f"query {query.query}: {text}") from None


def _cursor(*position: object) -> str:
    return base64.urlsafe_b64encode(_encode(position)).decode().rstrip("=")


def _position(cursor: str, kind: str, order: str, *types: type) -> Any:
    """The position that a cursor of this kind and order holds."""
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        found = msgspec.json.decode(raw)
    except (ValueError, RecursionError, binascii.Error, msgspec.DecodeError):
        found = None
    if not isinstance(found, list) or len(found) != len(types) + 2 or found[:2] != [kind, order]:
        raise InvalidArguments(
            f"cursor {cursor[:80]!r} is none of a {kind} query in order {order!r}: "
            f"pass the cursor of the page before, with the same order, or None for the first page"
        )
    position = tuple(found[2:])
    if not all(type(value) is wanted for value, wanted in zip(position, types, strict=True)) or not all(
        -1 <= value < 1 << 63 for value in position if isinstance(value, int)
    ):
        raise InvalidArguments(f"cursor {cursor[:80]!r} is damaged: pass the cursor of the page before as it came")
    return position


def _page(views: Iterable[tuple[View | None, str]], limit: int, smaller: Callable[[View], Iterator[View]]) -> bytes:
    """As many views as fit; each comes with the cursor behind it. None: one that was looked at and is not shown."""
    items: list[bytes] = []
    filled = 0
    behind: str | None = None
    for looked_at, (view, cursor) in enumerate(views):
        if len(items) == limit or looked_at == RUNS_SCANNED_MAX:
            break
        if view is not None:
            item = _fitting(view, smaller, PAGE_BYTES_MAX)
            if items and filled + len(item) > PAGE_BYTES_MAX:
                break
            items.append(item)
            filled += len(item) + 1
        behind = cursor
    else:
        behind = None  # nothing is left
    return b'{"items":[' + b",".join(items) + b'],"cursor":' + _encode(behind) + b"}"


def _fitting(view: View, smaller: Callable[[View], Iterator[View]], bytes_max: int) -> bytes:
    """The view as JSON of at most `bytes_max`; what is too large in it becomes a preview."""
    encoded = _encode(view)
    if len(encoded) <= bytes_max:
        return encoded
    for reduced in smaller(view):
        encoded = _encode(reduced)
        if len(encoded) <= bytes_max:
            break
    return encoded


def _smaller_status(view: RunStatus) -> Iterator[RunStatus]:
    """The result and the error go last: they are what somebody waits for."""
    for name in ("args", "context", "progress", "result"):
        changed: dict[str, Any] = {name: _preview(getattr(view, name))}
        view = replace(view, **changed)
        yield view


def _smaller_step(view: StepView) -> Iterator[StepView]:
    for name in ("args", "result"):
        changed: dict[str, Any] = {name: _preview(getattr(view, name))}
        view = replace(view, **changed)
        yield view


def _smaller_event(view: HistoryEvent) -> Iterator[HistoryEvent]:
    for name in sorted(view.fields, key=lambda name: -len(_encode(view.fields[name]))):
        view = replace(view, fields={**view.fields, name: _preview(view.fields[name])})
        yield view


def _preview(value: object) -> object:
    """The beginning of a payload, marked as such."""
    text = _encode(value)
    if len(text) <= PREVIEW_CHARACTERS:
        return value
    beginning = text[: 4 * PREVIEW_CHARACTERS].decode("utf-8", "ignore")[:PREVIEW_CHARACTERS]
    return {"too_large_bytes": len(text), "preview": beginning}
