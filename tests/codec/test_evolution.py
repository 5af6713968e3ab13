"""Records of other schemas: older ones, newer ones, those of a registry."""

from __future__ import annotations

import contextlib
import copy
import json
from io import BytesIO
from typing import Any

import pytest
from fastavro import schemaless_writer
from hypothesis import given
from hypothesis import strategies as st

from streamflow.codec import DecodeError, UnknownSchema, avro, envelope, upcast
from streamflow.core.commands import Command, SignalWorkflow, StartWorkflow
from streamflow.core.effects import TimerRecord
from streamflow.core.events import RunStarted, StepCompleted, Turn

RECORD = Command(command_id="c", workflow_id="w", sent_at=7, body=SignalWorkflow(name="go", value=b"1"))


def current(name: str = "Command") -> Any:
    return json.loads((envelope.schema_folder() / f"{name}.avsc").read_text())


def field_of(schema: Any, name: str) -> Any:
    return next(field for field in schema["fields"] if field["name"] == name)


def body_of(value: Any, schema: Any) -> bytes:
    out = BytesIO()
    schemaless_writer(out, envelope.parse(schema), value)
    return out.getvalue()


def framed(value: Any, schema: Any) -> bytes:
    return b"\xc3\x01" + envelope.fingerprint(envelope.parse(schema)) + body_of(value, schema)


@pytest.fixture
def codec():
    """A codec of its own, so that what a test registers is not seen by others."""
    return avro.command_codec.__wrapped__()


def older_schema() -> Any:
    """Before `reply_to` was added, when signals had no error and instants were ints."""
    schema = current()
    schema["fields"].remove(field_of(schema, "reply_to"))
    field_of(schema, "sent_at")["type"] = "int"
    signal = field_of(schema, "body")["type"][3]
    signal["fields"].remove(field_of(signal, "error"))
    return schema


OLD_VALUE = {
    "command_id": "c",
    "workflow_id": "w",
    "sent_at": 7,
    "body": ("streamflow.SignalWorkflow", {"name": "go", "value": b"1"}),
}


def test_an_older_version_is_read_with_the_defaults_of_its_new_fields(codec):
    old = older_schema()
    with pytest.raises(UnknownSchema, match="Command cannot be decoded: expected schema"):
        codec.decode(framed(OLD_VALUE, old))
    codec.writers.add(old)
    assert codec.decode(framed(OLD_VALUE, old)) == RECORD


def test_a_new_field_of_bytes_gets_its_default(codec):
    old = current()
    start = field_of(old, "body")["type"][0]
    start["fields"].remove(field_of(start, "args"))
    codec.writers.add(old)
    value = {**OLD_VALUE, "body": ("streamflow.StartWorkflow", {"workflow": "fulfil"})}
    assert codec.decode(framed(value, old)).body == StartWorkflow(workflow="fulfil", args=b"[]")


def test_a_newer_version_is_read_without_its_new_fields(codec):
    new = current()
    new["fields"].append({"name": "priority", "type": "int", "default": 0})
    codec.writers.add(new)
    assert codec.decode(framed({**OLD_VALUE, "priority": 5}, new)) == RECORD


def test_an_upcaster_takes_over_where_avro_cannot_resolve(codec):
    old = current()
    field_of(old, "sent_at").update(name="sent", type="string")
    codec.writers.add(old, lambda value: {**value, "sent_at": int(value["sent"])})
    value = {**OLD_VALUE, "sent": "7"}
    assert codec.decode(framed(value, old)) == RECORD
    with pytest.raises(DecodeError, match="not a record of its schema: ValueError"):
        codec.decode(framed({**value, "sent": "seven"}, old))


def test_old_schemas_are_found_in_their_folder(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    for path in envelope.schema_folder().glob("*.avsc"):
        (tmp_path / path.name).write_text(path.read_text())
    old = older_schema()
    (tmp_path / "old" / "Command.1.avsc").write_text(json.dumps(old))
    monkeypatch.setattr(envelope, "schema_folder", lambda: tmp_path)
    monkeypatch.setattr(upcast, "schema_folder", lambda: tmp_path)
    monkeypatch.setitem(upcast.UPCASTERS, ("Command", 1), lambda value: {**value, "sent_at": value["sent_at"] + 1})
    found = avro.command_codec.__wrapped__().decode(framed(OLD_VALUE, old))
    assert found == Command(command_id="c", workflow_id="w", sent_at=8, body=RECORD.body)


def test_an_older_history_resolves_inside_of_its_unions():
    codec = avro.history_codec.__wrapped__()
    old = current("History")
    turn, events = old[1], field_of(old[1], "events")["type"]["items"]
    turn["fields"].remove(field_of(turn, "part"))
    completed = next(event for event in events if event["name"] == "StepCompleted")
    completed["fields"].remove(field_of(completed, "started_at"))
    events.remove(next(event for event in events if event["name"] == "RunDeleted"))
    codec.writers.add(old)
    place = {"workflow_id": "w", "turn": 1, "term": 1, "seq": 1, "at": 1, "consumed": 1}
    found = [
        ("streamflow.RunStarted", {}),
        ("streamflow.StepCompleted", {"number": 1, "attempt": 1, "result": b"1"}),
    ]
    value = ("streamflow.Turn", {**place, "events": found, "commands": [], "last": True})
    events_now = [RunStarted(), StepCompleted(number=1, attempt=1, result=b"1")]
    assert codec.decode(framed(value, old)) == Turn(**place, events=events_now)  # type: ignore[arg-type]


def test_garbage_behind_an_old_schema_raises_decode_errors_only(codec):
    header = b"\xc3\x01" + codec.writers.add(older_schema())

    @given(st.binary(max_size=60))
    def check(garbage):
        with contextlib.suppress(DecodeError):
            codec.decode(header + garbage)

    check()
    good = framed(OLD_VALUE, older_schema())
    for cut in range(len(good)):
        with pytest.raises(DecodeError):
            codec.decode(good[:cut])
    with pytest.raises(DecodeError):
        codec.decode(good + b"\0")


NOTHING = {"type": "record", "name": "Nothing", "fields": []}


@pytest.mark.parametrize(
    "items",
    ["null", NOTHING, {"type": "fixed", "name": "None0", "size": 0}, {"type": "array", "items": NOTHING}],
    ids=str,
)
def test_a_schema_whose_arrays_could_be_endless_is_refused(codec, items):
    schema = current()
    schema["fields"].append({"name": "more", "type": {"type": "array", "items": items}, "default": []})
    with pytest.raises(DecodeError, match="array items of at least a byte"):
        codec.writers.add(schema)
    with pytest.raises(DecodeError):
        codec.decode(b"\0\0\0\0\5", lambda _: schema)


# Confluent framing.


def test_a_record_of_a_registry_is_read_by_its_schema():
    asked = []

    def schema_of(schema_id):
        asked.append(schema_id)
        return {5: current(), 6: older_schema()}[schema_id]

    same = envelope.to_confluent(avro.encode_command(RECORD), 5)
    assert same[:5] == b"\0\0\0\0\5"
    assert avro.decode_command(same, schema_of) == RECORD
    other = b"\0\0\0\0\6" + body_of(OLD_VALUE, older_schema())
    assert [avro.decode_command(other, schema_of) for _ in range(3)] == [RECORD] * 3
    assert asked == [5, 6]
    with pytest.raises(UnknownSchema, match=r"schema id 7 cannot be had: KeyError"):
        avro.decode_command(b"\0\0\0\0\7", schema_of)


def test_without_a_registry_the_error_says_so():
    with pytest.raises(UnknownSchema, match=r"schema id 5.*no schema registry is configured"):
        avro.decode_command(envelope.to_confluent(avro.encode_command(RECORD), 5))


@pytest.mark.parametrize("start", [b"", b"\xc3", b"\xc3\x01", b"\xc3\x01abc", b"\0", b"\0\0\0", b"{}", b'{"a": 1}'])
def test_what_is_no_framing_is_told_with_what_was_found(start):
    with pytest.raises(DecodeError, match=r"Command cannot be decoded: expected .* found"):
        avro.decode_command(start)


def test_a_record_of_another_topic_is_refused():
    timer = avro.encode_timer(TimerRecord(workflow_id="w", kind="sleep", run=1, number=1, attempt=0, fire_at=1))
    with pytest.raises(UnknownSchema):
        avro.decode_command(timer)


def test_a_registered_record_that_fits_nothing_is_a_decode_error():
    foreign = {"type": "record", "name": "streamflow.Command", "fields": [{"name": "x", "type": "string"}]}
    with pytest.raises(DecodeError, match="not a record of its schema"):
        avro.decode_command(b"\0\0\0\0\1" + body_of({"x": "y"}, copy.deepcopy(foreign)), lambda _: foreign)
