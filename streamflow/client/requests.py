"""Commands and their answers: published on the log, matched with replies by command id.

Rules of this file:

- Commands that are sent in one turn of the event loop go into one publish, since a log pays per call, not per record.
- A command is sent again, unchanged, until it is answered: the engine applies a command id once, and an answer may be
  lost with the worker that gave it.
- Whatever happens, each caller gets an answer, a `RequestError`, or `Unavailable` within the limit.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import streamflow.errors
from streamflow.client.follow import follow
from streamflow.codec.avro import decode_reply, encode_command
from streamflow.codec.envelope import DecodeError, EncodeError
from streamflow.config import LIMITS, RECORD_BYTES_MAX, Limits
from streamflow.core.commands import Body, Command, Query
from streamflow.core.effects import Reply
from streamflow.errors import (
    CommandRejected,
    InvalidArguments,
    PayloadTooLarge,
    RequestError,
    StreamflowError,
    Unavailable,
    WorkflowNotFound,
)
from streamflow.logs.base import COMMANDS, REPLIES, Log, Outgoing, Record

RESEND_SECONDS: Final = 5.0
"""First wait before a command is sent again; it doubles. An answer is lost only with its worker, while a worker that is
merely slow must not get everything twice."""

SWEEP_SECONDS: Final = 0.25
"""How often commands that wait are looked over, while there are any."""

_log = logging.getLogger("streamflow.client")


class Surroundings(NamedTuple):
    """What a client takes from its process: chance for ids, and milliseconds since 1970."""

    chance: random.Random
    now_ms: Callable[[], int]


SURROUNDINGS: Final = Surroundings(random.SystemRandom(), lambda: time.time_ns() // 1_000_000)


class _Pending:
    """A command that waits for its answer."""

    __slots__ = ("answer", "deadline", "interval", "question", "record", "resend_at", "sends", "workflow_id")

    def __init__(
        self, workflow_id: str, record: Outgoing, answer: asyncio.Future[Reply], now: float, wait: float, question: bool
    ) -> None:
        self.workflow_id = workflow_id
        self.record = record
        self.answer = answer
        self.question = question  # changes nothing, whenever it is carried out
        self.deadline = now + wait
        self.interval = RESEND_SECONDS
        self.resend_at = now + RESEND_SECONDS
        self.sends = 1


class Requests:
    """Sends commands from one client and follows the one replies partition that it reads."""

    def __init__(self, log: Log, *, limits: Limits = LIMITS, surroundings: Surroundings = SURROUNDINGS) -> None:
        self.log = log
        self._chance, self._now_ms = surroundings
        self.reply_to = self._chance.randrange(log.partitions)
        self._limits = limits
        self._pending: dict[bytes, list[_Pending]] = {}
        self._outbox: list[Outgoing] = []
        self._opening: asyncio.Future[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._failed: str | None = None

    @property
    def failed(self) -> str | None:
        """Why nothing can be asked any more, None while the client is alive."""
        return self._failed

    async def open(self) -> None:
        """Follow the replies from here on; idempotent, and shared by callers that come at the same time."""
        while self._following is None:
            if self._failed is not None:
                raise Unavailable(self._failed)
            if self._opening is not None:
                await asyncio.wait((self._opening,))
                continue
            self._opening = asyncio.get_running_loop().create_future()
            try:
                end = await self.log.end_offset(REPLIES, self.reply_to)
                if self._failed is None:
                    self._following = asyncio.get_running_loop().create_task(
                        follow(self.log, REPLIES, self.reply_to, end, self._take), name="client-replies"
                    )
                    self._following.add_done_callback(self._ended)
            finally:
                self._opening.set_result(None)
                self._opening = None

    async def ask(
        self,
        workflow_id: str,
        partition: int,
        body: Body,
        *,
        command_id: str | None = None,
        if_gone: bytes | None = None,
    ) -> bytes | None:
        """Send a command to the partition; the JSON value of its answer. A rejection is raised as its `RequestError`.

        `if_gone` is the answer when the command had to be sent again and then found no run: it deleted it itself.
        """
        if self._following is None:
            await self.open()
        if self._failed is not None:
            raise Unavailable(self._failed)
        command = Command(
            command_id=command_id or self._chance.randbytes(16).hex(),
            workflow_id=workflow_id,
            sent_at=self._now_ms(),
            body=body,
            reply_to=self.reply_to,
        )
        record = _record(command, partition)
        loop = asyncio.get_running_loop()
        pending = _Pending(
            workflow_id,
            record,
            loop.create_future(),
            loop.time(),
            self._limits.request_seconds,
            isinstance(body, Query),
        )
        key = command.command_id.encode()
        self._pending.setdefault(key, []).append(pending)
        self._post(record)
        self._sweep_later()
        try:
            reply = await pending.answer
        finally:
            self._forget(key, pending)
        if reply.accepted:
            return reply.value
        error = _rejection(reply)
        if if_gone is not None and pending.sends > 1 and isinstance(error, WorkflowNotFound):
            return if_gone
        raise error

    async def close(self, why: str) -> None:
        """Stop following; whoever still waits gets `Unavailable` saying why."""
        following = self._following
        self._fail(why)
        if following is not None:
            following.cancel()
            await asyncio.wait((following,))

    def _fail(self, why: str) -> None:
        """Nothing can be asked any more."""
        self._failed = self._failed or why
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for waiting in list(self._pending.values()):
            _refuse(waiting, self._failed)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The replies can be followed no more: the log was closed, or is damaged."""
        if task.cancelled():
            return
        error = task.exception()
        why = "it was closed" if error is None else f"its replies cannot be read: {error}"
        self._fail(f"{place(self.log)}: {why}; connect again")

    # -- sending -----------------------------------------------------------------------------------------------------

    def _post(self, record: Outgoing) -> None:
        """Publish the record with all others of this turn of the event loop."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._publish)
        self._outbox.append(record)

    def _publish(self) -> None:
        records, self._outbox = self._outbox, []
        try:
            published = self.log.publish(records)
        except StreamflowError as error:
            self._unsent(records, error)
            return

        def done(future: asyncio.Future[None]) -> None:
            if future.cancelled():
                self._unsent(records, Unavailable(f"{place(self.log)}: closed while the command was sent"))
            elif (error := future.exception()) is not None:
                self._unsent(records, error)

        published.add_done_callback(done)

    def _unsent(self, records: Iterable[Outgoing], error: BaseException) -> None:
        """The log refused these: their senders are told. One that was sent before goes on waiting for its answer."""
        refused = {id(record) for record in records}
        for waiting in list(self._pending.values()):
            first = [pending for pending in waiting if id(pending.record) in refused and pending.sends == 1]
            _refuse(first, str(error))

    def _sweep_later(self) -> None:
        if self._sweeper is None and self._failed is None:
            interval = min(SWEEP_SECONDS, self._limits.request_seconds / 4)
            self._sweeper = asyncio.get_running_loop().call_later(interval, self._sweep)

    def _sweep(self) -> None:
        """Send again what got no answer for a while; give up what waited too long."""
        self._sweeper = None
        now = asyncio.get_running_loop().time()
        for waiting in list(self._pending.values()):
            for pending in waiting:
                if now >= pending.deadline:
                    _refuse([pending], self._unanswered(pending))
                elif now >= pending.resend_at:
                    pending.sends += 1
                    pending.interval *= 2
                    pending.resend_at = now + pending.interval
                    self._post(pending.record)
        if self._pending:
            self._sweep_later()

    def _unanswered(self, pending: _Pending) -> str:
        about = f"run {pending.workflow_id}" if pending.workflow_id else f"partition {pending.record.partition}"
        later = "" if pending.question else " The command is in the log and may still be applied when one comes"
        return (
            f"no worker answered for {about} within {self._limits.request_seconds:g} s: is a worker for app "
            f"{self.log.app} running on {place(self.log)}?{later}"
        )

    # -- answers -----------------------------------------------------------------------------------------------------

    async def _take(self, batch: list[Record]) -> None:
        for record in batch:
            waiting = self._pending.get(record.key)  # other clients read this partition too: skip theirs undecoded
            if waiting is None or record.value is None:
                continue
            try:
                reply = decode_reply(record.value)
            except DecodeError as error:
                _log.warning("replies[%d] at offset %d: %s; skipped", self.reply_to, record.offset, error)
                continue
            for pending in waiting:
                if pending.workflow_id == reply.workflow_id and not pending.answer.done():
                    pending.answer.set_result(reply)

    def _forget(self, key: bytes, pending: _Pending) -> None:
        waiting = self._pending[key]
        waiting.remove(pending)
        if not waiting:
            del self._pending[key]


def place(log: Log) -> str:
    """The log's URL without its options, which may hold secrets."""
    return log.url.partition("?")[0]


def _record(command: Command, partition: int) -> Outgoing:
    """The command as a record. Its size is checked alone: in a publish of many, all would be refused."""
    try:
        value = encode_command(command)
        key = command.workflow_id.encode()
    except (EncodeError, UnicodeEncodeError) as error:
        raise InvalidArguments(f"run {command.workflow_id!r}: {error}") from None
    size = len(key) + len(value)
    if size > RECORD_BYTES_MAX:
        raise PayloadTooLarge(
            f"run {command.workflow_id}: the command has {size:,} bytes with all its values, at most "
            f"{RECORD_BYTES_MAX:,} fit a record: keep large values elsewhere and pass references to them"
        )
    return Outgoing(COMMANDS, partition, key, value)


def _refuse(waiting: Iterable[_Pending], why: str) -> None:
    for pending in waiting:
        if not pending.answer.done():
            pending.answer.set_exception(Unavailable(why))


def _rejection(reply: Reply) -> StreamflowError:
    """The error that the reply names, by class name, with or without its module."""
    if reply.error is None:
        return CommandRejected(f"the command for run {reply.workflow_id} was rejected without a reason")
    found = getattr(streamflow.errors, reply.error.type.rpartition(".")[2], None)
    if isinstance(found, type) and issubclass(found, RequestError):
        return found(reply.error.message)
    return CommandRejected(str(reply.error))
