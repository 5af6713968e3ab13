"""A worker killed between any two of its callbacks, each in a world of its own where nothing else goes wrong."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import pytest

from streamflow.client.client import Client
from streamflow.client.requests import Surroundings
from streamflow.config import Limits
from streamflow.metrics import unwatch
from streamflow.sim import programs
from streamflow.sim.cluster import Cluster
from streamflow.sim.host import Disk, Loss, SimHost
from streamflow.sim.log import SimLog
from streamflow.sim.rules import Rules
from streamflow.sim.search import quietly
from streamflow.sim.world import Process, World
from streamflow.worker.worker import Worker

PROGRAM: Final = [
    "sequence",
    [
        ["gather", [["work", 1, 0.0, 1], ["plain", 2, 0], ["far", 3, 0.0, 0]]],
        ["guarded", ["signals", "go", 2], "thing", 0.0],
        ["group", [["sleep", 600.0]], 0.0],
        ["large", 3],
    ],
]
STEP: Final = 7
"""Each test kills at every seventh callback, beginning with another one: together they kill at all of them."""


class Story:
    """One run from its start to its result, with a worker that is killed once, after `kill_at` callbacks."""

    def __init__(self, kill_at: int | None, loss: Loss) -> None:
        self.world = World(f"every await {loss}")
        self.cluster = Cluster(self.world, partitions=1)
        self.rules = Rules(self.cluster)
        self.disk = Disk()
        self.loss = loss
        self.result: Any = None
        self.died_at: int | None = None
        self.begin()
        if kill_at is not None:
            self.worker.after(kill_at, self.strike)

    def begin(self) -> None:
        """A worker process on the machine's disk."""
        self.worker = self.world.process(f"worker-{len(self.world.processes)}")
        self.worker.run(self.serve(self.worker))

    def strike(self) -> None:
        """Kill it; the next one finds what it left."""
        self.worker.kill()
        self.died_at = self.worker.callbacks
        self.disk.lose(self.loss, self.worker)
        self.world.at(self.world.now + 10.0, self.begin)

    async def serve(self, process: Process) -> None:
        programs.observer.set(lambda info: self.rules.began(info.workflow_id, info.run, info.number, info.attempt))
        log = SimLog(self.cluster, process, "sim")
        host = SimHost(process, self.disk)
        limits = Limits(trim_records_min=4, trim_seconds=1.0, live_runs_max=1)
        worker = Worker(programs.app, log, host=host, limits=limits, queues=[programs.QUEUE])
        self.world.at_close.append(partial(unwatch, worker.gauges))
        await worker.start()
        await worker.wait()

    async def drive(self, process: Process) -> None:
        surroundings = Surroundings(self.world.chance, process.clock.now_ms)
        async with Client(SimLog(self.cluster, process, "sim"), programs.app, surroundings=surroundings) as client:
            handle = await client.start(programs.play, PROGRAM, id="run")
            for name, value in programs.signals(PROGRAM):
                await handle.signal(name, value)
            self.result = await handle.result()

    def play(self) -> int:
        """Let it happen; how many callbacks the first worker ran."""
        driver = self.world.process("driver")
        done = driver.run(self.drive(driver))
        self.world.run(done.done, seconds=86_400.0, steps=50_000)
        done.result()
        callbacks = self.worker.callbacks
        settled_at = self.world.now + 60.0
        self.world.at(settled_at, lambda: None)
        self.world.run(lambda: self.world.now >= settled_at, seconds=86_400.0, steps=50_000)
        self.rules.projections()
        self.world.close()
        return callbacks


@pytest.mark.parametrize("loss", [Loss.NOTHING, Loss.UNFLUSHED])
@pytest.mark.parametrize("first", range(STEP))
def test_a_worker_may_die_at_any_await(first: int, loss: Loss):
    with quietly():
        callbacks = Story(None, loss).play()
        assert callbacks > 100
        for kill_at in range(first, callbacks, STEP):
            story = Story(kill_at, loss)
            story.play()
            assert story.died_at == max(kill_at, 1)
            assert programs.allows(PROGRAM, story.result), (kill_at, story.result)
