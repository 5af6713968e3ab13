"""Records of other schemas than the current ones: older versions of ours, and those of a registry.

Schemas are never edited after a release. A changed record gets a new schema; the former one moves to
`schemas/old/<Name>.<version>.avsc`, so that what was written under it can be read for ever. Avro's own resolution
(fields with defaults, promotions, aliases) does the rest; where it cannot, an upcaster in `UPCASTERS` turns the old
version's value into one of the current version.

This path takes several times as long as `compiled`, and is taken only for records that an older version wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from streamflow.codec.envelope import (
    NOT_OF_THE_RECORD,
    DecodeError,
    Schema,
    fingerprint,
    parse,
    read_body,
    schema_folder,
    write_body,
)
from streamflow.codec.foreign import refuse_endless

Upcaster: TypeAlias = Callable[[Any], Any]
"""From an old version's value to one of the current version: records are dicts, those in unions (name, dict) pairs."""

UPCASTERS: Final[dict[tuple[str, int], Upcaster]] = {}
"""By record and version of the old schema, where Avro's own resolution is not enough."""


@dataclass(frozen=True, slots=True)
class Writer:
    """A schema that some record was written with, and how to make its values current."""

    schema: Schema
    upcaster: Upcaster | None = None


class Writers:
    """The writer schemas known for one kind of record, by fingerprint."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._by_fingerprint: dict[bytes, Writer] = {}
        for path in sorted((schema_folder() / "old").glob(f"{name}.*.avsc")):
            version = int(path.name.split(".")[1])
            self.add(json.loads(path.read_text(encoding="utf-8")), UPCASTERS.get((name, version)))

    def add(self, schema: Schema, upcaster: Upcaster | None = None) -> bytes:
        """Know one more schema; gives its fingerprint."""
        parsed = parse(schema)
        refuse_endless(parsed)
        key = fingerprint(parsed)
        self._by_fingerprint[key] = Writer(parsed, upcaster)
        return key

    def get(self, key: bytes) -> Writer | None:
        """The schema of that fingerprint."""
        return self._by_fingerprint.get(key)


def to_current(body: bytes, writer: Writer, current: Schema) -> bytes:
    """`body`, as `writer` wrote it, as the body that the `current` schema gives to the same value."""
    try:
        if writer.upcaster is None:
            value = read_body(body, writer.schema, current)
        else:
            value = writer.upcaster(read_body(body, writer.schema))
        return write_body(value, current)
    except (DecodeError, *NOT_OF_THE_RECORD):
        raise
    except Exception as error:  # the library's own errors have no common base, and an upcaster may meet anything
        raise DecodeError(f"not a record of its schema: {type(error).__name__}: {error}") from error
