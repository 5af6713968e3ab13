"""The worker: one process's place in the group. It owns the partitions that the log's group gives it.

It may serve step queues too, or nothing but those (`owns_partitions=False`): then it runs attempts for the owners
elsewhere, and has no state of its own.

For each partition there is one `Processor` and one `TimerService`, in a task of their own. What fails (fenced, the log
unreachable) is dropped and begun again from the log while the partition is still assigned here; what is taken away is
stopped gracefully and released at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Final

from streamflow.codec.registry import Schemas
from streamflow.config import LIMITS, Limits
from streamflow.core.effects import TimerRecord
from streamflow.core.inputs import CodeFactory
from streamflow.core.machines.run import Run
from streamflow.core.replay import Execution
from streamflow.errors import CorruptLog, Fenced, InvalidArguments, Unavailable
from streamflow.ids import check_queue
from streamflow.logs.base import HISTORY, TIMERS, Log, Membership
from streamflow.metrics import FENCED, TIMER_LATENESS, Reading, unwatch, watch
from streamflow.store.base import Store
from streamflow.worker.clock import Clock
from streamflow.worker.ending import end
from streamflow.worker.executor import Executor
from streamflow.worker.gauges import LAG_SECONDS, Lags, read
from streamflow.worker.host import Host, ProcessHost
from streamflow.worker.outbox import check_timer
from streamflow.worker.processor import Processor, ProcessorState
from streamflow.worker.queues import QueueService
from streamflow.worker.timers import TimerService
from streamflow.workflow.code import RunCode
from streamflow.workflow.definitions import Registry

log_ = logging.getLogger("streamflow.worker")

BACKOFF_SECONDS: Final = 0.1
BACKOFF_SECONDS_MAX: Final = 2.0
"""Pause before a failed partition is begun again: short, since most failures are a hand-over, growing for real ones."""
REPORT_SECONDS: Final = 2.0
"""How often the group is told how far commands are consumed."""


class Worker:
    """Serves an app's workflows and steps on a log. `start`, then `wait`, then `stop`."""

    def __init__(
        self,
        app: Registry,
        log: Log,
        *,
        state_dir: str | os.PathLike[str] | None = None,
        max_parallel_steps: int | None = None,
        queues: Iterable[str] = (),
        owns_partitions: bool = True,
        limits: Limits = LIMITS,
        schemas: Schemas | None = None,
        host: Host | None = None,
    ) -> None:
        wanted = max_parallel_steps if max_parallel_steps is not None else getattr(app, "max_parallel_steps", 64)
        if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
            raise InvalidArguments(f"max_parallel_steps must be an int of at least 1, found {wanted!r}")
        self.app = app
        self.log = log
        self.max_parallel_steps = wanted
        self.queues = check_queues(queues)
        self.owns_partitions = owns_partitions
        if not owns_partitions and not self.queues:
            raise InvalidArguments(
                "a worker that owns no partitions needs queues to serve: name one, as in queues=['gpu']"
            )
        self.limits = limits
        self.schemas = schemas
        self.host = host or ProcessHost(_state_root(log, state_dir) if owns_partitions else None)
        self.partitions: dict[int, asyncio.Task[None]] = {}
        self.processors: dict[int, Processor] = {}
        self.services: list[QueueService] = []
        self.executor: Executor | None = None
        self._membership: Membership | None = None
        self._assignments: asyncio.Task[None] | None = None
        self._reports: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._leaving: set[int] = set()
        self._lags = Lags(log)
        self._lag_asks: asyncio.Task[None] | None = None
        self._died: asyncio.Future[None] | None = None

    @property
    def owner(self) -> str:
        """The worker's name in its group."""
        return self.host.name

    @property
    def clock(self) -> Clock:
        return self.host.clock

    async def start(self) -> None:
        """Join the group and begin to own partitions; idempotent, but a stopped worker stays stopped.

        Raises `Unavailable` when the log, the local state or the schema registry cannot be used, and `InvalidArguments`
        when the registry refuses our schemas; nothing is left over then.
        """
        if self._died is not None:
            return
        loop = asyncio.get_running_loop()
        self._died = loop.create_future()
        try:
            if self.schemas is not None:
                await self.schemas.register(self.log.app)
            self.executor = Executor(
                self.clock,
                max_parallel_steps=self.max_parallel_steps,
                limits=self.limits,
                threads=self.host.threads,
                stand_in=self.host.stand_in,
            )
            self.host.enter(self.executor, self.limits)
            watch(self.gauges)
            await self._serve_queues(self.executor)
            if self.owns_partitions:
                self._membership = await self.log.join(self.owner, instance=self.host.instance)
        except BaseException:
            await self._stop_queues()
            self._free()
            self._died.cancel()
            self._died = None
            raise
        self._lag_asks = loop.create_task(self._ask_for_lags(), name="lags")
        if self._membership is not None:
            self._reports = loop.create_task(self._report(self._membership), name="reports")
            self._assignments = loop.create_task(self._follow_assignments(self._membership), name="assignments")
            self._assignments.add_done_callback(self._ended)

    async def _serve_queues(self, executor: Executor) -> None:
        slots = asyncio.Semaphore(self.max_parallel_steps)
        for queue in self.queues:
            service = QueueService(
                queue,
                app=self.app,
                log=self.log,
                owner=self.owner,
                executor=executor,
                clock=self.clock,
                slots=slots,
                limits=self.limits,
            )
            self.services.append(service)
            await service.start()
            service.ended.add_done_callback(self._queue_ended)

    def _queue_ended(self, ended: asyncio.Future[None]) -> None:
        if (error := ended.exception()) is not None:
            self._die(error)

    async def _stop_queues(self) -> None:
        await asyncio.gather(*(service.stop() for service in self.services))

    async def wait(self) -> None:
        """Return when the worker was stopped; raise what it died of."""
        assert self._died is not None, "start the worker first"
        await asyncio.shield(self._died)

    async def stop(self) -> None:
        """Finish what is durable, hand the partitions over at once, and free everything. Idempotent."""
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._stop(), name="stop-worker")
        await asyncio.shield(self._stopping)  # once begun it is done to the end, whoever waits for it

    async def _stop(self) -> None:
        try:
            if self._assignments is not None:
                self._assignments.cancel()
                await asyncio.wait((self._assignments,))
            await asyncio.gather(
                self._stop_queues(), *(self._give_up(partition) for partition in list(self.partitions))
            )
            await end(*(task for task in (self._reports, self._lag_asks) if task is not None))
            if self._membership is not None:
                await self._membership.leave()
        finally:
            self._free()
            if self._died is not None and not self._died.done():
                self._died.set_result(None)

    def _free(self) -> None:
        unwatch(self.gauges)
        if self.executor is not None:
            self.executor.close()
        self.host.leave()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._die(
                task.exception() or Unavailable(f"worker {self.owner} is in no group any more: the log was closed")
            )

    def _die(self, error: BaseException) -> None:
        if self._died is not None and not self._died.done():
            self._died.set_exception(error)
            self._died.exception()  # whoever waits sees it; without a waiter it must not be reported as lost

    async def _follow_assignments(self, membership: Membership) -> None:
        async for wanted in membership.assignments():
            for partition in sorted(wanted - self.partitions.keys()):
                task = asyncio.get_running_loop().create_task(self._own(partition), name=f"partition-{partition}")
                self.partitions[partition] = task
            gone = self.partitions.keys() - wanted
            await asyncio.gather(*(self._give_up(partition) for partition in sorted(gone)))

    async def _give_up(self, partition: int) -> None:
        """Stop a partition gracefully and release it."""
        task = self.partitions.get(partition)
        if task is None:
            return
        self._leaving.add(partition)
        try:
            processor = self.processors.get(partition)
            if processor is not None:
                processor.stop()
                await asyncio.wait((task,), timeout=self.limits.stop_seconds + 1)
            task.cancel()
            await asyncio.wait((task,))
            # Forgotten only now: when this is cancelled, `stop` must still find the partition.
            self.partitions.pop(partition, None)
        finally:
            self._leaving.discard(partition)
        await self._release(partition)

    async def _release(self, partition: int) -> None:
        """Tell the group; a log that is busy or away for a moment is asked again while this worker is a member."""
        backoff = BACKOFF_SECONDS
        while self._membership is not None:
            try:
                await self._membership.release(partition)
                return
            except Unavailable as error:
                if self._stopping is not None:
                    return  # leaving releases everything
                log_.warning("partition %d cannot be released: %s; trying again in %.1f s", partition, error, backoff)
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, BACKOFF_SECONDS_MAX)

    async def _own(self, partition: int) -> None:
        """Process the partition, beginning again after failures, until it is given up."""
        backoff = BACKOFF_SECONDS
        while True:
            try:
                if await self._process(partition):
                    return
            except Fenced as error:
                FENCED.inc()
                log_.warning("partition %d: %s; reading the log again", partition, error)
                await self._until_confirmed(partition)
            except Unavailable as error:
                log_.warning("partition %d: %s; trying again in %.1f s", partition, error, backoff)
            except CorruptLog as error:
                log_.exception("partition %d cannot be served", partition)
                self._die(error)
                return
            except Exception as error:  # a broken invariant: said loudly, and begun again from the log
                log_.exception("partition %d failed: %s; beginning again from the log", partition, error)
            if partition in self._leaving:
                return
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, BACKOFF_SECONDS_MAX)

    async def _until_confirmed(self, partition: int) -> None:
        """Wait until the group says that the partition is still this worker's.

        Whoever fenced it may be its new owner, of whom this worker has not heard, having been paused. It could claim
        the partition back, and be fenced again, to and fro; the log would stay right, and nobody would get on.
        """
        assert self._membership is not None
        backoff = BACKOFF_SECONDS
        while partition not in self._leaving:
            try:
                if await self._membership.confirm(partition):
                    return
            except Unavailable as error:
                log_.warning("partition %d: %s", partition, error)
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, BACKOFF_SECONDS_MAX)

    async def _report(self, membership: Membership) -> None:
        """Tell the group from time to time how far the commands are consumed, for the tools that show lag."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            for partition, processor in list(self.processors.items()):
                if processor.status is ProcessorState.ACTIVE:
                    try:
                        await membership.confirm(partition, processor.durably_consumed)
                    except Unavailable as error:
                        log_.debug("partition %d: consumed commands are not reported: %s", partition, error)

    async def _ask_for_lags(self) -> None:
        while True:
            await asyncio.sleep(LAG_SECONDS)
            await self._lags.ask(self.processors, self.services)

    def gauges(self) -> Reading:
        """What the worker has and does at this moment, for its metrics; may be asked from any thread."""
        return read(self.processors, list(self.partitions), self.executor, self._lags)

    async def _process(self, partition: int) -> bool:
        """One life of the partition; True when it was stopped on purpose."""
        assert self.executor is not None
        await self.log.verify()
        stores: list[Store] = []
        try:
            store = await self._open_store(partition, HISTORY, stores)
            timer_store = await self._open_store(partition, TIMERS, stores)
            processor = Processor(
                partition=partition,
                owner=self.owner,
                log=self.log,
                store=store,
                executor=self.executor,
                clock=self.clock,
                code_of=self._code_of,
                timeout_of=self._timeout_of,
                retention_of=self._retention_of,
                limits=self.limits,
                schemas=self.schemas,
            )
            timers = TimerService(
                self.log,
                timer_store,
                partition,
                clock=self.clock,
                fire_at_of=TimerRecord.fire_at_of,
                check=check_timer,
                fire=processor.fire,
                on_fired=TIMER_LATENESS.observe,
            )
            self.processors[partition] = processor
            firing = asyncio.get_running_loop().create_task(
                _serve_timers(processor, timers), name=f"timers-p{partition}"
            )
            running = asyncio.get_running_loop().create_task(processor.run(), name=f"processor-p{partition}")
            try:
                await asyncio.wait((firing, running), return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    running.result()
                    return True
                firing.result()
                raise RuntimeError(f"partition {partition}: the timer service ended by itself")
            finally:
                for task in (firing, running):
                    task.cancel()
                await asyncio.wait((firing, running))
                for task in (firing, running):
                    if not task.cancelled():
                        task.exception()
        finally:
            self.processors.pop(partition, None)
            await self.host.close_stores(stores)

    async def _open_store(self, partition: int, topic: str, opened: list[Store]) -> Store:
        store = await self.host.open_store(self.log, topic, partition)
        opened.append(store)
        if store.wiped is not None:
            log_.warning("partition %d: the local %s state was wiped and is rebuilt: %s", partition, topic, store.wiped)
        return store

    def _code_of(self, workflow: str) -> CodeFactory | None:
        definition = self.app.workflows.get(workflow)
        return None if definition is None else partial(_make_code, definition)

    def _timeout_of(self, workflow: str) -> int | None:
        definition = self.app.workflows.get(workflow)
        return None if definition is None or definition.timeout is None else math.ceil(definition.timeout * 1000)

    def _retention_of(self, workflow: str) -> int | None:
        definition = self.app.workflows.get(workflow)
        return None if definition is None or definition.retention is None else math.ceil(definition.retention * 1000)


async def _serve_timers(processor: Processor, timers: TimerService) -> None:
    """Index and fire a partition's timers, once it takes them in: to index them takes a fifth of a restore's time."""
    await processor.fires.wait()
    await timers.run()


def check_queues(names: Iterable[str]) -> tuple[str, ...]:
    """The names of the queues to serve, each once. Raises `InvalidArguments` where they are none."""
    if isinstance(names, str):
        raise InvalidArguments(f"queues must be a list of names, found the str {names!r}: write [{names!r}]")
    try:
        return tuple(dict.fromkeys(check_queue(name) for name in names))
    except (TypeError, ValueError) as error:
        raise InvalidArguments(f"queues: {error}") from None


def _make_code(definition: object, execution: Execution, run: Run) -> RunCode:
    return RunCode(definition, execution, run)  # type: ignore[arg-type]


def _state_root(log: Log, state_dir: str | os.PathLike[str] | None) -> Path | None:
    """Where local state lies: as told, else where the log says; None is in memory."""
    if state_dir is not None:
        return Path(state_dir)
    return log.state_dir
