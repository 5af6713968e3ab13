"""Faults for real on a real Kafka: workers and brokers killed and stopped by signals; the log is read afterwards.

After each the same must hold: every accepted run closed, one recorded outcome per step position, no valid record lost.
How long nothing went on is measured and shown at the end of the test run.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import streamflow as sf
from streamflow.broker import Cluster
from streamflow.cli.worker_process import WorkerProcess
from streamflow.logs.base import HISTORY
from streamflow.logs.kafka_membership import SESSION_SECONDS
from streamflow.logs.open import open_log
from tests.kafka.faulty_app import STEPS
from tests.kafka.plugin import FaultReport
from tests.kafka.stage import (
    After,
    Stage,
    all_complete,
    delete_topics,
    insist_on_start,
    is_owned_by,
    leader_of,
    staged,
    start_orders,
)

pytestmark = pytest.mark.timeout(400)

RUNS = 500
MORE = 60
"""Runs at a time that keep the workers busy when those are done before the fault is over."""
STEP_SECONDS = 0.4
STOPS_SECONDS = 60.0
"""More than a worker allows itself for its end."""
HANGS_SECONDS = 300.0
"""Where nothing goes on for so long, the test fails with what the workers said, before pytest ends all of them."""
Fault = Callable[[Stage, sf.Client], Awaitable[int]]
"""Does its harm, and tells how many runs it started itself."""


async def work_until(over: asyncio.Event, client: sf.Client, handles: list[sf.Handle[Any]]) -> int:
    """Await these runs, and then more, some at a time, until the fault is over; how many were started."""
    await all_complete(handles)
    more = 0
    while not over.is_set():
        await all_complete(await start_orders(client, MORE, STEP_SECONDS, f"more-{more}"))
        more += MORE
    return more


def under(fault: Fault, folder: Path, url: str, *, zombies: bool = False) -> After:
    """Run orders on three workers for as long as the fault is at work; the log must be well afterwards.

    Where there are zombies, one may start what its successor has completed: it has not heard of it. Its outcome counts
    for nothing.
    """

    async def main() -> tuple[After, int]:
        async with staged(folder, url) as (stage, client), asyncio.timeout(HANGS_SECONDS):
            await stage.until_each_owns()
            handles = await start_orders(client, RUNS, STEP_SECONDS)
            await stage.steps_finish(50)
            over = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                work = group.create_task(work_until(over, client, handles))
                runs = RUNS + await fault(stage, client)
                over.set()
            return await stage.after(), runs + work.result()

    after, runs = asyncio.run(main())
    assert not after.findings.lost, after.findings.lost
    assert not after.findings.unknown, after.findings.unknown
    assert not after.findings.unperformed, after.findings.unperformed
    if not zombies:
        assert not after.findings.run_again, after.findings.run_again
    assert after.findings.runs_completed == after.findings.runs == runs
    assert after.findings.steps == runs * STEPS
    return after


@asynccontextmanager
async def healed(cluster: Cluster) -> AsyncIterator[None]:
    """Whatever happens to the fault: all nodes of the cluster that others use, too, are there afterwards."""
    try:
        yield
    finally:
        for node in cluster.nodes:
            if not node.is_running:
                await asyncio.to_thread(node.start)
        await asyncio.to_thread(cluster.wait)


def lost_by(victim: WorkerProcess, before: dict[int, list[str]]) -> list[int]:
    """The partitions that the worker owned, where the owners were these."""
    lost = [partition for partition, owners in before.items() if is_owned_by(victim, owners[-1])]
    assert lost, f"process {victim.pid} owned nothing: {before}"
    return lost


def assert_taken_over(after: After, victim: WorkerProcess, before: dict[int, list[str]]) -> None:
    """Each partition that the worker owned, where the owners were these, was next claimed by another."""
    for partition in lost_by(victim, before):
        owners = after.history.owners()[partition]
        later = owners[len(before[partition]) :]
        assert later and not is_owned_by(victim, later[0]), f"partition {partition}: {owners}"


async def all_answer(client: sf.Client) -> None:
    """Until the owner of every partition answers."""
    async with asyncio.timeout(HANGS_SECONDS):
        while True:
            try:
                await client.list(limit=1)
            except sf.Unavailable:
                continue  # it has waited for as long as a client waits
            return


async def last(seconds: float) -> None:
    """Let the fault last so long."""
    await asyncio.sleep(seconds)  # tidy: the fault's own duration


def test_a_worker_is_killed_every_three_seconds(kafka: str, tmp_path: Path, fault_report: FaultReport) -> None:
    chance = random.Random(4711)
    kills = 4

    async def fault(stage: Stage, client: sf.Client) -> int:
        alive = list(stage.workers.all)
        for _ in range(kills):
            await last(3.0)
            await stage.until_each_owns()
            victim = alive.pop(chance.randrange(len(alive)))
            victim.kill()
            alive.append(stage.start())  # on the directory that the victim left: it has its partitions at once
        return 0

    after = under(fault, tmp_path, f"kafka://{kafka}")
    fault_report(f"a worker killed every 3 s, {kills} times", after)


def test_a_worker_that_is_killed_and_does_not_come_back_is_replaced(
    kafka: str, tmp_path: Path, fault_report: FaultReport
) -> None:
    seen: list[tuple[WorkerProcess, dict[int, list[str]]]] = []

    async def fault(stage: Stage, client: sf.Client) -> int:
        victim = stage.workers.all[0]
        seen.append((victim, await stage.until_each_owns()))
        victim.kill()
        return 0

    after = under(fault, tmp_path, f"kafka://{kafka}")
    fault_report("a worker killed for good (its partitions wait for the session to end)", after)
    assert_taken_over(after, *seen[0])


def test_a_worker_stopped_beyond_its_session_is_replaced_and_does_no_harm_when_it_wakes(
    kafka: str, tmp_path: Path, fault_report: FaultReport
) -> None:
    seen: list[tuple[WorkerProcess, dict[int, list[str]]]] = []

    async def fault(stage: Stage, client: sf.Client) -> int:
        zombie = stage.workers.all[0]
        for _ in range(2):
            before = await stage.until_each_owns()
            seen.append((zombie, before))
            os.kill(zombie.pid, signal.SIGSTOP)
            await last(SESSION_SECONDS + 3)
            await stage.until_claimed({partition: len(before[partition]) + 1 for partition in lost_by(zombie, before)})
            os.kill(zombie.pid, signal.SIGCONT)
            await last(3)
        zombie.check()
        assert await (await client.start("order", 0.01, id="late")).result(timeout=100) == list(range(STEPS))
        return 1

    after = under(fault, tmp_path, f"kafka://{kafka}", zombies=True)
    fault_report("a worker stopped twice for longer than its session", after)
    for zombie, before in seen:
        assert_taken_over(after, zombie, before)


def test_partitions_move_to_and_fro(kafka: str, tmp_path: Path, fault_report: FaultReport) -> None:
    arrivals = 3

    async def fault(stage: Stage, client: sf.Client) -> int:
        for _ in range(arrivals):
            extra = stage.start(state="extra")
            await stage.until_each_owns()
            await last(0.5)
            assert await extra.stop(STOPS_SECONDS) == 0, stage.said()
        return 0

    after = under(fault, tmp_path, f"kafka://{kafka}")
    fault_report(f"partitions moved by {arrivals} arrivals and departures", after)


def test_the_leader_is_killed_four_times(kafka_cluster: Cluster, tmp_path: Path, fault_report: FaultReport) -> None:
    async def fault(stage: Stage, client: sf.Client) -> int:
        for _ in range(4):
            await all_answer(client)  # the last one is overcome
            await stage.steps_finish(RUNS // 2)
            leader = await asyncio.to_thread(leader_of, kafka_cluster, f"{stage.app}.{HISTORY}")
            async with healed(kafka_cluster):
                kafka_cluster.node(leader).kill()
                # Started sooner, it would still be counted in from before while it is not there.
                await asyncio.to_thread(kafka_cluster.wait, [node for node in (1, 2, 3) if node != leader])
        return 0

    after = under(fault, tmp_path, kafka_cluster.url)
    fault_report("the leader of a partition killed and restarted four times", after)


def test_two_of_three_brokers_are_away_for_twenty_seconds(
    kafka_cluster: Cluster, tmp_path: Path, fault_report: FaultReport
) -> None:
    async def fault(stage: Stage, client: sf.Client) -> int:
        leader = await asyncio.to_thread(leader_of, kafka_cluster, f"{stage.app}.{HISTORY}")
        away = [node for node in kafka_cluster.nodes if node.number != leader]
        gone_at = time.monotonic()
        async with healed(kafka_cluster):
            for node in away:
                node.kill()
            late = asyncio.create_task(insist_on_start(client, "while-away", 0.01))
            await last(20.0)
            assert not late.done(), "nothing may be acknowledged that one broker alone has"
        assert time.monotonic() - gone_at > 20
        assert await (await late).result(timeout=100) == list(range(STEPS))
        return 1

    after = under(fault, tmp_path, kafka_cluster.url)
    fault_report("two of three brokers away for 20 s", after)
    assert after.longest_pause > 15


def test_a_question_about_topics_finds_a_broker_that_lives(kafka_cluster: Cluster) -> None:
    """Whichever of them dies: the client remembers one that answers such questions, and asks no other by itself."""

    async def main() -> None:
        log = await open_log(f"{kafka_cluster.url}?partitions=1", app="asks")
        try:
            for node in kafka_cluster.nodes:
                node.kill()
                rest = [other.number for other in kafka_cluster.nodes if other is not node]
                try:
                    await asyncio.to_thread(kafka_cluster.wait, rest)
                    await log.verify()  # raises where nobody answers
                finally:
                    await asyncio.to_thread(node.start)
                    await asyncio.to_thread(kafka_cluster.wait)
            assert log.partitions == 1
        finally:
            await log.close()

    try:
        asyncio.run(main())
    finally:
        delete_topics(kafka_cluster.url, "asks")
