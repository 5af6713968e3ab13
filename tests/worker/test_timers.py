"""The timer service on a memory log, with a clock that is moved by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from streamflow.errors import Unavailable
from streamflow.logs.base import COMMANDS, TIMERS, Log, Outgoing
from streamflow.logs.open import open_log
from streamflow.store.base import Store
from streamflow.store.memory import MemoryStore
from streamflow.store.rocks import open_rocks
from streamflow.worker import timers
from streamflow.worker.clock import Clock
from streamflow.worker.timers import RESEND_MS, RESEND_MS_MAX, TimerService


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
    """A log, a store, a clock, and a timer service that can be killed and started again."""

    def __init__(self, log: Log, store: Store) -> None:
        self.log, self.store, self.clock = log, store, ManualClock()
        self.late: list[float] = []
        self.publishes: list[int] = []
        self.refusals = 0
        self._publish = log.publish
        self._task: asyncio.Task[None] | None = None

    def start(self, **limits: int) -> None:
        service = TimerService(
            self.log,
            self.store,
            0,
            clock=self.clock,
            fire_at_of=int,
            fire_command=lambda key, value: Outgoing(COMMANDS, 0, key, value),
            on_fired=self.late.append,
            **limits,
        )
        self._task = asyncio.create_task(service.run())

    async def kill(self) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def publish(self, records: Sequence[Outgoing], *, published: tuple[int, int] | None = None) -> asyncio.Future[None]:
        """What the service calls: counted, and refused when a test says so."""
        if self.refusals:
            self.refusals -= 1
            refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            refused.set_exception(Unavailable("disk full"))
            return refused
        self.publishes.append(len(records))
        return self._publish(records, published=published)

    async def write(self, **times: int | None) -> None:
        """Timer records by key: a time sets, None drops."""
        await self._publish(
            [Outgoing(TIMERS, 0, key.encode(), None if at is None else b"%d" % at) for key, at in times.items()]
        )
        await settle()

    async def fired(self) -> list[str]:
        return [record.key.decode() for record in await self.log.read(COMMANDS, 0, 0, limit=100_000)]

    def rows(self) -> int:
        return sum(1 for _ in self.store.scan(b""))


@asynccontextmanager
async def world(store: Store | None = None) -> AsyncIterator[World]:
    log = await open_log("memory://timers", app="t", partitions=1)
    made = World(log, store or MemoryStore())
    log.publish = made.publish  # type: ignore[method-assign]
    try:
        yield made
    finally:
        if made._task is not None:
            await made.kill()
        made.store.close()
        await log.close()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


def test_fires_when_due_and_not_before() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            now = w.clock.at_ms
            await w.write(b=now + 2000, a=now + 1000, past=now - 5)
            assert await w.fired() == ["past"]
            await w.clock.advance(999)
            assert await w.fired() == ["past"]
            await w.clock.advance(1)
            assert await w.fired() == ["past", "a"]
            await w.clock.advance(1000)
            assert await w.fired() == ["past", "a", "b"]
            assert w.late == [0.005, 0, 0]

    run(main)


def test_an_earlier_timer_ends_the_sleep() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            now = w.clock.at_ms
            await w.write(late=now + 500)
            await w.write(early=now + 100)
            await w.clock.advance(100)
            assert await w.fired() == ["early"]

    run(main)


def test_dropped_and_moved_timers_do_not_fire() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            now = w.clock.at_ms
            await w.write(dropped=now + 100, moved=now + 100, sooner=now + 9000)
            await w.write(dropped=None, moved=now + 5000, sooner=now + 50, never_set=None)
            await w.clock.advance(1000)
            assert await w.fired() == ["sooner"]
            await w.clock.advance(4000)
            assert await w.fired() == ["sooner", "moved"]
            await w.write(moved=None, sooner=None)
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
                records += [Outgoing(TIMERS, 0, b"%d" % n, b"9999999"), Outgoing(TIMERS, 0, b"%d" % n, None)]
            await w.log.publish(records)
            w.start()
            await settle()
            assert w.store.applied_offset == 200
            assert sum(seen) == 0

    run(main)


def test_sent_again_until_the_tombstone_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timers, "SLEEP_SECONDS_MAX", 1e9)  # a day in seconds would be many steps

    async def main() -> None:
        async with world() as w:
            w.start()
            await w.write(a=w.clock.at_ms, b=w.clock.at_ms)
            assert await w.fired() == ["a", "b"]
            await w.write(b=None)
            await w.clock.advance(RESEND_MS - 1)
            assert await w.fired() == ["a", "b"]
            await w.clock.advance(1)
            assert await w.fired() == ["a", "b", "a"]
            assert w.late == [0, 0], "only the first time is lateness"
            await w.clock.advance(24 * RESEND_MS_MAX)
            assert 24 < len(await w.fired()) < 40
            await w.write(a=None)
            sent = len(await w.fired())
            await w.clock.advance(2 * RESEND_MS_MAX)
            assert len(await w.fired()) == sent
            assert w.rows() == 0

    run(main)


def test_a_record_repeated_after_it_was_sent_stays_sent() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            at = w.clock.at_ms
            await w.write(a=at)
            await w.write(a=at)
            await w.clock.advance(1)
            assert await w.fired() == ["a"]
            await w.write(a=at + RESEND_MS)  # moved to exactly where its resending waits
            await w.clock.advance(RESEND_MS)
            assert await w.fired() == ["a", "a"]
            await w.write(a=None)
            assert w.rows() == 0

    run(main)


def test_tombstone_during_the_publish_wins() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            at = w.clock.at_ms + 10
            await w.write(a=at)
            gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            w.log.publish = lambda records, *, published=None: gate  # type: ignore[method-assign]
            await w.clock.advance(10)
            await w.write(a=None)
            gate.set_result(None)
            await settle()
            assert w.rows() == 0

    run(main)


def test_refused_publish_is_tried_again_and_loses_nothing() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            w.refusals = 3
            await w.write(a=w.clock.at_ms)
            assert await w.fired() == []
            await w.clock.advance(100 + 200 + 400)
            assert await w.fired() == ["a"]
            assert w.late == [0.7]

    run(main)


def test_restart_goes_on_from_the_store(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_rocks(tmp_path / "timers", identity="t", log_start=0, log_end=1 << 40)
        async with world(store) as w:
            w.start()
            now = w.clock.at_ms
            await w.write(a=now + 100, b=now + 200, c=now + 60_000)
            await w.clock.advance(150)
            await w.write(a=None)
            await w.kill()
            w.store.close()
            w.store = open_rocks(tmp_path / "timers", identity="t", log_start=0, log_end=1 << 40)
            assert w.store.applied_offset == 4
            await w.write(d=now + 300)
            await w.clock.advance(1000)
            w.start()
            await settle()
            assert await w.fired() == ["a", "b", "d"]
            await w.clock.advance(60_000)
            assert "c" in await w.fired()

    run(main)


def test_killed_between_publish_and_note_sends_again() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            real, gate = w.log.publish, asyncio.get_running_loop().create_future()

            def unacknowledged(
                records: Sequence[Outgoing], *, published: tuple[int, int] | None = None
            ) -> asyncio.Future[None]:
                real(records)
                return gate

            w.log.publish = unacknowledged  # type: ignore[method-assign]
            await w.write(a=w.clock.at_ms)
            await w.kill()
            w.log.publish = real  # type: ignore[method-assign]
            w.start()
            await settle()
            assert await w.fired() == ["a", "a"]

    run(main)


def test_backlog_goes_out_in_batches_at_a_bounded_rate() -> None:
    async def main() -> None:
        async with world() as w:
            now = w.clock.at_ms
            await w.write(**{f"{n:05d}": now - 100_000 + n for n in range(3500)})
            w.start(fire_batch_max=100, fire_burst_max=500, fire_per_second_max=1000)
            await w.clock.advance(0)
            for _ in range(20):
                await settle()
            assert len(await w.fired()) == 500
            await w.clock.advance(1000)
            assert 1400 <= len(await w.fired()) <= 1500
            await w.clock.advance(2100)
            fired = await w.fired()
            assert fired == sorted(fired)
            assert len(fired) == 3500
            assert max(w.publishes) == 100

    run(main)


def test_many_due_at_once_take_few_batches() -> None:
    async def main() -> None:
        async with world() as w:
            at = w.clock.at_ms + 1000
            await w.write(**{f"{n:05d}": at for n in range(2000)})
            w.start()
            await w.clock.advance(999)
            assert await w.fired() == []
            await w.clock.advance(1)
            assert len(await w.fired()) == 2000
            assert w.publishes == [1000, 1000]
            assert max(w.late) == 0

    run(main)


def test_jump_forward_is_noticed_within_a_second() -> None:
    async def main() -> None:
        async with world() as w:
            w.start()
            await w.write(a=w.clock.at_ms + 3_600_000)
            w.clock.at_ms += 3_600_000
            assert await w.fired() == []
            assert min(until for until, _ in w.clock.waits) <= 1_000_000 + timers.SLEEP_SECONDS_MAX * 1000
            await w.clock.advance(0)
            assert await w.fired() == ["a"]

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
