"""Avro bodies to Structs and back, by Python functions that are generated from the schema once per process.

The library does everything else (parsing, fingerprints, older versions, the oracle of the tests); only this path is
our own, since a worker encodes and decodes thousands of turns a second: a turn of two events costs 33 + 27 us through
the library and its dicts, 6 + 8 us here. DESIGN.md has the measurements.

A writer is one expression: the joined bytes of the fields, read from the Struct. A reader walks an index `i` over the
bytes `d`. The index only grows and each array item reads at least one byte, so that garbage ends in an `IndexError` or
with the index beyond the end; no length is ever trusted with an allocation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

from streamflow.codec.envelope import DecodeError, Schema

Encode = Callable[[Any], bytes]
Decode = Callable[[bytes, int], tuple[Any, int]]

PAIR: Final = 1 << 14
"""Varints are written two bytes (14 bits) at a time, from tables."""

SMALL: Final = PAIR >> 1
"""Integers in [-SMALL, SMALL) are a single look-up."""


@cache
def _tables() -> tuple[tuple[bytes, ...], tuple[bytes, ...], tuple[bytes, ...]]:
    """Signed small integers; the two low bytes of a longer varint; the last one or two bytes of a varint."""
    more = tuple(bytes((z & 127 | 128, z >> 7 | 128)) for z in range(PAIR))
    last = tuple(bytes((z,)) if z < 128 else bytes((z & 127 | 128, z >> 7)) for z in range(PAIR))
    # Indexed by n itself: a negative n counts from the end, which is where its bytes are.
    small = tuple(last[2 * n] for n in range(SMALL)) + tuple(last[-2 * n - 1] for n in range(-SMALL, 0))
    return small, more, last


def _writer_of_integers(bits: int) -> Callable[[int], bytes]:
    """A writer of integers of any size up to `bits`, for those that are not small."""
    _, more, last = _tables()
    limit = 1 << (bits - 1)

    def write(n: int) -> bytes:
        if not -limit <= n < limit:
            raise OverflowError(f"{n} does not fit into {bits} bits")
        z = n << 1 if n >= 0 else ~(n << 1)
        if 1 << 28 <= z < 1 << 42:  # the instants of this century: 0.25 us less than through the loop
            return more[z & (PAIR - 1)] + more[z >> 14 & (PAIR - 1)] + last[z >> 28]
        out = b""
        while z >= PAIR:
            out += more[z & (PAIR - 1)]
            z >>= 14
        return out + last[z]

    return write


def _reader_of_integers(bits: int) -> Callable[[bytes, int], tuple[int, int]]:
    """A reader of integers of more than one byte, up to `bits`."""
    ceiling = 1 << bits

    def read(d: bytes, i: int) -> tuple[int, int]:
        b = d[i]
        n = b & 127
        shift = 7
        while b > 127:
            i += 1
            b = d[i]
            n |= (b & 127) << shift
            shift += 7
            if shift > 70:
                raise DecodeError(f"expected an integer of at most 10 bytes, found a longer one at byte {i - 10}")
        if n >= ceiling:
            raise DecodeError(f"expected an integer of {bits} bits, found a larger one before byte {i + 1}")
        return (n >> 1) ^ -(n & 1), i + 1

    return read


class _Generator:
    """Source text of the writers and readers of one schema, and the names that it refers to."""

    def __init__(self, classes: Mapping[str, type]) -> None:
        self.lines: list[str] = []
        self.named: dict[str, Schema] = {}
        self.done: set[str] = set()
        self.space: dict[str, Any] = {
            "join": b"".join,
            "SMALL": _tables()[0],
            "ZIGZAG": tuple((n >> 1) ^ -(n & 1) for n in range(128)),
            "FLAGS": (False, True),
            "DecodeError": DecodeError,
        }
        for bits in (32, 64):
            self.space[f"write{bits}"] = _writer_of_integers(bits)
            self.space[f"read{bits}"] = _reader_of_integers(bits)
        for name, cls in classes.items():
            self.space[f"new_{name}"] = cls

    def resolve(self, schema: Schema) -> Schema:
        """`schema` itself, or the definition of the record that it names."""
        if isinstance(schema, str):
            return self.named.get(schema, schema)
        if isinstance(schema, dict) and schema["type"] == "record":
            self.named[schema["name"]] = schema
        return schema

    # Writers: expressions of type bytes, to be joined.

    def write(self, schema: Schema, source: str) -> list[str]:
        """The pieces of the value of the expression `source`, which is evaluated once, in the first piece."""
        match self.resolve(schema):
            case "long" | "int" as kind:
                return [_integer(f"n := {source}", 64 if kind == "long" else 32)]
            case "boolean":
                return [f"(b'\\1' if {source} else b'\\0')"]
            case "bytes":
                return [_integer(f"n := len(s := {source})"), "s"]
            case "string":
                return [_integer(f"n := len(s := {source}.encode())"), "s"]
            case ["null", other]:
                return [f"(b'\\0' if (v := {source}) is None else b'\\2' + {_one(self.write(other, 'v'))})"]
            case list() as branches:
                return [f"{self.union_writers(branches)}[type(v := {source})](v)"]
            case {"type": "array", "items": items}:
                many = f"join(({_integer('n := len(a)')}, *[{_one(self.write(items, 'x'))} for x in a], b'\\0'))"
                return [f"({many} if (a := {source}) else b'\\0')"]
            case {"type": "record"} as record:
                return [f"{self.record_writer(record, b'')}({source})"]
            case other:
                raise NotImplementedError(f"schemas of streamflow use no {other!r}")

    def union_writers(self, branches: list[Schema], prefix: bytes = b"") -> str:
        """The name of a table from class to the writer of the branch's index and body."""
        table = {}
        for index, branch in enumerate(branches):
            record = self.resolve(branch)
            writer = self.record_writer(record, prefix + _tables()[0][index])
            table[self.space[f"new_{_short(record)}"]] = writer
        name = f"union_{len(self.space)}"
        self.space[name] = table  # of names as yet: filled with the functions once these exist
        return name

    def record_writer(self, record: Schema, prefix: bytes) -> str:
        """The name of a function that gives `prefix` and the record's body."""
        name = f"write_{_short(record)}_{prefix.hex()}"
        if name not in self.done:
            self.done.add(name)
            parts = [repr(prefix)] if prefix else []
            parts += [part for field in record["fields"] for part in self.write(field["type"], f"o.{field['name']}")]
            self.lines.append(f"def {name}(o): return {_one(parts)}")
        return name

    # Readers: statements that set `target` and move `i`.

    def read(self, schema: Schema, target: str) -> list[str]:
        """Read one value into the variable `target`."""
        match self.resolve(schema):
            case "long" | "int" as kind:
                return [
                    "n = d[i]",
                    f"if n < 128: {target} = ZIGZAG[n]; i += 1",
                    f"else: {target}, i = read{64 if kind == 'long' else 32}(d, i)",
                ]
            case "boolean":
                return [f"{target} = FLAGS[d[i]]; i += 1"]
            case "bytes" | "string" as kind:
                return [
                    "n = d[i]",
                    "if n < 128: n = ZIGZAG[n]; i += 1",
                    "else: n, i = read64(d, i)",
                    "if n < 0: raise DecodeError(f'expected a length, found {n} before byte {i}')",
                    f"{target} = d[i:i + n]{'.decode()' if kind == 'string' else ''}; i += n",
                ]
            case ["null", other]:
                return [
                    "n = d[i]; i += 1",
                    f"if n == 0: {target} = None",
                    "elif n == 2:",
                    *_indented(self.read(other, target)),
                    "else: raise DecodeError(f'expected null or a value, found branch {n >> 1} before byte {i}')",
                ]
            case list() as branches:
                return [f"{target}, i = {self.union_readers(branches)}[d[i]](d, i + 1)"]
            case {"type": "array", "items": items}:
                assert _takes_a_byte(self.resolve(items)), "garbage could ask for 2^60 items of nothing"
                return [
                    f"{target} = []",
                    "while True:",
                    "    n = d[i]",
                    "    if n == 0: i += 1; break",
                    "    k, i = (ZIGZAG[n], i + 1) if n < 128 else read64(d, i)",
                    "    if k == 0: break",  # written longer than needed
                    "    if k < 0: k = -k; _, i = read64(d, i)",  # a block with its size, for readers that skip
                    "    for _ in range(k):",
                    *_indented(_indented([*self.read(items, "x"), f"{target}.append(x)"])),
                ]
            case {"type": "record"} as record:
                return [f"{target}, i = {self.record_reader(record)}(d, i)"]
            case other:
                raise NotImplementedError(f"schemas of streamflow use no {other!r}")

    def union_readers(self, branches: list[Schema]) -> str:
        """The name of a table from the byte of a branch's index to the reader of its body."""
        assert len(branches) <= 64, "the index must be one byte"
        readers = {2 * index: self.record_reader(self.resolve(branch)) for index, branch in enumerate(branches)}
        name = f"union_{len(self.space)}"
        self.space[name] = readers
        return name

    def record_reader(self, record: Schema) -> str:
        """The name of a function that reads the record's body."""
        name = f"read_{_short(record)}"
        if name not in self.done:
            self.done.add(name)
            body = [line for field in record["fields"] for line in self.read(field["type"], f"f_{field['name']}")]
            arguments = ", ".join(f"{field['name']}=f_{field['name']}" for field in record["fields"])
            self.lines += [f"def {name}(d, i):", *_indented(body), f"    return new_{_short(record)}({arguments}), i"]
        return name

    def functions(self) -> dict[str, Any]:
        """Run the source; the tables of names become tables of functions."""
        source = "\n".join(self.lines)
        code = compile(source, f"<streamflow.codec {min(self.done)}>", "exec")
        exec(code, self.space)  # noqa: S102 - made from our own schemas only
        for name, table in list(self.space.items()):
            if name.startswith("union_"):
                self.space[name] = {key: self.space[function] for key, function in table.items()}
        return self.space


def compile_schema(schema: Schema, classes: Mapping[str, type], header: bytes) -> tuple[Encode, Decode]:
    """A writer of `header` and body, and a reader of the body from an index on, which also gives where it ended.

    `schema` is parsed, a record or a union of records; `classes` are the Structs by the records' short names. The
    reader raises `DecodeError`, `IndexError`, `KeyError` or `UnicodeDecodeError` on bytes that are not of the schema.
    """
    generator = _Generator(classes)
    if isinstance(schema, list):
        writers = generator.union_writers(schema, header)
        readers = generator.union_readers(schema)
        generator.lines += [
            f"def encode(o): return {writers}[type(o)](o)",
            f"def decode(d, i): return {readers}[d[i]](d, i + 1)",
        ]
    else:
        generator.resolve(schema)
        generator.lines += [
            f"encode = {generator.record_writer(schema, header)}",
            f"decode = {generator.record_reader(schema)}",
        ]
    space = generator.functions()
    return space["encode"], space["decode"]


def _takes_a_byte(schema: Schema) -> bool:
    return not isinstance(schema, dict) or schema["type"] == "array" or bool(schema["fields"])


def _short(record: Schema) -> str:
    return str(record["name"]).rpartition(".")[2]


def _integer(source: str, bits: int = 64) -> str:
    """The bytes of the integer that `source` binds to `n`."""
    return f"(SMALL[n] if -{SMALL} <= ({source}) < {SMALL} else write{bits}(n))"


def _one(parts: list[str]) -> str:
    """One expression for all parts."""
    return parts[0] if len(parts) == 1 else f"join(({', '.join(parts)}))"


def _indented(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]
