"""Step queues over Kafka: what a step worker had under way when it was killed is done by another one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import streamflow as sf
from streamflow.cli.evidence import FINISHED, STARTED, Line, read_lines
from streamflow.core.events import StepCompleted
from tests.kafka.stage import RUN_SECONDS, Stage, staged, until

pytestmark = pytest.mark.timeout(400)

SPEC = "tests.kafka.queue_app:app"
SECONDS = 1.0
WAVE = 12
WAVES_MAX = 60


def under_way(lines: list[Line], pid: int) -> set[str]:
    """The runs whose attempt that process has begun and not ended."""
    mine = [line for line in lines if line.pid == pid]
    ended = {line.workflow_id for line in mine if line.what == FINISHED}
    return {line.workflow_id for line in mine if line.what == STARTED} - ended


async def start_until_busy(stage: Stage, client: sf.Client, pids: set[int]) -> list[sf.Handle[int]]:
    """Start runs, some at a time, until each of the processes has an attempt under way."""
    handles: list[sf.Handle[int]] = []
    for _ in range(WAVES_MAX):
        begin = len(handles)
        starting = (client.start("index", n, SECONDS, id=f"run-{n:03}") for n in range(begin, begin + WAVE))
        handles += await asyncio.gather(*starting)
        names = {handle.id for handle in handles[begin:]}

        def begun(names: set[str] = names) -> bool:
            return names <= {line.workflow_id for line in read_lines(stage.folder / "lines")}

        await until(begun, lambda: stage.said()[-4000:])
        lines = read_lines(stage.folder / "lines")
        if all(under_way(lines, pid) for pid in pids):
            return handles
    raise AssertionError(f"one of {pids} never had work:\n{stage.said()[-4000:]}")


def test_what_a_killed_step_worker_had_under_way_is_done_by_another(kafka: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path, f"kafka://{kafka}", workers=1, spec=SPEC) as (stage, client):
            victim, survivor = (stage.start("--queue", "gpu") for _ in range(2))
            handles = await start_until_busy(stage, client, {victim.pid, survivor.pid})
            victim.kill()
            lost = under_way(read_lines(tmp_path / "lines"), victim.pid)
            assert lost
            results = await asyncio.gather(*(handle.result(timeout=RUN_SECONDS) for handle in handles))
            assert results == list(range(len(handles)))
            lines = read_lines(tmp_path / "lines")
            again = {line.workflow_id for line in lines if line.pid == survivor.pid and line.what == FINISHED}
            assert lost <= again, "with the number that it had"
            assert {line.attempt for line in lines} == {1}
            runs = (await stage.after()).history.runs
            outcomes = [[type(event) for event, _ in runs[handle.id].steps[0].outcomes] for handle in handles]
            assert outcomes == [[StepCompleted]] * len(handles)
            survivor.check()

    asyncio.run(main())
