"""The worker: partitions come and go, failures are begun again, and nothing is left over."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import sys
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import streamflow as sf
from streamflow.client.client import Client
from streamflow.codec.avro import encode_history
from streamflow.config import Limits
from streamflow.core.events import Claim
from streamflow.errors import CorruptLog, InvalidArguments, Unavailable
from streamflow.logs.base import HISTORY, TIMERS, Log
from streamflow.logs.open import open_log
from streamflow.worker import Worker
from streamflow.worker.processor import ProcessorState
from tests import waiting
from tests.worker.harness import settle

_names = itertools.count()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


@pytest.fixture(params=["memory", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://worker-{next(_names)}?partitions=4"
    return f"sqlite:///{tmp_path}/log.db?partitions=4"


@pytest.fixture
def memory() -> str:
    return f"memory://worker-{next(_names)}?partitions=4"


def an_app() -> sf.App:
    app = sf.App("shop")

    @app.step
    async def work(n: int) -> int:
        return n

    @app.workflow
    async def line(n: int) -> int:
        total = 0
        for i in range(n):
            total += await work(i)
        return total

    @app.workflow
    async def waits() -> Any:
        return await sf.wait_signal("go")

    return app


@asynccontextmanager
async def opened(url: str, app: sf.App) -> AsyncIterator[Log]:
    log = await open_log(url, app=app.name)
    try:
        yield log
    finally:
        await log.close()


@asynccontextmanager
async def working(app: sf.App, log: Log, **options: Any) -> AsyncIterator[Worker]:
    worker = Worker(app, log, **options)
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


async def until(worker: Worker, *partitions: int) -> None:
    """Wait until the worker owns exactly these partitions."""

    def owned() -> set[int]:
        return {number for number, found in worker.processors.items() if found.status is ProcessorState.ACTIVE}

    await waiting.until(lambda: owned() == set(partitions))


async def until_shared(*workers: Worker) -> None:
    """Wait until each of two workers has its half of the four partitions."""
    await waiting.until(lambda: all(len(worker.processors) == 2 for worker in workers))


# ------------------------------------------------------------------------------------------------------------ together


def test_two_workers_share_the_partitions_and_one_takes_over_from_the_other(url: str):
    app = an_app()

    async def test():
        async with (
            opened(url, app) as log,
            opened(url, app) as other,
            opened(url, app) as third,
            working(app, log) as first,
            Client(third, app) as client,
        ):
            await until(first, 0, 1, 2, 3)
            waits = [await client.start("waits") for _ in range(12)]
            async with working(app, other) as second:
                await until_shared(first, second)
                handles = [await client.start("line", 3) for _ in range(20)]
                assert await asyncio.gather(*(handle.result(timeout=30) for handle in handles)) == [3] * 20
                await first.stop()
                await until(second, 0, 1, 2, 3)
                for handle in waits:
                    await handle.signal("go", handle.id)
                found = await asyncio.gather(*(handle.result(timeout=30) for handle in waits))
                assert found == [handle.id for handle in waits]

    run(test())


def test_a_stopped_worker_leaves_no_task_and_no_thread(url: str):
    app = an_app()

    async def test():
        async with opened(url, app) as log:
            await settle()
            before, threads = asyncio.all_tasks(), set(threading.enumerate())
            interval = sys.getswitchinterval()
            async with working(app, log) as first, working(app, log) as second:
                await until_shared(first, second)
                assert sys.getswitchinterval() < interval
            await settle()
            assert asyncio.all_tasks() == before
            for thread in set(threading.enumerate()) - threads:
                if not thread.name.startswith("asyncio_"):  # the loop's own pool, which goes with the loop
                    await asyncio.to_thread(thread.join, 10)
                    assert not thread.is_alive(), thread
            assert sys.getswitchinterval() == interval

    run(test())
    gc.collect()


def test_starting_and_stopping_twice_is_fine_also_at_the_same_time(memory: str):
    app = an_app()

    async def test():
        async with opened(memory, app) as log:
            worker = Worker(app, log)
            await worker.stop()
            worker = Worker(app, log)
            await worker.start()
            await worker.start()
            ending = asyncio.ensure_future(worker.wait())
            await until(worker, 0, 1, 2, 3)
            assert not ending.done()
            await asyncio.gather(worker.stop(), worker.stop())
            await worker.stop()
            await ending
            assert not worker.partitions and not worker.processors

    run(test())


def test_a_stop_whose_caller_goes_away_is_done_to_the_end(memory: str):
    app = an_app()

    async def test():
        async with opened(memory, app) as log:
            worker = Worker(app, log)
            await worker.start()
            await until(worker, 0, 1, 2, 3)
            stopping = asyncio.ensure_future(worker.stop())
            await asyncio.sleep(0)
            stopping.cancel()
            await worker.wait()
            assert worker.partitions == {}

    run(test())


def test_a_worker_that_cannot_join_leaves_nothing_behind_and_may_try_again(tmp_path: Path):
    app = an_app()

    async def test():
        async with opened(f"sqlite:///{tmp_path}/log.db", app) as log:
            join, interval = log.join, sys.getswitchinterval()
            threads = set(threading.enumerate())

            async def away(owner: str, *, instance: str | None = None) -> Any:
                raise Unavailable("the log is away")

            log.join = away  # type: ignore[method-assign]
            worker = Worker(app, log)
            with pytest.raises(Unavailable):
                await worker.start()
            assert set(threading.enumerate()) == threads and sys.getswitchinterval() == interval
            log.join = join  # type: ignore[method-assign]
            await worker.start()
            await waiting.until(lambda: worker.processors)
            await worker.stop()

    run(test())


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "8"])
def test_a_wrong_number_of_parallel_steps_is_refused(memory: str, wrong: Any):
    app = an_app()

    async def test():
        async with opened(memory, app) as log:
            with pytest.raises(InvalidArguments, match="max_parallel_steps"):
                Worker(app, log, max_parallel_steps=wrong)

    run(test())


# ------------------------------------------------------------------------------------------------------------- failures


def test_a_partition_whose_log_fails_is_begun_again_and_backs_off(
    memory: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("streamflow.worker.worker.BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr("streamflow.worker.worker.BACKOFF_SECONDS_MAX", 0.004)
    app = an_app()
    failures = iter([Unavailable("away"), ZeroDivisionError("broken"), Unavailable("away"), Unavailable("away")])

    async def test():
        async with opened(memory, app) as log:
            read = log.end_offset

            async def end_offset(topic: str, partition: int) -> int:
                if topic == HISTORY and partition == 2 and (error := next(failures, None)):
                    raise error
                return await read(topic, partition)

            log.end_offset = end_offset  # type: ignore[method-assign]
            async with working(app, log) as worker:
                await until(worker, 0, 1, 2, 3)
        texts = [record.getMessage() for record in caplog.records]
        assert [text for text in texts if "trying again" in text] == [
            f"partition 2: away; trying again in {seconds} s" for seconds in ("0.0", "0.0", "0.0")
        ]
        assert any("beginning again from the log" in text for text in texts)

    run(test())


def test_a_fenced_partition_is_taken_back_while_it_is_assigned_here(memory: str, caplog: pytest.LogCaptureFixture):
    app = an_app()

    async def test():
        async with opened(memory, app) as log, working(app, log) as worker, Client(log, app) as client:
            await until(worker, 0, 1, 2, 3)
            for partition in range(4):
                end = await log.end_offset(HISTORY, partition)
                await log.append(partition, end, [(b"", encode_history(Claim(term=9, owner="rival", at=1)))])
            handles = [await client.start("line", 2) for _ in range(8)]
            assert await asyncio.gather(*(handle.result(timeout=30) for handle in handles)) == [1] * 8
            assert "reading the log again" in caplog.text

    run(test())


def test_a_corrupt_log_ends_the_worker_with_its_error(memory: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.CRITICAL, logger="streamflow.worker")
    app = an_app()

    async def test():
        async with opened(memory, app) as log:
            await log.append(1, 0, [(b"", b"garbage")])
            async with working(app, log) as worker:
                with pytest.raises(CorruptLog, match="history partition 1, offset 0"):
                    await worker.wait()
                with pytest.raises(CorruptLog):
                    await worker.wait()
                await until(worker, 0, 2, 3)

    run(test())


def test_a_log_that_is_closed_under_a_worker_ends_it(memory: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.CRITICAL, logger="streamflow.worker")
    app = an_app()

    async def test():
        async with opened(memory, app) as log, working(app, log) as worker:
            await until(worker, 0, 1, 2, 3)
            await log.close()
            with pytest.raises(Unavailable):
                await worker.wait()

    run(test())


def test_a_partition_that_fails_while_it_is_given_up_is_not_begun_again(memory: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.CRITICAL, logger="streamflow.worker")
    app = an_app()

    async def test():
        async with opened(memory, app) as log, working(app, log) as worker:
            await until(worker, 0, 1, 2, 3)
            for processor in worker.processors.values():
                processor.stop = partial(processor._fail, Unavailable("now"))  # type: ignore[method-assign]
            began = asyncio.get_running_loop().time()
            await worker.stop()
            assert asyncio.get_running_loop().time() - began < 5
            ends = [await log.end_offset(HISTORY, partition) for partition in range(4)]
            assert ends == [1, 1, 1, 1], "one claim each"

    run(test())


def test_a_partition_that_cannot_be_released_at_once_is_released_later(
    memory: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("streamflow.worker.worker.BACKOFF_SECONDS", 0.001)
    app = an_app()

    async def test():
        async with opened(memory, app) as log, opened(memory, app) as other, working(app, log) as first:
            await until(first, 0, 1, 2, 3)
            assert first._membership is not None
            release, refusals = first._membership.release, iter(range(3))

            async def busy(partition: int) -> None:
                if next(refusals, None) is not None:
                    raise Unavailable("database is locked")
                await release(partition)

            first._membership.release = busy  # type: ignore[method-assign]
            async with working(app, other) as second:
                await until_shared(second)
            assert "cannot be released: database is locked" in caplog.text

    run(test())


def test_a_partition_that_came_and_went_before_anybody_looked_is_free_for_the_others(url: str):
    app = an_app()

    async def test():
        async with opened(url, app) as log, opened(url, app) as other:
            first, second = await log.join("first"), await other.join("second")
            shares = {"first": frozenset[int](), "second": frozenset[int]()}

            async def watch(name: str, member: Any) -> None:
                async for shown in member.assignments():
                    for gone in shares[name] - shown:
                        await member.release(gone)
                    shares[name] = shown

            watching = [asyncio.ensure_future(watch("first", first)), asyncio.ensure_future(watch("second", second))]
            await waiting.until(lambda: shares["first"] | shares["second"] == {0, 1, 2, 3})
            await first.leave()
            await second.leave()
            await asyncio.wait(watching)

    run(test())


def test_a_worker_that_is_stopped_in_the_middle_of_a_hand_over_gives_up_everything(memory: str):
    app = an_app()

    async def test():
        async with opened(memory, app) as log, opened(memory, app) as other, working(app, log) as first:
            await until(first, 0, 1, 2, 3)
            gate = asyncio.Event()
            finish = {number: processor._finish for number, processor in first.processors.items()}

            def slow(number: int) -> Any:
                async def finishing() -> None:
                    await gate.wait()
                    await finish[number]()

                return finishing

            for number, processor in first.processors.items():
                processor._finish = slow(number)  # type: ignore[method-assign]
            async with working(app, other) as second:
                await settle()
                assert first._leaving, "two of them are on their way"
                stopping = asyncio.ensure_future(first.stop())
                await settle()
                gate.set()
                await stopping
                await until(second, 0, 1, 2, 3)

    run(test())


# -------------------------------------------------------------------------------------------------------- local state


def test_timers_are_followed_once_their_partition_is_taken_over(monkeypatch: pytest.MonkeyPatch):
    async def test():
        app = an_app()
        async with opened(f"memory://worker-{next(_names)}?partitions=1", app) as log:
            follow, append = log.follow, log.append
            followed: list[str] = []
            claims, may_claim = asyncio.Event(), asyncio.Event()

            def told(topic: str, *args: Any, **options: Any) -> Any:
                followed.append(topic)
                return follow(topic, *args, **options)

            async def late(*args: Any) -> int:
                claims.set()
                await may_claim.wait()
                return await append(*args)

            monkeypatch.setattr(log, "follow", told)
            monkeypatch.setattr(log, "append", lambda *args: asyncio.ensure_future(late(*args)))
            async with working(app, log) as worker:
                await claims.wait()
                await settle()
                assert TIMERS not in followed
                may_claim.set()
                await until(worker, 0)
                await waiting.until(lambda: TIMERS in followed)

    run(test())


def test_local_state_survives_a_restart_and_is_only_read_on(tmp_path: Path):
    app = an_app()
    url = f"sqlite:///{tmp_path}/log.db?partitions=2"

    async def test():
        applied = 0
        for _ in range(2):
            async with opened(url, app) as log, working(app, log) as worker, Client(log, app) as client:
                handle = await client.start("line", 2, id="w", if_exists="restart")
                assert await handle.result(timeout=30) == 1
                applied = max(processor.state.applied_offset for processor in worker.processors.values())
        assert applied >= 4
        assert (tmp_path / "log.db.state").is_dir()

    run(test())


def test_a_state_that_is_being_opened_when_the_partition_goes_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from streamflow.store import rocks

    app = an_app()
    begun, gate = threading.Event(), threading.Event()
    stores: list[Any] = []
    real = rocks.open_rocks

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        gate.wait(20)
        stores.append(real(*args, **kwargs))
        return stores[-1]

    monkeypatch.setattr(rocks, "open_rocks", slow)

    async def test():
        async with opened(f"sqlite:///{tmp_path}/log.db?partitions=1", app) as log:
            worker = Worker(app, log)
            await worker.start()
            await asyncio.to_thread(begun.wait)
            stopping = asyncio.ensure_future(worker.stop())
            await settle()
            gate.set()
            await stopping
            for store in stores:
                with pytest.raises(AssertionError):
                    store.get(b"x")

    run(test())


def test_a_limit_is_a_limit_of_one_worker(memory: str):
    app = an_app()

    async def test():
        async with (
            opened(memory, app) as log,
            working(app, log, limits=Limits(live_runs_max=1)) as worker,
            Client(log, app) as client,
        ):
            handles = [await client.start("waits") for _ in range(12)]
            for handle in handles:
                await handle.signal("go", 1)
            assert await asyncio.gather(*(handle.result(timeout=30) for handle in handles)) == [1] * 12
            assert all(len(processor.core.live) <= 1 for processor in worker.processors.values())

    run(test())


# -------------------------------------------------------------------------------------------------------- step queues


def a_queued_app() -> tuple[sf.App, list[str]]:
    """An app with a step on a queue, and the workers' names in the order in which they ran it."""
    app, ran = sf.App("shop"), list[str]()

    @app.step(queue="gpu")
    async def embed(n: int) -> int:
        ran.append(sf.step_info().workflow_id)
        return n

    @app.workflow
    async def flow(n: int) -> int:
        return sum(await asyncio.gather(*(embed(i) for i in range(n))))

    return app, ran


def test_a_step_waits_for_a_worker_that_serves_its_queue_and_owns_nothing(url: str, tmp_path: Path):
    app, ran = a_queued_app()

    async def test():
        async with (
            opened(url, app) as log,
            opened(url, app) as other,
            opened(url, app) as third,
            working(app, log) as owner,
            Client(third, app) as client,
        ):
            await until(owner, 0, 1, 2, 3)
            handles = [await client.start("flow", 3, id=f"w{number}") for number in range(4)]
            status = await handles[0].status()
            assert (status.waiting_on, ran) == (["step embed on queue gpu"] * 3, [])
            state = tmp_path / "none"
            async with working(app, other, queues=["gpu"], owns_partitions=False, state_dir=state) as step_worker:
                found = await asyncio.gather(*(handle.result(timeout=30) for handle in handles))
                assert (found, len(ran)) == ([3] * 4, 12)
                assert not step_worker.partitions and not state.exists()
                assert set(owner.processors) == {0, 1, 2, 3}

    run(test())


def test_a_worker_may_serve_a_queue_beside_its_partitions(memory: str):
    app, ran = a_queued_app()

    async def test():
        async with app.serve(memory, queues=["gpu", "gpu"]) as client:
            assert await (await client.start("flow", 3)).result(timeout=30) == 3
        assert len(ran) == 3

    run(test())


def test_a_worker_with_nothing_to_do_is_refused(memory: str):
    async def test():
        async with opened(memory, an_app()) as log:
            with pytest.raises(InvalidArguments, match="a worker that owns no partitions needs queues to serve"):
                Worker(an_app(), log, owns_partitions=False)

    run(test())


def test_a_worker_that_cannot_join_leaves_its_queues(memory: str, monkeypatch: pytest.MonkeyPatch):
    app, _ = a_queued_app()

    async def away(owner: str, *, instance: str | None = None) -> None:
        raise Unavailable("the log is away")

    async def test():
        async with opened(memory, app) as log, opened(memory, app) as other:
            monkeypatch.setattr(log, "join", away)
            worker = Worker(app, log, queues=["gpu"])
            with pytest.raises(Unavailable, match="the log is away"):
                await worker.start()
            async with working(app, other, queues=["gpu"], owns_partitions=False) as second:
                await waiting.until(lambda: set(second.services[0].readers) == {0, 1, 2, 3})

    run(test())


def test_a_worker_dies_with_the_service_of_a_queue(memory: str):
    app, _ = a_queued_app()

    async def test():
        async with opened(memory, app) as log, working(app, log, queues=["gpu"]) as worker:
            worker.services[0].ended.set_exception(CorruptLog("page me"))
            with pytest.raises(CorruptLog, match="page me"):
                await worker.wait()

    run(test())
