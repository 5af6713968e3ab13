"""The processor: the loop of one owned partition.

    RESTORING ──▶ CLAIMING ──▶ ACTIVE ──▶ STOPPING ──▶ STOPPED
        └────────────┴───────────┴────────────────────────▲ (failed: fenced, unavailable)

Rules of this file:

- Durable first, then effects: nothing that a turn implies happens before its append is acknowledged; then its effects
  happen in the order of the turns.
- Any append or publish that fails drops the processor whole. The worker makes a new one, which restores from the log;
  in-memory state is never patched.
- Deciding is one synchronous pass over all that has arrived (`_pass`), scheduled on the event loop when there is
  something to decide. Passes run ahead of the log by at most `decided_turns_unacknowledged_max` turns.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from enum import StrEnum
from functools import partial
from typing import Any, Final

from msgspec import Struct

from streamflow.codec.avro import decode_timer, encode_history
from streamflow.codec.registry import Schemas
from streamflow.config import Limits
from streamflow.core.effects import (
    CancelAttempt,
    DropTimer,
    Effect,
    PublishStatus,
    RecordStart,
    StartAttempt,
    TimerRecord,
)
from streamflow.core.events import Claim, StepStarted, Turn
from streamflow.core.inputs import CodeFactory
from streamflow.core.partition import Decided, DecidedTurn, Partition
from streamflow.errors import Fenced, Unavailable
from streamflow.logs.base import COMMANDS, STATUS, Log, Outgoing, Record
from streamflow.store.base import Store
from streamflow.worker.clock import Clock
from streamflow.worker.consumed import Unsaid, consumed_record
from streamflow.worker.ending import end, error_of
from streamflow.worker.executor import Attempt, AttemptOutcome, Executor
from streamflow.worker.intake import Intake
from streamflow.worker.observing import Observer
from streamflow.worker.outbox import outgoing, published_status
from streamflow.worker.records import snapshot_records, turn_records
from streamflow.worker.rederive import publish_again
from streamflow.worker.restore import Restorer
from streamflow.worker.state import Copied, Entry, PartitionRow, PartitionState, change_of
from streamflow.worker.statuses import Statuses, statuses_since
from streamflow.worker.strays import Strays
from streamflow.worker.trimming import Snapshot, Trimmer
from streamflow.workflow.code import RunCode
from streamflow.workflow.loop import many_drains
from streamflow.workflow.stepinfo import StepInfo

log_ = logging.getLogger("streamflow.worker")

CLAIMS_MAX: Final = 5
"""Claims that may be lost to another owner in a row before the processor gives up: the group settles meanwhile."""
FIRED_TOGETHER_MS: Final = 250
"""Timers handed over at once are taken in as of one instant for so long; then it is the log that holds them up."""


class ProcessorState(StrEnum):
    """Where a processor stands."""

    RESTORING = "restoring"
    CLAIMING = "claiming"
    ACTIVE = "active"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Batch(Struct):
    """What one pass decided, until it is durable. `end_offset` is the history offset behind it."""

    begun_at: float
    end_offset: int
    row: PartitionRow
    entries: list[Entry]
    turns: list[DecidedTurn]
    answers: list[Outgoing]


class Processor:
    """Owns one partition from restore to stop. `run` returns when stopped, and raises what it failed of."""

    def __init__(
        self,
        *,
        partition: int,
        owner: str,
        log: Log,
        store: Store,
        executor: Executor,
        clock: Clock,
        code_of: Callable[[str], CodeFactory | None],
        limits: Limits,
        timeout_of: Callable[[str], int | None] = lambda workflow: None,
        retention_of: Callable[[str], int | None] = lambda workflow: None,
        schemas: Schemas | None = None,
    ) -> None:
        self.partition = partition
        self.owner = owner
        self.log = log
        self.state = PartitionState(store)
        self.executor = executor
        self.clock = clock
        self.code_of = code_of
        self.timeout_of = timeout_of
        self.retention_of = retention_of
        self.limits = limits
        self.status = ProcessorState.RESTORING
        self.core = Partition(self, code_of, term=0, consumed=0)
        self.intake = Intake(log, partition, self.state, clock, schemas)
        self.trimmer = Trimmer(self)
        self.strays = Strays(self)
        self.observer = Observer(code_of)
        self._status_schema = None if schemas is None else schemas.ids.get(STATUS)
        self.schemas = schemas
        self._statuses_from: int | None = None
        self._loop = asyncio.get_running_loop()
        # What is decided must not see the context of the step that happened to wake the processor.
        self._context = contextvars.copy_context()
        self._failed: asyncio.Future[None] = self._loop.create_future()
        self._stop = asyncio.Event()
        self._room = asyncio.Event()
        self.fires = asyncio.Event()  # set from recovery to the stop
        self._idle = asyncio.Event()
        self._scheduled = False
        self._arrived_at = 0
        self._next_offset = 0
        self._batches: deque[Batch] = deque()
        self.turns_in_flight = 0  # decided, and not known to be durable
        self.publishes = 0  # under way
        self._outgoing_in_flight = 0
        self._unpublished = 0
        self.published = 0  # everything derived from the history below is published
        self._staged = 0
        self._unsaid = Unsaid(limits.consumed_unsaid_max)
        self._unacknowledged: dict[str, list[Turn]] = {}
        self._answers: list[Outgoing] = []
        self._answers_held = 0  # which wait for an append to become durable

    # -- lifecycle ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Restore, claim, and process until `stop` or a failure."""
        stopping = self._loop.create_task(self._stop.wait(), name=f"stop-p{self.partition}")
        beside: list[asyncio.Task[None]] = []
        try:
            if not await self._until(stopping, self._take_over(), name="restore"):
                return
            self.status = ProcessorState.ACTIVE
            self.observer.active()
            statuses = Statuses(self, self._statuses_from)
            for name, each in (("trimming", self.trimmer), ("statuses", statuses), ("strays", self.strays)):
                beside.append(self._loop.create_task(each.run(), name=f"{name}-p{self.partition}"))
                beside[-1].add_done_callback(self._beside_ended)
            if await self._until(stopping, self._recover_and_consume(), name="commands"):
                raise Unavailable(f"partition {self.partition}: {self.log.app}.{COMMANDS} ended: the log was closed")
            await end(*beside)
            await self._finish()
        finally:
            self.status = ProcessorState.STOPPED
            self.executor.drop(self)
            self.core.close()
            if self._failed.done():
                self._failed.exception()
            await end(stopping, *beside)

    async def _until(self, stopping: asyncio.Task[Any], work: Coroutine[Any, Any, None], *, name: str) -> bool:
        """Do the work until it ends (True), the processor is to stop (False), or something fails."""
        working = self._loop.create_task(work, name=f"{name}-p{self.partition}")
        try:
            await asyncio.wait((working, stopping, self._failed), return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
            if working.done():
                working.result()
            return working.done()
        finally:
            await end(working)

    def stop(self) -> None:
        """Ask the processor to finish what is under way and stop."""
        self._stop.set()

    async def _take_over(self) -> None:
        """Restore to the end of the history and claim it there; the state then equals the log up to the claim."""
        for _ in range(CLAIMS_MAX):
            self.status = ProcessorState.RESTORING
            restorer = Restorer(self.state, self.partition)
            await restorer.run(self.log)
            restorer.parts.drop()
            self.status = ProcessorState.CLAIMING
            self.clock.advance_to(restorer.at)
            claim = Claim(term=restorer.rule.term + 1, owner=self.owner, at=self.clock.now_ms())
            try:
                await self.log.append(self.partition, restorer.offset, [(b"", encode_history(claim))])
            except Fenced:
                continue  # another owner wrote meanwhile: read what it wrote, and try above its term
            self._next_offset = restorer.offset + 1
            self.core = Partition(
                self,
                self.code_of,
                term=claim.term,
                consumed=restorer.consumed,
                timeout_of=self.timeout_of,
                retention_of=self.retention_of,
            )
            self.core.at = max(restorer.at, claim.at)
            self.core.seq = 0
            self._unsaid.said(restorer.consumed)
            self.state.apply([], self._row(claim.term, 0, restorer.consumed), applied_offset=self._next_offset)
            await self._publish_again()
            return
        raise Fenced(f"partition {self.partition}: {CLAIMS_MAX} claims of {self.owner} were lost to other owners")

    def _row(self, term: int, seq: int, consumed: int) -> PartitionRow:
        return PartitionRow(term, seq, True, consumed, self.core.at)

    async def _publish_again(self) -> None:
        """Derive again what the last owner may not have published."""
        self._statuses_from = await statuses_since(self.log, self.partition, self.clock.now_ms(), self.limits)
        self.published = await publish_again(self.log, self.partition, self.state, self._next_offset, self._outgoing)

    def _outgoing(self, effects: Iterable[Effect], workflow_id: str) -> list[Outgoing]:
        return outgoing(effects, self.partition, workflow_id, self.log.partitions, status_schema=self._status_schema)

    @property
    def durably_consumed(self) -> int:
        """The offset behind the last command whose turn is durable."""
        return self.state.row().consumed

    async def _recover_and_consume(self) -> None:
        """First the runs that have attempts to run again, or code that did not fit; only then what is new for them."""
        found = self.state.needing_attention()
        for start in range(0, len(found), self.limits.pass_inputs_max):
            some = found[start : start + self.limits.pass_inputs_max]
            self.observer.found(map(self.state.status, some))
            for workflow_id in some:
                self.core.recover(workflow_id)
            self._staged = 1
            self._wake()
            await self._has_room()
        self.fires.set()
        await self._consume()

    async def _finish(self) -> None:
        """Graceful stop: what is decided becomes durable and visible; attempts under way are left to the next owner."""
        self.status = ProcessorState.STOPPING
        self.fires.clear()
        self.executor.drop(self)
        self._pass()
        try:
            async with asyncio.timeout(self.limits.stop_seconds):
                while (self._batches or self.publishes) and not self._failed.done():
                    self._idle.clear()
                    waiter = self._loop.create_task(self._idle.wait())
                    try:
                        await asyncio.wait((waiter, self._failed), return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        await end(waiter)
        except TimeoutError:
            log_.warning("partition %d: stopped with appends still under way; they are read back later", self.partition)

    def _fail(self, error: BaseException) -> None:
        if not self._failed.done() and self.status is not ProcessorState.STOPPED:
            self._failed.set_exception(error)

    def _beside_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log_.error("partition %d: %s failed", self.partition, task.get_name(), exc_info=error)
            self._fail(error)

    # -- intake ------------------------------------------------------------------------------------------------------

    async def _consume(self) -> None:
        """Read commands and stage them, as long as there is room."""
        follow = self.log.follow(COMMANDS, self.partition, self.core.consumed, limit=self.limits.commands_read_max)
        async for records in follow:
            while records:
                readable = await self.intake.readable(records)
                await self._take(records[:readable])
                records = records[readable:]

    async def _take(self, records: Sequence[Record]) -> None:
        await self._has_room()
        found = self.intake.sort([record for record in records if record.offset >= self.core.next_command])
        if found.elsewhere:
            await self.log.publish(found.elsewhere)  # first: a record may say that they are consumed
            self._unsaid.hurry(records[-1].offset + 1)
        for offset, command in found.commands:
            self.core.command(offset, command)
        self.core.skip(records[-1].offset)
        self._answers += found.answers
        self._staged = len(records)
        self._wake()

    async def fire(self, timers: Sequence[bytes], at: int) -> None:
        """Take in timers, as their topic has them, that were found due at `at` (ms), once there is room for them.

        Those that come too late, while the processor stops, are never taken in: they are the next owner's.
        """
        await self.take_in(list(map(decode_timer, timers)), at)

    async def take_in(self, timers: Sequence[TimerRecord], at: int) -> None:
        """Stage timers. They have one instant, that of their arrival, though no pass takes so many that it is long."""
        for start in range(0, len(timers), self.limits.pass_inputs_max):
            while not self.fires.is_set() or self._is_full():
                await self.fires.wait()
                await self._has_room()
                if start == 0 or self.clock.now_ms() - at > FIRED_TOGETHER_MS:
                    at = self.clock.now_ms()
            some = timers[start : start + self.limits.pass_inputs_max]
            for timer in some:
                self.core.timer(timer)
            self._staged += len(some)
            arrived_at = max(self._arrived_at, at) if self._scheduled else at  # however long it took to read them
            self._wake()
            self._arrived_at = arrived_at

    async def _has_room(self) -> None:
        while self._is_full():
            self._room.clear()
            self.executor.wake_when_room(self._room)
            await self._room.wait()

    def _is_full(self) -> bool:
        return (
            self._staged > 0
            or self.turns_in_flight > self.limits.decided_turns_unacknowledged_max
            or self._outgoing_in_flight + self._answers_held > self.limits.outgoing_records_max
            or self.executor.is_full
        )

    def report(self, info: StepInfo, outcome: AttemptOutcome) -> None:
        """The executor's outcome of an attempt that this processor started."""
        if self.status in (ProcessorState.ACTIVE, ProcessorState.STOPPING):
            self.core.outcome(info.workflow_id, info.run, outcome)
            self._wake()
            self._arrived_at = self.clock.now_ms()  # it ended now, not when the pass was scheduled

    # -- decide ------------------------------------------------------------------------------------------------------

    def turns(self, workflow_id: str) -> list[Turn]:
        """All turns of the run, also those that are not durable yet: what the core replays."""
        return self.state.current_turns(workflow_id) + self._unacknowledged.get(workflow_id, [])

    def _wake(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._arrived_at = self.clock.now_ms()
            self._loop.call_soon(self._pass, context=self._context)

    def _pass(self) -> None:
        """Decide on everything that has arrived, and hand the turns to the log.

        Their instant is that of the arrival: how long the pass itself takes makes no timer late.
        """
        self._scheduled = False
        if self.status not in (ProcessorState.ACTIVE, ProcessorState.STOPPING) or self._failed.done():
            return
        if self.turns_in_flight > self.limits.decided_turns_unacknowledged_max:
            return  # the acknowledgement wakes it
        try:
            self._staged, begun_at = 0, time.perf_counter()
            with many_drains():
                decided = self.core.decide(self._arrived_at)
            self._hand_over(decided)
            self.observer.decided(decided, begun_at)
        except Exception as error:  # a broken invariant must not go on: drop everything, restore from the log
            log_.exception("partition %d: deciding failed", self.partition)
            self._fail(error)
        except BaseException:  # Ctrl-C while code ran: what it has decided is half of a turn, and must never be written
            self._fail(Unavailable(f"partition {self.partition}: interrupted"))
            raise
        if not self._is_full():
            self._room.set()

    def _hand_over(self, decided: Decided) -> None:
        answers, self._answers = self._answers, []
        answers += map(self.intake.bury, decided.dead)
        if decided.dead:
            self._unsaid.hurry(self.core.consumed)
        for workflow_id, effect in decided.answers:
            if type(effect) is not DropTimer or self.strays.may_drop(effect.timer):
                answers += self._outgoing((effect,), workflow_id)
            self._perform_local(workflow_id, (effect,))  # only attempts that run again: their turns are long durable
        self.strays.decided()
        if not decided.turns:
            if answers:
                self._answer_when_durable(answers)
            elif self._unsaid.is_due(self.core.consumed) and not (self.publishes or self._answers_held):
                self._append([(b"", consumed_record(self.core))], [], [], [])
            self._evict()
            return
        records: list[tuple[bytes, bytes]] = []
        entries: list[Entry] = []
        for item in decided.turns:
            turn = item.turn
            key = turn.workflow_id.encode()
            values = turn_records(turn, self.core.seq)
            self.core.seq += len(values)
            whole = values[0] if len(values) == 1 else encode_history(turn)
            offset = self._next_offset + len(records)
            entries.append(change_of(item.run, turn, whole, offset=offset, status=published_status(item.effects)))
            records += [(key, value) for value in values]
            self.observer.turn(item)
            self._unacknowledged.setdefault(turn.workflow_id, []).append(turn)
        self._append(records, entries, decided.turns, answers)

    def _append(
        self,
        records: list[tuple[bytes, bytes]],
        entries: list[Entry],
        turns: list[DecidedTurn],
        answers: list[Outgoing],
    ) -> asyncio.Future[int]:
        future = self.log.append(self.partition, self._next_offset, records)
        self._next_offset += len(records)
        self._unsaid.said(self.core.consumed)
        self.turns_in_flight += max(1, len(turns))
        row = self._row(self.core.term, self.core.seq, self.core.consumed)
        self._answers_held += len(answers)
        self._batches.append(Batch(time.perf_counter(), self._next_offset, row, entries, turns, answers))
        future.add_done_callback(self._acknowledged)
        return future

    def copy_forward(self, snapshots: Sequence[Snapshot]) -> asyncio.Future[int]:
        """Append runs as snapshots; the future is done when they are durable and applied."""
        if self._failed.done():
            raise Unavailable(f"partition {self.partition} has failed, and begins anew")
        records: list[tuple[bytes, bytes]] = []
        entries: list[Entry] = []
        for item in snapshots:
            values = snapshot_records(item, self.core)
            self.core.seq += len(values)
            entries.append(Copied(item.workflow_id, self._next_offset + len(records), item.first_turn))
            records += [(item.workflow_id.encode(), value) for value in values]
        return self._append(records, entries, [], [])

    def under_way(self, workflow_id: str) -> list[Turn]:
        """The run's turns that are appended and not acknowledged yet."""
        return self._unacknowledged.get(workflow_id, [])

    @property
    def outbox_lag(self) -> int:
        """Records that durable turns made for other topics, and that the log has not acknowledged yet."""
        return self._outgoing_in_flight

    def _answer_when_durable(self, answers: list[Outgoing]) -> None:
        """What was answered may rest on turns that are not durable yet: it leaves after them."""
        if self._batches:
            self._batches[-1].answers += answers
            self._answers_held += len(answers)
        else:
            self._publish(answers, None)

    def check_end(self, end_offset: int) -> None:
        """Fail if the history, which ends there, holds records of somebody else."""
        if end_offset > self._next_offset:
            expected = f"expected the history to end at offset {self._next_offset} at most, found {end_offset}"
            self._fail(Fenced(f"partition {self.partition}: {expected}: somebody else has written there"))

    # -- acknowledge -------------------------------------------------------------------------------------------------

    def _acknowledged(self, future: asyncio.Future[int]) -> None:
        """An append is durable: apply it to the store, then perform its effects. Futures come in order of appends."""
        if (error := error_of(future)) is not None:
            self._fail(error)
            return
        if self._failed.done() or self.status is ProcessorState.STOPPED:
            return
        batch = self._batches.popleft()
        self.turns_in_flight -= max(1, len(batch.turns))
        try:
            self.state.apply(batch.entries, batch.row, applied_offset=batch.end_offset)
            self._perform(batch)
        except Exception as broken:  # store or effects are broken: drop everything, restore from the log
            log_.exception("partition %d: applying failed", self.partition)
            self._fail(broken)
            return
        self.observer.appended(batch.turns, batch.begun_at)
        self.trimmer.moved(batch.end_offset)
        self._evict()
        if self.core.has_work or self._answers or self._staged:
            self._wake()
        if not self._is_full():
            self._room.set()
        if not self._batches:
            self._idle.set()

    def _perform(self, batch: Batch) -> None:
        records: list[Outgoing] = []
        self._answers_held -= len(batch.answers)
        for item in batch.turns:
            workflow_id = item.turn.workflow_id
            pending = self._unacknowledged[workflow_id]
            del pending[0]
            if not pending:
                del self._unacknowledged[workflow_id]
            records += self._outgoing(item.effects, workflow_id)
            self._perform_local(workflow_id, item.effects)
        self._publish(records + batch.answers, batch.end_offset)

    def _perform_local(self, workflow_id: str, effects: Iterable[Effect]) -> None:
        # While stopping, attempts are the next owner's: begun here they would only be cut off.
        begins = self.status is not ProcessorState.STOPPING
        for effect in effects:
            match effect:
                case StartAttempt(run=run, number=number, attempt=attempt) if begins:
                    self._start(workflow_id, run, number, attempt)
                case CancelAttempt(run=run, number=number):
                    self.executor.cancel(self, workflow_id, run, number)
                case RecordStart(run=run, number=number, attempt=attempt) if begins:
                    self.core.outcome(workflow_id, run, StepStarted(number=number, attempt=attempt))
                    self._wake()

    def _start(self, workflow_id: str, run: int, number: int, attempt: int) -> None:
        """Run an attempt, unless a later turn has overtaken it: the step cancelled, the run closed."""
        execution = self.core.live.get(workflow_id)
        if execution is None or execution.run.run != run or not isinstance(execution.code, RunCode):
            return
        step = execution.run.step(number)
        call = execution.code.calls.get(number)
        if step is None or call is None or not step.accepts(attempt):
            return
        info = StepInfo(workflow_id=workflow_id, run=run, step=step.name, number=number, attempt=attempt)
        self.executor.start(
            Attempt(
                owner=self,
                info=info,
                call=call,
                args=step.args,
                scheduled_at=step.scheduled_at,
                at_most_once=step.at_most_once,
                report=self.report,
            )
        )

    def _publish(self, records: list[Outgoing], published: int | None) -> None:
        if published is not None:
            self._unpublished += 1
            if not records and self._unpublished < self.limits.published_offset_batches:
                return  # nothing leaves the partition: the offset goes with what leaves it next
            self._unpublished = 0
        elif not records:
            return
        self._send(records, published)

    def publish_status(self, workflow_id: str, status: PublishStatus) -> list[asyncio.Future[None]]:
        """Publish the status of a run as it is, apart from any turn; nothing is under way where that cannot be now."""
        if self._failed.done() or self.status is not ProcessorState.ACTIVE:
            return []
        return [self._send(self._outgoing((status,), workflow_id), None)]

    def publish_offset(self) -> None:
        """Say how far all is published, without waiting for something to publish; nothing may be under way."""
        if self._failed.done():
            raise Unavailable(f"partition {self.partition} has failed, and begins anew")
        self._unpublished = 0
        self._send([], self.state.applied_offset)

    def _send(self, records: list[Outgoing], published: int | None) -> asyncio.Future[None]:
        future = self.log.publish(records, published=None if published is None else (self.partition, published))
        self.publishes += 1
        self._outgoing_in_flight += len(records)
        future.add_done_callback(partial(self._sent, len(records), published))
        return future

    def _sent(self, records: int, published: int | None, future: asyncio.Future[None]) -> None:
        self.publishes -= 1
        self._outgoing_in_flight -= records
        if (error := error_of(future)) is not None:
            self._fail(error)
        if self._failed.done():
            return  # what this one held is published; what one before it held may not be
        self.published = max(self.published, published or 0)
        self.trimmer.moved(self.state.applied_offset)
        if not self._is_full():
            self._room.set()
        if not self.publishes:
            self._idle.set()
            if self._unsaid.is_due(self.core.consumed):
                self._wake()

    def _evict(self) -> None:
        self.core.evict_above(self.limits.live_runs_max, self._unacknowledged)
