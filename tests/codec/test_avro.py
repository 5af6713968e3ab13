"""Round trips of every record, against the library as the oracle; garbage ends in one exception."""

from __future__ import annotations

import contextlib
import tracemalloc
from io import BytesIO
from typing import Any

import msgspec
import pytest
from fastavro import schemaless_reader, schemaless_writer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import structs

from streamflow.codec import DecodeError, EncodeError
from streamflow.codec.avro import decode_command, decode_history, encode_command, encode_history, encode_timer
from streamflow.core.commands import CancelWorkflow, Command, FireTimer, SignalWorkflow, StartWorkflow
from streamflow.core.effects import TimerRecord
from streamflow.core.events import Claim, RunFailed, RunStarted, Turn
from streamflow.errors import ErrorInfo
from tests.codec.records import KINDS, any_of_kind, fields_of

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def turn(**changes: Any) -> Turn:
    given_fields: dict[str, Any] = {
        "workflow_id": "a",
        "turn": 1,
        "term": 1,
        "seq": 1,
        "at": 1,
        "consumed": 0,
        "events": [],
    }
    return Turn(**{**given_fields, **changes})


def command(**changes: Any) -> Command:
    return Command(**{"command_id": "c", "workflow_id": "a", "sent_at": 1, "body": CancelWorkflow(), **changes})


def as_library_value(record: Any, union: bool) -> Any:
    """What the library wants for a record: dicts, and (name, dict) pairs in unions of records."""
    value = {}
    for name, annotation in fields_of(type(record)).items():
        field = getattr(record, name)
        if name == "body":
            value[name] = as_library_value(field, union=True)
        elif name == "events":
            value[name] = [as_library_value(event, union=True) for event in field]
        elif name == "commands":
            value[name] = [as_library_value(item, union=False) for item in field]
        else:
            is_record = isinstance(field, ErrorInfo | msgspec.Struct)
            value[name] = as_library_value(field, union=False) if is_record else field
        assert annotation is not None
    return (f"streamflow.{type(record).__name__}", value) if union else value


@kinds
@given(data=st.data())
def test_a_record_comes_back_equal(kind, data):
    record = data.draw(any_of_kind(kind))
    found = kind.decode(kind.encode(record))
    assert found == record
    assert type(found) is type(record)


@kinds
@given(data=st.data())
def test_the_bytes_are_those_of_the_avro_library(kind, data):
    record = data.draw(any_of_kind(kind))
    out = BytesIO()
    schemaless_writer(out, kind.codec().schema, as_library_value(record, union=kind.name == "History"))
    encoded = kind.encode(record)
    assert encoded[:2] == b"\xc3\x01"
    assert encoded[10:].hex() == out.getvalue().hex()
    back: Any = schemaless_reader(BytesIO(encoded[10:]), kind.codec().schema, None)
    assert back.keys() == fields_of(type(record)).keys()


@kinds
@given(garbage=st.binary(max_size=200), framed=st.booleans())
def test_garbage_raises_decode_errors_only(kind, garbage, framed):
    garbage = b"\xc3\x01" + kind.codec().fingerprint + garbage if framed else garbage
    with contextlib.suppress(DecodeError):
        # Some garbage is a record; then it is one that can be written.
        record = kind.decode(garbage)
        assert kind.decode(kind.encode(record)) == record


@kinds
@given(data=st.data())
def test_a_damaged_record_raises_decode_errors_only(kind, data):
    encoded = bytearray(kind.encode(data.draw(any_of_kind(kind))))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(DecodeError):
        kind.decode(bytes(encoded))


@kinds
@given(data=st.data())
def test_a_record_cut_short_or_with_a_tail_is_refused(kind, data):
    encoded = kind.encode(data.draw(any_of_kind(kind)))
    with pytest.raises(DecodeError):
        kind.decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])
    with pytest.raises(DecodeError, match="expected the record to end after"):
        kind.decode(encoded + data.draw(st.binary(min_size=1)))


LENGTH_OF_TERABYTES = b"\x80\x80\x80\x80\x80\x80\x01"
LENGTH_BELOW_ZERO = b"\x01"
ENDLESS = b"\xff" * 40


@pytest.mark.parametrize(
    "length", [LENGTH_OF_TERABYTES, LENGTH_BELOW_ZERO, ENDLESS], ids=["huge", "negative", "endless"]
)
@pytest.mark.parametrize("prefix", [b"", b"\x02\x02a\x02\x02\x02\x02\x02"], ids=["string", "array of events"])
def test_a_length_is_never_trusted_with_an_allocation(length, prefix):
    header = encode_history(turn())[:10]
    data = header + (prefix or b"\x02") + length + bytes(50)
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            decode_history(data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [0, -1, 63, 64, -64, -65, 8191, 8192, -8192, -8193, 2**31, 2**63 - 1, -(2**63)])
def test_integers_at_the_edges_of_their_sizes(value):
    assert decode_history(encode_history(Claim(term=value, owner="o", at=-value if value > -(2**63) else 0))) == Claim(
        term=value, owner="o", at=-value if value > -(2**63) else 0
    )


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
def test_an_integer_that_is_too_large_is_named(value):
    with pytest.raises(EncodeError, match=r"Timer cannot be encoded: fire_at does not fit into 64 bits"):
        encode_timer(TimerRecord(workflow_id="a", kind="sleep", run=1, number=1, attempt=0, fire_at=value))


def test_an_int_field_takes_32_bits():
    assert decode_command(encode_command(command(reply_to=2**31 - 1))).reply_to == 2**31 - 1
    with pytest.raises(EncodeError, match="2147483648 does not fit into 32 bits"):
        encode_command(command(reply_to=2**31))


def test_a_lone_surrogate_is_named_with_its_place():
    events = [RunStarted(), RunFailed(error=ErrorInfo("E", "bad \ud800"))]
    with pytest.raises(EncodeError, match=r"events\[1\]\.error\.message is not valid Unicode"):
        encode_history(turn(events=events))


@pytest.mark.parametrize(
    "wrong",
    [
        command(command_id=5),
        command(command_id=None),
        command(sent_at="now"),
        command(sent_at=1.5),
        command(body=None),
        command(body=command()),
        command(body=StartWorkflow(workflow="w", args="[]")),  # type: ignore[arg-type]
        command(body=SignalWorkflow(name="n", value=7)),  # type: ignore[arg-type]
        Claim(term=1, owner="o", at=1),
        None,
    ],
)
def test_a_field_of_a_wrong_type_is_an_encode_error(wrong):
    with pytest.raises(EncodeError, match="Command cannot be encoded"):
        encode_command(wrong)


def test_blocks_with_their_size_are_read():
    # Other writers may split an array into blocks, and write a block's size behind a negative count.
    data = encode_history(turn(events=[RunStarted(), RunStarted()]))
    one = b"\x02"  # the branch of RunStarted
    assert data.count(b"\x04" + one + one + b"\x00") == 1
    blocks = b"\x01\x02" + one + b"\x02" + one + b"\x80\x00"
    assert decode_history(data.replace(b"\x04" + one + one + b"\x00", blocks)) == turn(
        events=[RunStarted(), RunStarted()]
    )


@settings(max_examples=20)
@given(size=st.integers(100_000, 3_000_000))
@example(size=3_000_000)
def test_large_payloads(size):
    record = command(body=SignalWorkflow(name="n", value=bytes(size)))
    assert decode_command(encode_command(record)) == record


def test_records_stay_frozen_after_decoding():
    record = decode_command(encode_command(command(body=FireTimer(kind="sleep", run=1))))
    assert structs.asdict(record.body)["run"] == 1
    with pytest.raises(AttributeError):
        record.sent_at = 5  # type: ignore[misc]
