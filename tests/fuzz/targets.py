"""Everything that reads bytes or text from outside, as one table: what reads it, what it may raise, valid examples.

A target is a function of bytes. It may raise the errors that are declared for its decoder and nothing else, and it
asserts what must hold for what was taken: above all that it can be written and read again, and is the same then.
`test_fuzz.py` mutates the examples with hypothesis, `fuzz.py` with atheris.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import click
import msgspec

from streamflow.cli.values import DURATION, INSTANT, JSON
from streamflow.codec import DecodeError, avro
from streamflow.codec.envelope import to_confluent
from streamflow.codec.registry import RegistryRefused
from streamflow.codec.registry_client import schema_in
from streamflow.codec.turns import for_snapshot, turns_of
from streamflow.config import RECORD_BYTES_MAX
from streamflow.core.commands import Query
from streamflow.core.events import RunSnapshot
from streamflow.core.retry import Retry
from streamflow.errors import CorruptLog, InvalidArguments, InvalidUrl, RequestError, Unavailable
from streamflow.logs.kafka_url import parse_kafka
from streamflow.logs.open import parse
from streamflow.projections import queries
from streamflow.projections.views import status_view
from streamflow.worker.tasks import read_task
from streamflow.workflow.remote import decode_retry
from tests.codec.records import KINDS, Kind
from tests.fuzz import clients, examples, payloads, worlds

HUGE: Final = (b"\x80\x80\x80\x80\x80\x80\x01", b"\xfe" + b"\xff" * 8 + b"\x01", b"\x01", b"\xff" * 40)
"""As Avro writes them: 2^41, the largest length, one below zero, and an integer without an end."""

NESTED: Final = 100_000
DIGITS: Final = 1_000_000
"""More of either than any recursion or quadratic conversion survives."""

Read = Callable[[bytes], object]


class Target(NamedTuple):
    """`examples` are valid inputs, `hostile` inputs that ask for much memory or time."""

    name: str
    read: Read
    errors: tuple[type[Exception], ...]
    examples: Callable[[], list[bytes]]
    hostile: Callable[[list[bytes]], list[bytes]]

    def check(self, data: bytes) -> bool:
        """Whether `data` was taken; False when it was refused by a declared error, whose text can be shown."""
        try:
            self.read(data)
        except self.errors as error:
            text = str(error)
        else:
            return True
        assert text.strip(), "an error that says nothing"
        return False


# ------------------------------------------------------------------------------------------------ hostile inputs


def lengths(valid: list[bytes]) -> list[bytes]:
    """Each byte of the first and the longest example a hostile length; and long rests of one byte."""
    chosen = [valid[0], max(valid, key=len)]
    made = [data[:at] + huge + data[at + 1 :] for data in chosen for at in range(min(len(data), 150)) for huge in HUGE]
    fills = (b"\0", b"\1", b"\2", b"\x7f", b"\xff")
    return made + [data[:at] + fill * 500_000 for data in chosen for at in (10, 11, len(data) - 1) for fill in fills]


def texts(valid: list[bytes]) -> list[bytes]:
    """JSON and other text: nesting, digits, and both within the first example."""
    first = valid[0]
    many: tuple[bytes, ...] = (
        b"[" * NESTED,
        b'{"a":' * NESTED,
        b"[" * NESTED + b"]" * NESTED,
        b"9" * DIGITS,
        b"-" + b"9" * DIGITS,
    )
    many += (b"0." + b"9" * DIGITS, b"1e" + b"9" * DIGITS, b'"' + b"9" * DIGITS + b'"', b"\x00" * DIGITS, b'"' * DIGITS)
    return [data for each in many for data in (each, first[:1] + each, first + each, first[:-1] + each)]


def answers(*questions: bytes) -> Callable[[list[bytes]], list[bytes]]:
    """The texts as answers of an owner, and as a value within one; `questions` are what an input begins with."""

    def made(_: list[bytes]) -> list[bytes]:
        within = (b'{"id":"a","args":', b'{"items":[{"id":"a","args":', b'{"items":[],"cursor":')
        return [
            question + b"\0\0" + each[:900_000] for first in within for each in texts([first]) for question in questions
        ]

    return made


# ------------------------------------------------------------------------------------------------------- records


def record(kind: Kind) -> Read:
    """Any record of a topic: what is taken is written and read again as the same."""

    def read(data: bytes) -> None:
        found = kind.decode(data)
        again = kind.decode(kind.encode(found))
        assert again == found and type(again) is type(found), (again, found)

    return read


def registered(data: bytes) -> None:
    """A record in Confluent framing, by schemas of a registry."""
    found = avro.decode_command(data, examples.REGISTERED.__getitem__)
    assert avro.decode_command(avro.encode_command(found)) == found


def schema(data: bytes) -> None:
    """The answer of a registry, up to the first empty line, is the schema of the record behind it."""
    answer, _, body = data.partition(b"\n\n")
    found = schema_in("http://registry", answer)
    command = avro.decode_command(to_confluent(examples.HEADER + body, 1), {1: found}.__getitem__)
    assert avro.decode_command(avro.encode_command(command)) == command


def snapshot(data: bytes) -> None:
    """A snapshot and the turns in it: written again they are the same turns."""
    found = avro.decode_history(data)
    if isinstance(found, RunSnapshot):
        turns = turns_of(found)
        held = for_snapshot([value for _, value in turns], bytes_max=100)
        again = turns_of(RunSnapshot(**examples.fields_of(found) | {"turns": held}))
        assert [turn for turn, _ in again] == [turn for turn, _ in turns]


def status(data: bytes) -> None:
    """A status, as users see it."""
    found = avro.decode_status(data)
    shown = json.loads(msgspec.json.encode(status_view(found)))
    assert shown["id"] == found.workflow_id


def task(data: bytes) -> None:
    """An attempt of a queue, and the call that it becomes."""
    found, call, known = read_task(data, examples.app)
    assert known == (found.step in examples.app.steps)
    assert isinstance(call.retry, Retry)


# ---------------------------------------------------------------------------------------------------------- text


def text_of(data: bytes) -> str:
    """As the operating system hands over arguments and variables of the environment."""
    return data.decode("utf-8", "surrogateescape")


def retry(data: bytes) -> None:
    """A retry policy of a call: its delays are delays."""
    found = decode_retry(data)
    for attempt in (1, 2, 1_000_000, 1 << 62):
        assert 0 <= found.delay(attempt, "w") < float("inf")
    assert decode_retry(json.dumps({name: getattr(found, name) for name in examples.NUMBERS}).encode()) == found


def query(data: bytes) -> None:
    """A query, its name up to the first line break, and its answer by an owner of odd runs."""
    name, _, params = data.partition(b"\n")
    asked = Query(query=name.decode("utf-8", "replace"), params=params)
    answer = queries.answer(asked, "deep", examples.Runs())
    queries.check(asked)  # what the owner answers its client must not refuse
    assert len(answer) < RECORD_BYTES_MAX
    json.loads(answer)


def local_url(data: bytes) -> None:
    """sqlite:// and memory://, and the place that they name."""
    url = text_of(data)
    if not url.startswith(("sqlite://", "memory://")):
        url = f"sqlite:///{url}"
    found = parse(url)
    assert url.startswith("memory:") or "\0" not in os.fsdecode(os.fsencode(found.place))
    assert found.partitions is None or 1 <= found.partitions <= 256


def kafka_url(data: bytes) -> None:
    """kafka:// with its options, our own and librdkafka's."""
    found = parse_kafka(f"kafka://{text_of(data).removeprefix('kafka://')}")
    for address in found.bootstrap.split(","):
        assert 0 < int(address.rpartition(":")[2]) < 65536
    assert found.config()["bootstrap.servers"] == found.bootstrap
    assert repr(found) and found.redact("text") is not None


def converts(kind: Any) -> Read:
    """A value of the command line."""
    return lambda data: kind.convert(text_of(data), None, None)


def _records(*names: str) -> Callable[[], list[bytes]]:
    return lambda: [data for name, data in examples.records().items() if name.partition(".")[0] in names]


DECODE: Final = (DecodeError,)
TARGETS: Final[dict[str, Target]] = {
    target.name: target
    for target in (
        *(Target(name.lower(), record(kind), DECODE, _records(name), lengths) for name, kind in KINDS.items()),
        Target("registered", registered, DECODE, examples.registered, lengths),
        Target("schema", schema, (DecodeError, RegistryRefused, Unavailable), examples.schemas, texts),
        Target("snapshot", snapshot, DECODE, examples.snapshots, lengths),
        Target("restore", worlds.restore, (CorruptLog,), examples.histories, lengths),
        Target("shown", status, DECODE, _records("Status"), lengths),
        Target("answered", clients.answered, (Unavailable,), clients.answers, answers(b"\0", b"\1", b"\2")),
        Target("listed", clients.listed, (Unavailable,), clients.pages, answers(b"")),
        Target("replied", clients.replied, (DecodeError, InvalidArguments), clients.replies, lengths),
        Target("ended", clients.ended, (DecodeError, InvalidArguments, *clients.ENDINGS), clients.endings, lengths),
        Target("task", task, (ValueError, InvalidArguments), examples.tasks, lengths),
        Target("intake", worlds.intake, (), examples.commands, lengths),
        Target("payload", payloads.value, (InvalidArguments,), payloads.examples, texts),
        Target("arguments", payloads.arguments, (InvalidArguments,), payloads.calls, texts),
        Target("retry", retry, (ValueError,), examples.retries, texts),
        Target("query", query, (RequestError,), examples.queries, texts),
        Target("local-url", local_url, (InvalidUrl,), examples.local_urls, texts),
        Target("kafka-url", kafka_url, (InvalidUrl,), examples.kafka_urls, texts),
        Target("json", converts(JSON), (click.BadParameter,), examples.json_arguments, texts),
        Target("duration", converts(DURATION), (click.BadParameter,), examples.durations, texts),
        Target("instant", converts(INSTANT), (click.BadParameter,), examples.instants, texts),
    )
}


@cache
def examples_of(name: str) -> tuple[bytes, ...]:
    """The valid examples of a target, made once."""
    return tuple(TARGETS[name].examples())
