"""The world: processes, their clocks, one virtual time for all, and chance from one seed.

It is single-threaded. At each moment it picks, by chance, one of the processes that have something to do, and lets it
run some callbacks; when none has, time moves to the next event. Whoever sends something to another process schedules
the arrival as an event here, so that no process ever calls into another.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from math import inf
from typing import Any, Final
from zlib import crc32

from streamflow.sim.loop import ProcessLoop
from streamflow.worker.clock import Clock

EPOCH_SECONDS: Final = 1_900_000_000.0
"""Where the world's wall clock begins: in 2030."""
BURST_MAX: Final = 20
"""Callbacks that one process runs before chance picks again."""
LAST_EVENTS: Final = 60
"""How much of the trace a failure shows."""


class Stuck(Exception):
    """Nothing is left to happen, while something was awaited."""


class TooLong(Exception):
    """The world did not end within its time or its number of steps."""


class Process:
    """One simulated process. Its wall clock may be off and jump; its monotonic one may drift."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.number = len(world.processes) + 1
        self.is_alive = True
        self.is_stopped = False
        self.silent_since: float | None = None
        """Since when nobody has heard of it: stopped, or dead."""
        self.drift = 1.0
        self._wall_offset = 0.0
        self.callbacks = 0
        """How many callbacks of it have run."""
        self.wakes_at = inf
        """When its next timer is due, in the world's time: none of them is set but by its own callbacks."""
        self._then: list[tuple[int, int, Callable[[], None]]] = []
        self._born_at = world.now
        self.loop = ProcessLoop(self.monotonic, lambda: world.chance.expovariate(1 / 0.01))
        self.clock = Clock(
            wall=lambda: int((world.epoch + self.world.now + self.wall_offset) * 1e9),
            monotonic=lambda: int(self.monotonic() * 1e9),
        )

    def monotonic(self) -> float:
        """Seconds since the process began, by its own clock."""
        return (self.world.now - self._born_at) * self.drift

    @property
    def wall_offset(self) -> float:
        """How far its wall clock is ahead of the world's, in seconds."""
        return self._wall_offset

    @wall_offset.setter
    def wall_offset(self, seconds: float) -> None:
        self._wall_offset = seconds
        self.world.wall_offsets = min(seconds, self.world.wall_offsets[0]), max(seconds, self.world.wall_offsets[1])

    def in_world(self, at: float) -> float:
        """An instant by this process's monotonic clock, in the world's time; never too early."""
        return self._born_at + at / self.drift + 1e-9

    @property
    def can_run(self) -> bool:
        return self.is_alive and not self.is_stopped

    def has_work(self) -> bool:
        """Whether a callback is ready now; timers that are due become ready."""
        if self.wakes_at <= self.world.now:  # not a moment before: who waits a little less each time gets on
            self.loop.wake()
            self._set_alarm()
        return self.loop.is_ready

    def _set_alarm(self) -> None:
        at = self.loop.next_at
        self.wakes_at = inf if at is None else self.in_world(at)

    def run(self, main: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Begin the coroutine as a task of this process."""
        assert self.is_alive, self.name
        return self.loop.create_task(main, name=f"{self.name}-main")

    def call(self, delay: float, callback: Callable[..., None], *args: Any) -> None:
        """Call back in this process after so much of the world's time; never, if it is dead by then."""

        def arrive() -> None:
            if self.is_alive:
                self.loop.call_soon(callback, *args)

        self.world.at(self.world.now + delay, arrive)

    def after(self, callbacks: int, then: Callable[[], None]) -> None:
        """Let something happen to it between two of its callbacks, after so many more: at any await of its code."""
        heappush(self._then, (self.callbacks + callbacks, self.world.count(), then))

    def run_one(self) -> None:
        """Run its next callback, and what is to happen after it."""
        self.loop.run_one()
        self.callbacks += 1
        while self._then and self._then[0][0] <= self.callbacks:
            heappop(self._then)[2]()
        self._set_alarm()

    def kill(self) -> None:
        """SIGKILL: nothing of it runs any more."""
        self.is_alive = False
        self.silent_since = self.world.now
        self.world.bury(self)
        self.world.note(self.name, "killed")

    def stop(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after so long: time passes, and nothing of it runs."""
        if not self.can_run:
            return
        self.is_stopped, self.silent_since = True, self.world.now
        self.world.note(self.name, f"stopped for {seconds:.3f} s")

        def go_on() -> None:
            self.is_stopped = False
            if self.is_alive:
                self.silent_since = None
                self.world.note(self.name, "goes on")

        self.world.at(self.world.now + seconds, go_on)


class World:
    """One simulated world."""

    def __init__(self, seed: int | str, *, epoch: float = EPOCH_SECONDS) -> None:
        self.seed = seed
        self.chance = random.Random(f"streamflow {seed}")
        self.now = 0.0
        self.epoch = epoch
        """Where the wall clock begins, in seconds since 1970."""
        self.wall_offsets = 0.0, 0.0
        """How far, at least and at most, a wall clock was ever ahead of the world's, in seconds."""
        self.processes: list[Process] = []
        """All that there ever were."""
        self._alive: list[Process] = []
        self.steps = 0
        self.marks: Counter[str] = Counter()
        """How often each situation occurred (see situations.py)."""
        self.trace = 0
        """A checksum over everything noted: the same for the same seed, anywhere."""
        self.last: deque[str] = deque(maxlen=LAST_EVENTS)
        self.after_each: list[Callable[[], None]] = []
        """Called after every event and every burst."""
        self.at_close: list[Callable[[], None]] = []
        """Called when the world is thrown away: what its killed processes entered somewhere outside is taken out."""
        self.leap_to: Callable[[], float | None] = lambda: None
        """When the next thing of interest happens, if nothing but housekeeping lies before it: time leaps there, as if
        all machines had been asleep. None: time passes from timer to timer."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def process(self, name: str) -> Process:
        """One more process."""
        made = Process(self, name)
        self.processes.append(made)
        self._alive.append(made)
        return made

    def bury(self, process: Process) -> None:
        """It is dead: not asked for work any more."""
        self._alive = [each for each in self._alive if each is not process]

    def at(self, when: float, event: Callable[[], None]) -> None:
        """Let something happen at that time; what is due at the same time happens in the order of these calls."""
        heappush(self._events, (max(when, self.now), self.count(), event))

    def count(self) -> int:
        """The next number: of what is due at the same time, the one that was asked for first comes first."""
        self._count += 1
        return self._count

    def note(self, who: str, what: str) -> None:
        """Say in the trace what happened."""
        line = f"{self.now:.6f} {who}: {what}"
        self.trace = crc32(line.encode(), self.trace)
        self.last.append(line)

    def run(self, until: Callable[[], bool], *, seconds: float, steps: int) -> None:
        """Let time pass until the condition holds. Raises `Stuck` or `TooLong`."""
        end, last_step = self.now + seconds, self.steps + steps
        while not until():
            if self.steps >= last_step:
                raise TooLong(f"not done after {steps:,} steps, at {self.now:.3f} s")
            self.steps += 1
            ready = [process for process in self._alive if not process.is_stopped and process.has_work()]
            if ready:
                process = self.chance.choice(ready) if len(ready) > 1 else ready[0]
                self._burst(process)
            elif not self._advance(end):
                raise TooLong(f"not done after {seconds:g} s")
            for check in self.after_each:
                check()

    def close(self) -> None:
        """Throw everything away. Nothing of it may be used any more."""
        with _outside_any_loop():
            for process in self.processes:
                process.loop.throw_away()
        self.processes.clear()
        self._alive.clear()
        self.after_each.clear()
        self._events.clear()
        for undo in self.at_close:
            undo()
        self.at_close.clear()

    def _burst(self, process: Process) -> None:
        with _outside_any_loop():
            for _ in range(self.chance.randint(1, BURST_MAX)):
                process.run_one()
                if not (process.can_run and process.has_work()):
                    return

    def _advance(self, end: float) -> bool:
        """Move on to the next event or timer; False if that lies beyond the end."""
        if (leap := self.leap_to()) is not None and self.now < leap <= end:
            self.now = leap
            return True
        next_timer = min([process.wakes_at for process in self._alive if not process.is_stopped], default=inf)
        if self._events and self._events[0][0] <= next_timer:
            when, _, event = heappop(self._events)
            if when > end:
                heappush(self._events, (when, 0, event))
                return False
            self.now = max(self.now, when)
            event()
            return True
        if next_timer == inf:
            raise Stuck(f"nothing is left to happen at {self.now:.3f} s")
        if next_timer > end:
            return False
        self.now = max(self.now, next_timer)
        return True


@contextmanager
def _outside_any_loop() -> Iterator[None]:
    """Step outside of a loop that may be running around the world: a simulated process has one of its own."""
    outer = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(outer)
