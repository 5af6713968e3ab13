"""Trimming on Kafka: the broker's own start moves, and an empty directory restores from what is left."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from streamflow.config import Limits
from streamflow.core.commands import SignalWorkflow, StartWorkflow
from streamflow.logs.base import HISTORY
from tests.e2e.test_trimming import PARKED, active, command, contents, publish, state_of, to_parked
from tests.kafka.stage import until_async
from tests.logs.support import KafkaPlace, eventually, on_loop

SHORT, ROUNDS = 20_000, 3
TEST_SECONDS = 170


@pytest.mark.timeout(180)
def test_a_history_is_that_of_its_parked_runs_and_restores_into_an_empty_directory(kafka: str, tmp_path: Path) -> None:
    @partial(on_loop, seconds=TEST_SECONDS)
    async def test(place: KafkaPlace) -> None:
        log = await place.open("trimmed", partitions=1)
        worker = await active(log, tmp_path / "state")
        await publish(log, worker, to_parked(0, StartWorkflow(workflow="parked")))
        for round_ in range(1, ROUNDS + 1):
            await publish(log, worker, to_parked(round_, SignalWorkflow(name="number", value=b"%d" % round_)))
        starts = [
            command(f"s{number}", f"short-{number}", StartWorkflow(workflow="short", args=b"[%d]" % number))
            for number in range(SHORT)
        ]
        await publish(log, worker, starts)
        state = state_of(worker)
        await eventually(lambda: len(state.oldest(0, before=1 << 60, limit=PARKED + 1)) == PARKED, seconds=100)
        records = PARKED * (ROUNDS + 1)

        async def is_short() -> bool:
            end, start = await log.end_offset(HISTORY, 0), await log.start_offset(HISTORY, 0)
            return end > 2 * SHORT and end - start < 3 * records

        await until_async(is_short)
        await worker.stop()

        # By workers that copy nothing forward while they are looked at: each may move the runs to other offsets.
        restored = await active(log, tmp_path / "empty", Limits())
        found = contents(restored)
        await restored.stop()
        worker = await active(log, tmp_path / "state", Limits())
        assert contents(worker) == found, "the store that was there all the time has the same"
        await publish(log, worker, to_parked(ROUNDS + 1, SignalWorkflow(name="number", value=b"0")))
        results = {status.result for status in state_of(worker).runs(descending=False, after=None)}
        assert results == {b"[1,2,3]"}
        await worker.stop()

    test(place=KafkaPlace(kafka))
