"""What every adapter checks and says alike: topic names, partitions, sizes, and the texts of fences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from streamflow.errors import Fenced, InvalidArguments, PayloadTooLarge, Unavailable
from streamflow.ids import check_queue as check_queue_name
from streamflow.logs.base import COMPACTED, HISTORY, STEPS_PREFIX, TOPICS, Outgoing

RECORD_BYTES_MAX: Final = 1_000_000
"""Key and value of one record: what an Apache Kafka broker takes by default (1,048,588), less its own framing, so
that a run which fits on a local log fits on a cluster."""


def check_topic(topic: str) -> str:
    """Return `topic` (without the app's prefix) when the log has or may have it."""
    if topic not in TOPICS:
        if not topic.startswith(STEPS_PREFIX):
            raise InvalidArguments(f"unknown topic {topic!r}: known are {', '.join(TOPICS)} and steps.<queue>")
        check_queue(topic.removeprefix(STEPS_PREFIX))
    return topic


def check_trim(topic: str) -> None:
    """Raise `InvalidArguments` for a topic that is not trimmed."""
    if check_topic(topic) in COMPACTED:
        raise InvalidArguments(f"topic {topic} keeps the newest record of each key: publish tombstones, do not trim it")


def check_queue(queue: str) -> str:
    """Return `queue` when it can name a topic, else raise `InvalidArguments`."""
    try:
        return check_queue_name(queue)
    except ValueError as error:
        raise InvalidArguments(str(error)) from None


def check_partition(partition: int, partitions: int) -> None:
    """Raise `InvalidArguments` unless the topics have this partition."""
    if not 0 <= partition < partitions:
        raise InvalidArguments(f"partition must be 0 to {partitions - 1}, found {partition}")


def check_size(topic: str, key: bytes, value: bytes | None) -> int:
    """The bytes of a record, or `PayloadTooLarge`."""
    size = len(key) + len(value or b"")
    if size > RECORD_BYTES_MAX:
        raise PayloadTooLarge(
            f"a record for {topic} (key {key[:80]!r}) has {size:,} bytes, a log takes {RECORD_BYTES_MAX:,}: "
            "keep large values elsewhere and pass a reference"
        )
    return size


def check_append(partition: int, partitions: int, records: Sequence[tuple[bytes, bytes]]) -> None:
    """Raise `InvalidArguments` for an append that no log could take; sizes are checked apart."""
    check_partition(partition, partitions)
    if not records:
        raise InvalidArguments(f"append to history[{partition}] needs at least one record")


def check_publish(record: Outgoing, partitions: int) -> None:
    """Raise `InvalidArguments` for a record that must not or cannot be published."""
    check_topic(record.topic)
    check_partition(record.partition, partitions)
    if record.topic == HISTORY:
        raise InvalidArguments("history is written by append() only, under its fence, never by publish()")


def fenced(url: str, partition: int, expected: int, found: int) -> Fenced:
    """The end of the partition is not where the caller thought."""
    return Fenced(
        f"{url}: history[{partition}] was expected to end at offset {expected}, it ends at {found}: "
        "another worker wrote to it; read it again before the next append"
    )


def fenced_behind(url: str, partition: int, expected: int) -> Fenced:
    """An earlier append, on which this one builds, failed."""
    return Fenced(
        f"{url}: the append to history[{partition}] at offset {expected} builds on one that failed: "
        "nothing was written; read the partition again before the next append"
    )


def closed(url: str) -> Unavailable:
    """The handle was used after `close`."""
    return Unavailable(f"{url}: this log was closed: open it again")


def no_app(url: str, app: str) -> Unavailable:
    """The log is there, but nobody has created the topics of this app, and the caller may not."""
    other = ", or run streamflow topics create" if url.startswith("kafka:") else ""
    return Unavailable(f"{url}: holds no topics of app {app!r}: start a worker of it, which creates them{other}")


def name_taken(url: str, owner: str) -> InvalidArguments:
    """A living member of the group has this name."""
    return InvalidArguments(f"{url}: a worker named {owner!r} is running already: give this one another name")


def wrong_partitions(url: str, app: str, found: int, wanted: int) -> InvalidArguments:
    """The topics exist with another number of partitions."""
    return InvalidArguments(
        f"{url}: the topics of app {app!r} have {found} partitions, asked for {wanted}: "
        "the number is fixed when they are created; drop the option"
    )
