"""Trimming: the history is as long as its live runs, and whoever restores from what is left has the owner's state."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamflow as sf
from streamflow.codec.avro import decode_task, encode_history
from streamflow.core.commands import CleanupWorkflow, ReportAttempt, SignalWorkflow, StartWorkflow, TerminateWorkflow
from streamflow.core.effects import StepTask
from streamflow.core.events import Claim, RunSnapshot, Turn
from streamflow.errors import CorruptLog, Fenced, InvalidArguments, Unavailable
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, HISTORY, REPLIES, Outgoing
from streamflow.store.memory import MemoryStore
from streamflow.worker.restore import Restorer
from streamflow.worker.state import PartitionState
from tests.worker import flows
from tests.worker.harness import World, dump, run, settle, signal, world
from tests.worker.test_state import ACTIONS, act

ROUNDS_MAX = 200_000
SMALL: dict[str, Any] = {"trim_records_min": 12, "snapshot_runs_at_once": 2}


async def until(condition: Callable[[], bool]) -> None:
    """Let everything go on until the condition holds; a flush of the store takes a thread."""
    for _ in range(ROUNDS_MAX):
        if condition():
            return
        await asyncio.sleep(0)
    pytest.fail("it never came true")


async def short_runs(it: World, count: int, *, first: int = 0) -> None:
    """Runs that come, end and are cleaned up: three records each, of which nothing is left."""
    for number in range(first, first + count):
        await it.start(f"short-{number}", "sleeps", b"[1]")
        await it.send(f"short-{number}", TerminateWorkflow())
        await it.send(f"short-{number}", CleanupWorkflow())


async def start_of(it: World) -> int:
    return await it.log.log.start_offset(HISTORY, 0)


async def trimmed(it: World, beyond: int = 0) -> int:
    """Wait for a cut beyond that offset."""
    return await start_beyond(it, HISTORY, beyond)


async def start_beyond(it: World, topic: str, beyond: int = 0, *, tick_ms: int = 0) -> int:
    """Wait until the topic begins beyond that offset."""
    for _ in range(ROUNDS_MAX):
        start = await it.log.log.start_offset(topic, 0)
        if start > beyond:
            return start
        it.clock.at_ms += tick_ms
        await asyncio.sleep(0)
    pytest.fail(f"{topic} was not trimmed")


async def restored(it: World, *, batch: int | None = None) -> PartitionState:
    """A new store, restored from the log as it is: at once, or by a new restorer after each batch."""
    state = PartitionState(MemoryStore())
    if batch is None:
        await Restorer(state, 0).run(it.log)
        return state
    records = await it.records(HISTORY)
    for begin in range(0, len(records), batch):
        restorer = Restorer(state, 0)
        restorer.trimmed = True
        restorer.offset = max(restorer.offset, records[0].offset)
        restorer.fold([each for each in records[: begin + batch] if each.offset >= restorer.offset])
    return state


async def same_when_restored(it: World) -> None:
    """Stop the owner, and compare its store with what everybody else makes of the log."""
    await it.stop()
    for batch in (None, 1, 7):
        state = await restored(it, batch=batch)
        assert dump(state.store) == dump(it.store)
        assert state.applied_offset == it.store.applied_offset
        assert not state.headless()


# -- what goes and what stays ------------------------------------------------------------------------------------------


def test_the_head_goes_when_half_of_it_is_of_no_run_any_more():
    async def test():
        async with world(flows.app, **SMALL) as it:
            for number in range(3):
                await it.start(f"parked-{number}", "listens")
                await it.send(f"parked-{number}", signal())
            await short_runs(it, 1)
            assert await start_of(it) == 0, "not worth it yet"
            await short_runs(it, 8, first=1)
            start = await trimmed(it)
            history = await it.history()
            copied = [each.workflow_id for each in history if isinstance(each, RunSnapshot)]
            assert [f"parked-{number}" for number in range(3)] == [name for name in copied if name.startswith("parked")]
            assert not isinstance(history[0], Claim) and await it.log.published_offset(0) >= start
            await same_when_restored(it)

    run(test())


def test_a_run_that_was_copied_goes_on_where_it_was_also_in_the_hands_of_a_new_owner_without_local_state():
    async def test():
        async with world(flows.app, **SMALL) as it:
            await it.start("parked", "listens")
            sent = await it.send("parked", signal(b"1"))
            await short_runs(it, 8)
            await trimmed(it)
            await it.send("parked", signal(b"2"))
            await it.begin_again(store=MemoryStore())
            await it.send("parked", signal(b"1"), command_id=sent)  # what was applied before the cut stays applied
            await it.send("parked", signal(b"null"))
            assert await it.state_of("parked") == "completed"
            status = it.processor.state.status("parked")
            assert status is not None and status.result == b"[1,2]"
            assert max(each.term for each in await it.history()) == 2, "the term goes on"
            await same_when_restored(it)

    run(test())


@pytest.mark.parametrize("fails_first", [False, True])
def test_an_attempt_on_a_queue_outlives_the_records_that_put_it_there(fails_first: bool):
    async def tasks(it: World) -> list[StepTask]:
        return [decode_task(record.value or b"") for record in await it.records("steps.gpu")]

    async def test():
        async with world(flows.app, **SMALL) as it:
            await it.start("far", "remote", b"[7]")
            (task,) = await tasks(it)
            await short_runs(it, 8)
            assert await trimmed(it) > 1
            await it.begin_again(store=MemoryStore())
            if fails_first:
                error = sf.ErrorInfo("ValueError", "no")
                body = ReportAttempt(run=1, number=0, attempt=1, error=error, retry_after_ms=10)
                await it.send("far", body, reply_to=None)
                (timer,) = await it.timers()
                await it.fire(timer)
                first, second = await tasks(it)
                assert first == task and (second.attempt, second.args, second.step) == (2, task.args, task.step)
                assert (second.timeout_ms, second.retry) == (task.timeout_ms, task.retry)
                task = second
            else:
                assert await tasks(it) == [task], "it is on its queue: nobody puts it there again"
            body = ReportAttempt(run=1, number=0, attempt=task.attempt, result=b"7")
            await it.send("far", body, reply_to=None)
            assert await it.state_of("far") == "completed"
            await same_when_restored(it)

    run(test())


def test_a_publish_that_fails_during_a_trim_is_derived_again_and_nothing_goes_meanwhile():
    async def test():
        async with world(flows.app, **SMALL) as it:
            it.log.hold_publishes = True
            await it.start("w", "listens")
            await short_runs(it, 8)
            await until(lambda: not it.processor.state.oldest(0, before=1, limit=1))
            published = it.processor.published
            held = it.log.publishes[0]
            held.future.set_exception(Unavailable("the log is away"))
            for other in it.log.publishes[1:]:
                other.future.set_result(None)
            it.log.publishes.clear()
            await settle()
            assert it.processor.published == published and await start_of(it) == 0
            assert it.task is not None and it.task.done()
            with pytest.raises(Unavailable, match="has failed"):
                it.processor.publish_offset()

    run(test())


def test_nothing_consumed_is_consumed_again_when_no_run_is_left():
    async def test():
        async with world(flows.app, **SMALL) as it:
            await short_runs(it, 9)
            await trimmed(it)
            consumed = it.processor.state.row().consumed
            for _ in range(2):
                await it.begin_again(store=MemoryStore())
                assert it.processor.core.consumed == consumed == 27
            assert not any(await it.history_of("short-0")) and it.processor.state.turns("short-0") == []
            await same_when_restored(it)

    run(test())


def test_a_history_of_live_runs_is_left_alone():
    async def test():
        async with world(flows.app, **SMALL) as it:
            for number in range(20):
                await it.start(f"parked-{number}", "listens")
            await settle()
            assert await start_of(it) == 0
            assert not any(isinstance(each, RunSnapshot) for each in await it.history())

    run(test())


def test_closed_runs_are_kept_until_their_retention_is_over():
    async def test():
        async with world(flows.app, **SMALL) as it:
            await it.start("kept", "line", b"[0]")
            await it.start("brief", "brief")
            it.executor.complete("brief", 0)
            await short_runs(it, 8)
            start = await trimmed(it)
            await it.begin_again(store=MemoryStore())
            assert await it.state_of("kept") == await it.state_of("brief") == "completed"
            (timer,) = [each for each in await it.timers() if each.kind == "retention"]
            assert timer.workflow_id == "brief"
            await it.fire(timer)
            assert await it.state_of("brief") is None and it.processor.state.summary("brief") is None
            await short_runs(it, 8, first=8)
            await trimmed(it, start)
            assert it.processor.state.summary("kept") is not None
            await same_when_restored(it)

    run(test())


def test_earlier_runs_of_an_id_are_not_copied():
    async def test():
        async with world(flows.app, **SMALL) as it:
            for _ in range(3):
                await it.send("w", StartWorkflow(workflow="listens", if_exists="restart"))
                await it.send("w", TerminateWorkflow())
            await it.send("w", StartWorkflow(workflow="listens", if_exists="restart"))
            await it.send("w", signal())
            assert [turn.turn for turn in it.processor.state.turns("w")] == list(range(1, 9))
            await short_runs(it, 8)
            await trimmed(it)
            assert [turn.turn for turn in it.processor.state.turns("w")] == [7, 8]
            await same_when_restored(it)

    run(test())


def test_turns_of_which_something_may_be_derived_again_are_copied_whatever_run_they_are_of():
    async def test():
        async with world(flows.app, **SMALL) as it:
            it.log.hold_publishes = True
            await it.start("w", "listens")
            await it.send("w", TerminateWorkflow())
            await it.send("w", StartWorkflow(workflow="listens", if_exists="restart"))
            await short_runs(it, 8)
            await until(lambda: not it.processor.state.oldest(0, before=4, limit=1))
            assert await start_of(it) == 0, "nothing goes of which something may have to be derived again"
            assert [turn.turn for turn in it.processor.state.turns("w")] == [1, 2, 3]
            await it.kill()
            it.log.hold_publishes = False
            await it.begin()
            assert {"c0", "c1", "c2"} <= (await it.replies()).keys(), "all that the run's turns say is derived again"
            await same_when_restored(it)

    run(test())


def test_runs_larger_than_a_record_are_copied_in_parts():
    large = b'"' + b"x" * 700_000 + b'"'

    async def test():
        async with world(flows.app, **SMALL) as it:
            await it.start("large", "listens")
            for _ in range(3):
                await it.send("large", signal(large))
            it.log.hold_appends = True
            await it.start("other", "sleeps", b"[1]")
            for _ in range(3):  # wait for one pass: a turn of several parts
                await it.send("burst", StartWorkflow(workflow="listens"))
                await it.send("burst", signal(large))
            it.log.hold_appends = False
            for held in it.log.appends:
                await held.release()
            await short_runs(it, 16)
            await trimmed(it)
            snapshots = [each for each in await it.history() if isinstance(each, RunSnapshot)]
            assert [each.part for each in snapshots if each.workflow_id == "large"][:3] == [0, 1, 2]
            await same_when_restored(it)

    run(test())


def test_one_turn_larger_than_a_record_is_copied_in_parts_and_is_whole_again():
    async def test():
        async with world(flows.app, **SMALL) as it:
            commands = [SignalWorkflow(name="s", value=b'"' + bytes([65 + n]) * 600_000 + b'"') for n in range(3)]
            records = [it.command_record("large", StartWorkflow(workflow="listens"))]
            records += [it.command_record("large", body) for body in commands]
            await it.log.log.publish(records)  # all at once: one turn
            await settle()
            assert sum(isinstance(each, Turn) for each in await it.history()) > 1
            assert [turn.turn for turn in it.processor.state.turns("large")] == [1]
            before = it.processor.state.encoded_turns("large", 0)
            await short_runs(it, 8)
            await trimmed(it)
            assert it.processor.state.encoded_turns("large", 0) == before
            await same_when_restored(it)

    run(test())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    actions=st.lists(ACTIONS, min_size=8, max_size=40),
    live=st.sampled_from([0, 1, 2048]),
    at_once=st.sampled_from([1, 3]),
)
def test_whatever_is_trimmed_meanwhile_everybody_restores_the_state_of_the_owner(
    actions: list[tuple[Any, ...]], live: int, at_once: int
):
    async def test():
        limits: dict[str, Any] = {"live_runs_max": live, "trim_records_min": 4, "snapshot_runs_at_once": at_once}
        async with world(flows.app, **limits) as it:
            for number, action in enumerate(actions):
                await act(it, action)
                if number % 2:
                    await short_runs(it, 2, first=2 * number)
            await same_when_restored(it)

    run(test())


# -- dying and losing the partition on the way -------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [False, True], ids=["store", "no-store"])
@pytest.mark.parametrize("where", ["copying", "publishing", "before-the-cut", "after-the-cut"])
def test_an_owner_that_dies_on_the_way_leaves_a_whole_log(where: str, fresh: bool):
    async def test():
        async with world(flows.app, **SMALL) as it:
            reached = asyncio.Event()
            copy, trim = it.processor.copy_forward, it.log.log.trim

            def copies(snapshots: Any) -> Any:
                if where == "copying" and it.log.hold_appends is False:
                    it.log.hold_appends = True
                    reached.set()
                return copy(snapshots)

            async def trims(topic: str, partition: int, before: int) -> int:
                found = await trim(topic, partition, before) if where == "after-the-cut" else 0
                if where.endswith("the-cut") and topic == HISTORY:
                    reached.set()
                    await asyncio.Event().wait()
                return found

            it.processor.copy_forward = copies  # type: ignore[method-assign]
            it.log.trim = trims  # type: ignore[attr-defined]
            for number in range(5):
                await it.start(f"parked-{number}", "listens")
            it.log.hold_publishes = where == "publishing"
            await short_runs(it, 9)
            if where == "publishing":
                await until(lambda: not it.processor.state.oldest(0, before=7, limit=1))
            else:
                await reached.wait()
            await it.kill()
            del it.log.trim
            it.log.hold_appends = it.log.hold_publishes = False
            it.store = MemoryStore() if fresh else it.store
            await it.begin()
            for number in range(5):
                await it.send(f"parked-{number}", signal())
            await short_runs(it, 12, first=20)
            await trimmed(it)
            for number in range(5):
                await it.send(f"parked-{number}", signal(b"null"))
                assert await it.state_of(f"parked-{number}") == "completed"
            await same_when_restored(it)

    run(test())


def test_an_owner_that_is_fenced_while_it_copies_does_not_cut():
    async def test():
        async with world(flows.app, **SMALL) as it:
            copy = it.processor.copy_forward

            def copies(snapshots: Any) -> Any:
                end = it.processor.state.applied_offset
                it.log.log.append(0, end, [(b"", encode_history(Claim(term=9, owner="other", at=0)))])
                return copy(snapshots)

            it.processor.copy_forward = copies  # type: ignore[method-assign]
            await it.start("parked", "listens")
            await short_runs(it, 9)
            assert it.task is not None
            with pytest.raises(Fenced):
                await it.task
            assert await start_of(it) == 0
            assert not any(isinstance(each, RunSnapshot) for each in await it.history())
            await it.begin()
            await short_runs(it, 9, first=20)
            await trimmed(it)
            await same_when_restored(it)

    run(test())


@pytest.mark.parametrize("error", [Unavailable("the disk is full"), InvalidArguments("not granted")], ids=repr)
def test_a_cut_that_fails_stops_nothing_and_is_made_another_time(error: Exception):
    async def test():
        async with world(flows.app, **SMALL) as it:

            async def trims(topic: str, partition: int, before: int) -> int:
                raise error

            it.log.trim = trims  # type: ignore[attr-defined]
            await it.start("parked", "listens")
            await short_runs(it, 9)
            await until(lambda: not it.processor.state.oldest(0, before=2, limit=1))
            del it.log.trim
            await settle()
            await short_runs(it, 9, first=20)
            await trimmed(it)
            await same_when_restored(it)

    run(test())


# -- who reads meanwhile -----------------------------------------------------------------------------------------------


def test_a_reader_whose_place_is_trimmed_begins_again_with_a_new_store():
    async def test():
        async with world(flows.app, **SMALL) as it:
            await it.start("parked", "listens")
            await short_runs(it, 2)
            behind = await restored(it)
            await short_runs(it, 9, first=2)
            start = await trimmed(it)
            assert 0 < behind.applied_offset < start
            with pytest.raises(Unavailable, match=f"trimmed up to offset {start}, while it was read up to"):
                await Restorer(behind, 0).run(it.log)
            await same_when_restored(it)

    run(test())


def test_a_cut_in_the_middle_of_reading_is_noticed():
    async def test():
        async with world(flows.app) as it:
            await short_runs(it, 5)
            read = it.log.log.read

            async def reads(topic: str, partition: int, offset: int, *, limit: int) -> Any:
                found = await read(topic, partition, offset, limit=4)
                await it.log.log.trim(HISTORY, 0, offset + 6)
                return found

            it.log.read = reads  # type: ignore[attr-defined]
            with pytest.raises(Unavailable, match="trimmed up to offset 10, while it was read up to 4"):
                await Restorer(PartitionState(MemoryStore()), 0).run(it.log)

    run(test())


def test_a_run_without_its_beginning_is_not_made_up():
    async def test():
        async with world(flows.app) as it:
            await it.start("parked", "listens")
            await it.start("gone", "listens")
            await it.send("gone", TerminateWorkflow())
            await it.send("parked", signal())
            await it.send("gone", CleanupWorkflow())
            await it.log.log.trim(HISTORY, 0, 3)  # claim, two beginnings: as no owner would
            with pytest.raises(CorruptLog, match=r"holds turns of run parked without its beginning .*\(1 such runs\)"):
                await restored(it)

    run(test())


# -- the other topics --------------------------------------------------------------------------------------------------


def test_consumed_commands_answers_and_dead_letters_go_when_they_are_old():
    async def test():
        kept: dict[str, Any] = {
            "commands_kept_seconds": 0.0,
            "replies_kept_seconds": 0.0,
            "dead_letters_kept_seconds": 0.0,
        }
        async with world(flows.app, trim_seconds=0.01, **kept) as it:
            it.clock.at_ms = 1 << 45  # so that everything is old
            await it.start("w", "listens")
            await it.send_raw(b"garbage")
            await it.log.log.publish([Outgoing(REPLIES, 0, b"", b"")] * 3)
            await start_beyond(it, REPLIES, 3, tick_ms=1)
            await start_beyond(it, DEAD_LETTERS, tick_ms=1)
            await start_beyond(it, COMMANDS, 1, tick_ms=1)
            assert await it.log.start_offset(COMMANDS, 0) == it.processor.state.row().consumed == 2
            await it.begin_again(store=MemoryStore())
            await it.send("w", signal(b"null"))
            assert await it.state_of("w") == "completed"

    run(test())


def test_commands_that_are_not_consumed_stay_however_old_they_are():
    async def test():
        async with world(flows.app, commands_kept_seconds=0.0, trim_seconds=0.0) as it:
            it.clock.at_ms = 1 << 45
            it.log.hold_appends = True
            await it.start("w", "listens")
            await settle()
            assert await it.log.start_offset(COMMANDS, 0) == 0 and len(it.log.appends) == 1
            await it.begin_again(store=MemoryStore())
            it.log.hold_appends = False
            for held in it.log.appends:
                await held.release()
            assert await it.state_of("w") == "running"

    run(test())


def test_a_store_is_not_closed_while_it_is_flushed():
    class Slow(MemoryStore):
        def __init__(self) -> None:
            super().__init__()
            self.flushing, self.goes_on = threading.Event(), threading.Event()

        def flush(self) -> None:
            self.flushing.set()
            assert self.goes_on.wait(20)

    async def test():
        store = Slow()
        async with world(flows.app, store=store, **SMALL) as it:
            await short_runs(it, 9)
            await until(store.flushing.is_set)
            it.processor.stop()
            await settle()
            assert it.task is not None and not it.task.done()
            store.goes_on.set()
            await it.task

    run(test())
