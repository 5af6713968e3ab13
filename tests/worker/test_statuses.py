"""A status of an earlier owner that comes late is not the last one for long."""

from __future__ import annotations

import asyncio

import pytest

import streamflow as sf
from streamflow.client import Client
from streamflow.codec.avro import decode_status
from streamflow.errors import InvalidArguments
from streamflow.ids import partition_of
from streamflow.logs.base import STATUS, Log, Outgoing
from streamflow.logs.memory import MemoryLog
from streamflow.logs.open import open_log
from streamflow.worker import Worker, statuses
from streamflow.worker.processor import ProcessorState
from tests import waiting

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statuses, "LOOK_SECONDS", 0.01)


def an_app() -> sf.App:
    app = sf.App("late")

    @app.workflow
    async def waits() -> object:
        return await sf.wait_signal("go")

    return app


async def second_owner(app: sf.App, log: Log) -> Worker:
    """A worker of partitions that had an owner before."""
    await (await owner(app, log)).stop()
    return await owner(app, log)


async def owner(app: sf.App, log: Log) -> Worker:
    worker = Worker(app, log)
    await worker.start()
    await waiting.until(lambda: len(active(worker)) == log.partitions)
    return worker


def active(worker: Worker) -> list[int]:
    return [number for number, found in worker.processors.items() if found.status is ProcessorState.ACTIVE]


async def last_state(log: Log, workflow_id: str) -> str | None:
    records = await log.read(STATUS, partition_of(workflow_id, log.partitions), 0)
    mine = [record for record in records if record.key == workflow_id.encode()]
    return None if not mine or mine[-1].value is None else decode_status(mine[-1].value).state


@pytest.mark.parametrize("late", ["an older status", "a tombstone"])
async def test_what_is_behind_its_run_is_published_anew(late: str):
    app = an_app()
    log = await open_log("memory://", app="late")
    worker = await second_owner(app, log)
    async with Client(log, app) as client:
        handle = await client.start("waits", id="one")
        partition = partition_of("one", log.partitions)
        await waiting.until_async(lambda: shows(log, "one", "running"))
        (old,) = await log.read(STATUS, partition, 0)
        await handle.signal("go", 1)
        assert await handle.result() == 1
        await waiting.until_async(lambda: shows(log, "one", "completed"))
        await log.publish([Outgoing(STATUS, partition, b"one", old.value if late == "an older status" else None)])
        assert await last_state(log, "one") in (None, "running")
        await waiting.until_async(lambda: shows(log, "one", "completed"))
    await worker.stop()
    await log.close()


async def test_what_is_no_status_is_left_alone(caplog: pytest.LogCaptureFixture):
    app = an_app()
    log = await open_log("memory://", app="late")
    worker = await second_owner(app, log)
    async with Client(log, app) as client:
        await log.publish([Outgoing(STATUS, number, b"\xff", b"garbage") for number in range(log.partitions)])
        handle = await client.start("waits", id="two")
        await handle.signal("go", 2)
        assert await handle.result() == 2
    await worker.stop()
    await log.close()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def shows(log: Log, workflow_id: str, state: str) -> bool:
    await asyncio.sleep(0)
    return await last_state(log, workflow_id) == state


async def test_a_worker_that_may_not_read_statuses_says_so_and_works(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    async def denied(self: MemoryLog, topic: str, partition: int, at_ms: int) -> int:
        raise InvalidArguments(f"{topic} cannot be read by this principal")

    monkeypatch.setattr(MemoryLog, "offset_at", denied)
    app = an_app()
    log = await open_log("memory://", app="late")
    worker = await second_owner(app, log)
    async with Client(log, app) as client:
        handle = await client.start("waits", id="three")
        await handle.signal("go", 3)
        assert await handle.result() == 3
    await worker.stop()
    await log.close()
    assert "late statuses of earlier owners are not looked for: status cannot be read" in caplog.text
