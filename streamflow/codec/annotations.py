"""What may be an annotation of a payload: types that JSON can carry and give back.

Looked at once, where a function is decorated, so that a type that cannot work is an error at import and not in a run.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from types import FrameType, NoneType
from typing import Any, Final, NamedTuple, Never, NoReturn, get_type_hints
from uuid import UUID

from msgspec import inspect as types

TEXTUAL: Final = (bytes, bytearray, memoryview, datetime, date, time, timedelta, UUID, Decimal)
"""Types that are a str in JSON but must not be given as one in Python."""

_TEXTUAL_NODES: Final = (
    types.BytesType,
    types.ByteArrayType,
    types.MemoryViewType,
    types.DateTimeType,
    types.DateType,
    types.TimeType,
    types.TimeDeltaType,
    types.UUIDType,
    types.DecimalType,
)
_UNORDERED_NODES: Final = (types.SetType, types.FrozenSetType, types.AnyType, types.CustomType)


class Shape(NamedTuple):
    """What has to be minded when values of a type are encoded."""

    trivial: bool
    """Any value fits: nothing to check."""
    textual: bool
    """It holds types of which JSON makes a str."""
    unordered: bool
    """It may hold a set."""


def is_model(cls: type) -> bool:
    """Whether `cls` is a pydantic model, found out without importing pydantic."""
    return any(base.__name__ == "BaseModel" and base.__module__.startswith("pydantic.") for base in cls.__mro__)


def check_type(annotation: Any) -> Shape:
    """The shape of `annotation`; raises `TypeError` when JSON cannot carry it."""
    nodes = list(_walk(types.type_info(annotation), set()))
    for node in nodes:
        if isinstance(node, types.CustomType) and node.cls is not object and not is_model(node.cls):
            name = f"{node.cls.__module__}.{node.cls.__qualname__}"
            raise TypeError(f"{name} cannot be written as JSON: use plain data, a dataclass or a model")
        if isinstance(node, types.DictType) and not _may_be_key(node.key_type):
            raise TypeError("a key of a JSON object must be a str, a number, an enum or what JSON writes as a str")
    return Shape(
        trivial=len(nodes) == 1 and (isinstance(nodes[0], types.AnyType) or annotation is object),
        textual=any(isinstance(node, _TEXTUAL_NODES) for node in nodes),
        unordered=any(isinstance(node, _UNORDERED_NODES) for node in nodes),
    )


def _may_be_key(node: Any) -> bool:
    if isinstance(node, types.UnionType):
        return all(map(_may_be_key, node.types))
    plain = (types.AnyType, types.StrType, types.IntType, types.FloatType, types.EnumType, types.LiteralType)
    return isinstance(node, plain + _TEXTUAL_NODES)


def _walk(node: Any, seen: set[int]) -> list[Any]:
    """`node` and all nodes below it, each once: types may contain themselves."""
    if isinstance(node, tuple):
        return [found for item in node for found in _walk(item, seen)]
    if isinstance(node, types.Field):
        return _walk(node.type, seen)
    if not isinstance(node, types.Type) or id(node) in seen:
        return []
    seen.add(id(node))
    below = (getattr(node, name) for name in node.__struct_fields__)
    return [node, *(found for item in below for found in _walk(item, seen))]


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of `function`, with forward references resolved; raises `TypeError` when one cannot be.

    A function that is defined in another one may refer to that one's local classes: they are taken from its frame,
    which still runs when the function is decorated.
    """
    function = inspect.unwrap(function)
    local = _locals_around(function)
    try:
        hints = get_type_hints(function, localns=local or None, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"{function.__qualname__}: the annotation {error.name!r} is not defined where the function is decorated: "
            f"define or import {error.name} above it (not under TYPE_CHECKING)"
        ) from None
    return {name: NoneType if hint in (Never, NoReturn) else hint for name, hint in hints.items()}


def _locals_around(function: Callable[..., Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "<locals>" not in function.__qualname__:
        return found
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is function.__globals__ and frame.f_code.co_name != "<module>":
            found = {**frame.f_locals, **found}  # the inner ones win
        frame = frame.f_back
    return found
