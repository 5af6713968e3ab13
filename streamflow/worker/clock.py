"""The only place that looks at a clock: wall time that never runs backwards.

Rules:
- `now_ms` is the wall clock, but never runs backwards, so that no turn is older than the one before it.
- A wall clock that is behind the last answer by little is waited for: those of virtual machines are set back by
  microseconds all the time, and going on regardless led 4 ms a minute ahead, so that timers were early.
- One that is behind by more was set back for good, or the log was written by a host that is ahead. From there on what
  really passed counts: no sleep is stretched by the hours that a clock was set back.
- A wall clock that jumps forward is believed at once; waiting is done in short pieces so that a jump is noticed.
- Milliseconds are rounded down: nothing that waits for a millisecond sees it before it has begun.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

NS_PER_MS = 1_000_000
WAITED_FOR_NS_MAX = 1_000 * NS_PER_MS
"""A wall clock that is this far behind at most is waited for: sleeps become that much longer, and no more."""
DRIFT_OVER = 500
"""Of the time since the last look, one part in so many may be the two clocks' difference in speed."""


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
        wall_ns, gone_on_ns = self._wall(), self._last_ns + elapsed_ns
        if gone_on_ns - wall_ns > WAITED_FOR_NS_MAX + elapsed_ns // DRIFT_OVER:
            self._last_ns = gone_on_ns
        else:
            self._last_ns = max(self._last_ns, wall_ns)
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
