"""Writing to Kafka with a producer that fails for good: all futures complete, and nothing builds on what failed."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from streamflow.errors import Fenced, Unavailable
from streamflow.logs import kafka_lane
from streamflow.logs.base import REPLIES, Outgoing
from streamflow.logs.kafka_lane import KafkaLane
from streamflow.logs.kafka_url import parse_kafka
from streamflow.logs.writing import Writing

pytestmark = pytest.mark.anyio

WAIT_SECONDS = 10


class FailingProducer:
    """Takes `takes` records, acknowledges the first few, then raises what is fatal, again and again, as librdkafka."""

    takes: int
    acknowledges: int
    failed: threading.Event
    told: threading.Event
    """Whether `poll` says so, too."""

    def __init__(self, config: object) -> None:
        self.taken = 0
        self.reports: deque[Callable[..., None]] = deque()

    def produce_batch(self, topic: str, messages: list[dict[str, Any]], partition: int) -> int:
        taken = 0
        for message in messages:
            if self.failed.is_set() or self.taken == self.takes:
                self.failed.set()
                message["_error"] = KafkaError(KafkaError._FATAL)
                continue
            taken += 1
            self.taken += 1
            if self.taken <= self.acknowledges:
                self.reports.append(message["callback"])
        return taken

    def poll(self, seconds: float) -> int:
        if self.told.wait(min(seconds, 0.01)):
            raise KafkaException(KafkaError(KafkaError._FATAL))
        if not self.reports:
            return 0
        self.reports.popleft()(None, None)
        return 1

    def purge(self) -> None:
        self.taken = 0

    def __len__(self) -> int:
        return self.taken


@pytest.fixture
def producer(monkeypatch: pytest.MonkeyPatch) -> type[FailingProducer]:
    class Producer(FailingProducer):
        takes, acknowledges = 1_000, 0
        failed, told = threading.Event(), threading.Event()

    monkeypatch.setattr(kafka_lane, "Producer", Producer)
    return Producer


def writing() -> Writing:
    url = parse_kafka("kafka://127.0.0.1:9")
    return Writing(url.url, "shop", 1, lambda partition, offset: None, partial(KafkaLane, url))


def reply() -> list[Outgoing]:
    return [Outgoing(REPLIES, 0, b"k", b"v")]


async def test_a_producer_that_fails_in_the_middle_of_a_group_fails_the_whole_group(producer: type[FailingProducer]):
    under_test = writing()
    producer.takes, producer.acknowledges = 2, 1
    # The first goes alone; the second and third together, and the third is refused.
    futures = [under_test.publish(reply(), None, 2) for _ in range(3)]
    await asyncio.wait_for(futures[0], WAIT_SECONDS)
    producer.told.set()
    outcomes = await asyncio.wait_for(asyncio.gather(*futures[1:], return_exceptions=True), WAIT_SECONDS)
    assert [type(each) for each in outcomes] == [Unavailable] * 2
    await under_test.close()


async def test_an_append_does_not_build_on_what_its_failed_producer_took_along(producer: type[FailingProducer]):
    under_test = writing()
    first = under_test.append(0, 7, [(b"k", b"v")], 2)
    lane = under_test._lanes[0]
    assert lane is not None
    producer.told.set()
    # The loop is not free meanwhile: it hears of the failure only from the lane itself.
    assert _eventually(lambda: lane.failed)
    second = under_test.append(0, 8, [(b"k", b"v")], 2)
    outcomes = await asyncio.wait_for(asyncio.gather(first, second, return_exceptions=True), WAIT_SECONDS)
    assert [type(each) for each in outcomes] == [Unavailable, Fenced]
    await under_test.close()


def _eventually(is_so: Callable[[], bool]) -> bool:
    pause = threading.Event()
    for _ in range(1_000):
        if is_so():
            return True
        pause.wait(0.01)
    return False
