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
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import streamflow as sf
from streamflow.broker import Cluster
from streamflow.logs.base import HISTORY
from streamflow.logs.kafka_membership import SESSION_SECONDS
from streamflow.logs.open import open_log
from tests.kafka.faulty_app import STEPS
from tests.kafka.plugin import FaultReport
from tests.kafka.stage import After, Stage, all_complete, delete_topics, owners_of, staged, start_orders

pytestmark = pytest.mark.timeout(400)

RUNS = 500
STEP_SECONDS = 0.4
HANGS_SECONDS = 300.0
"""Where nothing goes on for so long, the test fails with what the workers said, before pytest ends all of them."""
Fault = Callable[[Stage, sf.Client, asyncio.Task[None]], Awaitable[None]]


def under(fault: Fault, folder: Path, url: str, *, more: int = 0, zombies: bool = False) -> After:
    """Run orders while the fault is at work, which starts `more`; the log must be well afterwards.

    Where there are zombies, one may start what its successor has completed: it has not heard of it. Its outcome counts
    for nothing.
    """

    async def main() -> After:
        async with staged(folder, url) as (stage, client), asyncio.timeout(HANGS_SECONDS):
            await stage.until_each_owns()
            handles = await start_orders(client, RUNS, STEP_SECONDS)
            await stage.steps_finish(50)
            complete = asyncio.create_task(all_complete(handles))
            try:
                await fault(stage, client, complete)
                await complete
            finally:
                complete.cancel()
            return await stage.after()

    after = asyncio.run(main())
    assert not after.findings.lost, after.findings.lost
    assert not after.findings.unknown, after.findings.unknown
    assert not after.findings.unperformed, after.findings.unperformed
    if not zombies:
        assert not after.findings.run_again, after.findings.run_again
    assert after.findings.runs_completed == after.findings.runs == RUNS + more
    assert after.findings.steps == (RUNS + more) * STEPS
    return after


def assert_taken_over(after: After, pid: int, owned: dict[int, str]) -> None:
    """Each partition that the process owned at that moment was claimed by another later."""
    lost = [partition for partition, owner in owned.items() if f"-{pid}-" in owner]
    assert lost, f"process {pid} owned nothing: {owned}"
    claims = owners_of(after.history)
    for partition in lost:
        since = claims[partition].index(owned[partition])
        assert set(claims[partition][since:]) > {owned[partition]}, f"partition {partition}: {claims[partition]}"


async def insist_on_start(client: sf.Client, workflow_id: str) -> sf.Handle[Any]:
    """Start again while nobody answers: the same start twice starts once."""
    while True:
        try:
            return await client.start("order", 0.01, id=workflow_id)
        except sf.Unavailable:
            continue  # it has waited for as long as a client waits


async def while_running(complete: asyncio.Task[None], seconds: float) -> bool:
    """Let the fault last so long; False when all work is done before."""
    await asyncio.wait((complete,), timeout=seconds)
    return not complete.done()


def test_a_worker_is_killed_every_three_seconds(kafka: str, tmp_path: Path, fault_report: FaultReport) -> None:
    chance = random.Random(4711)
    kills = 0

    async def fault(stage: Stage, client: sf.Client, complete: asyncio.Task[None]) -> None:
        nonlocal kills
        alive = list(stage.workers.all)
        while await while_running(complete, 3.0):
            victim = alive.pop(chance.randrange(len(alive)))
            victim.kill()
            kills += 1
            alive.append(stage.start())  # on the directory that the victim left: it has its partitions at once

    after = under(fault, tmp_path, f"kafka://{kafka}")
    assert kills >= 2
    fault_report(f"a worker killed every 3 s, {kills} times", after)


def test_a_worker_that_is_killed_and_does_not_come_back_is_replaced(
    kafka: str, tmp_path: Path, fault_report: FaultReport
) -> None:
    owned: dict[int, str] = {}
    pid = 0

    async def fault(stage: Stage, client: sf.Client, complete: asyncio.Task[None]) -> None:
        nonlocal owned, pid
        owned, pid = await stage.until_each_owns(), stage.workers.all[0].pid
        stage.workers.all[0].kill()

    after = under(fault, tmp_path, f"kafka://{kafka}")
    fault_report("a worker killed for good (its partitions wait for the session to end)", after)
    assert_taken_over(after, pid, owned)


def test_a_worker_stopped_beyond_its_session_is_fenced_when_it_wakes(
    kafka: str, tmp_path: Path, fault_report: FaultReport
) -> None:
    owned: dict[int, str] = {}
    pid = 0

    async def fault(stage: Stage, client: sf.Client, complete: asyncio.Task[None]) -> None:
        nonlocal owned, pid
        zombie = stage.workers.all[0]
        owned, pid = await stage.until_each_owns(), zombie.pid
        for _ in range(2):
            os.kill(zombie.pid, signal.SIGSTOP)
            await while_running(complete, SESSION_SECONDS + 3)
            os.kill(zombie.pid, signal.SIGCONT)
            await while_running(complete, 3)
        zombie.check()
        assert await (await client.start("order", 0.01, id="late")).result(timeout=100) == list(range(STEPS))

    after = under(fault, tmp_path, f"kafka://{kafka}", more=1, zombies=True)
    fault_report("a worker stopped twice for longer than its session", after)
    assert_taken_over(after, pid, owned)


def test_partitions_move_to_and_fro(kafka: str, tmp_path: Path, fault_report: FaultReport) -> None:
    moves = 0

    async def fault(stage: Stage, client: sf.Client, complete: asyncio.Task[None]) -> None:
        nonlocal moves
        while await while_running(complete, 1.0) and moves < 6:
            extra = stage.start(state="extra")
            await stage.until_said(f"pid {extra.pid};")  # before that a signal ends it like any process
            await while_running(complete, 2.5)
            assert await extra.stop() == 0, stage.said()
            moves += 2

    after = under(fault, tmp_path, f"kafka://{kafka}")
    assert moves >= 2
    fault_report(f"partitions moved by {moves} arrivals and departures", after)


def test_the_leader_is_killed_four_times(kafka_cluster: Cluster, tmp_path: Path, fault_report: FaultReport) -> None:
    async def fault(stage: Stage, client: sf.Client, complete: asyncio.Task[None]) -> None:
        for _ in range(4):
            leader = await asyncio.to_thread(kafka_cluster.leader_of, f"{stage.app}.{HISTORY}", 0)
            assert leader is not None
            kafka_cluster.node(leader).kill()
            await while_running(complete, 2.0)
            await asyncio.to_thread(kafka_cluster.node(leader).start)
            await asyncio.to_thread(kafka_cluster.wait)

    after = under(fault, tmp_path, kafka_cluster.url)
    fault_report("the leader of a partition killed and restarted four times", after)


def test_two_of_three_brokers_are_away_for_twenty_seconds(
    kafka_cluster: Cluster, tmp_path: Path, fault_report: FaultReport
) -> None:
    async def fault(stage: Stage, client: sf.Client, complete: asyncio.Task[None]) -> None:
        leader = await asyncio.to_thread(kafka_cluster.leader_of, f"{stage.app}.{HISTORY}", 0)
        away = [node for node in kafka_cluster.nodes if node.number != leader]
        for node in away:
            node.kill()
        gone_at = time.monotonic()
        late = asyncio.create_task(insist_on_start(client, "while-away"))
        await while_running(complete, 20.0)
        assert not late.done(), "nothing may be acknowledged that one broker alone has"
        for node in away:
            await asyncio.to_thread(node.start)
        await asyncio.to_thread(kafka_cluster.wait)
        assert time.monotonic() - gone_at > 20
        assert await (await late).result(timeout=100) == list(range(STEPS))

    after = under(fault, tmp_path, kafka_cluster.url, more=1)
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
