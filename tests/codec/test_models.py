"""Pydantic models as payloads, without streamflow importing pydantic."""

from datetime import UTC, datetime
from typing import Any

import pytest

from streamflow.codec.payload import Signature, decode_value, encode_value
from streamflow.errors import InvalidArguments

pydantic = pytest.importorskip("pydantic")


class Base(pydantic.BaseModel):  # type: ignore[misc,name-defined]
    model_config = pydantic.ConfigDict(strict=True)


class Item(Base):
    at: datetime
    price: float = pydantic.Field(gt=0)


class Order(Base):
    id: str
    items: list[Item]
    parent: "Order | None" = None


AT = datetime(2026, 1, 1, tzinfo=UTC)
ORDER = Order(id="a", items=[Item(at=AT, price=1.5)], parent=Order(id="b", items=[]))


def ship(order: Order, more: dict[str, Item | None]) -> list[Order]: ...  # type: ignore[empty-body]


def test_models_come_back_equal():
    signature = Signature(ship)
    args = (ORDER, {"x": ORDER.items[0], "y": None})
    assert signature.decode_args(signature.encode_args(args, {})) == (args, {})
    assert signature.decode_result(signature.encode_result([ORDER])) == [ORDER]
    assert decode_value(encode_value(ORDER), Order) == ORDER


def test_a_model_says_what_it_refuses():
    signature = Signature(ship)
    with pytest.raises(InvalidArguments, match=r"(?s)argument order.*items\.0\.price.*greater than 0"):
        signature.decode_args(b'[{"id":"a","items":[{"at":"2026-01-01T00:00:00Z","price":-1}]},{}]')
    with pytest.raises(InvalidArguments, match="argument order"):
        signature.encode_args(({"id": 5}, {}), {})


class Tagged(Base):
    tags: set[str]
    names: dict[str, Any]


def test_the_sets_of_a_model_are_written_in_order():
    value = Tagged(tags={"c", "a", "b", "d"}, names={"x": {2, 1, 3}})
    assert encode_value(value) == b'{"tags":["a","b","c","d"],"names":{"x":[1,2,3]}}'
    assert decode_value(encode_value(value), Tagged).tags == value.tags


def test_a_model_that_was_changed_into_nonsense_is_refused():
    broken: Any = Order.model_construct(id="a", items=[Item.model_construct(at=AT, price=float("nan"))])
    with pytest.raises(InvalidArguments):
        encode_value(broken)
