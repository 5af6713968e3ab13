"""Targets and examples for payloads: JSON to the types of users, which are the first byte of an input."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, NamedTuple, TypedDict
from uuid import UUID

import msgspec
import pydantic

from streamflow.codec.payload import Signature, decode_value, encode_value


class Colour(enum.Enum):
    """An enum by value."""

    RED = "red"
    BLUE = "blue"


class Point(NamedTuple):
    """A tuple with names."""

    x: int
    y: float = 0.0


class Address(TypedDict, total=False):
    """A dict with names."""

    street: str
    number: int


class Card(msgspec.Struct, tag="card"):
    """One of a tagged union."""

    number: Annotated[str, msgspec.Meta(max_length=20)]


class Cash(msgspec.Struct, tag="cash"):
    """The other."""

    amount: Decimal


class Model(pydantic.BaseModel):
    """A model of pydantic, which reads the JSON itself."""

    id: UUID
    at: datetime
    items: list[int | str] = []


@dataclass
class Order:
    """What users have most: a dataclass, with all kinds of fields and itself in it."""

    id: UUID
    at: datetime
    payment: Card | Cash
    lines: list[tuple[str, Decimal]] = field(default_factory=list)
    tags: frozenset[str] = frozenset()
    colour: Colour | None = None
    parent: Order | None = None


AT: Final = datetime(2026, 5, 1, 6, 30, tzinfo=UTC)
ID: Final = UUID("8f14e45f-ceea-467f-a7d5-91e1f3a7c8a1")
ORDER: Final = Order(ID, AT, Card("4111"), [("a", Decimal("1.50"))], frozenset({"x", "y"}), Colour.RED)

TYPED: Final[tuple[tuple[Any, Any], ...]] = (
    (Any, {"a": [1, -2.5, "é", None, True]}),
    (int, -5),
    (float, 1.5e300),
    (str, "é\n\U0001f600"),
    (bytes, b"\0\xff"),
    (datetime, AT),
    (date, AT.date()),
    (time, time(6, 30, 0, 5)),
    (timedelta, timedelta(days=-3, microseconds=7)),
    (UUID, ID),
    (Decimal, Decimal("-1.5e10")),
    (Colour, Colour.BLUE),
    (Literal["a", 1], "a"),
    (int | str | list[bytes], [b"a"]),
    (dict[UUID, int], {ID: 1}),
    (dict[int, list[date]], {-1: [AT.date()]}),
    (set[int | str], {1, "a"}),
    (set[Any], {1, "a", None}),
    (tuple[bytes, ...], (b"a", b"b")),
    (Point, Point(1, 2.5)),
    (Address, {"street": "x", "number": 5}),
    (Card | Cash, Cash(Decimal(5))),
    (Model, Model(id=ID, at=AT, items=[1, "a"])),
    (Order, ORDER),
    (Order, Order(ID, AT, Cash(Decimal(1)), parent=ORDER)),
)
"""Types, each with a value. The first byte of an input chooses one, modulo their number."""


def _keeper(annotation: Any) -> Signature:
    def keep(value: Any) -> Any:
        return value

    keep.__annotations__ = {"value": annotation, "return": annotation}
    return Signature(keep)


KEEPERS: Final = tuple(_keeper(annotation) for annotation, _ in TYPED)


def call(order: Order, count: int, /, note: str = "", *, at: datetime | None = None, rest: Any = None) -> None:
    """A function with parameters of all kinds that may be recorded."""


CALL: Final = Signature(call)


def value(data: bytes) -> None:
    """A result, and the same as the value of a signal; what was taken is written and read again alike."""
    index = data[0] % len(TYPED) if data else 0
    keeper, annotation = KEEPERS[index], TYPED[index][0]
    found = keeper.decode_result(data[1:])
    # Compared as bytes: a NaN of a Decimal is not equal to itself.
    written = keeper.encode_result(found)
    assert keeper.encode_result(keeper.decode_result(written)) == written
    assert encode_value(decode_value(data[1:], annotation)) == written


def arguments(data: bytes) -> None:
    """The arguments of a call."""
    args, kwargs = CALL.decode_args(data)
    written = CALL.encode_args(args, kwargs)
    again = CALL.decode_args(written)
    assert CALL.encode_args(*again) == written


def examples() -> list[bytes]:
    """A value of each type."""
    return [bytes([index]) + KEEPERS[index].encode_result(each) for index, (_, each) in enumerate(TYPED)]


def calls() -> list[bytes]:
    """Calls with few and with all arguments."""
    return [
        CALL.encode_args((ORDER, 1), {}),
        CALL.encode_args((ORDER, 1, "note"), {"at": AT, "rest": [{"a": 1}]}),
        CALL.encode_args((ORDER, 1), {"rest": 5}),
    ]
