"""The records of the log as bytes: `encode_…` and `decode_…` for each topic.

Encoding raises `EncodeError` and decoding `DecodeError`, nothing else but what says nothing about the record
(`NOT_OF_THE_RECORD`: out of memory, say). Values are written in single-object framing with
the current schema; read in either framing, with any schema that is known (`upcast`). `schema_of` gives the schemas of
Confluent-framed records; without it such a record is an `UnknownSchema`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any, Final, Generic, TypeVar

from streamflow.codec import upcast
from streamflow.codec.compiled import compile_schema
from streamflow.codec.envelope import (
    NOT_OF_THE_RECORD,
    SINGLE_OBJECT,
    SINGLE_OBJECT_SIZE,
    DecodeError,
    EncodeError,
    Schema,
    SchemaOf,
    UnknownSchema,
    fingerprint,
    load_schema,
    parse,
    split,
)
from streamflow.codec.foreign import refuse_endless, refuse_unreadable, without_logical_types
from streamflow.core.commands import BODIES, Command
from streamflow.core.effects import DeadLetter, Reply, StatusRecord, StepTask, TimerRecord
from streamflow.core.events import EVENTS, Applied, Claim, Consumed, HistoryRecord, RemoteCall, RunSnapshot, Turn
from streamflow.errors import ErrorInfo

T = TypeVar("T")

REGISTRY_SCHEMAS_MAX: Final = 256
"""Schemas kept per registry: one per version of a foreign producer; more are looked up again."""

_Garbage = (IndexError, KeyError, UnicodeDecodeError)
"""What the compiled readers raise on bytes that are not of the schema (and `DecodeError`)."""


class Codec(Generic[T]):
    """Encodes and decodes one kind of record."""

    def __init__(self, name: str, classes: dict[str, type]) -> None:
        self.name = name
        self.schema: Schema = load_schema(name)
        self.fingerprint = fingerprint(self.schema)
        self.writers = upcast.Writers(name)
        self._header = SINGLE_OBJECT + self.fingerprint
        self._write, self._read = compile_schema(self.schema, classes, self._header)

    def encode(self, record: T) -> bytes:
        """The record in single-object framing."""
        try:
            return self._write(record)
        except (AttributeError, KeyError, OverflowError, TypeError, UnicodeEncodeError) as error:
            raise EncodeError(f"{self.name} cannot be encoded: {_find_culprit(record) or repr(error)}") from error

    def decode(self, data: bytes, schema_of: SchemaOf | None = None) -> T:
        """The record in `data`, of whatever known schema."""
        try:
            if data.startswith(self._header):
                return self._decode_body(data, SINGLE_OBJECT_SIZE)
            return self._decode_other(data, schema_of)
        except DecodeError as error:
            raise type(error)(f"{self.name} cannot be decoded: {error}") from error.__cause__

    def _decode_body(self, data: bytes, start: int) -> T:
        record: T
        try:
            record, end = self._read(data, start)
        except _Garbage as error:
            raise DecodeError(f"the body is damaged or not of its schema ({error!r})") from error
        if end != len(data):
            raise DecodeError(f"expected the record to end after {end} bytes, found {len(data)}")
        return record

    def _decode_other(self, data: bytes, schema_of: SchemaOf | None) -> T:
        key, start = split(data)
        if isinstance(key, int):
            if schema_of is None:
                raise UnknownSchema(
                    f"found Confluent framing (schema id {key}), and no schema registry is configured: set its address "
                    f"in the log's URL, as kafka://…?schema.registry.url=http://…"
                )
            writer, key = _of_registry(schema_of, key)
            if key == self.fingerprint:
                return self._decode_body(data, start)
        else:
            known = self.writers.get(key)
            if known is None:
                expected = self.fingerprint.hex()
                raise UnknownSchema(f"expected schema {expected} or an older one, found {key.hex()}: upgrade?")
            writer = known
        return self._decode_body(upcast.to_current(data[start:], writer, self.schema), 0)


@lru_cache(maxsize=REGISTRY_SCHEMAS_MAX)
def _of_registry(schema_of: SchemaOf, schema_id: int) -> tuple[upcast.Writer, bytes]:
    """A registry's schema and its fingerprint; ids never change their meaning, so it is asked once."""
    try:
        schema = schema_of(schema_id)
        refuse_unreadable(schema)
        parsed = parse(without_logical_types(schema))
        refuse_endless(parsed)
        return upcast.Writer(parsed), fingerprint(parsed)
    except DecodeError as error:
        raise DecodeError(f"schema id {schema_id} cannot be used: {error}") from None
    except NOT_OF_THE_RECORD:
        raise
    except Exception as error:  # the library raises anything for a schema that is none, and has no base for it
        raise UnknownSchema(f"schema id {schema_id} cannot be had: {type(error).__name__}: {error}") from error


def _find_culprit(value: Any, path: str = "") -> str | None:
    """The first field of a record that Avro cannot take, in words; only for the text of an error."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"{path or 'the value'} is not valid Unicode ({error.reason} at {error.start}): {value!r:.80}"
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return f"{path or 'the value'} does not fit into 64 bits: {value!r:.80}"
    elif isinstance(value, list | tuple):
        found = (_find_culprit(item, f"{path}[{index}]") for index, item in enumerate(value))
        return next(filter(None, found), None)
    elif names := getattr(type(value), "__struct_fields__", None) or getattr(type(value), "__dataclass_fields__", None):
        found = (_find_culprit(getattr(value, name), f"{path}.{name}".lstrip(".")) for name in names)
        return next(filter(None, found), None)
    return None


def _classes(*classes: type, more: Iterable[type] = ()) -> dict[str, type]:
    return {cls.__name__: cls for cls in (*classes, *more)}


# One of each per process, made when first used: parsing the schemas takes some ten milliseconds.


@cache
def command_codec() -> Codec[Command]:
    """The codec of `<app>.commands`."""
    return Codec("Command", _classes(Command, ErrorInfo, more=BODIES))


@cache
def history_codec() -> Codec[HistoryRecord]:
    """The codec of `<app>.history`."""
    return Codec("History", _classes(Claim, Turn, RunSnapshot, Consumed, Applied, ErrorInfo, RemoteCall, more=EVENTS))


@cache
def timer_codec() -> Codec[TimerRecord]:
    """The codec of `<app>.timers`."""
    return Codec("Timer", {"Timer": TimerRecord})


@cache
def task_codec() -> Codec[StepTask]:
    """The codec of `<app>.steps.<queue>`."""
    return Codec("StepTask", _classes(StepTask))


@cache
def status_codec() -> Codec[StatusRecord]:
    """The codec of `<app>.status`."""
    return Codec("Status", {"Status": StatusRecord, "ErrorInfo": ErrorInfo})


@cache
def reply_codec() -> Codec[Reply]:
    """The codec of `<app>.replies`."""
    return Codec("Reply", _classes(Reply, ErrorInfo))


@cache
def dead_letter_codec() -> Codec[DeadLetter]:
    """The codec of `<app>.dead-letters`."""
    return Codec("DeadLetter", _classes(DeadLetter))


def encode_command(record: Command) -> bytes:
    """A command as bytes."""
    return command_codec().encode(record)


def decode_command(data: bytes, schema_of: SchemaOf | None = None) -> Command:
    """A command from bytes that anybody may have written."""
    return command_codec().decode(data, schema_of)


def encode_history(record: HistoryRecord) -> bytes:
    """A claim, a turn, a snapshot or what is consumed as bytes."""
    return history_codec().encode(record)


def decode_history(data: bytes, schema_of: SchemaOf | None = None) -> HistoryRecord:
    """A claim, a turn, a snapshot or what is consumed from bytes."""
    return history_codec().decode(data, schema_of)


def encode_timer(record: TimerRecord) -> bytes:
    """A pending timer as bytes."""
    return timer_codec().encode(record)


def decode_timer(data: bytes, schema_of: SchemaOf | None = None) -> TimerRecord:
    """A pending timer from bytes."""
    return timer_codec().decode(data, schema_of)


def encode_task(record: StepTask) -> bytes:
    """An attempt for a queue as bytes."""
    return task_codec().encode(record)


def decode_task(data: bytes, schema_of: SchemaOf | None = None) -> StepTask:
    """An attempt for a queue from bytes that anybody may have written."""
    return task_codec().decode(data, schema_of)


def encode_status(record: StatusRecord) -> bytes:
    """A run's status as bytes."""
    return status_codec().encode(record)


def decode_status(data: bytes, schema_of: SchemaOf | None = None) -> StatusRecord:
    """A run's status from bytes."""
    return status_codec().decode(data, schema_of)


def encode_reply(record: Reply) -> bytes:
    """An answer as bytes."""
    return reply_codec().encode(record)


def decode_reply(data: bytes, schema_of: SchemaOf | None = None) -> Reply:
    """An answer from bytes."""
    return reply_codec().decode(data, schema_of)


def encode_dead_letter(record: DeadLetter) -> bytes:
    """A command set aside as bytes."""
    return dead_letter_codec().encode(record)


def decode_dead_letter(data: bytes, schema_of: SchemaOf | None = None) -> DeadLetter:
    """A command set aside from bytes."""
    return dead_letter_codec().decode(data, schema_of)
