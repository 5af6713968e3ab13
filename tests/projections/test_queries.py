"""Queries are answered from any source: pages, cursors, limits, and everything that can be wrong with a query."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.config import PAYLOAD_BYTES_MAX, RECORD_BYTES_MAX
from streamflow.core import events as e
from streamflow.core.commands import Query
from streamflow.core.effects import StatusRecord
from streamflow.errors import InvalidArguments, RequestError, WorkflowNotFound
from streamflow.projections import queries
from streamflow.projections.queries import answer, check, list_cursor
from streamflow.projections.views import HistoryEvent, Page, RunStatus, StepView

AT = 1_700_000_000_000


class Source:
    """A partition's state, by hand."""

    def __init__(self, runs: Sequence[StatusRecord] = (), turns: Sequence[e.Turn] = ()) -> None:
        self._runs = {run.workflow_id: run for run in runs}
        self._turns = list(turns)
        self.looked_at = 0

    def status(self, workflow_id: str) -> StatusRecord | None:
        return self._runs.get(workflow_id)

    def turns(self, workflow_id: str) -> Sequence[e.Turn]:
        return self._turns

    def runs(self, *, descending: bool, after: tuple[int, str] | None) -> Iterator[StatusRecord]:
        for key, run in sorted(((r.created_at, r.workflow_id), r) for r in self._runs.values())[
            :: -1 if descending else 1
        ]:
            if after is None or (key < after if descending else key > after):
                self.looked_at += 1
                yield run


def run(id: str, *, created_at: int = AT, **changes: Any) -> StatusRecord:
    fields: dict[str, Any] = {"workflow": "fulfil", "run": 1, "turn": 1, "state": "running", "args": b"[]", **changes}
    return StatusRecord(workflow_id=id, created_at=created_at, **fields)


def steps(number: int, args: bytes = b"[]", result: bytes | None = None) -> list[e.Turn]:
    scheduled: list[e.Event] = [
        e.StepScheduled(number=n, name="charge", args=args, fingerprint=0) for n in range(number)
    ]
    if result is not None:
        scheduled += [e.StepCompleted(number=n, attempt=1, result=result) for n in range(number)]
    return [
        e.Turn(workflow_id="w", turn=1 + n, term=1, seq=1, at=AT, consumed=0, events=[s])
        for n, s in enumerate(scheduled)
    ]


def query(kind: str, **params: Any) -> Query:
    return Query(query=kind, params=msgspec.json.encode(params))


def ask(source: Source, kind: str, type_: Any, id: str = "w", **params: Any) -> Any:
    raw = answer(query(kind, **params), id, source)
    assert len(raw) <= RECORD_BYTES_MAX - 5000
    return msgspec.json.decode(raw, type=type_)


def all_pages(source: Source, kind: str, type_: Any, **params: Any) -> list[list[Any]]:
    pages: list[list[Any]] = []
    cursor = None
    while True:
        page = ask(source, kind, Page[type_], cursor=cursor, **params)
        pages.append(page.items)
        cursor = page.cursor
        if cursor is None:
            return pages


def test_status():
    status = ask(Source([run("w", result=b"[1,2]", closed_at=AT)]), "status", RunStatus)
    assert (status.id, status.result, status.state) == ("w", [1, 2], "running")
    assert status.closed_at is not None and status.closed_at.tzinfo is not None


@pytest.mark.parametrize("kind", ["status", "steps", "history"])
def test_an_unknown_run(kind: str):
    with pytest.raises(WorkflowNotFound, match="no run w2"):
        answer(query(kind), "w2", Source([run("w")]))


@pytest.mark.parametrize(("order", "expected"), [("asc", [[0, 1], [2, 3], [4]]), ("desc", [[4, 3], [2, 1], [0]])])
def test_pages_of_steps(order: str, expected: list[list[int]]):
    source = Source([run("w")], steps(5))
    assert [[s.number for s in page] for page in all_pages(source, "steps", StepView, limit=2, order=order)] == expected
    assert [[s.number for s in page] for page in all_pages(source, "steps", StepView)] == [[0, 1, 2, 3, 4]]
    assert all_pages(Source([run("w")]), "steps", StepView) == [[]]


def test_a_full_last_page_has_no_cursor():
    assert len(all_pages(Source([run("w")], steps(4)), "steps", StepView, limit=2)) == 2


def test_pages_of_history():
    turn = e.Turn(workflow_id="w", turn=0, term=1, seq=1, at=AT, consumed=0, events=[e.RunStarted()] * 3)
    pages = all_pages(Source([run("w")], [turn, *steps(3)]), "history", HistoryEvent, limit=2)
    assert [len(page) for page in pages] == [2, 2, 2]


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_of_runs(order: str):
    runs = [run(f"w{n}", created_at=AT + n // 2, state="failed" if n % 3 else "running") for n in range(20)]
    found = [status.id for page in all_pages(Source(runs), "list", RunStatus, order=order, limit=3) for status in page]
    expected = [
        r.workflow_id for r in sorted(runs, key=lambda r: (r.created_at, r.workflow_id), reverse=order == "desc")
    ]
    assert found == expected
    failed = [
        s.id for page in all_pages(Source(runs), "list", RunStatus, order=order, limit=3, state="failed") for s in page
    ]
    assert failed == [id for id in expected if int(id[1:]) % 3]
    assert all_pages(Source(runs), "list", RunStatus, workflow="other") == [[]]


def test_a_list_looks_at_a_bounded_number_of_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(queries, "RUNS_SCANNED_MAX", 10)
    source = Source([run(f"w{n:02}", state="failed" if n == 35 else "running") for n in range(40)])
    page = ask(source, "list", Page[RunStatus], state="failed", order="asc")
    assert (page.items, source.looked_at) == ([], 11)
    assert page.cursor is not None
    pages = all_pages(source, "list", RunStatus, state="failed", order="asc")
    assert [[s.id for s in page] for page in pages] == [[], [], [], ["w35"]]


def test_the_cursor_of_a_listing_is_that_of_its_last_status():
    runs = [run(f"w{n}", created_at=AT + n) for n in range(5)]
    page = ask(Source(runs), "list", Page[RunStatus], limit=2)
    assert page.cursor == list_cursor("desc", page.items[-1])


def test_a_page_is_cut_where_it_would_not_fit():
    source = Source([run("w")], steps(10, args=b'["' + b"x" * 300_000 + b'"]'))
    assert [len(page) for page in all_pages(source, "steps", StepView)] == [2, 2, 2, 2, 2]
    big = b'["' + b"x" * 700_000 + b'"]'
    runs = Source([run(f"w{n}", args=big) for n in range(3)])
    assert [len(page) for page in all_pages(runs, "list", RunStatus)] == [1, 1, 1]


def test_what_does_not_fit_alone_is_previewed():
    big = b'"' + b"\xc3\xa4" * (PAYLOAD_BYTES_MAX // 2 - 2) + b'"'
    (step,) = all_pages(Source([run("w")], steps(1, args=big, result=big)), "steps", StepView)[0]
    assert step.args == {"too_large_bytes": len(big), "preview": '"' + "ä" * 499}
    assert step.name == "charge" and step.state == "completed"
    created = e.RunCreated(workflow="f", args=big, context=big)
    turn = e.Turn(workflow_id="w", turn=1, term=1, seq=1, at=AT, consumed=0, events=[created])
    (event,) = all_pages(Source([run("w")], [turn]), "history", HistoryEvent)[0]
    assert event.fields["args"]["too_large_bytes"] == len(big)


def test_a_status_keeps_its_result_whole():
    big = b'"' + b"x" * (PAYLOAD_BYTES_MAX - 2) + b'"'
    status = ask(Source([run("w", args=big, progress=big, context=big, result=big)]), "status", RunStatus)
    assert len(status.result) == PAYLOAD_BYTES_MAX - 2
    assert {status.args["too_large_bytes"], status.progress["too_large_bytes"]} == {PAYLOAD_BYTES_MAX}


BAD = [
    ("nonsense", {}, "unknown query 'nonsense'"),
    ("status", {"limit": 1}, "unknown field `limit`"),
    ("steps", {"limit": 0}, ">= 1"),
    ("steps", {"limit": 1001}, "<= 1000"),
    ("steps", {"limit": True}, "Expected `int`"),
    ("steps", {"limit": "5"}, "Expected `int`"),
    ("steps", {"order": "up"}, "Invalid enum value 'up'"),
    ("steps", {"cursor": 5}, "Expected `str | null`"),
    ("steps", {"cursor": ""}, "cursor '' is none of a steps query"),
    ("steps", {"cursor": "ä"}, "is none of a steps query"),
    ("history", {"order": "asc"}, "unknown field `order`"),
    ("list", {"state": "lost"}, "state must be one of scheduled, running"),
    ("list", {"workflow": 3}, "Expected `str | null`"),
]


@pytest.mark.parametrize(("kind", "params", "text"), BAD)
def test_a_wrong_query(kind: str, params: dict[str, Any], text: str):
    with pytest.raises(InvalidArguments, match=text.replace("|", r"\|")):
        answer(query(kind, **params), "w", Source([run("w")]))
    with pytest.raises(InvalidArguments):
        check(query(kind, **params))


@pytest.mark.parametrize("params", [b"", b"[]", b"null", b"{", b"\xff", b'{"limit":1e400}'])
def test_params_that_are_no_object(params: bytes):
    with pytest.raises(InvalidArguments, match="query steps"):
        answer(Query(query="steps", params=params), "w", Source([run("w")]))


def test_a_cursor_of_another_listing_is_refused():
    source = Source([run("w"), run("w2")], steps(5))
    steps_cursor = ask(source, "steps", Page[StepView], limit=1).cursor
    list_cursor = ask(source, "list", Page[RunStatus], limit=1).cursor
    for kind, params in [
        ("steps", {"cursor": list_cursor}),
        ("steps", {"cursor": steps_cursor, "order": "desc"}),
        ("history", {"cursor": steps_cursor}),
        ("list", {"cursor": steps_cursor}),
        ("list", {"cursor": list_cursor, "order": "asc"}),
    ]:
        with pytest.raises(InvalidArguments, match=f"none of a {kind} query in order"):
            answer(query(kind, **params), "w", source)


def refusal(source: Source, asked: Query) -> str | None:
    """Why the query is refused, None when it is answered."""
    try:
        answer(asked, "w", source)
    except RequestError as error:
        return str(error)
    return None


@given(kind=st.sampled_from(["status", "steps", "history", "list"]), cursor=st.text(), raw=st.binary())
def test_garbage_is_refused_and_nothing_else_happens(kind: str, cursor: str, raw: bytes):
    source = Source([run("w")], steps(2))
    for params in (raw, msgspec.json.encode({"cursor": cursor})):
        assert refusal(source, Query(query=kind, params=params)) != ""


@given(position=st.lists(st.one_of(st.integers(), st.text(), st.booleans(), st.floats(allow_nan=False), st.none())))
def test_a_made_up_cursor_is_refused_or_a_position(position: list[Any]):
    source = Source([run("w")], steps(2))
    for kind, order in (("steps", "asc"), ("history", "asc"), ("list", "desc")):
        cursor = queries._cursor(kind, order, *position)
        assert "cursor" in (refusal(source, query(kind, cursor=cursor)) or "cursor")
