"""Each fault of the simulated log is what it says: what lands, what its sender is told, and that it is counted."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from streamflow.errors import Fenced, StreamflowError, Unavailable
from streamflow.logs.base import COMMANDS, HISTORY, STATUS, Outgoing, QueueMembership
from streamflow.sim import lane
from streamflow.sim.cluster import HAND_OVER_SECONDS, LATE_SECONDS_MAX, SESSION_SECONDS, Weather
from streamflow.sim.lane import DELIVERY_SECONDS, RETRY_SECONDS
from streamflow.sim.log import ANSWER_SECONDS, APP_GROUP
from tests.logs.support import Assigned, eventually
from tests.sim.stage import CALM, Stage, append, assigned, failure, weather

# ------------------------------------------------------------------------------------------------------------- writes


@pytest.mark.parametrize(
    ("fate", "landed_then", "landed_later"),
    [
        ("lost", [], []),
        ("late", [], [b"a"]),
        ("unacknowledged", [b"a"], [b"a"]),
    ],
)
def test_a_write_whose_outcome_is_unknown(fate: str, landed_then: list[bytes], landed_later: list[bytes]):
    stage = Stage(seed=2)

    async def test() -> None:
        log = stage.log()
        stage.cluster.weather = weather(**{fate: 1.0})
        write = append(log, 0, b"a")
        assert isinstance(await failure(write), Unavailable)
        assert stage.world.now == pytest.approx(DELIVERY_SECONDS, abs=0.1)
        assert stage.landed() == landed_then
        await stage.pass_by(LATE_SECONDS_MAX)
        assert stage.landed() == landed_later
        assert stage.marks[f"write {fate}"] == 1
        assert ("write landed after its sender stopped or gave up" in stage.marks) == (fate == "late")

    stage.play(test)


def test_a_late_write_of_an_owner_lands_between_those_of_the_next():
    stage = Stage(seed=2)

    async def test() -> None:
        log, other = stage.log(), stage.log()
        stage.cluster.weather = Weather(late=1.0)
        assert isinstance(await failure(append(log, 0, b"zombie")), Unavailable)
        stage.cluster.weather = CALM
        assert await append(other, 0, b"next") == 0
        await stage.pass_by(LATE_SECONDS_MAX)
        assert isinstance(await failure(append(other, 1, b"fenced")), Fenced)
        assert stage.landed() == [b"next", b"zombie", b"fenced"]

    stage.play(test)


@pytest.mark.parametrize(("fate", "landed"), [("torn", [b"a", b"b"]), ("headless", [b"a", b"d"])])
def test_a_write_of_which_a_part_lands(fate: str, landed: list[bytes]):
    stage = Stage(seed=3)

    async def test() -> None:
        log = stage.log()
        assert await append(log, 0, b"a") == 0
        stage.cluster.weather = weather(**{fate: 1.0})
        error = await failure(append(log, 1, b"b", b"c", b"d"))
        assert isinstance(error, Unavailable if fate == "torn" else StreamflowError)
        found = stage.landed()
        assert 1 < len(found) < 4 and found[0] == b"a"
        rest = [b"b", b"c", b"d"]
        assert found[1:] == (rest[: len(found) - 1] if fate == "torn" else rest[1 - len(found) :])
        assert {landed[0], landed[-1]} <= set(found)
        assert stage.marks[f"write {fate}"] == 1

    stage.play(test)


@pytest.mark.parametrize(("fate", "found", "landed"), [("repeated", 1, [b"a", b"a"]), ("unplaced", -1, [b"a"])])
def test_an_acknowledgement_that_proves_nothing(fate: str, found: int, landed: list[bytes]):
    stage = Stage()

    async def test() -> None:
        log = stage.log()
        stage.cluster.weather = weather(**{fate: 1.0})
        error = await failure(append(log, 0, b"a"))
        assert isinstance(error, Fenced) and f"it ends at {found}" in str(error)
        await log.publish([Outgoing(STATUS, 0, b"k", b"s")], published=(0, 7))
        assert await log.published_offset(0) == 7, "published is published, wherever it landed"
        assert stage.landed() == landed
        assert stage.landed(STATUS) == [b"s"] * len(landed)
        assert stage.marks[f"write {fate}"] == 2

    stage.play(test)


def test_a_producer_that_fails_takes_all_along_and_order_begins_anew_with_another(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lane, "HANGING", 0.0)
    stage = Stage(partitions=2)

    async def test() -> None:
        log = stage.log()
        stage.cluster.weather = Weather(fatal=1.0)
        first = append(log, 0, b"fatal")
        stage.cluster.weather = CALM
        behind, beside = append(log, 1, b"behind"), append(log, 0, b"beside", partition=1)
        published = log.publish([Outgoing(STATUS, 0, b"k", b"s")])
        assert isinstance(await failure(first), Unavailable)
        assert isinstance(await failure(behind), Fenced)
        await asyncio.wait([beside])
        await published
        assert stage.landed() == [b"fatal"] and stage.landed(STATUS) == [b"s"], "publishes have a producer of their own"
        assert stage.marks["write fatal"] == 1
        assert await log.end_offset(HISTORY, 0) == 1
        assert await append(log, 1, b"again") == 1

    stage.play(test)


def test_what_a_failed_producer_had_under_way_can_land_behind_what_the_next_one_wrote(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lane, "HANGING", 1.0)
    stage = Stage()

    async def test() -> None:
        log = stage.log()
        stage.cluster.weather = Weather(fatal=1.0)
        assert isinstance(await failure(log.publish([Outgoing(STATUS, 0, b"k", b"old")])), Unavailable)
        stage.cluster.weather = CALM
        await log.publish([Outgoing(STATUS, 0, b"k", b"new")])
        assert stage.landed(STATUS) == [b"new"]
        await stage.pass_by(LATE_SECONDS_MAX)
        assert stage.landed(STATUS) == [b"new", b"old"]

    stage.play(test)


def test_a_producer_that_is_full_takes_a_part():
    stage = Stage(seed=4)

    async def test() -> None:
        log = stage.log()
        stage.cluster.weather = Weather(full=1.0)
        assert isinstance(await failure(append(log, 0, *(b"%d" % n for n in range(10)))), Unavailable)
        failed = log.publish([Outgoing(STATUS, 0, b"k", b"%d" % n) for n in range(10)], published=(0, 5))
        assert isinstance(await failure(failed), Unavailable)
        stage.cluster.weather = CALM
        await stage.pass_by(1.0)
        assert len(stage.landed()) < 10 and len(stage.landed(STATUS)) < 10
        assert stage.landed() or stage.landed(STATUS), "a part"
        assert stage.marks["queue full"] == 2
        assert await log.published_offset(0) == 0

    stage.play(test)


def test_acknowledgements_of_several_partitions_overtake_each_other_those_of_one_do_not():
    stage = Stage(partitions=4, seed=5)

    async def test() -> None:
        log = stage.log()
        stage.cluster.weather = Weather(delay=0.1, spike=0.5)
        order: list[tuple[int, int]] = []
        futures = []
        for number in range(8):
            for partition in range(4):
                future = append(log, number, b"v", partition=partition)
                future.add_done_callback(lambda _, place=(partition, number): order.append(place))  # type: ignore[misc]
                futures.append(future)
        await asyncio.gather(*futures)
        assert order != sorted(order, key=lambda place: place[1])
        for partition in range(4):
            assert [number for at, number in order if at == partition] == list(range(8))
        assert stage.marks["acknowledgements out of order"] > 0

    stage.play(test)


def test_a_brokers_outage_shorter_than_the_patience_of_a_producer_only_takes_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lane, "HANGING", 0.0)
    stage = Stage()

    async def test() -> None:
        log = stage.log()
        down = stage.cluster.weather = Weather(down=True)
        stage.world.at(1.0, lambda: setattr(down, "down", False))
        assert await append(log, 0, b"a") == 0
        assert 1.0 <= stage.world.now < 1.0 + 2 * RETRY_SECONDS
        assert stage.landed() == [b"a"]

    stage.play(test)


def test_a_brokers_outage_that_lasts():
    stage = Stage(seed=6)

    async def test() -> None:
        log = stage.log()
        stage.cluster.weather = Weather(down=True)
        write, question = append(log, 0, b"a"), asyncio.ensure_future(log.end_offset(HISTORY, 1))
        assert isinstance(await failure(write), Unavailable)
        assert isinstance(await failure(question), Unavailable)
        assert stage.world.now == pytest.approx(max(DELIVERY_SECONDS, ANSWER_SECONDS), abs=0.1)
        assert stage.landed() == []

    stage.play(test)


def test_a_partition_without_a_leader_keeps_nobody_else_waiting():
    stage = Stage()

    async def test() -> None:
        log = stage.log()
        stage.cluster.leaderless.add((STATUS, 1))
        await log.publish([Outgoing(STATUS, 0, b"k", b"v")])
        assert isinstance(await failure(log.publish([Outgoing(STATUS, 1, b"k", b"v")], published=(0, 3))), Unavailable)
        assert isinstance(await failure(log.read(STATUS, 1, 0)), Unavailable)
        assert await log.published_offset(0) == 0
        stage.cluster.mend_all()
        await log.publish([Outgoing(STATUS, 1, b"k", b"w")], published=(0, 3))
        assert stage.landed(STATUS, 1) == [b"w"]

    stage.play(test)


# ------------------------------------------------------------------------------------------- processes and the network


def test_what_a_process_had_sent_lands_after_its_death_and_while_it_is_stopped():
    stage = Stage()
    stage.cluster.weather = Weather(delay=1.0)

    async def send() -> None:
        log = stage.log(stage.b)
        append(log, 0, b"sent")
        append(log, 1, b"not sent")  # waits for the first

    stage.let(stage.b, send)
    stage.b.stop(100.0)
    stage.let(stage.a, lambda: stage.pass_by(10.0))
    assert stage.landed() == [b"sent"]
    assert stage.marks["write landed after its sender stopped or gave up"] == 1
    stage.world.close()


def test_what_hangs_in_a_connection_during_an_outage_lands_after_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lane, "HANGING", 1.0)
    stage = Stage()

    async def test() -> None:
        log = stage.log()
        stage.cluster.weather = Weather(down=True)
        assert isinstance(await failure(append(log, 0, b"a")), Unavailable)
        stage.cluster.weather = CALM
        await eventually(lambda: stage.landed() == [b"a"], LATE_SECONDS_MAX)

    stage.play(test)


@pytest.mark.parametrize("requests_arrive", [True, False])
def test_one_process_is_cut_off_while_others_go_on(requests_arrive: bool):
    stage = Stage()

    async def test() -> None:
        log = stage.log()
        following = log.follow(COMMANDS, 0, 0)
        first = asyncio.ensure_future(anext(following))
        stage.cluster.cut(stage.a, requests_arrive=requests_arrive)
        write, question = append(log, 0, b"a"), asyncio.ensure_future(log.end_offset(HISTORY, 1))
        await stage.elsewhere(lambda: stage.log(stage.b).publish([Outgoing(COMMANDS, 0, b"k", b"c")]))
        assert stage.landed(COMMANDS) == [b"c"], "others go on"
        assert isinstance(await failure(write), Unavailable)
        assert isinstance(await failure(question), Unavailable)
        assert stage.landed() == ([b"a"] if requests_arrive else [])
        assert ("acknowledgement lost" in stage.marks) == ("answer lost" in stage.marks) == requests_arrive
        assert not first.done()
        stage.cluster.mend(stage.a)
        assert [record.value for record in await first] == [b"c"]
        assert await log.end_offset(HISTORY, 0) == requests_arrive

    stage.play(test)


def test_an_acknowledgement_that_got_lost_comes_again_with_the_same_offset():
    stage = Stage()

    async def test() -> None:
        log = stage.log()
        stage.cluster.cut(stage.a, requests_arrive=True)
        write = append(log, 0, b"a")
        stage.world.at(2.0, lambda: stage.cluster.mend(stage.a))
        assert await write == 0
        assert stage.landed() == [b"a"], "brokers know what they have"
        assert stage.marks["write sent again, and known"] >= 1

    stage.play(test)


def test_who_is_cut_off_loses_its_partitions_to_another_and_finds_out_later():
    stage = Stage(partitions=2, seed=3)

    async def test() -> None:
        mine = await assigned(stage.log(), "one")
        await mine.becomes(0, 1)
        others: Assigned = await stage.elsewhere(lambda: assigned(stage.log(stage.b), "two"))
        stage.cluster.cut(stage.a, requests_arrive=False)
        await others.becomes(0, 1)
        assert SESSION_SECONDS < stage.world.now < HAND_OVER_SECONDS + SESSION_SECONDS + 2
        assert stage.marks["member put out"] == 1
        await mine.becomes()

    stage.play(test)


# -------------------------------------------------------------------------------------------------------------- groups


def test_a_partition_is_seized_and_two_members_believe_that_it_is_theirs():
    stage = Stage(partitions=2, seed=1)

    async def test() -> None:
        one = await stage.log().join("one")
        mine = Assigned(one)
        await mine.becomes(0, 1)
        theirs: Assigned = await stage.elsewhere(lambda: assigned(stage.log(stage.b), "two"))
        await mine.has(1)
        for partition in frozenset(range(2)) - (mine.now or frozenset()):
            await one.release(partition)
        await theirs.has(1)
        assert "two members believe that they own it" not in stage.marks, "what is released is nobody's"
        stage.a.stop(1.0)  # it learns of nothing meanwhile
        assert "is taken from one#1 for two#2" in stage.cluster.group(APP_GROUP).seize(PicksLast())
        await eventually(lambda: "two members believe that they own it" in stage.marks)
        assert stage.marks["partition seized"] == 1

    stage.play(test)


class PicksLast(random.Random):
    def choice(self, seq: Any) -> Any:
        return next(pair for pair in seq if pair[1].startswith("two#"))


def test_a_member_that_does_not_let_go_loses_its_partition_after_a_while():
    stage = Stage(partitions=2)

    async def test() -> None:
        mine = await assigned(stage.log(), "one")
        await mine.becomes(0, 1)
        theirs: Assigned = await stage.elsewhere(lambda: assigned(stage.log(stage.b), "two"))
        await theirs.has(1)
        assert stage.marks["partition taken before it was stopped"] == 1
        assert stage.marks["two members believe that they own it"] == 1
        assert stage.world.now > HAND_OVER_SECONDS

    stage.play(test)


def test_committed_offsets_go_back():
    stage = Stage(partitions=2)

    async def test() -> None:
        log = stage.log()
        queue: QueueMembership = await log.join_queue("gpu", "one")
        await Assigned(queue).becomes(0, 1)
        for partition in range(2):
            await log.publish([], published=(partition, 10))
            await queue.commit(partition, 10)
        await stage.pass_by(1.0)
        assert stage.cluster.published == {0: 10, 1: 10}
        said = stage.cluster.lose_offsets(random.Random(1))
        lost = {(name, partition) for name, offsets in (("published", stage.cluster.published),
                ("steps.gpu", stage.cluster.group("steps.gpu").committed)) for partition in offsets
                if offsets[partition] < 10}  # fmt: skip
        assert lost and all(f"{name}[{partition}] 10 -> " in said for name, partition in lost)
        assert stage.marks["committed offset lost"] == len(lost)
        assert await log.published_offset(0) == 10, "who knows better goes on from there"
        found = [await stage.log().published_offset(partition) for partition in range(2)]
        assert found == [stage.cluster.published[partition] for partition in range(2)]
        assert await queue.committed(0) == stage.cluster.group("steps.gpu").committed[0]

    stage.play(test)


def test_the_newest_published_offsets_are_lost_with_their_process():
    stage = Stage()

    async def publish() -> None:
        await stage.log(stage.b).publish([], published=(0, 9))

    stage.let(stage.b, publish)
    stage.b.kill()
    assert stage.let(stage.a, lambda: stage.log().published_offset(0)) == 0
    stage.world.close()


# -------------------------------------------------------------------------------------------------------------- reads


def test_reads_that_are_slow_and_give_a_part():
    stage = Stage(seed=4)

    async def test() -> None:
        log = stage.log()
        await append(log, 0, *(b"%d" % n for n in range(10)))
        stage.cluster.weather = Weather(partial=1.0, slow=1.0)
        began = stage.world.now
        seen: list[bytes | None] = []
        while len(seen) < 10:
            batch = await log.read(HISTORY, 0, len(seen))
            assert len(batch) < 10 - len(seen) or len(batch) == 1
            seen += [record.value for record in batch]
        assert seen == [b"%d" % n for n in range(10)]
        assert stage.world.now > began + 1.0
        assert stage.marks["partial read"] >= 1 and stage.marks["slow read"] >= 2

    stage.play(test)


def test_a_slow_answer_tells_what_was_so_when_the_question_arrived():
    stage = Stage(seed=2)

    async def test() -> None:
        log, other = stage.log(), stage.log()
        stage.cluster.weather = Weather(slow=1.0)
        question = asyncio.ensure_future(log.end_offset(COMMANDS, 0))
        await stage.pass_by(0.1)
        await other.publish([Outgoing(COMMANDS, 0, b"k", b"v")])
        assert stage.landed(COMMANDS) == [b"v"] and not question.done()
        assert await question == 0

    stage.play(test)


def test_who_reads_below_a_start_that_moved_goes_on_there():
    stage = Stage()

    async def test() -> None:
        log = stage.log()
        for number in range(6):
            await log.publish([Outgoing(COMMANDS, 0, b"k", b"%d" % number)])
        batches = log.follow(COMMANDS, 0, 0, limit=2)
        assert [record.offset for record in await anext(batches)] == [0, 1]
        stage.cluster.stream(COMMANDS, 0).trim(4)
        ahead = [await anext(batches), await anext(batches)]
        assert [record.offset for batch in ahead for record in batch] == [2, 3, 4, 5], "they were fetched ahead"
        await log.publish([Outgoing(COMMANDS, 0, b"k", b"%d" % number) for number in range(6, 9)])
        stage.cluster.stream(COMMANDS, 0).trim(7)
        assert [record.offset for record in await anext(batches)] == [7, 8]
        assert [record.offset for record in await log.read(COMMANDS, 0, 0)] == [7, 8]
        assert stage.marks["read below the start"] == 2
        await batches.aclose()  # type: ignore[attr-defined]

    stage.play(test)


def test_who_is_away_for_longer_than_the_retention_misses_a_tombstone():
    stage = Stage()

    async def test() -> None:
        log = stage.log()
        await log.publish([Outgoing(STATUS, 0, b"gone", b"live")])
        seen = await log.read(STATUS, 0, 0)
        await log.publish([Outgoing(STATUS, 0, b"gone", None), Outgoing(STATUS, 0, b"other", b"live")])
        stream = stage.cluster.stream(STATUS, 0)
        assert stream.compact(upto=3, tombstones_before=stage.world.now - 60.0) == 0
        assert [record.offset for record in await log.read(STATUS, 0, 1)] == [1, 2], "the tombstone is kept for a while"
        await stage.pass_by(70.0)
        assert stream.compact(upto=3, tombstones_before=stage.world.now - 60.0) == 1
        assert [record.key for record in await log.read(STATUS, 0, seen[-1].offset + 1)] == [b"other"]
        assert stage.marks["tombstone missed"] == 1
        assert [record.key for record in await log.read(STATUS, 0, 0)] == [b"other"]
        assert stage.marks["tombstone missed"] == 1, "who starts afresh misses nothing"

    stage.play(test)


def test_cleaning_counts_the_tombstones_that_it_takes():
    stage = Stage()

    async def test() -> None:
        log = stage.log()
        for number in range(20):
            await log.publish([Outgoing(STATUS, 0, b"%d" % number, None)])
        stage.cluster.compact()
        assert "tombstone cleaned away" not in stage.marks
        await stage.pass_by(1.0)
        for _ in range(10):
            stage.cluster.compact(delete_retention=0.0)
        assert stage.marks["tombstone cleaned away"] == 20 - len(stage.landed(STATUS)) > 0

    stage.play(test)
