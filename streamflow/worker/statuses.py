"""Statuses as readers find them, after a partition came to a new owner.

An owner that was paused may wake up and publish a status that is older than what its successor has published. Readers
that saw the newer one ignore it; but the topic is compacted, which keeps the last record of each run, and whoever reads
it later would see the old one for ever. So for `late_status_seconds` the owner reads back what is on the topic, and
publishes anew what is older than its run. (Found by the simulator; nothing else that is published can be undone by a
late record: commands and timers count once, by id.)

Rules of this file:

- The partition works with or without it: what fails here is said, and nothing else.
- Of a status only its position and digests are kept: one may have a megabyte.
- A few are read, compared and published at a time, and the event loop has its turn between them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, cast

from msgspec import Struct, msgpack

from streamflow.codec.avro import decode_status
from streamflow.codec.envelope import DecodeError
from streamflow.config import Limits
from streamflow.core.effects import PublishStatus, StatusRecord
from streamflow.errors import InvalidArguments, Unavailable
from streamflow.ids import ID_BYTES_MAX
from streamflow.logs.base import STATUS, Log, Record
from streamflow.worker.ending import end

if TYPE_CHECKING:
    from streamflow.worker.processor import Processor

log_ = logging.getLogger("streamflow.worker")

RETRY_SECONDS: Final = 0.5
RETRY_SECONDS_MAX: Final = 30.0
"""Pauses before a topic that could not be read is read again, doubled each time; each is announced by a warning."""
DIGEST_BYTES: Final = 16


class Seen(Struct, frozen=True, gc=False):
    """What is kept of a status on the topic."""

    created_at: int
    run: int
    turn: int
    shown: bytes
    """The digest of what must never be old."""
    waiting_on: bytes
    """The digest of what is old now and then."""

    @property
    def position(self) -> tuple[int, int, int]:
        """Where the status stands among all of its workflow id."""
        return (self.created_at, self.run, self.turn)


async def statuses_since(log: Log, partition: int, now_ms: int, limits: Limits) -> int | None:
    """Where to begin: earlier owners, too, may have been gone before a late record of a still earlier one came.

    None where the topic cannot be read.
    """
    try:
        end_offset = await log.end_offset(STATUS, partition)
        earliest = await log.offset_at(STATUS, partition, now_ms - round(limits.late_status_seconds * 1000))
    except InvalidArguments as error:  # a cluster where workers may only write them
        _say_not_looked_for(partition, error)
        return None
    start = max(earliest, end_offset - limits.late_status_records_back_max)
    if start > earliest:
        log_.info(
            "partition %d: statuses before offset %d were published %d records before the take-over or more: no late "
            "ones are looked for there",
            *(partition, start, limits.late_status_records_back_max),
        )
    return start


def _say_not_looked_for(partition: int, why: object) -> None:
    log_.warning("partition %d: late statuses of earlier owners are not looked for: %s", partition, why)


class Statuses:
    """Keeps the newest status of each run the last one on the topic. `run` it from `offset` on, while active."""

    def __init__(self, processor: Processor, offset: int | None) -> None:
        self._processor = processor
        self._limits = processor.limits
        self._offset = offset
        self._last: dict[str, Seen | None] = {}
        """The last status on the topic of each run that may be behind; None is a tombstone."""
        self._behind: dict[str, Seen | None] = {}
        """Those that were behind at the last look. One that is so still is late; before, it may be under way."""
        self._said: set[str] = set()

    async def run(self) -> None:
        """Follow and look, until the last late record must have come. It never fails."""
        if self._offset is None or self._processor.core.term == 1:
            return  # they cannot be read, or nobody was here before
        try:
            await self._keep(self._offset)
        except InvalidArguments as error:
            _say_not_looked_for(self._processor.partition, error)
        except Exception:  # whatever it is, the partition's runs go on without it
            log_.exception(
                "partition %d: late statuses of earlier owners are not looked for any more", self._processor.partition
            )

    async def _keep(self, offset: int) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._limits.late_status_seconds  # no clock that people set
        following = loop.create_task(self._follow(offset), name=f"statuses-p{self._processor.partition}")
        try:
            while (left := until - loop.time()) > 0 and not following.done():
                await asyncio.wait((following,), timeout=min(left, self._limits.late_status_look_seconds))
                await self._look()
            if following.done():
                following.result()
        finally:
            await end(following)

    # -- what is on the topic ----------------------------------------------------------------------------------------

    async def _follow(self, offset: int) -> None:
        """Take what is on the topic from `offset` on; returns when the log is closed."""
        processor, pause = self._processor, RETRY_SECONDS
        while True:
            try:
                batches = processor.log.follow(
                    STATUS, processor.partition, offset, limit=self._limits.late_statuses_at_once_max
                )
                # Every adapter's follow is a generator; closing it here is what ends its wait in the log at once.
                async with aclosing(cast("AsyncGenerator[list[Record]]", batches)):
                    async for batch in batches:
                        for record in batch:
                            await self._take(record)
                        offset, pause = batch[-1].offset + 1, RETRY_SECONDS
                        await asyncio.sleep(0)  # a log that has all of it at hand does not wait for anything
                return
            except Unavailable as error:
                log_.warning(
                    "partition %d: statuses cannot be read from offset %d: %s; trying again in %.1f s",
                    *(processor.partition, offset, error, pause),
                )
                await asyncio.sleep(pause)
                pause = min(pause * 2, RETRY_SECONDS_MAX)

    async def _take(self, record: Record) -> None:
        if len(record.key) > ID_BYTES_MAX:
            return  # a stranger's: no run has such an id
        try:
            workflow_id = record.key.decode()
            seen = None if record.value is None else _seen(await self._decoded(record.value, record.offset))
        except (DecodeError, UnicodeDecodeError) as error:
            self._say_once(
                "a stranger's",
                f"the record at offset {record.offset} is no status of a run: {str(error)[:500]}; such are skipped",
            )
            return
        if workflow_id in self._last or len(self._last) < self._limits.late_status_runs_max:
            self._last[workflow_id] = seen
        else:
            self._say_once(
                "too many",
                f"statuses of more than {self._limits.late_status_runs_max:,} runs came within "
                f"{self._limits.late_status_look_seconds:g} s: of the others, run {workflow_id} the first, late ones "
                f"may stay until their runs go on",
            )

    async def _decoded(self, value: bytes, offset: int) -> StatusRecord:
        schemas = self._processor.schemas
        if schemas is None:
            return decode_status(value)
        while (missing := schemas.missing(value)) is not None:
            await schemas.fetch(missing, f"partition {self._processor.partition}: the status at offset {offset}")
        return decode_status(value, schemas.schema_of)

    def _say_once(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            log_.warning("partition %d: late statuses: %s", self._processor.partition, text)

    # -- what it should be -------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Publish anew what was behind at the last look and is so still."""
        looked_at, before, self._behind = list(self._last.items()), self._behind, {}
        size = self._limits.late_statuses_at_once_max
        for start in range(0, len(looked_at), size):
            sent: list[asyncio.Future[None]] = []
            for workflow_id, seen in looked_at[start : start + size]:
                if self._last[workflow_id] is not seen:
                    continue  # another one came meanwhile: the next look is at that
                current = self._processor.state.status(workflow_id)
                if not self._is_behind(seen, current):
                    del self._last[workflow_id]
                elif workflow_id not in before or before[workflow_id] is not seen:
                    self._behind[workflow_id] = seen
                else:
                    del self._last[workflow_id]  # what is published now will come by
                    log_.info("run %s: a late status of an earlier owner is replaced", workflow_id)
                    sent += self._processor.publish_status(workflow_id, PublishStatus(current))
            # Where all of them are late, no more than these are under way.
            await (asyncio.wait(sent) if sent else asyncio.sleep(0))

    def _is_behind(self, seen: Seen | None, current: StatusRecord | None) -> bool:
        if seen is None or current is None:
            return seen is not None or current is not None
        if seen.position >= (current.created_at, current.run, current.turn):
            return False
        wanted = _seen(current)
        if seen.shown != wanted.shown:
            return True
        # While steps follow each other what a run waits for changes all the time, and is not published each time.
        parked = not self._processor.state.needs_attention(current.workflow_id)
        return parked and seen.waiting_on != wanted.waiting_on


def _seen(status: StatusRecord) -> Seen:
    shown = (status.run, status.state, status.result, status.error, status.started_at, status.closed_at)
    return Seen(status.created_at, status.run, status.turn, _digest(shown), _digest(status.waiting_on))


def _digest(value: object) -> bytes:
    return blake2b(msgpack.encode(value), digest_size=DIGEST_BYTES).digest()
