"""Starts, signals and cancels runs through Confluent's own serializer and a schema registry.

pip install 'confluent-kafka[avro,schemaregistry]'

python with_registry.py http://localhost:8081 localhost:9092 shop start  order-1 fulfil '[{"id": "order-1"}]'
python with_registry.py http://localhost:8081 localhost:9092 shop signal order-1 approved true
python with_registry.py http://localhost:8081 localhost:9092 shop cancel order-1
python with_registry.py http://localhost:8081 localhost:9092 shop result order-1

The workers run with ?schema.registry.url=… in their URL: they have registered the schemas, and write statuses in
Confluent's framing too. `plain.py` shows how to wait for the reply to a command.
"""

import json
import sys
import time
import uuid

from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition, murmur2
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

CLOSED = {"completed", "failed", "cancelled", "terminated"}
PATIENCE_SECONDS = 30


def send(registry, bootstrap, app, workflow_id, body, fields):
    """Append a command, serialized with the schema that the workers registered."""
    topic = f"{app}.commands"
    schema = registry.get_latest_version(f"{topic}-value").schema
    serialize = AvroSerializer(registry, schema, conf={"auto.register.schemas": False, "use.latest.version": True})
    value = serialize(
        {
            "command_id": str(uuid.uuid4()),
            "workflow_id": workflow_id,
            "sent_at": int(time.time() * 1000),
            "reply_to": None,
            "body": (f"streamflow.{body}", fields),
        },
        SerializationContext(topic, MessageField.VALUE),
    )
    producer = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random", "acks": "all"})
    failures = []
    producer.produce(topic, key=workflow_id.encode(), value=value, on_delivery=lambda error, _: failures.append(error))
    producer.flush(PATIENCE_SECONDS)
    assert failures == [None], failures or "the broker did not acknowledge the command in time"
    return {"sent": body}


def result(registry, bootstrap, app, workflow_id):
    """How the run ended, from `<app>.status`."""
    deserialize = AvroDeserializer(registry)
    topic = f"{app}.status"
    until = time.monotonic() + PATIENCE_SECONDS
    with Consumer({"bootstrap.servers": bootstrap, "group.id": f"{app}-registry"}) as reader:
        partitions = len(reader.list_topics(topic, timeout=PATIENCE_SECONDS).topics[topic].partitions)
        reader.assign([TopicPartition(topic, murmur2(workflow_id.encode(), partitions), OFFSET_BEGINNING)])
        while time.monotonic() < until:
            found = reader.poll(0.2)
            if found is None or found.error() or found.key() != workflow_id.encode() or found.value() is None:
                continue
            status = deserialize(found.value(), SerializationContext(topic, MessageField.VALUE))
            if status["state"] in CLOSED:
                return {"state": status["state"], "result": json.loads(status["result"] or "null")}
    raise TimeoutError(f"run {workflow_id} of app {app} has not ended within {PATIENCE_SECONDS} s")


def main(url, bootstrap, app, verb, workflow_id, *more):
    """One command, or the result of a run."""
    registry = SchemaRegistryClient({"url": url, "timeout": PATIENCE_SECONDS})
    place = registry, bootstrap, app, workflow_id
    match verb, more:
        case "start", (workflow, args):
            return send(*place, "StartWorkflow", {"workflow": workflow, "args": args.encode()})
        case "signal", (name, value):
            return send(*place, "SignalWorkflow", {"name": name, "value": value.encode()})
        case "cancel", ():
            return send(*place, "CancelWorkflow", {})
        case "result", ():
            return result(*place)
    raise SystemExit(__doc__)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:]) if len(sys.argv) > 5 else sys.exit(__doc__)))
