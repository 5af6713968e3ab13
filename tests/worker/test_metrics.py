"""Each metric moves when its event happens; names end in units, and labels come from closed sets."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import generate_latest

import streamflow as sf
from streamflow import metrics
from streamflow.client.client import Client
from streamflow.codec.avro import encode_command, encode_history, encode_task
from streamflow.core.commands import Command, ReportAttempt, StartWorkflow
from streamflow.core.effects import StepTask
from streamflow.core.events import Claim
from streamflow.errors import Unavailable
from streamflow.logs.base import COMMANDS, HISTORY, Log, Outgoing
from streamflow.logs.open import open_log
from streamflow.worker import Worker
from streamflow.worker.gauges import Lags
from streamflow.worker.processor import ProcessorState
from tests import metering, waiting
from tests.worker import flows
from tests.worker.harness import settle, world

UNITS = ("_total", "_seconds", "_records", "_partitions", "_runs", "_steps", "_info")
"""What a name may end in: a unit, or what is counted."""

LABELS = {
    "outcome": set(metrics.OUTCOMES),
    "state": {*metrics.CLOSED_STATES, *metrics.PARTITION_STATES},
    "workflow": {"line", "broken", "patient", "endless", "gated", metrics.UNKNOWN},
    "step": {"work", "refuse", "forever", "late", "remote", metrics.UNKNOWN},
    "queue": {"metered"},
    "partition": {str(number) for number in range(4)},
}
HISTOGRAMS = ("decide_duration", "append_duration", "step_duration", "timer_lateness", "restore_duration")

_names = itertools.count()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


def an_app(*, argument: int = 1) -> sf.App:
    app = sf.App("metered", retry=sf.Retry.never)

    @app.step
    async def work(n: int) -> int:
        return n

    @app.step(retry=sf.Retry(max_attempts=3, initial=0.001))
    async def refuse() -> None:
        raise ValueError("no")

    @app.step
    async def forever() -> None:
        await asyncio.Event().wait()

    @app.step(timeout=0.01)
    async def late() -> None:
        await asyncio.Event().wait()

    @app.step(queue="metered")
    async def remote() -> int:
        return 1

    @app.workflow
    async def line(n: int) -> int:
        return sum([await work(i) for i in range(n)])

    @app.workflow
    async def broken(how: str) -> None:
        await (late() if how == "late" else refuse())

    @app.workflow
    async def patient(seconds: float) -> None:
        await asyncio.sleep(seconds)

    @app.workflow
    async def endless() -> None:
        await forever()

    @app.workflow
    async def gated() -> int:
        await work(argument)
        await sf.wait_signal("go")
        return await remote()

    return app


class Scene:
    """A log of our own with one partition, its worker and a client; `moved` is what the metrics gained meanwhile."""

    def __init__(self, **options: Any) -> None:
        self.url = f"memory://metrics-{next(_names)}"
        self.app = an_app()
        self.options = options

    async def __aenter__(self) -> Scene:
        self.before = metering.samples()
        self.log: Log = await open_log(f"{self.url}?partitions=1", app=self.app.name)
        self.client = await Client(self.log, self.app).__aenter__()
        self.worker = await self.serve()
        return self

    async def serve(self, app: sf.App | None = None, **options: Any) -> Worker:
        worker = Worker(app or self.app, self.log, **{**self.options, **options})
        await worker.start()
        if worker.owns_partitions:
            await waiting.until(lambda: self.gauge("owned_partitions", state="active") == 1)
        return worker

    async def __aexit__(self, *error: object) -> None:
        await self.client.__aexit__(None, None, None)
        await self.worker.stop()
        await self.log.close()

    def moved(self, name: str, **labels: str) -> float:
        return metering.value(metering.samples(), name, **labels) - metering.value(self.before, name, **labels)

    def gauge(self, name: str, **labels: str) -> float:
        return metering.value(metering.samples(), name, **labels)

    def shown(self, name: str, **labels: str) -> bool:
        return (metering.PREFIX + name, frozenset(labels.items())) in metering.samples()

    async def command(self, workflow_id: str, body: Any) -> None:
        command = Command(command_id=f"c-{workflow_id}", workflow_id=workflow_id, sent_at=1, body=body, reply_to=None)
        await self.log.publish([Outgoing(COMMANDS, 0, workflow_id.encode(), encode_command(command))])


@pytest.fixture(autouse=True)
def _asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamflow.worker.worker.LAG_SECONDS", 0.01)


def test_runs_turns_and_steps():
    async def test() -> None:
        async with Scene() as it:
            handles = [await it.client.start("line", 3) for _ in range(5)]
            assert await asyncio.gather(*(each.result(timeout=20) for each in handles)) == [3] * 5
            assert it.moved("runs_started_total", workflow="line") == 5
            assert it.moved("runs_closed_total", workflow="line", state="completed") == 5
            assert it.moved("step_attempts_total", step="work", outcome="completed") == 15
            assert it.moved("step_duration_seconds_count", step="work") == 15
            assert it.moved("step_duration_seconds_bucket", step="work", le="60.0") == 15
            turns = it.moved("turns_total")
            appends = it.moved("append_duration_seconds_count")
            assert 10 <= turns <= 40 and 0 < it.moved("decide_duration_seconds_count") <= appends <= turns
            assert 0 < it.moved("append_duration_seconds_sum") < 30 and it.moved("decide_duration_seconds_sum") > 0
            assert it.moved("restore_duration_seconds_count") == 1 and it.moved("restore_duration_seconds_sum") > 0

    run(test())


def test_failures_retries_and_timeouts():
    async def test() -> None:
        async with Scene() as it:
            for how in ("refused", "late"):
                with pytest.raises(sf.WorkflowFailed):
                    await (await it.client.start("broken", how)).result(timeout=20)
            assert it.moved("step_attempts_total", step="refuse", outcome="retried") == 2
            assert it.moved("step_attempts_total", step="refuse", outcome="failed") == 1
            assert it.moved("step_attempts_total", step="late", outcome="failed") == 1
            assert it.moved("step_timeouts_total", step="late") == 1
            assert it.moved("step_timeouts_total", step="refuse") == 0
            assert it.moved("step_duration_seconds_sum", step="late") >= 0.01
            assert it.moved("runs_closed_total", workflow="broken", state="failed") == 2
            assert it.moved("timer_lateness_seconds_count") == 2, "of the retries"

    run(test())


def test_cancelled_and_terminated_runs_and_the_steps_under_way():
    async def test() -> None:
        async with Scene(max_parallel_steps=1) as it:
            first = await it.client.start("endless")
            await waiting.until(lambda: it.gauge("running_steps") == 1)
            second = await it.client.start("endless")
            await waiting.until(lambda: it.gauge("waiting_steps") == 1)
            await first.cancel()
            await second.terminate()
            for handle in (first, second):
                with pytest.raises(sf.StreamflowError):
                    await handle.result(timeout=20)
            for state in ("cancelled", "terminated"):
                assert it.moved("runs_closed_total", workflow="endless", state=state) == 1
            await waiting.until(lambda: it.gauge("running_steps") == it.gauge("waiting_steps") == 0)
            assert it.moved("step_attempts_total", step="forever", outcome="cancelled") >= 1
            assert it.moved("step_duration_seconds_count", step="forever") >= 1

    run(test())


def test_a_timers_lateness():
    async def test() -> None:
        async with Scene() as it:
            await (await it.client.start("patient", 0.01)).result(timeout=20)
            assert it.moved("timer_lateness_seconds_count") == 1 and it.moved("timer_lateness_seconds_sum") >= 0

    run(test())


def test_blocked_runs_are_counted_and_shown_until_they_go_on():
    async def test() -> None:
        async with Scene() as it:
            handle = await it.client.start("gated", id="g")
            async for status in handle.watch():
                if status.waiting_on == ["signal go"]:
                    break
            await it.worker.stop()
            assert it.gauge("blocked_runs") == it.gauge("owned_partitions", state="active") == 0
            other = an_app(argument=2)
            for blocked in (1, 1):  # found blocked by this worker, then by the next one in what the last one left
                it.worker = await it.serve(other)
                await handle.signal("go")
                await waiting.until(lambda: it.gauge("blocked_runs") == 1)
                assert it.moved("runs_blocked_total") == blocked
                await it.worker.stop()
            it.worker = await it.serve()
            await waiting.until(lambda: it.gauge("blocked_runs") == 0)
            await waiting.until(lambda: it.gauge("owned_partitions", state="active") == 1)

    run(test())


def test_dead_letters_late_outcomes_and_workflows_that_the_app_no_longer_has():
    async def test() -> None:
        async with Scene() as it:
            await it.log.publish([Outgoing(COMMANDS, 0, b"k", b"not a command")])
            await waiting.until(lambda: it.moved("dead_letters_total") == 1)
            await it.client.start("gated", id="g")
            await it.command("g", ReportAttempt(run=1, number=7, attempt=1, result=b"1"))
            await waiting.until(lambda: it.moved("late_outcomes_total") == 1)
            await it.worker.stop()
            it.worker = await it.serve(sf.App("metered"))
            await it.client.handle("g").terminate()
            await waiting.until(
                lambda: it.moved("runs_closed_total", workflow=metrics.UNKNOWN, state="terminated") == 1
            )

    run(test())


def test_fenced():
    async def test() -> None:
        async with Scene() as it:
            rival = encode_history(Claim(term=9, owner="rival", at=1))
            await it.log.append(0, await it.log.end_offset(HISTORY, 0), [(b"", rival)])
            await it.client.start("line", 1)
            await waiting.until(lambda: it.moved("fenced_total") == 1)
            await waiting.until(lambda: it.moved("restore_duration_seconds_count") == 2)

    run(test())


def test_a_step_worker_counts_its_attempts_and_what_waits():
    async def test() -> None:
        async with Scene() as it:
            steps = await it.serve(owns_partitions=False, queues=["metered"])
            handle = await it.client.start("gated")
            await handle.signal("go")
            assert await handle.result(timeout=20) == 1
            assert it.moved("step_attempts_total", step="remote", outcome="completed") == 1
            task = StepTask(
                workflow_id="w", run=1, number=0, attempt=1, workflow="", step="gone-1", name="gone-1", args=b"[]",
                scheduled_at=0,
            )  # fmt: skip
            await it.log.publish([Outgoing("steps.metered", 0, b"w", encode_task(task))])
            failed = {"step": metrics.UNKNOWN, "outcome": "failed"}
            await waiting.until(lambda: it.moved("step_attempts_total", **failed) == 1)
            await waiting.until(lambda: it.shown("queue_lag_records", queue="metered"))
            await waiting.until(lambda: it.gauge("queue_lag_records", queue="metered") == 0)
            await steps.stop()

    run(test())


def test_lags_are_what_the_log_has_more():
    async def test() -> None:
        log = await open_log(f"memory://metrics-{next(_names)}?partitions=2", app="lagging")
        await log.publish([Outgoing(COMMANDS, 1, b"k", b"v")] * 7 + [Outgoing("steps.gpu", 0, b"k", b"v")] * 4)
        active = SimpleNamespace(status=ProcessorState.ACTIVE, durably_consumed=2)
        restoring = SimpleNamespace(status=ProcessorState.RESTORING, durably_consumed=0)
        queue = SimpleNamespace(queue="gpu", readers={0: SimpleNamespace(topic="steps.gpu", below=1)})
        lags = Lags(log)
        await lags.ask({0: restoring, 1: active}, [queue])  # type: ignore[dict-item, list-item]
        assert (lags.commands, lags.queues) == ({1: 5}, {"gpu": 3})
        await log.close()

        async def away(*args: object) -> int:
            raise Unavailable("away")

        lags._log = SimpleNamespace(end_offset=away)
        await lags.ask({1: active}, [queue])  # type: ignore[dict-item, list-item]
        assert lags.commands == {1: 5}, "what it said last"

    run(test())


def test_commands_that_were_carried_out_lag_no_more():
    async def test() -> None:
        async with Scene() as it:
            await (await it.client.start("line", 1)).result(timeout=20)
            await waiting.until(lambda: it.shown("command_lag_records", partition="0"))
            await waiting.until(lambda: it.gauge("command_lag_records", partition="0") == 0)
            assert it.shown("outbox_lag_records", partition="0")

    run(test())


def test_the_outbox_lags_while_a_publish_is_under_way():
    async def test() -> None:
        async with world(flows.app) as it:
            it.log.hold_publishes = True
            await it.start("r", "line", b"[1]")
            assert it.processor.outbox_lag > 0
            for held in it.log.publishes:
                await held.release()
            it.log.publishes.clear()
            await settle()
            assert it.processor.outbox_lag == sum(len(held.what) for held in it.log.publishes)

    run(test())


def test_workers_of_one_process_add_up_and_leave_nothing_when_they_stop():
    async def test() -> None:
        async with Scene() as one, Scene() as two:
            await waiting.until(lambda: one.gauge("owned_partitions", state="active") == 2)
            await two.worker.stop()
            await waiting.until(lambda: one.gauge("owned_partitions", state="active") == 1)
        assert one.gauge("owned_partitions", state="active") == 0

    run(test())


# --------------------------------------------------------------------------------------------------------- what it says


def test_names_end_in_their_unit():
    found = {metering.full_name(family) for family in metering.families()}
    assert len(found) == 23 and all(name.endswith(UNITS) for name in found), found
    seconds = {family.name for family in metering.families() if family.type == "histogram"}
    assert seconds == {f"streamflow_{name}_seconds" for name in HISTOGRAMS}


def test_the_table_at_the_top_of_the_file_is_complete():
    rows = [line.split() for line in (metrics.__doc__ or "").splitlines() if line.startswith("    streamflow_")]
    for family in metering.families():
        (row,) = [row for row in rows if row[0] == metering.full_name(family)]
        assert row[1] == family.type or (row[0].endswith("_info") and row[1] == "gauge")
        used = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert all(label in " ".join(row) for label in used), (row, used)
    assert len(rows) == len(metering.families())


def test_the_page_parses_and_its_labels_are_closed():
    async def test() -> None:
        async with Scene() as it:
            await (await it.client.start("line", 1)).result(timeout=20)
            await it.command("foreign", StartWorkflow(workflow="order-1", args=b"[]"))
            await waiting.until(lambda: it.moved("dead_letters_total") == 1)
            found = metering.parsed(generate_latest().decode())
        assert found.keys() >= {key for key in metering.samples() if key[0].endswith("_total")}
        for name, labels in found:
            for label, value in labels:
                if label in ("workflow", "step", "queue"):
                    assert "order-1" not in value and "gone-1" not in value, name
                elif label in LABELS:
                    assert value in LABELS[label], (name, label, value)
                else:
                    assert label in ("le", "version", "python"), (name, label)

    run(test())


def test_names_without_end_are_unknown_in_the_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "_steps", {})
    monkeypatch.setattr(metrics, "NAMES_MAX", 3)
    tallies = [metrics.step_tally(f"step-{number}") for number in range(5)]
    assert tallies[3] is tallies[4] is metrics.step_tally(metrics.UNKNOWN)
    assert metrics.step_tally("step-0") is tallies[0] and len(metrics._steps) == 4


@pytest.mark.parametrize(
    "bounds",
    [
        metrics.DECIDE_BUCKETS,
        metrics.APPEND_BUCKETS,
        metrics.STEP_BUCKETS,
        metrics.LATENESS_BUCKETS,
        metrics.RESTORE_BUCKETS,
    ],
)
def test_buckets_grow_and_count_all(bounds: tuple[float, ...]):
    assert list(bounds) == sorted(set(bounds))
    spread = metrics.Distribution(bounds)
    for value in (-1.0, 0.0, bounds[0], bounds[-1], bounds[-1] * 2):
        spread.observe(value)
    found = spread.buckets()
    assert [found[0][1], found[-2][1], found[-1]] == [3.0, 4.0, ("+Inf", 5.0)]
    assert spread.total == pytest.approx(bounds[0] + bounds[-1] * 3)


def test_a_page_can_be_read_from_another_thread_while_a_worker_works():
    async def test() -> None:
        broken: list[BaseException] = []
        stop = threading.Event()

        def read() -> None:
            try:
                while not stop.is_set():
                    metering.samples()
            except BaseException as error:
                broken.append(error)

        async with Scene() as it:
            reader = threading.Thread(target=read)
            reader.start()
            handles = [await it.client.start("line", 5) for _ in range(20)]
            await asyncio.gather(*(each.result(timeout=20) for each in handles))
            stop.set()
            await asyncio.to_thread(reader.join)
        assert not broken

    run(test())
