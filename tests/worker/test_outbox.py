"""What leaves a partition always fits a record, and is told to those who can hear it."""

from __future__ import annotations

import pytest

from streamflow.codec.avro import (
    decode_command,
    decode_dead_letter,
    decode_reply,
    decode_status,
    decode_task,
    encode_timer,
)
from streamflow.codec.envelope import DecodeError
from streamflow.config import PAYLOAD_BYTES_MAX, RECORD_BYTES_MAX
from streamflow.core.commands import CancelWorkflow, Command
from streamflow.core.effects import (
    CancelAttempt,
    DeadLetter,
    DispatchAttempt,
    DropTimer,
    Effect,
    Forward,
    PublishStatus,
    RecordStart,
    Reply,
    SendReply,
    SetTimer,
    StartAttempt,
    StatusRecord,
    StepTask,
    TimerRecord,
)
from streamflow.errors import ErrorInfo
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, REPLIES, STATUS, TIMERS, Outgoing
from streamflow.logs.checks import check_size
from streamflow.worker.outbox import check_timer, dead_letter, encode_fitting, outgoing

TIMER = TimerRecord(workflow_id="w", kind="sleep", run=1, number=2, attempt=0, fire_at=77)


def status(**fields: object) -> StatusRecord:
    known: dict[str, object] = {
        "workflow_id": "w",
        "workflow": "x",
        "run": 1,
        "turn": 1,
        "state": "running",
        "args": b"[]",
    }
    return StatusRecord(**{**known, **fields})  # type: ignore[arg-type]


def size(record: Outgoing) -> int:
    return check_size(record.topic, record.key, record.value)


def test_the_effects_of_a_turn_become_records_in_their_order_and_local_ones_none():
    command = Command(command_id="c", workflow_id="w", sent_at=1, body=CancelWorkflow())
    effects: list[Effect] = [
        SetTimer(TIMER),
        StartAttempt(1, 0, 1),
        RecordStart(1, 0, 1),
        CancelAttempt(1, 0),
        DropTimer(TIMER),
        PublishStatus(status()),
        PublishStatus(None),
        SendReply(1, Reply(command_id="c", workflow_id="w", accepted=True)),
        Forward(3, command),
    ]
    records = outgoing(effects, 2, "w", 4)
    assert [(record.topic, record.partition) for record in records] == [
        (TIMERS, 2),
        (TIMERS, 2),
        (STATUS, 2),
        (STATUS, 2),
        (REPLIES, 1),
        (COMMANDS, 3),
    ]
    assert [record.value is None for record in records] == [False, True, False, True, False, False]
    assert decode_command(records[5].value or b"") == command


def test_an_attempt_for_a_queue_goes_to_its_topic_under_the_runs_id_and_partition():
    task = StepTask(
        workflow_id="w", run=1, number=3, attempt=2, workflow="x", step="s", name="s", args=b"[]", scheduled_at=7
    )
    (record,) = outgoing([DispatchAttempt("gpu", task)], 2, "w", 4)
    assert record[:3] == ("steps.gpu", 2, b"w")
    assert decode_task(record.value or b"") == task


@pytest.mark.parametrize("reply_to", [-1, 4, 1 << 40])
def test_an_answer_to_a_partition_that_does_not_exist_is_dropped(reply_to: int):
    reply = SendReply(reply_to, Reply(command_id="c", workflow_id="w", accepted=True))
    assert outgoing([reply], 0, "w", 4) == []


def test_a_status_that_is_too_large_loses_its_arguments_first_and_its_result_never():
    large = b'"' + b"x" * (PAYLOAD_BYTES_MAX - 2) + b'"'
    found = decode_status(encode_fitting(status(args=large, progress=b"1", context=b"2")))
    assert (found.args, found.progress, found.context) == (large, b"1", b"2")
    wid = "w" * 255
    encoded = encode_fitting(
        status(workflow_id=wid, args=large, progress=large, context=large, result=large, reason="r" * 200_000)
    )
    found = decode_status(encoded)
    assert (found.args, found.progress, found.context, found.reason, found.result) == (b"null", None, None, None, large)
    assert size(Outgoing(STATUS, 0, wid.encode(), encoded)) <= RECORD_BYTES_MAX


def test_an_error_in_an_answer_may_quote_a_foreign_sender_but_not_all_of_it():
    reply = Reply(command_id="c", workflow_id="w", accepted=False, error=ErrorInfo("X", "€" * 500_000))
    (record,) = outgoing([SendReply(0, reply)], 0, "w", 1)
    assert size(record) < 10_000
    error = decode_reply(record.value or b"").error
    assert error is not None and error.message == "€" * 2000 + "…"


@pytest.mark.parametrize("key", [b"", b"k" * 600_000])
@pytest.mark.parametrize("value", [None, b"v", b"v" * RECORD_BYTES_MAX])
@pytest.mark.parametrize("reason", ["bad", "€" * 400_000])
def test_a_dead_letter_always_fits(key: bytes, value: bytes | None, reason: str):
    letter = DeadLetter(topic="a.commands", partition=1, offset=5, key=key, value=value, reason=reason, at=9)
    record = dead_letter(letter)
    assert size(record) <= RECORD_BYTES_MAX and (record.topic, record.partition) == (DEAD_LETTERS, 1)
    found = decode_dead_letter(record.value or b"")
    assert found.offset == 5 and reason.startswith(found.reason) and key.startswith(found.key)
    assert found.value == (value if value == b"v" else None)


def test_a_timer_s_key_says_when_it_is_due():
    assert TIMER.fire_at_of(TIMER.key) == TIMER.fire_at == 77


def test_a_record_that_is_not_of_its_timer_is_refused():
    check_timer(TIMER.key, encode_timer(TIMER))
    with pytest.raises(ValueError, match="whose key would be"):
        check_timer(TIMER.key + b"0", encode_timer(TIMER))
    with pytest.raises(DecodeError):
        check_timer(TIMER.key, b"junk")
