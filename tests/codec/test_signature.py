"""Calls as JSON: binding, defaults, the texts of errors, and what is refused where a function is decorated."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Never

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.codec.payload import Signature
from streamflow.errors import InvalidArguments


def charge(
    order_id: str,
    amount: int,
    note: str = "none",
    *,
    fast: bool = False,
    limit: int = None,  # type: ignore[assignment]  # noqa: RUF013
) -> str:
    return f"{order_id} {amount} {note} {fast} {limit}"


CHARGE = Signature(charge)
SHOWN = r"charge\(order_id: str, amount: int, note: str = 'none', \*, fast: bool = False, limit: int = None\) -> str"


@pytest.mark.parametrize(
    ("args", "kwargs", "data"),
    [
        (("a", 5), {}, b'["a",5]'),
        ((), {"amount": 5, "order_id": "a"}, b'["a",5]'),
        (("a",), {"amount": 5}, b'["a",5]'),
        (("a", 5, "x"), {}, b'["a",5,"x"]'),
        (("a", 5), {"fast": True}, b'["a",5,"none",true]'),
        (("a", 5), {"limit": 3}, b'["a",5,"none",false,3]'),
        (("a", 5), {"limit": None}, b'["a",5,"none",false,null]'),
    ],
)
def test_a_call_is_an_array_without_the_defaults_at_its_end(args, kwargs, data):
    assert CHARGE.encode_args(args, kwargs) == data
    found_args, found_kwargs = CHARGE.decode_args(data)
    assert charge(*found_args, **found_kwargs) == charge(*args, **kwargs)


@given(
    st.lists(st.sampled_from(["a", 1, True]), max_size=5),
    st.dictionaries(st.sampled_from(["order_id", "amount", "note", "fast", "limit", "other"]), st.integers(0, 2)),
)
def test_calls_bind_as_python_binds_them(args, kwargs):
    def free(order_id, amount, note="none", *, fast=False, limit=None):
        return (order_id, amount, note, fast, limit)

    signature = Signature(free)
    try:
        expected = free(*args, **kwargs)
    except TypeError:
        with pytest.raises(
            InvalidArguments, match=r"free\(order_id, amount, note='none', \*, fast=False, limit=None\): "
        ):
            signature.encode_args(tuple(args), kwargs)
    else:
        found_args, found_kwargs = signature.decode_args(signature.encode_args(tuple(args), kwargs))
        assert free(*found_args, **found_kwargs) == expected


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (("a",), {}, "missing a required argument: 'amount'"),
        ((), {}, "missing a required argument: 'order_id'"),
        (("a", 1, "c", True), {}, "too many positional arguments"),
        (("a", 1), {"amount": 2}, "multiple values for argument 'amount'"),
        (("a", 1), {"speed": 2}, "got an unexpected keyword argument 'speed'"),
        (("a", "b"), {}, "argument amount: expected `int`, found `str`"),
        (("a", 5), {"fast": 1}, "argument fast: expected `bool`, found `int`"),
        (("a", float("nan")), {}, "arguments: nan cannot be written as JSON"),
        ((object(), 5), {}, "arguments: builtins.object cannot be written as JSON"),
    ],
)
def test_a_wrong_call_is_told_with_the_signature(args, kwargs, text):
    with pytest.raises(InvalidArguments, match=f"^{SHOWN}: {text}"):
        CHARGE.encode_args(args, kwargs)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'["a"]', "expected at least 2 arguments, found 1: amount missing"),
        (b"[]", "expected at least 2 arguments, found 0: order_id, amount missing"),
        (b'["a",1,"x",true,5,6]', "expected at most 5 arguments, found more"),
        (b'["a",1.5]', "argument amount: expected `int`, found `float`"),
        (b'{"order_id":"a"}', "arguments: expected `array`, found `object`"),
        (b'["a",1', "arguments: Input data was truncated"),
        (b"", "arguments: Input data was truncated"),
        (b'["a",' + b"[" * 100_000, "arguments: it nests by more than 200 levels"),
    ],
    ids=range(8),
)
def test_recorded_arguments_that_do_not_fit_are_told(data, text):
    with pytest.raises(InvalidArguments, match=f"^{SHOWN}: {text}"):
        CHARGE.decode_args(data)


def test_results():
    assert CHARGE.decode_result(CHARGE.encode_result("ok")) == "ok"
    with pytest.raises(InvalidArguments, match=r"^charge: the result: expected `str`, found `int`"):
        CHARGE.encode_result(5)
    with pytest.raises(InvalidArguments, match=r"^charge: the recorded result: expected `str`, found `int`"):
        CHARGE.decode_result(b"5")


def test_a_place_within_an_argument_is_told():
    @dataclass
    class Line:
        price: int

    def pay(lines: list[Line]) -> list[Line]: ...  # type: ignore[empty-body]

    signature = Signature(pay)  # `Line` is local, and the annotation a str
    with pytest.raises(InvalidArguments, match=r"argument lines\[1\]\.price: expected `int`, found `str`"):
        signature.encode_args(([Line(1), Line("x")],), {})  # type: ignore[arg-type]
    with pytest.raises(InvalidArguments, match=r"the result\[0\]\.price: expected `int`, found `str`"):
        signature.encode_result([Line("x")])  # type: ignore[arg-type]


def socket_in(x: socket.socket): ...
def socket_out() -> socket.socket: ...  # type: ignore[empty-body]
def socket_deep(x: dict[str, list[socket.socket | None]]): ...
def pairs_as_keys(x: dict[tuple[int, int], str]): ...
def callback(done: Callable[[], None]): ...
def number(z: complex): ...
def two_dicts(x: dict[str, int] | Data): ...
def starred(*names: str): ...
def double_starred(**names: str): ...


@dataclass
class Data:
    n: int


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (socket_in, "socket_in: the annotation of x cannot be used: socket.socket cannot be written as JSON"),
        (socket_out, "socket_out: the annotation of the result cannot be used: socket.socket"),
        (socket_deep, "socket_deep: the annotation of x cannot be used: socket.socket"),
        (pairs_as_keys, "pairs_as_keys: the annotation of x cannot be used: a key of a JSON object must be"),
        (callback, "callback: the annotation of done cannot be used: collections.abc.Callable"),
        (number, "number: the annotation of z cannot be used: builtins.complex"),
        (two_dicts, "two_dicts: the annotation of x cannot be used: Type unions may not contain more than one"),
        (starred, r"starred: \*names cannot be recorded: take a list instead"),
        (double_starred, r"double_starred: \*\*names cannot be recorded: take a dict instead"),
    ],
)
def test_an_annotation_that_cannot_be_json_is_refused_at_once(function, text):
    with pytest.raises(TypeError, match=text):
        Signature(function)


def test_an_annotation_that_is_not_defined_is_named():
    def lost(x: Missing): ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(TypeError, match=r"lost: the annotation 'Missing' is not defined .*define or import Missing"):
        Signature(lost)


def test_the_innermost_local_class_is_meant():
    @dataclass
    class Local:
        outer: int

    def decorate():
        @dataclass
        class Local:
            inner: int

        def inside(x: Local): ...

        return Signature(inside), Local

    signature, inner = decorate()
    assert signature.decode_args(b'[{"inner":1}]') == ((inner(1),), {})
    assert Local(1).outer == 1


def test_unusual_functions():
    def only(a: int, /, b: int = 2, *, self: int, defstruct: int = 4) -> Never: ...  # type: ignore[empty-body]

    signature = Signature(only)
    assert signature.encode_args((1,), {"self": 3}) == b"[1,2,3]"
    assert signature.decode_args(b"[1,2,3]") == ((1, 2), {"self": 3})
    with pytest.raises(InvalidArguments, match="positional"):
        signature.encode_args((), {"a": 1, "self": 3})

    def nothing() -> None: ...

    assert Signature(nothing).encode_args((), {}) == b"[]"
    assert Signature(nothing).decode_args(b"[]") == ((), {})
    assert Signature(nothing).encode_result(None) == b"null"
    with pytest.raises(InvalidArguments):
        Signature(nothing).encode_result(1)

    @functools.wraps(charge)
    def wrapped(*args: Any, **kwargs: Any) -> Any: ...

    assert Signature(wrapped).encode_args(("a", 1), {}) == b'["a",1]'


def test_anything_goes_without_annotations():
    def free(x, y: object = None): ...

    signature = Signature(free)
    assert signature.decode_args(signature.encode_args(({"a": (1, None)},), {})) == (({"a": [1, None]},), {})
    assert signature.decode_args(b'[1,{"a":2}]') == ((1, {"a": 2}), {})
