"""One process's handle to the simulated cluster: the log port, as Kafka's adapter keeps it.

The writing half is the product's own (`logs/writing.py`) on simulated producers (`lane.py`). Reading, the published
offsets and membership do what `logs/kafka_*.py` make of librdkafka's consumers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from streamflow.errors import Unavailable
from streamflow.ids import check_id
from streamflow.logs.base import HISTORY, Outgoing, Record, steps_topic
from streamflow.logs.checks import (
    check_append,
    check_partition,
    check_publish,
    check_queue,
    check_size,
    check_topic,
    check_trim,
    closed,
    no_app,
    wrong_partitions,
)
from streamflow.logs.groups import Share
from streamflow.logs.open import PARTITIONS_DEFAULT
from streamflow.logs.writing import Writing
from streamflow.sim.cluster import Cluster, Group, Member, Stream, Way, Weather
from streamflow.sim.lane import SimLane
from streamflow.sim.world import Process

ANSWER_SECONDS: Final = 5.0
"""After so long a question counts as not answered."""
FETCH_AGAIN_SECONDS: Final = 1.0
SLOW_SECONDS_MAX: Final = 4.0
COMMIT_SECONDS: Final = 0.2
"""Published offsets that move meanwhile are committed together: the newest are lost with their process."""
REJOIN_SECONDS: Final = 1.0
RELEASE_SECONDS: Final = 0.5
READ_BYTES_MAX: Final = 4 * 1024 * 1024
"""A read stops behind so many bytes."""
FETCHED_MIN: Final = 64
"""A follower fetches ahead, however little it is asked for at once. With a record for each answer of a slow network,
clients repeated their commands faster than these were taken, and nothing ended any more."""
APP_GROUP: Final = "app"
URL: Final = "sim://"

_T = TypeVar("_T")


async def open_sim(
    apps: dict[str, Cluster], process: Process, *, app: str, create: bool = True, partitions: int | None = None
) -> SimLog:
    """A handle to the app's topics, which are made if they are missing and `create` is true. Runs in the process."""
    cluster = apps.get(app)
    if cluster is None:
        if not create:
            raise no_app(URL, app)
        cluster = apps[app] = Cluster(process.world, partitions=partitions or PARTITIONS_DEFAULT, identity=f"sim/{app}")
    if partitions not in (None, cluster.partitions):
        raise wrong_partitions(URL, app, cluster.partitions, partitions)
    return SimLog(cluster, process, app)


class SimLog:
    """See `streamflow.logs.base.Log`. Used on the event loop of its process.

    With a `weather`, its way to the brokers is no worse than that, ever.
    """

    def __init__(self, cluster: Cluster, process: Process, app: str, *, weather: Weather | None = None) -> None:
        self._cluster, self._process, self._app = cluster, process, app
        self.way = way = Way(cluster, process, weather)
        self._world, self._chance = cluster.world, cluster.world.chance
        self._writing = Writing(
            URL,
            app,
            cluster.partitions,
            self._moved,
            lambda name, delivered: SimLane(cluster, way, process, app, name, delivered),
            loop=process.loop,
        )
        self._known: dict[int, int] = {}
        self._dirty: dict[int, int] = {}
        self._members: list[SimMembership] = []
        self._fetches: dict[int, asyncio.Future[list[Record]]] = {}
        self._closing: asyncio.Task[None] | None = None

    @property
    def app(self) -> str:
        return self._app

    @property
    def partitions(self) -> int:
        return self._cluster.partitions

    @property
    def url(self) -> str:
        return URL

    @property
    def state_dir(self) -> None:
        return None

    @property
    def identity(self) -> str:
        return self._cluster.identity

    # -- writing -----------------------------------------------------------------------------------------------------

    def append(
        self, partition: int, expected_offset: int, records: Sequence[tuple[bytes, bytes]]
    ) -> asyncio.Future[int]:
        check_append(partition, self.partitions, records)
        size = sum(check_size(HISTORY, key, value) for key, value in records)
        if self._closing is not None:
            return _failed(self._process, closed(URL))
        return self._writing.append(partition, expected_offset, records, size)

    def publish(self, records: Sequence[Outgoing], *, published: tuple[int, int] | None = None) -> asyncio.Future[None]:
        size = 0
        for record in records:
            check_publish(record, self.partitions)
            size += check_size(record.topic, record.key, record.value)
        if published is not None:
            check_partition(published[0], self.partitions)
        if self._closing is not None:
            return _failed(self._process, closed(URL))
        return self._writing.publish(records, self._writing.mark(published), size)

    def _moved(self, partition: int, offset: int) -> None:
        for hear in self._cluster.moved:
            hear(partition, offset)
        if offset > self._known.get(partition, 0):
            self._known[partition] = offset
            if not self._dirty:
                self._process.call(COMMIT_SECONDS, self._commit)
            self._dirty[partition] = offset

    def _commit(self) -> None:
        dirty, self._dirty = self._dirty, {}

        def arrive() -> None:
            for partition, offset in dirty.items():
                if self.way.reaches():
                    self._cluster.published[partition] = max(offset, self._cluster.published.get(partition, 0))
                    self._cluster.reached("a published offset was committed", self._process)
                elif self._process.is_alive:
                    self._process.call(COMMIT_SECONDS, self._commit_again, partition, offset)

        if dirty:
            self._world.at(self._world.now + self.way.delay(), arrive)

    def _commit_again(self, partition: int, offset: int) -> None:
        if self._closing is None:
            if not self._dirty:
                self._process.call(COMMIT_SECONDS, self._commit)
            self._dirty[partition] = max(offset, self._dirty.get(partition, 0))

    # -- reading -----------------------------------------------------------------------------------------------------

    async def published_offset(self, partition: int) -> int:
        check_partition(partition, self.partitions)
        self._check_open()
        self._writing.look_at_published(partition)
        found = await self.ask(lambda: self._cluster.published.get(partition, 0))
        return max(found, self._known.get(partition, 0))

    async def start_offset(self, topic: str, partition: int) -> int:
        stream = self._stream(topic, partition)
        return await self.ask(lambda: stream.start, topic, partition)

    async def end_offset(self, topic: str, partition: int) -> int:
        stream = self._stream(topic, partition)
        return await self.ask(lambda: stream.end, topic, partition)

    async def read(self, topic: str, partition: int, offset: int, *, limit: int = 1000) -> list[Record]:
        stream = self._stream(topic, partition)
        return await self.ask(lambda: self._take(stream, offset, limit), topic, partition)

    def _take(self, stream: Stream, offset: int, limit: int) -> list[Record]:
        """What a broker gives now from the offset on; below the start it goes on there, as Kafka's adapter does."""
        if offset < stream.start:
            self._cluster.mark("read below the start")
        first = stream.index(max(offset, stream.start))
        batch = stream.records[first : first + limit]
        size = 0
        for number, record in enumerate(batch):
            if size >= READ_BYTES_MAX:
                del batch[number:]
                break
            size += len(record.value or b"")
        if len(batch) > 1 and self._chance.random() < self.way.weather.partial:
            del batch[self._chance.randint(1, len(batch) - 1) :]
            self._cluster.mark("partial read")
        if batch and offset and stream.has_lost_tombstones(offset, batch[-1].offset):
            self._cluster.mark("tombstone missed")
        return batch

    async def follow(
        self, topic: str, partition: int, offset: int, *, limit: int = 1000
    ) -> AsyncIterator[list[Record]]:
        """See the port. Ends when the log is closed. What was fetched and is more than was asked for waits here."""
        stream = self._stream(topic, partition)
        while self._closing is None:
            batch = await self._fetch(stream, topic, partition, offset, max(limit, FETCHED_MIN))
            while batch and self._closing is None:
                offset = batch[min(limit, len(batch)) - 1].offset + 1
                yield batch[:limit]
                del batch[:limit]

    async def _fetch(self, stream: Stream, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        """What a broker sends to one who waits for more; nothing, where it is to be asked anew."""
        fetched: asyncio.Future[list[Record]] = self._process.loop.create_future()
        number = self._cluster.number()
        self._fetches[number] = fetched

        def arrive() -> None:
            if fetched.done():
                return
            if not self.way.reaches(topic, partition):
                self._process.call(FETCH_AGAIN_SECONDS, deliver, [])
            elif batch := self._take(stream, offset, limit):
                self._process.call(self._travel(), deliver, batch)
            else:
                stream.waiting[number] = lambda: self._world.at(self._world.now, arrive)

        def deliver(batch: list[Record]) -> None:
            if batch and not self.way.is_heard():
                self._process.call(FETCH_AGAIN_SECONDS, deliver, [])
            else:
                _succeed(fetched, batch)

        self._world.at(self._world.now + self.way.delay(), arrive)
        try:
            return await fetched
        finally:
            del self._fetches[number]
            stream.waiting.pop(number, None)

    def _travel(self) -> float:
        """How long an answer takes."""
        if self._chance.random() < self.way.weather.slow:
            self._cluster.mark("slow read")
            return self._chance.uniform(0, SLOW_SECONDS_MAX)
        return self.way.delay()

    async def trim(self, topic: str, partition: int, before: int) -> int:
        check_trim(topic)
        self._stream(topic, partition)
        return await self.ask(lambda: self._cluster.trim(topic, partition, before, self._process), topic, partition)

    async def offset_at(self, topic: str, partition: int, at_ms: int) -> int:
        stream = self._stream(topic, partition)
        at = at_ms / 1000 - self._world.epoch
        return await self.ask(lambda: stream.offset_at(at), topic, partition)

    async def verify(self) -> None:
        self._check_open()
        await self.ask(lambda: None)

    def _stream(self, topic: str, partition: int) -> Stream:
        check_topic(topic)
        check_partition(partition, self.partitions)
        self._check_open()
        if topic == HISTORY:
            self._writing.looked(partition)
        return self._cluster.stream(topic, partition)

    def committed(self, topic: str, partition: int, offset: int) -> None:
        """The group of a queue has committed."""
        for hear in self._cluster.queue_committed:
            hear(topic, partition, offset)
        self._cluster.reached("a queue was committed", self._process)

    def _check_open(self) -> None:
        if self._closing is not None:
            raise closed(URL)

    async def ask(self, answer: Callable[[], _T], topic: str = "", partition: int = 0) -> _T:
        """What a broker says when the question arrives, which may be no news any more when the answer does.

        Raises `Unavailable` when none comes back; what was asked for may have been done.
        """
        answered: asyncio.Future[_T] = self._process.loop.create_future()
        nothing = Unavailable(f"{URL}: no broker answers")

        def arrive() -> None:
            is_refused = self._chance.random() < self.way.weather.refused
            if is_refused or not self.way.reaches(topic, partition):
                self._process.call(ANSWER_SECONDS, _fail, answered, nothing)
            else:
                self._process.call(self._travel(), hear, answer())

        def hear(found: _T) -> None:
            if self.way.is_heard():
                _succeed(answered, found)
            else:
                self._cluster.mark("answer lost")
                self._process.call(ANSWER_SECONDS, _fail, answered, nothing)

        self._world.at(self._world.now + self.way.delay(), arrive)
        return await answered

    # -- groups ------------------------------------------------------------------------------------------------------

    async def join(self, owner: str, *, instance: str | None = None) -> SimMembership:
        self._check_open()
        check_id(owner, what="owner")
        return await self._join(APP_GROUP, owner)

    async def join_queue(self, queue: str, owner: str) -> SimMembership:
        topic = steps_topic(check_queue(queue))
        check_id(owner, what="owner")
        self._check_open()
        return await self._join(topic, owner)

    async def _join(self, name: str, owner: str) -> SimMembership:
        group = self._cluster.group(name)
        await self.ask(lambda: None)
        self._check_open()
        member = SimMembership(self, self._process, group, owner, name)
        self._members.append(member)
        return member

    async def close(self) -> None:
        if self._closing is None:
            self._closing = self._process.loop.create_task(self._close(), name="close-log")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await self._writing.close()
        for member in self._members:
            await member.leave()
        self._commit()
        for fetched in self._fetches.values():
            _succeed(fetched, [])


class SimMembership:
    """See `streamflow.logs.base.QueueMembership`."""

    def __init__(self, log: SimLog, process: Process, group: Group, owner: str, name: str) -> None:
        self._log, self._process, self._group, self._owner = log, process, group, owner
        self._name = name
        self._share = Share()
        self._changed = asyncio.Event()
        self._assigned: frozenset[int] = frozenset()
        self._left = False
        self._member = self._new_member()
        self._enter()

    def _new_member(self) -> Member:
        return Member(self._group, self._group.name(self._owner), self._process, self._update, self._put_out)

    def _enter(self) -> None:
        if self._left:
            return
        if self._is_heard():
            self._group.add(self._member)
        else:
            self._process.call(REJOIN_SECONDS, self._enter)

    def _is_heard(self) -> bool:
        return self._log.way.reaches() and self._log.way.is_heard()

    def _update(self, assigned: frozenset[int]) -> None:
        self._assigned = assigned
        if self._share.update(assigned, assigned):
            self._changed.set()
        self._believe()

    def _believe(self) -> None:
        stopping = frozenset() if self._left else frozenset(self._share.stopping)
        self._group.believes(self._member, self._share.shown | stopping)

    def _put_out(self) -> None:
        """The group has given everything away; this process hears of it now, and joins anew."""
        self._update(frozenset())
        self._group.believes(self._member, frozenset())
        self._member = self._new_member()
        self._believe()  # what it has not stopped yet
        self._process.call(REJOIN_SECONDS, self._enter)

    async def assignments(self) -> AsyncIterator[frozenset[int]]:
        """See the port. Ends after `leave`."""
        self._changed.set()
        while not self._left:
            await self._changed.wait()
            self._changed.clear()
            if not self._left:
                yield self._share.take()

    async def release(self, partition: int) -> None:
        self._share.release(partition)
        self._believe()
        self._tell_release(self._member, partition)
        if not self._left and self._share.update(self._assigned, self._assigned):
            self._changed.set()

    def _tell_release(self, member: Member, partition: int) -> None:
        """The group hears of it soon, or once it can be reached again."""
        world = self._process.world

        def arrive() -> None:
            if self._log.way.reaches():
                self._group.release(member, partition)
            else:
                self._process.call(RELEASE_SECONDS, self._tell_release, member, partition)

        world.at(world.now + 0.001, arrive)

    async def confirm(self, partition: int, consumed: int | None = None) -> bool:
        if self._left:
            return False
        return await self._log.ask(lambda: self._holds(partition))

    def _holds(self, partition: int) -> bool:
        group, name = self._group, self._member.name
        return group.members.get(name) is self._member and group.owners.get(partition) == name

    async def leave(self) -> None:
        if self._left:
            return
        self._left = True
        self._changed.set()
        self._group.believes(self._member, frozenset())
        if self._log.way.reaches():
            self._group.remove(self._member)
        else:
            self._member.left_at = self._process.world.now

    async def committed(self, partition: int) -> int:
        """See `streamflow.logs.base.QueueMembership`."""
        return await self._log.ask(lambda: self._group.committed.get(partition, 0))

    async def commit(self, partition: int, offset: int) -> None:
        """See `streamflow.logs.base.QueueMembership`. The group refuses who is out of it."""
        if not await self._log.ask(partial(self._commit, partition, offset)):
            raise Unavailable(f"{URL}: partition {partition} went to another member")

    def _commit(self, partition: int, offset: int) -> bool:
        if not self._holds(partition):
            return False
        self._group.committed[partition] = max(offset, self._group.committed.get(partition, 0))
        self._log.committed(self._name, partition, offset)
        return True


def _failed(process: Process, error: Exception) -> asyncio.Future[Any]:
    failed: asyncio.Future[Any] = process.loop.create_future()
    failed.set_exception(error)
    return failed


def _succeed(future: asyncio.Future[_T], found: _T) -> None:
    if not future.done():
        future.set_result(found)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
