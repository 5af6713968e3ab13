"""How a value says which schema wrote it, and where the schemas come from.

Two framings are read: Avro's single-object encoding (C3 01, the little-endian CRC-64-AVRO fingerprint of the schema's
parsing canonical form, the body) and Confluent's (a zero byte, the big-endian id of the schema in a registry, the
body). The first is the default because a log that explains itself needs no other service to be replayed.

This is the bottom of the package: it knows no record type.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Final, TypeAlias

Schema: TypeAlias = Any
"""A schema as JSON has it: a str, a list (a union) or a dict."""

SchemaOf: TypeAlias = Callable[[int], Schema]
"""Gives the schema that a registry knows under an id. It is asked once per id, so it need not cache."""

SINGLE_OBJECT: Final = b"\xc3\x01"
SINGLE_OBJECT_SIZE: Final = 10
CONFLUENT: Final = b"\x00"
CONFLUENT_SIZE: Final = 5


class EncodeError(ValueError):
    """A record holds a value that its schema cannot take; the text names the field."""


class DecodeError(ValueError):
    """Bytes that are not a record of the expected kind: the only error that decoding raises."""


class UnknownSchema(DecodeError):
    """A well framed record whose schema is not known here: of a newer version, or a producer's own."""


NOT_OF_THE_RECORD: Final = (MemoryError, OSError, ImportError)
"""Errors that say nothing about the bytes: the process is short of something, or not wholly installed. Whoever took
them for a `DecodeError` would set a good record aside for ever."""


@cache
def schema_folder() -> Path:
    """Where the `.avsc` files are: in the package when it was installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "schemas", package.parent / "schemas"):
        if (folder / "Command.avsc").is_file():
            return folder
    raise FileNotFoundError(f"no schemas in {package / 'schemas'} nor beside the package: reinstall streamflow")


def load_schema(name: str) -> Schema:
    """The parsed current schema of the record `name`."""
    return parse(json.loads((schema_folder() / f"{name}.avsc").read_text(encoding="utf-8")))


def parse(schema: Schema) -> Schema:
    """`schema` checked, with full names everywhere."""
    from fastavro import parse_schema  # lazily: whoever imports streamflow for its types alone need not load it

    parsed = parse_schema(schema, named_schemas={})
    _mend_defaults(parsed)
    return parsed


def _mend_defaults(schema: Schema) -> None:
    """Make the defaults of bytes, which a schema writes as a str, what the library can put into such a field."""
    if isinstance(schema, list):
        for branch in schema:
            _mend_defaults(branch)
    elif isinstance(schema, dict):
        for field in schema.get("fields", ()):
            _mend_defaults(field["type"])
            if field["type"] == "bytes" and isinstance(field.get("default"), str):
                field["default"] = field["default"].encode("latin-1")
        _mend_defaults(schema.get("items"))


def fingerprint(schema: Schema) -> bytes:
    """The CRC-64-AVRO fingerprint of `schema`, in the byte order in which single-object encoding carries it."""
    from fastavro.schema import fingerprint as hex_fingerprint
    from fastavro.schema import to_parsing_canonical_form

    return bytes.fromhex(hex_fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO"))


class _Exact(BytesIO):
    """Bytes that are never read short: the library takes what is there for the whole of a string."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            raise DecodeError(f"expected a length, found {size} at byte {self.tell()}")
        data = super().read(size)
        if len(data) < size:
            raise DecodeError(f"expected {size} bytes, found {len(data)} at the end")
        return data


def read_body(body: bytes, writer: Schema, reader: Schema | None = None) -> Any:
    """The value in `body`, of the schema `reader` if given: records are dicts, those in unions (name, dict) pairs."""
    from fastavro import schemaless_reader

    source = _Exact(body)
    value = schemaless_reader(source, writer, reader, return_record_name=True)
    if source.tell() != len(body):
        raise DecodeError(f"expected the record to end after {source.tell()} bytes, found {len(body)}")
    return value


def write_body(value: Any, schema: Schema) -> bytes:
    """The inverse of `read_body`."""
    from fastavro import schemaless_writer

    out = BytesIO()
    schemaless_writer(out, schema, value)
    return out.getvalue()


def split(data: bytes) -> tuple[bytes | int, int]:
    """What names the writer's schema (a fingerprint or a registry's id), and where the body begins."""
    if data.startswith(SINGLE_OBJECT):
        if len(data) < SINGLE_OBJECT_SIZE:
            raise DecodeError(f"expected a fingerprint of 8 bytes behind C3 01, found {len(data) - 2} bytes")
        return data[2:SINGLE_OBJECT_SIZE], SINGLE_OBJECT_SIZE
    if data.startswith(CONFLUENT):
        if len(data) < CONFLUENT_SIZE:
            raise DecodeError(f"expected a schema id of 4 bytes behind 00, found {len(data) - 1} bytes")
        return int.from_bytes(data[1:CONFLUENT_SIZE], "big"), CONFLUENT_SIZE
    start = data[:8].hex(" ") or "nothing"
    raise DecodeError(f"expected Avro with C3 01 and a fingerprint, or 00 and a schema id, in front; found {start}")


def to_confluent(data: bytes, schema_id: int) -> bytes:
    """The same record in Confluent framing: `data` is in single-object framing, `schema_id` names its schema."""
    assert data.startswith(SINGLE_OBJECT), data[:2]
    return CONFLUENT + schema_id.to_bytes(4, "big") + data[SINGLE_OBJECT_SIZE:]
