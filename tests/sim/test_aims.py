"""Faults that wait for the write that they are meant for."""

from __future__ import annotations

from streamflow.errors import StreamflowError, Unavailable
from streamflow.sim.cluster import Aim
from streamflow.sim.lane import PART_BYTES_MIN
from tests.sim.stage import Stage, append, failure


def test_a_torn_write_that_was_waited_for_is_cut_between_the_parts_of_a_turn():
    stage, part = Stage(), bytes(PART_BYTES_MIN)

    async def test() -> None:
        log = stage.log()
        hits: list[str] = []
        stage.cluster.aims.append(Aim("torn", hit=lambda: hits.append("torn")))
        assert await append(log, 0, b"a", b"b", b"c") == 0  # they are turns, each whole
        assert await log.append(0, 3, [(b"k", part), (b"l", part)]) == 3  # of two runs
        future = append(log, 5, b"d", part, b"f")
        assert hits == ["torn"] and not stage.cluster.aims
        assert isinstance(await failure(future), Unavailable)
        assert stage.landed()[5:] == [b"d", part]

    stage.play(test)
    assert stage.marks["write aimed at"] == stage.marks["write torn"] == 1


def test_a_headless_write_that_was_waited_for_leaves_two_records():
    stage = Stage()

    async def test() -> None:
        stage.cluster.aims.append(Aim("headless", stage.b))
        assert await append(stage.log(), 0, b"a", b"b", b"c") == 0  # of another process

        async def send() -> None:
            log = stage.log(stage.b)
            assert await append(log, 3, b"d", b"e") == 3
            future = append(log, 5, b"f", b"g", b"h")
            assert not stage.cluster.aims
            assert isinstance(await failure(future), StreamflowError)

        await stage.elsewhere(send)
        assert stage.landed()[5:] == [b"g", b"h"]

    stage.play(test)
    assert stage.marks["write aimed at"] == stage.marks["write headless"] == 1
