"""Clients that know nothing of streamflow but its schemas: each starts, signals and cancels runs on a real broker."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest

from streamflow.codec.avro import decode_command, decode_reply
from streamflow.ids import partition_of
from streamflow.logs.base import COMMANDS, REPLIES
from tests.kafka.artifacts import Java
from tests.kafka.serving import CLIENTS, PARTITIONS, ROOT, Served, load_client, serving, wait_until

pytestmark = pytest.mark.timeout(300)  # a dozen processes, some of them Java, on a machine that may be busy

plain = load_client("plain.py")

ALPHABET = "abz09-_.:/ äßñžłø привет 日本語 עברית 😀🏴‍☠️ \u0301\u200d\U0010ffff"


@pytest.fixture(scope="module")
def served(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(kafka, tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture(scope="module")
def compiled(java: Java) -> Java:
    java.compile(CLIENTS / "Plain.java", ROOT / "tests" / "kafka" / "Partitions.java")
    return java


def order(workflow_id: str) -> str:
    return json.dumps([{"id": workflow_id}])


def start(workflow_id: str, value: str = "x", **more: object) -> bytes:
    """A start of the smallest workflow, as a foreign producer writes it."""
    fields = {"workflow": "echo", "args": json.dumps([value]).encode()}
    _, encoded = plain.command(workflow_id, "StartWorkflow", fields, **more)
    assert isinstance(encoded, bytes)
    return encoded


# Python: confluent-kafka, fastavro and the schemas.


def test_python_starts_and_signals_a_run_and_reads_how_it_ended(served: Served):
    assert served.plain("start", "py-1", "fulfil", order("py-1"))["accepted"]
    assert served.plain("signal", "py-1", "approved", "true")["accepted"]
    found = served.plain("result", "py-1")
    assert found == {"state": "completed", "result": {"id": "py-1", "approved": True}, "error": None}


def test_python_cancels_a_run_and_is_told_why_not(served: Served):
    assert served.plain("start", "py-2", "fulfil", order("py-2"))["accepted"]
    assert served.plain("cancel", "py-2")["accepted"]
    assert served.plain("result", "py-2")["state"] == "cancelled"
    refused = served.plain("signal", "py-none", "approved", "true")
    assert (refused["accepted"], refused["error"]["type"]) == (False, "WorkflowNotFound")


# Java: Kafka's own client, and Avro's.


def test_java_starts_signals_and_cancels_runs(served: Served, compiled: Java):
    def call(*args: str) -> str:
        return compiled.run("Plain", str(ROOT / "schemas"), served.bootstrap, served.app, *args)

    one, two = "java-žluť-😀", "java-2"
    said = json.loads(call("start", one, "fulfil", order(one)))
    assert (said["accepted"], said["partition"]) == (True, partition_of(one, PARTITIONS))
    assert json.loads(call("signal", one, "approved", "false"))["accepted"]
    assert served.plain("result", one)["result"] == {"id": one, "approved": False}
    assert json.loads(call("start", two, "fulfil", order(two)))["accepted"]
    assert json.loads(call("cancel", two))["accepted"]
    assert served.plain("result", two)["state"] == "cancelled"


@pytest.mark.parametrize("partitions", [1, 3, 48])
def test_ids_have_the_partitions_that_java_gives_them(compiled: Java, partitions: int):
    chance = random.Random(partitions)
    ids = ["".join(chance.choices(ALPHABET, k=chance.randint(1, 60))) for _ in range(2_000)]
    found = compiled.run("Partitions", str(partitions), input="".join(f"{each}\n" for each in ids))
    assert [int(line) for line in found.split()] == [partition_of(each, partitions) for each in ids]


# What a foreign producer may do.


def test_commands_of_another_partitioner_are_forwarded(served: Served):
    ids = [f"foreign-{number}" for number in range(12)]
    for each in ids:
        served.produce(start(each, each), key=each)
    assert [served.plain("result", each)["result"] for each in ids] == ids
    places: dict[str, list[int]] = {each: [] for each in ids}
    for partition, records in served.records(COMMANDS).items():
        for record in records:
            if record.key.decode() in places:
                assert record.value is not None
                assert decode_command(record.value).workflow_id == record.key.decode()
                places[record.key.decode()].append(partition)
    forwarded = [each for each, found in places.items() if len(found) > 1]
    assert forwarded, "librdkafka's default partitioner agreed with ours on every id"
    assert all(partition_of(each, PARTITIONS) in found for each, found in places.items())


def test_replies_come_to_the_partition_that_the_command_names_and_no_other(served: Served):
    asked = {}
    for partition in range(PARTITIONS):
        command_id, value = plain.command(
            f"reply-{partition}", "StartWorkflow", {"workflow": "echo", "args": b'["x"]'}, reply_to=partition
        )
        served.produce(value, key=f"reply-{partition}")
        asked[command_id] = partition
    for nobody in (None, PARTITIONS, -1):
        served.produce(start(f"reply-{nobody}", reply_to=nobody), key=f"reply-{nobody}")
        assert served.plain("result", f"reply-{nobody}")["state"] == "completed"

    def found() -> dict[str, int]:
        return {
            decode_reply(record.value or b"").command_id: partition
            for partition, records in served.records(REPLIES).items()
            for record in records
            if decode_reply(record.value or b"").workflow_id.startswith("reply-")
        }

    wait_until(lambda: found().keys() >= asked.keys(), lambda: f"{found()}\n{served.said()}")
    assert found() == asked


def test_what_cannot_be_read_is_set_aside_with_its_reason_and_the_partition_goes_on(served: Served):
    header = start("x")[:10]
    bad = {
        b"no Avro at all": "found 6e 6f 20 41 76 72 6f 20",
        b"\xc3\x01" + bytes(8) + b"of another schema": "found 0000000000000000: upgrade?",
        header + b"\x80\x80\x80\x80": "the body is damaged",
        b"\0\0\0\0\7" + start("x")[10:]: "set its address in the log's URL, as kafka://…?schema.registry.url=",
        start("large", "x" * 1_010_000): "run large: the command has 1,010",
    }
    for value in bad:
        for partition in range(PARTITIONS):  # where it belongs, and where it does not
            served.produce(value, key="bad", partition=partition)
    letters = served.wait_for_letters(len(bad) * PARTITIONS)
    for value, reason in bad.items():
        found = [letter for letter in letters if reason in letter.reason]
        assert sorted(letter.partition for letter in found) == list(range(PARTITIONS)), reason
        assert {letter.topic for letter in found} == {f"{served.app}.{COMMANDS}"}
        assert {letter.value for letter in found} == {value if len(value) < 900_000 else None}
    served.prove_it_goes_on()
    assert len(served.letters()) == len(bad) * PARTITIONS
