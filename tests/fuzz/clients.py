"""Targets for what clients read: answers as a `Handle` and `Client.list` take them, and statuses of the topic.

An input is what owners said, a piece for each question, behind lengths of two bytes (`chunks`); a piece may be longer
than its length can say, so the last one goes to the end of the input. Whoever has no piece left says that nothing more
comes, so that each input ends.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import Any, Final

import msgspec

from streamflow.client.handle import Handle
from streamflow.client.listing import merged
from streamflow.client.requests import _rejection
from streamflow.client.statuses import Interest, position
from streamflow.codec import avro
from streamflow.codec.payload import Signature
from streamflow.core.commands import Query
from streamflow.core.effects import Reply, StatusRecord
from streamflow.errors import ErrorInfo, RequestError, WorkflowError
from streamflow.projections import queries
from streamflow.projections.views import CLOSED_STATES, status_view
from tests.fuzz import examples

RUN: Final = "deep"
"""A run of `examples.Runs`, whose owner gives the valid answers."""
LAST: Final = b'{"items":[],"cursor":null}'
PARTITIONS: Final = 3
QUESTIONS: Final = ("status", "steps", "history")


def returns(order: dict[str, int]) -> list[bytes]:
    """What the run's workflow returns, by its annotations."""
    return [json.dumps(order).encode()]


SIGNATURES: Final = (None, Signature(returns))


def pieces(data: bytes) -> deque[bytes]:
    """The answers of an input."""
    found = deque(examples.chunks(data))
    if len(data) > 1 << 16:  # longer than a length can say
        found[0] = data[2:]
    return found


class Answers:
    """In place of `Requests`: answers with the pieces in turn."""

    def __init__(self, said: deque[bytes]) -> None:
        self._said = said

    async def ask(self, *_: object, **__: object) -> bytes | None:
        """The next piece, and None for one without a byte, as a reply without a value."""
        return (self._said.popleft() or None) if self._said else LAST


class NoTopic:
    """In place of `Statuses`: nothing comes over the topic."""

    def interest(self, workflow_id: str) -> Interest:
        """What is known of the run."""
        return Interest(workflow_id.encode())

    async def listen(self, partition: int) -> None:
        """There is nothing to follow."""


def handle_of(said: deque[bytes], *, typed: bool = False) -> Handle[Any]:
    """A handle whose owner gives these answers."""
    requests: Any = Answers(said)
    statuses: Any = NoTopic()
    return Handle(RUN, 0, requests, statuses, app=None, signature=SIGNATURES[typed], must_ask=True)


def check_shown(found: Any) -> None:
    """It can be shown to people, as JSON, and is about as large as what was read."""
    json.loads(msgspec.json.encode(found))


def answered(data: bytes) -> None:
    """The answers to the questions of a handle; the first byte, modulo 3, says to which."""
    flags, said = data[0] if data else 0, pieces(data[1:])
    handle = handle_of(said)
    match QUESTIONS[flags % len(QUESTIONS)]:
        case "status":
            found = asyncio.run(handle.status())
            assert found.id is not None
            check_shown(found)
        case "steps":
            check_shown(asyncio.run(handle.steps()))
        case _:
            check_shown(asyncio.run(handle.history()))


def listed(data: bytes) -> None:
    """The pages of three partitions, merged: never more than asked for, and behind them a cursor that owners take."""
    said = Answers(pieces(data))

    async def ask(partition: int, query: Query) -> bytes | None:
        queries.check(query)
        return await said.ask()

    page = asyncio.run(merged(ask, PARTITIONS, order="asc", limit=10, cursor=None, filters={}))
    assert len(page.items) <= 10
    check_shown(page)
    if page.cursor is not None:
        queries.check(Query(query="list", params=json.dumps({"order": "asc", "cursor": page.cursor}).encode()))


def replied(data: bytes) -> None:
    """A record of the replies: its error is of our tree, its value a result that `cleanup` can read."""
    reply = avro.decode_reply(data)
    error = _rejection(reply)
    assert isinstance(error, RequestError) and str(error) is not None
    handle = handle_of(deque([reply.value or b""]))
    assert asyncio.run(handle.cleanup()) in (True, False)


def ended(data: bytes) -> None:
    """A status of the topic, offered to a handle that waits for the end of its run."""
    record = avro.decode_status(data)
    handle = handle_of(deque(), typed=bool(len(data) % 2))
    feed = handle._interest.open_feed()
    handle._interest.offer(record)
    handle._interest.offer(record)
    assert [position(each) for each in feed.records] == [position(record)], "the same status twice"
    check_shown(status_view(feed.records[0]))
    if record.state in CLOSED_STATES:
        check_shown(handle._outcome(record))


ENDINGS: Final = (WorkflowError,)
"""How a run may end otherwise than by returning, as its waiter is told."""


# ------------------------------------------------------------------------------------------------------ examples


def _answer(query: str, **params: object) -> bytes:
    return queries.answer(Query(query=query, params=json.dumps(params).encode()), RUN, examples.Runs())


def answers() -> list[bytes]:
    """To each question: an answer, and for the history two pages."""
    first = _answer("history", limit=3)
    second = _answer("history", limit=1000, cursor=json.loads(first)["cursor"])
    small = StatusRecord(
        workflow_id=RUN, workflow="f", run=1, turn=3, state="failed", args=b"[1]", progress=b'{"a":[null]}',
        error=ErrorInfo("E", "no"), created_at=1_777_000_000_123, started_at=1_777_000_000_124, waiting_on=["step 1"],
    )  # fmt: skip
    status = msgspec.json.encode(status_view(small))
    return [
        b"\0" + examples.chunked(status),
        b"\1" + examples.chunked(_answer("steps")),
        b"\2" + examples.chunked(first, second),
        b"\0" + examples.chunked(_answer("status")),
    ]


def pages() -> list[bytes]:
    """Pages of several partitions, some with a second one."""
    runs = [
        StatusRecord(workflow_id=f"r{at}", workflow="f", run=1, turn=1, state="running", args=b"[]", created_at=at)
        for at in range(1, 9)
    ]
    views = [json.loads(msgspec.json.encode(status_view(run))) for run in runs]
    cursor = queries.list_cursor("asc", status_view(runs[4]))

    def page(items: list[Any], cursor: str | None = None) -> bytes:
        return json.dumps({"items": items, "cursor": cursor}).encode()

    return [
        examples.chunked(page(views[:2]), page(views[2:4]), page(views[4:5], cursor), page(views[5:])),
        examples.chunked(page([]), page([], cursor), page(views), page(views[:1])),
        examples.chunked(page(views)),
    ]


def replies() -> list[bytes]:
    """Replies of all kinds that clients know."""
    made = [
        Reply(command_id="c", workflow_id="w", accepted=True, value=b"true"),
        Reply(command_id="c", workflow_id="w", accepted=True),
        Reply(command_id="c", workflow_id="w", accepted=False, error=ErrorInfo("WorkflowNotFound", "no run")),
        Reply(command_id="c", workflow_id="w", accepted=False, error=ErrorInfo("streamflow.errors.Other", "odd")),
        Reply(command_id="c", workflow_id="w", accepted=False),
    ]
    return [avro.encode_reply(each) for each in made]


def endings() -> list[bytes]:
    """Statuses of runs that returned, with what the annotations want and without, and of one that has not ended."""
    place: dict[str, Any] = {"workflow_id": RUN, "workflow": "f", "run": 1, "turn": 9, "created_at": 5}
    return [
        avro.encode_status(StatusRecord(**place, args=b"[1]", state="completed", result=b'["AP8="]')),
        avro.encode_status(StatusRecord(**place, args=b"[]", state="completed", result=b"[]", closed_at=7)),
        avro.encode_status(StatusRecord(**place, args=b"[]", state="running", waiting_on=["sleep until 5"])),
    ]
