"""The memory log: the port's semantics in one process, without threads or files; its one clock tells records' age.

`memory://name` is shared by all handles of that name in the process (`memory://` is one name too) and dropped when
the last of them is closed. Acknowledgements arrive on a later turn of the event loop, in call order, so that code
which works here does not rely on an append being done at once. All handles must live on one event loop.
"""

from __future__ import annotations

import asyncio
import bisect
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from streamflow.errors import Fenced
from streamflow.ids import check_id
from streamflow.logs.base import COMPACTED, HISTORY, Outgoing, Record, steps_topic
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
    name_taken,
    no_app,
    wrong_partitions,
)
from streamflow.logs.groups import Share, assign
from streamflow.logs.open import PARTITIONS_DEFAULT, LocalUrl
from streamflow.logs.queues import CommittingMembership

_brokers: Final[dict[str, _Broker]] = {}


class _Stream:
    """One topic partition; `records` are in offset order, with gaps where compaction took some."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.start = 0
        self.end = 0
        self.marks: list[tuple[int, int]] = []
        """When the end was where, in order: (ms since 1970, offset)."""
        self.newest: dict[bytes, int] = {}
        self.waiting: set[asyncio.Future[None]] = set()

    def add(self, key: bytes, value: bytes | None, *, compacted: bool) -> None:
        if compacted:
            if (before := self.newest.get(key)) is not None:
                del self.records[self.index(before)]
            self.newest[key] = self.end
        self.records.append(Record(self.end, key, value))
        self.end += 1

    def index(self, offset: int) -> int:
        return bisect.bisect_left(self.records, (offset,))

    def trim(self, before: int) -> None:
        if before > self.start:
            self.start = min(before, self.end)
            del self.records[: self.index(self.start)]

    def mark(self, now_ms: int) -> None:
        self.marks = [(at, offset) for at, offset in self.marks if offset > self.start]
        if not self.marks or self.marks[-1][1] < self.end:
            self.marks.append((now_ms, self.end))

    def wake(self) -> None:
        waiting, self.waiting = self.waiting, set()
        for future in waiting:
            if not future.done():
                future.set_result(None)


class _Group:
    """Those who share the partitions of the app's topics, or of one queue's, and who holds which."""

    def __init__(self, partitions: int) -> None:
        self.partitions = partitions
        self.members: dict[str, MemoryMembership] = {}
        self.owners: dict[int, str] = {}

    def rebalance(self) -> None:
        """Give free partitions to those that should own them, and show every member its share."""
        strays = True
        while strays:
            plan = assign(self.partitions, self.members, self.owners)
            for partition, name in plan.items():
                if partition not in self.owners and partition not in self.members[name].share.stopping:
                    self.owners[partition] = name
            strays = False
            for name, member in self.members.items():
                held = [partition for partition, holder in self.owners.items() if holder == name]
                planned = [partition for partition, holder in plan.items() if holder == name]
                if member.share.update(held, planned):
                    member.changed.set()
                for partition in member.share.strays(held):
                    del self.owners[partition]
                    strays = True


class _App:
    """The topics and the groups of one app."""

    def __init__(self, partitions: int) -> None:
        self.partitions = partitions
        self.identity = uuid.uuid4().hex
        self.streams: dict[tuple[str, int], _Stream] = {}
        self.published: dict[int, int] = {}
        self.consumed: dict[tuple[str, int], int] = {}
        self.group = _Group(partitions)
        self.queues: dict[str, _Group] = {}

    def stream(self, topic: str, partition: int) -> _Stream:
        return self.streams.setdefault((topic, partition), _Stream())


class _Broker:
    """All apps under one memory URL, and how many handles are open."""

    def __init__(self) -> None:
        self.identity = uuid.uuid4().hex
        self.apps: dict[str, _App] = {}
        self.handles = 0


def open_memory(url: LocalUrl, *, app: str, create: bool) -> MemoryLog:
    """One more handle to the topics of this name, which it creates if they are missing and `create` is true."""
    broker = _brokers.get(url.place) or _Broker()
    topics = broker.apps.get(app)
    if topics is None:
        if not create:
            raise no_app(url.url, app)
        topics = broker.apps[app] = _App(url.partitions or PARTITIONS_DEFAULT)
    if url.partitions not in (None, topics.partitions):
        raise wrong_partitions(url.url, app, topics.partitions, url.partitions)
    _brokers[url.place] = broker
    broker.handles += 1
    return MemoryLog(url, app, broker, topics)


class MemoryLog:
    """See `streamflow.logs.base.Log`; created by `open_memory`."""

    def __init__(self, url: LocalUrl, app: str, broker: _Broker, topics: _App) -> None:
        self._url, self._app, self._broker, self._topics = url, app, broker, topics
        self._loop = asyncio.get_running_loop()
        self._queue: list[Callable[[], None]] = []
        self._tails: dict[int, int] = {}
        """Partitions whose last append failed, with the end that the failed ones would have made."""
        self._members: list[MemoryMembership] = []
        self._waiting: set[_Stream] = set()
        self._closed = False

    @property
    def app(self) -> str:
        return self._app

    @property
    def partitions(self) -> int:
        return self._topics.partitions

    @property
    def url(self) -> str:
        return self._url.url

    @property
    def state_dir(self) -> None:
        return None

    @property
    def identity(self) -> str:
        return f"{self._broker.identity}/{self._topics.identity}"

    def append(
        self, partition: int, expected_offset: int, records: Sequence[tuple[bytes, bytes]]
    ) -> asyncio.Future[int]:
        check_append(partition, self.partitions, records)
        for key, value in records:
            check_size(HISTORY, key, value)
        records = tuple(records)  # the caller may reuse its list
        done: asyncio.Future[int] = self._loop.create_future()

        def write() -> None:
            error = self._write(partition, expected_offset, records)
            if done.done():
                return  # the caller does not wait any more
            done.set_result(expected_offset) if error is None else done.set_exception(error)

        self._submit(write, done)
        return done

    def _write(self, partition: int, expected: int, records: Sequence[tuple[bytes, bytes]]) -> Fenced | None:
        stream = self._topics.stream(HISTORY, partition)
        if self._tails.get(partition) == expected:
            self._tails[partition] = expected + len(records)
            return fenced_behind(self.url, partition, expected)
        if expected != stream.end:
            self._tails[partition] = expected + len(records)
            return fenced(self.url, partition, expected, stream.end)
        self._tails.pop(partition, None)
        for key, value in records:
            stream.add(key, value, compacted=False)
        stream.wake()
        return None

    def publish(self, records: Sequence[Outgoing], *, published: tuple[int, int] | None = None) -> asyncio.Future[None]:
        for record in records:
            check_publish(record, self.partitions)
            check_size(record.topic, record.key, record.value)
        if published is not None:
            check_partition(published[0], self.partitions)
        records = tuple(records)
        done: asyncio.Future[None] = self._loop.create_future()

        def write() -> None:
            for topic, partition, key, value in records:
                stream = self._topics.stream(topic, partition)
                stream.add(key, value, compacted=topic in COMPACTED)
                stream.wake()
            if published is not None:
                below = self._topics.published
                below[published[0]] = max(published[1], below.get(published[0], 0))
            if not done.done():
                done.set_result(None)

        self._submit(write, done)
        return done

    def _submit(self, write: Callable[[], None], done: asyncio.Future[int] | asyncio.Future[None]) -> None:
        if self._closed:
            done.set_exception(closed(self.url))
            return
        if not self._queue:
            self._loop.call_soon(self._write_all)
        self._queue.append(write)

    def _write_all(self) -> None:
        queue, self._queue = self._queue, []
        for write in queue:
            write()

    async def published_offset(self, partition: int) -> int:
        self._stream(HISTORY, partition)
        return self._topics.published.get(partition, 0)

    async def start_offset(self, topic: str, partition: int) -> int:
        return self._stream(topic, partition).start

    async def end_offset(self, topic: str, partition: int) -> int:
        if topic == HISTORY:
            self._tails.pop(partition, None)
        return self._stream(topic, partition).end

    async def read(self, topic: str, partition: int, offset: int, *, limit: int = 1000) -> list[Record]:
        stream = self._stream(topic, partition)
        if topic == HISTORY:
            self._tails.pop(partition, None)
        first = stream.index(offset)
        return stream.records[first : first + limit]

    async def trim(self, topic: str, partition: int, before: int) -> int:
        check_trim(topic)
        stream = self._stream(topic, partition)
        stream.trim(before)
        return stream.start

    async def offset_at(self, topic: str, partition: int, at_ms: int) -> int:
        stream = self._stream(topic, partition)
        stream.mark(time.time_ns() // 1_000_000)
        return max([stream.start, *(offset for at, offset in stream.marks if at <= at_ms)])

    def _stream(self, topic: str, partition: int) -> _Stream:
        if self._closed:
            raise closed(self.url)
        check_topic(topic)
        check_partition(partition, self.partitions)
        return self._topics.stream(topic, partition)

    async def follow(
        self, topic: str, partition: int, offset: int, *, limit: int = 1000
    ) -> AsyncIterator[list[Record]]:
        """See the port. Ends when the log is closed."""
        stream = self._stream(topic, partition)
        while not self._closed:
            first = stream.index(offset)
            if batch := stream.records[first : first + limit]:
                offset = batch[-1].offset + 1
                yield batch
                continue
            waiting: asyncio.Future[None] = self._loop.create_future()
            stream.waiting.add(waiting)
            self._waiting.add(stream)
            try:
                await waiting
            finally:
                stream.waiting.discard(waiting)

    async def join(self, owner: str, *, instance: str | None = None) -> MemoryMembership:
        return self._join(self._topics.group, owner)

    async def join_queue(self, queue: str, owner: str) -> CommittingMembership:
        topic = steps_topic(check_queue(queue))
        member = self._join(self._topics.queues.setdefault(queue, _Group(self.partitions)), owner)

        async def committed(partition: int) -> int:
            self._stream(topic, partition)
            return self._topics.consumed.get((topic, partition), 0)

        async def commit(partition: int, offset: int) -> None:
            before = await committed(partition)
            self._topics.consumed[topic, partition] = max(before, offset)

        return CommittingMembership(member, committed, commit)

    def _join(self, group: _Group, owner: str) -> MemoryMembership:
        self._stream(HISTORY, 0)
        check_id(owner, what="owner")
        if owner in group.members:
            raise name_taken(self.url, owner)
        member = group.members[owner] = MemoryMembership(group, owner)
        self._members.append(member)
        group.rebalance()
        return member

    async def verify(self) -> None:
        self._stream(HISTORY, 0)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._write_all()
        for member in self._members:
            await member.leave()
        for stream in self._waiting:
            stream.wake()
        self._broker.handles -= 1
        if self._broker.handles == 0 and _brokers.get(self._url.place) is self._broker:
            del _brokers[self._url.place]


class MemoryMembership:
    """See `streamflow.logs.base.Membership`."""

    def __init__(self, group: _Group, owner: str) -> None:
        self.share = Share()
        self.changed = asyncio.Event()
        self._group, self._owner, self._left = group, owner, False

    async def assignments(self) -> AsyncIterator[frozenset[int]]:
        """See the port. Ends after `leave`."""
        self.changed.set()
        while not self._left:
            await self.changed.wait()
            self.changed.clear()
            if not self._left:
                yield self.share.take()

    async def release(self, partition: int) -> None:
        if self._left:
            return
        self.share.release(partition)
        if self._group.owners.get(partition) == self._owner:
            del self._group.owners[partition]
        self._group.rebalance()

    async def confirm(self, partition: int, consumed: int | None = None) -> bool:
        return not self._left and partition in self.share.shown

    async def leave(self) -> None:
        if self._left:
            return
        self._left = True
        self.changed.set()
        del self._group.members[self._owner]
        self._group.owners = {p: name for p, name in self._group.owners.items() if name != self._owner}
        self._group.rebalance()
