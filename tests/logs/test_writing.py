"""Writing with a lane that is played by the test: what is acknowledged, in which order, and what is not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, Final

import pytest

from streamflow.errors import Fenced, InvalidArguments, StreamflowError, Unavailable
from streamflow.logs import writing as writing_module
from streamflow.logs.base import COMMANDS, STATUS, Outgoing
from streamflow.logs.lanes import NotTaken, Refusal, Sent
from streamflow.logs.writing import Writing

TIMED_OUT: Final = Refusal("timed out")


class PlayedLane:
    """Keeps what it is given, until the test acknowledges it."""

    made: ClassVar[list[PlayedLane]] = []

    def __init__(self, name: str, delivered: Callable[[Any, list[Sent]], None]) -> None:
        self.name, self._delivered = name, delivered
        self.dropped = self.failed = False
        self.refuses: str | None = None
        self.sent: list[tuple[str, int, bytes | None, Sent, int]] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.given = asyncio.Event()
        PlayedLane.made.append(self)

    def message(self, key: bytes, value: bytes | None, sent: Sent, expected: int = -1) -> dict[str, Any]:
        return {"value": value, "sent": sent, "expected": expected}

    def send(self, topic: str, partition: int, messages: list[dict[str, Any]]) -> None:
        if self.refuses is not None:
            self.failed = self.refuses == "failed"
            raise NotTaken(TIMED_OUT)
        self.given.set()
        self.sent += [(topic, partition, each["value"], each["sent"], each["expected"]) for each in messages]

    def drop(self) -> None:
        self.dropped = True
        self.close()

    def close(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    # -- the test's part

    @property
    def values(self) -> list[bytes | None]:
        return [value for _, _, value, _, _ in self.sent]

    def acknowledge(self, count: int | None = None, *, at: int | None = None, error: Refusal | None = None) -> None:
        """The broker took so many of the records that wait (all), elsewhere than expected, or not at all."""
        taken = self.sent[:count]
        del self.sent[: len(taken)]
        done: list[Sent] = []
        for _, _, _, sent, expected in taken:
            offset = expected if at is None else None if at < 0 else at
            if sent.acknowledged(offset, expected) if error is None else sent.refused(error):
                done.append(sent)
        self._delivered(self, done)

    def fail(self) -> None:
        self.failed = True
        self._delivered(self, [])


@pytest.fixture(autouse=True)
def _played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has lanes of its own, and publishes follow each other without a rest, but in the test of that."""
    PlayedLane.made = []
    monkeypatch.setattr(writing_module, "REST_SECONDS_PER_RECORD", 0)


def run(test: Callable[[Writing, dict[int, int]], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        moved: dict[int, int] = {}
        writing = Writing("kafka://nowhere", "shop", 8, moved.__setitem__, PlayedLane)
        await test(writing, moved)

    asyncio.run(main())


def lane(number: int = 0) -> PlayedLane:
    return PlayedLane.made[number]


def append(writing: Writing, expected: int, *values: bytes, partition: int = 0) -> asyncio.Future[int]:
    return writing.append(partition, expected, [(b"k", value) for value in values], 10)


async def failure(future: asyncio.Future[Any]) -> StreamflowError:
    with pytest.raises(StreamflowError) as raised:
        await future
    return raised.value


def test_a_lone_append_goes_at_once_and_what_comes_meanwhile_goes_together():
    async def test(writing: Writing, moved: dict[int, int]) -> None:
        futures = [append(writing, 0, b"a"), append(writing, 1, b"b", b"c"), append(writing, 3, b"d")]
        assert lane().values == [b"a"]
        lane().acknowledge()
        assert lane().values == [b"b", b"c", b"d"]
        assert [expected for *_, expected in lane().sent] == [1, 2, 3]
        lane().acknowledge(2)
        assert await futures[0] == 0 and await futures[1] == 1 and not futures[2].done()
        lane().acknowledge()
        assert await futures[2] == 3

    run(test)


def test_partitions_do_not_wait_for_each_other():
    async def test(writing: Writing, moved: dict[int, int]) -> None:
        futures = [append(writing, 0, b"%d" % number, partition=number) for number in range(8)]
        assert [made.name for made in PlayedLane.made] == ["history-0", "history-1"]
        assert lane(0).values == [b"0", b"2", b"4", b"6"]
        lane(1).acknowledge()
        assert [future.done() for future in futures] == [number % 2 == 1 for number in range(8)]

    run(test)


@pytest.mark.parametrize("found", [7, 3, -1])
def test_an_acknowledgement_at_any_other_offset_fences_all_that_builds_on_it(found: int):
    async def test(writing: Writing, moved: dict[int, int]) -> None:
        futures = [append(writing, 5, b"a"), append(writing, 6, b"b"), append(writing, 7, b"c")]
        lane().acknowledge(at=found)
        errors = [await failure(future) for future in futures]
        assert all(isinstance(error, Fenced) for error in errors)
        assert "was expected to end at offset 5" in str(errors[0]) and "builds on one that failed" in str(errors[2])
        assert isinstance(await failure(append(writing, 8, b"d")), Fenced), "also what is handed over after it"
        assert lane().values == [], "and none of it was sent"
        writing.looked(0)
        append(writing, 8, b"e")
        assert lane().values == [b"e"]

    run(test)


async def acknowledged_out_of_order(writing: Writing) -> tuple[asyncio.Future[int], asyncio.Future[int]]:
    """Two appends of one group, at the offsets 1 and 2, of which the second is acknowledged."""
    before, first, second = [append(writing, offset, b"%d" % offset) for offset in range(3)]
    lane().acknowledge()
    assert await before == 0
    lane().sent.reverse()
    lane().acknowledge(1)
    return first, second


def test_an_acknowledgement_that_comes_before_an_earlier_one_waits_for_it():
    async def test(writing: Writing, _: dict[int, int]) -> None:
        first, second = await acknowledged_out_of_order(writing)
        assert not first.done() and not second.done()
        behind = append(writing, 3, b"3")
        assert lane().values == [b"1"], "the group under way comes first"
        lane().acknowledge()
        assert (await first, await second) == (1, 2)
        lane().acknowledge()
        assert await behind == 3

    run(test)


def test_an_earlier_append_that_fails_takes_along_those_acknowledged_behind_it():
    async def test(writing: Writing, _: dict[int, int]) -> None:
        first, second = await acknowledged_out_of_order(writing)
        lane().acknowledge(error=TIMED_OUT)
        for each in (first, second):
            assert isinstance(await failure(each), StreamflowError)

    run(test)


def test_an_error_makes_the_outcome_of_the_whole_lane_unknown_and_replaces_it():
    async def test(writing: Writing, moved: dict[int, int]) -> None:
        futures = [
            append(writing, 0, b"a"),
            append(writing, 0, b"b", partition=2),
            append(writing, 0, b"c", partition=1),
        ]
        lane(0).acknowledge(1, error=TIMED_OUT)
        assert [type(await failure(future)) for future in futures[:2]] == [Unavailable, Unavailable]
        assert lane(0).dropped and not lane(1).dropped and not futures[2].done()
        lane(0).acknowledge()  # what was under way comes back purged: nobody waits for it any more
        writing.looked(0)
        append(writing, 0, b"again")
        assert PlayedLane.made[2].values == [b"again"]

    run(test)


@pytest.mark.parametrize("why", ["full", "failed"])
def test_a_lane_that_takes_nothing_is_replaced(why: str):
    async def test(writing: Writing, moved: dict[int, int]) -> None:
        append(writing, 0, b"a")
        lane().refuses = why
        second = append(writing, 1, b"b")
        lane().acknowledge()
        assert isinstance(await failure(second), Unavailable)
        assert lane().dropped

    run(test)


def test_a_lane_that_failed_tells_those_whose_acknowledgement_never_comes():
    async def test(writing: Writing, moved: dict[int, int]) -> None:
        waiting = append(writing, 0, b"a")
        published = writing.publish([Outgoing(STATUS, 0, b"k", b"v")], writing.mark((0, 1)), 1)
        for made in list(PlayedLane.made):
            made.fail()
        assert isinstance(await failure(waiting), Unavailable)
        assert isinstance(await failure(published), Unavailable)
        assert moved == {}
        assert await_later(writing.publish([Outgoing(STATUS, 0, b"k", b"w")], None, 1))
        assert PlayedLane.made[-1].values == [b"w"]

    run(test)


def await_later(future: asyncio.Future[Any]) -> bool:
    return not future.done()


def test_publishes_are_done_in_the_order_of_the_calls_and_move_the_published_offset():
    async def test(writing: Writing, moved: dict[int, int]) -> None:
        first = writing.publish([Outgoing(STATUS, 0, b"k", b"1")], writing.mark((3, 10)), 1)
        second = writing.publish([Outgoing(COMMANDS, 1, b"k", b"2")], writing.mark((3, 20)), 1)
        third = writing.publish([], writing.mark((3, 30)), 0)
        assert lane().values == [b"1"]
        lane().acknowledge()
        assert first.done() and moved == {3: 10}
        assert lane().values == [b"2"] and not third.done()
        lane().acknowledge()
        assert second.done() and third.done() and moved == {3: 30}

    run(test)


@pytest.mark.parametrize(("records", "rest"), [(1, 0.001), (3, 0.003), (20, 0.02), (1_000, 0.02)])
def test_a_group_of_publishes_rests_as_long_as_it_is_large(monkeypatch: pytest.MonkeyPatch, records: int, rest: float):
    monkeypatch.undo()

    async def test(writing: Writing, moved: dict[int, int]) -> None:
        now = 0.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)

        async def publish(*values: bytes) -> None:
            await_later(writing.publish([Outgoing(STATUS, 0, b"k", value) for value in values], None, 1))
            await asyncio.sleep(0)

        await publish(*[b"large"] * records)
        assert lane().values == [b"large"] * records, "nothing was sent before"
        lane().acknowledge()
        now += rest - 1e-6
        await publish(b"2")
        await publish(b"3")
        assert lane().values == []
        lane().given.clear()
        now += 1e-6
        await lane().given.wait()
        assert lane().values == [b"2", b"3"]
        now += max(rest, 0.002)
        await publish(b"4")
        assert lane().values == [b"2", b"3"], "a group is under way"
        lane().acknowledge()
        assert lane().values == [b"4"], "the rest was over meanwhile"

    run(test)


def test_closing_waits_for_a_publish_that_rests(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()

    async def test(writing: Writing, moved: dict[int, int]) -> None:
        first = writing.publish([Outgoing(STATUS, 0, b"k", b"1")], None, 1)
        lane().acknowledge()
        second = writing.publish([Outgoing(STATUS, 0, b"k", b"2")], None, 1)
        lane().given.clear()
        closing = asyncio.create_task(writing.close())
        await lane().given.wait()
        lane().acknowledge()
        await closing
        await asyncio.gather(first, second)

    run(test)


def test_the_published_offset_never_passes_what_was_not_published():
    async def test(writing: Writing, moved: dict[int, int]) -> None:
        first = writing.publish([Outgoing(STATUS, 0, b"k", b"1")], writing.mark((3, 10)), 1)
        second = writing.publish([Outgoing(STATUS, 0, b"k", b"2")], writing.mark((3, 20)), 1)
        other = writing.publish([Outgoing(STATUS, 0, b"k", b"3")], writing.mark((4, 7)), 1)
        lane().acknowledge(error=TIMED_OUT)
        lane().acknowledge()
        assert isinstance(await failure(first), Unavailable)
        await second
        await other
        assert moved == {4: 7}
        writing.look_at_published(3)  # its owner begins again and derives all of it again
        await_later(writing.publish([Outgoing(STATUS, 0, b"k", b"4")], writing.mark((3, 20)), 1))
        lane().acknowledge()
        assert moved == {4: 7, 3: 20}

    run(test)


def test_what_an_owner_had_under_way_before_it_began_again_moves_nothing():
    async def test(writing: Writing, moved: dict[int, int]) -> None:
        late = writing.publish([Outgoing(STATUS, 0, b"k", b"1")], writing.mark((3, 10)), 1)
        writing.look_at_published(3)
        lane().acknowledge()
        await late
        assert moved == {}

    run(test)


def test_a_caller_that_does_not_wait_any_more_stops_nobody():
    async def test(writing: Writing, moved: dict[int, int]) -> None:
        futures = [append(writing, 0, b"a"), append(writing, 1, b"b")]
        futures[0].cancel()
        lane().acknowledge()
        lane().acknowledge()
        assert await futures[1] == 1

    run(test)


def test_more_than_the_limit_is_refused_until_something_is_durable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writing_module, "PENDING_BYTES_MAX", 15)

    async def test(writing: Writing, moved: dict[int, int]) -> None:
        first, second = append(writing, 0, b"a"), append(writing, 1, b"b")
        assert "at most 15 may" in str(await failure(append(writing, 2, b"c")))
        assert "at most 15 may" in str(await failure(writing.publish([], writing.mark((3, 9)), 0)))
        lane().acknowledge()
        lane().acknowledge()
        assert await first == 0 and await second == 1
        writing.looked(0)
        assert await_later(append(writing, 2, b"d"))

    run(test)


def test_lanes_that_have_ended_are_let_go_and_closing_waits_for_the_others():
    async def test(writing: Writing, moved: dict[int, int]) -> None:
        async def lose_lane() -> list[Any]:
            writing.looked(0)
            waiting = append(writing, 0, b"a")
            lane(-1).acknowledge(error=TIMED_OUT)
            assert isinstance(await failure(waiting), Unavailable)
            return list(writing._ended)

        for _ in range(3):
            assert await lose_lane() == [lane(-1)]
        ending = lane(-1)
        ending.closed = asyncio.get_running_loop().create_future()
        assert await lose_lane() == [ending, lane(-1)]
        closing = asyncio.create_task(writing.close())
        await asyncio.sleep(0)
        assert not closing.done()
        ending.close()
        await closing

    run(test)


def test_closing_waits_for_what_is_under_way_and_ends_the_lanes():
    async def test(writing: Writing, moved: dict[int, int]) -> None:
        waiting = append(writing, 0, b"a")
        closing = asyncio.create_task(writing.close())
        await asyncio.sleep(0)
        assert not lane().closed.done()
        lane().acknowledge()
        await closing
        assert await waiting == 0 and lane().closed.done()

    run(test)


def test_closing_waits_for_a_cluster_that_is_away_once_and_not_lane_by_lane(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("streamflow.logs.writing.CLOSE_SECONDS", 0.01)

    async def test(writing: Writing, moved: dict[int, int]) -> None:
        waiting = append(writing, 0, b"a")
        await writing.close()
        assert lane().dropped and lane().closed.done()
        assert isinstance(await failure(waiting), Unavailable)

    run(test)


def test_what_waits_for_an_acknowledgement_that_comes_while_closing_is_not_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writing_module, "CLOSE_SECONDS", 0.01)

    async def test(writing: Writing, moved: dict[int, int]) -> None:
        first = writing.publish([Outgoing(STATUS, 0, b"k", b"1")], None, 1)
        second = writing.publish([Outgoing(STATUS, 0, b"k", b"2")], None, 1)
        close = lane().close

        def late() -> None:
            lane().acknowledge()
            close()

        monkeypatch.setattr(lane(), "close", late)
        await writing.close()
        assert lane().values == [], "its lane is dropped"
        await first
        assert "under way" in str(await failure(second))

    run(test)


def test_an_append_that_waits_for_an_acknowledgement_that_comes_while_closing_is_not_sent(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(writing_module, "CLOSE_SECONDS", 0.01)

    async def test(writing: Writing, moved: dict[int, int]) -> None:
        first, second = append(writing, 0, b"a"), append(writing, 1, b"b")
        close = lane().close

        def late() -> None:
            lane().acknowledge()
            close()

        monkeypatch.setattr(lane(), "close", late)
        await writing.close()
        assert lane().values == [], "its lane is dropped"
        assert await first == 0
        assert "under way" in str(await failure(second))

    run(test)


def test_a_refusal_that_will_not_change_is_told_as_it_is():
    async def test(writing: Writing, moved: dict[int, int]) -> None:
        error = InvalidArguments("this principal may not")
        refused = writing.publish([Outgoing(STATUS, 0, b"k", b"v")], None, 1)
        lane().acknowledge(error=Refusal("not authorized", error))
        assert await failure(refused) is error

    run(test)


def test_records_are_known_when_each_is_and_the_first_that_is_amiss_counts():
    sent = Sent(4)
    assert [sent.acknowledged(7, 7), sent.acknowledged(None, 8), sent.acknowledged(3, 9)] == [False] * 3
    assert sent.refused(TIMED_OUT)
    assert (sent.found, sent.error, sent.left) == (-1, TIMED_OUT, 0)
    anywhere = Sent(2)
    assert not anywhere.refused(TIMED_OUT) and anywhere.refused(Refusal("another"))
    assert (anywhere.found, anywhere.error) == (None, TIMED_OUT)
