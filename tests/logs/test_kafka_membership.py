"""The group's member on Kafka: when it leaves, when it joins anew, and what it tells those who ask meanwhile."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from streamflow.errors import InvalidArguments, Unavailable
from streamflow.logs import kafka_membership, kafka_reading
from streamflow.logs.base import TOPICS
from streamflow.logs.kafka import KafkaLog
from streamflow.logs.kafka_membership import (
    FIRST_NEWS_SECONDS,
    HAND_OVER_SECONDS,
    NO_NEWS_SECONDS,
    Group,
    KafkaMembership,
)
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


@pytest.mark.parametrize(("code", "level"), [(KafkaError._FATAL, "INFO"), (KafkaError._STATE, "ERROR")])
async def test_a_member_that_is_put_out_while_it_leaves_has_left(
    consumer: type[SlowConsumer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    level: str,
):
    """Seen in a soak: its static id was another's by then. Unsubscribing such a consumer raises; nothing else may."""
    consumer.may_answer.set()

    def unsubscribe(_: SlowConsumer) -> None:
        raise KafkaException(KafkaError(code))

    monkeypatch.setattr(SlowConsumer, "unsubscribe", unsubscribe)
    member = KafkaMembership(group(), "one", None)
    await member.joined()
    with caplog.at_level(logging.INFO, "streamflow.logs"):
        await asyncio.wait_for(member.leave(), WAIT_SECONDS)
    assert member.has_left and consumer.closed.is_set()
    assert [record.levelname for record in caplog.records] == [level], caplog.text
    if level == "INFO":
        assert [shares async for shares in member.assignments()] == [], "nothing has failed"
        assert "member one of shop was out before it left" in caplog.text


async def test_members_that_have_left_are_let_go(consumer: type[SlowConsumer], monkeypatch: pytest.MonkeyPatch):
    consumer.may_answer.set()
    url = parse_kafka("kafka://127.0.0.1:9")
    found = {topic: Described(f"shop.{topic}", "same", 2, 1, {}) for topic in TOPICS}
    log = KafkaLog(url, "shop", Topics(url, "shop"), "cluster", found, create=False)

    async def ids() -> dict[str, str]:
        return dict.fromkeys(TOPICS, "same")

    monkeypatch.setattr(log._topics, "ids", ids)
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


class Ended:
    """A message by which librdkafka says that the consumer can do nothing any more: its code, without the mark."""

    def error(self) -> KafkaError:
        error = KafkaError(KafkaError._FATAL, "Fatal error: Broker: Static consumer fenced")
        assert not error.fatal()
        return error


@pytest.mark.parametrize("told_by", ["callback", "message", "message while it asks"])
async def test_a_member_that_is_told_of_its_end_joins_anew_at_once(
    consumer: type[SlowConsumer], monkeypatch: pytest.MonkeyPatch, told_by: str
):
    """Either is seen alone: a message may get lost in a rebalance, and of a refused commit no callback tells."""
    consumer.may_answer.set()
    made: list[dict[str, Any]] = []
    again = threading.Event()
    messages: SimpleQueue[Ended] = SimpleQueue()

    def init(self: SlowConsumer, config: dict[str, Any]) -> None:
        made.append(config)
        if len(made) == 2:
            again.set()

    def poll(self: SlowConsumer, seconds: float) -> Ended | None:
        with suppress(Empty):
            return messages.get(timeout=min(seconds, 0.01)) if seconds else messages.get_nowait()
        return None

    def committed(self: SlowConsumer, places: list[TopicPartition], timeout: float) -> list[TopicPartition]:
        if asking.is_set():
            asking.clear()
            messages.put(Ended())
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        return places

    asking = threading.Event()
    monkeypatch.setattr(SlowConsumer, "committed", committed)
    monkeypatch.setattr(SlowConsumer, "__init__", init)
    monkeypatch.setattr(SlowConsumer, "poll", poll)
    member = KafkaMembership(group(), "one", "place-1")
    await member.joined()
    if told_by == "message":
        messages.put(Ended())
    elif told_by == "message while it asks":
        asking.set()
        assert await asyncio.wait_for(member.committed(0), WAIT_SECONDS) == 0
    else:
        made[0]["error_cb"](KafkaError(KafkaError.FENCED_INSTANCE_ID, "another has this place", fatal=True))
    assert await asyncio.to_thread(again.wait, WAIT_SECONDS)
    assert [config["group.instance.id"] for config in made] == ["place-1", "place-1"]
    await member.leave()


async def test_two_with_one_static_id_do_not_put_each_other_out_for_ever(
    consumer: type[SlowConsumer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Whoever is put out as soon as it has joined, again and again, leaves the place to the other."""
    monkeypatch.setattr(kafka_membership, "REJOIN_SECONDS", 0.01)
    consumer.may_answer.set()
    places: list[str | None] = []
    settled = threading.Event()

    def init(self: SlowConsumer, config: dict[str, Any]) -> None:
        places.append(config.get("group.instance.id"))

    def poll(self: SlowConsumer, seconds: float) -> Ended | None:
        if places[-1] is not None:
            return Ended()
        settled.set()
        self.closed.wait(min(seconds, 0.01))
        return None

    monkeypatch.setattr(SlowConsumer, "__init__", init)
    monkeypatch.setattr(SlowConsumer, "poll", poll)
    member = KafkaMembership(group(), "one", "place-1")
    await member.joined()
    assert await asyncio.to_thread(settled.wait, WAIT_SECONDS)
    await member.leave()
    assert places == ["place-1", "place-1", None]
    assert "another process joins as 'place-1', too" in caplog.text


# -- a member that lost everything and hears nothing ------------------------------------------------------------------

A_MOMENT = 1 / 1024  # exact, however often it is added


class Clock:
    """The monotonic clock of the members, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


class ToldConsumer:
    """A consumer whose group says what the test says, each thing in a poll of its own."""

    made: ClassVar[SimpleQueue[ToldConsumer]]

    def __init__(self, config: dict[str, Any]) -> None:
        self.instance = config["group.instance.id"]
        self._on_commit = config["on_commit"]
        self.commits: SimpleQueue[TopicPartition] = SimpleQueue()
        self._assigned: list[TopicPartition] = []
        self._closed = False
        self._news: SimpleQueue[tuple[Callable[[], None], asyncio.Future[bool]]] = SimpleQueue()
        self._heard: asyncio.Future[bool] | None = None  # the member has not decided yet what to do about it
        self.made.put(self)

    # -- the test's part

    async def say(self, partitions: str = "", *, how: str = "") -> bool:
        """Tell the member, or let it poll in vain; whether it polls this consumer again."""

        def tell() -> None:
            if how:
                self._callbacks[how](self, [TopicPartition("shop.commands", int(number)) for number in partitions])

        heard: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._news.put((tell, heard))
        return await asyncio.wait_for(heard, WAIT_SECONDS)

    async def assign(self, partitions: str) -> bool:
        return await self.say(partitions, how="on_assign")

    async def revoke(self, partitions: str) -> bool:
        return await self.say(partitions, how="on_revoke")

    async def lose(self, partitions: str) -> bool:
        return await self.say(partitions, how="on_lost")

    async def committed_by_member(self) -> TopicPartition:
        return await asyncio.to_thread(self.commits.get, timeout=WAIT_SECONDS)

    async def answer(self, commit: TopicPartition, error: KafkaError | None = None) -> bool:
        heard: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._news.put((lambda: self._on_commit(error, [commit]), heard))
        return await asyncio.wait_for(heard, WAIT_SECONDS)

    # -- the member's part

    def commit(self, offsets: list[TopicPartition], asynchronous: bool) -> list[TopicPartition]:
        """The group takes what is committed while it waits, and answers to the rest as the test says."""
        for place in offsets:
            self.commits.put(place)
        return offsets

    def subscribe(self, topics: object, **callbacks: Callable[..., None]) -> None:
        self._callbacks = callbacks

    def committed(self, places: list[TopicPartition], timeout: float) -> list[TopicPartition]:
        return places

    def poll(self, seconds: float) -> None:
        self._decided(goes_on=True)
        with suppress(Empty):
            tell, self._heard = self._news.get(timeout=min(seconds, 0.01))
            tell()

    def close(self) -> None:
        self._closed = True
        self._decided(goes_on=False)

    def _decided(self, *, goes_on: bool) -> None:
        if self._heard is not None:
            heard, self._heard = self._heard, None
            heard.get_loop().call_soon_threadsafe(heard.set_result, goes_on)

    def incremental_assign(self, partitions: list[TopicPartition]) -> None:
        self._assigned += partitions

    def incremental_unassign(self, partitions: list[TopicPartition]) -> None:
        self._assigned = [each for each in self._assigned if each not in partitions]

    def pause(self, partitions: object) -> None: ...

    def unsubscribe(self) -> None:
        if self._closed:
            raise RuntimeError("Consumer closed")
        self._callbacks["on_revoke"](self, self._assigned)


Made = SimpleQueue[ToldConsumer]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """The consumers as the member makes them, each for one place in the group."""

    class Consumer(ToldConsumer):
        made = SimpleQueue()

    monkeypatch.setattr(kafka_reading, "Consumer", Consumer)
    monkeypatch.setattr(kafka_membership, "REJOIN_SECONDS", 0)
    return Consumer.made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(kafka_membership, "time", clock)
    return clock


async def newest(made: Made) -> ToldConsumer:
    return await asyncio.to_thread(made.get, timeout=WAIT_SECONDS)


@asynccontextmanager
async def member_and_consumer(made: Made) -> AsyncIterator[tuple[KafkaMembership, ToldConsumer]]:
    member = KafkaMembership(group(), "one", "place-1")
    try:
        await asyncio.wait_for(member.joined(), WAIT_SECONDS)
        yield member, await newest(made)
    finally:
        await asyncio.wait_for(member.leave(), WAIT_SECONDS)


@pytest.mark.parametrize("how", ["on_lost", "on_revoke"])
async def test_a_member_that_lost_everything_and_hears_nothing_joins_anew(
    made: Made, clock: Clock, caplog: pytest.LogCaptureFixture, how: str
):
    async with member_and_consumer(made) as (member, first):
        assert await first.assign("01")
        assert await first.say("01", how=how)
        clock.now += NO_NEWS_SECONDS - A_MOMENT
        assert await first.say(), "its time is not over"
        assert not caplog.messages
        clock.now += A_MOMENT
        assert not await first.say()
        (line,) = caplog.messages
        assert line == (
            "kafka://127.0.0.1:9: member one of shop has had no partition and no news for 12 s: it joins anew"
        )
        second = await newest(made)
        assert second.instance == first.instance == "place-1", "its place is the same"
        assert await second.assign("1")
        assert await anext(member.assignments()) == {1}


async def test_an_assignment_that_is_told_while_a_consumer_closes_counts_no_more(
    made: Made, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    """librdkafka serves what waits from `close`, and revokes nothing of it."""
    async with member_and_consumer(made) as (member, first):
        close = ToldConsumer.close

        def closing(self: ToldConsumer) -> None:
            if self is first:
                self._callbacks["on_assign"](self, [TopicPartition("shop.commands", 0)])
            close(self)

        monkeypatch.setattr(ToldConsumer, "close", closing)
        assert await first.assign("0")
        assert await first.lose("0")
        clock.now += NO_NEWS_SECONDS
        assert not await first.say()
        second = await newest(made)
        assert await second.assign("1")
        assert await second.say()
        assert await anext(member.assignments()) == {1}


async def test_a_member_that_has_something_left_waits_for_ever(made: Made, clock: Clock):
    async with member_and_consumer(made) as (_, consumer):
        assert await consumer.assign("01")
        assert await consumer.lose("0")
        clock.now += 100 * NO_NEWS_SECONDS
        assert await consumer.say()


@pytest.mark.parametrize("share", [[""], ["0", ""]], ids=["an empty share", "one, and an empty one"])
async def test_a_spare_member_waits_for_ever(made: Made, clock: Clock, share: list[str]):
    """The group says so when it has nothing for a member; there are more workers than partitions."""
    async with member_and_consumer(made) as (_, consumer):
        for partitions in share:
            assert await consumer.assign(partitions)
            assert not partitions or await consumer.revoke(partitions)
        clock.now += 100 * NO_NEWS_SECONDS
        assert await consumer.say()


async def test_a_member_that_the_group_never_answers_joins_anew(
    made: Made, clock: Clock, caplog: pytest.LogCaptureFixture
):
    """Its place may be taken before it hears anything, and nobody tells it."""
    async with member_and_consumer(made) as (member, first):
        clock.now += FIRST_NEWS_SECONDS - A_MOMENT
        assert await first.say(), "the group may still be waiting for another member"
        assert not caplog.messages
        clock.now += A_MOMENT
        assert not await first.say()
        assert "no news for 72 s: it joins anew" in caplog.text
        second = await newest(made)
        assert await second.assign("1")
        assert await anext(member.assignments()) == {1}


async def test_news_that_wait_when_the_time_is_over_count(made: Made, clock: Clock):
    async with member_and_consumer(made) as (member, consumer):
        assert await consumer.assign("0")
        assert await consumer.lose("0")
        clock.now += NO_NEWS_SECONDS
        assert await consumer.assign("1"), "the process was stopped meanwhile, say"
        assert await anext(member.assignments()) == {1}


async def test_each_loss_has_its_own_time(made: Made, clock: Clock):
    async with member_and_consumer(made) as (_, first):
        consumer = first
        for _ in range(2):  # the second time as a member that has joined anew
            for _ in range(2):
                assert await consumer.assign("0")
                assert await consumer.lose("0")
                clock.now += NO_NEWS_SECONDS - A_MOMENT
                assert await consumer.say()
            clock.now += A_MOMENT
            assert not await consumer.say()
            consumer = await newest(made)
            clock.now += FIRST_NEWS_SECONDS - A_MOMENT
            assert await consumer.say(), "it has lost nothing yet"


async def test_the_time_begins_when_the_member_has_stopped_what_it_gave_up(made: Made, clock: Clock):
    async with member_and_consumer(made) as (member, consumer):
        assert await consumer.assign("0")
        assignments = member.assignments()
        assert await anext(assignments) == {0}
        revoking = asyncio.create_task(consumer.revoke("0"))
        assert await anext(assignments) == frozenset()
        clock.now += HAND_OVER_SECONDS - A_MOMENT  # until then the group waits for it, and cannot tell it anything
        await member.release(0)
        assert await revoking
        clock.now += NO_NEWS_SECONDS - A_MOMENT
        assert await consumer.say()
        clock.now += A_MOMENT
        assert not await consumer.say()


# -- commits ----------------------------------------------------------------------------------------------------------


async def test_a_commit_is_confirmed_when_the_group_says_so(made: Made):
    async with member_and_consumer(made) as (member, consumer):
        assert await consumer.assign("01")
        refused = KafkaError(KafkaError.ILLEGAL_GENERATION, "the group has moved on")
        for error in (None, refused, None):
            confirming = asyncio.create_task(member.confirm(1, 7))
            commit = await consumer.committed_by_member()
            assert (commit.partition, commit.offset) == (1, 7)
            assert await consumer.answer(TopicPartition("shop.commands", 0, 7))
            assert await consumer.answer(TopicPartition("shop.commands", 1, 6))
            assert not confirming.done(), "neither was its own"
            assert await consumer.answer(commit, error)
            assert await asyncio.wait_for(confirming, WAIT_SECONDS) is (error is None)


async def test_a_member_leaves_at_once_while_its_commits_are_not_answered(made: Made):
    """Brokers that are away answer to a commit after a minute."""
    async with member_and_consumer(made) as (member, consumer):
        assert await consumer.assign("01")
        confirming = [asyncio.create_task(member.confirm(number, 7)) for number in (0, 1)]
        for _ in confirming:
            await consumer.committed_by_member()
        await asyncio.wait_for(member.leave(), WAIT_SECONDS)
        assert await asyncio.wait_for(asyncio.gather(*confirming), WAIT_SECONDS) == [False, False]


async def test_a_member_that_leaves_between_two_consumers_leaves_neither_again(
    made: Made, clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """librdkafka refuses whatever is asked of a consumer that is closed."""
    monkeypatch.setattr(kafka_membership, "REJOIN_SECONDS", WAIT_SECONDS)
    async with member_and_consumer(made) as (member, consumer):
        assert await consumer.lose("")
        clock.now += NO_NEWS_SECONDS
        assert not await consumer.say()
        await asyncio.wait_for(member.leave(), WAIT_SECONDS)
        assert member.has_left
        assert made.empty(), "who leaves does not join anew"
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


async def test_commits_of_a_consumer_that_is_replaced_are_not_confirmed(made: Made, clock: Clock):
    async with member_and_consumer(made) as (member, first):
        assert await first.assign("0")
        confirming = asyncio.create_task(member.confirm(0, 7))
        await first.committed_by_member()
        assert await first.lose("0")
        clock.now += NO_NEWS_SECONDS
        assert not await first.say()
        assert await asyncio.wait_for(confirming, WAIT_SECONDS) is False
        await newest(made)


async def test_what_a_partition_that_is_given_up_commits_is_confirmed_before_it_goes(made: Made):
    async with member_and_consumer(made) as (member, consumer):
        assert await consumer.assign("0")
        assignments = member.assignments()
        assert await anext(assignments) == {0}
        revoking = asyncio.create_task(consumer.revoke("0"))
        assert await anext(assignments) == frozenset()
        assert await asyncio.wait_for(member.confirm(0, 7), WAIT_SECONDS), "the group waits for this member now"
        assert (await consumer.committed_by_member()).offset == 7
        await member.release(0)
        assert await revoking
