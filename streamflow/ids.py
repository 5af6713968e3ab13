"""Identifiers and the one partition hash.

Ids are `NewType`s so that a partition cannot be passed where an offset is meant. The hash is murmur2 as Java's
default Kafka partitioner computes it, so that a producer in any language that uses the workflow id as its key
reaches the partition where the run lives. Python's built-in `hash()` differs between processes and is never used.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NewType

from streamflow.errors import InvalidArguments

WorkflowId = NewType("WorkflowId", str)
CommandId = NewType("CommandId", str)
Partition = NewType("Partition", int)
Offset = NewType("Offset", int)
Term = NewType("Term", int)

ID_BYTES_MAX: Final = 255
"""Longest id in bytes of UTF-8: as a file name and as most engines' ids, so that an id can be carried everywhere."""

PARTITIONS_CACHED_MAX: Final = 16_384
"""Ids whose partition is remembered, some 3 MB: a run's commands come again and again, and the hash takes 10 us."""

APP_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")
APP_LENGTH_MAX: Final = 64


def check_id(value: str, *, what: str) -> str:
    """Return `value` when it is 1 to 255 bytes of UTF-8, else raise `InvalidArguments` naming `what`."""
    if not isinstance(value, str):
        raise InvalidArguments(f"{what} must be a str, found {type(value).__name__}: pass str(value)")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise InvalidArguments(
            f"{what} {value!r} is not valid UTF-8 ({error.reason}): remove lone surrogates"
        ) from None
    if not size:
        raise InvalidArguments(f"{what} must not be empty: give 1 to {ID_BYTES_MAX} bytes of UTF-8")
    if not 1 <= size <= ID_BYTES_MAX:
        raise InvalidArguments(f"{what} must have 1 to {ID_BYTES_MAX} bytes of UTF-8, found {size}: shorten or hash it")
    return value


def check_app(name: str) -> str:
    """Return `name` when it can prefix Kafka topics ([a-z0-9._-], 1 to 64 characters), else raise `ValueError`."""
    if not isinstance(name, str) or not 1 <= len(name) <= APP_LENGTH_MAX or not APP_CHARACTERS.issuperset(name):
        raise ValueError(
            f"app name must match [a-z0-9._-]{{1,{APP_LENGTH_MAX}}}, found {name!r}: it prefixes the topics"
        )
    return name


def check_queue(name: str) -> str:
    """Return `name` when it can end a Kafka topic's name, as an app's begins one, else raise `ValueError`."""
    if not isinstance(name, str) or not 1 <= len(name) <= APP_LENGTH_MAX or not APP_CHARACTERS.issuperset(name):
        raise ValueError(f"queue must match [a-z0-9._-]{{1,{APP_LENGTH_MAX}}}, found {name!r}: it names a topic")
    return name


_M: Final = 0x5BD1E995
_MASK: Final = 0xFFFFFFFF


def murmur2(key: bytes) -> int:
    """The unsigned 32-bit murmur2 hash of `key`, as in `org.apache.kafka.common.utils.Utils`."""
    length = len(key)
    h = (0x9747B28C ^ length) & _MASK
    whole = length & ~3
    for i in range(0, whole, 4):
        k = (int.from_bytes(key[i : i + 4], "little") * _M) & _MASK
        k = ((k ^ (k >> 24)) * _M) & _MASK
        h = ((h * _M) & _MASK) ^ k
    if whole != length:
        h = ((h ^ int.from_bytes(key[whole:], "little")) * _M) & _MASK
    h = ((h ^ (h >> 13)) * _M) & _MASK
    return h ^ (h >> 15)


@lru_cache(maxsize=PARTITIONS_CACHED_MAX)
def partition_of(workflow_id: str, partitions: int) -> Partition:
    """The partition where the run of this workflow id lives, of `partitions` in all."""
    return Partition((murmur2(workflow_id.encode()) & 0x7FFFFFFF) % partitions)
