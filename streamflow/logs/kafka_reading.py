"""Reading a Kafka log in bulk: from an offset to the end that it has now, and where it begins and ends.

librdkafka's consumers wait, so each read runs in a thread, on one of a few consumers. A read that goes on where the
last one of its partition stopped finds the next records fetched already; that is how a restore runs at full speed.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from streamflow.logs.base import Record
from streamflow.logs.checks import closed
from streamflow.logs.kafka_access import DENIED, denied
from streamflow.logs.kafka_patience import READ_SECONDS, UNKNOWN, failed, patiently
from streamflow.logs.kafka_talk import talk
from streamflow.logs.kafka_url import KafkaUrl, refused, unreachable

log_ = logging.getLogger("streamflow.logs")

READERS_MAX: Final = 4
"""Bulk reads at once per handle; others wait for their turn."""

READ_BYTES_MAX: Final = 4 * 1024 * 1024
"""A read stops behind this many bytes, so that a batch of large records does not fill memory."""

DRAIN_RECORDS_MAX: Final = 2_000
FETCH_KBYTES_MAX: Final = 16 * 1024
"""What one consumer fetches ahead of its reader."""

GONE: Final = frozenset({KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE})
"""What a consumer says when the next offset is not in the partition."""


def make_consumer(
    url: KafkaUrl, *, group: str, on_error: Callable[[KafkaError], None] | None = None, **role: object
) -> Consumer:
    """A consumer that commits nothing by itself and never jumps to an offset of its own choice."""
    defaults: dict[str, object] = {
        "fetch.wait.max.ms": 100,  # a partition that is added waits as long for the fetch that is under way
        "fetch.queue.backoff.ms": 5,
        "fetch.error.backoff.ms": 50,
        "queued.max.messages.kbytes": FETCH_KBYTES_MAX,
        "check.crcs": True,
    }
    try:
        return Consumer(
            url.config(
                defaults=defaults,
                group_id=group,
                enable_auto_commit=False,
                enable_auto_offset_store=False,
                auto_offset_reset="error",
                isolation_level="read_uncommitted",
                error_cb=on_error or (lambda error: log_.debug("%s: consumer: %s", url.url, error.str())),
                logger=talk,
                **role,
            )
        )
    except KafkaException as error:
        refused(url, error)


def records_of(messages: Sequence[Message]) -> list[Record]:
    """The records among them, without errors and events."""
    return [
        Record(message.offset(), message.key() or b"", message.value())  # type: ignore[arg-type]
        for message in messages
        if message.error() is None
    ]


class _Reader:
    """One consumer, used by one thread at a time. `place` is where it stands: topic, partition, next offset."""

    def __init__(
        self, url: KafkaUrl, app: str, bounds: Callable[[str, int], tuple[int, int]], check_open: Callable[[], None]
    ) -> None:
        self.url = url
        self.check_open = check_open
        self.bounds = bounds
        self.place: tuple[str, int, int] | None = None
        self.consumer = make_consumer(url, group=f"{app}.readers", enable_partition_eof=True)

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        """Records from `offset` up to the present end, at most `limit`, at least one if there is one."""
        low, high = self.bounds(topic, partition)
        following = max(offset, low)
        if following >= high:
            return []
        if self.place != (topic, partition, following):
            self.consumer.assign([TopicPartition(topic, partition, following)])
        self.place = None  # until all went well
        deadline = time.monotonic() + READ_SECONDS
        records: list[Record] = []
        size = 0
        while following < high and len(records) < limit and size < READ_BYTES_MAX:
            self.check_open()
            if time.monotonic() > deadline:
                raise unreachable(self.url.url, f"{topic}[{partition}] gave no record within {READ_SECONDS:g} s")
            messages = self.consumer.consume(1, 0.5)
            wanted = min(limit - len(records) - len(messages), DRAIN_RECORDS_MAX)
            if messages and wanted > 0 and messages[0].error() is None:
                size += len(messages[0].value() or b"")
                # By size, too: a batch of megabytes is taken one by one.
                wanted = min(wanted, max(1, READ_BYTES_MAX // (len(messages[0].value() or b"") + 1)))
                messages += self.consumer.consume(wanted, 0)
            for message in messages:
                if (error := message.error()) is None:
                    continue
                if error.code() == KafkaError._PARTITION_EOF:
                    following = max(following, message.offset() or 0)
                elif error.code() in GONE:
                    return self.read(topic, partition, following, limit)  # trimmed meanwhile
                elif error.code() in DENIED:
                    raise denied(self.url.url, f"topic {topic} cannot be read ({error.str()})")
                elif error.code() in UNKNOWN:
                    raise failed(self.url, error, f"topic {topic}")
            found = records_of(messages)
            if found:
                records += found
                size += sum(len(record.value or b"") for record in found)
                following = max(following, found[-1].offset + 1)
        if records:
            following = max(following, records[-1].offset + 1)
        if following >= high:
            self.consumer.unassign()  # else it would ask for more for ever
        else:
            self.place = (topic, partition, following)
        return records


class Reading:
    """The bulk-reading half of a `KafkaLog`."""

    def __init__(self, url: KafkaUrl, app: str) -> None:
        self._url, self._app = url, app
        self._threads = ThreadPoolExecutor(READERS_MAX, thread_name_prefix="streamflow-kafka-read")
        self._lock = threading.Lock()
        self._free: list[_Reader] = []
        # Apart from the readers: a question would wait for the fetch that is under way on the same connection.
        self._asking = make_consumer(url, group=f"{app}.readers")
        self._turn = threading.Lock()
        """Held by the thread that asks; without it they would wait for each other within confluent-kafka."""
        self._ending = threading.Event()

    async def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        """See `Log.read`; `topic` is the full name."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._read, topic, partition, offset, limit)

    async def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        """(start offset, end offset)."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._bounds, topic, partition)

    async def offset_at(self, topic: str, partition: int, at_ms: int) -> int:
        """The first offset of a record written at `at_ms` or later, the end offset if there is none."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._offset_at, topic, partition, at_ms)

    def _offset_at(self, topic: str, partition: int, at_ms: int) -> int:
        start, end = self._bounds(topic, partition)  # the end first: what comes meanwhile is not older
        wanted = TopicPartition(topic, partition, max(0, at_ms))

        def ask(seconds: float) -> list[TopicPartition]:
            with self._turn:
                self._check_open()
                return self._asking.offsets_for_times([wanted], timeout=seconds)

        (place,) = patiently(self._url, ask, about=f"topic {topic}")
        if place.error is not None:
            raise failed(self._url, place.error, f"topic {topic}")
        return end if place.offset < 0 else max(start, min(place.offset, end))

    def _read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        reader = self._take((topic, partition, offset))
        try:
            return reader.read(topic, partition, offset, limit)
        finally:
            self._give_back(reader)

    def _bounds(self, topic: str, partition: int) -> tuple[int, int]:
        place = TopicPartition(topic, partition)

        def ask(seconds: float) -> tuple[int, int] | None:
            with self._turn:
                self._check_open()
                try:
                    return self._asking.get_watermark_offsets(place, timeout=seconds)
                except KafkaException as error:
                    if error.args[0].code() in UNKNOWN:
                        # A broker that has just begun knows no topics; librdkafka would believe it for long.
                        self._asking.list_topics(topic, timeout=seconds)
                    raise

        low, high = patiently(self._url, ask, about=f"topic {topic}")
        return int(low), int(high)

    def _take(self, place: tuple[str, int, int]) -> _Reader:
        """The reader that stands there, else the one used longest ago."""
        with self._lock:
            for number, reader in enumerate(self._free):
                if reader.place == place:
                    return self._free.pop(number)
            if self._free:
                return self._free.pop(0)
        return _Reader(self._url, self._app, self._bounds, self._check_open)

    def _give_back(self, reader: _Reader) -> None:
        with self._lock:
            self._free.append(reader)

    def _check_open(self) -> None:
        if self._ending.is_set():
            raise closed(self._url.url)

    async def close(self) -> None:
        """End the threads and consumers; reads that wait for a cluster that is away are given up."""
        self._ending.set()

        def end() -> None:
            self._threads.shutdown()
            for reader in self._free:
                reader.consumer.close()
            self._asking.close()

        await asyncio.to_thread(end)
