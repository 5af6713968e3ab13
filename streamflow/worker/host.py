"""The host: what a worker takes from its process and its machine. All else it takes from the log.

Time, its name, local stores, the watchdog's thread. The simulator gives workers a host of its own, and nothing of the
worker knows the difference.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from streamflow.config import Limits
from streamflow.logs.base import Log
from streamflow.store.base import Store
from streamflow.store.memory import MemoryStore
from streamflow.worker.clock import Clock
from streamflow.worker.executor import Executor, StandIn
from streamflow.worker.threads import StepThreads
from streamflow.worker.watchdog import Watchdog
from streamflow.workflow.guard import forbid_io

if TYPE_CHECKING:
    from streamflow.store.slots import Slot

LAYOUT: Final = 2
"""How the rows of local stores are made. What was written in another way is wiped, and rebuilt from the log."""
SWITCH_INTERVAL_SECONDS: Final = 0.0005
"""How long the event loop may keep the interpreter from the log's writer thread (see logs/DESIGN.md): the default of
5 ms would be paid several times in each group commit."""


class Host(Protocol):
    """Where one worker lives, from `enter` to `leave`."""

    @property
    def name(self) -> str:
        """The worker's name in its group; no other living worker has it."""
        ...

    @property
    def clock(self) -> Clock: ...

    @property
    def instance(self) -> str | None:
        """What outlives this process: the id of its state directory, if it has one."""
        ...

    @property
    def threads(self) -> StepThreads | None:
        """Where steps that are plain functions run; None for the executor's own threads."""
        ...

    @property
    def stand_in(self) -> StandIn | None:
        """What runs in the place of a step's call; None for each as it is."""
        ...

    def enter(self, executor: Executor, limits: Limits) -> None:
        """Make ready, before anything of the worker runs. Raises `Unavailable` when local state cannot be used."""
        ...

    def leave(self) -> None:
        """Give everything back. Idempotent; also after an `enter` that raised."""
        ...

    async def open_store(self, log: Log, topic: str, partition: int) -> Store:
        """The local state of one partition's topic, wiped if it is not surely a state of this log.

        Cancelled meanwhile, it leaves nothing open. Raises `Unavailable`.
        """
        ...

    async def close_stores(self, stores: list[Store]) -> None:
        """Flush and close them; not to be cancelled half-way."""
        ...


class ProcessHost:
    """A real process. `state_root` is where state directories lie; None keeps all state in memory."""

    def __init__(self, state_root: Path | None) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.clock = Clock()
        self.threads: StepThreads | None = None
        self.stand_in: StandIn | None = None
        self.watchdog: Watchdog | None = None
        self._state_root = state_root
        self._slot: Slot | None = None
        self._hurries = False

    @property
    def instance(self) -> str | None:
        return None if self._slot is None else self._slot.instance

    def enter(self, executor: Executor, limits: Limits) -> None:
        if self._state_root is not None:
            from streamflow.store.slots import lease_slot

            self._slot = lease_slot(self._state_root)
        forbid_io()
        self._hurries = True
        _hurry(+1)
        self.watchdog = Watchdog(executor, blocked_seconds=limits.loop_blocked_seconds)
        self.watchdog.start()

    def leave(self) -> None:
        if self.watchdog is not None:
            self.watchdog.stop()
        if self._hurries:
            self._hurries = False
            _hurry(-1)
        if self._slot is not None:
            self._slot.close()
            self._slot = None

    async def open_store(self, log: Log, topic: str, partition: int) -> Store:
        if self._slot is None:
            return MemoryStore()
        from streamflow.store.rocks import open_rocks

        # In a thread: opening replays RocksDB's own log, some 30 ms in which the other partitions go on.
        opening = asyncio.get_running_loop().create_task(
            asyncio.to_thread(
                open_rocks,
                self._slot.path / log.app / f"{topic}-{partition}",
                identity=f"{log.identity}/{topic}/{partition}/layout-{LAYOUT}",
                log_start=await log.start_offset(topic, partition),
                log_end=await log.end_offset(topic, partition),
            )
        )
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.wait((opening,))
            if opening.exception() is None:
                await self.close_stores([opening.result()])  # its directory is locked until then
            raise

    async def close_stores(self, stores: list[Store]) -> None:
        await asyncio.shield(asyncio.gather(*(asyncio.to_thread(store.close) for store in stores)))


_hurrying = 0
_usual_interval = 0.0


def _hurry(workers: int) -> None:
    """Shorten the interpreter's switch interval while there are workers in this process."""
    global _hurrying, _usual_interval  # noqa: PLW0603 - the interval is the interpreter's
    if not _hurrying:
        _usual_interval = sys.getswitchinterval()
        sys.setswitchinterval(min(_usual_interval, SWITCH_INTERVAL_SECONDS))
    _hurrying += workers
    if not _hurrying:
        sys.setswitchinterval(_usual_interval)
