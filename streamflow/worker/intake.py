"""Intake: what the records of the commands topic are, before the core sees any of them.

Anyone may write there, so nothing of a record is trusted: what cannot be decoded, or could not be recorded, is set
aside with its reason, and the partition goes on. One thing is waited for: a schema registry that does not answer, when
a record is of a schema that it alone knows. The record is valid for all we know, and those behind it keep their order.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from streamflow.codec.avro import decode_command, encode_command
from streamflow.codec.envelope import DecodeError
from streamflow.codec.registry import Schemas
from streamflow.config import RECORD_BYTES_MAX
from streamflow.core.commands import Command, Query
from streamflow.core.effects import DeadLetter, Forward, Reply, SendReply
from streamflow.core.partition import DeadCommand
from streamflow.errors import ErrorInfo, InvalidArguments, PayloadTooLarge, RequestError
from streamflow.ids import ID_BYTES_MAX, partition_of
from streamflow.logs.base import COMMANDS, Log, Outgoing, Record
from streamflow.metrics import DEAD_LETTERS
from streamflow.projections.queries import Source, answer
from streamflow.worker.clock import Clock
from streamflow.worker.outbox import dead_letter, outgoing

log_ = logging.getLogger("streamflow.worker")

COMMAND_BYTES_MAX: Final = RECORD_BYTES_MAX - 2_000
"""The largest command that is taken: the turn that applies it holds all of it, and more."""
COMMAND_ID_BYTES_MAX: Final = 2 * ID_BYTES_MAX
"""The longest command id: that of a timer is its run's id and more."""
MS_MAX: Final = 1 << 62
"""Beyond it lies no instant and no delay, and sums would leave 64 bits."""


class Sorted(Struct, frozen=True):
    """Records, sorted by who must see them next. `elsewhere` must be durable before they count as consumed here."""

    commands: list[tuple[int, Command]]
    answers: list[Outgoing]
    elsewhere: list[Outgoing]


class Intake:
    """Sorts the commands of one partition."""

    def __init__(self, log: Log, partition: int, source: Source, clock: Clock, schemas: Schemas | None = None) -> None:
        self.log = log
        self.partition = partition
        self.source = source
        self.clock = clock
        self.schemas = schemas

    async def readable(self, records: Sequence[Record]) -> int:
        """How many of the records, from the first, can be sorted now; at least one, which may have to be waited for."""
        if self.schemas is None:
            return len(records)
        for index, record in enumerate(records):
            while (missing := self.schemas.missing(record.value)) is not None:
                if index > 0:
                    return index  # those before it need not wait
                what = f"partition {self.partition}: the command at offset {record.offset}"
                await self.schemas.fetch(missing, what)
        return len(records)

    def sort(self, records: Iterable[Record]) -> Sorted:
        """Decode the records; queries are answered at once, from the durable state."""
        found = Sorted([], [], [])
        for record in records:
            try:
                command = _decoded(record, self.schemas)
            except DecodeError as error:
                found.elsewhere.append(self._letter(record.offset, record.key, record.value, str(error)))
                continue
            if command.reply_to is not None and not 0 <= command.reply_to < self.log.partitions:
                # It names a partition that does not exist: nobody can be told, as where it names none.
                command = replace(command, reply_to=None)
            home = partition_of(command.workflow_id, self.log.partitions)
            if isinstance(command.body, Query) and (home == self.partition or not command.workflow_id):
                found.answers.extend(self._answer(command, command.body))
            elif (refused := _unfit(record, command)) is not None:
                if command.reply_to is None:
                    found.elsewhere.append(self._letter(record.offset, record.key, record.value, str(refused)))
                found.answers.extend(self._reply(command, refused=refused))
            elif home != self.partition:  # only what fits: others may write larger records than the log takes from us
                found.elsewhere.extend(self._outgoing(command, Forward(home, command)))
            else:
                found.commands.append((record.offset, command))
        return found

    def bury(self, dead: DeadCommand) -> Outgoing:
        """The dead letter of a command that the core refused and nobody waits for."""
        return self._letter(dead.offset, dead.command.workflow_id.encode(), encode_command(dead.command), dead.reason)

    def _letter(self, offset: int, key: bytes, value: bytes | None, reason: str) -> Outgoing:
        DEAD_LETTERS.inc()
        log_.warning(
            "partition %d, command at offset %d goes to the dead letters: %s", self.partition, offset, reason[:500]
        )
        return dead_letter(
            DeadLetter(
                topic=f"{self.log.app}.{COMMANDS}",
                partition=self.partition,
                offset=offset,
                key=key,
                value=value,
                reason=reason,
                at=self.clock.now_ms(),
            )
        )

    def _answer(self, command: Command, query: Query) -> list[Outgoing]:
        if command.reply_to is None:
            return []
        try:
            return self._reply(command, value=answer(query, command.workflow_id, self.source))
        except RequestError as refused:
            return self._reply(command, refused=refused)
        except Exception as error:  # a query changes nothing, so a broken one must not stop what does
            log_.exception("partition %d: query %s of run %s failed", self.partition, query.query, command.workflow_id)
            return self._reply(command, refused=InvalidArguments(f"query {query.query[:80]} failed: {error!r}"))

    def _reply(
        self, command: Command, *, value: bytes | None = None, refused: RequestError | None = None
    ) -> list[Outgoing]:
        if command.reply_to is None:
            return []
        reply = Reply(
            command_id=command.command_id,
            workflow_id=command.workflow_id,
            accepted=refused is None,
            error=None if refused is None else ErrorInfo(type=type(refused).__name__, message=str(refused)),
            value=value,
        )
        return self._outgoing(command, SendReply(command.reply_to, reply))

    def _outgoing(self, command: Command, effect: Forward | SendReply) -> list[Outgoing]:
        return outgoing((effect,), self.partition, command.workflow_id, self.log.partitions)


def _decoded(record: Record, schemas: Schemas | None) -> Command:
    command = decode_command(record.value or b"", None if schemas is None else schemas.schema_of)
    if len(command.command_id.encode()) > COMMAND_ID_BYTES_MAX:
        raise DecodeError(
            f"command_id must have at most {COMMAND_ID_BYTES_MAX} bytes, found {command.command_id[:80]}…"
        )
    size = len(command.workflow_id.encode())
    if size > ID_BYTES_MAX or (not size and not isinstance(command.body, Query)):
        raise DecodeError(f"workflow_id must have 1 to {ID_BYTES_MAX} bytes of UTF-8, found {size}")
    return command


def _unfit(record: Record, command: Command) -> RequestError | None:
    """Why the command cannot be recorded, if it cannot."""
    size = len(record.key) + len(record.value or b"")
    if size > COMMAND_BYTES_MAX:
        return PayloadTooLarge(
            f"run {command.workflow_id}: the command has {size:,} bytes, at most {COMMAND_BYTES_MAX:,} can be "
            f"recorded: keep large values elsewhere and pass references to them"
        )
    for name in ("delay_ms", "timeout_ms", "start_at"):
        found = getattr(command.body, name, None)
        if found is not None and abs(found) > MS_MAX:
            return InvalidArguments(f"run {command.workflow_id}: {name} is out of range, found {found}")
    return None
