"""Step queues: a worker's part in serving one. It takes attempts from the queue's topic, runs them and answers.

    group of the queue ──▶ QueueService ── for each partition given to it: ── QueueReader ──▶ executor ──▶ answer
                                                                                  ▲ committed          durable │
                                                                                  └────────── commit ◀─────────┘
Rules of this file:

- An attempt is done with once its answer is in the commands topic, not before. What is committed is the offset below
  which everything is done with; who takes the partition over reads from there, and runs again what had no answer.
- Every attempt is thus run at least once. One that is run twice counts once: the run's owner takes the first answer.
- Nothing of a record is trusted. What is no attempt goes to the dead letters, and the partition goes on.
- What is committed and old enough is deleted from the topic, every so often while there is something to commit.
- What is not taken stays on the topic: a reader takes no more than there are slots, and no more than a window ahead
  of what is committed, so that a take-over repeats a bounded number of attempts.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

from msgspec import Struct

from streamflow.config import Limits
from streamflow.core.effects import DeadLetter, StepTask
from streamflow.errors import CorruptLog, InvalidArguments, StreamflowError, Unavailable
from streamflow.logs.base import Log, Outgoing, QueueMembership, Record, steps_topic
from streamflow.metrics import DEAD_LETTERS
from streamflow.worker.clock import Clock
from streamflow.worker.ending import end
from streamflow.worker.executor import Attempt, AttemptOutcome, Executor
from streamflow.worker.outbox import dead_letter
from streamflow.worker.tasks import answer_to, read_task
from streamflow.workflow.code import StepCall
from streamflow.workflow.definitions import Registry
from streamflow.workflow.stepinfo import StepInfo

log_ = logging.getLogger("streamflow.worker")

BACKOFF_SECONDS: Final = 0.1
BACKOFF_SECONDS_MAX: Final = 5.0
"""Pause before the log is asked again after it was away; attempts go on meanwhile."""

StepKey = tuple[str, int, int]
"""Workflow id, run and number: there is one attempt of a step at a time."""


Serial = tuple[int, int]
"""When the step was scheduled, and the attempt. The former counts where the id of a run was cleaned up: then another
run of the same number may begin, and have a step of the same number."""


class Taken(Struct):
    """The attempt of a step that is under way here. `ended`: its answer is on its way."""

    serial: Serial
    offset: int
    ended: bool = False


class QueueReader:
    """Takes the attempts of one partition of the queue from when `run` begins until `stop`."""

    def __init__(
        self,
        queue: str,
        partition: int,
        *,
        app: Registry,
        log: Log,
        membership: QueueMembership,
        executor: Executor,
        clock: Clock,
        slots: asyncio.Semaphore,
        limits: Limits,
    ) -> None:
        self.queue = queue
        self.topic = steps_topic(queue)
        self.partition = partition
        self.app = app
        self.log = log
        self.membership = membership
        self.executor = executor
        self.clock = clock
        self.slots = slots
        self.limits = limits
        self.committed = 0
        self._trim_at = 0
        self._next = 0
        self._open: dict[int, None] = {}
        """Offsets taken and not done with, in order; each has a slot."""
        self._taken: dict[StepKey, Taken] = {}
        self._answered: OrderedDict[tuple[StepKey, Serial], None] = OrderedDict()
        self._answering: set[asyncio.Task[None]] = set()
        self._moved = asyncio.Event()
        self._to_commit = asyncio.Event()
        self._stop = asyncio.Event()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def below(self) -> int:
        """Everything below this offset is done with."""
        return next(iter(self._open), self._next)

    @property
    def window(self) -> int:
        """How far it has taken beyond the oldest that is not done with; at most `queue_window_max`."""
        return self._next - self.below

    @property
    def under_way(self) -> int:
        """Attempts that are taken and not done with; each has a slot."""
        return len(self._open)

    @property
    def remembered(self) -> int:
        """Answered attempts that it would know if they came again; at most `queue_window_max`."""
        return len(self._answered)

    def stop(self) -> None:
        """Take nothing more; what is under way may end if it is quick about it."""
        self._stop.set()

    async def run(self) -> None:
        """Take and answer until stopped. Raises only what is wrong here: a log that is away is asked again."""
        loop = asyncio.get_running_loop()
        reading = loop.create_task(self._read(), name=f"read-{self.queue}-p{self.partition}")
        committing = loop.create_task(self._commit_often(), name=f"commit-{self.queue}-p{self.partition}")
        stopping = loop.create_task(self._stop.wait())
        try:
            running = (reading, committing, self._failed)
            await asyncio.wait((*running, stopping), return_when=asyncio.FIRST_COMPLETED)
            for future in running:
                if future.done():
                    future.result()
            await end(reading)
            await self._drain()
            await end(committing)
            await self._commit()
        except Unavailable as error:
            log_.warning("queue %s, partition %d: %s; others do the rest again", self.queue, self.partition, error)
        finally:
            await end(reading, committing, stopping)
            self._drop()

    async def _drain(self) -> None:
        """Let end what ends soon: begun again elsewhere it would be done twice."""
        try:
            async with asyncio.timeout(self.limits.stop_seconds):
                while self._open:
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            log_.warning(
                "queue %s, partition %d: %d attempts are cut off, and run again by whoever takes it over",
                self.queue,
                self.partition,
                len(self._open),
            )

    def _drop(self) -> None:
        self.executor.drop(self)
        for task in self._answering:
            task.cancel()
        for _ in self._open:
            self.slots.release()
        self._open.clear()

    # -- taking ------------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        self.committed = self._next = await self._insist(lambda: self.membership.committed(self.partition))
        while True:
            await self._insist(self._follow)
            if self._stop.is_set():
                return
            raise Unavailable(f"{self.log.app}.{self.topic} ended: the log was closed")

    async def _follow(self) -> None:
        follow = self.log.follow(self.topic, self.partition, self._next, limit=self.limits.queue_read_max)
        async for records in follow:
            for record in records:
                while self.window >= self.limits.queue_window_max:
                    self._moved.clear()
                    await self._moved.wait()
                await self.slots.acquire()
                self._take(record)

    def _take(self, record: Record) -> None:
        """Begin the attempt, or see that it is none, or not to be run again. A slot is held for it."""
        offset = record.offset
        self._open[offset] = None
        self._next = offset + 1
        try:
            task, call, known = read_task(record.value, self.app)
        except (ValueError, InvalidArguments, RecursionError) as error:
            self._send(self._letter(record, str(error)), partial(self._close, offset))
            return
        key = (task.workflow_id, task.run, task.number)
        under_way = self._taken.get(key)
        serial = (task.scheduled_at, task.attempt)
        if (key, serial) in self._answered or (under_way is not None and under_way.serial >= serial):
            self._close(offset)  # derived again by a new owner: it is answered, or will be
            return
        if under_way is not None and not under_way.ended:
            # Somebody else has answered it, else there were no next one.
            self.executor.cancel(self, *key)
            self._close(under_way.offset)
        self._begin(task, call, known, key, offset)

    def _begin(self, task: StepTask, call: StepCall, known: bool, key: StepKey, offset: int) -> None:
        taken = self._taken[key] = Taken((task.scheduled_at, task.attempt), offset)
        attempt = Attempt(
            owner=self,
            info=StepInfo(
                workflow_id=task.workflow_id, run=task.run, step=task.name, number=task.number, attempt=task.attempt
            ),
            call=call,
            args=task.args,
            scheduled_at=task.scheduled_at,
            at_most_once=False,
            report=partial(self._report, task, key, taken),
        )
        if known:
            self.executor.start(attempt)
            return
        error = StreamflowError(
            f"step {task.step} of run {task.workflow_id} is on queue {self.queue}, and the app of the worker that "
            f"took it has no such step: start the workers of the queue with the app's current code"
        )
        log_.error("%s", error)
        self.executor.refuse(attempt, error)

    # -- answering ---------------------------------------------------------------------------------------------------

    def _report(self, task: StepTask, key: StepKey, taken: Taken, info: StepInfo, outcome: AttemptOutcome) -> None:
        """The executor's outcome of an attempt: the partition is done with it once the answer is there."""
        taken.ended = True
        answer = answer_to(task, outcome, now=self.clock.now_ms(), partitions=self.log.partitions)
        self._send(answer, partial(self._answered_now, key, taken))

    def _answered_now(self, key: StepKey, taken: Taken) -> None:
        if self._taken.get(key) is taken:
            del self._taken[key]
        self._answered[key, taken.serial] = None
        if len(self._answered) > self.limits.queue_window_max:
            self._answered.popitem(last=False)
        self._close(taken.offset)

    def _send(self, record: Outgoing, then: Callable[[], None]) -> None:
        """Publish, again until it is there, and only then go on."""

        async def send() -> None:
            await self._insist(lambda: self.log.publish([record]))
            then()

        task = asyncio.get_running_loop().create_task(send(), name=f"answer-{self.queue}-p{self.partition}")
        self._answering.add(task)
        task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)
            self._failed.exception()  # `run` raises it, unless it is stopping

    def _letter(self, record: Record, reason: str) -> Outgoing:
        DEAD_LETTERS.inc()
        where = "queue %s, partition %d, offset %d goes to the dead letters: %s"
        log_.warning(where, self.queue, self.partition, record.offset, reason[:500])
        return dead_letter(
            DeadLetter(
                topic=f"{self.log.app}.{self.topic}",
                partition=self.partition,
                offset=record.offset,
                key=record.key,
                value=record.value,
                reason=reason,
                at=self.clock.now_ms(),
            )
        )

    def _close(self, offset: int) -> None:
        """The partition is done with the record."""
        if offset not in self._open:
            return  # dropped meanwhile
        del self._open[offset]
        self.slots.release()
        self._moved.set()
        self._to_commit.set()

    # -- committing --------------------------------------------------------------------------------------------------

    async def _commit_often(self) -> None:
        """One commit at a time: what is done with during one goes with the next."""
        while True:
            await self._to_commit.wait()
            self._to_commit.clear()
            await self._insist(self._commit)
            if self.clock.now_ms() >= self._trim_at:
                self._trim_at = self.clock.now_ms() + round(self.limits.trim_seconds * 1000)
                await self._trim()

    async def _trim(self) -> None:
        """Let go what is done with and old. What fails is tried again when it is due the next time."""
        old_ms = self.clock.now_ms() - round(self.limits.attempts_kept_seconds * 1000)
        try:
            before = min(self.committed, await self.log.offset_at(self.topic, self.partition, old_ms))
            if before > await self.log.start_offset(self.topic, self.partition):
                await self.log.trim(self.topic, self.partition, before)
        except (Unavailable, InvalidArguments) as error:  # the latter where a cluster grants no deletion of records
            log_.warning("queue %s, partition %d is not trimmed now: %s", self.queue, self.partition, error)

    async def _commit(self) -> None:
        below = self.below
        if below > self.committed:
            await self.membership.commit(self.partition, below)
            self.committed = below

    async def _insist(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """Ask the log until it answers."""
        backoff = BACKOFF_SECONDS
        while True:
            try:
                return await ask()
            except Unavailable as error:
                log_.warning("queue %s, partition %d: %s; trying again", self.queue, self.partition, error)
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, BACKOFF_SECONDS_MAX)


class QueueService:
    """A member of one queue's group. `start`, then `stop`; `ended` is done when it ends by itself, with the reason."""

    def __init__(
        self,
        queue: str,
        *,
        app: Registry,
        log: Log,
        owner: str,
        executor: Executor,
        clock: Clock,
        slots: asyncio.Semaphore,
        limits: Limits,
    ) -> None:
        self.queue = queue
        self.owner = owner
        self.log = log
        self.limits = limits
        self.readers: dict[int, QueueReader] = {}
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._make = partial(
            QueueReader, queue, app=app, log=log, executor=executor, clock=clock, slots=slots, limits=limits
        )
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._membership: QueueMembership | None = None
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Join the group and begin to take attempts."""
        self._membership = await self.log.join_queue(self.queue, self.owner)
        self._following = asyncio.get_running_loop().create_task(
            self._follow(self._membership), name=f"queue-{self.queue}"
        )
        self._following.add_done_callback(self._followed)

    async def stop(self) -> None:
        """Take nothing more, let end what ends soon, and leave the group: the rest is for the others."""
        if self._following is not None:
            await end(self._following)
        await asyncio.gather(*(self._stop_reader(partition) for partition in self._tasks))
        if self._membership is not None:
            await self._membership.leave()
        if not self.ended.done():
            self.ended.set_result(None)

    def _followed(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._fail(task.exception() or Unavailable(f"queue {self.queue}: the log was closed"))

    def _fail(self, error: BaseException) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)
            self.ended.exception()  # whoever waits sees it; without a waiter it must not be reported as lost

    async def _follow(self, membership: QueueMembership) -> None:
        async for wanted in membership.assignments():
            for partition in sorted(wanted - self._tasks.keys()):
                self._tasks[partition] = asyncio.get_running_loop().create_task(
                    self._serve(membership, partition), name=f"queue-{self.queue}-p{partition}"
                )
            gone = self._tasks.keys() - wanted
            await asyncio.gather(*(self._give_up(membership, partition) for partition in sorted(gone)))

    async def _give_up(self, membership: QueueMembership, partition: int) -> None:
        await self._stop_reader(partition)
        del self._tasks[partition]
        backoff = BACKOFF_SECONDS
        while True:
            try:
                await membership.release(partition)
                return
            except Unavailable as error:
                log_.warning("queue %s: partition %d cannot be released: %s", self.queue, partition, error)
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, BACKOFF_SECONDS_MAX)

    async def _stop_reader(self, partition: int) -> None:
        task = self._tasks[partition]
        if partition in self.readers:
            self.readers[partition].stop()
            await asyncio.wait((task,), timeout=self.limits.stop_seconds + 1)
        await end(task)

    async def _serve(self, membership: QueueMembership, partition: int) -> None:
        """Read the partition, beginning again after failures, until it is given up."""
        backoff = BACKOFF_SECONDS
        while True:
            reader = self.readers[partition] = self._make(partition, membership=membership)
            try:
                await reader.run()
                return
            except CorruptLog as error:
                log_.exception("queue %s: partition %d cannot be served", self.queue, partition)
                self._fail(error)
                return
            except Exception as error:  # a broken invariant: said loudly, and begun again from what is committed
                log_.exception("queue %s: partition %d failed: %s; beginning again", self.queue, partition, error)
            finally:
                self.readers.pop(partition, None)
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, BACKOFF_SECONDS_MAX)
