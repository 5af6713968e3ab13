"""What the Kafka fault tests share: worker processes on a real cluster, a client, and a look at the log afterwards."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import streamflow as sf
from streamflow.broker import Cluster
from streamflow.cli.evidence import FINISHED, LINES_VARIABLE, Findings, History, examine, read_lines
from streamflow.cli.worker_process import WorkerProcess, Workers
from streamflow.logs.base import HISTORY, Log
from streamflow.logs.open import open_log
from tests.kafka.faulty_app import APP_VARIABLE, STEPS

RUN_SECONDS: Final = 150.0
PARTITIONS: Final = 6
APP_SPEC: Final = "tests.kafka.faulty_app:app"


@dataclass
class After:
    """What the log and the steps' lines say when all is over."""

    findings: Findings
    history: History
    longest_pause: float
    """The longest time in seconds in which some partition that had work wrote no turn that counts."""


@dataclass
class Stage:
    """A folder, an app of its own on the cluster, and worker processes."""

    folder: Path
    url: str
    workers: Workers
    spec: str = APP_SPEC
    app: str = field(default_factory=lambda: f"faulty-{uuid.uuid4().hex[:8]}")

    def start(self, *options: str, state: str = "state", url: str | None = None) -> WorkerProcess:
        """One more worker; those with the same `state` each have a directory of it to themselves."""
        return self.workers.start(
            self.spec,
            url or self.url,
            self.folder / "workers.log",
            "--state-dir",
            str(self.folder / state),
            *options,
            variables={LINES_VARIABLE: str(self.folder / "lines"), APP_VARIABLE: self.app},
        )

    def said(self) -> str:
        return (self.folder / "workers.log").read_text()

    async def until_said(self, text: str) -> None:
        await until(lambda: text in self.said(), lambda: f"no worker said {text!r}:\n{self.said()[-4000:]}")

    def finished(self) -> int:
        """How many attempts have ended well."""
        return sum(line.what == FINISHED for line in read_lines(self.folder / "lines"))

    async def steps_finish(self, count: int) -> None:
        """Until so many more attempts have ended: the work is under way."""
        count += self.finished()
        await until(lambda: self.finished() >= count, lambda: self.said()[-4000:])

    async def until_each_owns(self) -> dict[int, list[str]]:
        """Until every worker that lives owns a partition: whoever is then killed takes some along. `History.owners`."""

        def each_owns(owners: dict[int, list[str]]) -> bool:
            living = [worker for worker in self.workers.all if worker.is_alive]
            return all(any(is_owned_by(worker, claims[-1]) for claims in owners.values()) for worker in living)

        return await self._until_owners(each_owns)

    async def until_claimed(self, times: dict[int, int]) -> None:
        """Until these partitions have been claimed so many times."""
        await self._until_owners(lambda owners: all(len(owners[each]) >= count for each, count in times.items()))

    async def _until_owners(self, hold: Callable[[dict[int, list[str]]], bool]) -> dict[int, list[str]]:
        owners: dict[int, list[str]] = {}

        async def read_and_see() -> bool:
            self.workers.check()
            history, _ = await read_history(log)
            owners.update(history.owners())
            return hold(owners)

        log = await open_log(self.url, app=self.app)
        try:
            await until_async(read_and_see)
        finally:
            await log.close()
        return owners

    async def after(self) -> After:
        log = await open_log(self.url, app=self.app)
        try:
            history, pause = await read_history(log)
        finally:
            await log.close()
        return After(examine(history, read_lines(self.folder / "lines")), history, pause)


def is_owned_by(worker: WorkerProcess, owner: str) -> bool:
    """Whether that name in a claim is the worker's: host, process id, chance."""
    return f"-{worker.pid}-" in owner


async def read_history(log: Log) -> tuple[History, float]:
    """What the history says by the reading rule, and `After.longest_pause`."""
    history, pause = History(), 0
    for partition in range(log.partitions):
        instants: list[int] = []
        offset = await log.start_offset(HISTORY, partition)
        while batch := await log.read(HISTORY, partition, offset):
            for record in batch:
                assert record.value is not None, record
                turn = history.take(partition, record.value)
                if turn is not None:
                    instants.append(turn.at)
            offset = batch[-1].offset + 1
        pause = max([pause, *(later - earlier for earlier, later in pairwise(instants))])
    return history, pause / 1000


async def until(condition: Callable[[], bool], why: Callable[[], str], seconds: float = RUN_SECONDS) -> None:
    """Wait until the condition holds; fail with `why` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, why()
        await asyncio.sleep(0.05)  # tidy: the poll of a fact that another process makes true


async def until_async(condition: Callable[[], Awaitable[bool]], seconds: float = RUN_SECONDS) -> None:
    """`until` for a fact that the log must be asked for."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        await asyncio.sleep(0.05)  # tidy: the poll of a fact that another process makes true


@asynccontextmanager
async def staged(
    folder: Path, url: str, *, workers: int = 3, spec: str = APP_SPEC
) -> AsyncIterator[tuple[Stage, sf.Client]]:
    """`workers` workers on topics of their own, and a client of them; the topics are deleted at the end."""
    url = f"{url}?partitions={PARTITIONS}"
    with Workers() as processes:
        stage = Stage(folder, url, processes, spec)
        await (await open_log(url, app=stage.app)).close()  # makes the topics
        for _ in range(workers):
            stage.start()
        try:
            async with sf.connect(url, app=stage.app) as client:
                yield stage, client
        except BaseException:
            print(stage.said()[-8000:])
            raise
        finally:
            for worker in processes.all:
                if worker.is_alive:
                    worker.kill()
            await asyncio.to_thread(delete_topics, url, stage.app)


def leader_of(cluster: Cluster, topic: str, among: Collection[int] = (1, 2, 3)) -> int:
    """The node of these that leads the topic's first partition, once there is one and somebody says so."""
    deadline = time.monotonic() + RUN_SECONDS
    while True:
        leader = cluster.leader_of(topic, 0)
        if leader is not None and leader in among:
            return leader
        assert time.monotonic() < deadline, f"{topic} is led by {leader}"
        time.sleep(0.05)  # tidy: the poll of a fact that other processes make true


def delete_topics(url: str, app: str) -> None:
    """Leave the shared cluster as it was."""
    from confluent_kafka.admin import AdminClient

    admin = AdminClient({"bootstrap.servers": url.partition("://")[2].partition("?")[0]})
    mine = [topic for topic in admin.list_topics(timeout=30).topics if topic.startswith(f"{app}.")]
    for future in (admin.delete_topics(mine) if mine else {}).values():
        future.result()


async def insist_on_start(client: sf.Client, workflow_id: str, seconds: float) -> sf.Handle[Any]:
    """Start again while nobody answers for longer than a client waits: the same start twice starts once."""
    async with asyncio.timeout(RUN_SECONDS):
        while True:
            try:
                return await client.start("order", seconds, id=workflow_id)
            except sf.Unavailable:
                continue


async def start_orders(client: sf.Client, count: int, seconds: float, name: str = "order") -> list[sf.Handle[Any]]:
    """Start so many runs; all are accepted when this returns."""
    starting = (insist_on_start(client, f"{name}-{number}", seconds) for number in range(count))
    return list(await asyncio.gather(*starting))


async def _insist_on_result(handle: sf.Handle[Any]) -> object:
    """Ask again while the log is away for longer than a client waits."""
    async with asyncio.timeout(RUN_SECONDS):
        while True:
            try:
                return await handle.result()
            except sf.Unavailable:
                continue


async def all_complete(handles: list[sf.Handle[Any]]) -> None:
    """Every accepted run returns what its code computes."""
    results = await asyncio.gather(*map(_insist_on_result, handles))
    assert results == [list(range(STEPS))] * len(handles)
