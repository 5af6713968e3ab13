"""Starts, signals and cancels runs with nothing of streamflow but its schemas: single-object Avro, no registry.

pip install confluent-kafka fastavro

python plain.py localhost:9092 shop start  order-1 fulfil '[{"id": "order-1", "total": 30}]'
python plain.py localhost:9092 shop signal order-1 approved true
python plain.py localhost:9092 shop cancel order-1
python plain.py localhost:9092 shop result order-1

Each prints one line of JSON. What another language has to do is in the four functions below: `command` (a record),
`send` (the partitioner), `answer` (the reply), `result` (the statuses).
"""

import json
import sys
import time
import uuid
from io import BytesIO
from pathlib import Path

import fastavro
from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition, murmur2

SCHEMAS = Path(__file__).resolve().parents[2] / "schemas"
SINGLE_OBJECT = b"\xc3\x01"
CLOSED = {"completed", "failed", "cancelled", "terminated"}
PATIENCE_SECONDS = 30


def load(name):
    """A schema, and the ten bytes in front of each record of it: C3 01 and the schema's CRC-64-AVRO fingerprint."""
    schema = fastavro.parse_schema(json.loads((SCHEMAS / f"{name}.avsc").read_text()), named_schemas={})
    canonical = fastavro.schema.to_parsing_canonical_form(schema)
    return schema, SINGLE_OBJECT + bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))


def decode(name, value):
    """A record of our own schema. A reader that is to outlive versions looks the schema up by its fingerprint."""
    schema, header = load(name)
    assert value.startswith(header), f"another version of {name}: {value[:10].hex()}"
    return fastavro.schemaless_reader(BytesIO(value[len(header) :]), schema, None)


def command(workflow_id, body, fields, *, reply_to=None, command_id=None):
    """The bytes of a command. Sent again under the same `command_id` it has no further effect."""
    schema, header = load("Command")
    record = {
        "command_id": command_id or str(uuid.uuid4()),
        "workflow_id": workflow_id,
        "sent_at": int(time.time() * 1000),
        "reply_to": reply_to,
        "body": (f"streamflow.{body}", fields),
    }
    out = BytesIO(header)
    out.seek(0, 2)
    fastavro.schemaless_writer(out, schema, record)
    return record["command_id"], out.getvalue()


def send(bootstrap, app, workflow_id, value):
    """Append it. The key is the workflow id, the partitioner that of Java; another one only costs a forward."""
    producer = Producer(
        {
            "bootstrap.servers": bootstrap,
            "partitioner": "murmur2_random",
            "acks": "all",
            "enable.idempotence": True,
        }
    )
    failures = []
    producer.produce(
        f"{app}.commands", key=workflow_id.encode(), value=value, on_delivery=lambda error, _: failures.append(error)
    )
    producer.flush(PATIENCE_SECONDS)
    assert failures == [None], failures or "the broker did not acknowledge the command in time"


def answer(bootstrap, app, workflow_id, body, fields):
    """Send the command and wait for its reply, on a partition of `<app>.replies` that we choose and name in it."""
    with Consumer({"bootstrap.servers": bootstrap, "group.id": f"{app}-plain", "enable.auto.commit": False}) as reader:
        reply_to = partition_of(reader, f"{app}.replies", str(uuid.uuid4()))
        place = TopicPartition(f"{app}.replies", reply_to)
        _, end = reader.get_watermark_offsets(place, timeout=PATIENCE_SECONDS)
        reader.assign([TopicPartition(place.topic, place.partition, end)])
        command_id, value = command(workflow_id, body, fields, reply_to=reply_to)
        send(bootstrap, app, workflow_id, value)
        for key, found in records(reader):
            if key == command_id.encode():
                reply = decode("Reply", found)
                return {"accepted": reply["accepted"], "error": reply["error"], "reply_to": reply_to}
    raise TimeoutError(f"no worker of app {app} answered within {PATIENCE_SECONDS} s")


def result(bootstrap, app, workflow_id):
    """How the run ended: `<app>.status` is compacted, so it has the last status of every run."""
    with Consumer({"bootstrap.servers": bootstrap, "group.id": f"{app}-plain", "enable.auto.commit": False}) as reader:
        partition = partition_of(reader, f"{app}.status", workflow_id)
        reader.assign([TopicPartition(f"{app}.status", partition, OFFSET_BEGINNING)])
        for key, found in records(reader):
            if key == workflow_id.encode() and found is not None:
                status = decode("Status", found)
                if status["state"] in CLOSED:
                    value = None if status["result"] is None else json.loads(status["result"])
                    return {"state": status["state"], "result": value, "error": status["error"]}
    raise TimeoutError(f"run {workflow_id} of app {app} has not ended within {PATIENCE_SECONDS} s")


def partition_of(reader, topic, key):
    """The partition that Java's default partitioner gives the key."""
    found = reader.list_topics(topic, timeout=PATIENCE_SECONDS).topics[topic]
    assert found.partitions, f"there is no topic {topic}: start a worker of the app, which makes it"
    return murmur2(key.encode(), len(found.partitions))


def records(reader):
    """Keys and values as they come, for as long as we have patience."""
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        found = reader.poll(0.2)
        if found is not None and not found.error():
            yield found.key(), found.value()


def main(bootstrap, app, verb, workflow_id, *more):
    """One command, or the result of a run."""
    match verb, more:
        case "start", (workflow, args):
            return answer(bootstrap, app, workflow_id, "StartWorkflow", {"workflow": workflow, "args": args.encode()})
        case "signal", (name, value):
            return answer(bootstrap, app, workflow_id, "SignalWorkflow", {"name": name, "value": value.encode()})
        case "cancel", ():
            return answer(bootstrap, app, workflow_id, "CancelWorkflow", {})
        case "result", ():
            return result(bootstrap, app, workflow_id)
    raise SystemExit(__doc__)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:]) if len(sys.argv) > 4 else sys.exit(__doc__)))
