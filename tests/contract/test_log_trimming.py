"""What every log promises about trimming (streamflow/logs/base.py), run against each adapter as test_log.py is."""

from __future__ import annotations

import asyncio

import pytest

from streamflow.errors import Fenced, InvalidArguments
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, HISTORY, REPLIES, STATUS, TIMERS, Outgoing, Record
from tests.contract.test_log import numbered, values
from tests.logs.support import Place, on_loop, take


@pytest.mark.parametrize("topic", [HISTORY, COMMANDS, REPLIES, DEAD_LETTERS, "steps.gpu"])
@on_loop
async def test_what_is_trimmed_is_gone_for_every_reader_and_its_offsets_never_come_again(
    place: Place, topic: str
) -> None:
    log, other = await place.open(), await place.open()

    async def write(count: int, start: int) -> None:
        if topic == HISTORY:
            await log.append(1, start, numbered(count, start))
        else:
            await log.publish([Outgoing(topic, 1, *pair) for pair in numbered(count, start)])

    await write(10, 0)
    await log.publish([Outgoing(COMMANDS, 2, b"k", b"of another partition")])
    assert await log.trim(topic, 1, 7) == 7
    for reader in (log, other):
        assert [record.offset for record in await place.read(reader, topic, 1, 0)] == [7, 8, 9]
        assert [record.offset for record in await place.read(reader, topic, 1, 8)] == [8, 9]
        assert await reader.start_offset(topic, 1) == 7 and await reader.end_offset(topic, 1) == 10
        assert (await take(reader.follow(topic, 1, 3), 3))[0].offset == 7
    await write(1, 10)
    assert (await other.read(topic, 1, 10))[0] == Record(10, *numbered(1, 10)[0])
    assert len(await log.read(COMMANDS, 2, 0)) == 1


@on_loop
async def test_the_start_never_goes_back_nor_beyond_the_end(place: Place) -> None:
    log = await place.open()
    await log.append(0, 0, numbered(5))
    for before, start in ((-1, 0), (0, 0), (3, 3), (3, 3), (1, 3), (99, 5), (2, 5)):
        assert await log.trim(HISTORY, 0, before) == start == await log.start_offset(HISTORY, 0)
    assert await log.read(HISTORY, 0, 0) == [] and await log.end_offset(HISTORY, 0) == 5
    assert await log.append(0, 5, numbered(1, 5)) == 5
    assert await values(log, HISTORY, 0) == [b"turn-5"]


@on_loop
async def test_a_trim_of_thousands_goes_on_beside_appends(place: Place) -> None:
    log = await place.open()
    await log.append(0, 0, numbered(5_000))
    trimmed = asyncio.ensure_future(log.trim(HISTORY, 0, 4_990))
    for offset in range(5_000, 5_010):
        assert await log.append(0, offset, numbered(1, offset)) == offset
    assert await trimmed == 4_990
    assert [record.offset for record in await place.read(log, HISTORY, 0, 0)] == list(range(4_990, 5_010))


@on_loop
async def test_who_follows_goes_on_at_the_start_when_the_part_ahead_is_trimmed(place: Place) -> None:
    log, other = await place.open(), await place.open()
    await log.append(0, 0, numbered(10))
    batches = other.follow(HISTORY, 0, 0, limit=2)
    seen = [record.offset for record in await anext(batches)]
    assert seen == [0, 1] or not place.reads_whole
    await log.trim(HISTORY, 0, 8)
    while seen[-1] < 9:
        seen += [record.offset for record in await anext(batches)]
    before = seen[: seen.index(8)]  # what it has fetched before is its own
    assert seen == [*range(len(before)), 8, 9]
    await batches.aclose()  # type: ignore[attr-defined]
    await log.trim(HISTORY, 0, 10)
    waiting = asyncio.ensure_future(take(other.follow(HISTORY, 0, 0), 1))
    await log.append(0, 10, numbered(1, 10))
    assert [record.offset for record in await waiting] == [10]


@on_loop
async def test_trimming_leaves_the_fence_and_what_is_published_alone(place: Place) -> None:
    log, other = await place.open(), await place.open()
    await log.append(0, 0, numbered(4))
    await log.publish([], published=(0, 3))
    await other.append(0, 4, numbered(1, 4))
    lost = log.append(0, 4, numbered(1, 4))
    with pytest.raises(Fenced):
        await lost
    await log.trim(HISTORY, 0, 2)
    assert await log.start_offset(HISTORY, 0) == 2
    with pytest.raises(Fenced):  # where the lost one would have ended: nobody has looked at the end since
        await log.append(0, 5, numbered(1, 5))
    assert await log.published_offset(0) == 3


@on_loop
async def test_how_old_records_are_is_never_overstated(place: Place) -> None:
    log = await place.open()
    ages_ago, in_a_while = 1_000, 1 << 60
    assert await log.offset_at(COMMANDS, 0, in_a_while) == 0 == await log.offset_at("steps.gpu", 0, in_a_while)
    await log.publish([Outgoing(COMMANDS, 0, b"k", b"v")] * 3)
    assert await log.offset_at(COMMANDS, 0, in_a_while) == 3
    await log.publish([Outgoing(COMMANDS, 0, b"k", b"v")] * 2)
    assert await log.offset_at(COMMANDS, 0, ages_ago) == 0
    await log.trim(COMMANDS, 0, 1)
    assert await log.offset_at(COMMANDS, 0, ages_ago) == 1
    assert await log.offset_at(COMMANDS, 0, in_a_while) == 5
    await log.trim(COMMANDS, 0, 5)
    assert await log.offset_at(COMMANDS, 0, in_a_while) == 5 == await log.offset_at(COMMANDS, 0, ages_ago)
    assert await log.offset_at(COMMANDS, 1, in_a_while) == 0


@on_loop
async def test_what_is_not_trimmed_is_named(place: Place) -> None:
    log = await place.open()
    for topic in (STATUS, TIMERS):
        with pytest.raises(InvalidArguments, match=f"topic {topic} keeps the newest record of each key"):
            await log.trim(topic, 0, 1)
    with pytest.raises(InvalidArguments, match="partition must be 0 to 3, found 9"):
        await log.trim(HISTORY, 9, 1)
    assert await log.trim("steps.new", 0, 5) == 0
