"""Schemas that others wrote, as a registry has them: which are refused before a record is read with them.

The library follows a schema with C code that knows no limit: types within themselves, or very deep, end the process;
types of no bytes could be asked for 2^60 times by eight bytes, or by none, through types that hold the next one twice.
What is refused here is no schema of a command that anybody sends; the record goes to the dead letters.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from streamflow.codec.envelope import DecodeError, Schema

SCHEMA_NESTING_MAX: Final = 100
"""Lists and objects of a schema within each other; our deepest has 12."""
TYPE_NESTING_MAX: Final = 50
"""Types within each other, also by name; our deepest has 6."""
VALUES_PER_BYTE_MAX: Final = 16
"""Fields that a record may have for each byte that it takes at least, and so the work that a byte can ask for."""


class Measure(NamedTuple):
    """What one value of a type takes: `values` are made for at least `bytes`, `depth` of them within each other."""

    values: int
    bytes: int
    depth: int


def refuse_unreadable(schema: Schema) -> None:
    """Refuse what must not even be parsed; `DecodeError` says why."""
    found = [schema]
    for _ in range(SCHEMA_NESTING_MAX):
        below: list[Schema] = []
        for item in found:
            if isinstance(item, list):
                below += item
            elif isinstance(item, dict):
                below += item.values()
                # By such the library marks what it has parsed itself, and then looks no further.
                if marks := [name for name in item if str(name).startswith("__")]:
                    raise DecodeError(f"expected a schema with attributes of Avro, found {marks[0]!r} in it")
        if not below:
            return
        found = below
    raise DecodeError(f"expected a schema of at most {SCHEMA_NESTING_MAX} levels, found a deeper one")


def without_logical_types(schema: Schema) -> Schema:
    """The schema as far as it says what the bytes are.

    A producer's `timestamp-millis` is a long to us; the library would make a datetime of it, which no long takes.
    """
    if isinstance(schema, list):
        return [without_logical_types(item) for item in schema]
    if isinstance(schema, dict):
        return {name: without_logical_types(item) for name, item in schema.items() if name != "logicalType"}
    return schema


def refuse_endless(schema: Schema) -> None:
    """Refuse a parsed schema by which few bytes could ask for endless work; `DecodeError` says why."""
    _Measuring().measure(schema, 0)


class _Measuring:
    def __init__(self) -> None:
        self.named: dict[str, Measure | None] = {}
        """By full name; None while it is being measured."""

    def measure(self, schema: Schema, depth: int) -> Measure:
        if depth > TYPE_NESTING_MAX:
            raise DecodeError(f"expected a schema with at most {TYPE_NESTING_MAX} types within each other, found more")
        if isinstance(schema, str):
            return self._known(schema, depth) if schema in self.named else _simple(schema)
        if isinstance(schema, list):
            branches = [self.measure(branch, depth + 1) for branch in schema]
            return Measure(1, 1, 1 + max([branch.depth for branch in branches], default=0))
        kind = schema["type"]
        if kind in ("record", "error"):
            return self._record(schema, depth)
        if kind == "enum":
            found = self.named[schema["name"]] = Measure(1, 1, 1)
            return found
        if kind == "fixed":
            size = schema["size"]
            if type(size) is not int or size < 0:
                raise DecodeError(f"expected a fixed of so many bytes, found the size {size!r:.80} in a schema")
            found = self.named[schema["name"]] = Measure(1, size, 1)
            return found
        if kind == "array":
            items = self.measure(schema["items"], depth + 1)
            if items.bytes == 0:
                raise DecodeError(
                    f"expected array items of at least a byte, found {schema['items']!r:.200} in a schema"
                )
            return Measure(1, 1, 1 + items.depth)
        if kind == "map":  # its keys take a byte each
            return Measure(1, 1, 1 + self.measure(schema["values"], depth + 1).depth)
        return self.measure(kind, depth + 1)

    def _known(self, name: str, depth: int) -> Measure:
        found = self.named[name]
        if found is None:
            raise DecodeError(f"expected a schema whose types end, found {name} within itself")
        if depth + found.depth > TYPE_NESTING_MAX:
            raise DecodeError(f"expected a schema with at most {TYPE_NESTING_MAX} types within each other, found more")
        return found

    def _record(self, schema: Schema, depth: int) -> Measure:
        name = schema["name"]
        self.named[name] = None
        fields = [self.measure(field["type"], depth + 1) for field in schema["fields"]]
        found = Measure(
            1 + sum(field.values for field in fields),
            sum(field.bytes for field in fields),
            1 + max([field.depth for field in fields], default=0),
        )
        if found.values > VALUES_PER_BYTE_MAX * (found.bytes + 1):
            raise DecodeError(
                f"expected a schema with at most {VALUES_PER_BYTE_MAX} values for each byte of a record, found "
                f"{name:.200} that has {found.values:,} in {found.bytes:,} bytes"
            )
        self.named[name] = found
        return found


def _simple(name: str) -> Measure:
    return Measure(1, 0 if name == "null" else 1, 1)
