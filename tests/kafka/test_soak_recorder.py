"""What the soak judges has been seen: its workers trim no history that its recorder has not read."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest
from confluent_kafka import Producer

from streamflow.logs.base import HISTORY
from streamflow.logs.kafka import KafkaLog
from tests.e2e import soak_worker
from tests.e2e.soak_recorder import RECORDED, Recorder, has_recorded
from tests.logs.support import KafkaPlace, eventually, on_loop

RECORDS = 20
CUT = 15
LOOKS = 3
"""So often a trim has looked for what is recorded when it is known to wait."""


def write(bootstrap: str, topic: str, partition: int, count: int) -> None:
    """Records without a value, which decode as they are."""
    producer = Producer({"bootstrap.servers": bootstrap})
    for number in range(count):
        producer.produce(topic, key=b"%d" % number, partition=partition)
    assert producer.flush(30) == 0


def test_a_history_is_trimmed_when_the_recorder_has_read_what_goes(
    kafka: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = tmp_path / RECORDED
    looks: list[tuple[int, int]] = []

    def look(progress: Path, partition: int, before: int) -> bool:
        looks.append((partition, before))
        return has_recorded(progress, partition, before)

    monkeypatch.setattr(KafkaLog, "trim", KafkaLog.trim)  # as it is now when the test is over
    monkeypatch.setattr(soak_worker, "has_recorded", look)
    soak_worker.trim_what_is_recorded(progress)

    @partial(on_loop)
    async def test(place: KafkaPlace) -> None:
        log = await place.open(partitions=2)
        topic = f"{place.app('shop')}.{HISTORY}"
        for partition, count in ((0, 1), (1, RECORDS)):
            await asyncio.to_thread(write, kafka, topic, partition, count)
        trim = asyncio.create_task(log.trim(HISTORY, 1, CUT))
        await eventually(lambda: len(looks) == LOOKS)
        assert await log.start_offset(HISTORY, 1) == 0, "nobody has read it yet"

        recorder = Recorder(kafka, topic, 2, progress)
        recorder.start()
        assert await trim == CUT == await log.start_offset(HISTORY, 1)
        records = await asyncio.to_thread(recorder.finish)
        assert [(each.partition, each.offset) for each in records] == [(0, 0), *((1, n) for n in range(RECORDS))]
        assert set(looks) == {(1, CUT)}

    test(place=KafkaPlace(kafka))


def test_a_recorder_that_finds_its_next_record_trimmed_says_so(kafka: str, tmp_path: Path) -> None:
    @partial(on_loop)
    async def test(place: KafkaPlace) -> None:
        log = await place.open(partitions=1)
        topic = f"{place.app('shop')}.{HISTORY}"
        await asyncio.to_thread(write, kafka, topic, 0, RECORDS)
        await log.trim(HISTORY, 0, CUT)
        recorder = Recorder(kafka, topic, 1, tmp_path / RECORDED)
        recorder.start()
        with pytest.raises(LookupError, match=r"history was not recorded: partition 0 at 0: .*[Oo]ffset out of range"):
            await asyncio.to_thread(recorder.finish)

    test(place=KafkaPlace(kafka))
