"""Two processes and a log between them, as the tests of the simulated log use them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from streamflow.errors import StreamflowError
from streamflow.logs.base import HISTORY
from streamflow.sim.cluster import Cluster, Weather
from streamflow.sim.log import SimLog
from streamflow.sim.world import Process, World
from tests.logs.support import Assigned, eventually

CALM = Weather(partial=0.0)


class Stage:
    """A cluster with processes `a` and `b`; a test runs in `a`, and may use the log of either."""

    def __init__(self, partitions: int = 2, seed: int = 1) -> None:
        self.world = World(seed)
        self.cluster = Cluster(self.world, partitions=partitions)
        self.world.leap_to = lambda: None
        self.cluster.weather = CALM
        self.a, self.b = self.world.process("a"), self.world.process("b")

    @property
    def marks(self) -> dict[str, int]:
        return self.world.marks

    def log(self, process: Process | None = None) -> SimLog:
        return SimLog(self.cluster, process or self.a, "shop")

    def play(self, test: Callable[[], Awaitable[None]]) -> None:
        """Run the test in process `a`, on the world's time."""
        try:
            self.let(self.a, test)
        finally:
            self.world.close()

    def let(self, process: Process, do: Callable[[], Awaitable[Any]]) -> Any:
        task = process.run(_awaited(do))
        self.world.run(task.done, seconds=1_000.0, steps=100_000)
        return task.result()

    async def elsewhere(self, do: Callable[[], Awaitable[Any]]) -> Any:
        """What process `b` finds, for a test in `a`."""
        task = self.b.run(_awaited(do))
        await eventually(task.done)
        return task.result()

    def landed(self, topic: str = HISTORY, partition: int = 0) -> list[bytes | None]:
        return [record.value for record in self.cluster.stream(topic, partition).records]

    async def pass_by(self, seconds: float) -> None:
        await asyncio.sleep(seconds)  # tidy: of the world's own time


async def _awaited(do: Callable[[], Awaitable[Any]]) -> Any:
    return await do()


def weather(**rates: float) -> Weather:
    """Calm, but for these."""
    found = Weather(partial=0.0)
    for name, rate in rates.items():
        assert hasattr(found, name), name
        setattr(found, name, rate)
    return found


async def assigned(log: SimLog, owner: str) -> Assigned:
    """A member, and what it believes to be its own."""
    return Assigned(await log.join(owner))


def append(log: SimLog, expected: int, *values: bytes, partition: int = 0) -> asyncio.Future[int]:
    return log.append(partition, expected, [(b"k", value) for value in values])


async def failure(future: Awaitable[Any]) -> StreamflowError:
    with pytest.raises(StreamflowError) as raised:
        await future
    return raised.value
