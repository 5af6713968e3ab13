"""What a Kafka cluster allows at best, without an engine: the limit to read the figures against."""

from __future__ import annotations

import threading
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from streamflow.cli.bench_stand import quantile

if TYPE_CHECKING:
    from streamflow.logs.kafka_topics import Topics

RECORD_BYTES: Final = 300
"""About what a turn with one step's outcome and the next step has."""

APPENDS: Final = 500
RECORDS: Final = 50_000
WAIT_SECONDS: Final = 30.0
PARTITIONS: Final = 4
"""As many as on SQLite. With more, fewer records go into each request: W2 makes 4,700 steps/s on one partition, 3,700
on two, 3,000 on four, 1,900 on twelve."""
STEPS_OF_LATENCY: Final = 10
RECORDS_PER_RUN_OF_FIVE: Final = 10
"""Of W2: a command, six turns, two statuses, a reply."""


def with_partitions(url: str) -> str:
    """The URL of the measurement: with `PARTITIONS`, unless it says how many."""
    from streamflow.logs.kafka_url import parse_kafka

    if parse_kafka(url).partitions is not None:
        return url
    return f"{url}{'&' if '?' in url else '?'}partitions={PARTITIONS}"


def raw_limits(url: str) -> dict[str, Any]:
    """Measured on topics of its own with one producer and one consumer: acks=all, idempotent, no lingering.

    `w1_ms` is what ten sequential steps would take if only the records' way to the broker cost time: a command read
    back, eleven appends one after another, a reply read back. `w2_steps_per_second` is what would be reached if records
    cost nothing but to be produced, the ten of five steps.
    """
    from confluent_kafka import Consumer, Producer, TopicPartition

    from streamflow.logs.base import HISTORY
    from streamflow.logs.kafka_url import parse_kafka

    place = parse_kafka(url)
    app = f"bench-raw-{uuid.uuid4().hex[:8]}"
    topics = _open(place, app)
    topic = f"{app}.{HISTORY}"
    value = b"x" * RECORD_BYTES
    producer = Producer(place.config(acks="all", enable_idempotence=True, linger_ms=0))
    consumer = Consumer(
        place.config(group_id=app, enable_auto_commit=False, auto_offset_reset="error", fetch_wait_max_ms=100)
    )
    try:
        appended, read_back = [], []
        consumer.assign([TopicPartition(topic, 0, 0)])
        for _ in range(APPENDS):
            done = threading.Event()
            began = time.perf_counter()
            producer.produce(topic, value, b"k", 0, on_delivery=partial(_done, done))
            while not done.is_set():
                producer.poll(WAIT_SECONDS)
            appended.append((time.perf_counter() - began) * 1000)
            while consumer.poll(WAIT_SECONDS) is None:
                pass
            read_back.append((time.perf_counter() - began) * 1000)
        began = time.perf_counter()
        for number in range(RECORDS):
            producer.produce(topic, value, b"k", number % 4, on_delivery=lambda error, message: None)
            if not number % 1000:
                producer.poll(0)
        producer.flush(WAIT_SECONDS)
        produced = RECORDS / (time.perf_counter() - began)
        consumer.assign([TopicPartition(topic, number, 0) for number in range(4)])
        began, found = time.perf_counter(), 0
        while found < RECORDS and time.perf_counter() - began < WAIT_SECONDS:
            if consumer.poll(1.0) is not None:
                found += 1 + len(consumer.consume(10_000, 0))
        consumed = found / (time.perf_counter() - began)
    finally:
        consumer.close()
        topics.delete()
    append, back = quantile(appended, 0.5), quantile(read_back, 0.5)
    return {
        "append_p50_ms": append,
        "append_p99_ms": quantile(appended, 0.99),
        "append_and_read_back_p50_ms": back,
        "produced_records_per_second": produced,
        "consumed_records_per_second": consumed,
        "w1_ms": (STEPS_OF_LATENCY + 1) * append + 2 * back,
        "w2_steps_per_second": produced * 5 / RECORDS_PER_RUN_OF_FIVE,
    }


def _done(done: threading.Event, error: object, message: object) -> None:
    done.set()


def drop_topics(url: str, app: str) -> None:
    """Delete what a repetition left on the cluster."""
    from streamflow.logs.kafka_topics import Topics
    from streamflow.logs.kafka_url import parse_kafka

    Topics(parse_kafka(url), app).delete()


def _open(place: Any, app: str) -> Topics:
    import asyncio

    from streamflow.logs.kafka_topics import Topics

    topics = Topics(place, app)
    asyncio.run(topics.open(create=True))
    return topics
