"""Faults for real: real worker processes on a real SQLite file, killed and stopped by signals; the log is read after.

After every fault the same must hold: every accepted run closed, each step has one recorded outcome, no step that
completed ran again.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import streamflow as sf
from streamflow.cli.evidence import LINES_VARIABLE, Findings, History, examine, read_history, read_lines
from streamflow.cli.worker_process import WorkerProcess, Workers
from streamflow.codec.avro import decode_history
from streamflow.core.events import Claim
from streamflow.logs.base import HISTORY
from streamflow.logs.open import open_log
from streamflow.logs.sqlite_stuck import write_lock_holder
from tests.e2e.faulty_shop import app, interrupts, order, slow
from tests.waiting import until

LEASE_SECONDS = 5.0
RUN_SECONDS = 60.0


class Stage:
    """A folder with a log, worker processes on it, and a client."""

    def __init__(self, folder: Path, workers: Workers) -> None:
        self.folder = folder
        self.url = f"sqlite:///{folder}/log.db"
        self.workers = workers

    def start(self) -> WorkerProcess:
        output = self.folder / "workers.log"
        variables = {LINES_VARIABLE: str(self.folder / "lines")}
        return self.workers.start("tests.e2e.faulty_shop:app", self.url, output, variables=variables)

    def said(self) -> str:
        return (self.folder / "workers.log").read_text()

    async def history(self) -> History:
        log = await open_log(self.url, app=app.name)
        try:
            return await read_history(log)
        finally:
            await log.close()

    async def claims(self) -> list[Claim]:
        log = await open_log(self.url, app=app.name)
        try:
            found = []
            for partition in range(log.partitions):
                records = await log.read(HISTORY, partition, 0, limit=100_000)
                decoded = [decode_history(record.value or b"") for record in records]
                found += [record for record in decoded if isinstance(record, Claim)]
            return found
        finally:
            await log.close()

    async def findings(self) -> Findings:
        return examine(await self.history(), read_lines(self.folder / "lines"))


@asynccontextmanager
async def staged(folder: Path) -> AsyncIterator[tuple[Stage, sf.Client]]:
    with Workers() as workers:
        stage = Stage(folder, workers)
        stage.start()
        # A client makes no topics: it can open the log once the worker has made them.
        log = await open_log(stage.url, app=app.name)
        try:
            async with app.connect(stage.url) as client:
                yield stage, client
        finally:
            await log.close()


async def approve_and_await(client: sf.Client, handles: list[sf.Handle[int]]) -> list[int]:
    for handle in handles:
        await handle.signal("approved", 7, id=f"{handle.id}-approved")
    return [await handle.result(timeout=RUN_SECONDS) for handle in handles]


async def complete(client: sf.Client, handles: list[sf.Handle[int]]) -> None:
    assert await approve_and_await(client, handles) == [expected(6)] * len(handles)


def expected(items: int) -> int:
    return sum(range(items)) + 3 + 5 + 7


async def lines_reach(stage: Stage, count: int) -> None:
    """Until the steps have written that many lines: the work is under way."""
    deadline = time.monotonic() + RUN_SECONDS
    while len(read_lines(stage.folder / "lines")) < count:
        assert time.monotonic() < deadline, f"the steps wrote fewer than {count} lines\n{stage.said()}"
        await asyncio.sleep(0.01)  # tidy: a file has no event to wait for


async def until_each_owns(stage: Stage) -> None:
    """Until every worker that lives owns a partition, so that whoever is killed takes some along."""
    deadline = time.monotonic() + RUN_SECONDS
    while True:
        stage.workers.check()
        owners = [claims[-1] for claims in (await stage.history()).owners().values()]
        living = [worker.pid for worker in stage.workers.all if worker.is_alive]
        if all(any(f"-{pid}-" in owner for owner in owners) for pid in living):
            return
        assert time.monotonic() < deadline, f"of {living} own {owners}\n{stage.said()}"
        await asyncio.sleep(0.05)  # tidy: the poll of a fact that another process makes true


async def stop_between_writes(stage: Stage, zombie: WorkerProcess) -> None:
    """SIGSTOP, where it keeps nobody from writing: in the middle of a write it would be woken up, to end that."""
    for _ in range(1000):
        os.kill(zombie.pid, signal.SIGSTOP)
        await asyncio.to_thread(os.waitid, os.P_PID, zombie.pid, os.WSTOPPED)
        holder = write_lock_holder(stage.folder / "log.db")
        if holder is None or holder.pid != zombie.pid:
            return
        os.kill(zombie.pid, signal.SIGCONT)
        await asyncio.sleep(0.005)  # tidy: it goes on writing for a moment
    raise AssertionError("it was never found between two writes")


def blocked_lines(stage: Stage) -> list[str]:
    """What was said about the step that blocked, by a thread of its own."""
    return [line for line in stage.said().splitlines() if "blocker" in line and "blocked the event loop" in line]


def test_workers_killed_at_any_moment_lose_nothing_and_repeat_no_completed_step(tmp_path: Path) -> None:
    chance = random.Random(4711)

    async def main() -> None:
        async with staged(tmp_path) as (stage, client):
            alive = [stage.workers.all[0], stage.start()]
            async with asyncio.TaskGroup() as group:
                for kill in range(5):
                    await until_each_owns(stage)
                    lines = len(read_lines(tmp_path / "lines"))
                    handles = [await client.start(order, 6, id=f"order-{kill}-{index}") for index in range(12)]
                    group.create_task(complete(client, handles))
                    await lines_reach(stage, lines + chance.randrange(1, 200))
                    victim = alive.pop(chance.randrange(2))
                    victim.kill()
                    alive.append(stage.start())
            findings = await stage.findings()
            assert findings.all_well, findings
            assert findings.runs_completed == 60
            assert findings.steps == 60 * (6 + 3 + 1)

    asyncio.run(main())


def test_a_worker_that_is_stopped_longer_than_its_lease_is_replaced_and_fenced_when_it_wakes(tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path) as (stage, client):
            zombie = stage.workers.all[0]
            handles = [await client.start(order, 30, id=f"order-{index}") for index in range(20)]
            await lines_reach(stage, 100)
            await stop_between_writes(stage, zombie)
            stopped_at = time.monotonic()
            stage.start()
            assert await approve_and_await(client, handles) == [expected(30)] * 20
            assert time.monotonic() - stopped_at >= LEASE_SECONDS - 1, "the other took over before the lease ended"
            os.kill(zombie.pid, signal.SIGCONT)
            # The zombie goes on where it stood; whatever it tries must be refused, and it must live on as a worker.
            late = [await client.start(order, 3, id=f"late-{index}") for index in range(20)]
            assert await approve_and_await(client, late) == [expected(3)] * 20
            zombie.check()
            findings = await stage.findings()
            assert not findings.lost, findings.lost
            assert findings.runs_completed == 40

    asyncio.run(main())


def test_a_worker_that_is_told_to_stop_hands_over_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path) as (stage, client):
            handles = [await client.start(order, 30, id=f"order-{index}") for index in range(20)]
            await lines_reach(stage, 100)
            stage.start()
            assert await stage.workers.all[0].stop(60) == 0, stage.said()
            assert await approve_and_await(client, handles) == [expected(30)] * 20
            findings = await stage.findings()
            assert findings.all_well, findings

    asyncio.run(main())


def test_a_step_that_blocks_the_event_loop_longer_than_the_lease_costs_no_ownership_and_is_named(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with staged(tmp_path) as (stage, client):
            first = await client.start(order, 1, id="before")
            assert await approve_and_await(client, [first]) == [expected(1)]
            before = await stage.claims()
            stage.start()  # somebody who would take over, if there were anything to take
            handle = await client.start(slow, LEASE_SECONDS + 2, id="blocker")
            assert await handle.result(timeout=RUN_SECONDS) == "done"
            await until(lambda: blocked_lines(stage))
            blocked = blocked_lines(stage)
            assert "forgets_to_await" in blocked[0]
            assert "make it a plain def: it then runs in a thread" in blocked[0]
            partition_claims = [claim for claim in await stage.claims() if claim not in before]
            assert len({claim.owner for claim in before}) == 1
            findings = await stage.findings()
            assert findings.all_well, findings
            assert findings.repeated_attempts == 0
            assert len(partition_claims) <= 4, "balancing moves a partition once, a lost lease would move it again"

    asyncio.run(main())


def test_a_workflow_that_raises_keyboard_interrupt_fails_and_ends_no_worker(tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path) as (stage, client):
            with pytest.raises(sf.WorkflowFailed, match="KeyboardInterrupt"):
                await (await client.start(interrupts)).result(timeout=RUN_SECONDS)
            handle = await client.start(order, 1)
            assert await approve_and_await(client, [handle]) == [expected(1)]
            stage.workers.check()

    asyncio.run(main())
