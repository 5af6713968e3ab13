"""The timer service of one partition: follows the timers topic, and publishes a command for each timer that is due.

Rules:
- **The log is the truth.** A record sets a timer, a tombstone ends it; the index is only a fold, in time order. A timer
  leaves it by its tombstone alone, which the engine writes once it took the timer in or needs it no more.
- **Never early, never lost, perhaps twice.** A timer is sent when its time has come; it counts as sent when the log
  has acknowledged the command. Until its tombstone it is sent again, ever more rarely; the engine ignores what is not
  pending, so twice does no harm.
- **Bounded.** One batch is under way at a time, so a slow log slows the service; after an outage the overdue ones go
  out at a bounded rate. Nothing is kept in memory per timer.

Index, big-endian so that byte order is time order:

    t <next ms> <key>  ->  command               `next`: when to send it (again); the command is made when it is set,
    k <key>            ->  <next ms> <fire_at>   since then there is time: thousands may come due at one moment
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from streamflow.errors import Unavailable
from streamflow.logs.base import COMMANDS, TIMERS, Log, Outgoing, Record
from streamflow.store.base import Store
from streamflow.worker.clock import Clock

log_ = logging.getLogger("streamflow.worker.timers")

READ_RECORDS_MAX: Final = 1_000
"""Records folded in one write batch: a few milliseconds of work. Pairs of set and tombstone within it cost no write."""

FIRE_BATCH_MAX: Final = 1_000
"""Timers in one publish: it is acknowledged before the next is made, and its bookkeeping takes about 10 ms."""

FIRE_PER_SECOND_MAX: Final = 5_000
"""Long-term rate, a few times what one partition can take in: an outage's backlog must not bury fresh commands."""

FIRE_BURST_MAX: Final = 5_000
"""Timers that may go out at once after a quiet second, so that many due at the same moment are all in time."""

RESEND_MS: Final = 10_000
RESEND_MS_MAX: Final = 3_600_000
"""A timer without a tombstone is sent again after as long as it is overdue, within these limits. The lower one is well
above the time that the engine needs; the upper one keeps a timer whose tombstone the log has lost from being a load."""

SLEEP_SECONDS_MAX: Final = 1.0
"""A wall clock that jumps forward is noticed this late at most."""

BACKOFF_SECONDS: Final = 0.1
BACKOFF_SECONDS_MAX: Final = 5.0
"""Pause after a publish that the log could not take, doubled up to the maximum."""

TIMES: Final = struct.Struct(">QQ")
FIRST: Final = 0
NEVER: Final = (1 << 63) - 1


class _Due(NamedTuple):
    key: bytes
    next_ms: int
    command: bytes


class TimerService:
    """Fires the timers of one partition. `run` it until cancelled; the store belongs to the caller.

    `fire_at_of(value)` says when (ms), `fire_command(key, value)` makes the record to publish then, a command of this
    partition (it is called when the timer is set), and `on_fired` is told the lateness in seconds of each timer that
    was sent for the first time.
    """

    def __init__(
        self,
        log: Log,
        store: Store,
        partition: int,
        *,
        clock: Clock,
        fire_at_of: Callable[[bytes], int],
        fire_command: Callable[[bytes, bytes], Outgoing],
        on_fired: Callable[[float], None] | None = None,
        fire_batch_max: int = FIRE_BATCH_MAX,
        fire_per_second_max: int = FIRE_PER_SECOND_MAX,
        fire_burst_max: int = FIRE_BURST_MAX,
    ) -> None:
        assert 0 < fire_batch_max <= fire_burst_max, (fire_batch_max, fire_burst_max)
        self.partition = partition
        self._log = log
        self._store = store
        self._clock = clock
        self._fire_at_of = fire_at_of
        self._fire_command = fire_command
        self._on_fired = on_fired
        self._batch_max = fire_batch_max
        self._rate = fire_per_second_max / 1000
        self._burst_max = fire_burst_max
        self._allowed: float = fire_burst_max
        self._allowed_at_ms = clock.now_ms()
        # No timer in the index is before this. Where timers were sent or dropped RocksDB keeps tombstones for a
        # while, and each look for the first timer would walk over all of them.
        self._from_ms = FIRST
        self._sleeping_until_ms = NEVER
        self._earlier = asyncio.Event()

    async def run(self) -> None:
        """Follow, index and fire until cancelled. Raises what reading the log raises; start again from the store."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow(), name=f"timers-follow-p{self.partition}")
                tasks.create_task(self._fire(), name=f"timers-fire-p{self.partition}")
        except BaseExceptionGroup as group:
            # One of two tasks failed and the other was cancelled: the group says no more than its first member.
            raise group.exceptions[0] from None

    async def _follow(self) -> None:
        batches = self._log.follow(TIMERS, self.partition, self._store.applied_offset, limit=READ_RECORDS_MAX)
        async for records in batches:
            self._apply(records)
        raise Unavailable(f"partition {self.partition}: the log was closed while its timers were followed")

    def _apply(self, records: Sequence[Record]) -> None:
        """Fold a batch into the index, one write for all of it."""
        puts: dict[bytes, bytes] = {}
        deletes: list[bytes] = []
        earliest_ms = NEVER
        # The last record of a key decides: a timeout that was set and dropped within the batch leaves no trace.
        for key, value in {record.key: record.value for record in records}.items():
            indexed = self._store.get(b"k" + key)
            next_ms, fire_at = TIMES.unpack(indexed) if indexed is not None else (NEVER, NEVER)
            if value is not None:
                command = self._command(key, value)
                if (wanted := self._fire_at(value)) == fire_at:  # the same again: sent stays sent
                    puts[_row(next_ms, key)] = command
                    continue
                puts[_row(wanted, key)] = command
                puts[b"k" + key] = TIMES.pack(wanted, wanted)
                earliest_ms = min(earliest_ms, wanted)
                if next_ms == wanted:  # that row is the one just put
                    continue
            elif indexed is not None:
                deletes.append(b"k" + key)
            if indexed is not None:
                deletes.append(_row(next_ms, key))
        self._store.write(puts, deletes, applied_offset=records[-1].offset + 1)
        self._from_ms = min(self._from_ms, earliest_ms)
        if earliest_ms < self._sleeping_until_ms:
            self._earlier.set()

    async def _fire(self) -> None:
        backoff = BACKOFF_SECONDS
        while True:
            now_ms = self._clock.now_ms()
            due, next_ms = self._look(now_ms)
            if not due:
                await self._sleep_until(next_ms, now_ms)
                continue
            await self._pace(len(due))
            try:
                await self._log.publish([self._outgoing(timer.command) for timer in due])
            except Unavailable as error:
                log_.warning("partition %d: timers wait: %s; trying again in %.1f s", self.partition, error, backoff)
                await self._clock.wait(asyncio.Event(), backoff)
                backoff = min(2 * backoff, BACKOFF_SECONDS_MAX)
                continue
            backoff = BACKOFF_SECONDS
            # First let those who wait for the commands take them: book-keeping makes nobody late but the next batch.
            await asyncio.sleep(0)
            self._sent(due)

    def _look(self, now_ms: int) -> tuple[list[_Due], int]:
        """The timers that are due now, at most a batch, and when the first of the others is."""
        due: list[_Due] = []
        for row, command in self._store.scan(b"t", start=_row(self._from_ms, b""), limit=self._batch_max + 1):
            next_ms = int.from_bytes(row[1:9], "big")
            if not due:
                self._from_ms = next_ms
            if next_ms > now_ms or len(due) == self._batch_max:
                return due, next_ms
            due.append(_Due(row[9:], next_ms, command))
        return due, NEVER

    async def _sleep_until(self, next_ms: int, now_ms: int) -> None:
        self._sleeping_until_ms = next_ms
        self._earlier.clear()
        seconds = None if next_ms == NEVER else min((next_ms - now_ms) / 1000, SLEEP_SECONDS_MAX)
        await self._clock.wait(self._earlier, seconds)

    async def _pace(self, wanted: int) -> None:
        """Wait until `wanted` more may be sent."""
        while True:
            now_ms = self._clock.now_ms()
            earned = (now_ms - self._allowed_at_ms) * self._rate
            self._allowed, self._allowed_at_ms = min(self._allowed + earned, self._burst_max), now_ms
            if self._allowed >= wanted:
                self._allowed -= wanted
                return
            seconds = (wanted - self._allowed) / self._rate / 1000
            await self._clock.wait(asyncio.Event(), min(seconds, SLEEP_SECONDS_MAX))

    def _sent(self, due: Sequence[_Due]) -> None:
        """Move what was sent to the time at which it is sent again, unless its tombstone came meanwhile."""
        now_ms = self._clock.now_ms()
        puts: dict[bytes, bytes] = {}
        deletes: list[bytes] = []
        for timer in due:
            indexed = self._store.get(b"k" + timer.key)
            next_ms, fire_at = TIMES.unpack(indexed) if indexed is not None else (NEVER, NEVER)
            if next_ms != timer.next_ms:
                continue
            if self._on_fired is not None and next_ms == fire_at:
                self._on_fired((now_ms - fire_at) / 1000)
            again_ms = now_ms + min(max(now_ms - fire_at, RESEND_MS), RESEND_MS_MAX)
            deletes.append(_row(timer.next_ms, timer.key))
            puts[_row(again_ms, timer.key)] = timer.command
            puts[b"k" + timer.key] = TIMES.pack(again_ms, fire_at)
        self._store.write(puts, deletes, applied_offset=self._store.applied_offset)

    def _command(self, key: bytes, value: bytes) -> bytes:
        made = self._fire_command(key, value)
        assert made.partition == self.partition and made.value is not None, made
        return len(made.key).to_bytes(2, "big") + made.key + made.value

    def _outgoing(self, command: bytes) -> Outgoing:
        end = 2 + int.from_bytes(command[:2], "big")
        return Outgoing(COMMANDS, self.partition, command[2:end], command[end:])

    def _fire_at(self, value: bytes) -> int:
        # Before 1970 is overdue like any other past, and would not sort.
        return max(0, self._fire_at_of(value))


def _row(next_ms: int, key: bytes) -> bytes:
    return b"t" + next_ms.to_bytes(8, "big") + key
