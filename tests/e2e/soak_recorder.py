"""A reader that follows the history from its first record on, so that what is trimmed meanwhile can still be judged.

A worker that gets its partition back trims at once what it was about to trim before, down to records that are
milliseconds old, and no reader is that fast. So the recorder tells a file how far it is, and soak_worker.py trims no
further: one waits for the other, and nothing depends on who is faster.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Final

from tests.e2e.checker_topics import NOBODY, Record, decode

RECORDED: Final = "recorded.json"
"""In the folder of a soak: the next offset of each partition."""
POLL_SECONDS: Final = 0.2
MESSAGES_MAX: Final = 500
"""Taken at once, when there are as many."""
LOOK_SECONDS: Final = 10.0
"""How long one question to the brokers may take."""
FINISH_SECONDS: Final = 60.0
"""How long the rest may take once everything else is over."""


def has_recorded(progress: Path, partition: int, before: int) -> bool:
    """Whether the recorder that tells this file has all records of the partition below that offset."""
    try:
        return int(json.loads(progress.read_text())[str(partition)]) >= before
    except FileNotFoundError:
        return False


class Recorder:
    """Follows one topic in a thread, from the time that it is empty, and tells the file `progress` how far it is."""

    def __init__(self, bootstrap: str, topic: str, partitions: int, progress: Path) -> None:
        self._bootstrap = bootstrap
        self._topic = topic
        self._progress = progress
        self._partitions = range(partitions)
        self._raw: list[tuple[int, int, int, bytes, bytes | None]] = []
        self._next = dict.fromkeys(self._partitions, 0)
        self._told: dict[str, int] = {}
        self._failure: str | None = None
        self._ends: dict[int, int] | None = None
        self._thread = threading.Thread(target=self._follow, name=f"record-{topic}", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def finish(self) -> list[Record]:
        """Read up to the present end; all records in the order of their offsets within each partition.

        Raises `LookupError` when one was trimmed before it was read.
        """
        self._ends = self._present_ends()
        self._thread.join(FINISH_SECONDS)
        if self._failure is None and self._thread.is_alive():
            self._failure = f"expected to read up to {self._ends} within {FINISH_SECONDS:g} s, came to {self._next}"
        if self._failure is None and not self._is_done():
            self._failure = f"expected to read up to {self._ends}, and the reader died at {self._next}"
        if self._failure is not None:
            raise LookupError(f"{self._topic} was not recorded: {self._failure}")
        return [
            Record(partition, offset, at, key, None if value is None else decode("History", value))
            for partition, offset, at, key, value in sorted(self._raw, key=lambda each: each[:2])
        ]

    def _present_ends(self) -> dict[int, int]:
        from confluent_kafka import Consumer, TopicPartition

        consumer = Consumer({"bootstrap.servers": self._bootstrap, "group.id": NOBODY})
        try:
            places = [TopicPartition(self._topic, partition) for partition in self._partitions]
            return {each.partition: consumer.get_watermark_offsets(each, LOOK_SECONDS)[1] for each in places}
        finally:
            consumer.close()

    def _follow(self) -> None:
        from confluent_kafka import Consumer, TopicPartition

        consumer = Consumer({
            "bootstrap.servers": self._bootstrap,
            "group.id": NOBODY,
            "enable.auto.commit": False,
            "auto.offset.reset": "error",
            "check.crcs": True,
            "reconnect.backoff.max.ms": 500,
            "topic.metadata.refresh.interval.ms": 5000,  # a broker that has just started may say that there is no topic
            "log_level": 0,
        })  # fmt: skip
        try:
            consumer.assign([TopicPartition(self._topic, partition, 0) for partition in self._partitions])
            while self._failure is None and not self._is_done():
                for message in consumer.consume(MESSAGES_MAX, POLL_SECONDS):
                    if self._failure is None:  # the first one tells the cause
                        self._take(message)
                self._tell()
        finally:
            consumer.close()

    def _is_done(self) -> bool:
        return self._ends is not None and all(self._next[each] >= end for each, end in self._ends.items())

    def _tell(self) -> None:
        following = {str(partition): offset for partition, offset in self._next.items()}
        if following != self._told:
            beside = self._progress.with_suffix(".new")
            beside.write_text(json.dumps(following))
            beside.replace(self._progress)  # whoever reads finds the whole of one or of the other
            self._told = following

    def _take(self, message: Any) -> None:
        from confluent_kafka import KafkaError

        error, partition = message.error(), message.partition()
        if error is not None:
            if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
                self._failure = f"partition {partition} at {self._next.get(partition)}: {error}"
            return  # anything else: a broker that is hurt, or a leader that is looked for
        offset = message.offset()
        if offset != self._next[partition]:
            self._failure = f"partition {partition}: expected offset {self._next[partition]}, found {offset}"
            return
        self._next[partition] = offset + 1
        self._raw.append((partition, offset, message.timestamp()[1], message.key() or b"", message.value()))
