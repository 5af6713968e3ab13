"""A processor on a memory log, with a clock and an executor that move by hand, and a log that answers by hand."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import streamflow as sf
from streamflow.codec.avro import (
    decode_command,
    decode_dead_letter,
    decode_history,
    decode_reply,
    decode_status,
    decode_timer,
    encode_command,
    encode_timer,
)
from streamflow.config import Limits
from streamflow.core.commands import Body, Command, SignalWorkflow, StartWorkflow
from streamflow.core.effects import DeadLetter, Reply, TimerRecord
from streamflow.core.events import HistoryRecord, StepAttemptFailed, StepCompleted, StepFailed, Turn
from streamflow.core.inputs import CodeFactory
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, HISTORY, REPLIES, STATUS, TIMERS, Log, Outgoing, Record
from streamflow.logs.open import open_log
from streamflow.store.base import Store
from streamflow.store.memory import MemoryStore
from streamflow.worker.clock import Clock
from streamflow.worker.executor import Attempt
from streamflow.worker.processor import Processor
from streamflow.workflow.code import RunCode
from streamflow.workflow.definitions import Registry

START = 1_000_000
_names = itertools.count()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


async def settle(turns: int = 50) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


class ManualClock(Clock):
    def __init__(self, at_ms: int = START) -> None:
        super().__init__(lambda: 0, lambda: 0)
        self.at_ms = at_ms

    def now_ms(self) -> int:
        return self.at_ms

    def advance_to(self, at_ms: int) -> None:
        self.at_ms = max(self.at_ms, at_ms)


class HandExecutor:
    """Takes attempts and ends them when it is told to."""

    def __init__(self) -> None:
        self.attempts: dict[tuple[str, int], Attempt] = {}
        self.started: list[tuple[str, int, int]] = []
        self.cancelled: list[tuple[str, int]] = []
        self.is_full = False
        self._rooms: set[asyncio.Event] = set()

    def wake_when_room(self, event: asyncio.Event) -> None:
        self._rooms.add(event)

    def make_room(self) -> None:
        self.is_full = False
        for event in self._rooms:
            event.set()

    def start(self, attempt: Attempt) -> None:
        key = attempt.info.workflow_id, attempt.info.number
        assert key not in self.attempts, f"{key} is running already"
        self.attempts[key] = attempt
        self.started.append((*key, attempt.info.attempt))

    def cancel(self, owner: object, workflow_id: str, run: int, number: int) -> None:
        if self.attempts.pop((workflow_id, number), None) is not None:
            self.cancelled.append((workflow_id, number))

    def drop(self, owner: object) -> None:
        self.attempts.clear()

    def complete(self, workflow_id: str, number: int, result: bytes = b"1") -> None:
        attempt = self.attempts.pop((workflow_id, number))
        info = attempt.info
        attempt.report(info, StepCompleted(number=number, attempt=info.attempt, result=result))

    def fail(self, workflow_id: str, number: int, *, retry_at: int | None = None) -> None:
        attempt = self.attempts.pop((workflow_id, number))
        info, error = attempt.info, sf.ErrorInfo("ValueError", "no")
        attempt.report(
            info,
            StepFailed(number=number, attempt=info.attempt, error=error)
            if retry_at is None
            else StepAttemptFailed(number=number, attempt=info.attempt, error=error, retry_at=retry_at),
        )


class Held:
    """A write that the log has been handed and has not taken yet."""

    def __init__(self, write: Callable[[], asyncio.Future[Any]], what: Sequence[Any]) -> None:
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.what = what
        self._write = write

    async def release(self) -> None:
        self.future.set_result(await self._write())
        await settle()

    async def fail(self, error: BaseException) -> None:
        self.future.set_exception(error)
        await settle()


class HandLog:
    """A log whose writes wait for the test's word while `hold_…` is set."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.hold_appends = self.hold_publishes = False
        self.appends: list[Held] = []
        self.publishes: list[Held] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.log, name)

    def instead(self, **methods: Callable[..., Any]) -> None:
        """Answer with these in place of the log's own."""
        vars(self).update(methods)

    def append(
        self, partition: int, expected_offset: int, records: Sequence[tuple[bytes, bytes]]
    ) -> asyncio.Future[int]:
        write = partial(self.log.append, partition, expected_offset, records)
        if not self.hold_appends:
            return write()
        self.appends.append(Held(write, [decode_history(value) for _, value in records]))
        return self.appends[-1].future

    def publish(self, records: Sequence[Outgoing], *, published: tuple[int, int] | None = None) -> asyncio.Future[None]:
        write = partial(self.log.publish, records, published=published)
        if not self.hold_publishes:
            return write()
        self.publishes.append(Held(write, records))
        return self.publishes[-1].future


class World:
    """One app on a log, and the processor of partition 0, which can be stopped, killed and begun again."""

    def __init__(self, app: Registry, log: Log, store: Store | None = None, **limits: Any) -> None:
        self.app = app
        self.log = HandLog(log)
        self.store = store or MemoryStore()
        self.clock = ManualClock()
        self.limits = Limits(**limits)
        self.executor = HandExecutor()
        self.task: asyncio.Task[None] | None = None
        self._ids = itertools.count()

    def make(self, owner: str = "me") -> Processor:
        self.processor = Processor(
            partition=0,
            owner=owner,
            log=self.log,
            store=self.store,
            executor=self.executor,  # type: ignore[arg-type]
            clock=self.clock,
            code_of=self._code_of,
            retention_of=self._retention_of,
            limits=self.limits,
        )
        return self.processor

    async def begin(self, owner: str = "me") -> None:
        self.task = asyncio.get_running_loop().create_task(self.make(owner).run())
        await settle()

    async def kill(self) -> None:
        """Die where it stands: what the log has not been given is lost."""
        assert self.task is not None
        self.task.cancel()
        await asyncio.wait((self.task,))
        self.log.appends.clear()
        self.log.publishes.clear()
        self.executor.drop(None)

    async def begin_again(self, *, store: Store | None = None) -> None:
        """Die, and come back with the local state (or another one) as it is."""
        await self.kill()
        self.store = store or self.store
        await self.begin()

    async def stop(self) -> None:
        assert self.task is not None
        self.processor.stop()
        await self.task

    async def send(
        self, workflow_id: str, body: Body, *, command_id: str | None = None, reply_to: int | None = 0
    ) -> str:
        command = self._command(workflow_id, body, command_id, reply_to)
        await self.send_raw(encode_command(command), workflow_id.encode())
        return command.command_id

    def command_record(self, workflow_id: str, body: Body) -> Outgoing:
        """A command as a record, to be published together with others."""
        return Outgoing(COMMANDS, 0, workflow_id.encode(), encode_command(self._command(workflow_id, body, None, 0)))

    def _command(self, workflow_id: str, body: Body, command_id: str | None, reply_to: int | None) -> Command:
        return Command(
            command_id=command_id or f"c{next(self._ids)}",
            workflow_id=workflow_id,
            sent_at=self.clock.at_ms,
            body=body,
            reply_to=reply_to,
        )

    async def send_raw(self, value: bytes, key: bytes = b"") -> None:
        await self.log.log.publish([Outgoing(COMMANDS, 0, key, value)])
        await settle()

    async def start(self, workflow_id: str, workflow: str, args: bytes = b"[]", **fields: Any) -> str:
        return await self.send(workflow_id, StartWorkflow(workflow=workflow, args=args, **fields))

    async def fire(self, *timers: TimerRecord) -> None:
        """They are found due, as the timer service finds them."""
        self.clock.advance_to(max(timer.fire_at for timer in timers))
        await self.processor.fire(list(map(encode_timer, timers)), self.clock.at_ms)
        await settle()

    # -- what is in the log ------------------------------------------------------------------------------------------

    async def records(self, topic: str, partition: int = 0) -> list[Record]:
        return await self.log.log.read(topic, partition, 0, limit=1_000_000)

    async def history(self) -> list[HistoryRecord]:
        return [decode_history(record.value or b"") for record in await self.records(HISTORY)]

    async def history_of(self, workflow_id: str) -> list[HistoryRecord]:
        return [each for each in await self.history() if getattr(each, "workflow_id", None) == workflow_id]

    async def replies(self) -> dict[str, Reply]:
        found = [decode_reply(record.value or b"") for record in await self.records(REPLIES)]
        return {reply.command_id: reply for reply in found}

    async def state_of(self, workflow_id: str) -> str | None:
        """What `<app>.status` says of the run."""
        for record in await self.records(STATUS):
            if record.key == workflow_id.encode():
                return None if record.value is None else decode_status(record.value).state
        return None

    async def timers(self) -> list[TimerRecord]:
        return [decode_timer(record.value) for record in await self.records(TIMERS) if record.value is not None]

    async def dead_letters(self) -> list[DeadLetter]:
        return [decode_dead_letter(record.value or b"") for record in await self.records(DEAD_LETTERS)]

    async def commands(self, partition: int) -> list[Command]:
        return [decode_command(record.value or b"") for record in await self.records(COMMANDS, partition)]

    def _code_of(self, workflow: str) -> CodeFactory | None:
        definition = self.app.workflows.get(workflow)
        return None if definition is None else partial(RunCode, definition)

    def _retention_of(self, workflow: str) -> int | None:
        definition = self.app.workflows.get(workflow)
        return None if definition is None or definition.retention is None else round(definition.retention * 1000)


@asynccontextmanager
async def world(
    app: Registry, *, partitions: int = 1, store: Store | None = None, **limits: Any
) -> AsyncIterator[World]:
    log = await open_log(f"memory://world-{next(_names)}?partitions={partitions}", app="test")
    it = World(app, log, store, **limits)
    await it.begin()
    try:
        yield it
    finally:
        if it.task is not None and not it.task.done():
            it.task.cancel()
        if it.task is not None:
            await asyncio.wait((it.task,))
            if not it.task.cancelled():
                it.task.exception()
        await log.close()


def dump(store: Store) -> dict[bytes, bytes]:
    """Everything that the store holds."""
    return dict(store.scan(b""))


def signal(value: bytes = b"1") -> SignalWorkflow:
    return SignalWorkflow(name="s", value=value)


def turns(history: list[Any]) -> list[Turn]:
    return [record for record in history if isinstance(record, Turn)]
