"""The timer service of one partition: follows the timers topic, and hands each timer that is due to the owner.

Rules:
- **The log is the truth.** A record sets a timer, a tombstone ends it; the index is only a fold, in time order. A timer
  leaves it by its tombstone alone, which the engine writes once it took the timer in or needs it no more.
- **Never early, never lost, perhaps twice.** A timer is handed over when its time has come. Until its tombstone it is
  handed over again, some time later or by the service of the next owner; the engine ignores what is not pending, so
  twice does no harm.
- **Bounded.** The owner takes a batch when it has room, so a slow log slows the service; after an outage the overdue
  ones go out at a bounded rate. Of what waits for its tombstone a bounded number of keys is remembered, nothing of the
  others.

Index, big-endian so that byte order is time order; the key ends with its instant, so that a tombstone tells the row:

    t <fire_at ms> <key>  ->  record
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from itertools import takewhile
from typing import Final

from streamflow.errors import Unavailable
from streamflow.logs.base import TIMERS, Log, Record
from streamflow.store.base import Store
from streamflow.worker.clock import Clock

log_ = logging.getLogger("streamflow.worker.timers")

READ_RECORDS_MAX: Final = 1_000
"""Records folded in one write batch: a few milliseconds of work. Pairs of set and tombstone within it cost no write."""

CATCH_UP_RECORDS_MAX: Final = 2_000
"""Records read at once by whoever takes over: with many partitions each read begins a fetch of its own."""

RETRY_SECONDS: Final = 0.5
RETRY_SECONDS_MAX: Final = 10.0
"""Between two attempts to read a topic that is away."""

FIRE_BATCH_MAX: Final = 1_000
"""Timers handed over at once, as of one instant; the owner decides on them in several short passes."""

FIRE_PER_SECOND_MAX: Final = 5_000
"""Long-term rate, a few times what one partition can take in: an outage's backlog must not bury fresh commands."""

FIRE_BURST_MAX: Final = 5_000
"""Timers that may go out at once after a quiet second, so that many due at the same moment are all in time."""

HANDED_OVER_MAX: Final = 10_000
"""Timers that wait for their tombstone, above what the owner decides ahead of the log; then the service waits, too."""

AGAIN_MS: Final = 10_000
"""What has no tombstone after so long is handed over again: well above the time that the engine needs."""

GATHER_SECONDS: Final = 0.002
"""Where several are due at one moment, those of the other partitions are, too: all are taken in before the first pass
over some keeps the loop from the others."""

SLEEP_SECONDS_MAX: Final = 1.0
"""A wall clock that jumps forward is noticed this late at most."""

FIRST: Final = b"t"
NEVER: Final = (1 << 63) - 1


class TimerService:
    """Fires the timers of one partition. `run` it until cancelled; the store belongs to the caller.

    `fire(records, at)` takes in the records of timers that were found due at `at` (ms), when there is room; it is the
    owner's. `fire_at_of(key)` says when the timer of that key is due (ms), and `check(key, value)` that a record is one
    of a timer: both raise `ValueError` where it is not, and the record is left out with a warning. `on_fired` is told
    the lateness in seconds of each that was handed over for the first time.
    """

    def __init__(
        self,
        log: Log,
        store: Store,
        partition: int,
        *,
        clock: Clock,
        fire_at_of: Callable[[bytes], int],
        check: Callable[[bytes, bytes], None],
        fire: Callable[[Sequence[bytes], int], Awaitable[None]],
        on_fired: Callable[[float], None] | None = None,
        fire_batch_max: int = FIRE_BATCH_MAX,
        fire_per_second_max: int = FIRE_PER_SECOND_MAX,
        fire_burst_max: int = FIRE_BURST_MAX,
        handed_over_max: int = HANDED_OVER_MAX,
    ) -> None:
        assert 0 < fire_batch_max <= min(fire_burst_max, handed_over_max), (fire_batch_max, fire_burst_max)
        self.partition = partition
        self._log = log
        self._store = store
        self._clock = clock
        self._fire_at_of = fire_at_of
        self._check = check
        self._fire = fire
        self._on_fired = on_fired
        self._batch_max = fire_batch_max
        self._rate = fire_per_second_max / 1000
        self._burst_max = fire_burst_max
        self._handed_over_max = handed_over_max
        self._allowed: float = fire_burst_max
        self._allowed_at_ms = clock.now_ms()
        # No timer that is still to be handed over is before this row. Where timers were dropped RocksDB keeps
        # tombstones for a while, and each look for the first timer would walk over all of them.
        self._from = FIRST
        self._handed_over: dict[bytes, int] = {}  # and when (ms), oldest first
        self._before: set[bytes] = set()  # handed over earlier, and now again
        self._sleeping_until_ms = NEVER
        self._earlier = asyncio.Event()

    async def run(self) -> None:
        """Follow, index and fire until cancelled. Raises what reading the log raises; start again from the store.

        A topic that is away at first is waited for: the owner's other work does not need it.
        """
        await self._catch_up()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow(), name=f"timers-follow-p{self.partition}")
                tasks.create_task(self._fire_all(), name=f"timers-fire-p{self.partition}")
        except BaseExceptionGroup as group:
            # One of two tasks failed and the other was cancelled: the group says no more than its first member.
            raise group.exceptions[0] from None

    async def _catch_up(self) -> None:
        """Index what the topic holds now. Before that timers look due whose tombstone lies further on."""
        pause, away = RETRY_SECONDS, False
        while True:
            try:
                if away:
                    await self._log.verify()  # what was deleted does not come back
                await self._index_all()
                return
            except Unavailable as error:
                log_.warning(
                    "partition %d: timers cannot be read, and none fires: %s; trying again in %.1f s",
                    *(self.partition, error, pause),
                )
            away = True
            await asyncio.sleep(pause)
            pause = min(pause * 2, RETRY_SECONDS_MAX)

    async def _index_all(self) -> None:
        end = await self._log.end_offset(TIMERS, self.partition)
        while (offset := self._store.applied_offset) < end:
            records = await self._log.read(TIMERS, self.partition, offset, limit=CATCH_UP_RECORDS_MAX)
            if not records:
                return  # what lies there was compacted away
            for begin in range(0, len(records), READ_RECORDS_MAX):
                self._apply(records[begin : begin + READ_RECORDS_MAX])
                await asyncio.sleep(0)

    async def _follow(self) -> None:
        batches = self._log.follow(TIMERS, self.partition, self._store.applied_offset, limit=READ_RECORDS_MAX)
        async for records in batches:
            self._apply(records)
        raise Unavailable(f"partition {self.partition}: the log was closed while its timers were followed")

    def _apply(self, records: Sequence[Record]) -> None:
        """Fold a batch into the index, one write for all of it."""
        puts: dict[bytes, bytes] = {}
        deletes: list[bytes] = []
        was_full = self._is_full
        # The last record of a key decides: a timeout that was set and dropped within the batch leaves no trace.
        for key, record in {record.key: record for record in records}.items():
            value = record.value
            try:
                row = self._row(key)
                if value is not None:
                    self._check(key, value)
            except ValueError as error:
                log_.warning(
                    "partition %d, timers at offset %d: left out, key %r: expected a timer of this engine, %s",
                    self.partition,
                    record.offset,
                    key[:80],
                    error,
                )
                continue
            if value is not None:
                puts[row] = value
                continue
            self._handed_over.pop(key, None)
            if self._store.get(row) is not None:
                deletes.append(row)
        self._store.write(puts, deletes, applied_offset=records[-1].offset + 1)
        if puts:
            first = min(puts)
            self._from = min(self._from, first)
            if _instant(first) < self._sleeping_until_ms:
                self._earlier.set()
        if was_full and not self._is_full:
            self._earlier.set()

    async def _fire_all(self) -> None:
        while True:
            now_ms = self._clock.now_ms()
            due, next_ms = self._look(now_ms)
            if not due:
                await self._sleep_until(next_ms, now_ms)
                continue
            await self._pace(len(due))
            now_ms = self._clock.now_ms()
            if len(due) > 1:
                await self._clock.wait(asyncio.Event(), GATHER_SECONDS)
            self._handed_over.update(dict.fromkeys(due, now_ms))
            await self._fire(list(due.values()), now_ms)
            self._fired(due)

    def _look(self, now_ms: int) -> tuple[dict[bytes, bytes], int]:
        """The timers that are due now, by key, at most a batch, and when to look again where there are none."""
        self._look_again_for_stuck(now_ms)
        due: dict[bytes, bytes] = {}
        again_ms = next((at + AGAIN_MS for at in self._handed_over.values()), NEVER)
        while not self._is_full:
            rows = self._store.scan(b"t", start=self._from, limit=self._batch_max)
            count = 0
            for row, value in rows:
                count += 1
                if _instant(row) > now_ms:
                    self._from = row
                    return due, min(_instant(row), again_ms)
                if (key := row[9:]) not in self._handed_over:
                    due[key] = value
                self._from = row + b"\0"
            if due or count < self._batch_max:
                break
        return due, again_ms

    def _look_again_for_stuck(self, now_ms: int) -> None:
        """Find again what was handed over long ago, and has no tombstone yet."""
        stuck = set(takewhile(lambda key: self._handed_over[key] + AGAIN_MS <= now_ms, self._handed_over))
        for key in stuck:
            del self._handed_over[key]
        if stuck:
            self._before, self._from = stuck, FIRST

    @property
    def _is_full(self) -> bool:
        return len(self._handed_over) + self._batch_max > self._handed_over_max

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

    def _fired(self, due: dict[bytes, bytes]) -> None:
        now_ms = self._clock.now_ms()
        for key in due if self._on_fired is not None else ():
            if key not in self._before:
                self._on_fired((now_ms - self._fire_at(key)) / 1000)  # type: ignore[misc]

    def _row(self, key: bytes) -> bytes:
        return b"t" + self._fire_at(key).to_bytes(8, "big") + key

    def _fire_at(self, key: bytes) -> int:
        # Before 1970 is overdue like any other past, and would not sort.
        return min(max(0, self._fire_at_of(key)), NEVER)


def _instant(row: bytes) -> int:
    return int.from_bytes(row[1:9], "big")
