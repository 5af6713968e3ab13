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
import logging
from collections import deque
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, Final

from msgspec import Struct

from streamflow.codec.avro import decode_command, decode_history, encode_history
from streamflow.codec.envelope import DecodeError
from streamflow.config import RECORD_BYTES_MAX, Limits
from streamflow.core.commands import Command, Query
from streamflow.core.effects import (
    CancelAttempt,
    DeadLetter,
    Effect,
    Forward,
    PublishStatus,
    RecordStart,
    Reply,
    SendReply,
    StartAttempt,
)
from streamflow.core.events import Claim, Event, RunBlocked, StepStarted, Turn
from streamflow.core.machines.run import RunState
from streamflow.core.partition import CodeFactory, Decided, DecidedTurn, Partition, effects_since
from streamflow.core.reading import split
from streamflow.errors import ErrorInfo, Fenced, RequestError, Unavailable
from streamflow.ids import ID_BYTES_MAX, partition_of
from streamflow.log.base import COMMANDS, HISTORY, Log, Outgoing, Record
from streamflow.metrics import DEAD_LETTERS, RUNS_BLOCKED
from streamflow.projections.queries import answer
from streamflow.store.base import Store
from streamflow.worker.clock import Clock
from streamflow.worker.executor import Attempt, AttemptOutcome, Executor
from streamflow.worker.outbox import dead_letter, outgoing
from streamflow.worker.restore import READ_LIMIT, Restorer
from streamflow.worker.state import Change, PartitionRow, PartitionState, change_of
from streamflow.workflow.code import RunCode
from streamflow.workflow.stepinfo import StepInfo

log_ = logging.getLogger("streamflow.worker")

CLAIMS_MAX: Final = 5
"""Claims that may be lost to another owner in a row before the processor gives up: the group settles meanwhile."""
TURN_OVERHEAD_BYTES: Final = 2_000
"""What a record holds beside the events: ids, framing, command ids."""
EVICT_LOOK_MAX: Final = 32
"""Runs looked at when one must leave memory; the ones used longest ago are mostly free to go."""
REDERIVED_RUNS_PUBLISHED_AT_ONCE: Final = 500


class ProcessorState(StrEnum):
    """Where a processor stands."""

    RESTORING = "restoring"
    CLAIMING = "claiming"
    ACTIVE = "active"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Batch(Struct):
    """What one pass decided, until it is durable. `end_offset` is the history offset behind it."""

    end_offset: int
    row: PartitionRow
    changes: list[Change]
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
    ) -> None:
        self.partition = partition
        self.owner = owner
        self.log = log
        self.state = PartitionState(store)
        self.executor = executor
        self.clock = clock
        self.code_of = code_of
        self.limits = limits
        self.status = ProcessorState.RESTORING
        self.core = Partition(self, code_of, term=0, consumed=0)
        self._loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[None] = self._loop.create_future()
        self._stop = asyncio.Event()
        self._room = asyncio.Event()
        self._idle = asyncio.Event()
        self._scheduled = False
        self._next_offset = 0
        self._batches: deque[Batch] = deque()
        self._turns_in_flight = 0
        self._publishes = 0
        self._unacknowledged: dict[str, list[Turn]] = {}
        self._answers: list[Outgoing] = []

    # -- lifecycle ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Restore, claim, and process until `stop` or a failure."""
        try:
            await self._take_over()
            self.status = ProcessorState.ACTIVE
            self._recover()
            consumer = self._loop.create_task(self._consume(), name=f"commands-p{self.partition}")
            stopping = self._loop.create_task(self._stop.wait(), name=f"stop-p{self.partition}")
            try:
                await asyncio.wait((consumer, stopping, self._failed), return_when=asyncio.FIRST_COMPLETED)
            finally:
                await _end(consumer, stopping)
            if self._failed.done():
                self._failed.result()
            if consumer.done() and not consumer.cancelled():
                consumer.result()
            await self._finish()
        finally:
            self.status = ProcessorState.STOPPED
            self.executor.drop(self)
            self.core.close()
            if self._failed.done():
                self._failed.exception()

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
            self.state.apply([], self._row(claim.term, 0, restorer.consumed), applied_offset=self._next_offset)
            self.core = Partition(self, self.code_of, term=claim.term, consumed=restorer.consumed)
            self.core.at = max(restorer.at, claim.at)
            self.core.seq = 0
            await self._publish_again()
            return
        raise Fenced(f"partition {self.partition}: {CLAIMS_MAX} claims of {self.owner} were lost to other owners")

    def _row(self, term: int, seq: int, consumed: int) -> PartitionRow:
        return PartitionRow(term, seq, True, consumed, self.core.at)

    async def _publish_again(self) -> None:
        """Derive again what the last owner may not have published."""
        offset = await self.log.published_offset(self.partition)
        offset = max(offset, await self.log.start_offset(HISTORY, self.partition))
        first_turns: dict[str, int] = {}
        while offset < self._next_offset:
            records = await self.log.read(HISTORY, self.partition, offset, limit=READ_LIMIT)
            if not records:
                break
            offset = records[-1].offset + 1
            for record in records:
                decoded = decode_history(record.value or b"")
                if isinstance(decoded, Turn):
                    first_turns.setdefault(decoded.workflow_id, decoded.turn)
        pending: list[Outgoing] = []
        for count, (workflow_id, first) in enumerate(first_turns.items(), start=1):
            pending += self._derived(workflow_id, first)
            if count % REDERIVED_RUNS_PUBLISHED_AT_ONCE == 0:
                await self.log.publish(pending)
                pending = []
        await self.log.publish(pending, published=(self.partition, self._next_offset))

    def _derived(self, workflow_id: str, first: int) -> list[Outgoing]:
        turns = self.state.turns(workflow_id)
        effects: list[Effect]
        if turns:
            run, effects = effects_since(turns, first)
            effects.append(PublishStatus(run.status()))
        else:
            effects = [PublishStatus(None)]
        return outgoing(effects, self.partition, workflow_id, self.log.partitions)

    def _recover(self) -> None:
        """Look at the runs that have attempts to run again, or code that did not fit."""
        for workflow_id in self.state.needing_attention():
            self.core.recover(workflow_id)
        self._wake()

    async def _finish(self) -> None:
        """Graceful stop: what is decided becomes durable and visible; attempts under way are left to the next owner."""
        self.status = ProcessorState.STOPPING
        self.executor.drop(self)
        self._pass()
        try:
            async with asyncio.timeout(self.limits.stop_seconds):
                while (self._batches or self._publishes) and not self._failed.done():
                    self._idle.clear()
                    waiter = self._loop.create_task(self._idle.wait())
                    await asyncio.wait((waiter, self._failed), return_when=asyncio.FIRST_COMPLETED)
                    await _end(waiter)
        except TimeoutError:
            log_.warning("partition %d: stopped with appends still under way; they are read back later", self.partition)

    def _fail(self, error: BaseException) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    # -- intake ------------------------------------------------------------------------------------------------------

    async def _consume(self) -> None:
        """Read commands and stage them, as long as there is room."""
        follow = self.log.follow(COMMANDS, self.partition, self.core.consumed, limit=self.limits.commands_read_max)
        async for records in follow:
            for record in records:
                self._stage(record)
            self._wake()
            while self._is_full():
                self._room.clear()
                await self._room.wait()

    def _is_full(self) -> bool:
        return (
            self._turns_in_flight > self.limits.decided_turns_unacknowledged_max
            or len(self.executor.waiting) > self.limits.steps_waiting_max
        )

    def _stage(self, record: Record) -> None:
        if record.offset < self.core.next_command:
            return
        try:
            if len(record.value or b"") > RECORD_BYTES_MAX:
                raise DecodeError(f"the command has {len(record.value or b''):,} bytes, at most {RECORD_BYTES_MAX:,} are taken")
            command = decode_command(record.value or b"")
            if not 1 <= len(command.workflow_id.encode()) <= ID_BYTES_MAX and not isinstance(command.body, Query):
                raise DecodeError(f"workflow_id must have 1 to {ID_BYTES_MAX} bytes, found {len(command.workflow_id)}")
        except DecodeError as error:
            self._bury(record.offset, record.key, record.value, str(error))
            self.core.skip(record.offset)
            return
        if isinstance(command.body, Query):
            self._answers += self._answer(command, command.body)
            self.core.skip(record.offset)
            return
        home = partition_of(command.workflow_id, self.log.partitions)
        if home != self.partition:
            effects: list[Effect] = [Forward(home, command)]
            self._answers += outgoing(effects, self.partition, command.workflow_id, self.log.partitions)
            self.core.skip(record.offset)
            return
        self.core.command(record.offset, command)

    def _bury(self, offset: int, key: bytes, value: bytes | None, reason: str) -> None:
        DEAD_LETTERS.inc()
        log_.warning("partition %d, command at offset %d goes to the dead letters: %s", self.partition, offset, reason)
        letter = DeadLetter(
            topic=f"{self.log.app}.{COMMANDS}",
            partition=self.partition,
            offset=offset,
            key=key,
            value=None if value is not None and len(value) > RECORD_BYTES_MAX - TURN_OVERHEAD_BYTES else value,
            reason=reason,
            at=self.clock.now_ms(),
        )
        self._answers.append(dead_letter(letter))

    def _answer(self, command: Command, query: Query) -> list[Outgoing]:
        """Answer a query from the durable state."""
        if command.reply_to is None:
            return []
        value: bytes | None = None
        error: ErrorInfo | None = None
        try:
            value = answer(query, command.workflow_id, self.state)
        except RequestError as refused:
            error = ErrorInfo(type=type(refused).__name__, message=str(refused))
        reply = Reply(
            command_id=command.command_id,
            workflow_id=command.workflow_id,
            accepted=error is None,
            error=error,
            value=value,
        )
        effects: list[Effect] = [SendReply(command.reply_to, reply)]
        return outgoing(effects, self.partition, command.workflow_id, self.log.partitions)

    def report(self, info: StepInfo, outcome: AttemptOutcome) -> None:
        """The executor's outcome of an attempt that this processor started."""
        if self.status in (ProcessorState.ACTIVE, ProcessorState.STOPPING):
            self.core.outcome(info.workflow_id, info.run, outcome)
            self._wake()

    # -- decide ------------------------------------------------------------------------------------------------------

    def turns(self, workflow_id: str) -> list[Turn]:
        """All turns of the run, also those that are not durable yet: what the core replays."""
        return self.state.current_turns(workflow_id) + self._unacknowledged.get(workflow_id, [])

    def _wake(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._pass)

    def _pass(self) -> None:
        """Decide on everything that has arrived, and hand the turns to the log."""
        self._scheduled = False
        if self.status not in (ProcessorState.ACTIVE, ProcessorState.STOPPING) or self._failed.done():
            return
        if self._turns_in_flight > self.limits.decided_turns_unacknowledged_max:
            return  # the acknowledgement wakes it
        try:
            decided = self.core.decide(self.clock.now_ms())
            self._hand_over(decided)
        except Exception as error:  # a broken invariant must not go on: drop everything, restore from the log
            log_.exception("partition %d: deciding failed", self.partition)
            self._fail(error)

    def _hand_over(self, decided: Decided) -> None:
        answers, self._answers = self._answers, []
        for dead in decided.dead:
            self._bury(dead.offset, dead.command.workflow_id.encode(), None, dead.reason)
        answers += self._answers
        self._answers = []
        for workflow_id, effect in decided.answers:
            answers += outgoing((effect,), self.partition, workflow_id, self.log.partitions)
            self._perform_local(workflow_id, (effect,))  # only attempts that run again: their turns are long durable
        if not decided.turns:
            if answers:
                self._answer_when_durable(answers)
            return
        records: list[tuple[bytes, bytes]] = []
        changes: list[Change] = []
        for item in decided.turns:
            turn = item.turn
            key = turn.workflow_id.encode()
            values = self._encode(turn)
            records += [(key, value) for value in values]
            whole = values[0] if len(values) == 1 else encode_history(turn)
            changes.append(change_of(item.run, turn, whole))
            if item.run.state is RunState.BLOCKED and isinstance(turn.events[-1], RunBlocked):
                RUNS_BLOCKED.inc()
                log_.error("run %s is blocked: %s", turn.workflow_id, turn.events[-1].error.message)
            self._unacknowledged.setdefault(turn.workflow_id, []).append(turn)
        future = self.log.append(self.partition, self._next_offset, records)
        self._next_offset += len(records)
        self._turns_in_flight += len(decided.turns)
        row = self._row(self.core.term, self.core.seq, self.core.consumed)
        self._batches.append(Batch(self._next_offset, row, changes, decided.turns, answers))
        future.add_done_callback(self._acknowledged)

    def _answer_when_durable(self, answers: list[Outgoing]) -> None:
        """What was answered may rest on turns that are not durable yet: it leaves after them."""
        if self._batches:
            self._batches[-1].answers += answers
        else:
            self._publish(answers, None)

    def _encode(self, turn: Turn) -> list[bytes]:
        """Give the turn its seq and encode it, in parts where it is too large for one record."""
        self.core.seq += 1
        turn.seq = self.core.seq
        value = encode_history(turn)
        if len(value) <= RECORD_BYTES_MAX:
            return [value]
        sizes = [_size(event) for event in turn.events]
        parts = split(turn, sizes, bytes_max=RECORD_BYTES_MAX - TURN_OVERHEAD_BYTES)
        self.core.seq += len(parts) - 1
        turn.seq = self.core.seq
        return [encode_history(part) for part in parts]

    # -- acknowledge -------------------------------------------------------------------------------------------------

    def _acknowledged(self, future: asyncio.Future[int]) -> None:
        """An append is durable: apply it to the store, then perform its effects. Futures come in the order of appends."""
        if future.cancelled() or future.exception() is not None:
            self._fail(future.exception() or Unavailable(f"partition {self.partition}: the append was cancelled"))
            return
        if self._failed.done() or self.status is ProcessorState.STOPPED:
            return
        batch = self._batches.popleft()
        self._turns_in_flight -= len(batch.turns)
        try:
            self.state.apply(batch.changes, batch.row, applied_offset=batch.end_offset)
            self._perform(batch)
        except Exception as error:  # store or effects are broken: drop everything, restore from the log
            log_.exception("partition %d: applying failed", self.partition)
            self._fail(error)
            return
        self._evict()
        if self.core.has_work:
            self._wake()
        if not self._is_full():
            self._room.set()
        if not self._batches:
            self._idle.set()

    def _perform(self, batch: Batch) -> None:
        records: list[Outgoing] = []
        for item in batch.turns:
            workflow_id = item.turn.workflow_id
            pending = self._unacknowledged[workflow_id]
            del pending[0]
            if not pending:
                del self._unacknowledged[workflow_id]
            records += outgoing(item.effects, self.partition, workflow_id, self.log.partitions)
            self._perform_local(workflow_id, item.effects)
        self._publish(records + batch.answers, batch.end_offset)

    def _perform_local(self, workflow_id: str, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case StartAttempt(number=number, attempt=attempt):
                    self._start(workflow_id, number, attempt)
                case CancelAttempt(number=number):
                    self.executor.cancel(self, workflow_id, number)
                case RecordStart(number=number, attempt=attempt):
                    execution = self.core.live.get(workflow_id)
                    if execution is not None:
                        self.core.outcome(workflow_id, execution.run.run, StepStarted(number=number, attempt=attempt))
                        self._wake()

    def _start(self, workflow_id: str, number: int, attempt: int) -> None:
        """Run an attempt, unless a later turn has overtaken it: the step cancelled, the run closed."""
        execution = self.core.live.get(workflow_id)
        if execution is None or not isinstance(execution.code, RunCode):
            return
        step = execution.run.step(number)
        call = execution.code.calls.get(number)
        if step is None or call is None or not step.accepts(attempt):
            return
        info = StepInfo(
            workflow_id=workflow_id, run=execution.run.run, step=step.name, number=number, attempt=attempt
        )
        self.executor.start(
            Attempt(
                owner=self,
                info=info,
                call=call,
                args=step.args,
                scheduled_at=step.scheduled_at,
                report=self.report,
            )
        )

    def _publish(self, records: list[Outgoing], published: int | None) -> None:
        if not records:
            return
        self._publishes += 1
        upto = None if published is None else (self.partition, published)
        self.log.publish(records, published=upto).add_done_callback(self._published)

    def _published(self, future: asyncio.Future[None]) -> None:
        self._publishes -= 1
        if future.cancelled() or future.exception() is not None:
            self._fail(future.exception() or Unavailable(f"partition {self.partition}: the publish was cancelled"))
        elif not self._publishes:
            self._idle.set()

    def _evict(self) -> None:
        """Let the runs used longest ago leave memory, those that only wait."""
        live = self.core.live
        excess = len(live) - self.limits.live_runs_max
        if excess <= 0:
            return
        candidates = []
        for looked, (workflow_id, execution) in enumerate(live.items()):
            if looked >= excess + EVICT_LOOK_MAX or len(candidates) == excess:
                break
            if not execution.run.open_attempts and workflow_id not in self._unacknowledged:
                candidates.append(workflow_id)
        for workflow_id in candidates:
            self.core.evict(workflow_id)


def _size(event: Event) -> int:
    """The encoded size of one event: that of a turn that holds it alone."""
    return len(encode_history(Turn(workflow_id="", turn=0, term=0, seq=0, at=0, consumed=0, events=[event])))


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
