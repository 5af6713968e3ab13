"""The Kafka log: the port of `logs/base.py` on an Apache Kafka cluster, without transactions.

    kafka_url         what a URL means                    kafka_reading     bulk reads, where partitions begin and end
    kafka_topics      settings, creation, checks          kafka_following   followers, back-pressure
    kafka_lane        one producer and its thread         kafka_membership  the consumer group
    writing, lanes    the fence, publishing               kafka_offsets     how far all is published
    kafka_access      what each role needs, refusals

Threads: one per producer, follower, member, and a few for bulk reads. Each comes back to the event loop at one marked
line. What Kafka cannot promise, and what follows from it, is in DESIGN.md.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from streamflow.errors import CorruptLog, InvalidArguments, Unavailable
from streamflow.ids import check_id
from streamflow.logs.base import COMMANDS, HISTORY, TOPICS, Outgoing, Record, steps_topic
from streamflow.logs.checks import (
    check_append,
    check_partition,
    check_publish,
    check_queue,
    check_size,
    check_topic,
    check_trim,
    closed,
)
from streamflow.logs.kafka_following import Following
from streamflow.logs.kafka_lane import KafkaLane
from streamflow.logs.kafka_membership import Group, KafkaMembership
from streamflow.logs.kafka_offsets import PublishedOffsets
from streamflow.logs.kafka_patience import GONE_SECONDS
from streamflow.logs.kafka_reading import Reading
from streamflow.logs.kafka_topics import Described, Topics
from streamflow.logs.kafka_url import KafkaUrl
from streamflow.logs.writing import Writing

LOOK_AGAIN_SECONDS: Final = 0.1

STATE_DIR: Final = ".streamflow"
"""Where workers keep their state by default, in the current directory. It may be lost: a container needs no volume."""

IDENTITY_TOPICS: Final = (COMMANDS, HISTORY)
"""Topics that make an app's log what it is: with another one of them, local state is of another log."""


async def open_kafka(url: KafkaUrl, *, app: str, create: bool) -> KafkaLog:
    """Open the app's topics, making them if they are missing and `create` is true."""
    topics = Topics(url, app)
    cluster, found = await topics.open(create=create)
    return KafkaLog(url, app, topics, cluster, found, create=create)


class _Held(NamedTuple):
    """A publish that is not handed over yet."""

    done: asyncio.Future[None]
    records: Sequence[Outgoing]
    mark: tuple[int, int, int] | None
    size: int


def _pass_on(to: asyncio.Future[None], done: asyncio.Future[None]) -> None:
    error = done.exception()
    if to.done():
        return  # the caller does not wait any more
    to.set_result(None) if error is None else to.set_exception(error)


class KafkaLog:
    """See `streamflow.logs.base.Log`; created by `open_kafka`."""

    def __init__(
        self, url: KafkaUrl, app: str, topics: Topics, cluster: str, found: dict[str, Described], *, create: bool
    ) -> None:
        self._url, self._app, self._topics, self._create = url, app, topics, create
        self._loop = asyncio.get_running_loop()
        self._cluster = cluster
        self._found = found
        self._partitions = found[COMMANDS].partitions
        self._known = set(TOPICS)
        self._offsets = PublishedOffsets(url, app)
        self._writing = Writing(url.url, app, self._partitions, self._offsets.moved, partial(KafkaLane, url))
        self._writing.warm_up(history=False)
        self._reading = Reading(url, app)
        self._following = Following(url, app, self._reading.read, self._reading.bounds)
        self._members: list[KafkaMembership] = []
        self._making: dict[str, asyncio.Task[bool]] = {}
        self._held: deque[_Held] = deque()
        """Publishes that wait for a topic to be made, and all that came after them."""
        self._publishing: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._looks: tuple[asyncio.Task[dict[str, str]] | None, asyncio.Task[dict[str, str]] | None] = (None, None)
        """Looks at the topics' ids: the one under way, and the one that begins after it."""

    @property
    def app(self) -> str:
        return self._app

    @property
    def partitions(self) -> int:
        return self._partitions

    @property
    def url(self) -> str:
        return self._url.url

    @property
    def state_dir(self) -> Path:
        return Path(STATE_DIR)

    @property
    def identity(self) -> str:
        return "/".join((self._cluster, *(self._found[topic].id for topic in IDENTITY_TOPICS)))

    # -- writing -----------------------------------------------------------------------------------------------------

    def append(
        self, partition: int, expected_offset: int, records: Sequence[tuple[bytes, bytes]]
    ) -> asyncio.Future[int]:
        check_append(partition, self._partitions, records)
        size = sum(check_size(HISTORY, key, value) for key, value in records)
        if self._closing is not None:
            done: asyncio.Future[int] = self._loop.create_future()
            done.set_exception(closed(self.url))
            return done
        return self._writing.append(partition, expected_offset, records, size)

    def publish(self, records: Sequence[Outgoing], *, published: tuple[int, int] | None = None) -> asyncio.Future[None]:
        size = 0
        known = True
        for record in records:
            check_publish(record, self._partitions)
            size += check_size(record.topic, record.key, record.value)
            known = known and record.topic in self._known
        if published is not None:
            check_partition(published[0], self._partitions)
        if self._closing is not None:
            done: asyncio.Future[None] = self._loop.create_future()
            done.set_exception(closed(self.url))
            return done
        mark = self._writing.mark(published)
        if known and not self._held:
            return self._writing.publish(records, mark, size)
        held = _Held(self._loop.create_future(), tuple(records), mark, size)
        self._held.append(held)
        if len(self._held) == 1:
            self._publishing = self._loop.create_task(self._publish_held(), name="publish-new-topics")
        return held.done

    async def _publish_held(self) -> None:
        """Hand over, in order, what waits for a topic to be made: nothing overtakes it, no published offset either."""
        while self._held:
            held = self._held[0]
            try:
                for topic in {record.topic for record in held.records} - self._known:
                    if not await self._ensure(topic):
                        raise Unavailable(
                            f"{self.url}: there is no topic {self._topics.name(topic)}, and this handle may not make "
                            f"it: have it made with {self._partitions} partitions, or start without --no-create-topics"
                        )
            except Exception as error:  # the caller's future tells it
                self._held.popleft()
                self._writing.void(held.mark)
                if not held.done.done():
                    held.done.set_exception(error)
                continue
            self._held.popleft()
            self._writing.publish(held.records, held.mark, held.size).add_done_callback(partial(_pass_on, held.done))

    async def _ensure(self, topic: str) -> bool:
        """Make a step queue's topic if it is not there; False if it is not and this handle may not."""
        if topic in self._known:
            return True
        if topic not in self._making:
            self._making[topic] = self._loop.create_task(asyncio.to_thread(self._make, topic))
        try:
            made = await asyncio.shield(self._making[topic])
        finally:
            self._making.pop(topic, None)
        if made:
            self._known.add(topic)
        return made

    def _make(self, topic: str) -> bool:
        found = self._topics.describe([topic], settings=False)
        if topic not in found:
            if not self._create:
                return False
            self._topics.create([topic], self._partitions, self._found[HISTORY].replication)
        elif found[topic].partitions != self._partitions:
            raise InvalidArguments(
                f"{self.url}: topic {found[topic].name} must have {self._partitions} partitions as all topics of the "
                f"app, found {found[topic].partitions}: delete it; it is made anew"
            )
        return True

    # -- reading -----------------------------------------------------------------------------------------------------

    async def published_offset(self, partition: int) -> int:
        check_partition(partition, self._partitions)
        self._check_open()
        self._writing.look_at_published(partition)
        return await self._offsets.get(partition)

    async def start_offset(self, topic: str, partition: int) -> int:
        return (await self._bounds(topic, partition))[0]

    async def end_offset(self, topic: str, partition: int) -> int:
        return (await self._bounds(topic, partition))[1]

    async def _bounds(self, topic: str, partition: int) -> tuple[int, int]:
        if not await self._is_there(topic, partition):
            return (0, 0)
        return await self._reading.bounds(self._topics.name(topic), partition)

    async def trim(self, topic: str, partition: int, before: int) -> int:
        check_trim(topic)
        start, end = await self._bounds(topic, partition)
        if before <= start:
            return start
        return await self._topics.delete_before(topic, partition, min(before, end))

    async def offset_at(self, topic: str, partition: int, at_ms: int) -> int:
        if not await self._is_there(topic, partition):
            return 0
        return await self._reading.offset_at(self._topics.name(topic), partition, at_ms)

    async def read(self, topic: str, partition: int, offset: int, *, limit: int = 1000) -> list[Record]:
        if not await self._is_there(topic, partition):
            return []
        return await self._reading.read(self._topics.name(topic), partition, offset, limit)

    async def follow(
        self, topic: str, partition: int, offset: int, *, limit: int = 1000
    ) -> AsyncIterator[list[Record]]:
        """See the port. Ends when the log is closed."""
        if not await self._is_there(topic, partition):
            raise InvalidArguments(
                f"{self.url}: there is no topic {self._topics.name(topic)}: start a worker of the app, which makes it"
            )
        batches = self._following.follow(self._topics.name(topic), partition, offset, limit)
        try:
            async for batch in batches:
                yield batch
        finally:
            await batches.aclose()  # type: ignore[attr-defined]

    async def _is_there(self, topic: str, partition: int) -> bool:
        check_topic(topic)
        check_partition(partition, self._partitions)
        self._check_open()
        if topic == HISTORY:
            self._writing.looked(partition)
        return await self._ensure(topic)

    # -- the group ---------------------------------------------------------------------------------------------------

    async def join(self, owner: str, *, instance: str | None = None) -> KafkaMembership:
        self._check_open()
        check_id(owner, what="owner")
        self._writing.warm_up(history=True)
        await self.verify()
        return await self._join(COMMANDS, self._app, owner, instance, note=self._found[HISTORY].id)

    async def join_queue(self, queue: str, owner: str) -> KafkaMembership:
        topic = steps_topic(check_queue(queue))
        check_id(owner, what="owner")
        await self.verify()
        if not await self._is_there(topic, 0):
            raise InvalidArguments(
                f"{self.url}: there is no topic {self._topics.name(topic)}, and this worker may not make it: have it "
                f"made with {self._partitions} partitions, or start without --no-create-topics"
            )
        return await self._join(topic, self._topics.name(topic), owner, None, note="")

    async def _join(self, topic: str, name: str, owner: str, instance: str | None, *, note: str) -> KafkaMembership:
        group = Group(self._url, name, self._topics.name(topic), self._partitions, note)
        self._check_open()
        member = KafkaMembership(group, owner, instance)
        self._members = [other for other in self._members if not other.has_left]
        self._members.append(member)  # before it has joined: `close` ends it in any case
        await member.joined()
        self._check_open()
        return member

    async def verify(self) -> None:
        deadline: float | None = None
        while (found := self._changed(await self._ids())) is not None:
            # Not every broker knows new topics at once: only what lasts is believed.
            if deadline is None:
                deadline = self._loop.time() + GONE_SECONDS
            elif self._loop.time() > deadline:
                raise CorruptLog(
                    f"{self.url}: topic {found}: what it held is lost. Stop all workers and clients of the app; "
                    f"restore the topic, or delete all topics of the app to begin anew"
                )
            await asyncio.sleep(LOOK_AGAIN_SECONDS)

    def _changed(self, now: dict[str, str]) -> str | None:
        """What has become of a topic that is not the one that was opened; None when all are."""
        for topic in TOPICS:
            if now.get(topic) != self._found[topic].id:
                return (
                    f"{self._topics.name(topic)} was deleted{' and created again' if topic in now else ''} "
                    f"(id {self._found[topic].id}, now {now.get(topic, 'none')})"
                )
        return None

    async def _ids(self) -> dict[str, str]:
        """The topics' ids, by a look that begins after this call.

        One that began before may be older than what its caller was alarmed by. Many partitions begin at the same time,
        and share the next one; one at a time, so that they do not hinder each other.
        """
        self._check_open()
        under_way, following = self._looks
        if following is None:
            following = self._loop.create_task(self._look(under_way), name="look-at-topics")
            following.add_done_callback(lambda look: look.cancelled() or look.exception())  # perhaps nobody waits
            self._looks = (under_way, following)
        await asyncio.wait((following,))
        if following.cancelled():
            raise closed(self.url)
        return following.result()

    async def _look(self, earlier: asyncio.Task[dict[str, str]] | None) -> dict[str, str]:
        """The topics' ids, asked for once `earlier` is over; from then on nobody joins this look any more."""
        if earlier is not None:
            await asyncio.wait((earlier,))
        self._looks = (self._looks[1], None)
        return await self._topics.ids()

    def _check_open(self) -> None:
        if self._closing is not None:
            raise closed(self.url)

    async def close(self) -> None:
        if self._closing is None:
            self._closing = self._loop.create_task(self._close(), name="close-log")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._publishing is not None:
            await asyncio.wait((self._publishing,))
        await self._writing.close()
        await asyncio.sleep(0)  # what it settled last has reached the futures of those that were held
        await asyncio.gather(*(member.leave() for member in self._members))
        for look in self._looks:
            if look is not None:
                look.cancel()
        await asyncio.gather(self._following.close(), self._reading.close(), self._offsets.close())
