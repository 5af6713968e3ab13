"""The intake: which records can be read now, what is set aside, and what is forwarded."""

from __future__ import annotations

import asyncio
import json

import pytest

from streamflow.codec.avro import decode_command, decode_dead_letter, decode_reply, decode_status, encode_command
from streamflow.codec.envelope import CONFLUENT, schema_folder, to_confluent
from streamflow.codec.registry import RegistryRefused, Schemas
from streamflow.config import RECORD_BYTES_MAX
from streamflow.core.commands import Command, SignalWorkflow
from streamflow.core.effects import PublishStatus, StatusRecord
from streamflow.ids import partition_of
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, REPLIES, Record
from streamflow.worker.intake import Intake
from streamflow.worker.outbox import outgoing

OURS = json.loads((schema_folder() / "Command.avsc").read_text())


class Place:
    """What the intake asks of a log."""

    app = "shop"
    partitions = 2


class Clock:
    def now_ms(self) -> int:
        return 1


class Registry:
    """Knows our own schema by the id 5, once it is open."""

    name = "http://here"

    def __init__(self):
        self.asked = []

    def schema(self, schema_id):
        self.asked.append(schema_id)
        if schema_id != 5:
            raise RegistryRefused(404, "not found")
        return OURS

    def register(self, subject, schema):
        raise AssertionError("an intake registers nothing")


def intake(registry: Registry | None = None) -> Intake:
    schemas = None if registry is None else Schemas(registry)
    return Intake(Place(), 0, None, Clock(), schemas)  # type: ignore[arg-type]


def id_at(partition: int) -> str:
    return next(each for each in map(str, range(99)) if partition_of(each, 2) == partition)


def signal(partition: int = 0, value: bytes = b"1", reply_to: int | None = None) -> Command:
    body = SignalWorkflow(name="n", value=value)
    return Command(command_id="c", workflow_id=id_at(partition), sent_at=1, body=body, reply_to=reply_to)


def records(*values: bytes | None) -> list[Record]:
    return [Record(offset=offset, key=b"k", value=value) for offset, value in enumerate(values)]


def test_without_a_registry_all_can_be_read_at_once():
    found = intake()
    given = records(to_confluent(encode_command(signal()), 5), None)
    assert asyncio.run(found.readable(given)) == 2
    first, second = found.sort(given).elsewhere
    assert "no schema registry is configured" in decode_dead_letter(first.value or b"").reason
    assert "found nothing" in decode_dead_letter(second.value or b"").reason


def test_those_before_a_new_schema_do_not_wait_for_it():
    registry = Registry()
    found = intake(registry)
    plain = encode_command(signal())
    given = records(plain, plain, to_confluent(plain, 5), to_confluent(plain, 5), to_confluent(plain, 6))

    async def in_parts() -> list[int]:
        rest, parts = given, []
        while rest:
            count = await found.readable(rest)
            sorted_ = found.sort(rest[:count])
            parts.append(len(sorted_.commands))
            rest = rest[count:]
        return parts

    assert asyncio.run(in_parts()) == [2, 2, 0]
    assert registry.asked == [5, 6]


@pytest.mark.parametrize("reply_to", [None, 1, 2, -1])
def test_what_is_too_large_is_not_forwarded(reply_to: int | None):
    large = encode_command(signal(1, b"x" * RECORD_BYTES_MAX, reply_to))
    found = intake().sort(records(large))
    (record,) = (*found.elsewhere, *found.answers)
    if reply_to != 1:
        assert record.topic == DEAD_LETTERS
        assert "can be recorded" in decode_dead_letter(record.value or b"").reason
    else:
        assert (record.topic, record.partition) == (REPLIES, 1)
        error = decode_reply(record.value or b"").error
        assert error is not None
        assert error.type == "PayloadTooLarge"


@pytest.mark.parametrize(("reply_to", "known"), [(None, None), (0, 0), (1, 1), (2, None), (-1, None)])
def test_who_names_a_partition_for_replies_that_does_not_exist_waits_for_none(reply_to: int | None, known: int | None):
    found = intake().sort(records(encode_command(signal(reply_to=reply_to))))
    assert found.commands == [(0, signal(reply_to=known))]


def test_a_command_of_a_registry_is_forwarded_so_that_it_needs_none():
    found = intake(Registry())
    given = records(to_confluent(encode_command(signal(1)), 5))
    assert asyncio.run(found.readable(given)) == 1
    (record,) = found.sort(given).elsewhere
    assert (record.topic, record.partition) == (COMMANDS, 1)
    assert decode_command(record.value or b"") == signal(1)


def test_only_a_status_is_framed_for_others():
    status = StatusRecord(workflow_id="w", workflow="f", run=1, turn=1, state="running", args=b"[]")
    (record,) = outgoing([PublishStatus(status)], 0, "w", 1, status_schema=9)
    assert record.value is not None
    assert record.value.startswith(CONFLUENT)
    schema = json.loads((schema_folder() / "Status.avsc").read_text())
    assert decode_status(record.value, {9: schema}.__getitem__) == status
    (gone,) = outgoing([PublishStatus(None)], 0, "w", 1, status_schema=9)
    assert gone.value is None
