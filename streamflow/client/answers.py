"""What owners answer, read: the JSON of `projections.queries` as statuses and pages.

An owner may be of another version, and replies are a topic that others can write to, so nothing of an answer is taken
for granted: what cannot be read is `Unavailable`, with the reason, and nothing else. An answer is one record of the
log, so what is made of it is bounded as well.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, TypeAlias, TypeVar

import msgspec

from streamflow.core.commands import Query
from streamflow.core.effects import StatusRecord
from streamflow.errors import ErrorInfo, InvalidArguments, Unavailable
from streamflow.projections.queries import Order, check
from streamflow.projections.views import HistoryEvent, Page, RunStatus, StepView
from streamflow.workflow.code import to_ms

T = TypeVar("T")
View = TypeVar("View", RunStatus, StepView, HistoryEvent)


Instant: TypeAlias = Annotated[datetime, msgspec.Meta(tz=True)]


class _Answer(msgspec.Struct):
    """A `RunStatus` as its JSON comes, payloads left as they are."""

    id: str
    workflow: str
    run: int
    state: str
    turn: int
    args: msgspec.Raw
    result: msgspec.Raw
    error: ErrorInfo | None
    progress: msgspec.Raw
    waiting_on: list[str]
    context: msgspec.Raw
    started_at: Instant | None
    closed_at: Instant | None
    created_at: Instant | None
    reason: str | None

    def record(self) -> StatusRecord:
        """The status as the topic has it, so that both can be compared; `waiting_on` stays in words."""
        return StatusRecord(
            workflow_id=self.id,
            workflow=self.workflow,
            run=self.run,
            turn=self.turn,
            state=self.state,
            args=bytes(self.args),
            result=bytes(self.result),
            error=self.error,
            progress=bytes(self.progress),
            waiting_on=self.waiting_on,
            context=bytes(self.context),
            created_at=_ms(self.created_at) or 0,
            started_at=_ms(self.started_at),
            closed_at=_ms(self.closed_at),
            reason=self.reason,
        )


def _ms(at: datetime | None) -> int | None:
    return None if at is None else to_ms(at)


_status = msgspec.json.Decoder(_Answer).decode
_steps = msgspec.json.Decoder(Page[StepView]).decode
_history = msgspec.json.Decoder(Page[HistoryEvent]).decode
_list = msgspec.json.Decoder(Page[RunStatus]).decode


def status_in(answer: bytes | None, about: str) -> StatusRecord:
    """The status that answers a `status` query about that run."""
    return _read(lambda data: _status(data).record(), answer, about)


def steps_in(answer: bytes | None, about: str, cursor: str | None) -> Page[StepView]:
    """The page of steps behind `cursor`."""
    return _page(_steps, answer, about, cursor)


def history_in(answer: bytes | None, about: str, cursor: str | None) -> Page[HistoryEvent]:
    """The page of events behind `cursor`."""
    page = _page(_history, answer, about, cursor)
    _check_cursor("history", {}, page.cursor, about)
    return page


def list_in(answer: bytes | None, about: str, order: Order, cursor: str | None) -> Page[RunStatus]:
    """The page of runs behind `cursor`."""
    page = _page(_zoned, answer, about, cursor)
    _check_cursor("list", {"order": order}, page.cursor, about)
    return page


def _check_cursor(query: str, params: dict[str, str], cursor: str | None, about: str) -> None:
    """Refuse a cursor that we shall ask with ourselves: our caller has not passed it, and could not mend it."""
    try:
        check(Query(query=query, params=msgspec.json.encode({**params, "cursor": cursor})))
    except InvalidArguments as error:
        raise Unavailable(f"{about}: its owner's answer leads nowhere: {error}") from None


def _zoned(data: bytes) -> Page[RunStatus]:
    page = _list(data)
    for item in page.items:  # listings are merged by it, and what has no zone is no instant
        if item.created_at is not None and item.created_at.tzinfo is None:
            raise ValueError(f"created_at of run {item.id} has no time zone")
    return page


def _page(decode: Callable[[bytes], Page[View]], answer: bytes | None, about: str, cursor: str | None) -> Page[View]:
    page = _read(decode, answer, about)
    if page.cursor is not None and page.cursor == cursor:  # whoever asks for the next page would do so for ever
        raise Unavailable(f"{about}: its owner answered with a page that leads to itself")
    return page


def _read(decode: Callable[[bytes], T], answer: bytes | None, about: str) -> T:
    try:
        return decode(answer or b"")
    except (msgspec.DecodeError, OverflowError, RecursionError, ValueError) as error:
        raise Unavailable(
            f"{about}: its owner's answer cannot be read, which is of another version perhaps: {str(error)[:200]}"
        ) from None
