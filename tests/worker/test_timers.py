"""The timer service on a memory log, with a clock that is moved by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from streamflow.errors import CorruptLog, Unavailable
from streamflow.logs import memory
from streamflow.logs.base import TIMERS, Log, Outgoing, Record
from streamflow.logs.memory import MemoryLog
from streamflow.logs.open import open_log
from streamflow.store.base import Store
from streamflow.store.memory import MemoryStore
from streamflow.store.rocks import open_rocks
from streamflow.worker import timers
from streamflow.worker.clock import Clock
from streamflow.worker.timers import AGAIN_MS, GATHER_SECONDS, TimerService

GATHER_MS = round(GATHER_SECONDS * 1000)


class ManualClock(Clock):
    """Time passes only by `advance`; waits end when it has, or when their event is set."""

    def __init__(self, now_ms: int = 1_000_000) -> None:
        super().__init__(lambda: 0, lambda: 0)
        self.at_ms = now_ms
        self.waits: list[tuple[float, asyncio.Event]] = []

    def now_ms(self) -> int:
        return self.at_ms

    async def wait(self, event: asyncio.Event, seconds: float | None) -> None:
        until_ms = float("inf") if seconds is None else self.at_ms + seconds * 1000
        self.waits.append((until_ms, event))
        try:
            await event.wait()
        finally:
            self.waits.remove((until_ms, event))

    async def advance(self, ms: int) -> None:
        """Let `ms` pass, waking each sleeper at its time."""
        end = self.at_ms + ms
        await settle()
        while True:
            until, event = min(self.waits, key=lambda wait: wait[0], default=(float("inf"), None))
            if event is None or until > end:
                break
            self.at_ms = max(self.at_ms, -int(-until // 1))
            event.set()
            await settle()
        self.at_ms = end
        await settle()


async def settle() -> None:
    for _ in range(60):
        await asyncio.sleep(0)


class World:
    """A log, a store, a clock, an owner, and a timer service that can be killed and started again."""

    def __init__(self, log: Log, store: Store) -> None:
        self.log, self.store, self.clock = log, store, ManualClock()
        self.late: list[float] = []
        self.fired: list[str] = []
        """The timers that the owner took in."""
        self.batches: list[int] = []
        self.instants: list[int] = []
        """When the batches were found due."""
        self.has_room = asyncio.Event()
        self.has_room.set()
        self._task: asyncio.Task[None] | None = None

    def start(self, **limits: int) -> None:
        options: dict[str, Any] = {"on_fired": self.late.append, **limits}
        service = TimerService(
            self.log, self.store, 0, clock=self.clock, fire_at_of=fire_at_of, check=check, fire=self.take, **options
        )
        self._task = asyncio.create_task(service.run())

    async def take(self, timers: Sequence[bytes], at: int) -> None:
        await self.has_room.wait()
        self.fired += [value.decode() for value in timers]
        self.batches.append(len(timers))
        self.instants.append(at)

    async def ended(self) -> None:
        """Wait for the service, which raises why it ended."""
        assert self._task is not None
        task, self._task = self._task, None
        await task

    async def kill(self) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def write(self, *timers: tuple[str, int]) -> None:
        """Set timers: each has a name and an instant."""
        await self.publish([Outgoing(TIMERS, 0, key(name, at), name.encode()) for name, at in timers])

    async def drop(self, *timers: tuple[str, int]) -> None:
        """Their tombstones."""
        await self.publish([Outgoing(TIMERS, 0, key(name, at), None) for name, at in timers])

    async def publish(self, records: Sequence[Outgoing]) -> None:
        await self.log.publish(records)
        await settle()

    def rows(self) -> int:
        return sum(1 for _ in self.store.scan(b""))


def key(name: str, at: int) -> bytes:
    return b"%s.%d" % (name.encode(), at)


def fire_at_of(key: bytes) -> int:
    return int(key.rpartition(b".")[2])


def check(key: bytes, value: bytes) -> None:
    if not key.startswith(value):
        raise ValueError("found something else")


@asynccontextmanager
async def world(store: Store | None = None) -> AsyncIterator[World]:
    log = await open_log("memory://timers", app="t", partitions=1)
    made = World(log, store or MemoryStore())
    try:
        yield made
    finally:
        if made._task is not None:
            await made.kill()
        made.store.close()
        await log.close()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


def test_what_is_over_is_not_fired_again_by_whoever_reads_the_topic_from_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half an index shows timers as due whose tombstones lie further on."""
    follow = MemoryLog.follow

    async def in_pieces(self: MemoryLog, *place: Any, **limit: Any) -> AsyncIterator[list[Record]]:
        async for batch in follow(self, *place, **limit):
            yield batch
            await settle()

    monkeypatch.setattr(timers, "READ_RECORDS_MAX", 2)
    monkeypatch.setattr(memory, "COMPACTED", frozenset())  # a broker compacts when it likes
    monkeypatch.setattr(MemoryLog, "follow", in_pieces)

    async def main() -> None:
        async with world() as w:
            over = [(f"over-{number}", 0) for number in range(7)]
            await w.write(*over, ("due", 1))
            await w.drop(*over)
            w.start()
            while "due" not in w.fired:
                await w.clock.advance(1)
            assert w.fired == ["due"]
            assert w.rows() == 1

    run(main)


def test_a_topic_that_is_away_at_first_is_read_once_it_is_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(timers, "RETRY_SECONDS", 0)
    end_offset, answers = MemoryLog.end_offset, iter([False, False])

    async def end_offset_or_not(self: MemoryLog, topic: str, partition: int) -> int:
        if not next(answers, True):
            raise Unavailable("no leader")
        return await end_offset(self, topic, partition)

    monkeypatch.setattr(MemoryLog, "end_offset", end_offset_or_not)

    async def main() -> None:
        async with world() as w:
            await w.write(("due", 1))
            w.start()
            await settle()
            assert w.fired == ["due"]

    run(main)
    said = [record.getMessage() for record in caplog.records if "none fires: no leader" in record.getMessage()]
    assert len(said) == 2


def test_a_topic_that_was_deleted_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timers, "RETRY_SECONDS", 0)

    async def end_offset(self: MemoryLog, topic: str, partition: int) -> int:
        raise Unavailable("topic t.timers is not there (any more)")

    async def verify(self: MemoryLog) -> None:
        raise CorruptLog("topic t.timers was deleted")

    monkeypatch.setattr(MemoryLog, "end_offset", end_offset)
    monkeypatch.setattr(MemoryLog, "verify", verify)

    async def main() -> None:
        async with world() as w:
            w.start()
            with pytest.raises(CorruptLog, match="was deleted"):
                await asyncio.wait_for(w.ended(), 10)

    run(main)


def test_fires_when_due_and_not_before() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            now = w.clock.at_ms
            await w.write(("b", now + 2000), ("a", now + 1000), ("past", now - 5))
            assert w.fired == ["past"]
            await w.clock.advance(999)
            assert w.fired == ["past"]
            await w.clock.advance(1)
            assert w.fired == ["past", "a"]
            await w.clock.advance(1000)
            assert w.fired == ["past", "a", "b"]
            assert w.late == [0.005, 0, 0]
            assert w.instants == [now, now + 1000, now + 2000]

    run(main)


def test_an_earlier_timer_ends_the_sleep() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            now = w.clock.at_ms
            await w.write(("late", now + 500))
            await w.write(("early", now + 100))
            await w.clock.advance(100)
            assert w.fired == ["early"]

    run(main)


def test_one_that_is_set_behind_those_that_were_taken_is_found() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            now = w.clock.at_ms
            await w.write(("a", now - 10), ("b", now - 5))
            await w.clock.advance(GATHER_MS)
            await w.write(("earlier", now - 100))
            assert w.fired == ["a", "b", "earlier"], "and those that were taken are not taken again"

    run(main)


def test_dropped_timers_do_not_fire() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            now = w.clock.at_ms
            await w.write(("dropped", now + 100), ("kept", now + 100))
            await w.drop(("dropped", now + 100), ("never set", now + 7))
            await w.clock.advance(1000)
            assert w.fired == ["kept"]
            await w.drop(("kept", now + 100))
            assert w.rows() == 0

    run(main)


def test_set_and_dropped_within_a_batch_touches_nothing() -> None:
    async def main() -> None:
        async with world() as w:
            seen: list[int] = []
            write = w.store.write

            def spy(puts: dict[bytes, bytes], deletes: Sequence[bytes] = (), *, applied_offset: int) -> None:
                seen.append(len(puts) + len(deletes))
                write(puts, deletes, applied_offset=applied_offset)

            w.store.write = spy  # type: ignore[method-assign, assignment]
            records = []
            for n in range(100):
                records += [Outgoing(TIMERS, 0, b"%d.9999999" % n, b""), Outgoing(TIMERS, 0, b"%d.9999999" % n, None)]
            await w.log.publish(records)
            w.start()
            await settle()
            assert w.store.applied_offset == 200
            assert sum(seen) == 0

    run(main)


def test_set_again_and_dropped_within_a_batch_is_gone() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            at = w.clock.at_ms + 100
            await w.write(("a", at))
            await w.publish([Outgoing(TIMERS, 0, key("a", at), b"a"), Outgoing(TIMERS, 0, key("a", at), None)])
            await w.clock.advance(200)
            assert w.fired == [] and w.rows() == 0

    run(main)


def test_handed_over_again_until_the_tombstone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timers, "SLEEP_SECONDS_MAX", 1e9)  # a day in seconds would be many steps

    async def main() -> None:
        async with world() as w:
            w.start()
            at = w.clock.at_ms
            await w.write(("a", at), ("b", at))
            await w.clock.advance(GATHER_MS)
            assert w.fired == ["a", "b"]
            await w.drop(("b", at))
            await w.clock.advance(AGAIN_MS - GATHER_MS - 1)
            assert w.fired == ["a", "b"]
            await w.clock.advance(1)
            assert w.fired == ["a", "b", "a"]
            await w.clock.advance(AGAIN_MS)
            assert w.fired == ["a", "b", "a", "a"]
            assert w.late == [GATHER_MS / 1000] * 2, "only the first time is lateness"
            await w.drop(("a", at))
            await w.clock.advance(3 * AGAIN_MS)
            assert w.fired == ["a", "b", "a", "a"]
            assert w.rows() == 0

    run(main)


def test_a_record_repeated_after_it_was_taken_is_not_taken_again() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            at = w.clock.at_ms
            await w.write(("a", at))
            await w.write(("a", at))
            await w.clock.advance(1)
            assert w.fired == ["a"]
            await w.drop(("a", at))
            assert w.rows() == 0

    run(main)


def test_an_owner_without_room_is_waited_for() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            w.has_room.clear()
            at = w.clock.at_ms
            await w.write(("a", at))
            await w.clock.advance(700)
            assert w.fired == [] and w.late == []
            w.has_room.set()
            await settle()
            assert w.fired == ["a"] and w.late == [0.7]

    run(main)


def test_a_tombstone_while_the_owner_has_no_room_takes_the_row() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            w.has_room.clear()
            at = w.clock.at_ms
            await w.write(("a", at))
            await w.drop(("a", at))
            w.has_room.set()
            await w.clock.advance(2 * AGAIN_MS)
            assert w.fired == ["a"] and w.rows() == 0

    run(main)


def test_restart_goes_on_from_the_store(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_rocks(tmp_path / "timers", identity="t", log_start=0, log_end=1 << 40)
        async with world(store) as w:
            w.start()
            now = w.clock.at_ms
            await w.write(("a", now + 100), ("b", now + 200), ("c", now + 60_000))
            await w.clock.advance(150)
            await w.drop(("a", now + 100))
            await w.kill()
            w.store.close()
            w.store = open_rocks(tmp_path / "timers", identity="t", log_start=0, log_end=1 << 40)
            assert w.store.applied_offset == 4
            await w.write(("d", now + 300))
            await w.clock.advance(1000)
            w.start()
            await w.clock.advance(GATHER_MS)
            assert w.fired == ["a", "b", "d"]
            await w.clock.advance(60_000)
            assert "c" in w.fired

    run(main)


def test_what_the_owner_took_in_vain_is_handed_to_the_next_at_once() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            await w.write(("a", w.clock.at_ms))
            assert w.fired == ["a"]
            await w.kill()  # the owner with it, before its turn was durable
            w.start()
            await settle()
            assert w.fired == ["a", "a"]

    run(main)


def test_backlog_goes_out_in_batches_at_a_bounded_rate() -> None:
    async def main() -> None:
        async with world() as w:
            now = w.clock.at_ms
            await w.write(*((f"{n:05d}", now - 100_000 + n) for n in range(3500)))
            w.start(fire_batch_max=100, fire_burst_max=500, fire_per_second_max=1000)
            await w.clock.advance(5 * GATHER_MS)
            for _ in range(20):
                await settle()
            assert len(w.fired) == 500
            await w.clock.advance(1000)
            assert 1400 <= len(w.fired) <= 1500
            await w.clock.advance(2100)
            assert w.fired == sorted(w.fired)
            assert len(w.fired) == 3500
            assert max(w.batches) == 100

    run(main)


def test_so_many_at_most_wait_for_their_tombstones() -> None:
    async def main() -> None:
        async with world() as w:
            now = w.clock.at_ms
            due = [(f"{n:05d}", now - 1000 + n) for n in range(350)]
            await w.write(*due)
            w.start(fire_batch_max=100, handed_over_max=250)
            await w.clock.advance(10 * GATHER_MS)
            assert len(w.fired) == 200
            await w.drop(*due[:49])
            await w.clock.advance(10 * GATHER_MS)
            assert len(w.fired) == 200, "a batch would be too many"
            await w.drop(*due[49:60])
            await w.clock.advance(10 * GATHER_MS)
            assert len(w.fired) == 300
            await w.drop(*due[60:])
            await w.clock.advance(10 * GATHER_MS)
            assert len(w.fired) == 300 and w.rows() == 0

    run(main)


def test_many_due_at_once_take_few_batches() -> None:
    async def main() -> None:
        async with world() as w:
            at = w.clock.at_ms + 1000
            await w.write(*((f"{n:05d}", at) for n in range(2000)))
            w.start()
            await w.clock.advance(999)
            assert w.fired == []
            await w.clock.advance(1 + 4 * GATHER_MS)
            assert len(w.fired) == len(set(w.fired)) == 2000
            assert w.batches == [1_000] * 2
            assert max(w.late) == 2 * GATHER_MS / 1000
            assert w.instants == [at + n * GATHER_MS for n in range(2)], "the instant is that of the look"

    run(main)


def test_what_is_no_timer_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            at = w.clock.at_ms
            await w.publish([
                Outgoing(TIMERS, 0, b"junk", b"junk"),
                Outgoing(TIMERS, 0, b"junk", None),
                Outgoing(TIMERS, 0, key("a", at), b"of another"),
                Outgoing(TIMERS, 0, key("b", at), b"b"),
            ])  # fmt: skip
            assert w.fired == ["b"] and w.store.applied_offset == 4
            await w.drop(("a", at), ("b", at))
            assert w.rows() == 0

    run(main)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "partition 0, timers at offset 1: left out, key b'junk'" in said[0]
    assert "found something else" in said[1]


def test_an_instant_beyond_the_end_of_time_is_no_error() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            await w.write(("late", 1 << 80), ("early", -5))
            assert w.fired == ["early"] and w.rows() == 2

    run(main)


def test_jump_forward_is_noticed_within_a_second() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            await w.write(("a", w.clock.at_ms + 3_600_000))
            w.clock.at_ms += 3_600_000
            assert w.fired == []
            assert min(until for until, _ in w.clock.waits) <= 1_000_000 + timers.SLEEP_SECONDS_MAX * 1000
            await w.clock.advance(0)
            assert w.fired == ["a"]

    run(main)


def test_nothing_pending_means_no_wake_ups() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            await settle()
            assert [until for until, _ in w.clock.waits] == [float("inf")]

    run(main)


def test_what_reading_raises_comes_out_of_run() -> None:
    async def main() -> None:
        async with world() as w:

            async def broken(*_: object, **__: object) -> AsyncIterator[list[object]]:
                for error in (Unavailable("gone"),):
                    raise error
                yield []

            w.log.follow = broken  # type: ignore[method-assign, assignment]
            w.start()
            await settle()
            assert w._task is not None
            with pytest.raises(Unavailable, match="gone"):
                await w._task
            w._task = None

    run(main)
