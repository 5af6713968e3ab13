"""Faults that wait for the write that they are meant for."""

from __future__ import annotations

from streamflow.errors import StreamflowError, Unavailable
from streamflow.logs.base import COMMANDS, HISTORY
from streamflow.sim.cluster import Aim, Ambush
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


def test_a_process_that_was_waited_for_is_met_when_the_brokers_have_trimmed_and_before_it_hears_of_it():
    stage = Stage()
    met: list[str] = []
    heard: list[int] = []

    async def test() -> None:
        stage.cluster.ambushes.append(Ambush("the history was trimmed", lambda process: met.append(process.name)))
        log = stage.log()
        assert await append(log, 0, b"a", b"b") == 0
        stage.cluster.trimmed.append(lambda topic, partition, start: heard.append(len(met)))
        assert await log.trim(COMMANDS, 0, 1) == 0
        assert met == []
        assert await log.trim(HISTORY, 0, 1) == 1
        assert met == ["a"] and not stage.cluster.ambushes
        assert await log.trim(HISTORY, 0, 2) == 2
        assert met == ["a"]

    stage.play(test)
    assert heard == [0, 0, 1]
