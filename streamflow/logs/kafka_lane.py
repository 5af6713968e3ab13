"""A lane: one idempotent producer, and the thread that collects its acknowledgements.

librdkafka sends one partition per request, and a broker answers the requests of one connection one after another, so a
handle has several lanes, each for a few partitions of the history. A lane is never repaired: after an error whose
outcome is unknown it is dropped with all that it still holds, and its owner makes another.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from streamflow.logs.kafka_access import DENIED, denied
from streamflow.logs.kafka_talk import talk
from streamflow.logs.kafka_url import KafkaUrl, refused
from streamflow.logs.lanes import CLOSE_SECONDS, NotTaken, Refusal, Sent

log_ = logging.getLogger("streamflow.logs")

POLL_SECONDS: Final = 0.1
"""How long the thread waits for acknowledgements before it looks whether it must end."""

QUEUE_RECORDS_MAX: Final = 500_000
QUEUE_KBYTES_MAX: Final = 256 * 1024
"""What librdkafka keeps until it is acknowledged, per lane; beyond it a write is refused as `Unavailable`."""

MESSAGE_BYTES_MAX: Final = 1_048_000
"""What librdkafka takes: `RECORD_BYTES_MAX` of key and value, and the framing of one record."""

DELIVERY_SECONDS: Final = 120
"""How long librdkafka tries to deliver a record. Shorter, and a broker that restarts makes outcomes unknown; longer,
and what a stopped process had under way may land long after its partition has a new owner (harmless, but noise)."""


class KafkaLane:
    """See `streamflow.logs.lanes.Lane`. Created on the event loop; acknowledgements come in their order."""

    def __init__(self, url: KafkaUrl, name: str, delivered: Callable[[KafkaLane, list[Sent]], None]) -> None:
        self.name = name
        self.dropped = False
        self.failed = False
        """Whether librdkafka says that this producer can go on no more."""
        self._url = url
        self._delivered = delivered
        self._loop = asyncio.get_running_loop()
        self._acknowledged: list[Sent] = []
        self._ending = threading.Event()
        defaults: dict[str, object] = {
            "linger.ms": 0,
            "compression.type": "lz4",
            "delivery.timeout.ms": DELIVERY_SECONDS * 1000,
        }
        try:
            self._producer = Producer(
                url.config(
                    defaults=defaults,
                    acks="all",
                    enable_idempotence=True,
                    message_max_bytes=MESSAGE_BYTES_MAX,
                    queue_buffering_max_messages=QUEUE_RECORDS_MAX,
                    queue_buffering_max_kbytes=QUEUE_KBYTES_MAX,
                    # Without a callback poll() raises what is fatal, and the acknowledgements behind it are lost.
                    error_cb=self._on_error,
                    logger=talk,
                )
            )
        except KafkaException as error:
            refused(url, error)
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._serve, name=f"streamflow-kafka-{name}", daemon=True)
        self._thread.start()

    def message(self, key: bytes, value: bytes | None, sent: Sent, expected: int = -1) -> dict[str, Any]:
        """See the port."""
        return {"key": key, "value": value, "callback": partial(self._told, expected, sent)}

    def send(self, topic: str, partition: int, messages: list[dict[str, Any]]) -> None:
        """Hand over records that belong together; one call may take a part of them (`NotTaken`)."""
        # One call: librdkafka's thread sends what it finds. Record by record it wakes up for each, makes twice the
        # requests, and takes twice the time (71 us a step of W2 instead of 33).
        try:
            taken = self._producer.produce_batch(topic, messages, partition)
        except (BufferError, KafkaException) as error:
            self.failed |= isinstance(error, KafkaException)
            raise NotTaken(Refusal(str(error))) from error
        if taken < len(messages):
            # One that was not taken names its error; were there none, what became of the batch is not known.
            unknown = KafkaError(KafkaError._FAIL, "not all records of a batch were taken")
            why: KafkaError = next((message["_error"] for message in messages if "_error" in message), unknown)
            self.failed |= why.code() != KafkaError._QUEUE_FULL
            raise NotTaken(Refusal(why.str()))

    def drop(self) -> None:
        """Forget what is not acknowledged, and end. What is under way may still reach the log."""
        if not self.dropped:
            self.dropped = True
            if not self._ending.is_set():  # else the thread may have let go of it already
                self._producer.purge()
            self._ending.set()

    def close(self) -> None:
        """End once all is acknowledged; `closed` is done then."""
        self._ending.set()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        waited = 0.0
        while not (self._ending.is_set() and (not len(self._producer) or waited > CLOSE_SECONDS)):
            if not self._poll() and self._ending.is_set():
                waited += POLL_SECONDS
            if self._acknowledged and not self._hand_over():
                return
        if waited > CLOSE_SECONDS:
            self._producer.purge()
            self._poll()
            self._hand_over()
        del self._producer  # ends librdkafka's threads
        self._on_loop(_finish, self.closed)

    def _poll(self) -> int:
        """Collect acknowledgements for a while; how many events there were."""
        try:
            return self._producer.poll(POLL_SECONDS)
        except KafkaException as error:
            # What is fatal is raised here, and the acknowledgements behind it are lost.
            if not self.failed:
                self.failed = True
                log_.warning("%s: the producer %s failed for good: %s", self._url.url, self.name, error)
                self._hand_over()
            self._ending.wait(POLL_SECONDS)
            return 0

    def _hand_over(self) -> bool:
        acknowledged, self._acknowledged = self._acknowledged, []
        return self._on_loop(self._delivered, self, acknowledged)

    def _on_loop(self, call: Callable[..., None], *args: Any) -> bool:
        """THE line where acknowledgements enter the event loop; False once it is closed."""
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            return False
        return True

    def _told(self, expected: int, sent: Sent, error: KafkaError | None, message: Message) -> None:
        if error is None:
            # Where any offset will do, nobody asks for it: one call less for each record.
            is_all = sent.acknowledged(None if expected < 0 else message.offset(), expected)
        else:
            is_all = sent.refused(self._refusal(error, message))
        if is_all:
            self._acknowledged.append(sent)

    def _refusal(self, error: KafkaError, message: Message) -> Refusal:
        if error.code() in DENIED:
            what = f"topic {message.topic()} cannot be written ({error.str()})"
            return Refusal(error.str(), denied(self._url.url, what))
        return Refusal(error.str())

    def _on_error(self, error: KafkaError) -> None:
        """What is fatal fails every record, each with its own report; the rest is librdkafka's to retry."""
        if error.fatal():
            log_.debug("%s: producer %s: fatal: %s", self._url.url, self.name, error.str())
        else:
            log_.debug("%s: producer %s: %s", self._url.url, self.name, error.str())


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
