"""Any record of any kind, for hypothesis: made from the classes' own annotations."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st
from msgspec import structs

from streamflow.codec import avro
from streamflow.core.commands import Command
from streamflow.core.effects import DeadLetter, Reply, StatusRecord, StepTask, TimerRecord
from streamflow.core.events import Claim, Consumed, RunSnapshot, Turn

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
INT32_FIELDS = {"reply_to", "partition"}


class Kind(NamedTuple):
    name: str
    classes: tuple[type, ...]
    encode: Callable[[Any], bytes]
    decode: Callable[..., Any]
    codec: Callable[[], avro.Codec[Any]]


KINDS = {
    kind.name: kind
    for kind in (
        Kind("Command", (Command,), avro.encode_command, avro.decode_command, avro.command_codec),
        Kind(
            "History",
            (Claim, Turn, RunSnapshot, Consumed),
            avro.encode_history,
            avro.decode_history,
            avro.history_codec,
        ),
        Kind("StepTask", (StepTask,), avro.encode_task, avro.decode_task, avro.task_codec),
        Kind("Timer", (TimerRecord,), avro.encode_timer, avro.decode_timer, avro.timer_codec),
        Kind("Status", (StatusRecord,), avro.encode_status, avro.decode_status, avro.status_codec),
        Kind("Reply", (Reply,), avro.encode_reply, avro.decode_reply, avro.reply_codec),
        Kind("DeadLetter", (DeadLetter,), avro.encode_dead_letter, avro.decode_dead_letter, avro.dead_letter_codec),
    )
}


def fields_of(cls: type) -> dict[str, Any]:
    """The fields of a Struct or a dataclass and their types."""
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls)] if is_dataclass(cls) else [f.name for f in structs.fields(cls)]
    return {name: hints[name] for name in names}


def any_of(annotation: Any, name: str = "") -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    if annotation is int:
        return INT32 if name in INT32_FIELDS else INT64
    if get_origin(annotation) is list:
        return st.lists(any_of(get_args(annotation)[0], name), max_size=4)
    if get_origin(annotation) in (Union, types.UnionType):
        return st.one_of([any_of(branch, name) for branch in get_args(annotation)])
    simple = {str: st.text(), bytes: st.binary(max_size=300), bool: st.booleans(), type(None): st.none()}
    return simple[annotation] if annotation in simple else any_record(annotation)


def any_record(cls: type) -> st.SearchStrategy[Any]:
    """Records of one class."""
    return st.builds(cls, **{name: any_of(annotation, name) for name, annotation in fields_of(cls).items()})


def any_of_kind(kind: Kind) -> st.SearchStrategy[Any]:
    """Records of one topic."""
    return st.one_of([any_record(cls) for cls in kind.classes])
