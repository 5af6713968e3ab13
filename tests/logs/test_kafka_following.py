"""Following a Kafka partition whose records were lost."""

from __future__ import annotations

import asyncio
import threading
from queue import SimpleQueue

import pytest
from confluent_kafka import KafkaError, TopicPartition

from streamflow.errors import CorruptLog
from streamflow.logs import kafka_following, kafka_reading
from streamflow.logs.base import Record
from streamflow.logs.kafka_following import Following
from streamflow.logs.kafka_url import parse_kafka

pytestmark = pytest.mark.anyio

WAIT_SECONDS = 10


class Gone:
    """What a consumer says once, when the offset that it was to fetch from is not there."""

    def __init__(self, place: TopicPartition) -> None:
        self.place = place

    def error(self) -> KafkaError:
        return KafkaError(KafkaError._AUTO_OFFSET_RESET)

    def topic(self) -> str:
        return self.place.topic

    def partition(self) -> int:
        return self.place.partition


class EmptyConsumer:
    """A consumer that finds no offset that it is assigned."""

    def __init__(self, config: object) -> None:
        self.said: SimpleQueue[Gone] = SimpleQueue()
        self.never = threading.Event()

    def incremental_assign(self, places: list[TopicPartition]) -> None:
        for place in places:
            self.said.put(Gone(place))

    def incremental_unassign(self, places: list[TopicPartition]) -> None: ...

    pause = resume = incremental_unassign

    def poll(self, seconds: float) -> Gone | None:
        if self.said.empty():
            self.never.wait(seconds)
            return None
        return self.said.get()

    def consume(self, most: int, seconds: float) -> list[Gone]:
        return []

    def close(self) -> None: ...


async def test_each_follower_of_lost_records_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kafka_following, "Consumer", EmptyConsumer)
    monkeypatch.setattr(kafka_reading, "Consumer", EmptyConsumer)

    async def read(topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        return []

    async def bounds(topic: str, partition: int) -> tuple[int, int]:
        return (0, 3)

    following = Following(parse_kafka("kafka://127.0.0.1:9"), "shop", read, bounds)
    for offset in (5, 5, 4):
        with pytest.raises(CorruptLog, match="now it ends at 3"):
            await asyncio.wait_for(anext(following.follow("shop.commands", 0, offset, 10)), WAIT_SECONDS)
    await following.close()
