"""The schemas are the classes: same names, same order, same defaults; and every word of them is documented."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import msgspec
import pytest
from fastavro import parse_schema, schemaless_writer
from msgspec import NODEFAULT

from streamflow.codec import avro, envelope
from streamflow.core.commands import BODIES, Command, SignalWorkflow, StartWorkflow
from streamflow.core.events import EVENTS, Claim, Consumed, RunSnapshot, Turn
from tests.codec.records import KINDS, fields_of

FILES = sorted(envelope.schema_folder().glob("*.avsc"))


def records(schema: Any) -> Iterator[dict[str, Any]]:
    """All records defined in a schema."""
    if isinstance(schema, list):
        for branch in schema:
            yield from records(branch)
    elif isinstance(schema, dict):
        if schema["type"] == "record":
            yield schema
            for field in schema["fields"]:
                yield from records(field["type"])
        elif schema["type"] == "array":
            yield from records(schema["items"])


def union_of(schema: Any, field: str) -> list[str]:
    found = next(f for f in schema["fields"] if f["name"] == field)["type"]
    branches = found["items"] if isinstance(found, dict) else found
    return [branch["name"] for branch in branches]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_record_and_field_is_documented(path):
    found = list(records(json.loads(path.read_text())))
    assert found
    for record in found:
        assert record["doc"].endswith("."), record["name"]
        for field in record["fields"]:
            assert field["doc"], (record["name"], field["name"])


def test_there_is_a_file_for_each_topic():
    assert [path.stem for path in FILES] == sorted(KINDS)


def test_unions_are_in_the_order_of_the_classes():
    command = json.loads((envelope.schema_folder() / "Command.avsc").read_text())
    history = json.loads((envelope.schema_folder() / "History.avsc").read_text())
    assert union_of(command, "body") == [cls.__name__ for cls in BODIES]
    assert [branch["name"] for branch in history] == [cls.__name__ for cls in (Claim, Turn, RunSnapshot, Consumed)]
    assert union_of(history[1], "events") == [cls.__name__ for cls in EVENTS]


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_fields_and_defaults_are_those_of_the_classes(kind):
    # Each class is found through the codec: an extra or missing field would break encoding or decoding.
    classes = {cls.__name__.removesuffix("Record"): cls for cls in (*kind.classes, *BODIES, *EVENTS)}
    seen = 0
    for record in records(kind.codec().schema):
        cls = classes.get(record["name"].removeprefix("streamflow."))
        if cls is None:
            assert record["name"] in ("streamflow.ErrorInfo", "streamflow.Applied", "streamflow.RemoteCall")
            continue
        seen += 1
        assert {field["name"] for field in record["fields"]} == set(fields_of(cls))
        defaults = {field.name: field.default for field in msgspec.structs.fields(cls)}
        factories = {field.name: field.default_factory for field in msgspec.structs.fields(cls)}
        for field in record["fields"]:
            default = (
                factories[field["name"]]() if factories[field["name"]] is not NODEFAULT else defaults[field["name"]]
            )
            assert field.get("default", NODEFAULT) == default, (record["name"], field["name"])
    assert seen


def test_a_foreign_producer_needs_no_more_than_the_contract_says():
    # A producer with the library and the schema file only, in Python or elsewhere.
    schema = parse_schema(json.loads((envelope.schema_folder() / "Command.avsc").read_text()))
    for body, expected in (
        (
            ("streamflow.StartWorkflow", {"workflow": "fulfil", "args": b"[1]"}),
            StartWorkflow(workflow="fulfil", args=b"[1]"),
        ),
        (("streamflow.SignalWorkflow", {"name": "go"}), SignalWorkflow(name="go")),
    ):
        out = BytesIO(b"\xc3\x01" + envelope.fingerprint(schema))
        out.seek(10)
        schemaless_writer(out, schema, {"command_id": "c", "workflow_id": "w", "sent_at": 1, "body": body})
        found = avro.decode_command(out.getvalue())
        assert found == Command(command_id="c", workflow_id="w", sent_at=1, body=expected)


def test_the_fingerprint_is_the_one_of_the_specification():
    # 0x63dd24e7cc258f8a for "null", carried with the lowest byte first.
    assert envelope.fingerprint("null") == bytes.fromhex("63dd24e7cc258f8a")[::-1]


def test_schemas_are_found_in_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "streamflow" / "codec").mkdir(parents=True)
    monkeypatch.setattr(envelope, "__file__", str(tmp_path / "streamflow" / "codec" / "envelope.py"))
    find = envelope.schema_folder.__wrapped__
    with pytest.raises(FileNotFoundError, match="reinstall"):
        find()
    for folder in (tmp_path / "schemas", tmp_path / "streamflow" / "schemas"):
        folder.mkdir()
        (folder / "Command.avsc").write_text("{}")
        assert find() == folder
