"""Inputs that once failed, each with its reason: they stay refused, or taken, for ever."""

from __future__ import annotations

import json
import logging
import tracemalloc
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO, TextIOWrapper
from typing import Any

import click
import pytest
from msgspec.structs import replace

from streamflow.cli.values import JSON
from streamflow.client.answers import history_in, list_in, status_in, steps_in
from streamflow.codec import DecodeError, UnknownSchema, avro, upcast
from streamflow.codec.envelope import write_body
from streamflow.codec.nesting import NESTING_MAX, nests_too_deeply
from streamflow.codec.payload import decode_value, encode_value
from streamflow.codec.registry import RegistryRefused
from streamflow.codec.registry_client import ANSWER_BYTES_MAX, schema_in
from streamflow.core.effects import DeadLetter
from streamflow.core.events import Claim, Turn
from streamflow.errors import InvalidArguments, InvalidUrl, Unavailable
from streamflow.logs.kafka_url import parse_kafka
from streamflow.logs.open import parse
from streamflow.projections.views import shown
from streamflow.worker.outbox import dead_letter
from tests.fuzz.examples import CURRENT, REGISTERED, chunked, chunks, registered
from tests.fuzz.targets import TARGETS, examples_of

BODY = registered()[0][5:]
FIELD = {"type": "record", "name": "N"}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def extended(type_: Any) -> Any:
    """Our schema with one more field, of which we need nothing."""
    return {**REGISTERED[CURRENT], "fields": [*REGISTERED[CURRENT]["fields"], {"name": "more", "type": type_}]}


def decode(schema: Any, body: bytes) -> object:
    return avro.decode_command(b"\0\0\0\0\1" + body, lambda _: schema)


def doubling(levels: int) -> Any:
    found: Any = {"type": "record", "name": "R0", "fields": []}
    for level in range(1, levels):
        again = {"name": "b", "type": f"R{level - 1}"}
        found = {"type": "record", "name": f"R{level}", "fields": [{"name": "a", "type": found}, again]}
    return found


def nested(levels: int) -> Any:
    found: Any = "long"
    for _ in range(levels):
        found = {"type": "array", "items": found}
    return found


def chained(levels: int) -> Any:
    """Types within each other by name alone: the text of the schema is flat."""
    last = {"name": "x", "type": "long"}
    return [
        {"type": "record", "name": f"R{i}", "fields": [last, *([{"name": "a", "type": f"R{i - 1}"}] if i else [])]}
        for i in range(levels)
    ]


@pytest.mark.parametrize(
    ("type_", "rest", "said"),
    [
        # The library's C code followed them until the stack ended, and the process with it.
        ({**FIELD, "fields": [{"name": "n", "type": ["null", "N"]}]}, b"\2" * 100_000 + b"\0", "N within itself"),
        ({**FIELD, "fields": [{"name": "n", "type": "N"}]}, b"", "N within itself"),
        (nested(30_000), b"\0", "at most 100 levels"),
        (nested(60), b"\0", "types within each other"),
        (chained(60), b"\0\0", "types within each other"),
        # Our own look at the schema recursed without an end.
        ({"type": "array", "items": {**FIELD, "fields": [{"name": "n", "type": "N"}]}}, b"\0", "N within itself"),
        # No byte of the record, and 2^25 values, or far more; our own look took as long.
        (doubling(25), b"", "at most 16 values for each byte"),
        ({"type": "array", "items": doubling(25)}, b"\0", "at most 16 values for each byte"),
        # The library believes that it has parsed and checked this itself.
        ({"type": "nonsense", "__fastavro_parsed__": True}, b"", "attributes of Avro, found '__fastavro_parsed__'"),
    ],
    ids=["union", "itself", "deep", "nested", "chained", "array of itself", "doubling", "array of doubling", "marked"],
)
def test_a_schema_that_would_take_the_process_along_is_refused(type_: Any, rest: bytes, said: str) -> None:
    with pytest.raises(DecodeError, match=f"schema id 1 cannot be used: .*{said}"):
        decode(extended(type_), BODY + rest)


@pytest.mark.parametrize("size", [-1, -(1 << 62), "5", 2.5, None, True])
@pytest.mark.parametrize("items", [False, True])
def test_a_fixed_of_no_size_is_refused(size: Any, items: bool) -> None:
    # The schema was taken, and each record refused by whatever the library made of it: a TypeError, or True bytes.
    fixed = {"type": "fixed", "name": "F", "size": size}
    with pytest.raises(DecodeError, match="schema id 1 cannot be used: expected a fixed of so many bytes"):
        decode(extended({"type": "array", "items": fixed} if items else fixed), BODY + b"\2\0")


@pytest.mark.parametrize("error", [MemoryError(), OSError(24, "Too many open files"), ImportError("fastavro")])
def test_what_is_not_the_records_fault_does_not_set_it_aside(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    # It was a DecodeError: for want of memory a good command went to the dead letters, and was lost.
    def fails(*_: object) -> Any:
        raise error

    schema = extended("long")
    assert decode(schema, BODY + b"\0")
    for module, name in ((upcast, "read_body"), (upcast, "write_body"), (avro, "parse"), (avro, "refuse_endless")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails)
            with pytest.raises(type(error)) as caught:
                decode(schema, BODY + b"\0")
            assert caught.value is error
    with pytest.raises(type(error)):
        avro.decode_command(b"\0\0\0\0\1" + BODY, fails)
    assert decode(schema, BODY + b"\0"), "what failed for want of memory is remembered as of no use"


def test_a_schema_that_could_fill_the_memory_with_others_of_its_size_is_refused() -> None:
    def answer(count: int) -> bytes:
        return json.dumps({"schema": json.dumps({"type": "string", "doc": [[]] * count})}).encode()

    assert schema_in("http://registry", answer(10_000))["type"] == "string"
    assert len(answer(200_000)) < ANSWER_BYTES_MAX
    with pytest.raises(RegistryRefused, match="it has 800,027 characters, expected at most 65,536"):
        schema_in("http://registry", answer(200_000))


NULLS: Any = {"type": "record", "name": "N", "fields": [{"name": f"n{i}", "type": "null"} for i in range(15)]}
THIN = {**FIELD, "fields": [{"name": "a", "type": "long"}, *({"name": f"n{i}", "type": "null"} for i in range(30))]}


@pytest.mark.parametrize(
    "type_",
    [
        {"type": "array", "items": THIN},
        {"type": "map", "values": NULLS},
        {"type": "array", "items": {"type": "array", "items": "boolean"}},
        {"type": "array", "items": ["null", NULLS]},
    ],
    ids=["records of nothing", "map", "arrays", "union"],
)
def test_a_megabyte_of_a_foreign_field_takes_no_more_than_its_bytes(type_: Any) -> None:
    # Nothing of ours has that field, so it is skipped: made into values it would be half a gigabyte.
    schema, count = extended(type_), 300_000
    body = BODY + write_body(count, "long") + b"\0" * (count * 2 + 1)
    tracemalloc.start()
    try:
        with suppress(DecodeError):  # the map's and the union's items take another number of bytes
            decode(schema, body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * len(body) + 5_000_000


STATUS: dict[str, Any] = {
    "id": "r", "workflow": "f", "run": 1, "state": "running", "turn": 1, "args": [], "result": None, "error": None,
    "progress": None, "waiting_on": [], "context": None, "started_at": None, "closed_at": None, "created_at": None,
    "reason": None,
}  # fmt: skip


@pytest.mark.parametrize("reader", [status_in, lambda answer, about: list_in(answer, about, "asc", None)])
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"turn": "x"}, "Expected `int`"),
        ({"id": None}, "Expected `str`"),
        ({"created_at": "0001-01-01T00:00:00"}, "zone"),  # was a ValueError: year 0 is out of range
        ({"created_at": "2026-13-01T00:00:00Z"}, "Invalid RFC3339"),
    ],
)
def test_an_answer_that_cannot_be_read_says_so(reader: Any, changes: dict[str, Any], why: str) -> None:
    # Clients got an error of msgspec's, which no caller could know of.
    item = json.dumps({**STATUS, **changes})
    answer = item if reader is status_in else f'{{"items":[{item}],"cursor":null}}'
    with pytest.raises(Unavailable, match=f"run r: its owner's answer cannot be read.*{why}"):
        reader(answer.encode(), "run r")
    with pytest.raises(Unavailable, match="cannot be read"):
        reader(None, "run r")


def by_creation(answer: bytes, about: str, cursor: str | None) -> Any:
    return list_in(answer, about, "asc", cursor)


READERS = [
    (steps_in, ["steps", "asc", 5]),
    (history_in, ["history", "asc", 5, 0]),
    (by_creation, ["list", "asc", 5, "r"]),
]


@pytest.mark.parametrize(("reader", "position"), READERS)
def test_a_page_that_leads_to_itself_ends_the_listing(reader: Any, position: list[Any]) -> None:
    # A listing asked for the same page for ever, and a history grew with each.
    cursor = urlsafe_b64encode(json.dumps(position).encode()).decode()
    page = json.dumps({"items": [], "cursor": cursor}).encode()
    assert reader(page, "run r", None).cursor == cursor
    with pytest.raises(Unavailable, match="run r: its owner answered with a page that leads to itself"):
        reader(page, "run r", cursor)


@pytest.mark.parametrize("reader", [history_in, by_creation])
def test_a_cursor_that_the_client_would_ask_with_itself_must_be_one(reader: Any) -> None:
    # It was an InvalidArguments, to a caller who had passed no cursor.
    with pytest.raises(Unavailable, match="run r: its owner's answer leads nowhere: cursor 'odd' is none of a"):
        reader(b'{"items":[],"cursor":"odd"}', "run r", None)


def test_a_long_that_a_producer_calls_a_timestamp_is_taken() -> None:
    # It was read as a datetime, which a long does not take, wherever the schema was not ours but for that.
    schema = extended("long")
    schema["fields"] = [dict(field) for field in schema["fields"]]
    schema["fields"][2]["type"] = {"type": "long", "logicalType": "timestamp-millis"}
    assert decode(schema, BODY + b"\0") == decode(extended("long"), BODY + b"\0")


def test_a_reason_with_half_a_character_is_a_dead_letter() -> None:
    # The JSON of a schema can say what UTF-8 cannot: the letter was not encoded, and the partition stopped.
    with pytest.raises(UnknownSchema) as caught:
        decode("\ud800", BODY)
    letter = DeadLetter(topic="t", partition=0, offset=0, key=b"", value=b"", reason=str(caught.value) * 500, at=0)
    value = dead_letter(letter).value
    assert value is not None and r"\ud800" in avro.decode_dead_letter(value).reason


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (DEEP, Unavailable),
        (json.dumps({"schema": DEEP}), RegistryRefused),
        (json.dumps({"schema": 5}), RegistryRefused),
    ],
)
def test_an_answer_of_a_registry_may_nest_deeply(answer: str, error: type[Exception]) -> None:
    with pytest.raises(error):  # it was a RecursionError, which ended the partition
        schema_in("http://registry", answer.encode())


@pytest.mark.parametrize("levels", [NESTING_MAX + 1, 1_000, 100_000])
def test_a_payload_that_nests_deeply_does_not_hide_a_run_and_the_list_it_is_in(levels: int) -> None:
    # Its status, and each list with the run in it, was answered by a RecursionError.
    data = b'{"a":' * levels + b"1" + b"}" * levels
    assert shown(data) == {"nested_too_deeply": data.decode()}
    with pytest.raises(InvalidArguments, match="nests by more than 200 levels"):
        decode_value(data)


def test_the_limit_of_nesting_is_the_same_in_both_directions() -> None:
    value: Any = "[{" * NESTING_MAX + '\\"'
    for level in range(NESTING_MAX):
        value = [value] if level % 3 else {'"[': value, "b": 1}
    assert decode_value(encode_value(value)) == value
    with pytest.raises(InvalidArguments, match="pass it flat, or as a str"):
        encode_value([value])
    assert not nests_too_deeply(json.dumps([[{"a": [i]}, "[[{"] for i in range(1_000)]).encode())


def history(**changes: int) -> bytes:
    """A history of two turns, the second with changes."""
    first, second = list(chunks(examples_of("restore")[0][1:]))[1:3]
    turn = avro.decode_history(second)
    assert isinstance(turn, Turn)
    claim = avro.encode_history(Claim(term=1, owner="o", at=1))
    return b"\0" + chunked(claim, first, avro.encode_history(replace(turn, **changes)))


FOUND = [
    ("query", b"list\n" + json.dumps({"cursor": "W1tb" * 5_000}).encode(), "a cursor that nests deeply"),
    ("retry", b"[" * 100_000, "was a RecursionError, not the ValueError that is promised"),
    ("duration", b"1" * 100_000, "took minutes: each digit was the start of another try"),
    ("local-url", b"sqlite:///x?partitions=" + b"1" * 5_000, "Python reads no int of so many digits"),
    ("local-url", b"sqlite:///x?max_mib=" + b"1" * 5_000, "the same"),
    ("local-url", b"sqlite:///a%00.db", "was a ValueError of the operating system"),
    ("local-url", b"sqlite:///" + b"a" * 5_000, "was an OSError"),
    ("local-url", b"sqlite:///a\nb.db", "opened ab.db"),
    ("local-url", b"sqlite:///%ff.db", "opened a file with another name"),
    ("kafka-url", b"kafka://a:" + "²".encode(), "a digit that is no number"),
    ("kafka-url", b"kafka://a:" + b"1" * 5_000, "Python reads no int of so many digits"),
    ("kafka-url", b"kafka://a?partitions=" + b"1" * 5_000, "the same"),
    ("kafka-url", b"kafka://a?schema.registry.url=http://[", "was a ValueError"),
    ("kafka-url", b"kafka://a?schema.registry.url=http://a:99999", "failed at the first request only"),
    ("kafka-url", "kafka://a?schema.registry.url=http://ü..x".encode(), "was a UnicodeError at the first request"),
    ("kafka-url", b"kafka://a?schema.registry.url=http://r&bearer.auth.token=a%0Ab", "no header can say it"),
    ("kafka-url", b"kafka://a\t:1", "the tab was dropped without a word"),
    ("restore", history(turn=-1), "a number that the store cannot sort: was an OverflowError"),
    ("restore", history(turn=1 << 40), "the same"),
    ("restore", history(at=-1), "the same"),
    ("restore", history(turn=1), "a turn twice took the place of the first, and no query could be answered"),
    ("restore", history(turn=4), "a turn is missing"),
]


@pytest.mark.parametrize(("target", "data", "reason"), FOUND, ids=[f"{name}: {why}" for name, _, why in FOUND])
def test_what_once_failed_is_refused(target: str, data: bytes, reason: str) -> None:
    assert TARGETS[target].check(data) is False, reason


def test_stdin_that_is_no_text_is_a_wrong_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(b'"\xff"'), encoding="utf-8"))
    with pytest.raises(click.BadParameter, match="stdin is not JSON: it is not valid UTF-8"):
        JSON.convert("-", None, None)


def test_a_variable_of_an_impossible_name_is_not_set() -> None:
    with pytest.raises(InvalidUrl, match="is not set"):
        parse_kafka("kafka://a?sasl.password.env=\ud800")
    with pytest.raises(InvalidUrl, match="not valid UTF-8"):
        parse("sqlite:///\ud800.db")
