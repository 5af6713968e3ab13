"""The only place that looks at a clock: wall time that never runs backwards.

Rules:
- `now_ms` is the wall clock, but at least the last answer plus what really passed since. A wall clock that is set back
  so neither stretches a sleep by the hours it was set back, nor makes a turn older than the one before it.
- A wall clock that jumps forward is believed at once; waiting is done in short pieces so that a jump is noticed.
- Milliseconds are rounded down: nothing that waits for a millisecond sees it before it has begun.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

NS_PER_MS = 1_000_000


class Clock:
    """Time of one worker. `wall` and `monotonic` give nanoseconds."""

    def __init__(
        self, wall: Callable[[], int] = time.time_ns, monotonic: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._last_ns = 0
        self._last_monotonic_ns = monotonic()

    def now_ms(self) -> int:
        """Milliseconds since 1970, never less than before."""
        monotonic_ns = self._monotonic()
        elapsed_ns = monotonic_ns - self._last_monotonic_ns
        assert elapsed_ns >= 0, elapsed_ns
        self._last_monotonic_ns = monotonic_ns
        self._last_ns = max(self._wall(), self._last_ns + elapsed_ns)
        return self._last_ns // NS_PER_MS

    def advance_to(self, at_ms: int) -> None:
        """Be at `at_ms` or later from now on: the log's newest `at`, written by a worker whose clock is ahead."""
        self.now_ms()
        self._last_ns = max(self._last_ns, at_ms * NS_PER_MS)

    async def wait(self, event: asyncio.Event, seconds: float | None) -> None:
        """Until the event is set or that much real time has passed, None for no limit. A test's clock replaces it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()
