"""Valid examples for the targets, made by the product's own encoders, and the small worlds that some of them need."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from msgspec import structs

import streamflow as sf
from streamflow.codec import avro
from streamflow.codec.envelope import schema_folder, to_confluent, write_body
from streamflow.codec.turns import for_snapshot
from streamflow.core.commands import (
    Body,
    CancelWorkflow,
    CleanupWorkflow,
    Command,
    FireTimer,
    Query,
    ReportAttempt,
    SignalWorkflow,
    StartWorkflow,
    TerminateWorkflow,
)
from streamflow.core.effects import StatusRecord, StepTask
from streamflow.core.events import Claim, HistoryRecord, RunSnapshot, Turn
from streamflow.core.retry import Retry
from streamflow.errors import ErrorInfo
from streamflow.ids import partition_of
from streamflow.projections import queries as projections
from streamflow.projections.views import status_view
from streamflow.workflow.remote import remote_call
from tests.core.scripted import World

GOLDEN: Final = Path(__file__).parent.parent / "codec" / "golden"
NUMBERS: Final = ("max_attempts", "initial", "factor", "max_delay", "jitter", "max_elapsed")
PARTITIONS: Final = 2
HOME: Final = next(each for each in map(str, range(99)) if partition_of(each, PARTITIONS) == 0)
"""A workflow id of the partition whose intake is tested."""

app = sf.App("fuzzed")


@app.step(queue="gpu", timeout=9, retry=sf.Retry(max_attempts=2))
async def embed(text: str) -> int:
    """A step that tasks may name."""
    return len(text)


def fields_of(record: Any) -> dict[str, Any]:
    """The fields of a record, to make another one."""
    return structs.asdict(record)


@cache
def records() -> dict[str, bytes]:
    """One record of every kind, with all its fields set."""
    return {path.stem: bytes.fromhex(path.read_text().strip()) for path in sorted(GOLDEN.glob("*.hex"))}


# ------------------------------------------------------------------------------------------------------ commands

BODIES: Final[tuple[Body, ...]] = (
    StartWorkflow(workflow="work", args=b"[1]"),
    SignalWorkflow(name="go", value=b"[true]"),
    FireTimer(kind="sleep", run=1, number=2, fire_at=1_000_500),
    ReportAttempt(run=1, number=1, attempt=1, result=b"1", started_at=5),
    ReportAttempt(run=1, number=1, attempt=1, error=ErrorInfo("E", "no"), retry_after_ms=9),
    CancelWorkflow(),
    TerminateWorkflow(reason="enough"),
    CleanupWorkflow(force=True),
    StartWorkflow(workflow="work", if_exists="restart", delay_ms=5, timeout_ms=50, context=b"{}"),
    StartWorkflow(workflow="unknown", if_exists="error", start_at=2_000_000),
    Query(query="list", params=b'{"limit":5}'),
    Query(query="steps", params=b'{"order":"desc"}'),
)


def command(body: Body, *, number: int = 0, to: str = HOME, reply_to: int | None = None) -> bytes:
    """A command as anybody may write it."""
    return avro.encode_command(
        Command(command_id=f"c{number}", workflow_id=to, sent_at=7, body=body, reply_to=reply_to)
    )


def chunked(*values: bytes) -> bytes:
    """Several records as one input, each behind its length in two bytes."""
    return b"".join(len(value).to_bytes(2, "big") + value for value in values)


def chunks(data: bytes) -> Iterator[bytes]:
    """The records of an input; the last may be short."""
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 2], "big")
        yield data[at + 2 : at + 2 + size]
        at += 2 + size


def commands() -> list[bytes]:
    """What a partition's commands topic may hold: sequences of commands, some in Confluent framing or for others."""
    made = [command(body, number=number, reply_to=number % 2 or None) for number, body in enumerate(BODIES)]
    one_by_one = [chunked(made[0], each) for each in made[1:]]
    by_registry = to_confluent(made[1], CURRENT)
    return [*one_by_one, chunked(*made), chunked(made[0], by_registry, b"\0junk", b"", command(BODIES[1], to="2"))]


# ------------------------------------------------------------------------------------------------------ registry

HEADER: Final = avro.command_codec().encode(Command(command_id="", workflow_id="", sent_at=0, body=CancelWorkflow()))[
    :10
]
CURRENT, OLDER, NEWER, FOREIGN = range(5, 9)


def _source() -> Any:
    return json.loads((schema_folder() / "Command.avsc").read_text(encoding="utf-8"))


def _older() -> Any:
    schema = _source()
    schema["fields"] = [field for field in schema["fields"] if field["name"] != "reply_to"]
    next(field for field in schema["fields"] if field["name"] == "sent_at")["type"] = "int"
    return schema


def _newer() -> Any:
    schema = _source()
    labels = {"type": "map", "values": ["null", "double", {"type": "array", "items": "string"}]}
    schema["fields"] += [{"name": "labels", "type": labels}, {"name": "priority", "type": "float"}]
    return schema


def _foreign() -> Any:
    """Of a producer that sends one kind of command, with logical types of its own."""
    cancel = {"type": "record", "name": "CancelWorkflow", "namespace": "streamflow", "fields": []}
    return {
        "type": "record",
        "name": "Command",
        "namespace": "streamflow",
        "fields": [
            {"name": "command_id", "type": {"type": "string", "logicalType": "uuid"}},
            {"name": "workflow_id", "type": "string"},
            {"name": "sent_at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
            {"name": "body", "type": cancel},
        ],
    }


REGISTERED: Final[dict[int, Any]] = {CURRENT: _source(), OLDER: _older(), NEWER: _newer(), FOREIGN: _foreign()}


def _value(**more: Any) -> dict[str, Any]:
    body = ("streamflow.SignalWorkflow", {"name": "go", "value": b"1", "error": None})
    return {"command_id": "c", "workflow_id": "w", "sent_at": 7, "reply_to": None, "body": body, **more}


def _bodies() -> dict[int, bytes]:
    labels = {"a": None, "b": 1.5, "c": ["x", "y"]}
    place = "8f14e45f-ceea-467f-a7d5-91e1f3a7c8a1"
    values = {
        CURRENT: _value(),
        OLDER: _value(),
        NEWER: _value(labels=labels, priority=0.5),
        FOREIGN: _value(command_id=place, body={}),
    }
    return {key: write_body(value, REGISTERED[key]) for key, value in values.items()}


def registered() -> list[bytes]:
    """Commands by schemas of a registry."""
    return [b"\0" + key.to_bytes(4, "big") + body for key, body in _bodies().items()]


def schemas() -> list[bytes]:
    """Answers of a registry, each with a record of the schema in it."""
    return [
        json.dumps({"schema": json.dumps(REGISTERED[key])}).encode() + b"\n\n" + body for key, body in _bodies().items()
    ]


# ------------------------------------------------------------------------------------------------------- history


def busy(s: Any, args: bytes) -> Any:
    """A program that waits for one of each, in any order."""
    wanted = {s.step("charge"), s.step("embed", queue="gpu"), s.sleep(500), s.signal("go")}
    while wanted:
        number, _ = yield wanted
        wanted.discard(number)
    return args


def _turns() -> list[Turn]:
    world = World(work=busy)
    world.start(to=HOME, args=b'["a"]')
    world.complete(0, to=HOME)
    for body in BODIES[1:4]:
        world.send(body, to=HOME)
        world.decide(later_ms=500)
    return world.history


def histories() -> list[bytes]:
    """Histories of a partition: whole, with a claim between, trimmed with a snapshot, and each record alone."""
    turns = _turns()
    for seq, turn in enumerate(turns, 1):
        turn.seq = seq
    encoded = [avro.encode_history(turn) for turn in turns]
    first, second = (avro.encode_history(Claim(term=term, owner="o", at=1)) for term in (1, 2))
    last = turns[-1]
    place: dict[str, Any] = {"workflow_id": HOME, "turn": last.turn, "term": 2, "at": last.at, "consumed": 9}
    copied = RunSnapshot(**place, seq=1, turns=for_snapshot(encoded, bytes_max=100))
    deleted = records()["History.Turn.RunDeleted"]
    whole = chunked(first, *encoded)
    return [
        b"\0" + whole,
        b"\2" + whole + chunked(second, avro.encode_history(copied)),
        b"\1" + chunked(second, encoded[-1], avro.encode_history(copied)),
        *(b"\1" + chunked(first, data) for data in (encoded[0], deleted)),
    ]


def snapshots() -> list[bytes]:
    """Snapshots, with turns whole and in parts."""
    turns = _turns()
    encoded = [avro.encode_history(turn) for turn in turns]
    place: dict[str, Any] = {"workflow_id": HOME, "turn": turns[-1].turn, "term": 1, "seq": 1, "at": 1, "consumed": 1}
    held = (encoded, for_snapshot(encoded, bytes_max=50), encoded[-1:])
    found: list[HistoryRecord] = [RunSnapshot(**place, turns=turns) for turns in held]
    return [avro.encode_history(each) for each in found]


# ---------------------------------------------------------------------------------------------------------- text


def retries() -> list[bytes]:
    """Policies as calls on queues carry them."""
    policies = (Retry(), Retry(max_attempts=None, max_elapsed=5), Retry.never, Retry(factor=1e300, jitter=1))
    found = [remote_call("s", "w", timeout=None, retry=policy).retry for policy in policies]
    return [each for each in found if each is not None]


def tasks() -> list[bytes]:
    """Attempts of steps that are there, and are not."""
    place: dict[str, Any] = {
        "workflow_id": "w",
        "run": 1,
        "number": 0,
        "attempt": 1,
        "workflow": "f",
        "scheduled_at": 1,
    }
    policies = retries()
    found = [
        StepTask(**place, step="embed", name="embed", args=b'["a"]', timeout_ms=9, retry=retry)
        for retry in (policies[0], policies[-1], None)
    ]
    found.append(StepTask(**place, step="gone", name="other", args=b"[]"))
    return [avro.encode_task(each) for each in found]


DEEP_ARGS: Final = b"[" * 5_000 + b"]" * 5_000


class Runs:
    """A partition's durable state with odd runs: payloads that are no JSON, nest deeply, or are large."""

    def __init__(self) -> None:
        place: dict[str, Any] = {"workflow": "f", "run": 1, "turn": 1, "state": "running"}
        odd = {"deep": DEEP_ARGS, "junk": b"\xff", "large": b'"' + b"x" * 800_000 + b'"', "number": b"9" * 5_000}
        self._runs = {
            name: StatusRecord(workflow_id=name, args=args, created_at=at, progress=args, **place)
            for at, (name, args) in enumerate(odd.items(), 1)
        }

    def status(self, workflow_id: str) -> StatusRecord | None:
        return self._runs.get(workflow_id)

    def turns(self, workflow_id: str) -> Sequence[Turn]:
        return _turns()

    def runs(self, *, descending: bool, after: tuple[int, str] | None) -> Iterator[StatusRecord]:
        found = sorted(self._runs.values(), key=lambda run: run.created_at, reverse=descending)
        return (run for run in found if after is None or ((run.created_at, run.workflow_id) > after) != descending)


def queries() -> list[bytes]:
    """Queries with what each may say, cursors included."""
    behind = projections.list_cursor("asc", status_view(Runs()._runs["junk"]))
    listing = {"workflow": "f", "state": "running", "order": "asc", "limit": 2, "cursor": behind}
    page = json.loads(projections.answer(Query(query="steps", params=b'{"limit":1}'), "deep", Runs()))
    return [
        b"status\n{}",
        b"list\n{}",
        b"list\n" + json.dumps(listing).encode(),
        b"steps\n" + json.dumps({"limit": 2, "cursor": page["cursor"]}).encode(),
        b'history\n{"limit": 3}',
    ]


def local_urls() -> list[bytes]:
    """URLs of files and of memory."""
    return [
        b"sqlite:///orders.db",
        b"sqlite:////var/x%20y.db?synchronous=normal&max_mib=100&partitions=8",
        b"memory://name?partitions=6",
    ]


def kafka_urls() -> list[bytes]:
    """URLs of clusters with options of each kind."""
    return [
        b"kafka://a:9092,b,[::1]:9093?partitions=8&replication=3",
        b"kafka://a?security.protocol=SASL_SSL&sasl.username=me&sasl.password=x%26y&ssl.ca.location=/etc/ca.pem",
        b"kafka://a?schema.registry.url=http://r:8081/x,https://[::1]:8082&basic.auth.user.info=me:secret",
        b"kafka://a?schema.registry.url=http://r&bearer.auth.token=t&schema.registry.ssl.ca.location=/ca",
        b"kafka://a?sasl.password.env=HOME&sasl.oauthbearer.assertion.file=/x",
    ]


def json_arguments() -> list[bytes]:
    """Values of the command line."""
    return [b'{"id": "o-1", "total": 5}', b"[1, -2.5e3, null]", '"é\\u00e9"'.encode(), b"true"]


def durations() -> list[bytes]:
    """Seconds, and with units."""
    return [b"2.5", b"500ms", b"1h 30min", b"7d", b".5w"]


def instants() -> list[bytes]:
    """Instants with their zones."""
    return [b"2031-05-01T06:00:00+02:00", b"2031-05-01T06:00Z", b"20310501T060000.123456-1159"]
