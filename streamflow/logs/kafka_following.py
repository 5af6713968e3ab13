"""Following Kafka topics: one consumer per handle, one thread that polls it, any number of followers.

    thread:  what the loop asked for (assign, pause, resume) ─▶ poll ─▶ drain ─▶ group by partition ─▶
    loop:    (one marked line) ─▶ _Feed.deliver ─▶ followers

A *feed* is one partition that the consumer fetches, and how far it was delivered. A follower joins the feed when it
stands at the same offset; one that is behind reads in bulk until it has caught up. Back-pressure: the feed is paused
when all its followers are full; a follower that is slower than the others leaves the feed, and reads in bulk later.

Feeds are paused, never removed: what was fetched before a removal could otherwise be taken for what came after it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import groupby
from queue import SimpleQueue
from typing import Final

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from streamflow.errors import CorruptLog, StreamflowError
from streamflow.logs.base import Record
from streamflow.logs.kafka_access import DENIED, denied
from streamflow.logs.kafka_reading import GONE, make_consumer, records_of
from streamflow.logs.kafka_url import KafkaUrl

log_ = logging.getLogger("streamflow.logs")

POLL_SECONDS: Final = 0.02
"""How long the thread waits for records before it does what the loop asked for meanwhile. A consumer belongs to one
thread: since 2.16 confluent-kafka makes a second one wait for the first, for ever if that polls again and again."""

DRAIN_RECORDS_MAX: Final = 2_000
"""Records that enter the event loop at once."""

HANDED_OVER_MAX: Final = 4
"""Batches on their way to a loop that is busy; then the thread waits, and librdkafka's own queue fills."""

BUFFER_RECORDS_MAX: Final = 4_000
BUFFER_BYTES_MAX: Final = 8 * 1024 * 1024
"""What is kept for one follower before it counts as full."""

Read = Callable[[str, int, int, int], Awaitable[list[Record]]]
Bounds = Callable[[str, int], Awaitable[tuple[int, int]]]
Key = tuple[str, int]


class _Follower:
    """One reader of one partition: `offset` is the next that it wants, `records` what waits for it."""

    __slots__ = ("attached", "error", "offset", "records", "size", "waiter")

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.records: deque[Record] = deque()
        self.size = 0
        self.attached = False
        self.error: StreamflowError | None = None
        self.waiter: asyncio.Future[None] | None = None

    @property
    def is_full(self) -> bool:
        return len(self.records) >= BUFFER_RECORDS_MAX or self.size >= BUFFER_BYTES_MAX

    def offer(self, records: list[Record]) -> None:
        for record in records:
            if record.offset >= self.offset:
                self.records.append(record)
                self.size += len(record.value or b"")
        if self.records:
            self.wake()

    def take(self, limit: int) -> list[Record]:
        if len(self.records) <= limit:
            batch = list(self.records)
            self.records.clear()
            self.size = 0
        else:
            batch = [self.records.popleft() for _ in range(limit)]
            self.size -= sum(len(record.value or b"") for record in batch)
        if batch:
            self.offset = batch[-1].offset + 1
        return batch

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class _Feed:
    """One partition that the consumer fetches. `next` is the offset behind all that was delivered."""

    def __init__(self, key: Key, offset: int) -> None:
        self.key = key
        self.next = offset
        self.followers: list[_Follower] = []
        self.paused = False
        self.stopped = False
        """Whether librdkafka has given it up: it fetches no more until it is assigned anew."""

    def deliver(self, records: list[Record]) -> None:
        fresh = (
            [record for record in records if record.offset >= self.next] if records[0].offset < self.next else records
        )
        if not fresh:
            return
        self.next = fresh[-1].offset + 1
        slow = [follower for follower in self.followers if follower.is_full]
        if slow and len(slow) < len(self.followers):
            for follower in slow:
                follower.attached = False  # what it misses here it will read in bulk
                self.followers.remove(follower)
        for follower in self.followers:
            follower.offer(fresh)


class Following:
    """The following half of a `KafkaLog`. All methods are called on the event loop."""

    def __init__(self, url: KafkaUrl, app: str, read: Read, bounds: Bounds) -> None:
        self._url, self._app = url, app
        self._read, self._bounds = read, bounds
        self._loop = asyncio.get_running_loop()
        self._feeds: dict[Key, _Feed] = {}
        self._room = threading.Semaphore(HANDED_OVER_MAX)
        self._ending = threading.Event()
        self._repairs: set[asyncio.Task[None]] = set()
        self._thread: threading.Thread | None = None
        self._asked: SimpleQueue[tuple[Callable[..., None], TopicPartition]] = SimpleQueue()
        self._consumer = make_consumer(url, group=f"{app}.followers")
        self._closed = False

    async def follow(self, topic: str, partition: int, offset: int, limit: int) -> AsyncIterator[list[Record]]:
        """See `Log.follow`; `topic` is the full name."""
        key = (topic, partition)
        follower = _Follower(offset)
        try:
            while not self._closed:
                if follower.records:
                    batch = follower.take(limit)
                    self._resume(key)
                    yield batch
                elif follower.error is not None:
                    raise follower.error
                elif follower.attached or self._attach(key, follower):
                    await self._wait(follower)
                else:
                    await self._catch_up(key, follower, limit)
        finally:
            self._detach(key, follower)

    async def _wait(self, follower: _Follower) -> None:
        follower.waiter = self._loop.create_future()
        try:
            if not self._closed:
                await follower.waiter
        finally:
            follower.waiter = None

    def _attach(self, key: Key, follower: _Follower) -> bool:
        """Join the feed, unless it has gone past what the follower wants next."""
        feed = self._feeds.get(key)
        if feed is not None and feed.next > follower.offset:
            return False
        if feed is None:
            feed = self._feeds[key] = _Feed(key, follower.offset)
            self._start()
            self._ask(Consumer.incremental_assign, TopicPartition(*key, follower.offset))
        elif not feed.followers and (feed.next < follower.offset or feed.stopped):
            feed.next = follower.offset
            self._seek(feed)
        feed.followers.append(follower)
        follower.attached = True
        self._resume(key)
        return True

    async def _catch_up(self, key: Key, follower: _Follower, limit: int) -> None:
        feed = self._feeds[key]
        until = feed.next
        records = await self._read(*key, follower.offset, limit)
        if records:
            follower.offer(records)
        else:
            follower.offset = max(follower.offset, until)  # nothing is left of what lay between

    def _detach(self, key: Key, follower: _Follower) -> None:
        feed = self._feeds.get(key)
        if feed is not None and follower in feed.followers:
            feed.followers.remove(follower)
            if not feed.followers and not self._closed:
                self._pause(feed)

    def _pause(self, feed: _Feed) -> None:
        if not feed.paused:
            feed.paused = True
            self._ask(Consumer.pause, TopicPartition(*feed.key))

    def _resume(self, key: Key) -> None:
        feed = self._feeds.get(key)
        if feed is not None and feed.paused and not all(follower.is_full for follower in feed.followers):
            feed.paused = False
            self._ask(Consumer.resume, TopicPartition(*key))

    def _seek(self, feed: _Feed) -> None:
        """Fetch from `feed.next` on, which is never less than before.

        What the thread has on its way to the loop then follows on what was delivered, or overlaps with what is fetched
        anew; going back, it would look like a step over the records between. Assigned anew, since librdkafka refuses to
        seek in a partition whose fetching has not begun.
        """
        feed.stopped = False
        self._ask(Consumer.incremental_unassign, TopicPartition(*feed.key))
        self._ask(Consumer.incremental_assign, TopicPartition(*feed.key, feed.next))

    def _ask(self, call: Callable[..., None], place: TopicPartition) -> None:
        self._asked.put((call, place))

    # -- from the thread ---------------------------------------------------------------------------------------------

    def _deliver(
        self, batches: list[tuple[Key, list[Record]]], gone: list[Key], refused: list[tuple[Key, str]]
    ) -> None:
        self._room.release()
        for key, text in refused:
            self._fail(self._feeds[key], denied(self._url.url, f"topic {key[0]} cannot be read ({text})"))
        for key, records in batches:
            feed = self._feeds[key]
            feed.deliver(records)
            if all(follower.is_full for follower in feed.followers):
                self._pause(feed)
        for key in gone:
            task = self._loop.create_task(self._find_start(self._feeds[key]), name=f"find-start-{key[0]}-{key[1]}")
            self._repairs.add(task)
            task.add_done_callback(self._repairs.discard)

    async def _find_start(self, feed: _Feed) -> None:
        """The offset that the feed wants is not there: the partition was trimmed, or is another one."""
        try:
            low, high = await self._bounds(*feed.key)
        except StreamflowError as error:
            log_.warning("%s[%d]: %s", *feed.key, error)
            low, high = 0, feed.next
        if feed.next > high:
            lost = CorruptLog(
                f"{self._url.url}: {feed.key[0]}[{feed.key[1]}] was read up to offset {feed.next}, now it ends at "
                f"{high}: records were lost, or the topic was deleted and created again. Stop all workers of the app; "
                f"restore the topic, or delete all topics of the app to begin anew"
            )
            feed.stopped = True
            self._fail(feed, lost)
            return
        if low > feed.next:
            log_.info("%s[%d]: records below offset %d are deleted; going on there", *feed.key, low)
            feed.next = low
        if not self._closed:
            self._seek(feed)

    def _fail(self, feed: _Feed, error: StreamflowError) -> None:
        for follower in feed.followers:
            follower.error = error
            follower.wake()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="streamflow-kafka-follow", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while not self._ending.is_set():
            try:
                while not self._asked.empty():
                    call, place = self._asked.get()
                    call(self._consumer, [place])
                # Waits for one, then takes what else is there: consume(n, t) would wait for n.
                message = self._consumer.poll(POLL_SECONDS)
                messages = [] if message is None else [message, *self._consumer.consume(DRAIN_RECORDS_MAX, 0)]
            except (KafkaException, RuntimeError) as error:
                log_.warning("%s: following: %s", self._url.url, error)
                continue
            batches, gone, refused = _sorted(messages)
            if batches or gone or refused:
                while not self._room.acquire(timeout=POLL_SECONDS):
                    if self._ending.is_set():
                        return
                try:
                    # THE line where followed records enter the event loop.
                    self._loop.call_soon_threadsafe(self._deliver, batches, gone, refused)
                except RuntimeError:
                    return  # the loop was closed

    async def close(self) -> None:
        """End the thread, and all who follow."""
        self._closed = True
        self._ending.set()
        for feed in self._feeds.values():
            for follower in feed.followers:
                follower.wake()

        def end() -> None:
            if self._thread is not None:
                self._thread.join()
            self._consumer.close()

        await asyncio.to_thread(end)


def _sorted(messages: list[Message]) -> tuple[list[tuple[Key, list[Record]]], list[Key], list[tuple[Key, str]]]:
    """Records by partition, in order; the partitions whose next offset is not there; those that we may not read."""
    gone: list[Key] = []
    refused: list[tuple[Key, str]] = []
    for message in messages:
        if (error := message.error()) is not None:
            if error.code() in GONE:
                gone.append(_key(message))
            elif error.code() in DENIED and message.topic() is not None:
                refused.append((_key(message), error.str()))
            else:
                log_.debug("following: %s", error.str())
    good = [message for message in messages if message.error() is None]
    keyed = sorted(good, key=_key)  # stable: within a partition the order stays
    return [(key, records_of(list(group))) for key, group in groupby(keyed, key=_key)], gone, refused


def _key(message: Message) -> Key:
    return (str(message.topic()), int(message.partition() or 0))
