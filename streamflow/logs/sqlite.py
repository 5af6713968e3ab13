"""The SQLite log: one file, several processes, no server.

Threads. The event loop's thread reads (a WAL reader never waits for a writer; a read takes some 10 µs) and owns
everything here; it commits small groups itself, with a connection of its own, while the writer thread (sqlite_writer)
has nothing to do, and hands all others to it. Never both at once: `_in_thread` counts what the thread has, so the order
of writes is that of the calls. Each member has a heartbeat thread (sqlite_membership) with its own connection. Both
threads come back to the loop through `call_soon_threadsafe` only.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from streamflow.errors import Unavailable
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
    fenced_behind,
)
from streamflow.logs.open import LocalUrl
from streamflow.logs.queues import CommittingMembership
from streamflow.logs.sqlite_file import OFFSET_BITS, OFFSET_MASK, AppRow, connect, limit_size, stream_of, translate
from streamflow.logs.sqlite_membership import SqliteMembership, join
from streamflow.logs.sqlite_trimming import mark, trim
from streamflow.logs.sqlite_wakeups import Wakeups
from streamflow.logs.sqlite_writer import APPEND, PUBLISHED, Write, Writer, accept_rows

READ_BYTES_MAX: Final = 4 * 1024 * 1024
"""A read stops behind this many bytes, so that a batch of large records neither fills memory nor blocks the loop."""

SAFETY_POLL_SECONDS: Final = 0.25
"""How often a log with followers looks for commits that no wake-up announced."""

POLL_SECONDS: Final = 0.01
"""The same where there are no Unix sockets, hence no wake-ups from other processes at all."""

PENDING_BYTES_MAX: Final = 256 * 1024 * 1024
"""Bytes handed over and not yet durable; a caller that does not await its futures is refused beyond."""

COMMIT_HERE_SECONDS_MAX: Final = 0.02
"""A commit on the event loop that took longer tells of a slow disk: then the thread waits for it, not the loop."""

SLOW_DISK_SECONDS: Final = 0.5
"""How long the thread does it all after such a commit, before it is tried here again."""

_READ: Final = (
    "SELECT id, key, value FROM records WHERE id BETWEEN max(?1, (SELECT stream << 40 | first FROM streams"
    " WHERE stream = ?1 >> 40)) AND ?2 ORDER BY id LIMIT ?3",
    "SELECT id, key, value FROM latest WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?",
)
"""By whether the topic is compacted. Below the start of a trimmed one may still lie what is not deleted yet."""


class _Followed:
    """A stream that is followed in this process, by any number of followers."""

    def __init__(self) -> None:
        self.followers = 0
        self.waiting: dict[asyncio.Future[None], int] = {}
        """Followers at the end, with the offset that each waits for."""
        self.batch: tuple[int, int, list[Record]] | None = None
        """The last (offset, limit, batch) read: hundreds of followers at the end of one stream share one read."""

    def lags(self, end: int) -> bool:
        """Whether a follower waits for records that are there."""
        return any(offset < end for offset in self.waiting.values())

    def wake(self) -> None:
        waiting, self.waiting = self.waiting, {}
        for future in waiting:
            if not future.done():
                future.set_result(None)


class _Tail:
    """What the loop has handed over to one history partition: where the last append ends, and whether one failed."""

    __slots__ = ("chain", "end", "failed")

    def __init__(self) -> None:
        self.chain, self.end, self.failed = 0, -1, False


async def open_sqlite(url: LocalUrl, *, app: str, create: bool) -> SqliteLog:
    """Open the file, creating it and the topics of `app` if they are missing and `create` is true."""
    log = SqliteLog(url, app)
    await log._open(create=create)
    return log


class SqliteLog:
    """See `streamflow.logs.base.Log`; created by `open_sqlite`."""

    def __init__(self, url: LocalUrl, app: str) -> None:
        self._url, self._app = url, app
        self._path = Path(url.place)
        self._loop = asyncio.get_running_loop()
        self._topics: dict[str, int] = {}
        self._tails: dict[int, _Tail] = {}
        self._followed: dict[int, _Followed] = {}
        self._members: list[SqliteMembership] = []
        self._poll: asyncio.TimerHandle | None = None
        self._data_version = -1
        self._pending_bytes = 0
        self._listening = False
        self._gathered: list[Write] = []
        self._in_thread = 0
        self._not_here_before = 0.0
        self._closing: asyncio.Task[None] | None = None
        self._writer: Writer
        self._row: AppRow
        self._db: sqlite3.Connection
        self._wakeups: Wakeups

    async def _open(self, *, create: bool) -> None:
        self._writer = Writer(
            self._url, self._path, self._app, create=create, loop=self._loop, finished=self._finished_in_thread
        )
        self._writer.start()
        try:
            self._row = await self._writer.opened
        except asyncio.CancelledError:
            self._writer.stop()
            raise
        self._topics = dict(self._row.topics)
        self._history = self._topics[HISTORY]
        self._void = [False] * self._row.partitions
        """Whether a publish failed whose published offset later ones must not pass, by partition."""
        self._publish_chains = [0] * self._row.partitions
        """How often the partition's owner asked from where to publish: what it published before is another chain's."""
        self._db = connect(self._path)
        self._db.execute("PRAGMA query_only=1")
        self._write_db = connect(self._path, synchronous=self._url.synchronous, busy_seconds=0)
        limit_size(self._write_db, self._url)
        accept_rows(self._write_db)
        self._wakeups = Wakeups(self._row.file_identity)

    @property
    def app(self) -> str:
        return self._app

    @property
    def partitions(self) -> int:
        return self._row.partitions

    @property
    def url(self) -> str:
        return self._url.url

    @property
    def state_dir(self) -> Path:
        return Path(f"{self._path}.state")

    @property
    def identity(self) -> str:
        return f"{self._row.file_identity}/{self._row.identity}"

    # --- writing

    def append(
        self, partition: int, expected_offset: int, records: Sequence[tuple[bytes, bytes]]
    ) -> asyncio.Future[int]:
        check_append(partition, self.partitions, records)
        done: asyncio.Future[int] = self._loop.create_future()
        tail = self._tails.setdefault(partition, _Tail())
        if tail.failed:
            if expected_offset == tail.end:
                tail.end += len(records)
                done.set_exception(fenced_behind(self.url, partition, expected_offset))
                return done
            self._known(partition)
        stream = stream_of(self._history, partition)
        write = Write(done, partition, stream, expected_offset, tail.chain)
        write.streams.add(stream)
        offset = expected_offset
        for key, value in records:
            write.size += check_size(HISTORY, key, value)
            write.rows += (APPEND, stream, offset, key, value)
            offset += 1
        tail.end = offset
        self._submit(write)
        return done

    def publish(self, records: Sequence[Outgoing], *, published: tuple[int, int] | None = None) -> asyncio.Future[None]:
        done: asyncio.Future[None] = self._loop.create_future()
        write = Write(done)
        known = True
        for record in records:
            check_publish(record, self.partitions)
            write.size += check_size(record.topic, record.key, record.value)
            known = known and record.topic in self._topics
        if known:
            write.add(self._topics, records)
        else:
            write.outgoing = tuple(records)
        if published is not None:
            partition, offset = published
            check_partition(partition, self.partitions)
            if not self._void[partition]:
                write.published = (partition, self._publish_chains[partition])
                write.rows += (PUBLISHED, stream_of(self._history, partition), offset, None, None)
        self._submit(write)
        return done

    def _submit(self, write: Write) -> None:
        if self._closing is not None:
            write.done.set_exception(closed(self.url))
        elif self._pending_bytes > PENDING_BYTES_MAX:
            write.error = Unavailable(
                f"{self.url}: {self._pending_bytes:,} bytes wait to be written, at most {PENDING_BYTES_MAX:,} may: "
                "await earlier appends first"
            )
            self._settle(write)
        else:
            self._pending_bytes += write.size
            self._gathered.append(write)
            if len(self._gathered) == 1:
                self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Commit what one turn of the event loop gathered: here and now, or by the thread.

        Here saves two hand-overs between threads, which cost more than the commit when nothing else is under way
        (DESIGN.md). The thread is for when there is more: when it is busy, when another process holds the lock, when
        the disk is slow.
        """
        group, self._gathered = self._gathered, []
        if not group:
            return  # the log was closed meanwhile
        began = time.monotonic()
        here = not self._in_thread and not self._writer.checkpointing and began >= self._not_here_before
        if here and self._writer.write_now(self._write_db, group):
            ended = time.monotonic()
            if ended - began > COMMIT_HERE_SECONDS_MAX:
                self._not_here_before = ended + SLOW_DISK_SECONDS
            self._finished(group)
            if not self._writer.wants_a_look:
                return
            self._writer.wants_a_look = False
            group = [Write(self._loop.create_future())]
        self._in_thread += len(group)
        for write in group:
            self._writer.submit(write)

    def _finished_in_thread(self, group: list[Write]) -> None:
        """Called on the loop by the writer thread, once per transaction."""
        self._in_thread -= len(group)
        assert self._in_thread >= 0, self._in_thread  # else the loop would write beside the thread, out of order
        self._finished(group)

    def _finished(self, group: list[Write]) -> None:
        written: set[int] = set()
        for write in group:
            self._pending_bytes -= write.size
            self._settle(write)
            if write.error is None:
                written |= write.streams
        self._wake(written)
        self._wakeups.ring(map(str, written))

    def _settle(self, write: Write) -> None:
        if write.error is not None and write.partition >= 0:
            tail = self._tails[write.partition]
            tail.failed = tail.failed or tail.chain == write.chain
        if write.error is not None and write.published is not None:
            partition, chain = write.published
            self._void[partition] = self._void[partition] or self._publish_chains[partition] == chain
        if write.done.done():
            return  # the caller does not wait any more
        if write.error is not None:
            write.done.set_exception(write.error)
        else:
            write.done.set_result(write.expected if write.partition >= 0 else write.result)  # type: ignore[arg-type]

    def _known(self, partition: int) -> None:
        """The caller has looked at the partition's end again: appends build on what it saw, not on a failed one."""
        tail = self._tails.get(partition)
        if tail is not None and tail.failed:
            tail.failed = False
            tail.chain += 1

    # --- reading

    async def verify(self) -> None:
        self._check_open()  # a file that is open cannot become another one

    async def published_offset(self, partition: int) -> int:
        check_partition(partition, self.partitions)
        self._void[partition] = False
        self._publish_chains[partition] += 1
        return self._below(stream_of(self._history, partition))

    def _below(self, stream: int) -> int:
        found = self._select("SELECT below FROM published WHERE stream=?", stream)
        return found[0][0] if found else 0

    async def start_offset(self, topic: str, partition: int) -> int:
        return self._bounds(topic, partition)[0]

    async def end_offset(self, topic: str, partition: int) -> int:
        end = self._bounds(topic, partition)[1]
        if topic == HISTORY:
            self._known(partition)
        return end

    def _bounds(self, topic: str, partition: int) -> tuple[int, int]:
        stream = self._stream(topic, partition)
        found = self._select("SELECT first, next FROM streams WHERE stream=?", -1 if stream is None else stream)
        return (found[0][0], found[0][1]) if found else (0, 0)

    async def read(self, topic: str, partition: int, offset: int, *, limit: int = 1000) -> list[Record]:
        stream = self._stream(topic, partition)
        if topic == HISTORY:
            self._known(partition)
        return [] if stream is None else self._read(topic, stream, offset, limit)

    def _read(self, topic: str, stream: int, offset: int, limit: int) -> list[Record]:
        self._check_open()
        low = stream << OFFSET_BITS
        records: list[Record] = []
        size = 0
        try:
            cursor = self._db.execute(_READ[topic in COMPACTED], (low | offset, low | OFFSET_MASK, limit))
            for id_, key, value in cursor:
                records.append(Record(id_ & OFFSET_MASK, key, value))
                size += len(key) + (0 if value is None else len(value))
                if size >= READ_BYTES_MAX:
                    break
            cursor.close()  # ends the read transaction also when rows are left
        except sqlite3.Error as error:
            raise translate(error, self.url) from error
        return records

    def _select(self, sql: str, *values: object) -> list[tuple[int, ...]]:
        self._check_open()
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise translate(error, self.url) from error

    def _check_open(self) -> None:
        if self._closing is not None:
            raise closed(self.url)

    def _stream(self, topic: str, partition: int) -> int | None:
        """The stream's number, None when the topic has not come into being yet."""
        check_topic(topic)
        check_partition(partition, self.partitions)
        if topic not in self._topics:
            found = self._select("SELECT id FROM topics WHERE app=? AND topic=?", self._app, topic)
            if not found:
                return None
            self._topics[topic] = found[0][0]
        return stream_of(self._topics[topic], partition)

    # --- trimming

    async def trim(self, topic: str, partition: int, before: int) -> int:
        check_trim(topic)
        stream = self._stream(topic, partition)
        start, more = 0, stream is not None
        while more:  # each time one short transaction, so that appends go in between
            assert stream is not None
            start, more = await self._errand(partial(trim, stream=stream, before=before))
        return start

    async def offset_at(self, topic: str, partition: int, at_ms: int) -> int:
        stream = self._stream(topic, partition)
        if stream is None:
            return 0
        now_ms = time.time_ns() // 1_000_000
        offset, _ = await self._errand(partial(mark, stream=stream, now_ms=now_ms, at_ms=at_ms))
        return offset

    def _errand(self, errand: Callable[[sqlite3.Connection], tuple[int, bool]]) -> asyncio.Future[tuple[int, bool]]:
        """Have the writer thread do something in a transaction of its own, in the order of the writes."""
        done: asyncio.Future[tuple[int, bool]] = self._loop.create_future()
        self._submit(Write(done, errand=errand))  # type: ignore[arg-type]  # it settles futures of any result
        return done

    async def _made_stream(self, topic: str, partition: int) -> int:
        """The stream's number, of a topic that is made if it is missing."""
        stream = self._stream(topic, partition)
        if stream is None:
            done: asyncio.Future[None] = self._loop.create_future()
            self._submit(Write(done, topics=(topic,)))
            await done
            stream = self._stream(topic, partition)
            assert stream is not None
        return stream

    # --- following

    async def follow(
        self, topic: str, partition: int, offset: int, *, limit: int = 1000
    ) -> AsyncIterator[list[Record]]:
        """See the port. Ends when the log is closed."""
        stream = await self._made_stream(topic, partition)
        # Who waits below the start would look as if it lagged, for ever if nothing comes.
        offset = max(offset, self._bounds(topic, partition)[0])
        followed = self._start_following(stream)
        try:
            while self._closing is None:
                batch = self._read_shared(followed, topic, stream, offset, limit)
                if batch:
                    offset = batch[-1].offset + 1
                    yield list(batch)
                    continue
                waiting: asyncio.Future[None] = self._loop.create_future()
                followed.waiting[waiting] = offset
                try:
                    await waiting
                finally:
                    followed.waiting.pop(waiting, None)
        finally:
            self._stop_following(stream, followed)

    def _read_shared(self, followed: _Followed, topic: str, stream: int, offset: int, limit: int) -> list[Record]:
        if followed.batch is not None and followed.batch[:2] == (offset, limit):
            return followed.batch[2]
        batch = self._read(topic, stream, offset, limit)
        if batch and followed.followers > 1:
            followed.batch = (offset, limit, batch)
        return batch

    def _start_following(self, stream: int) -> _Followed:
        followed = self._followed.get(stream)
        if followed is None:
            followed = self._followed[stream] = _Followed()
            self._wakeups.want(str(stream))
            self._listen()
        followed.followers += 1
        if self._poll is None:
            self._poll_later()
        return followed

    def _stop_following(self, stream: int, followed: _Followed) -> None:
        followed.followers -= 1
        if followed.followers == 0 and self._followed.get(stream) is followed:
            del self._followed[stream]
            self._wakeups.unwant(str(stream))

    def _wake(self, streams: Iterable[int]) -> None:
        for stream in streams:
            if (followed := self._followed.get(stream)) is not None:
                followed.batch = None
                followed.wake()

    def _rung(self) -> None:
        rung = self._wakeups.drain()
        self._wake(list(self._followed) if rung is None else map(int, rung))

    def _poll_later(self) -> None:
        seconds = SAFETY_POLL_SECONDS if self._wakeups.available else POLL_SECONDS
        self._poll = self._loop.call_later(seconds, self._poll_now)

    def _poll_now(self) -> None:
        """Wake those whose stream has grown without a wake-up. Stops when nobody follows."""
        self._poll = None
        if self._closing is not None or not self._followed:
            return
        try:
            version = int(self._db.execute("PRAGMA data_version").fetchone()[0])
            if version != self._data_version:
                self._data_version = version
                ends = self._next_offsets(self._followed)
                if missed := [stream for stream, end in ends.items() if self._followed[stream].lags(end)]:
                    self._wake(missed)
                    self._restore_wakeups()
        except sqlite3.Error:
            self._wake(list(self._followed))  # their own read raises the error where it is seen
        self._poll_later()

    def _next_offsets(self, streams: Iterable[int]) -> dict[int, int]:
        wanted = json.dumps(list(streams))
        sql = "SELECT stream, next FROM streams WHERE stream IN (SELECT value FROM json_each(?))"
        return dict(self._db.execute(sql, (wanted,)).fetchall())

    def _restore_wakeups(self) -> None:
        """A wake-up was missed: perhaps somebody cleaned the temporary directory."""
        if self._listening and (listener := self._wakeups.listen()) is not None:
            self._loop.remove_reader(listener)
            self._wakeups.restore()
            self._listening = False
        self._listen()

    def _listen(self) -> None:
        if not self._listening and (listener := self._wakeups.listen()) is not None:
            self._loop.add_reader(listener, self._rung)
            self._listening = True

    # --- membership and the end

    async def join(self, owner: str, *, instance: str | None = None) -> SqliteMembership:
        return await self._join(self._app, owner)

    async def join_queue(self, queue: str, owner: str) -> CommittingMembership:
        topic = steps_topic(check_queue(queue))

        async def committed(partition: int) -> int:
            return self._below(await self._made_stream(topic, partition))

        async def commit(partition: int, offset: int) -> None:
            done: asyncio.Future[None] = self._loop.create_future()
            write = Write(done)
            write.rows += (PUBLISHED, await self._made_stream(topic, partition), offset, None, None)
            self._submit(write)
            await done

        await self._made_stream(topic, 0)
        # No app's name has a plus sign: the group is nobody else's.
        return CommittingMembership(await self._join(f"{self._app}+{topic}", owner), committed, commit)

    async def _join(self, group: str, owner: str) -> SqliteMembership:
        self._check_open()
        membership = await join(self._url, self._path, group, self._row, owner)
        self._members.append(membership)
        return membership

    async def close(self) -> None:
        if self._closing is None:
            self._closing = self._loop.create_task(self._close(), name="close-sqlite-log")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for membership in self._members:
            await membership.leave()
        if self._gathered:
            self._flush()
        self._writer.stop()
        await self._writer.closed
        self._writer.join()
        if self._poll is not None:
            self._poll.cancel()
        if self._listening and (listener := self._wakeups.listen()) is not None:
            self._loop.remove_reader(listener)
        self._wake(list(self._followed))
        for stream in self._followed:
            self._wakeups.unwant(str(stream))
        self._wakeups.close()
        self._write_db.close()
        self._db.close()
