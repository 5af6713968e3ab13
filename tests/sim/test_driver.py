"""What the driver takes for an answer."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from streamflow.client.handle import Handle
from streamflow.sim import driver
from streamflow.sim.cluster import TWO_BELIEVE, Cluster
from streamflow.sim.driver import Driver
from streamflow.sim.rules import Rules, Violated
from streamflow.sim.world import World


class Refusing(Handle[Any]):
    """A closed run of which some owners say that it is open still."""

    def __init__(self, refusals: int) -> None:
        self._id = "run-0"
        self._refusals = refusals

    async def cleanup(self, force: bool = False) -> bool:
        self._refusals -= 1
        return self._refusals < 0


@pytest.mark.parametrize("replaced", [True, False])
def test_a_closed_run_is_refused_its_clean_up_by_an_owner_that_was_replaced_alone(
    replaced: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(driver, "ASKED_AGAIN_SECONDS", 0)
    world = World(1)
    cluster = Cluster(world, partitions=1)
    rules = Rules(cluster)
    if replaced:
        world.marks[TWO_BELIEVE] += 1
    asked = Driver(cluster, world.process("clients"), rules, random.Random(1))._clean_up(Refusing(2))
    try:
        if replaced:
            asyncio.run(asked)
            assert (world.marks["refused by an owner that was replaced"], world.marks["run cleaned up"]) == (2, 1)
        else:
            with pytest.raises(Violated, match="run run-0 is closed and was not cleaned up"):
                asyncio.run(asked)
    finally:
        world.close()
