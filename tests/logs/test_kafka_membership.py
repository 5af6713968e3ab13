"""The group's member on Kafka: what becomes of it when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from confluent_kafka import KafkaError

from streamflow.errors import InvalidArguments, Unavailable
from streamflow.logs import kafka_reading
from streamflow.logs.base import TOPICS
from streamflow.logs.kafka import KafkaLog
from streamflow.logs.kafka_membership import Group, KafkaMembership
from streamflow.logs.kafka_topics import Described, Topics
from streamflow.logs.kafka_url import parse_kafka

pytestmark = pytest.mark.anyio

WAIT_SECONDS = 10


class SlowConsumer:
    """A consumer whose group answers when it is told to."""

    asked = threading.Event()
    may_answer = threading.Event()
    closed = threading.Event()

    def __init__(self, config: object) -> None: ...

    def subscribe(self, topics: object, **callbacks: object) -> None: ...

    def committed(self, places: list[object], timeout: float) -> list[object]:
        self.asked.set()
        assert self.may_answer.wait(WAIT_SECONDS)
        return places

    def poll(self, seconds: float) -> None:
        self.closed.wait(min(seconds, 0.01))

    def unsubscribe(self) -> None: ...

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def consumer(monkeypatch: pytest.MonkeyPatch) -> type[SlowConsumer]:
    class Consumer(SlowConsumer):
        asked, may_answer, closed = threading.Event(), threading.Event(), threading.Event()

    monkeypatch.setattr(kafka_reading, "Consumer", Consumer)
    return Consumer


def group() -> Group:
    return Group(parse_kafka("kafka://127.0.0.1:9"), "shop", "shop.commands", 2, "")


async def test_a_member_that_nobody_waits_for_leaves(consumer: type[SlowConsumer]):
    member = KafkaMembership(group(), "one", None)
    joining = asyncio.create_task(member.joined())
    assert await asyncio.to_thread(consumer.asked.wait, WAIT_SECONDS)
    joining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await joining
    consumer.may_answer.set()
    assert await asyncio.to_thread(consumer.closed.wait, WAIT_SECONDS)
    await member.leave()


async def test_members_that_have_left_are_let_go(consumer: type[SlowConsumer]):
    consumer.may_answer.set()
    url = parse_kafka("kafka://127.0.0.1:9")
    found = {topic: Described(f"shop.{topic}", topic, 2, 1, {}) for topic in TOPICS}
    log = KafkaLog(url, "shop", Topics(url, "shop"), "cluster", found, create=False)
    log._verified_until = float("inf")
    try:
        for owner in ("one", "two", "three"):
            member = await asyncio.wait_for(log.join(owner), WAIT_SECONDS)
            assert log._members == [member] and not member.has_left
            await asyncio.wait_for(member.leave(), WAIT_SECONDS)
    finally:
        await log.close()


async def test_why_it_is_out_is_said_to_a_consumer_that_was_busy(
    consumer: type[SlowConsumer], monkeypatch: pytest.MonkeyPatch
):
    consumer.may_answer.set()
    refused = InvalidArguments("refused")
    failing = threading.Event()

    def poll(self: SlowConsumer, seconds: float) -> None:
        if failing.wait(min(seconds, 0.01)):
            raise refused

    monkeypatch.setattr(SlowConsumer, "poll", poll)
    member = KafkaMembership(group(), "one", None)
    await member.joined()
    assignments = member.assignments()
    assert await anext(assignments) == frozenset()
    failing.set()
    await member.leave()
    with pytest.raises(InvalidArguments, match="refused"):
        await anext(assignments)


async def test_who_asks_for_an_offset_that_is_refused_is_told(
    consumer: type[SlowConsumer], monkeypatch: pytest.MonkeyPatch
):
    consumer.may_answer.set()
    member = KafkaMembership(group(), "one", None)
    await member.joined()

    def committed(self: SlowConsumer, places: list[object], timeout: float) -> list[object]:
        raise InvalidArguments("refused")

    monkeypatch.setattr(SlowConsumer, "committed", committed)
    with pytest.raises((InvalidArguments, Unavailable)):
        await asyncio.wait_for(member.committed(0), WAIT_SECONDS)
    await member.leave()


async def test_a_member_that_is_told_of_its_end_by_callback_alone_joins_anew(
    consumer: type[SlowConsumer], monkeypatch: pytest.MonkeyPatch
):
    consumer.may_answer.set()
    made: list[dict[str, Any]] = []
    again = threading.Event()

    def init(self: SlowConsumer, config: dict[str, Any]) -> None:
        made.append(config)
        if len(made) == 2:
            again.set()

    monkeypatch.setattr(SlowConsumer, "__init__", init)
    member = KafkaMembership(group(), "one", "place-1")
    await member.joined()
    fenced = KafkaError(KafkaError.FENCED_INSTANCE_ID, "another has this place", fatal=True)
    made[0]["error_cb"](fenced)
    assert await asyncio.to_thread(again.wait, WAIT_SECONDS)
    assert [config["group.instance.id"] for config in made] == ["place-1", "place-1"]
    await member.leave()
