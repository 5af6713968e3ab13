"""The host of a simulated worker: its process's clock, and stores that survive it more or less.

A killed process leaves to its successor all that it wrote, since the page cache outlives it; a machine that fails
leaves a prefix of that, from the last flush on; and a disk may come back with an older state, or a damaged one, which
RocksDB notices and wipes.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextvars import Context
from dataclasses import replace
from enum import StrEnum
from typing import Any, TypeAlias

from streamflow.config import Limits
from streamflow.logs.base import Log
from streamflow.sim.world import Process, World
from streamflow.store.base import Store
from streamflow.store.memory import MemoryStore
from streamflow.worker.clock import Clock
from streamflow.worker.executor import Executor
from streamflow.worker.threads import portable
from streamflow.workflow.code import StepCall

Around: TypeAlias = "Callable[[StepCall], Callable[..., Awaitable[Any]]]"


class Loss(StrEnum):
    """What happened to a disk while nobody used it."""

    NOTHING = "nothing"
    UNFLUSHED = "unflushed writes lost"
    OLD = "an old state came back"
    DAMAGED = "damaged"


class _Batch:
    __slots__ = ("applied_offset", "deletes", "puts")

    def __init__(self, puts: Mapping[bytes, bytes], deletes: Sequence[bytes], applied_offset: int) -> None:
        self.puts, self.deletes, self.applied_offset = dict(puts), tuple(deletes), applied_offset


class DiskStore:
    """The store port over the batches that a disk keeps."""

    def __init__(self, disk: Disk, key: str, wiped: str | None) -> None:
        self._disk, self._key, self._wiped = disk, key, wiped
        self._memory = MemoryStore()
        for batch in disk.batches[key]:
            self._memory.write(batch.puts, batch.deletes, applied_offset=batch.applied_offset)

    @property
    def applied_offset(self) -> int:
        return self._memory.applied_offset

    @property
    def wiped(self) -> str | None:
        return self._wiped

    def write(self, puts: Mapping[bytes, bytes], deletes: Sequence[bytes] = (), *, applied_offset: int) -> None:
        self._memory.write(puts, deletes, applied_offset=applied_offset)
        self._disk.batches[self._key].append(_Batch(puts, deletes, applied_offset))

    def get(self, key: bytes) -> bytes | None:
        return self._memory.get(key)

    def scan(
        self, prefix: bytes, *, start: bytes | None = None, reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        return self._memory.scan(prefix, start=start, reverse=reverse, limit=limit)

    def flush(self) -> None:
        self._disk.flushed[self._key] = len(self._disk.batches[self._key])

    def close(self) -> None:
        self.flush()
        self._memory.close()


class Disk:
    """What one machine keeps, by store."""

    def __init__(self) -> None:
        self.batches: dict[str, list[_Batch]] = {}
        self.flushed: dict[str, int] = {}
        self.identities: dict[str, str] = {}
        self.damaged: set[str] = set()

    def lose(self, loss: Loss, process: Process) -> None:
        """The process is dead, and this happens to what it wrote."""
        chance = process.world.chance
        for key in sorted(self.batches):
            batches = self.batches[key]
            match loss:
                case Loss.UNFLUSHED:
                    del batches[chance.randint(min(self.flushed.get(key, 0), len(batches)), len(batches)) :]
                case Loss.OLD:
                    del batches[chance.randint(0, len(batches)) :]
                case Loss.DAMAGED:
                    self.damaged.add(key)
                case Loss.NOTHING:
                    pass

    def open(self, world: World, key: str, *, identity: str, log_start: int, log_end: int) -> DiskStore:
        """As `open_rocks` does: wiped if it is not surely a state of this log."""
        batches = self.batches.setdefault(key, [])
        applied = batches[-1].applied_offset if batches else 0
        wiped: str | None = None
        if self.identities.setdefault(key, identity) != identity:
            wiped = "it is of another log"
        elif key in self.damaged:
            wiped = "it is damaged"
        elif applied > log_end:
            wiped = f"its applied offset {applied} is past the log's end {log_end}"
        elif 0 < applied < log_start:
            wiped = f"its applied offset {applied} is before the log's start {log_start}"
        if wiped is not None:
            batches.clear()
        self.damaged.discard(key)
        self.identities[key] = identity
        self.flushed[key] = min(self.flushed.get(key, 0), len(batches))
        if wiped is not None:
            world.marks["store wiped"] += 1
        elif batches:
            world.marks["store reused"] += 1
        if log_start > 0 and not batches:
            world.marks["trimmed log read from its start"] += 1
        return DiskStore(self, key, wiped)


def in_thread(loop: asyncio.AbstractEventLoop, function: Callable[[], Any], context: Context) -> asyncio.Future[Any]:
    """What a thread would do: some time later, in one piece. The error is as a future may carry it."""

    def work() -> Any:
        try:
            return context.run(function)
        except BaseException as error:  # whatever the step raises is its outcome
            carried = portable(error)
            if carried is error:
                raise
            raise carried from error

    return loop.run_in_executor(None, work)


class SimThreads:
    """See `streamflow.worker.threads.StepThreads`: a plain `def` step is done some time later, in one piece."""

    def __init__(self, process: Process) -> None:
        self._loop = process.loop

    def run(self, function: Callable[[], Any], context: Context) -> asyncio.Future[Any]:
        return in_thread(self._loop, function, context)

    def give_up(self, future: asyncio.Future[Any]) -> None:
        future.cancel()

    def close(self) -> None: ...


class SimHost:
    """See `streamflow.worker.host.Host`. `around` makes the function that runs in the place of a call's."""

    def __init__(self, process: Process, disk: Disk, around: Around | None = None) -> None:
        self._process, self._disk, self._around = process, disk, around

    @property
    def name(self) -> str:
        return self._process.name

    @property
    def clock(self) -> Clock:
        return self._process.clock

    @property
    def instance(self) -> str | None:
        return None

    @property
    def threads(self) -> SimThreads:
        return SimThreads(self._process)

    def enter(self, executor: Executor, limits: Limits) -> None: ...

    def stand_in(self, call: StepCall) -> StepCall:
        """The call as it runs here: in no process of its own, and with what was put around it."""
        step = copy.copy(call.step)
        step.process = False
        if self._around is not None:
            step.function, step.is_async = self._around(call), True
        return replace(call, step=step)

    def leave(self) -> None: ...

    async def open_store(self, log: Log, topic: str, partition: int) -> Store:
        return self._disk.open(
            self._process.world,
            f"{topic}-{partition}",
            identity=f"{log.identity}/{topic}/{partition}",
            log_start=await log.start_offset(topic, partition),
            log_end=await log.end_offset(topic, partition),
        )

    async def close_stores(self, stores: list[Store]) -> None:
        for store in stores:
            store.close()
