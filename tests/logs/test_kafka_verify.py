"""Whether the topics are still the ones that were opened: each question is answered by a look that began after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from streamflow.errors import CorruptLog, Unavailable
from streamflow.logs import kafka
from streamflow.logs.base import HISTORY, TOPICS
from streamflow.logs.kafka import KafkaLog
from streamflow.logs.kafka_topics import Described, Topics
from streamflow.logs.kafka_url import parse_kafka

pytestmark = pytest.mark.anyio

WAIT_SECONDS = 10


@pytest.fixture(autouse=True)
def believed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the second look sees, too, instead of those of 5 s. However long the first took, it alone is no proof."""
    monkeypatch.setattr(kafka, "GONE_SECONDS", 0)
    monkeypatch.setattr(kafka, "LOOK_AGAIN_SECONDS", 0)


class PlayedTopics(Topics):
    """Topics whose ids are what the test says; each look waits until the test lets it end."""

    def __init__(self) -> None:
        super().__init__(parse_kafka("kafka://127.0.0.1:9"), "shop")
        self.now = dict.fromkeys(TOPICS, "first")
        self.looks = 0
        self.has_begun = asyncio.Event()
        self.third_has_begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def ids(self) -> dict[str, str]:
        self.looks += 1
        self.has_begun.set()
        if self.looks == 3:
            self.third_has_begun.set()
        seen = dict(self.now)
        await self.may_end.wait()
        return seen


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[KafkaLog, PlayedTopics]]:
    topics = PlayedTopics()
    found = {topic: Described(f"shop.{topic}", "first", 2, 1, {}) for topic in TOPICS}
    log = KafkaLog(parse_kafka("kafka://127.0.0.1:9"), "shop", topics, "cluster", found, create=False)
    try:
        yield log, topics
    finally:
        await log.close()


async def test_a_topic_that_was_made_anew_a_moment_after_a_look_is_found():
    async with opened() as (log, topics):
        await log.verify()
        topics.now[HISTORY] = "second"
        with pytest.raises(
            CorruptLog, match=r"topic shop\.history was deleted and created again \(id first, now second\)"
        ):
            await log.verify()


async def test_a_broker_that_has_not_heard_of_new_topics_yet_is_asked_again():
    async with opened() as (log, topics):
        there = topics.now.pop(HISTORY)
        topics.may_end.clear()
        verifying = asyncio.create_task(log.verify())
        await topics.has_begun.wait()
        topics.now[HISTORY] = there
        topics.may_end.set()
        await asyncio.wait_for(verifying, WAIT_SECONDS)
        assert topics.looks == 2


async def test_a_difference_that_does_not_last_is_not_believed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kafka, "GONE_SECONDS", 60)
    async with opened() as (log, topics):
        there = topics.now.pop(HISTORY)
        verifying = asyncio.create_task(log.verify())
        await asyncio.wait_for(topics.third_has_begun.wait(), WAIT_SECONDS)
        topics.now[HISTORY] = there
        await asyncio.wait_for(verifying, WAIT_SECONDS)


async def test_a_look_that_is_under_way_may_be_too_old():
    async with opened() as (log, topics):
        topics.may_end.clear()
        early = asyncio.create_task(log.verify())
        await topics.has_begun.wait()
        del topics.now[HISTORY]
        late = asyncio.create_task(log.verify())
        await asyncio.sleep(0)
        topics.may_end.set()
        await asyncio.wait_for(early, WAIT_SECONDS)
        with pytest.raises(CorruptLog, match=r"topic shop\.history was deleted \(id first, now none\)"):
            await asyncio.wait_for(late, WAIT_SECONDS)


async def test_questions_of_one_moment_share_a_look():
    async with opened() as (log, topics):
        topics.may_end.clear()
        early = asyncio.create_task(log.verify())
        await topics.has_begun.wait()
        late = [asyncio.create_task(log.verify()) for _ in range(50)]
        await asyncio.sleep(0)
        topics.may_end.set()
        await asyncio.wait_for(asyncio.gather(early, *late), WAIT_SECONDS)
        assert topics.looks == 2


async def test_a_look_that_failed_or_that_nobody_waits_for_fails_no_later_one(monkeypatch: pytest.MonkeyPatch):
    async with opened() as (log, topics):

        async def away() -> dict[str, str]:
            raise Unavailable("away")

        with monkeypatch.context() as patched:
            patched.setattr(topics, "ids", away)
            with pytest.raises(Unavailable, match="away"):
                await log.verify()
        topics.may_end.clear()
        given_up = asyncio.create_task(log.verify())
        await topics.has_begun.wait()
        given_up.cancel()
        following = asyncio.create_task(log.verify())
        topics.may_end.set()
        await following
        assert topics.looks == 2


async def test_a_log_that_closes_leaves_no_look_behind():
    async with opened() as (log, topics):
        topics.may_end.clear()
        verifying = [asyncio.create_task(log.verify())]
        await topics.has_begun.wait()
        verifying.append(asyncio.create_task(log.verify()))
        await asyncio.sleep(0)
        await log.close()
        for waiting in verifying:
            with pytest.raises(Unavailable, match="closed"):
                await asyncio.wait_for(waiting, WAIT_SECONDS)
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "look-at-topics"]
