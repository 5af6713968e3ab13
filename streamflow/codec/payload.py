"""User payloads: arguments, results and values as JSON, typed by annotations.

A value is checked where it is handed over, by decoding what was encoded: what passes here is exactly what the other
side gets. A str is never taken for bytes, a datetime, a UUID or a Decimal only because JSON writes these as one. What
JSON cannot say (NaN, infinities) is refused rather than turned into null. The bytes of a value do not depend on the
hash seed (sets are written in order), since they are compared when a run is replayed.

Without an annotation a value becomes what JSON makes of it: a dataclass comes back as a dict, a tuple as a list, a
number that was a dict's key as a str.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import copy
from functools import cache, lru_cache
from typing import Any, Final

import msgspec
from msgspec import UNSET

from streamflow.codec.annotations import TEXTUAL, check_type, hints_of, is_model
from streamflow.codec.nesting import NESTING_MAX, nests_too_deeply
from streamflow.errors import InvalidArguments

TYPES_MAX: Final = 512
"""Types of signals and promises whose codec is kept; a program has few, and making one again takes microseconds."""

TOO_DEEP: Final = f"it nests by more than {NESTING_MAX} levels: pass it flat, or as a str"

_PLAIN: Final = frozenset({str, int, bool, bytes, type(None)})
"""Types that hold nothing: looked up first, since most values are of these."""

_Refused = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)
"""What msgspec raises (and the methods of models that it calls) for a value that does not fit."""


def _encode_other(value: Any) -> Any:
    """What JSON makes of a value that msgspec does not know."""
    if is_model(type(value)):
        return value.model_dump(mode="json", warnings=False)  # it may have been given lists for its sets
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} cannot be written as JSON")


def _decode_other(cls: Any, value: Any) -> Any:
    """The inverse: `value` is what JSON had, `cls` a type that msgspec does not know."""
    if isinstance(value, cls):
        return value
    # From text, since only there takes a strict model a datetime from a str.
    return cls.model_validate_json(_json.encode(value))


_json: Final = msgspec.json.Encoder(enc_hook=_encode_other)


class _Typed:
    """Encodes and decodes the values of one type; raises what msgspec raises."""

    def __init__(self, annotation: Any) -> None:
        self._type = annotation
        self._shape = check_type(annotation)
        self._decoder = msgspec.json.Decoder(annotation, dec_hook=_decode_other)

    def decode(self, data: bytes) -> Any:
        if nests_too_deeply(data):
            raise ValueError(TOO_DEEP)
        return self._decoder.decode(data)

    def encode(self, value: Any) -> bytes:
        data = _json.encode(value)
        if nests_too_deeply(data):
            raise ValueError(TOO_DEEP)
        if self._shape.unordered or (b"null" in data and value is not None):
            holds_set, non_finite = _survey(value)
            if non_finite is not None:
                raise ValueError(f"{non_finite} cannot be written as JSON: pass None or a str instead")
            if holds_set:
                data = _json.encode(_ordered(value))
        if not self._shape.trivial:
            self._decoder.decode(data)
        if self._shape.textual:
            plain = msgspec.to_builtins(value, builtin_types=TEXTUAL, enc_hook=_encode_other)
            msgspec.convert(plain, self._type, builtin_types=TEXTUAL, dec_hook=_decode_other)
        return data


class Signature:
    """The arguments and the result of one function as JSON. Compiled where the function is decorated.

    Raises `TypeError` naming the function and the parameter when an annotation is not JSON, or for `*args`, `**kwargs`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name: str = function.__name__
        hints = hints_of(function)
        signature = inspect.signature(function)
        parameters = [p.replace(annotation=hints.get(p.name, p.empty)) for p in signature.parameters.values()]
        self._signature = signature.replace(
            parameters=parameters, return_annotation=hints.get("return", signature.empty)
        )
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                stars, instead = ("*", "list") if parameter.kind is parameter.VAR_POSITIONAL else ("**", "dict")
                raise TypeError(f"{self.name}: {stars}{parameter.name} cannot be recorded: take a {instead} instead")
        self.parameters = tuple(parameter.name for parameter in parameters)
        self._by_keyword = tuple(None if p.kind is p.POSITIONAL_ONLY else p.name for p in parameters)
        self._positional = sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
        required = [index for index, p in enumerate(parameters) if p.default is p.empty]
        self._required = required[-1] + 1 if required else 0
        self._args = self._typed_args(parameters, hints)
        self._result = self._typed("the result", hints.get("return", Any))

    def _typed(self, what: str, annotation: Any) -> _Typed:
        try:
            return _Typed(annotation)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{self.name}: the annotation of {what} cannot be used: {error}") from None

    def _typed_args(self, parameters: Sequence[inspect.Parameter], hints: Mapping[str, Any]) -> _Typed:
        """Arguments are a JSON array; those at the end that have a default may be missing."""
        fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
        for index, parameter in enumerate(parameters):
            annotation = hints.get(parameter.name, Any)
            if parameter.default is None:
                annotation = annotation | None  # `x: int = None` is old, wrong and common
            self._typed(parameter.name, annotation)  # alone, so that an error can name it
            field = f"p{index}"  # not its name, which a Struct might not take
            fields.append((field, annotation) if index < self._required else (field, annotation, UNSET))
        array = msgspec.defstruct(f"{self.name}_arguments", fields, array_like=True, forbid_unknown_fields=True)
        return self._typed("its parameters", array)

    def encode_args(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """Bind as a call does, and encode; `InvalidArguments` when the call or a value does not fit."""
        values: Sequence[Any] = args
        if kwargs or not self._required <= len(args) <= self._positional:
            values = self._bind(args, kwargs)
        try:
            return self._args.encode(values)
        except _Refused as error:
            raise InvalidArguments(self._explain(error)) from None

    def decode_args(self, data: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and the keyword arguments of a call; missing ones are left to the function's defaults."""
        try:
            struct = self._args.decode(data)
        except _Refused as error:
            raise InvalidArguments(self._explain(error)) from None
        values = tuple([value for value in msgspec.structs.astuple(struct) if value is not UNSET])
        if len(values) <= self._positional:
            return values, {}
        names = self.parameters[self._positional : len(values)]
        return values[: self._positional], dict(zip(names, values[self._positional :], strict=True))

    def encode_result(self, value: Any) -> bytes:
        """What the function returned; `InvalidArguments` when its annotation or JSON refuses it."""
        try:
            return self._result.encode(value)
        except _Refused as error:
            raise InvalidArguments(f"{self.name}: the result{_path_and_text(error)}") from None

    def decode_result(self, data: bytes) -> Any:
        """What the function returned, typed."""
        try:
            return self._result.decode(data)
        except _Refused as error:
            raise InvalidArguments(f"{self.name}: the recorded result{_path_and_text(error)}") from None

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
        """The values in the order of the parameters, up to the last one given; defaults fill the gaps."""
        values = list(args)
        for name in self._by_keyword[len(args) :]:
            if name not in kwargs:
                break
            values.append(kwargs[name])
        if self._required <= len(values) == len(args) + len(kwargs) and len(args) <= self._positional:
            return values
        # A gap, or a wrong call: by Python's own rules, whose words are the text of the error.
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidArguments(f"{self}: {error}") from None
        last = max((self.parameters.index(name) for name in bound.arguments), default=-1)
        bound.apply_defaults()
        return list(bound.arguments.values())[: last + 1]

    def _explain(self, error: Exception) -> str:
        """The text for arguments that do not fit, with the parameter's name instead of its index."""
        if found := re.match(r"Expected `array` of at least length \d+, got (\d+)$", str(error)):
            missing = ", ".join(self.parameters[int(found[1]) : self._required])
            return f"{self}: expected at least {self._required} arguments, found {found[1]}: {missing} missing"
        if found := re.match(r"Expected `array` of at most length (\d+)", str(error)):
            return f"{self}: expected at most {found[1]} arguments, found more"
        where = _path_and_text(error)
        if found := re.match(r"\[(\d+)\]", where):
            return f"{self}: argument {self.parameters[int(found[1])]}{where[found.end() :]}"
        return f"{self}: arguments{where}"

    def __str__(self) -> str:
        return f"{self.name}{self._signature}"


def _path_and_text(error: Exception) -> str:
    """`[0].price: expected int, found str`, from msgspec's text."""
    text, _, path = str(error).partition(" - at `$")
    text = re.sub(r"^Expected (.*), got ", r"expected \1, found ", text)
    return f"{path.rstrip('`')}: {text}"


def _survey(value: Any) -> tuple[bool, float | None]:
    """Whether there is a set in `value`, which has been encoded, and a float that is not finite, if there is one."""
    holds_set = False
    non_finite = None
    found = [value]
    while found:
        item = found.pop()
        kind: Any = type(item)
        if kind in _PLAIN:
            continue
        if isinstance(item, float):
            if not math.isfinite(item):
                non_finite = item
        elif isinstance(item, dict):
            found += item.values()
        elif isinstance(item, list | tuple):
            found += item
        elif isinstance(item, set | frozenset):
            holds_set = True
            found += item
        else:
            found += [getattr(item, name) for name in _field_names(kind) if hasattr(item, name)]
    return holds_set, non_finite


def _ordered(value: Any) -> Any:
    """`value` with a list in place of each set, in the order of the items' JSON, which any items have."""
    if isinstance(value, set | frozenset):
        return sorted(map(_ordered, value), key=_json.encode)
    if isinstance(value, dict):
        return {key: _ordered(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_ordered(item) for item in value]
    kind: Any = type(value)
    names = [name for name in _field_names(kind) if hasattr(value, name)]
    if not names:
        return value
    changes = {name: _ordered(getattr(value, name)) for name in names}
    if is_model(kind):
        return value.model_copy(update=changes)
    # A copy of its own class, so that it is written as the class says (names, tags); encoding looks at no types.
    value = copy(value)
    assign = msgspec.structs.force_setattr if isinstance(value, msgspec.Struct) else object.__setattr__
    for name, item in changes.items():
        assign(value, name, item)
    return value


@cache
def _field_names(cls: Any) -> tuple[str, ...]:
    """The fields of a Struct, a dataclass, an attrs class or a model; none of any other class."""
    if names := getattr(cls, "__struct_fields__", None):
        return tuple(names)
    attrs = getattr(cls, "__attrs_attrs__", None)
    if attrs is not None:
        return tuple(attribute.name for attribute in attrs)
    return tuple(getattr(cls, "__dataclass_fields__", None) or getattr(cls, "model_fields", None) or ())


_typed = lru_cache(maxsize=TYPES_MAX)(_Typed)
_any: Final = _Typed(Any)


def check_value_type(annotation: Any) -> None:
    """Raise `TypeError` when the values of a signal or a promise cannot be of this type."""
    _codec_of(annotation)


def encode_value(value: Any) -> bytes:
    """Any value as JSON; `InvalidArguments` when JSON cannot say it."""
    try:
        return _any.encode(value)
    except _Refused as error:
        raise InvalidArguments(f"the value{_path_and_text(error)}") from None


def decode_value(data: bytes, type: Any = Any) -> Any:
    """The value, as `type`; `InvalidArguments` when it is of another one."""
    codec = _codec_of(type)
    try:
        return codec.decode(data)
    except _Refused as error:
        raise InvalidArguments(f"the value{_path_and_text(error)}") from None


def _codec_of(annotation: Hashable) -> _Typed:
    try:
        return _typed(annotation)
    except TypeError as error:
        if "unhashable" in str(error):  # such as `Annotated` with a list in it
            return _Typed(annotation)
        raise
