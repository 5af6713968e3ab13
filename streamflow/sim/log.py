"""One process's handle to the simulated cluster: the log port, with what Kafka's adapter makes of the network's faults.

Rules, as in logs/kafka_writing.py: futures complete in the order of the calls; after an append whose outcome is unknown
all that build on it fail; a published offset never moves past a publish that failed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

from streamflow.errors import InvalidArguments, Unavailable
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
    fenced,
    fenced_behind,
)
from streamflow.logs.groups import Share
from streamflow.sim.cluster import LATE_SECONDS_MAX, Cluster, Group, Member, Stream, Weather
from streamflow.sim.world import Process

UNKNOWN_SECONDS: Final = 5.0
"""After so long without an acknowledgement the outcome of a write is called unknown."""
REJOIN_SECONDS: Final = 1.0
APP_GROUP: Final = "app"


class _Append:
    def __init__(self, done: asyncio.Future[int], expected: int, count: int) -> None:
        self.done, self.expected, self.count = done, expected, count
        self.settled = False


class _Publish:
    def __init__(self, done: asyncio.Future[None], mark: tuple[int, int, int] | None, left: int) -> None:
        self.done, self.mark, self.left = done, mark, left
        self.failed = False


class SimLog:
    """See `streamflow.logs.base.Log`. With a `weather`, its way to the brokers is no worse than that, ever."""

    def __init__(self, cluster: Cluster, process: Process, app: str, *, weather: Weather | None = None) -> None:
        self._cluster, self._process, self._app = cluster, process, app
        self._own_weather = weather
        self._chance = cluster.world.chance
        self._under_way: dict[int, list[_Append]] = {}
        self._failed_ends: dict[int, int] = {}
        self._arrivals: dict[tuple[str, int], float] = {}
        self._answers: dict[tuple[str, int], float] = {}
        self._publishes: deque[_Publish] = deque()
        self._void: set[int] = set()
        self._chains = [0] * cluster.partitions
        self._members: list[SimMembership] = []
        self._followers = 0
        self._closed = False

    @property
    def _weather(self) -> Weather:
        return self._own_weather or self._cluster.weather

    @property
    def app(self) -> str:
        return self._app

    @property
    def partitions(self) -> int:
        return self._cluster.partitions

    @property
    def url(self) -> str:
        return "sim://"

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
        for key, value in records:
            check_size(HISTORY, key, value)
        done: asyncio.Future[int] = self._process.loop.create_future()
        if self._closed:
            done.set_exception(closed(self.url))
            return done
        append = _Append(done, expected_offset, len(records))
        if self._failed_ends.get(partition) == expected_offset:
            self._failed_ends[partition] += len(records)
            done.set_exception(fenced_behind(self.url, partition, expected_offset))
            return done
        self._failed_ends.pop(partition, None)
        self._under_way.setdefault(partition, []).append(append)

        def landed(offset: int | None) -> None:
            self._appended(partition, append, offset)

        def unknown() -> None:
            if not append.settled:
                why = f"{self.url}: history[{partition}]: the outcome of an append is unknown"
                self._break(partition, append, Unavailable(why))

        self._send(HISTORY, partition, list(records), landed, unknown)
        return done

    def _appended(self, partition: int, append: _Append, offset: int | None) -> None:
        if append.settled:
            return
        if self._under_way[partition][0] is not append:
            return  # one before it is not acknowledged, nor will be; what became of this one is told with it
        if offset != append.expected:
            found = -1 if offset is None else offset
            self._break(partition, append, fenced(self.url, partition, append.expected, found))
            return
        del self._under_way[partition][0]
        append.settled = True
        if not append.done.done():
            append.done.set_result(append.expected)

    def _break(self, partition: int, append: _Append, error: Exception) -> None:
        """It failed: those before it are unknown then, too, and all behind build on it."""
        under_way, self._under_way[partition] = self._under_way[partition], []
        for each in under_way:
            each.settled = True
            if not each.done.done():
                each.done.set_exception(error)
            self._failed_ends[partition] = each.expected + each.count
            if each is append:
                error = fenced_behind(self.url, partition, append.expected)

    def publish(self, records: Sequence[Outgoing], *, published: tuple[int, int] | None = None) -> asyncio.Future[None]:
        for record in records:
            check_publish(record, self.partitions)
            check_size(record.topic, record.key, record.value)
        if published is not None:
            check_partition(published[0], self.partitions)
        done: asyncio.Future[None] = self._process.loop.create_future()
        if self._closed:
            done.set_exception(closed(self.url))
            return done
        places: dict[tuple[str, int], list[tuple[bytes, bytes | None]]] = {}
        for topic, partition, key, value in records:
            places.setdefault((topic, partition), []).append((key, value))
        mark = None if published is None or published[0] in self._void else (*published, self._chains[published[0]])
        publish = _Publish(done, mark, len(places))
        self._publishes.append(publish)
        for (topic, partition), many in places.items():
            self._send(
                topic,
                partition,
                many,
                lambda _: self._published(publish, failed=False),
                lambda: self._published(publish, failed=True),
            )
        if not places:
            publish.left = 1
            self._process.call(0.0, lambda: self._published(publish, failed=False))
        return done

    def _published(self, publish: _Publish, *, failed: bool) -> None:
        """A part of it landed, or will never be heard of; publishes end in the order of the calls."""
        publish.left -= 1
        publish.failed |= failed
        while self._publishes and self._publishes[0].left <= 0:
            done, mark, failed = (publish := self._publishes.popleft()).done, publish.mark, publish.failed
            if mark is not None and mark[2] == self._chains[mark[0]]:
                if failed:
                    self._void.add(mark[0])
                elif mark[0] not in self._void:
                    self._commit(mark[0], mark[1])
            if done.done():
                continue
            if failed:
                done.set_exception(Unavailable(f"{self.url}: publishing failed: try again"))
            else:
                done.set_result(None)

    def _commit(self, partition: int, offset: int) -> None:
        """Offsets are committed now and then: the newest may be lost with the process."""

        def arrive() -> None:
            self._cluster.published[partition] = max(offset, self._cluster.published.get(partition, 0))

        if not self._weather.down:
            self._cluster.world.at(self._cluster.world.now + self._cluster.delay(self._own_weather), arrive)

    def _send(
        self,
        topic: str,
        partition: int,
        records: list[tuple[bytes, bytes | None]],
        landed: Callable[[int | None], None],
        unknown: Callable[[], None],
    ) -> None:
        """Records on their way to a broker, behind all that this process sent there before."""
        world, cluster, weather = self._cluster.world, self._cluster, self._weather
        arrives_at = max(world.now + cluster.delay(self._own_weather), self._arrivals.get((topic, partition), 0.0))
        self._arrivals[topic, partition] = arrives_at
        draw = self._chance.random()
        fate = "lands"
        for name in ("lost", "late", "torn", "unacknowledged", "repeated"):
            draw -= getattr(weather, name)
            if draw < 0:
                fate = name
                break
        if weather.down:
            fate = self._chance.choice(("lost", "late"))
        if fate in ("lost", "late", "torn", "unacknowledged"):
            world.note(self._process.name, f"{topic}[{partition}]: {len(records)} records {fate}")
            self._process.call(UNKNOWN_SECONDS, unknown)

        def arrive() -> None:
            many = records
            if fate == "torn":
                many = records[: self._chance.randint(0, len(records) - 1)]
            offset = cluster.land(topic, partition, many)
            if fate == "repeated":
                cluster.land(topic, partition, many)
                world.note(self._process.name, f"{topic}[{partition}]: {len(records)} records repeated")
            if fate in ("lands", "repeated"):
                answered_at = max(
                    world.now + cluster.delay(self._own_weather), self._answers.get((topic, partition), 0.0)
                )
                self._answers[topic, partition] = answered_at
                self._process.call(answered_at - world.now, landed, None if fate == "repeated" else offset)

        if fate == "late":
            arrives_at += self._chance.uniform(0, LATE_SECONDS_MAX)
        if fate != "lost":
            world.at(arrives_at, arrive)

    # -- reading -----------------------------------------------------------------------------------------------------

    async def published_offset(self, partition: int) -> int:
        self._stream(HISTORY, partition)
        self._chains[partition] += 1
        self._void.discard(partition)
        await self._ask()
        return self._cluster.published.get(partition, 0)

    async def start_offset(self, topic: str, partition: int) -> int:
        stream = self._stream(topic, partition)
        await self._ask()
        return stream.start

    async def end_offset(self, topic: str, partition: int) -> int:
        stream = self._stream(topic, partition)
        if topic == HISTORY:
            self._failed_ends.pop(partition, None)
        await self._ask()
        return stream.end

    async def read(self, topic: str, partition: int, offset: int, *, limit: int = 1000) -> list[Record]:
        stream = self._stream(topic, partition)
        if topic == HISTORY:
            self._failed_ends.pop(partition, None)
        await self._ask()
        first = stream.index(offset)
        return stream.records[first : first + self._chance.randint(1, limit)]

    async def follow(
        self, topic: str, partition: int, offset: int, *, limit: int = 1000
    ) -> AsyncIterator[list[Record]]:
        """See the port. Ends when the log is closed."""
        stream = self._stream(topic, partition)
        self._followers += 1
        number = (self._process.number << 20) + self._followers
        while not self._closed:
            await self._travel()
            first = stream.index(offset)
            if not self._weather.down and (batch := stream.records[first : first + self._chance.randint(1, limit)]):
                offset = batch[-1].offset + 1
                yield batch
                continue
            waiting: asyncio.Future[None] = self._process.loop.create_future()

            def wake(waiting: asyncio.Future[None] = waiting) -> None:
                self._process.call(0.0, _succeed, waiting)

            stream.waiting[number] = wake
            if self._weather.down:
                self._process.call(1.0, _succeed, waiting)
            try:
                await waiting
            finally:
                stream.waiting.pop(number, None)

    async def trim(self, topic: str, partition: int, before: int) -> int:
        check_trim(topic)
        stream = self._stream(topic, partition)
        await self._ask()
        start = stream.trim(before)
        await self._ask()
        return start

    async def offset_at(self, topic: str, partition: int, at_ms: int) -> int:
        stream = self._stream(topic, partition)
        await self._ask()
        at = at_ms / 1000 - self._cluster.world.epoch
        for record, landed_at in zip(stream.records, stream.times, strict=True):
            if landed_at >= at:
                return max(stream.start, record.offset)
        return stream.end

    async def verify(self) -> None:
        self._stream(HISTORY, 0)
        await self._ask()

    def _stream(self, topic: str, partition: int) -> Stream:
        if self._closed:
            raise closed(self.url)
        check_topic(topic)
        check_partition(partition, self.partitions)
        return self._cluster.stream(topic, partition)

    async def _travel(self) -> None:
        """The time of a request and its answer."""
        arrived: asyncio.Future[None] = self._process.loop.create_future()
        self._process.call(self._cluster.delay(self._own_weather), _succeed, arrived)
        await arrived

    async def _ask(self) -> None:
        """A question that changes nothing reaches the brokers. Raises `Unavailable` when they do not answer."""
        await self._travel()
        if self._weather.down or self._chance.random() < self._weather.refused:
            late: asyncio.Future[None] = self._process.loop.create_future()
            self._process.call(UNKNOWN_SECONDS, _succeed, late)
            await late
            raise Unavailable(f"{self.url}: no broker answers")

    # -- groups ------------------------------------------------------------------------------------------------------

    async def join(self, owner: str, *, instance: str | None = None) -> SimMembership:
        self._stream(HISTORY, 0)
        await self._ask()
        return self._join(self._cluster.group(APP_GROUP), owner)

    async def join_queue(self, queue: str, owner: str) -> SimMembership:
        topic = steps_topic(check_queue(queue))
        await self._ask()
        return self._join(self._cluster.group(topic), owner)

    def _join(self, group: Group, owner: str) -> SimMembership:
        if owner in group.members:
            raise InvalidArguments(f"{self.url}: {owner} is a member already")
        member = SimMembership(self, self._process, group, owner)
        self._members.append(member)
        return member

    async def close(self) -> None:
        if self._closed:
            return
        for member in self._members:
            await member.leave()
        if under_way := [append.done for appends in self._under_way.values() for append in appends]:
            await asyncio.wait(under_way)
        self._closed = True
        for stream in self._cluster.streams.values():
            for number in [number for number in stream.waiting if number >> 20 == self._process.number]:
                stream.waiting[number]()

    async def ask(self) -> None:
        """For memberships: as `_ask`."""
        await self._ask()


class SimMembership:
    """See `streamflow.logs.base.QueueMembership`."""

    def __init__(self, log: SimLog, process: Process, group: Group, owner: str) -> None:
        self._log, self._process, self._group, self._owner = log, process, group, owner
        self._share = Share()
        self._changed = asyncio.Event()
        self._assigned: frozenset[int] = frozenset()
        self._left = False
        self._enter()

    def _enter(self) -> None:
        if not self._left:
            self._member = Member(self._owner, self._process, self._update, self._put_out)
            self._group.add(self._member)

    def _update(self, assigned: frozenset[int]) -> None:
        self._assigned = assigned
        if self._share.update(assigned, assigned):
            self._changed.set()

    def _put_out(self) -> None:
        """The group has given everything away; this process hears of it now, and joins anew."""
        self._update(frozenset())
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
        self._process.world.at(self._process.world.now + 0.001, lambda: self._group.release(self._member, partition))
        if not self._left and self._share.update(self._assigned, self._assigned):
            self._changed.set()

    async def confirm(self, partition: int, consumed: int | None = None) -> bool:
        await self._log.ask()
        return self._holds(partition)

    def _holds(self, partition: int) -> bool:
        group = self._group
        return group.members.get(self._owner) is self._member and group.owners.get(partition) == self._owner

    async def leave(self) -> None:
        if self._left:
            return
        self._left = True
        self._changed.set()
        self._group.remove(self._member)

    async def committed(self, partition: int) -> int:
        await self._log.ask()
        return self._group.committed.get(partition, 0)

    async def commit(self, partition: int, offset: int) -> None:
        await self._log.ask()
        if not self._holds(partition):
            raise Unavailable(f"{self._log.url}: partition {partition} went to another member")
        self._group.committed[partition] = max(offset, self._group.committed.get(partition, 0))


def _succeed(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_result(None)
