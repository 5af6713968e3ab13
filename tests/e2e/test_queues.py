"""Step queues for real: an owner and step workers in processes of their own on one file; some of them die."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import streamflow as sf
from streamflow.cli.worker_process import WorkerProcess, Workers
from streamflow.codec.avro import decode_command, decode_history
from streamflow.core.commands import ReportAttempt
from streamflow.core.events import StepCompleted, Turn
from streamflow.logs.base import COMMANDS, HISTORY
from streamflow.logs.open import open_log
from tests.e2e.queue_shop import FOLDER_VARIABLE, app, index

RUN_SECONDS = 60.0
RUNS = 12
T = TypeVar("T")


class Stage:
    """A folder with a log, an owner of it, and step workers."""

    def __init__(self, folder: Path, workers: Workers) -> None:
        self.folder = folder
        self.url = f"sqlite:///{folder}/log.db"
        self.workers = workers

    def start(self, *options: str) -> WorkerProcess:
        variables = {FOLDER_VARIABLE: str(self.folder)}
        output = self.folder / "workers.log"
        return self.workers.start("tests.e2e.queue_shop:app", self.url, output, *options, variables=variables)

    def release(self) -> None:
        """Let all attempts end."""
        (self.folder / "release").touch()

    def begun(self) -> list[tuple[int, str, int]]:
        """Process, run and number of each attempt that began."""
        lines = self.folder / "begun"
        found = [line.split() for line in lines.read_text().splitlines()] if lines.exists() else []
        return [(int(pid), workflow_id, int(attempt)) for pid, workflow_id, attempt in found]

    async def until_begun(self, count: int) -> None:
        deadline = time.monotonic() + RUN_SECONDS
        while len(self.begun()) < count:
            assert time.monotonic() < deadline, (self.folder / "workers.log").read_text()
            await asyncio.sleep(0.01)  # tidy: a file has no event to wait for

    async def reports(self) -> list[str]:
        """The runs whose attempts were answered, each as often as it was."""
        log = await open_log(self.url, app=app.name)
        try:
            found = []
            for partition in range(log.partitions):
                for record in await log.read(COMMANDS, partition, 0, limit=100_000):
                    command = decode_command(record.value or b"")
                    if isinstance(command.body, ReportAttempt):
                        found.append(command.workflow_id)
            return sorted(found)
        finally:
            await log.close()

    async def completions(self) -> list[str]:
        """The runs in whose history a step completed, each as often as it did."""
        log = await open_log(self.url, app=app.name)
        try:
            found = []
            for partition in range(log.partitions):
                for record in await log.read(HISTORY, partition, 0, limit=100_000):
                    turn = decode_history(record.value or b"")
                    if isinstance(turn, Turn):
                        found += [turn.workflow_id for event in turn.events if isinstance(event, StepCompleted)]
            return sorted(found)
        finally:
            await log.close()


@asynccontextmanager
async def staged(folder: Path) -> AsyncIterator[tuple[Stage, sf.Client, list[sf.Handle[int]], list[WorkerProcess]]]:
    """An owner, two step workers that have all attempts under way, and the runs."""
    with Workers() as workers:
        stage = Stage(folder, workers)
        stage.start()
        log = await open_log(stage.url, app=app.name)
        try:
            async with app.connect(stage.url) as client:
                handles = [await client.start(index, id=f"run-{number:02}") for number in range(RUNS)]
                step_workers = [stage.start("--queue", "gpu") for _ in range(2)]
                await stage.until_begun(RUNS)
                await until_both_have_some(stage, step_workers)
                yield stage, client, handles, step_workers
        finally:
            await log.close()


async def until_both_have_some(stage: Stage, step_workers: list[WorkerProcess]) -> None:
    """The second one to come takes its share; what the first one had begun of that begins there again."""
    deadline = time.monotonic() + RUN_SECONDS
    while {pid for pid, _, _ in stage.begun()} != {worker.pid for worker in step_workers}:
        assert time.monotonic() < deadline, stage.begun()
        await asyncio.sleep(0.01)  # tidy: a file has no event to wait for


async def results(handles: list[sf.Handle[int]]) -> list[int]:
    return [await handle.result(timeout=RUN_SECONDS) for handle in handles]


def test_attempts_of_a_step_worker_that_is_killed_go_to_the_other_under_the_same_number(tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path) as (stage, _, handles, (victim, survivor)):
            assert {(await handle.status()).waiting_on[0] for handle in handles} == {"step embed on queue gpu"}
            victim.kill()
            stage.release()
            assert await results(handles) == [survivor.pid] * RUNS
            assert {attempt for _, _, attempt in stage.begun()} == {1}
            assert await stage.completions() == [handle.id for handle in handles]
            survivor.check()

    asyncio.run(main())


def test_a_late_answer_of_a_step_worker_that_was_stopped_is_dropped(tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path) as (stage, client, handles, (zombie, other)):
            os.kill(zombie.pid, signal.SIGSTOP)
            held = {workflow_id for pid, workflow_id, _ in stage.begun() if pid == zombie.pid}
            stage.release()
            assert await results(handles) == [other.pid] * RUNS, "after the lease of the stopped one has ended"
            answered = await stage.reports()
            os.kill(zombie.pid, signal.SIGCONT)
            deadline = time.monotonic() + RUN_SECONDS
            while len(late := await stage.reports()) == len(answered):
                assert time.monotonic() < deadline, "the one that woke up answers, too"
                await asyncio.sleep(0.02)  # tidy: what another process does has no event here
            assert set(late) == {handle.id for handle in handles} and held
            fresh = await client.start(index, id="fresh")
            assert await fresh.result(timeout=RUN_SECONDS) in (zombie.pid, other.pid)
            assert await stage.completions() == ["fresh", *(handle.id for handle in handles)]
            assert [(await handle.status()).result for handle in handles] == [other.pid] * RUNS

    asyncio.run(main())


def test_an_owner_that_is_killed_leaves_attempts_on_their_queue_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path) as (stage, _, handles, step_workers):
            stage.workers.all[0].kill()
            stage.release()
            stage.start()
            assert set(await results(handles)) <= {worker.pid for worker in step_workers}
            # The second one may still have been beginning its share.
            begun = Counter(stage.begun())
            assert set(begun.values()) == {1}, "the new owner took the answers, and had nothing run again"
            assert await stage.completions() == [handle.id for handle in handles]

    asyncio.run(main())
