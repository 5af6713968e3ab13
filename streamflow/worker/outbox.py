"""The outbox: what leaves the partition, as records of other topics.

Everything here is derived from turns alone, so a new owner derives it again from `published_offset` on; every receiver
is idempotent. The order is that of the turns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from streamflow.codec.avro import (
    decode_timer,
    encode_command,
    encode_dead_letter,
    encode_reply,
    encode_status,
    encode_task,
    encode_timer,
)
from streamflow.codec.envelope import to_confluent
from streamflow.config import RECORD_BYTES_MAX
from streamflow.core.effects import (
    DeadLetter,
    DispatchAttempt,
    DropTimer,
    Effect,
    Forward,
    PublishStatus,
    Reply,
    SendReply,
    SetTimer,
    StartAttempt,
    StatusRecord,
)
from streamflow.errors import ErrorInfo
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, REPLIES, STATUS, TIMERS, Outgoing, steps_topic

REASON_CHARACTERS_MAX: Final = 2_000
"""How much is said of why a command was refused."""
LETTER_KEY_BYTES_MAX: Final = 1_000
"""How much of a foreign record's key is kept."""
LETTER_BYTES: Final = 2 * LETTER_KEY_BYTES_MAX + 4 * REASON_CHARACTERS_MAX + 500
"""What a dead letter holds beside the value that it keeps, at most."""


def outgoing(
    effects: Iterable[Effect], partition: int, workflow_id: str, partitions: int, *, status_schema: int | None = None
) -> list[Outgoing]:
    """The records that the effects of a run make on other topics; local effects make none.

    A status, which tools of others read and the engine does not, is in Confluent framing where `status_schema` is the
    id of its schema. All else stays readable without a registry.
    """
    records: list[Outgoing] = []
    for effect in effects:
        if type(effect) is StartAttempt:
            continue  # nearly all effects are these: asking all patterns below took 0.6 us per step
        match effect:
            case SetTimer(timer=timer):
                records.append(Outgoing(TIMERS, partition, timer.key, encode_timer(timer)))
            case DropTimer(timer=timer):
                records.append(Outgoing(TIMERS, partition, timer.key, None))
            case DispatchAttempt(queue=queue, task=task):
                records.append(Outgoing(steps_topic(queue), partition, workflow_id.encode(), encode_task(task)))
            case PublishStatus(status=status):
                value = None if status is None else encode_fitting(status)
                if value is not None and status_schema is not None:
                    value = to_confluent(value, status_schema)
                records.append(Outgoing(STATUS, partition, workflow_id.encode(), value))
            case SendReply(reply_to=reply_to, reply=reply):
                # A sender that names a partition which does not exist reads none: there is nobody to tell.
                if 0 <= reply_to < partitions:
                    value = encode_reply(_brief(reply))
                    records.append(Outgoing(REPLIES, reply_to, reply.command_id.encode(), value))
            case Forward(partition=target, command=command):
                records.append(Outgoing(COMMANDS, target, command.workflow_id.encode(), encode_command(command)))
    return records


def encode_fitting(status: StatusRecord) -> bytes:
    """The status as a record; what makes it too large is left out, never the result or the error."""
    bytes_max = RECORD_BYTES_MAX - len(status.workflow_id.encode())
    encoded = encode_status(status)
    for field, empty in (("args", b"null"), ("progress", None), ("context", None), ("reason", None)):
        if len(encoded) <= bytes_max:
            break
        status = msgspec.structs.replace(status, **{field: empty})
        encoded = encode_status(status)
    return encoded


def dead_letter(letter: DeadLetter) -> Outgoing:
    """The dead letter as a record; a value or a key that would not fit beside the rest is left out."""
    key = letter.key[:LETTER_KEY_BYTES_MAX]
    value = letter.value
    if value is not None and len(value) > RECORD_BYTES_MAX - LETTER_BYTES:
        value = None
    # A reason may quote the schema of a registry, whose JSON can say characters that UTF-8 cannot.
    reason = letter.reason.encode("utf-8", "backslashreplace").decode()[:REASON_CHARACTERS_MAX]
    letter = msgspec.structs.replace(letter, key=key, value=value, reason=reason)
    return Outgoing(DEAD_LETTERS, letter.partition, key, encode_dead_letter(letter))


def _brief(reply: Reply) -> Reply:
    """The reply with an error of bounded size: its text may quote what a foreign sender wrote."""
    error = reply.error
    if error is None or len(error.message) <= REASON_CHARACTERS_MAX:
        return reply
    brief = ErrorInfo(type=error.type, message=error.message[:REASON_CHARACTERS_MAX] + "…")
    return msgspec.structs.replace(reply, error=brief)


def check_timer(key: bytes, value: bytes) -> None:
    """Raises `ValueError` where the record is not one of a timer."""
    timer = decode_timer(value)
    if timer.key != key:
        raise ValueError(f"found one whose key would be {timer.key[:80]!r}")


def published_status(effects: Iterable[Effect]) -> StatusRecord | None:
    """The run's status after a turn, where the turn's effects hold it."""
    for effect in effects:
        if type(effect) is PublishStatus:
            return effect.status
    return None
