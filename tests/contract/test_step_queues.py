"""What every log promises of the groups of step queues (streamflow/logs/base.py), run against each adapter."""

from __future__ import annotations

import asyncio

import pytest

from streamflow.errors import InvalidArguments
from streamflow.logs.base import Outgoing
from tests.logs.support import Assigned, Place, on_loop


@on_loop
async def test_a_queue_has_a_group_of_its_own(place: Place) -> None:
    log, other = await place.open(), await place.open()
    owner = Assigned(await log.join("one"))
    gpu = await log.join_queue("gpu", "one")
    first = Assigned(gpu)
    second = Assigned(await other.join_queue("cpu", "one"))
    for member in (owner, first, second):
        await member.becomes(0, 1, 2, 3)
    newcomer = Assigned(await other.join_queue("gpu", "two"))
    await first.has(2)
    given = frozenset(range(4)) - (first.now or frozenset())
    for partition in given:
        await gpu.release(partition)
    await newcomer.becomes(*given)
    await gpu.leave()
    await newcomer.becomes(0, 1, 2, 3)
    assert owner.now == second.now == frozenset(range(4))


@on_loop
async def test_a_name_is_taken_in_its_queue_alone(place: Place) -> None:
    if not place.knows_names:
        return  # names are unique by construction; a coordinator knows its members by ids of its own
    log, other = await place.open(), await place.open()
    await log.join_queue("gpu", "one")
    with pytest.raises(InvalidArguments, match="running already"):
        await other.join_queue("gpu", "one")
    await other.join_queue("cpu", "one")


@on_loop
async def test_what_a_queue_is_done_with_is_kept_for_its_group_and_never_goes_back(place: Place) -> None:
    log, other = await place.open(), await place.open()
    gpu, cpu = await log.join_queue("gpu", "one"), await log.join_queue("cpu", "one")
    assert [await gpu.committed(partition) for partition in range(4)] == [0] * 4
    await Assigned(gpu).becomes(0, 1, 2, 3)
    await gpu.commit(2, 5)
    await gpu.commit(2, 3)
    assert (await gpu.committed(2), await gpu.committed(1), await cpu.committed(2)) == (5, 0, 0)
    await gpu.leave()
    successor = await other.join_queue("gpu", "two")
    await Assigned(successor).becomes(0, 1, 2, 3)
    assert await successor.committed(2) == 5
    await successor.commit(2, 7)
    assert (await successor.committed(2), await log.published_offset(2)) == (7, 0)


@on_loop
async def test_a_queue_of_another_app_is_another_queue(place: Place) -> None:
    shop, billing = await place.open("shop"), await place.open("billing")
    one, two = await shop.join_queue("gpu", "one"), await billing.join_queue("gpu", "one")
    await shop.publish([Outgoing("steps.gpu", 0, b"k", b"task")])
    await Assigned(one).becomes(0, 1, 2, 3)
    await one.commit(0, 1)
    assert await two.committed(0) == 0
    assert await billing.read("steps.gpu", 0, 0) == []


@pytest.mark.parametrize("queue", ["", "GPU", "a b", "é", "x" * 65])
@on_loop
async def test_a_queue_must_be_able_to_name_a_topic(place: Place, queue: str) -> None:
    log = await place.open()
    with pytest.raises(InvalidArguments, match="queue must match"):
        await log.join_queue(queue, "one")
    with pytest.raises(InvalidArguments, match="queue must match"):
        await log.read(f"steps.{queue}", 0, 0)


@on_loop
async def test_nothing_overtakes_a_publish_to_a_queue_that_is_new(place: Place) -> None:
    log = await place.open()
    records = [Outgoing("steps.new", 0, b"k", b"task"), Outgoing("status", 0, b"k", b"1")]
    ended: list[int] = []
    publishes = [
        log.publish(records, published=(0, 1)),
        log.publish([Outgoing("status", 0, b"k", b"2")], published=(0, 2)),
        log.publish([Outgoing("steps.newer", 0, b"k", b"task")], published=(0, 3)),
        log.publish([Outgoing("status", 0, b"k", b"3")], published=(0, 4)),
    ]
    for number, publish in enumerate(publishes):
        publish.add_done_callback(lambda _, number=number: ended.append(number))  # type: ignore[misc]
    await asyncio.gather(*publishes)
    assert ended == [0, 1, 2, 3]
    assert [record.value for record in await place.read(log, "status", 0, 0)][-1] == b"3"
    assert len(await log.read("steps.new", 0, 0)) == len(await log.read("steps.newer", 0, 0)) == 1
    assert await log.published_offset(0) == 4
