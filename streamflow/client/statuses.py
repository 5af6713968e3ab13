"""The statuses that handles wait for, from `<app>.status`.

Rules of this file:

- One follower per partition and client, shared by all handles, begun at the end of the topic when first needed.
- A status is kept only for ids that some handle is alive for; a handle that nobody holds leaves nothing behind.
- Statuses of a run are ordered by (created_at, run, turn): whatever way one comes, an older one never replaces a newer.
  Turns restart from 1 when a run is cleaned up and its id used again; the creation then tells which is newer.
- What was published before the client began is read only where nobody answers (`published`): one pass, one record kept.
- A tombstone only says that a run was deleted once. Whether it still is, the partition's owner knows.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Final
from weakref import WeakSet, WeakValueDictionary

from streamflow.client.follow import follow
from streamflow.client.requests import place
from streamflow.codec.avro import decode_status
from streamflow.codec.envelope import CONFLUENT, DecodeError
from streamflow.codec.registry import Schemas
from streamflow.core.effects import StatusRecord
from streamflow.errors import Unavailable
from streamflow.logs.base import STATUS, Log, Record

FEED_STATUSES_MAX: Final = 256
"""Statuses kept for one watcher that is slower than its run; beyond it the oldest are skipped, never the last."""

PUBLISHED_SECONDS: Final = 30.0
"""How long the topic may be read for the last status of one run: it is as large as the runs that are kept."""

Position = tuple[int, int, int]

_log = logging.getLogger("streamflow.client")


def position(record: StatusRecord) -> Position:
    """Where the status stands among all of its workflow id."""
    return (record.created_at, record.run, record.turn)


class Feed:
    """The statuses that came since a watcher last looked."""

    __slots__ = ("__weakref__", "records")

    def __init__(self) -> None:
        self.records: deque[StatusRecord] = deque(maxlen=FEED_STATUSES_MAX)


class Interest:
    """What is known of one run, for the handles that are alive for it."""

    __slots__ = ("__weakref__", "_waiters", "deleted", "failed", "feeds", "key", "record")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.record: StatusRecord | None = None
        self.deleted = False
        self.failed: str | None = None
        self.feeds: WeakSet[Feed] | None = None
        self._waiters: list[asyncio.Future[None]] = []

    def offer(self, record: StatusRecord) -> None:
        """Take a status, unless a newer one is known."""
        if self.record is not None and position(record) <= position(self.record):
            return
        self.record = record
        self.deleted = False
        for feed in self.feeds or ():
            feed.records.append(record)
        self._wake()

    def confirm(self, record: StatusRecord) -> None:
        """Take a status that the owner gave now: the run exists."""
        self.offer(record)
        self.deleted = False

    def delete(self) -> None:
        """A tombstone came."""
        self.deleted = True
        self._wake()

    def fail(self, why: str) -> None:
        """Nothing more will come."""
        self.failed = why
        self._wake()

    def open_feed(self) -> Feed:
        """A feed of the statuses from now on, for as long as somebody holds it."""
        if self.feeds is None:
            self.feeds = WeakSet()
        feed = Feed()
        self.feeds.add(feed)
        return feed

    async def changed(self) -> None:
        """Wait for the next status or tombstone. Raises `Unavailable` when none will come."""
        if self.failed is not None:
            raise Unavailable(self.failed)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        if self.failed is not None:
            raise Unavailable(self.failed)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class Statuses:
    """The followers of one client, and what its handles are interested in."""

    def __init__(self, log: Log, schemas: Schemas | None = None) -> None:
        self._log = log
        self._schemas = schemas
        self._interests: WeakValueDictionary[bytes, Interest] = WeakValueDictionary()
        self._following: dict[int, asyncio.Task[None]] = {}
        self._opening: dict[int, asyncio.Future[None]] = {}
        self._failed: str | None = None

    def interest(self, workflow_id: str) -> Interest:
        """What is known of the run; it is kept up to date once `listen` was called, while somebody holds it."""
        key = workflow_id.encode()
        found = self._interests.get(key)
        if found is None:
            found = self._interests[key] = Interest(key)
            found.failed = self._failed
        return found

    async def listen(self, partition: int) -> None:
        """Follow the partition's statuses from here on, if that is not done yet."""
        while self._failed is not None or partition not in self._following:
            if self._failed is not None:
                raise Unavailable(self._failed)
            if (other := self._opening.get(partition)) is not None:
                await asyncio.wait((other,))
                continue
            opening = self._opening[partition] = asyncio.get_running_loop().create_future()
            try:
                end = await self._log.end_offset(STATUS, partition)
                if self._failed is None:
                    self._follow(partition, end)
            finally:
                opening.set_result(None)
                del self._opening[partition]

    async def published(self, workflow_id: str, partition: int) -> StatusRecord | None:
        """The last status of the run that the topic holds now; None without any, or when the run was deleted since.

        Reads the partition once up to its present end, and keeps of it no more than one record.
        """
        about = f"{place(self._log)}: the last published status of run {workflow_id}"
        try:
            async with asyncio.timeout(PUBLISHED_SECONDS):
                found = await self._last(workflow_id.encode(), partition)
                return None if found is None or found.value is None else await self._decoded(found)
        except DecodeError as error:
            raise Unavailable(f"{about} cannot be read: {error}") from None
        except TimeoutError:
            raise Unavailable(
                f"{about} was not found within {PUBLISHED_SECONDS:g} s: start a worker, which knows it at once"
            ) from None

    async def _last(self, key: bytes, partition: int) -> Record | None:
        """The newest record of the key; whoever derives statuses again does so in order, so it is the last one."""
        found: Record | None = None
        offset, end = 0, await self._log.end_offset(STATUS, partition)
        while offset < end and (batch := await self._log.read(STATUS, partition, offset)):
            for record in batch:
                if record.key == key:
                    found = record
            offset = batch[-1].offset + 1
        return found

    async def close(self, why: str) -> None:
        """Stop following; whoever still waits gets `Unavailable` saying why."""
        self._fail(why)
        following = list(self._following.values())
        for task in following:
            task.cancel()
        if following:
            await asyncio.wait(following)

    def _follow(self, partition: int, offset: int) -> None:
        task = asyncio.get_running_loop().create_task(
            follow(self._log, STATUS, partition, offset, self._take), name=f"client-status-p{partition}"
        )
        self._following[partition] = task
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        why = "it was closed" if error is None else f"its statuses cannot be read: {error}"
        self._fail(f"{place(self._log)}: {why}; connect again")

    def _fail(self, why: str) -> None:
        self._failed = self._failed or why
        for interest in list(self._interests.values()):
            interest.fail(self._failed)

    async def _take(self, batch: list[Record]) -> None:
        for record in batch:
            interest = self._interests.get(record.key)
            if interest is None:
                continue
            if record.value is None:
                interest.delete()
                continue
            try:
                interest.offer(await self._decoded(record))
            except DecodeError as error:
                if self._schemas is None and record.value.startswith(CONFLUENT):
                    # None of the run's statuses can be read: whoever waits for them must not wait for ever.
                    interest.fail(f"{place(self._log)}: {error}")
                    continue
                _log.warning("the status of run %r at offset %d: %s; skipped", record.key, record.offset, error)

    async def _decoded(self, record: Record) -> StatusRecord:
        assert record.value is not None
        if self._schemas is None:
            return decode_status(record.value)
        while (missing := self._schemas.missing(record.value)) is not None:
            await self._schemas.fetch(missing, f"the status of run {record.key!r}")
        return decode_status(record.value, self._schemas.schema_of)
