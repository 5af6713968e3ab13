"""A status of an earlier owner that comes late is not the last one for long."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest
from msgspec.structs import replace

import streamflow as sf
from streamflow.client import Client
from streamflow.codec.avro import decode_status, encode_status
from streamflow.codec.envelope import CONFLUENT, Schema
from streamflow.codec.registry import RegistryRefused, Schemas
from streamflow.config import LIMITS, PAYLOAD_BYTES_MAX, Limits
from streamflow.core.effects import PublishStatus, StatusRecord
from streamflow.errors import InvalidArguments, Unavailable
from streamflow.ids import ID_BYTES_MAX, partition_of
from streamflow.logs.base import STATUS, Log, Outgoing, Record
from streamflow.logs.memory import MemoryLog
from streamflow.logs.open import open_log
from streamflow.worker import Worker, statuses
from streamflow.worker.processor import Processor, ProcessorState
from streamflow.worker.statuses import Seen, Statuses, statuses_since
from tests import waiting

pytestmark = pytest.mark.anyio

SOON = Limits(late_status_look_seconds=0.01)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statuses, "RETRY_SECONDS", 0.001)


class Numbered:
    """A registry in memory; `forget` lets it give another number to a schema that it had."""

    name = "http://numbered"

    def __init__(self) -> None:
        self.schemas: dict[int, str] = {}
        self.first = 1
        self.asked: list[int] = []

    def forget(self) -> None:
        self.first = len(self.schemas) + 1

    def register(self, subject: str, schema: str) -> int:
        for number, known in self.schemas.items():
            if known == schema and number >= self.first:
                return number
        self.schemas[len(self.schemas) + 1] = schema
        return len(self.schemas)

    def schema(self, schema_id: int) -> Schema:
        self.asked.append(schema_id)
        if schema_id not in self.schemas:
            raise RegistryRefused(404, "no such schema")
        return json.loads(self.schemas[schema_id])


def an_app() -> sf.App:
    app = sf.App("late")

    @app.workflow
    async def waits(payload: str = "") -> object:
        return await sf.wait_signal("go")

    return app


async def second_owner(app: sf.App, log: Log, limits: Limits = SOON) -> Worker:
    """A worker of partitions that had an owner before."""
    await (await owner(app, log)).stop()
    return await owner(app, log, limits)


async def owner(app: sf.App, log: Log, limits: Limits = SOON, registry: Numbered | None = None) -> Worker:
    worker = Worker(app, log, limits=limits, schemas=None if registry is None else Schemas(registry))
    await worker.start()
    await waiting.until(lambda: len(active(worker)) == log.partitions)
    return worker


def active(worker: Worker) -> list[int]:
    return [number for number, found in worker.processors.items() if found.status is ProcessorState.ACTIVE]


async def last(log: Log, workflow_id: str) -> Record | None:
    records = await log.read(STATUS, partition_of(workflow_id, log.partitions), 0)
    mine = [record for record in records if record.key == workflow_id.encode()]
    return mine[-1] if mine else None


async def last_state(log: Log, workflow_id: str, schemas: Schemas | None = None) -> str | None:
    found = await last(log, workflow_id)
    if found is None or found.value is None:
        return None
    return decode_status(found.value, None if schemas is None else schemas.schema_of).state


async def shows(log: Log, workflow_id: str, state: str, schemas: Schemas | None = None) -> bool:
    await asyncio.sleep(0)
    return await last_state(log, workflow_id, schemas) == state


@pytest.mark.parametrize("late", ["an older status", "a tombstone"])
async def test_what_is_behind_its_run_is_published_anew(late: str):
    app = an_app()
    log = await open_log("memory://", app="late")
    worker = await second_owner(app, log)
    async with Client(log, app) as client:
        old = await completed(log, client, "one")
        await log.publish([Outgoing(STATUS, partition_of("one", log.partitions), b"one", old.value)])
        if late == "a tombstone":
            await log.publish([Outgoing(STATUS, partition_of("one", log.partitions), b"one", None)])
        assert await last_state(log, "one") in (None, "running")
        await waiting.until_async(lambda: shows(log, "one", "completed"))
    await worker.stop()
    await log.close()


async def completed(log: Log, client: Client, workflow_id: str, schemas: Schemas | None = None) -> Record:
    """Run it to its end; gives the record of the status before."""
    handle = await client.start("waits", id=workflow_id)
    await waiting.until_async(lambda: shows(log, workflow_id, "running", schemas))
    old = await last(log, workflow_id)
    assert old is not None
    await handle.signal("go", 1)
    await waiting.until_async(lambda: shows(log, workflow_id, "completed", schemas))
    return old


async def test_with_a_schema_registry_too():
    app, registry = an_app(), Numbered()
    log = await open_log("memory://", app="late")
    reading = Schemas(registry)
    await reading.register("late")
    await (await owner(app, log, registry=registry)).stop()
    worker = await owner(app, log, registry=registry)
    async with Client(log, app, schemas=reading) as client:
        old = await completed(log, client, "one", reading)
        assert old.value is not None
        assert old.value.startswith(CONFLUENT)
        await log.publish([Outgoing(STATUS, partition_of("one", log.partitions), b"one", old.value)])
        assert await last_state(log, "one", reading) == "running"
        await waiting.until_async(lambda: shows(log, "one", "completed", reading))
    await worker.stop()
    await log.close()
    assert registry.asked == []  # a worker knows what it has registered


async def test_a_status_under_another_schema_id_is_asked_for():
    app, registry = an_app(), Numbered()
    log = await open_log("memory://", app="late")
    before = Schemas(registry)
    await before.register("late")
    first = await owner(app, log, registry=registry)
    async with Client(log, app, schemas=before) as client:
        old = await completed(log, client, "one", before)
    await first.stop()
    registry.forget()
    after = Schemas(registry)
    await after.register("late")
    await after.fetch(before.ids[STATUS], "the test")
    registry.asked.clear()
    worker = await owner(app, log, registry=registry)
    assert worker.schemas is not None
    assert worker.schemas.ids[STATUS] != before.ids[STATUS]
    await log.publish([Outgoing(STATUS, partition_of("one", log.partitions), b"one", old.value)])
    await waiting.until_async(lambda: shows(log, "one", "completed", after))
    assert registry.asked == [before.ids[STATUS]]
    await worker.stop()
    await log.close()


async def test_what_is_no_status_is_left_alone_and_said_once(caplog: pytest.LogCaptureFixture):
    app = an_app()
    log = await open_log("memory://", app="late", partitions=1)
    worker = await second_owner(app, log)
    garbage = [Outgoing(STATUS, 0, key, b"garbage") for key in (b"\xff", b"two", b"x" * (ID_BYTES_MAX + 1))]
    async with Client(log, app) as client:
        await log.publish(garbage)
        old = await completed(log, client, "two")
        await log.publish([*garbage[:2], Outgoing(STATUS, 0, b"two", old.value)])
        await waiting.until_async(lambda: shows(log, "two", "completed"))
    await worker.stop()
    await log.close()
    said = [record for record in caplog.records if "is no status of a run" in record.getMessage()]
    assert [record.levelname for record in said] == ["WARNING"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


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


def broken_follow(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> list[int]:
    """Let an owner's reading of statuses fail so, one error before it begins and one behind each record.

    Gives the offsets of the records that it was given.
    """
    given: list[int] = []
    begun = 0
    left = list(errors)
    usual = MemoryLog.follow

    async def follow(
        self: MemoryLog, topic: str, partition: int, offset: int, *, limit: int = 1000
    ) -> AsyncIterator[list[Record]]:
        task = asyncio.current_task()
        if topic != STATUS or task is None or not task.get_name().startswith("statuses-p"):
            async for batch in usual(self, topic, partition, offset, limit=limit):
                yield batch
            return
        nonlocal begun
        begun += 1
        if begun == 1:
            raise left.pop(0)
        async for batch in usual(self, topic, partition, offset, limit=1):
            given.append(batch[0].offset)
            yield batch
            if left:
                raise left.pop(0)

    monkeypatch.setattr(MemoryLog, "follow", follow)
    return given


async def test_an_outage_does_not_end_it(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    given = broken_follow(monkeypatch, *(Unavailable(f"no broker answers ({count})") for count in range(3)))
    app = an_app()
    log = await open_log("memory://", app="late", partitions=1)
    worker = await second_owner(app, log)
    async with Client(log, app) as client:
        old = await completed(log, client, "four")
        await log.publish([Outgoing(STATUS, 0, b"four", old.value)])
        await waiting.until_async(lambda: shows(log, "four", "completed"))
    await worker.stop()
    await log.close()
    assert len(set(given)) == len(given)  # what was taken is not read again
    said = [record.getMessage() for record in caplog.records if "trying again" in record.getMessage()]
    assert [text.partition(" from offset ")[2][1:] for text in said] == [
        f": no broker answers ({count}); trying again in 0.0 s" for count in range(3)
    ]


@pytest.mark.parametrize(
    ("error", "level"), [(RuntimeError("never thought of"), "ERROR"), (InvalidArguments("not for you"), "WARNING")]
)
async def test_what_ends_it_is_said_and_the_partition_goes_on(
    error: Exception, level: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    broken_follow(monkeypatch, error)
    app = an_app()
    log = await open_log("memory://", app="late", partitions=1)
    worker = await second_owner(app, log)
    await waiting.until(lambda: str(error) in caplog.text)
    async with Client(log, app) as client:
        await completed(log, client, "five")
    assert active(worker) == [0]
    await worker.stop()
    await log.close()
    assert [record.levelname for record in caplog.records if "are not looked for" in record.getMessage()] == [level]


async def test_a_clock_that_is_set_does_not_end_it(monkeypatch: pytest.MonkeyPatch):
    app = an_app()
    log = await open_log("memory://", app="late")
    worker = await second_owner(app, log)
    worker.clock.advance_to(worker.clock.now_ms() + 86_400_000)
    async with Client(log, app) as client:
        old = await completed(log, client, "six")
        await log.publish([Outgoing(STATUS, partition_of("six", log.partitions), b"six", old.value)])
        await waiting.until_async(lambda: shows(log, "six", "completed"))
    await worker.stop()
    await log.close()


async def test_it_ends_when_the_last_late_record_must_have_come():
    app = an_app()
    log = await open_log("memory://", app="late", partitions=1)
    worker = await second_owner(app, log, Limits(late_status_seconds=0.02, late_status_look_seconds=60.0))
    await waiting.until(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "statuses-p0"])
    assert active(worker) == [0]
    await worker.stop()
    await log.close()


# -- what it costs -----------------------------------------------------------------------------------------------------


class Owner:
    """As much of a processor as `Statuses` knows, with runs that are made up."""

    partition = 0
    schemas = None

    def __init__(self, log: Log, limits: Limits, runs: list[StatusRecord]) -> None:
        self.log = log
        self.limits = limits
        self.state = self.core = self
        self.term = 2
        self.published: list[str] = []
        self.under_way_max = 0
        self.looked_at: Counter[int] = Counter()
        """Runs compared, by the turn of the event loop."""
        self._runs = {run.workflow_id: run for run in runs}
        self._under_way = 0
        self._turn = 0

    async def count_turns(self) -> None:
        while True:
            self._turn += 1
            await asyncio.sleep(0)

    def status(self, workflow_id: str) -> StatusRecord | None:
        self.looked_at[self._turn] += 1
        return self._runs.get(workflow_id)

    def needs_attention(self, workflow_id: str) -> bool:
        return False

    def publish_status(self, workflow_id: str, status: PublishStatus) -> list[asyncio.Future[None]]:
        assert status.status == self._runs[workflow_id]
        self.published.append(workflow_id)
        self._under_way += 1
        self.under_way_max = max(self.under_way_max, self._under_way)
        return [asyncio.ensure_future(self._acknowledge())]

    async def _acknowledge(self) -> None:
        await asyncio.sleep(0)
        self._under_way -= 1


@asynccontextmanager
async def kept(limits: Limits, runs: list[StatusRecord]) -> AsyncIterator[Owner]:
    """An owner whose runs are a turn ahead of what is on the topic."""
    log = await open_log("memory://", app="late", partitions=1)
    await log.publish([behind(run) for run in runs])
    found = Owner(log, limits, runs)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(found.count_turns())]
        running.append(tasks.create_task(Statuses(cast("Processor", found), 0).run()))
        yield found
        for task in running:
            task.cancel()
    await log.close()


def behind(run: StatusRecord) -> Outgoing:
    old = replace(run, turn=run.turn - 1, state="running")
    return Outgoing(STATUS, 0, run.workflow_id.encode(), encode_status(old))


def a_status(workflow_id: str, result: bytes = b"1") -> StatusRecord:
    return StatusRecord(
        workflow_id=workflow_id, workflow="waits", run=1, turn=2, state="completed", args=b"[]", result=result
    )


async def test_a_few_are_compared_and_published_at_a_time():
    runs = [a_status(f"run-{number}") for number in range(100)]
    limits = Limits(late_status_look_seconds=0.01, late_statuses_at_once_max=7)
    async with kept(limits, runs) as found:
        await waiting.until(lambda: len(found.published) >= 100)
    assert sorted(found.published) == sorted(run.workflow_id for run in runs)
    assert found.under_way_max == 7
    assert max(found.looked_at.values()) == 7
    assert found.looked_at.total() >= 200  # each was behind twice


async def test_runs_beyond_the_limit_are_named_and_looked_at_when_one_comes_again(caplog: pytest.LogCaptureFixture):
    runs = [a_status(name) for name in ("a", "b", "c", "d")]
    limits = Limits(late_status_look_seconds=0.01, late_status_runs_max=2)
    async with kept(limits, runs) as found:
        await waiting.until(lambda: len(found.published) >= 2)
        assert found.published == ["a", "b"]
        await found.log.publish([behind(runs[3])])
        await waiting.until(lambda: len(found.published) >= 3)
    assert found.published == ["a", "b", "d"]
    (said,) = (record.getMessage() for record in caplog.records if "more than 2 runs" in record.getMessage())
    assert "run c the first" in said


def test_little_is_kept_of_a_status():
    """`late_status_runs_max` says how much."""
    large = a_status("x" * ID_BYTES_MAX, b"y" * PAYLOAD_BYTES_MAX)
    seen = statuses._seen(replace(large, created_at=1 << 60, turn=1 << 40, waiting_on=["z" * 1000]))
    fields = [getattr(seen, field) for field in Seen.__struct_fields__]
    entries = 100 + 100 + 50  # of two dicts that have just grown, and of a look's list
    assert sum(map(sys.getsizeof, (large.workflow_id, seen, *fields))) + entries <= 805


async def test_what_lies_too_far_back_is_not_read(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    log = await open_log("memory://", app="late", partitions=1)
    await log.publish([behind(a_status(name)) for name in "abcde"])
    assert await statuses_since(log, 0, 0, LIMITS) == 0
    assert await statuses_since(log, 0, 0, Limits(late_status_records_back_max=2)) == 3
    await log.close()
    assert "partition 0: statuses before offset 3" in caplog.text
