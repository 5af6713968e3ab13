"""A log is closed soon while its cluster is away, whatever waits for an answer."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest
from confluent_kafka import KafkaError, KafkaException

from streamflow.errors import Unavailable
from streamflow.logs import kafka_patience, kafka_reading
from streamflow.logs.kafka_offsets import PublishedOffsets
from streamflow.logs.kafka_reading import READERS_MAX, Reading
from streamflow.logs.kafka_url import parse_kafka
from streamflow.logs.open import open_log

pytestmark = pytest.mark.anyio

WAIT_SECONDS = 10
"""Less than what one question may take in all."""


class LonelyConsumer:
    """A consumer that no broker answers: each question takes all the time that it is given."""

    asked: threading.Event
    never: threading.Event

    def __init__(self, config: dict[str, object]) -> None: ...

    def committed(self, places: object, timeout: float) -> None:
        self.asked.set()
        self.never.wait(timeout)
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))

    get_watermark_offsets = offsets_for_times = committed

    def close(self) -> None: ...


@pytest.fixture
def consumer(monkeypatch: pytest.MonkeyPatch) -> type[LonelyConsumer]:
    class Consumer(LonelyConsumer):
        asked, never = threading.Event(), threading.Event()

    monkeypatch.setattr(kafka_reading, "Consumer", Consumer)
    monkeypatch.setattr(kafka_patience, "QUESTION_SECONDS", 0.05)
    return Consumer


async def test_reads_that_wait_are_given_up(consumer: type[LonelyConsumer]):
    reading = Reading(parse_kafka("kafka://127.0.0.1:9"), "shop")
    reads = [asyncio.create_task(reading.read("shop.history", 0, number, 10)) for number in range(READERS_MAX * 2)]
    reads.append(asyncio.create_task(reading.bounds("shop.history", 0)))  # type: ignore[arg-type]
    reads.append(asyncio.create_task(reading.offset_at("shop.history", 0, 0)))  # type: ignore[arg-type]
    assert await asyncio.to_thread(consumer.asked.wait, WAIT_SECONDS)
    await asyncio.wait_for(reading.close(), WAIT_SECONDS)
    outcomes = await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), WAIT_SECONDS)
    assert {type(each) for each in outcomes} == {Unavailable}


async def test_questions_for_published_offsets_leave_the_loop_its_threads(consumer: type[LonelyConsumer]):
    offsets = PublishedOffsets(parse_kafka("kafka://127.0.0.1:9"), "shop")
    questions = [asyncio.create_task(offsets.get(partition)) for partition in range(64)]
    assert await asyncio.wait_for(asyncio.to_thread(consumer.asked.wait), WAIT_SECONDS)
    await asyncio.wait_for(offsets.close(), WAIT_SECONDS)
    outcomes = await asyncio.wait_for(asyncio.gather(*questions, return_exceptions=True), WAIT_SECONDS)
    assert {type(each) for each in outcomes} == {Unavailable}


async def test_why_security_fails_is_said():
    """The client library tries for ever, and says why to those alone who poll."""
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def speak_no_tls() -> None:
            while True:
                try:
                    connection, _ = plain.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=speak_no_tls, daemon=True).start()
        with pytest.raises(Unavailable, match="SSL handshake failed"):
            await open_log(f"kafka://127.0.0.1:{plain.getsockname()[1]}?security.protocol=ssl", app="shop")
        plain.shutdown(socket.SHUT_RDWR)
