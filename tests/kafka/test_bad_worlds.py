"""A cluster that is not what it was: topics made anew, another cluster's state, a producer that fails for good, and
records that outsiders should not have written."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

import streamflow as sf
from streamflow.broker import Cluster
from streamflow.codec.avro import decode_dead_letter
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, HISTORY, STATUS
from streamflow.logs.kafka import KafkaLog
from streamflow.logs.kafka_lane import KafkaLane
from streamflow.logs.kafka_topics import Topics
from streamflow.logs.kafka_url import parse_kafka
from streamflow.logs.open import open_log
from streamflow.worker import Worker
from tests.kafka.faulty_app import STEPS
from tests.kafka.stage import all_complete, delete_topics, staged, start_orders, until, until_async

pytestmark = pytest.mark.timeout(200)


def made_anew(url: str, app: str, topic: str) -> None:
    """Delete one topic and make it again, as somebody might who wants to empty it."""
    admin = AdminClient({"bootstrap.servers": url.partition("://")[2].partition("?")[0]})
    for future in admin.delete_topics([f"{app}.{topic}"]).values():
        future.result()
    topics = Topics(parse_kafka(url), app)
    for _ in range(200):
        if topic not in topics.describe([topic], settings=False):
            break
    topics.create([topic], 6, 1)


def test_a_topic_that_is_made_anew_under_a_worker_is_refused(kafka: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path, f"kafka://{kafka}", workers=1) as (stage, client):
            assert await (await client.start("order", 0.01, id="before")).result() == list(range(STEPS))
            await asyncio.to_thread(made_anew, stage.url, stage.app, HISTORY)
            noticing = asyncio.create_task(client.start("order", 0.01, id="after"))  # something to write makes it look
            await until(lambda: not stage.workers.all[0].is_alive, stage.said, seconds=60)
            said = stage.said()
            assert f"topic {stage.app}.{HISTORY} was deleted and created again (id " in said
            assert "restore the topic, or delete all topics of the app to begin anew" in said
            noticing.cancel()

    asyncio.run(main())


def wait_for_notes(url: str, app: str) -> None:
    """Until a worker has committed an offset, and with it which history it belongs to."""
    settings = {"bootstrap.servers": url.partition("://")[2].partition("?")[0], "group.id": app}
    consumer = Consumer(settings)
    places = [TopicPartition(f"{app}.{COMMANDS}", partition) for partition in range(6)]
    try:
        deadline = time.monotonic() + 60
        while not any(place.metadata for place in consumer.committed(places, timeout=20)):
            assert time.monotonic() < deadline, "nothing was committed"
    finally:
        consumer.close()


def test_a_worker_without_any_state_refuses_commands_whose_history_was_made_anew(kafka: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path, f"kafka://{kafka}", workers=1) as (stage, client):
            assert await (await client.start("order", 0.01, id="before")).result() == list(range(STEPS))
            await asyncio.to_thread(wait_for_notes, stage.url, stage.app)
            assert await stage.workers.all[0].stop(60) == 0
            await asyncio.to_thread(made_anew, stage.url, stage.app, HISTORY)
            fresh = stage.start(state="fresh")
            await until(lambda: not fresh.is_alive, stage.said, seconds=60)
            assert "the history of app" in stage.said()
            assert "the commands that are kept would start them again" in stage.said()

    asyncio.run(main())


def test_state_of_another_cluster_is_wiped_and_rebuilt(kafka: str, kafka_cluster: Cluster, tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path, f"kafka://{kafka}", workers=1) as (stage, client):
            assert await (await client.start("order", 0.01, id="here")).result() == list(range(STEPS))
            assert await stage.workers.all[0].stop(60) == 0
            elsewhere = f"{kafka_cluster.url}?partitions=6"
            try:
                await (await open_log(elsewhere, app=stage.app)).close()
                stage.start(url=elsewhere)  # with the state directory of the first
                async with sf.connect(elsewhere, app=stage.app) as other:
                    await stage.until_said("the local history state was wiped and is rebuilt")
                    with pytest.raises(sf.WorkflowNotFound):
                        await other.handle("here").status()
                    assert await (await other.start("order", 0.01, id="there")).result() == list(range(STEPS))
            finally:
                for worker in stage.workers.all:
                    if worker.is_alive:
                        worker.kill()
                await asyncio.to_thread(delete_topics, elsewhere, stage.app)

    asyncio.run(main())


def fail_for_good(producer: Producer) -> None:
    """What librdkafka does itself when idempotence cannot be kept: a fatal error. Its own function for tests."""
    library = next(Path(confluent_kafka.__file__).parent.parent.glob("confluent_kafka.libs/librdkafka*.so*"), None)
    assert library is not None, "confluent-kafka comes without its librdkafka"
    call = ctypes.CDLL(str(library)).rd_kafka_test_fatal_error
    call.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    # The handle is the first field behind the object's header.
    handle = ctypes.c_void_p.from_address(id(producer) + 16)
    assert call(handle, -150, b"made by a test") == 0


def test_a_producer_that_fails_for_good_is_replaced_and_nothing_is_lost(kafka: str, tmp_path: Path) -> None:
    app = sf.App(f"fatal-{uuid.uuid4().hex[:8]}")

    @app.step
    async def work(index: int) -> int:
        await asyncio.sleep(0.02)
        return index

    @app.workflow
    async def order() -> list[int]:
        return [await work(index) for index in range(STEPS)]

    url = f"kafka://{kafka}?partitions=4"

    async def main() -> None:
        log = await open_log(url, app=app.name)
        assert isinstance(log, KafkaLog)
        worker = Worker(app, log, state_dir=tmp_path)
        await worker.start()
        try:
            async with sf.connect(url, app=app.name) as client:
                handles = [await client.start("order", id=f"order-{number}") for number in range(40)]
                writing = log._writing
                before = [lane for lane in (*writing._lanes, writing._publisher) if lane is not None]
                assert len(before) == 2
                for lane in before:
                    assert isinstance(lane, KafkaLane)
                    fail_for_good(lane._producer)
                await all_complete(list(handles))
                assert not set(before) & {*writing._lanes, writing._publisher}, "none of them is used any more"
        finally:
            await worker.stop()
            await log.close()
            await asyncio.to_thread(delete_topics, url, app.name)

    asyncio.run(main())


def garbage() -> list[bytes | None]:
    """What a record on the commands topic may hold."""
    return [
        None,
        b"",
        os.urandom(300),
        b'{"start": "order"}',
        b"\xc3\x01" + b"\x00" * 8 + b"unknown schema",
        b"\x00\x00\x00\x00\x07confluent framing",
        b"x" * 999_000,
    ]


def test_garbage_on_every_topic_that_outsiders_may_write_ends_as_dead_letters(kafka: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path, f"kafka://{kafka}", workers=1) as (stage, client):
            handles = await start_orders(client, 20, 0.05)
            producer = Producer({"bootstrap.servers": kafka, "message.max.bytes": 1_048_000})
            for partition in range(6):
                for value in garbage():
                    for key in (b"order-1", None):
                        producer.produce(f"{stage.app}.{COMMANDS}", value, key, partition)
            producer.produce(f"{stage.app}.{STATUS}", b"not a status", b"order-1", 0)
            assert producer.flush(30) == 0
            await all_complete(handles)
            late = await start_orders_again(client)
            await all_complete(late)
            expected = 6 * 2 * len(garbage())

            async def all_told() -> bool:
                return await dead_letters(stage.url, stage.app) >= expected

            await until_async(all_told)  # the runs need not be on every partition
            assert await dead_letters(stage.url, stage.app) == expected
            after = await stage.after()
            assert after.findings.all_well, after.findings

    asyncio.run(main())


async def start_orders_again(client: sf.Client) -> list[sf.Handle[Any]]:
    return [await client.start("order", 0.01, id=f"late-{number}") for number in range(12)]


async def dead_letters(url: str, app: str) -> int:
    """How many there are; each says why."""
    log = await open_log(url, app=app, create=False)
    try:
        found = 0
        for partition in range(log.partitions):
            for record in await log.read(DEAD_LETTERS, partition, 0):
                letter = decode_dead_letter(record.value or b"")
                assert letter.reason and letter.topic == f"{app}.{COMMANDS}" and letter.partition == partition, letter
                found += 1
        return found
    finally:
        await log.close()


def test_a_topic_with_a_wrong_setting_is_refused_by_name_with_the_command_that_repairs_it(kafka: str) -> None:
    url, app = f"kafka://{kafka}?partitions=2", f"wrong-{uuid.uuid4().hex[:8]}"

    def spoil(change: Callable[[AdminClient, str], None]) -> None:
        change(AdminClient({"bootstrap.servers": kafka}), f"{app}.{HISTORY}")

    def keep_for_a_day(admin: AdminClient, topic: str) -> None:
        from confluent_kafka.admin import (  # type: ignore[attr-defined]
            AlterConfigOpType,
            ConfigEntry,
            ConfigResource,
            ResourceType,
        )

        entry = ConfigEntry("retention.ms", "86400000", incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
        for future in admin.incremental_alter_configs([resource]).values():
            future.result()
        topics, deadline = Topics(parse_kafka(url), app), time.monotonic() + 60
        while (
            topics.describe([HISTORY], settings=True)[HISTORY].settings["retention.ms"] != "86400000"
        ):  # the broker that is asked
            assert time.monotonic() < deadline

    async def main() -> None:
        await (await open_log(url, app=app)).close()
        try:
            await asyncio.to_thread(spoil, keep_for_a_day)
            with pytest.raises(sf.InvalidArguments) as refused:
                await open_log(url, app=app)
            text = str(refused.value)
            assert f"{app}.{HISTORY}: retention.ms must be -1, found 86400000" in text
            assert f"--entity-name {app}.{HISTORY} --add-config retention.ms=-1" in text
            await (await open_log(url, app=app, create=False)).close()  # a client need not mind
        finally:
            await asyncio.to_thread(delete_topics, url, app)

    asyncio.run(main())


def test_an_app_whose_topics_differ_in_partitions_is_refused(kafka: str) -> None:
    url, app = f"kafka://{kafka}?partitions=2", f"uneven-{uuid.uuid4().hex[:8]}"

    async def main() -> None:
        topics = Topics(parse_kafka(url), app)
        await asyncio.to_thread(topics.create, [COMMANDS, HISTORY], 2, 1)
        await asyncio.to_thread(topics.create, [STATUS], 3, 1)
        try:
            with pytest.raises(sf.InvalidArguments, match="must have the same number of partitions"):
                await open_log(url, app=app)
        finally:
            await asyncio.to_thread(delete_topics, url, app)

    asyncio.run(main())


def test_commands_without_a_history_are_refused(kafka: str) -> None:
    url, app = f"kafka://{kafka}?partitions=2", f"half-{uuid.uuid4().hex[:8]}"

    async def main() -> None:
        topics = Topics(parse_kafka(url), app)
        await asyncio.to_thread(topics.create, [COMMANDS], 2, 1)
        try:
            with pytest.raises(sf.InvalidArguments, match="history is missing while"):
                await open_log(url, app=app)
        finally:
            await asyncio.to_thread(delete_topics, url, app)

    asyncio.run(main())


def test_no_broker_is_said_in_time() -> None:
    async def main() -> None:
        with pytest.raises(sf.Unavailable, match="the Kafka cluster cannot be reached"):
            await open_log("kafka://127.0.0.1:1", app="nobody")

    asyncio.run(main())


def test_a_broker_that_stands_still_keeps_nobody_from_the_topics(kafka_cluster: Cluster) -> None:
    """The cluster goes on naming it as one to ask: a third of those who ask are told so."""
    url, app = parse_kafka(kafka_cluster.url), f"still-{uuid.uuid4().hex[:8]}"

    async def main() -> None:
        made = await Topics(url, app).open(create=True)
        kafka_cluster.node(3).pause()
        try:
            assert await asyncio.gather(*(Topics(url, app).open(create=True) for _ in range(8))) == [made] * 8
        finally:
            try:
                await asyncio.to_thread(kafka_cluster.wait, [1, 2])
            finally:
                kafka_cluster.node(3).resume()
            await asyncio.to_thread(kafka_cluster.wait)

    asyncio.run(main())
