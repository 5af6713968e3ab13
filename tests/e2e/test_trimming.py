"""A log is as large as its live runs: many that come and go beside some that stay, on a real file."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import streamflow as sf
from streamflow.codec.avro import encode_command
from streamflow.config import Limits
from streamflow.core.commands import Body, Command, SignalWorkflow, StartWorkflow
from streamflow.logs.base import COMMANDS, HISTORY, Log, Outgoing
from streamflow.logs.open import open_log
from streamflow.worker.processor import Processor, ProcessorState
from streamflow.worker.state import PartitionState
from streamflow.worker.worker import Worker
from tests.logs.support import eventually, sqlite_url
from tests.worker.harness import dump

SHORT, PARKED, ROUNDS = 20_000, 100, 9
LIMITS = Limits(trim_records_min=200, trim_seconds=1.0)
PARTITION_KEY = b"P"

app = sf.App("trimmed")


@app.workflow(retention=0)
async def short(number: int) -> int:
    return number


@app.workflow
async def parked() -> list[int]:
    """Collects numbers until one is 0."""
    heard: list[int] = []
    while number := await sf.wait_signal("number", int):
        heard.append(number)
    return heard


def command(command_id: str, workflow_id: str, body: Body) -> Outgoing:
    encoded = encode_command(Command(command_id=command_id, workflow_id=workflow_id, sent_at=0, body=body))
    return Outgoing(COMMANDS, 0, workflow_id.encode(), encoded)


def to_parked(round_: int, body: Body) -> list[Outgoing]:
    return [command(f"c{round_}-{number}", f"parked-{number}", body) for number in range(PARKED)]


async def publish(log: Log, worker: Worker, records: list[Outgoing]) -> None:
    """Publish commands and wait until all of them are consumed by turns."""
    for begin in range(0, len(records), 1_000):
        await log.publish(records[begin : begin + 1_000])
    end = await log.end_offset(COMMANDS, 0)
    await eventually(lambda: state_of(worker).row().consumed >= end, seconds=100)


def processor_of(worker: Worker) -> Processor:
    return worker.processors[0]


def state_of(worker: Worker) -> PartitionState:
    return processor_of(worker).state


async def active(log: Log, state_dir: Path, limits: Limits = LIMITS) -> Worker:
    worker = Worker(app, log, state_dir=state_dir, limits=limits)
    await worker.start()
    await eventually(lambda: 0 in worker.processors and processor_of(worker).status is ProcessorState.ACTIVE)
    return worker


def contents(worker: Worker) -> dict[bytes, bytes]:
    """The store without the row that every claim changes."""
    return {key: value for key, value in dump(state_of(worker).store).items() if key != PARTITION_KEY}


@pytest.mark.slow
def test_the_history_of_many_short_runs_beside_parked_ones_is_that_of_the_parked_ones(tmp_path: Path) -> None:
    async def test() -> None:
        log = await open_log(sqlite_url(tmp_path / "log.db", partitions=1, synchronous="normal"), app=app.name)
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

        records = sum(len(state.turns(f"parked-{number}")) for number in range(PARKED))
        end = await log.end_offset(HISTORY, 0)
        assert end > 2 * SHORT and records == PARKED * (ROUNDS + 1)
        kept = end
        for _ in range(3_000):
            kept = await log.end_offset(HISTORY, 0) - await log.start_offset(HISTORY, 0)
            if kept < 3 * records:
                break
            await asyncio.sleep(0.01)  # tidy: the poll of a fact that the owner makes true within its next second
        assert kept < 3 * records, (kept, records)

        await worker.stop()
        # By workers that copy nothing forward while they are looked at: each may move the runs to other offsets.
        again = await active(log, tmp_path / "empty", Limits())
        restored = contents(again)
        await again.stop()
        worker = await active(log, tmp_path / "state", Limits())
        assert contents(worker) == restored
        await publish(log, worker, to_parked(ROUNDS + 1, SignalWorkflow(name="number", value=b"0")))
        results = {status.result for status in state_of(worker).runs(descending=False, after=None)}
        assert results == {b"[1,2,3,4,5,6,7,8,9]"}
        await worker.stop()
        await log.close()

    asyncio.run(asyncio.wait_for(test(), 110))
