"""What every log promises (streamflow/logs/base.py), run against each adapter. Step queues: test_step_queues.py."""

from __future__ import annotations

import asyncio

import pytest

from streamflow.errors import Fenced, InvalidArguments, PayloadTooLarge, Unavailable
from streamflow.logs.base import COMMANDS, HISTORY, REPLIES, STATUS, TIMERS, Log, Outgoing, Record
from tests.logs.support import Assigned, KafkaPlace, Place, eventually, on_loop, take


def numbered(count: int, start: int = 0) -> list[tuple[bytes, bytes]]:
    return [(b"run-%d" % (n % 3), b"turn-%d" % n) for n in range(start, start + count)]


async def values(log: Log, topic: str, partition: int, offset: int = 0) -> list[bytes | None]:
    found: list[bytes | None] = []
    while batch := await log.read(topic, partition, offset):
        found += [record.value for record in batch]
        offset = batch[-1].offset + 1
    return found


# ------------------------------------------------------------------------------------------------ order and offsets


@on_loop
async def test_new_log_is_empty(place: Place) -> None:
    log = await place.open()
    assert (log.app, log.url, log.partitions) == (place.app("shop"), place.url, 4)
    assert await log.read(HISTORY, 3, 0) == []
    assert await log.start_offset(HISTORY, 3) == await log.end_offset(HISTORY, 3) == 0
    assert await log.published_offset(3) == 0


@on_loop
async def test_records_come_back_in_order_with_consecutive_offsets(place: Place) -> None:
    log = await place.open()
    assert await log.append(0, 0, numbered(3)) == 0
    assert await log.append(0, 3, numbered(2, 3)) == 3
    assert await place.read(log, HISTORY, 0, 0) == [Record(n, *pair) for n, pair in enumerate(numbered(5))]
    assert await log.end_offset(HISTORY, 0) == 5
    assert await log.read(HISTORY, 1, 0) == []


@on_loop
async def test_read_starts_at_the_offset_and_stops_at_the_limit(place: Place) -> None:
    log = await place.open()
    await log.append(2, 0, numbered(10))
    assert [record.offset for record in await place.read(log, HISTORY, 2, 4, limit=3)] == [4, 5, 6]
    assert [record.offset for record in await log.read(HISTORY, 2, 9)] == [9]
    assert await log.read(HISTORY, 2, 10) == []


@on_loop
async def test_large_batch_of_large_records_is_read_in_parts_without_loss(place: Place) -> None:
    log = await place.open()
    records = [(b"k", bytes([n]) * 900_000) for n in range(12)]
    await log.append(0, 0, records)
    found: list[Record] = []
    while batch := await log.read(HISTORY, 0, len(found)):
        found += batch
    assert [(record.key, record.value) for record in found] == records


@on_loop
async def test_thousands_of_records_in_one_append_are_all_or_nothing(place: Place) -> None:
    log = await place.open()
    await log.append(0, 0, numbered(3_000))
    assert await log.end_offset(HISTORY, 0) == 3_000
    assert len(await place.read(log, HISTORY, 0, 0, limit=5_000)) == 3_000
    with pytest.raises(Fenced):
        await log.append(0, 1, numbered(3_000))
    if place.refuses_without_trace:
        assert await log.end_offset(HISTORY, 0) == 3_000


@on_loop
async def test_empty_keys_and_values_survive(place: Place) -> None:
    log = await place.open()
    await log.append(0, 0, [(b"", b"")])
    await log.publish([Outgoing(COMMANDS, 0, b"", b"")])
    assert await log.read(HISTORY, 0, 0) == [Record(0, b"", b"")] == await log.read(COMMANDS, 0, 0)


@on_loop
async def test_caller_may_reuse_its_lists_at_once(place: Place) -> None:
    log = await place.open()
    records, outgoing = numbered(1), [Outgoing(COMMANDS, 0, b"k", b"v"), Outgoing("steps.gpu", 0, b"k", b"v")]
    appended, published = log.append(0, 0, records), log.publish(outgoing)
    records.clear()
    outgoing.clear()
    await appended
    await published
    assert await values(log, HISTORY, 0) == [b"turn-0"]
    assert await values(log, COMMANDS, 0) == await values(log, "steps.gpu", 0) == [b"v"]


@on_loop
async def test_a_second_handle_sees_the_same_log(place: Place) -> None:
    one, two = await place.open(), await place.open(create=False)
    assert one.identity == two.identity
    await one.append(0, 0, numbered(1))
    assert await values(two, HISTORY, 0) == [b"turn-0"]
    assert await two.append(0, 1, numbered(1, 1)) == 1
    assert await values(one, HISTORY, 0, 1) == [b"turn-1"]


@on_loop
async def test_apps_in_one_log_do_not_see_each_other(place: Place) -> None:
    shop, billing = await place.open("shop"), await place.open("billing", partitions=2)
    assert shop.identity != billing.identity
    await shop.append(0, 0, numbered(1))
    await shop.publish([Outgoing(STATUS, 0, b"k", b"shop")], published=(0, 1))
    assert await billing.read(HISTORY, 0, 0) == await billing.read(STATUS, 0, 0) == []
    assert await billing.published_offset(0) == 0
    assert (shop.partitions, billing.partitions) == (4, 2)


# ------------------------------------------------------------------------------------------------------- the fence


@pytest.mark.parametrize("expected", [0, 1, 3, 99])
@on_loop
async def test_append_at_another_offset_than_the_end_is_fenced(place: Place, expected: int) -> None:
    log = await place.open()
    await log.append(0, 0, numbered(2))
    with pytest.raises(Fenced, match=rf"history\[0\] was expected to end at offset {expected}, it ends at 2"):
        await log.append(0, expected, numbered(1))
    # Where there is no conditional append, what is fenced is in the log and does not count (core/reading.py).
    assert await log.end_offset(HISTORY, 0) == (2 if place.refuses_without_trace else 3)


@on_loop
async def test_of_two_writers_exactly_one_wins_each_offset(place: Place) -> None:
    one, two = await place.open(), await place.open()
    for _ in range(20):
        offset = await one.end_offset(HISTORY, 0)
        assert offset == await two.end_offset(HISTORY, 0)
        outcomes = await asyncio.gather(
            one.append(0, offset, [(b"k", b"one")]), two.append(0, offset, [(b"k", b"two")]), return_exceptions=True
        )
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Fenced", "int"]
        winner = b"one" if outcomes[0] == offset else b"two"
        assert (await one.read(HISTORY, 0, offset))[0] == Record(offset, b"k", winner)
    assert await one.end_offset(HISTORY, 0) == (20 if place.refuses_without_trace else 40)


@on_loop
async def test_pipelined_appends_are_acknowledged_in_call_order(place: Place) -> None:
    log = await place.open()
    order: list[int] = []
    futures = [log.append(0, n, numbered(1, n)) for n in range(300)]
    for future in futures:
        future.add_done_callback(lambda done: order.append(done.result()))
    assert not any(future.done() for future in futures), "an acknowledgement comes later, never inside the call"
    assert await asyncio.gather(*futures) == list(range(300))
    assert order == list(range(300))


@on_loop
async def test_what_builds_on_a_failed_append_fails_too_even_where_the_foreign_record_took_its_place(
    place: Place,
) -> None:
    log, other = await place.open(), await place.open()
    await other.append(0, 0, [(b"k", b"foreign")])
    lost = [log.append(0, n, numbered(1, n)) for n in range(3)]  # the second expects 1, which the end is
    outcomes = await asyncio.gather(*lost, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Fenced, Fenced, Fenced]
    with pytest.raises(Fenced, match="builds on one that failed"):
        await log.append(0, 3, numbered(1))
    assert (await values(log, HISTORY, 0))[: 1 if place.refuses_without_trace else None] == (
        [b"foreign"] if place.refuses_without_trace else [b"foreign", b"turn-0"]
    )
    end = await log.end_offset(HISTORY, 0)
    assert end == (1 if place.refuses_without_trace else 2)
    assert await log.append(0, end, numbered(1)) == end, "having read again, the caller may go on"


@on_loop
async def test_after_reading_again_an_append_may_land_where_the_failed_one_would_have_ended(place: Place) -> None:
    log, other = await place.open(), await place.open()
    await other.append(0, 0, [(b"k", b"foreign")])
    with pytest.raises(Fenced):
        await log.append(0, 0, numbered(1))
    end = await log.end_offset(HISTORY, 0)
    assert end == (1 if place.refuses_without_trace else 2)
    assert await log.append(0, end, numbered(1)) == end


@on_loop
async def test_a_fenced_append_leaves_others_in_its_group_alone(place: Place) -> None:
    log, other = await place.open(), await place.open()
    await other.append(1, 0, [(b"k", b"foreign")])
    good = [log.append(0, 0, numbered(2)), log.append(2, 0, numbered(1)), log.append(0, 2, numbered(1))]
    published = log.publish([Outgoing(STATUS, 1, b"k", b"v")])
    with pytest.raises(Fenced):
        await log.append(1, 0, numbered(1))
    assert await asyncio.gather(*good) == [0, 0, 2]
    await published
    assert await values(log, STATUS, 1) == [b"v"]


# ------------------------------------------------------------------------------------------------------- publishing


@on_loop
async def test_publish_keeps_order_per_partition_and_moves_the_published_offset(place: Place) -> None:
    log = await place.open()
    await log.publish([Outgoing(COMMANDS, n % 2, b"k", b"c%d" % n) for n in range(6)], published=(1, 7))
    await log.publish([Outgoing(COMMANDS, 0, b"k", b"c6"), Outgoing(REPLIES, 0, b"k", b"r")])
    assert await values(log, COMMANDS, 0) == [b"c0", b"c2", b"c4", b"c6"]
    assert await values(log, COMMANDS, 1) == [b"c1", b"c3", b"c5"]
    assert await values(log, REPLIES, 0) == [b"r"]
    assert [await log.published_offset(partition) for partition in range(3)] == [0, 7, 0]


@on_loop
async def test_published_offset_never_goes_back_and_needs_no_records(place: Place) -> None:
    log = await place.open()
    await log.publish([], published=(0, 9))
    await log.publish([], published=(0, 4))
    await log.publish([])
    assert await log.published_offset(0) == 9


@on_loop
async def test_compacted_topics_keep_the_newest_record_of_each_key_and_its_offset(place: Place) -> None:
    log = await place.open()
    for n in range(5):
        await log.publish([Outgoing(TIMERS, 0, b"a", b"a%d" % n), Outgoing(TIMERS, 0, b"b%d" % n, b"b")])
    kept = {record.key: record for record in await place.read(log, TIMERS, 0, 0)}
    assert kept[b"a"] == Record(8, b"a", b"a4")
    assert await log.end_offset(TIMERS, 0) == 10
    offsets = [record.offset for record in await place.read(log, TIMERS, 0, 0)]
    assert offsets == sorted(offsets) and len(offsets) >= 6
    assert await place.read(log, TIMERS, 0, 8) == [Record(8, b"a", b"a4"), Record(9, b"b4", b"b")]


@on_loop
async def test_keys_are_compacted_per_partition(place: Place) -> None:
    log = await place.open()
    await log.publish(
        [Outgoing(STATUS, 0, b"a", b"0"), Outgoing(STATUS, 1, b"a", b"1"), Outgoing(TIMERS, 0, b"a", b"2")]
    )
    assert [await values(log, STATUS, 0), await values(log, STATUS, 1)] == [[b"0"], [b"1"]]
    assert await values(log, TIMERS, 0) == [b"2"]


@on_loop
async def test_tombstones_are_seen_by_who_follows(place: Place) -> None:
    log = await place.open()
    await log.publish([Outgoing(STATUS, 0, b"a", b"live")])
    await log.publish([Outgoing(STATUS, 0, b"a", None)])
    assert (await log.read(STATUS, 0, 1)) == [Record(1, b"a", None)]
    await log.publish([Outgoing(STATUS, 0, b"a", b"again")])
    assert (await place.read(log, STATUS, 0, 1))[-1] == Record(2, b"a", b"again")


@on_loop
async def test_step_queues_come_into_being_when_used(place: Place) -> None:
    log, other = await place.open(), await place.open()
    assert await other.read("steps.gpu", 2, 0) == []
    assert await other.end_offset("steps.gpu", 2) == 0
    follower = asyncio.create_task(take(other.follow("steps.cpu", 1, 0), 1))
    await log.publish([Outgoing(COMMANDS, 0, b"k", b"c"), Outgoing("steps.gpu", 2, b"k", b"s")])
    assert await values(other, "steps.gpu", 2) == [b"s"]
    await log.publish([Outgoing("steps.cpu", 1, b"k", b"t")])
    assert await follower == [Record(0, b"k", b"t")]


# -------------------------------------------------------------------------------------------------------- following


@on_loop
async def test_follow_reads_from_the_offset_then_waits(place: Place) -> None:
    log = await place.open()
    await log.append(0, 0, numbered(3))
    batches = log.follow(HISTORY, 0, 1)
    found = await anext(batches)
    while not place.reads_whole and len(found) < 2:
        found += await anext(batches)
    assert found == [Record(n, *numbered(3)[n]) for n in (1, 2)]
    waiting = asyncio.ensure_future(anext(batches))
    await asyncio.wait([waiting], timeout=0.05)
    assert not waiting.done()
    await log.append(0, 3, numbered(1, 3))
    assert [record.offset for record in await waiting] == [3]
    await batches.aclose()  # type: ignore[attr-defined]


@on_loop
async def test_follow_gives_batches_of_the_limit(place: Place) -> None:
    log = await place.open()
    await log.append(0, 0, numbered(5))
    batches = log.follow(HISTORY, 0, 0, limit=2)
    sizes = [len(await anext(batches))]
    while sum(sizes) < 5:
        sizes.append(len(await anext(batches)))
    assert sizes == [2, 2, 1] if place.reads_whole else max(sizes) <= 2
    await batches.aclose()  # type: ignore[attr-defined]


@on_loop
async def test_follow_sees_what_another_handle_writes(place: Place) -> None:
    log, other = await place.open(), await place.open()
    follower = asyncio.create_task(take(other.follow(COMMANDS, 3, 0), 50))
    for n in range(50):
        await log.publish([Outgoing(COMMANDS, 3, b"k", b"%d" % n), Outgoing(COMMANDS, 2, b"k", b"no")])
    assert [record.value for record in await follower] == [b"%d" % n for n in range(50)]


@on_loop
async def test_many_followers_of_one_topic_each_get_everything(place: Place) -> None:
    log, other = await place.open(), await place.open()
    followers = [
        asyncio.create_task(take(handle.follow(COMMANDS, 0, start), 40 - start))
        for handle in (log, other)
        for start in (0, 7)
        for _ in range(50)
    ]
    for n in range(40):
        await log.publish([Outgoing(COMMANDS, 0, b"k", b"%d" % n)])
    for records in await asyncio.gather(*followers):
        assert [record.offset for record in records] == list(range(records[0].offset, 40))


@on_loop
async def test_batches_given_to_followers_are_their_own(place: Place) -> None:
    log = await place.open()
    await log.publish([Outgoing(COMMANDS, 0, b"k", b"v")])
    one, two = log.follow(COMMANDS, 0, 0), log.follow(COMMANDS, 0, 0)
    (await anext(one)).clear()
    assert await anext(two) == [Record(0, b"k", b"v")]
    for batches in (one, two):
        await batches.aclose()  # type: ignore[attr-defined]


async def waiting_followers(log: Log, count: int) -> list[asyncio.Task[list[Record]]]:
    """Each is known to follow: it has taken what there was, and waits for one more record."""
    await log.publish([Outgoing(COMMANDS, 0, b"k", b"first")])
    following = [log.follow(COMMANDS, 0, 0) for _ in range(count)]
    for batches in following:
        assert await anext(batches) == [Record(0, b"k", b"first")]
    waiting = [asyncio.create_task(take(batches, 1)) for batches in following]
    await asyncio.sleep(0)  # now they wait
    return waiting


@on_loop
async def test_a_cancelled_follower_disturbs_nobody(place: Place) -> None:
    log = await place.open()
    lasting, cancelled = await waiting_followers(log, 2)
    cancelled.cancel()
    await log.publish([Outgoing(COMMANDS, 0, b"k", b"v")])
    assert await lasting == [Record(1, b"k", b"v")]
    with pytest.raises(asyncio.CancelledError):
        await cancelled


# ------------------------------------------------------------------------------------------------------- membership


@on_loop
async def test_the_only_member_gets_everything(place: Place) -> None:
    log = await place.open()
    member = Assigned(await log.join("one"))
    await member.becomes(0, 1, 2, 3)


@on_loop
async def test_a_newcomer_gets_its_share_only_after_release(place: Place) -> None:
    log, other = await place.open(), await place.open()
    first = await log.join("one")
    one = Assigned(first)
    await one.becomes(0, 1, 2, 3)
    two = Assigned(await other.join("two"))
    await one.has(2)
    assert one.now is not None
    given, kept = sorted(frozenset(range(4)) - one.now), one.now
    await eventually_set(two)
    assert two.now == frozenset(), "not before the first has stopped them"
    await first.release(given[1])
    await first.release(given[0])
    await first.release(given[0])
    await two.becomes(*given)
    assert one.now == kept


async def eventually_set(member: Assigned) -> None:
    """The member has seen an assignment, maybe of nothing."""
    if member.now is None:
        await member.has(0)


@on_loop
async def test_what_a_leaver_had_goes_to_the_others_at_once(place: Place) -> None:
    log, other = await place.open(), await place.open()
    leaver = await log.join("one")
    left = Assigned(leaver)
    await left.becomes(0, 1, 2, 3)
    two = Assigned(await other.join("two"))
    await left.has(2)
    for partition in frozenset(range(4)) - (left.now or frozenset()):
        await leaver.release(partition)
    await two.has(2)
    await leaver.leave()
    await leaver.leave()
    await leaver.release(0)
    await two.becomes(0, 1, 2, 3)
    await left.ended()


@on_loop
async def test_a_handle_that_closes_leaves(place: Place) -> None:
    log, other = await place.open(), await place.open()
    await log.join("one")
    two = Assigned(await other.join("two"))
    await log.close()
    await two.becomes(0, 1, 2, 3)


@on_loop
async def test_shares_differ_by_one_at_most_with_any_number_of_members(place: Place) -> None:
    handles = [await place.open(partitions=7) for _ in range(3)]
    joined = [await handle.join(f"worker-{n}") for n, handle in enumerate(handles)]
    members = [Assigned(membership) for membership in joined]
    for membership in joined:
        # All that a member gives up it has stopped already, so that the group can settle.
        for partition in range(7):
            await membership.release(partition)
    while sorted(len(member.now or ()) for member in members) != [2, 2, 3]:
        await asyncio.sleep(0.002)  # tidy: the poll of a fact that the group makes true
        for membership, member in zip(joined, members, strict=True):
            for partition in frozenset(range(7)) - (member.now or frozenset()):
                await membership.release(partition)
    held = [partition for member in members for partition in member.now or ()]
    assert sorted(held) == list(range(7))


@on_loop
async def test_a_partition_taken_away_and_given_back_is_shown_twice(place: Place) -> None:
    log, other = await place.open(), await place.open()
    first = await log.join("one")
    one = Assigned(first)
    await one.becomes(0, 1, 2, 3)
    second = await other.join("two")
    await one.has(2)
    kept = one.now
    assert kept is not None
    await second.leave()
    still_stopping = "the others come back only after release: the member is still stopping them"
    assert one.now == kept, still_stopping
    stopped, last = frozenset(range(4)) - kept
    await first.release(stopped)
    if not isinstance(place, KafkaPlace):  # whose group waits for both, and gives back both
        await eventually(lambda: stopped in (one.now or ()))  # so it knows that the other member has left
    assert last not in (one.now or ()), still_stopping
    await first.release(last)
    await one.becomes(0, 1, 2, 3)


@on_loop
async def test_a_name_is_taken_while_its_member_lives(place: Place) -> None:
    if not place.knows_names:
        return  # names are unique by construction; a coordinator knows its members by ids of its own
    log, other = await place.open(), await place.open()
    first = await log.join("one/with odd:name")
    with pytest.raises(InvalidArguments, match="running already"):
        await other.join("one/with odd:name")
    await first.leave()
    await Assigned(await other.join("one/with odd:name")).becomes(0, 1, 2, 3)


@on_loop
async def test_a_member_is_confirmed_for_what_it_has_and_nothing_else(place: Place) -> None:
    log, other = await place.open(), await place.open()
    first = await log.join("one")
    one = Assigned(first)
    await one.becomes(0, 1, 2, 3)
    assert await first.confirm(3)
    assert await first.confirm(0, 7)
    second = await other.join("two")
    two = Assigned(second)
    await one.has(2)
    for partition in frozenset(range(4)) - (one.now or frozenset()):
        await first.release(partition)
    await two.has(2)
    while not all([await first.confirm(partition) for partition in one.now or ()]):
        pass  # the group is being rearranged
    assert not any([await first.confirm(partition) for partition in two.now or ()])
    await first.leave()
    assert not await first.confirm(0)


@on_loop
async def test_groups_of_two_apps_are_separate(place: Place) -> None:
    shop, billing = await place.open("shop"), await place.open("billing")
    one, two = Assigned(await shop.join("one")), Assigned(await billing.join("one"))
    await one.becomes(0, 1, 2, 3)
    await two.becomes(0, 1, 2, 3)


# ------------------------------------------------------------------------------------------------ opening and closing


@on_loop
async def test_close_finishes_what_was_handed_over(place: Place) -> None:
    keep, log = await place.open(), await place.open()
    futures = [log.append(0, n, numbered(1, n)) for n in range(100)]
    published = log.publish([Outgoing(STATUS, 0, b"k", b"v")])
    await log.close()
    await log.close()
    assert [future.result() for future in futures] == list(range(100))
    assert published.done()
    assert await keep.end_offset(HISTORY, 0) == 100


@on_loop
async def test_a_closed_log_says_so(place: Place) -> None:
    log = await place.open()
    await log.close()
    with pytest.raises(Unavailable, match="closed: open it again"):
        await log.append(0, 0, numbered(1))
    with pytest.raises(Unavailable, match="closed"):
        await log.publish([])
    with pytest.raises(Unavailable, match="closed"):
        await log.read(HISTORY, 0, 0)
    with pytest.raises(Unavailable, match="closed"):
        await log.join("one")


@on_loop
async def test_close_ends_those_who_follow(place: Place) -> None:
    log = await place.open()
    (follower,) = await waiting_followers(log, 1)
    await log.close()
    assert await follower == []


@on_loop
async def test_partitions_are_fixed_at_creation(place: Place) -> None:
    log = await place.open(partitions=3)
    assert log.partitions == 3
    assert (await place.open()).partitions == 3
    with pytest.raises(InvalidArguments, match="have 3 partitions, asked for 5"):
        await place.open(partitions=5)


@on_loop
async def test_who_may_not_create_waits_for_a_worker(place: Place) -> None:
    with pytest.raises(Unavailable, match="start a worker"):
        await place.open(create=False)
    await place.open("billing")
    with pytest.raises(Unavailable, match=rf"no topics of app '{place.app('shop')}': start a worker"):
        await place.open(create=False)


@on_loop
async def test_wrong_calls_name_what_is_wrong(place: Place) -> None:
    log = await place.open()
    with pytest.raises(InvalidArguments, match="partition must be 0 to 3, found 4"):
        log.append(4, 0, numbered(1))
    with pytest.raises(InvalidArguments, match="at least one record"):
        log.append(0, 0, [])
    with pytest.raises(InvalidArguments, match="append"):
        log.publish([Outgoing(HISTORY, 0, b"k", b"v")])
    with pytest.raises(InvalidArguments, match="unknown topic 'state': known are commands, history"):
        await log.read("state", 0, 0)
    with pytest.raises(PayloadTooLarge, match=r"1,000,001 bytes, a log takes 1,000,000"):
        log.append(0, 0, [(b"k", b"x" * 1_000_000)])
    with pytest.raises(PayloadTooLarge, match="status"):
        log.publish([Outgoing(STATUS, 0, b"k", b"x" * 1_000_000)])
    assert await log.append(0, 0, [(b"k", b"x" * 999_999)]) == 0
