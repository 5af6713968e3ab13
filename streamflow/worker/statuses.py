"""Statuses as readers find them, after a partition came to a new owner.

An owner that was paused may wake up and publish a status that is older than what its successor has published. Readers
that saw the newer one ignore it; but the topic is compacted, which keeps the last record of each run, and whoever reads
it later would see the old one for ever. So for `LATE_SECONDS` the owner reads back what is on the topic, and publishes
anew what is older than its run. (Found by the simulator; nothing else that is published can be undone by a late record:
commands and timers count once, by id.)
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from streamflow.codec.avro import decode_status
from streamflow.codec.envelope import DecodeError
from streamflow.core.effects import PublishStatus, StatusRecord
from streamflow.errors import InvalidArguments, StreamflowError, Unavailable
from streamflow.logs.base import STATUS, Log, Record
from streamflow.worker.ending import end

if TYPE_CHECKING:
    from streamflow.worker.processor import Processor

log_ = logging.getLogger("streamflow.worker")

LATE_SECONDS: Final = 900.0
"""How long after a take-over records of earlier owners may still come: a producer gives up after two minutes, a broker
drops a connection that is idle for ten."""
LOOK_SECONDS: Final = 5.0
"""How often what was read is compared. A status that is behind twice in a row is late; once, it is under way."""
BEHIND_MAX: Final = 100_000
"""Runs whose last status on the topic is looked at again; of more, the others are looked at when one comes again."""


LOOKED_BACK_MAX: Final = 20_000
"""Records looked at that were there before the take-over: a log without times of its records could mean all of them."""


async def statuses_since(log: Log, partition: int, now_ms: int) -> int | None:
    """Where to begin: earlier owners, too, may have been gone before a late record of a still earlier one came.

    None where the topic cannot be read.
    """
    try:
        end = await log.end_offset(STATUS, partition)
        earliest = await log.offset_at(STATUS, partition, now_ms - round(LATE_SECONDS * 1000))
    except InvalidArguments as error:  # a cluster where workers may only write them
        _say_not_looked_for(partition, error)
        return None
    return max(earliest, end - LOOKED_BACK_MAX)


def _say_not_looked_for(partition: int, error: StreamflowError) -> None:
    log_.warning("partition %d: late statuses of earlier owners are not looked for: %s", partition, error)


class Statuses:
    """Keeps the newest status of each run the last one on the topic. `run` it from `offset` on, while active."""

    def __init__(self, processor: Processor, offset: int | None) -> None:
        self._processor = processor
        self._offset = offset
        self._last: dict[str, StatusRecord | None] = {}
        """The last status on the topic of each run that may be behind; None is a tombstone."""
        self._behind: set[str] = set()

    async def run(self) -> None:
        """Follow and look, until the last late record must have come."""
        if self._offset is None or self._processor.core.term == 1:
            return  # they cannot be read, or nobody was here before
        following = asyncio.get_running_loop().create_task(self._follow(self._offset), name="statuses-follow")
        clock = self._processor.clock
        until = clock.now_ms() + round(LATE_SECONDS * 1000)
        try:
            while clock.now_ms() < until and not following.done():
                await asyncio.wait((following,), timeout=LOOK_SECONDS)
                self._look()
            if following.done():
                following.result()
        except (Unavailable, InvalidArguments) as error:
            _say_not_looked_for(self._processor.partition, error)
        finally:
            await end(following)

    async def _follow(self, offset: int) -> None:
        processor = self._processor
        async for records in processor.log.follow(STATUS, processor.partition, offset):
            for record in records:
                self._take(record)

    def _take(self, record: Record) -> None:
        try:
            workflow_id = record.key.decode()
            found = None if record.value is None else decode_status(record.value, self._processor.schema_of)
        except (DecodeError, UnicodeDecodeError):
            return  # a stranger's; it is no status of a run of ours
        if workflow_id in self._last or len(self._last) < BEHIND_MAX:
            self._last[workflow_id] = found

    def _look(self) -> None:
        """Publish anew what was behind at the last look and is so still."""
        behind: set[str] = set()
        for workflow_id, found in list(self._last.items()):
            current = self._processor.state.status(workflow_id)
            if not self._is_behind(found, current):
                del self._last[workflow_id]
            elif workflow_id not in self._behind:
                behind.add(workflow_id)
            else:
                del self._last[workflow_id]  # what is published now will come by
                log_.info("run %s: a late status of an earlier owner is replaced", workflow_id)
                self._processor.publish_status(workflow_id, PublishStatus(current))
        self._behind = behind

    def _is_behind(self, found: StatusRecord | None, current: StatusRecord | None) -> bool:
        if found is None or current is None:
            return found is not current
        if (found.created_at, found.run, found.turn) >= (current.created_at, current.run, current.turn):
            return False
        if _shown(found) != _shown(current):
            return True
        # While steps follow each other what a run waits for changes all the time, and is not published each time.
        parked = not self._processor.state.needs_attention(current.workflow_id)
        return parked and found.waiting_on != current.waiting_on


def _shown(status: StatusRecord) -> object:
    return (status.run, status.state, status.result, status.error, status.started_at, status.closed_at)
