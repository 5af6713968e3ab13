"""A WorkflowLoop that drives itself, with virtual time: what CPython's own asyncio tests need of a loop."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import Callable, Generator
from typing import Any

from streamflow.workflow.loop import WorkflowLoop

CLOCK_RESOLUTION_SECONDS = 1e-9
"""As asyncio's TestLoop has it: the tests add up floats."""


class _Held(list[Any]):
    """A ready list that looks empty, so that the drain ends behind the present batch, as asyncio's stop() wants."""

    def __bool__(self) -> bool:
        return False


class DrivenLoop(WorkflowLoop):
    """Adds run_until_complete and its like. Without `times`, time jumps to the next timer when nothing is ready.

    `times` is what asyncio's TestLoop takes: a generator that is sent each timer's time and yields how far to advance.
    """

    def __init__(self, times: Callable[[], Generator[float, float, None]] | None = None) -> None:
        super().__init__(self)
        self._heap: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = itertools.count()
        self._asked: list[float] = []
        self._times = times() if times else None
        if self._times:
            next(self._times)
        self._stopping = False
        self._debug = False
        self._default_executor = None  # read by CPython's TestCase.close_loop
        self._current_handle = None  # read by BaseEventLoop.default_exception_handler

    # The timer port.

    def set_timer(self, handle: asyncio.TimerHandle) -> None:
        heapq.heappush(self._heap, (handle.when(), next(self._order), handle))

    def cancel_timer(self, handle: asyncio.TimerHandle) -> None:
        """The heap finds out by itself."""

    def call_at(self, when: float, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:  # type: ignore[override]
        handle = super().call_at(when, *args, **kwargs)
        self._asked.append(when)
        return handle

    def _tell_times(self) -> None:
        asked, self._asked = self._asked, []
        for when in asked if self._times else ():
            assert self._times
            self.advance_time(self._times.send(when))

    def _advance(self) -> None:
        while self._heap and self._heap[0][2].cancelled():
            heapq.heappop(self._heap)
        if not self._ready and self._heap and not self._times:
            self.set_time(self._heap[0][0])
        while self._heap and self._heap[0][0] <= self.time() + CLOCK_RESOLUTION_SECONDS:
            self.fire(heapq.heappop(self._heap)[2])

    def advance_time(self, seconds: float) -> None:
        if seconds:
            self.set_time(self.time() + seconds)

    # What a WorkflowLoop refuses to do.

    def run_forever(self) -> None:
        if asyncio._get_running_loop() is not None:
            raise RuntimeError("Cannot run the event loop while another loop is running")
        try:
            while not self._stopping:
                self.drain()
                self._tell_times()
                if not self._stopping:
                    self._advance()
                    assert self._ready, "nothing is ready, no timer is set: the test waits for ever"
        finally:
            self._stopping = False
            self._ready = list(self._ready)

    def _run_once(self) -> None:
        self.drain()

    def get_debug(self) -> bool:
        return self._debug  # asked by Future and Task, to keep where they were made

    def set_debug(self, enabled: bool) -> None:
        self._debug = enabled

    def run_until_complete(self, future: Any) -> Any:
        is_new = not asyncio.isfuture(future)
        future = asyncio.ensure_future(future, loop=self)
        if is_new:
            future._log_destroy_pending = False
        future.add_done_callback(self._stop_after)
        try:
            self.run_forever()
        except BaseException:
            if is_new and future.done() and not future.cancelled():
                future.exception()
            raise
        finally:
            future.remove_done_callback(self._stop_after)
        if not future.done():
            raise RuntimeError("Event loop stopped before Future completed.")
        return future.result()

    def _stop_after(self, _future: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopping = True
        self._ready = _Held(self._ready)

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle:  # type: ignore[override]
        return self.call_soon(*args, **kwargs)

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """There is none."""

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        asyncio.BaseEventLoop.default_exception_handler(self, context)  # type: ignore[arg-type]  # to asyncio's logger

    def close(self) -> None:
        if self.is_closed():
            return
        super().close()
        if self._times:
            with contextlib.suppress(StopIteration):
                self._times.send(0)
                raise AssertionError("Time generator is not finished")


class DrivenPolicy(asyncio.DefaultEventLoopPolicy):
    """Makes every new loop a DrivenLoop: for asyncio.run, Runner, new_event_loop and IsolatedAsyncioTestCase."""

    _loop_factory = DrivenLoop
