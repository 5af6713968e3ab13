"""Clients with Confluent's framing and a real schema registry; and what happens when it refuses, or is not there."""

from __future__ import annotations

import asyncio
import copy
import json
import signal
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import fastavro
import pytest

import streamflow as sf
from streamflow.cli.worker_process import Workers
from streamflow.codec.avro import decode_history
from streamflow.codec.envelope import CONFLUENT, SINGLE_OBJECT, schema_folder
from streamflow.ids import partition_of
from streamflow.logs.base import HISTORY, REPLIES, STATUS, TIMERS
from tests.kafka.artifacts import RunningRegistry
from tests.kafka.serving import PARTITIONS, Served, delete_topics, serving, wait_until

pytestmark = pytest.mark.timeout(300)  # a dozen processes, some of them Java, on a machine that may be busy

COMMAND = json.loads((schema_folder() / "Command.avsc").read_text())
UNUSED_ID = 2_000_000_000


@pytest.fixture(scope="module")
def served(kafka: str, registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(kafka, tmp_path_factory.mktemp("served"), registry.url) as served:
        yield served


def ask(registry: RunningRegistry, path: str, body: object = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/vnd.schemaregistry.v1+json"}
    request = urllib.request.Request(registry.url + path, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def register(registry: RunningRegistry, served: Served, name: str, schema: object, kind: str = "AVRO") -> int:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    body = {"schema": text, "schemaType": kind}
    found = ask(registry, f"/subjects/{served.app}.{name}/versions", body)["id"]
    assert isinstance(found, int)
    return found


def framed(schema_id: int, schema: Any, value: dict[str, object]) -> bytes:
    out = BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(copy.deepcopy(schema), named_schemas={}), value)
    return CONFLUENT + schema_id.to_bytes(4, "big") + out.getvalue()


def envelope(workflow_id: str, body: object, **more: object) -> dict[str, object]:
    return {"command_id": f"of {workflow_id}", "workflow_id": workflow_id, "sent_at": 1, "body": body, **more}


def start_only() -> Any:
    """A producer's own schema, which knows of no body but the start, and of that only what it needs."""
    schema = copy.deepcopy(COMMAND)
    start = schema["fields"][-1]["type"][0]
    start["fields"] = start["fields"][:2]
    schema["fields"][-1]["type"] = start
    schema["fields"] = [field for field in schema["fields"] if field["name"] != "reply_to"]
    return schema


def test_the_worker_registers_the_public_schemas(registry: RunningRegistry, served: Served):
    for topic, name in (("commands", "Command"), ("status", "Status"), ("history", "History")):
        subject = f"{served.app}.{topic}-value"
        assert ask(registry, f"/config/{subject}") == {"compatibilityLevel": "FULL_TRANSITIVE"}
        found = json.loads(ask(registry, f"/subjects/{subject}/versions/latest")["schema"])
        assert found == json.loads((schema_folder() / f"{name}.avsc").read_text())


def test_confluents_serializer_starts_signals_and_cancels_runs_and_reads_statuses(served: Served):
    for each in ("one", "two"):
        served.with_registry("start", each, "fulfil", json.dumps([{"id": each}]))
    served.with_registry("signal", "one", "approved", "true")
    served.with_registry("cancel", "two")
    assert served.with_registry("result", "one") == {"state": "completed", "result": {"id": "one", "approved": True}}
    assert served.with_registry("result", "two")["state"] == "cancelled"
    assert served.result("one") == {"id": "one", "approved": True}


def test_what_the_engine_reads_back_needs_no_registry(served: Served):
    assert served.plain("start", "plain", "echo", '["x"]')["accepted"]  # its reply is read by the schema alone
    assert served.result("plain") == "x"
    written = {
        topic: [record.value for records in served.records(topic).values() for record in records if record.value]
        for topic in (HISTORY, TIMERS, REPLIES, STATUS)
    }
    for topic in (HISTORY, TIMERS, REPLIES):
        assert all(value.startswith(SINGLE_OBJECT) for value in written[topic])
    assert all(decode_history(value) for value in written[HISTORY])
    assert written[STATUS]
    assert all(value.startswith(CONFLUENT) for value in written[STATUS])


def test_a_client_without_the_registry_is_told_to_set_it(served: Served):
    assert served.plain("start", "watched", "fulfil", '[{"id": "watched"}]')["accepted"]

    async def watch() -> None:
        async with sf.connect(served.plain_url, app=served.app) as client:
            handle = client.handle("watched")
            async for _ in handle.watch():  # the first is the owner's answer, the next comes from the topic
                await handle.signal("approved", True)

    with pytest.raises(sf.Unavailable, match=r"no schema registry is configured.*schema\.registry\.url="):
        asyncio.run(watch())
    assert served.result("watched") == {"id": "watched", "approved": True}


@pytest.mark.parametrize("case", ["start only", "more fields", "another name with an alias"])
def test_a_producers_own_schema_is_resolved_against_ours(registry: RunningRegistry, served: Served, case: str):
    schema, extra = start_only(), {}
    if case == "more fields":
        schema["fields"].insert(0, {"name": "trace", "type": {"type": "map", "values": "string"}})
        extra = {"trace": {"a": "b"}}
    elif case == "another name with an alias":
        schema["fields"][1]["aliases"] = ["order_id"]
    workflow_id = f"own {case}"
    schema_id = register(registry, served, case.replace(" ", "-"), schema)
    value = envelope(workflow_id, {"workflow": "echo", "args": b'["x"]'}, **extra)
    served.produce(framed(schema_id, schema, value), key=workflow_id)
    assert served.with_registry("result", workflow_id)["result"] == "x"


def test_what_the_registry_does_not_know_or_we_cannot_read_is_set_aside(registry: RunningRegistry, served: Served):
    foreign = {"type": "record", "name": "Order", "fields": [{"name": "total", "type": "long"}]}
    foreign_id = register(registry, served, "foreign", foreign)
    other_kind = register(
        registry, served, "json", '{"$schema": "http://json-schema.org/draft-07/schema#"}', kind="JSON"
    )
    bad = {
        CONFLUENT + UNUSED_ID.to_bytes(4, "big") + b"whatever": f"schema id {UNUSED_ID} cannot be had",
        framed(foreign_id, foreign, {"total": 7}): "not a record of its schema",
        CONFLUENT + other_kind.to_bytes(4, "big") + b"{}": "it is of type JSON, expected AVRO",
    }
    for value in bad:
        served.produce(value, key="bad", partition=1)
    letters = served.wait_for_letters(len(bad))
    assert len(letters) == len(bad)
    for value, reason in bad.items():
        (letter,) = [letter for letter in letters if letter.value == value]
        assert reason in letter.reason
        assert letter.partition == 1
    served.prove_it_goes_on()


def test_a_record_waits_for_a_registry_that_does_not_answer(registry: RunningRegistry, served: Served):
    schema = start_only()
    schema["fields"].append({"name": "new", "type": "string"})
    schema_id = register(registry, served, "waits", schema)
    value = framed(schema_id, schema, envelope("waits", {"workflow": "echo", "args": b'["x"]'}, new="n"))
    home = partition_of("waits", PARTITIONS)
    before = len(served.letters())
    registry.process.send_signal(signal.SIGSTOP)
    try:
        served.produce(value, key="waits", partition=home)
        served.wait_until_said(f"waits for the schema with id {schema_id}")
        assert f"partition {home}: the command at offset" in served.said()
        # Those that are known, and the other partitions, need no registry.
        other = next(each for each in map(str, range(99)) if partition_of(each, PARTITIONS) != home)
        assert served.plain("start", other, "echo", '["y"]')["accepted"]
    finally:
        registry.process.send_signal(signal.SIGCONT)
    assert served.with_registry("result", "waits")["result"] == "x"
    assert len(served.letters()) == before


@pytest.mark.parametrize("kind", ["refuses", "is not there"])
def test_a_worker_does_not_start_when_the_registry(
    kind: str, kafka: str, registry: RunningRegistry, tmp_path: Path, served: Served
):
    refusing = Served(kafka, tmp_path, registry.url if kind == "refuses" else "http://127.0.0.1:1")
    refusing.app = served.app  # its topics are there
    subject = f"{served.app}.status-value"
    if kind == "refuses":
        refusing.app = f"{served.app}-2"
        subject = f"{refusing.app}.status-value"
        other = {"type": "record", "name": "Status", "fields": [{"name": "total", "type": "long"}]}
        ask(registry, f"/config/{subject}", {"compatibility": "FULL_TRANSITIVE"}, "PUT")
        ask(registry, f"/subjects/{subject}/versions", {"schema": json.dumps(other), "schemaType": "AVRO"})
    with Workers() as workers:
        worker = refusing.start(workers)
        wait_until(lambda: not worker.is_alive, refusing.said)
    if kind == "refuses":
        delete_topics(kafka, refusing.app)
        assert f"refuses Status.avsc for the subject {subject}" in refusing.said()
    else:
        assert "the schema registry cannot be asked (http://127.0.0.1:1" in refusing.said()
    assert "Traceback" not in refusing.said()
