"""What the checker reads: the topics of an app, with a Kafka client, fastavro and the schemas alone.

Nothing of the product is imported here nor in checker.py, so that a mistake in its codec or in its reading rule cannot
hide itself: both are written a second time, from the design.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Final

SCHEMAS: Final = Path(__file__).resolve().parents[2] / "schemas"
FRAME: Final = b"\xc3\x01"
FRAME_BYTES: Final = 10
NOBODY: Final = "soak-checker"
"""The group that a consumer must name, although this one commits nothing."""
READ_SECONDS: Final = 30.0
"""How long the brokers may be silent before reading them has failed."""
BATCH_MAX, BATCH_SECONDS = 1_000, 0.1
"""A batch is given out when it is full or when the time is over, even where the end was reached long before."""
NAMES: Final = {
    "commands": "Command",
    "history": "History",
    "status": "Status",
    "replies": "Reply",
    "dead-letters": "DeadLetter",
    "steps.": "StepTask",
    "timers": "Timer",
}
"""The schema of each topic that is read, by its name behind the app's; one that ends with a dot begins many."""

Value = dict[str, Any]
"""A decoded record. One that is a branch of a union says which under "kind"."""


@dataclass(frozen=True)
class Record:
    """One record. `at` is its timestamp in ms: where the broker sets it, when the record was in the log."""

    partition: int
    offset: int
    at: int
    key: bytes
    value: Value | None


@dataclass
class Topics:
    """The records of an app's topics, in the order of their offsets within each partition."""

    commands: list[Record] = field(default_factory=list)
    history: list[Record] = field(default_factory=list)
    status: list[Record] = field(default_factory=list)
    replies: list[Record] = field(default_factory=list)
    dead_letters: list[Record] = field(default_factory=list)
    steps: list[Record] = field(default_factory=list)
    timers: list[Record] = field(default_factory=list)
    history_left: list[Record] | None = None
    """What a reader finds that begins at the head now, where `history` holds what was trimmed as well."""


# ------------------------------------------------------------------------------------------------------------ decoding


@cache
def _schema(name: str) -> tuple[Any, bytes]:
    from fastavro import parse_schema
    from fastavro.schema import fingerprint, to_parsing_canonical_form

    raw = json.loads((SCHEMAS / f"{name}.avsc").read_text(encoding="utf-8"))
    schema = parse_schema(raw, named_schemas={})
    return schema, bytes.fromhex(fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO"))


def decode(name: str, data: bytes) -> Value:
    """The record in `data`, which must be of the schema in the file of that name."""
    from fastavro import schemaless_reader

    schema, mark = _schema(name)
    if data[: len(FRAME)] != FRAME or data[len(FRAME) : FRAME_BYTES] != mark:
        raise ValueError(f"expected {name} in single-object framing, found {data[:FRAME_BYTES].hex(' ')}")
    body = BytesIO(data[FRAME_BYTES:])
    value: Value = _plain(schemaless_reader(body, schema, None, return_record_name=True))
    if body.read(1):
        raise ValueError(f"bytes follow a record of {name}")
    if value.get("kind") == "RunSnapshot":
        value["turns"] = [decode(name, turn) for turn in value["turns"]]
    return value


def _plain(value: Any) -> Any:
    """`value` without the pairs by which fastavro tells the branch of a union."""
    match value:
        case (str(name), dict(fields)):
            return {"kind": name.rpartition(".")[2], **_plain(fields)}
        case dict():
            return {name: _plain(each) for name, each in value.items()}
        case list():
            return [_plain(each) for each in value]
    return value


# ------------------------------------------------------------------------------------------------------------- reading


def read_topics(bootstrap: str, app: str) -> Topics:
    """All records of the app's topics, from the first to the last one that is there now."""
    from confluent_kafka import Consumer

    consumer = Consumer({
        "bootstrap.servers": bootstrap,
        "group.id": NOBODY,
        "enable.auto.commit": False,
        "auto.offset.reset": "error",
        "enable.partition.eof": True,
        "check.crcs": True,
    })  # fmt: skip
    found = Topics()
    try:
        names = consumer.list_topics(timeout=READ_SECONDS).topics
        for topic, described in sorted(names.items()):
            app_name, _, short = topic.partition(f"{app}.")
            if app_name or not short:
                continue
            for prefix, schema in NAMES.items():
                if short == prefix or (prefix.endswith(".") and short.startswith(prefix)):
                    into = getattr(found, prefix.strip(".").replace("-", "_"))
                    into += _read(consumer, topic, described.partitions, schema)
    finally:
        consumer.close()
    return found


def _read(consumer: Any, topic: str, partitions: Iterable[int], schema: str) -> list[Record]:
    from confluent_kafka import OFFSET_BEGINNING, KafkaError, KafkaException, TopicPartition

    records: list[Record] = []
    left = set(partitions)
    consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in left])
    heard_at = time.monotonic()
    while left:
        messages = consumer.consume(BATCH_MAX, BATCH_SECONDS)
        if messages:
            heard_at = time.monotonic()
        elif time.monotonic() > heard_at + READ_SECONDS:
            raise TimeoutError(f"{topic}: no answer within {READ_SECONDS:g} s, partitions {sorted(left)} are not read")
        for message in messages:
            error = message.error()
            if error is None:
                value = message.value()
                decoded = None if value is None else decode(schema, value)
                at, key = message.timestamp()[1], message.key() or b""
                records.append(Record(message.partition(), message.offset(), at, key, decoded))
            elif error.code() == KafkaError._PARTITION_EOF:
                left.discard(message.partition())
            else:
                raise KafkaException(error)
    return sorted(records, key=lambda record: (record.partition, record.offset))


def read_lines(*paths: Path) -> list[Value]:
    """The lines of JSON of these files; what was cut off at the end of one does not count."""
    return [
        json.loads(text)
        for path in paths
        if path.exists()
        for text in path.read_text(encoding="utf-8").split("\n")[:-1]
    ]


# ----------------------------------------------------------------------------------------------------- the reading rule


class Reading:
    """Which records of one history partition count (design: one partition, one owner).

    A record counts only if its term is the newest claimed one and its seq is exactly the last one plus one. A repeat is
    dropped; after a gap nothing of that term counts until a newer claim. The first record of the log counts.
    """

    def __init__(self) -> None:
        self.term: int | None = None
        self.seq = 0
        self.gap = False
        self.parts: list[Value] = []

    def counts(self, value: Value) -> bool:
        """Whether the next record of the partition counts."""
        is_claim = value["kind"] == "Claim"
        if self.term is None:
            self.term, self.seq = value["term"], 0 if is_claim else value["seq"]
            return True
        if is_claim:
            if value["term"] <= self.term:
                return False
            self.term, self.seq, self.gap, self.parts = value["term"], 0, False, []
            return True
        if value["term"] != self.term or self.gap or value["seq"] <= self.seq:
            return False
        if value["seq"] > self.seq + 1:
            self.gap = True
            return False
        self.seq = value["seq"]
        return True

    def whole(self, value: Value) -> Value | None:
        """The turn or snapshot that is whole with this part, which counts; None before its last part."""
        if value["part"] == 0:
            self.parts = []
        fits = value["part"] == len(self.parts) and all(
            (part["kind"], part["turn"]) == (value["kind"], value["turn"]) for part in self.parts
        )
        if not fits:
            self.parts = []
            return None
        self.parts.append(value)
        if not value["last"]:
            return None
        parts, self.parts = self.parts, []
        lists = ("events", "commands") if value["kind"] == "Turn" else ("turns",)
        return {**value, **{name: [each for part in parts for each in part[name]] for name in lists}}
