"""Values as JSON through their types: what comes back is equal, or the value is refused where it is handed over."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.codec.payload import check_value_type, decode_value, encode_value
from streamflow.errors import InvalidArguments


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(NamedTuple):
    x: int
    y: int = 0


class Address(TypedDict, total=False):
    street: str
    number: int


class Line(msgspec.Struct):
    sku: str
    price: Decimal


@dataclass
class Order:
    id: UUID
    at: datetime
    lines: list[Line]
    colour: Colour | None = None
    tags: frozenset[str] = frozenset()
    parent: Order | None = None


LINE = st.builds(Line, sku=st.text(), price=st.decimals(allow_nan=False, allow_infinity=False))
AWARE = st.datetimes(timezones=st.just(UTC))
ORDER = st.builds(
    Order,
    id=st.uuids(),
    at=AWARE,
    lines=st.lists(LINE, max_size=3),
    colour=st.none() | st.sampled_from(Colour),
    tags=st.frozensets(st.text()),
    parent=st.none(),
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=15,
)

TYPED = {
    "int": (int, st.integers()),
    "float": (float, st.floats(allow_nan=False, allow_infinity=False)),
    "str": (str, st.text()),
    "bytes": (bytes, st.binary()),
    "bool": (bool, st.booleans()),
    "None": (None, st.none()),
    "datetime": (datetime, AWARE),
    "date": (date, st.dates()),
    "time": (time, st.times()),
    "timedelta": (timedelta, st.timedeltas(timedelta(-100_000), timedelta(100_000))),
    "UUID": (UUID, st.uuids()),
    "Decimal": (Decimal, st.decimals(allow_nan=False)),
    "enum": (Colour, st.sampled_from(Colour)),
    "literal": (Literal["a", 1], st.sampled_from(["a", 1])),
    "optional": (int | None, st.none() | st.integers()),
    "union": (int | str | list[bytes], st.integers() | st.text() | st.lists(st.binary())),
    "list": (list[datetime], st.lists(AWARE)),
    "dict": (dict[UUID, int], st.dictionaries(st.uuids(), st.integers())),
    "dict of ints": (dict[int, str], st.dictionaries(st.integers(-(2**63), 2**63 - 1), st.text())),
    "tuple": (tuple[int, str], st.tuples(st.integers(), st.text())),
    "tuple of any length": (tuple[bytes, ...], st.lists(st.binary()).map(tuple)),
    "set": (set[str], st.sets(st.text())),
    "NamedTuple": (Point, st.builds(Point, st.integers(), st.integers())),
    "TypedDict": (Address, st.fixed_dictionaries({}, optional={"street": st.text(), "number": st.integers()})),
    "Struct": (Line, LINE),
    "dataclass": (Order, ORDER),
    "dataclass in itself": (
        Order,
        ORDER.flatmap(lambda order: ORDER.map(lambda o: dataclasses.replace(o, parent=order))),
    ),
    "Annotated": (Annotated[int, msgspec.Meta(ge=0)], st.integers(0)),
    "untyped": (Any, JSON),
}


def signature(annotation):
    from streamflow.codec.payload import Signature

    def keep(value): ...

    keep.__annotations__ = {"value": annotation, "return": annotation}
    return Signature(keep)


@pytest.mark.parametrize(("annotation", "values"), TYPED.values(), ids=list(TYPED))
@given(data=st.data())
def test_a_value_comes_back_equal_and_of_its_type(annotation, values, data):
    value = data.draw(values)
    keep = signature(annotation)
    for found in (
        keep.decode_result(keep.encode_result(value)),
        keep.decode_args(keep.encode_args((value,), {}))[0][0],
        keep.decode_args(keep.encode_args((), {"value": value}))[0][0],
        decode_value(encode_value(value), annotation),
    ):
        assert found == value
        assert type(found) is type(value)


@given(JSON)
def test_an_untyped_value_is_its_json(value):
    assert decode_value(encode_value(value)) == value


@given(st.binary())
def test_bytes_that_are_not_json_are_invalid_arguments(data):
    for annotation in (Any, int, Order, bytes):
        with contextlib.suppress(InvalidArguments):
            decode_value(data, annotation)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), [1, {"a": (float("-inf"),)}], {"b": float("nan")}, {1.5, float("nan")}],
    ids=repr,
)
def test_what_json_cannot_say_is_refused_and_not_turned_into_null(value):
    with pytest.raises(InvalidArguments, match=r"the value: (nan|-?inf) cannot be written as JSON"):
        encode_value(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (object(), "builtins.object cannot be written as JSON"),
        (socket.AF_INET.__class__, "cannot be written as JSON"),
        ("\ud800", "surrogates not allowed"),
        ({(1, 2): 3}, "builtins.tuple cannot be written as JSON"),
        ({True: 3}, "builtins.bool cannot be written as JSON"),
    ],
)
def test_what_is_not_json_is_told(value, text):
    with pytest.raises(InvalidArguments, match=text):
        encode_value(value)


def test_a_value_within_itself_is_refused():
    value: list[Any] = []
    value.append(value)
    with pytest.raises(InvalidArguments, match="recursion"):
        encode_value(value)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (bytes, "abcd"),
        (bytes | None, "abcd"),
        (list[bytes], ["abcd"]),
        (datetime, "2026-01-01T00:00:00Z"),
        (date, "2026-01-01"),
        (timedelta, "PT1S"),
        (UUID, "12345678-1234-5678-1234-567812345678"),
        (Decimal, "1.5"),
        (Decimal, 1.5),
        (dict[str, UUID], {"a": "12345678-1234-5678-1234-567812345678"}),
        (Line, Line(sku="a", price="1.5")),  # type: ignore[arg-type]
        (int, "5"),
        (int, True),
        (str, 5),
        (float, "1.5"),
        (float, float("nan")),
        (int, None),
        (set[int], {"a"}),
    ],
)
def test_a_value_is_never_taken_for_one_of_another_type(annotation, value):
    # JSON would make some of these the annotated type on the other side, silently another value.
    with pytest.raises(InvalidArguments):
        signature(annotation).encode_args((value,), {})
    with pytest.raises(InvalidArguments):
        signature(annotation).encode_result(value)


def test_an_int_is_a_float():
    keep = signature(float)
    assert repr(keep.decode_result(keep.encode_result(2))) == "2.0"


def test_text_for_a_typed_value_is_fine_when_it_comes_as_json():
    # A foreign producer can only write text: there it is the value.
    assert decode_value(b'"2026-01-01"', date) == date(2026, 1, 1)
    assert decode_value(b'"YWI="', bytes) == b"ab"


def test_types_of_signals():
    check_value_type(Order)
    check_value_type(Annotated[int, ["unhashable"]])
    assert decode_value(b"5", Annotated[int, ["unhashable"]]) == 5
    with pytest.raises(TypeError, match=r"socket.socket cannot be written as JSON"):
        check_value_type(socket.socket)
    with pytest.raises(InvalidArguments, match="the value: expected `bool`, found `int`"):
        decode_value(b"5", bool)
    with pytest.raises(InvalidArguments, match=r"the value\[1\]\.price: Invalid decimal string"):
        decode_value(b'[{"sku":"a","price":"1"},{"sku":"a","price":"x"}]', list[Line])


SCRIPT = """
import enum, msgspec
from dataclasses import dataclass
from typing import Any
from streamflow.codec.payload import Signature, encode_value
Colour = enum.Enum("Colour", "RED GREEN BLUE BLACK WHITE")
@dataclass(frozen=True, slots=True)
class D:
    tags: set[str]
    colours: frozenset[Colour]
    names: dict[int, frozenset[str]]
class S(msgspec.Struct, frozen=True, tag=True, rename="upper"):
    inner: D
    nested: set[frozenset[str]]
def f(a: set[str], b: D, c, s: S): ...
names = {"a%d" % i for i in range(20)}
d = D(names, frozenset(Colour), {7: frozenset(names), 6: frozenset()})
s = S(d, {frozenset({"x", "y"}), frozenset({"z"}), frozenset({"v", "w"})})
signature = Signature(f)
data = signature.encode_args((names, d, {"b": [names], "a": {1, "x", None}}, s), {})
assert signature.decode_args(data)[0][0] == names
assert signature.decode_args(data)[0][1] == d
assert signature.decode_args(data)[0][3] == s
print(data, encode_value([names, {"z": names, 5: 1}, s]))
"""


def test_the_bytes_of_a_set_do_not_depend_on_the_hash_seed():
    root = Path(__file__).parents[2]
    outputs = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1


def test_the_order_of_a_dict_is_kept():
    assert encode_value({"b": 1, "a": {"d": 1, "c": 2}}) == b'{"b":1,"a":{"d":1,"c":2}}'
