"""The processor and its timers: what is due is taken in, in time and by a true owner; what is over is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from streamflow.codec.avro import encode_timer
from streamflow.core.commands import CleanupWorkflow
from streamflow.errors import Fenced, InvalidArguments
from streamflow.logs.base import COMMANDS, TIMERS, Outgoing, Record
from streamflow.worker.processor import ProcessorState
from tests.worker import flows
from tests.worker.harness import START, World, run, settle, signal, turns, world


def test_timers_that_are_due_make_one_pass_and_no_command():
    async def test():
        async with world(flows.app) as it:
            for workflow_id in ("a", "b", "c"):
                await it.start(workflow_id, "sleeps", b"[1]")
            commands = len(await it.records(COMMANDS))
            timers = await it.timers()
            it.log.hold_appends = True
            await it.fire(*timers)
            (append,) = it.log.appends
            assert [turn.workflow_id for turn in append.what] == ["a", "b", "c"]
            assert {turn.at for turn in append.what} == {it.clock.at_ms}
            assert len(await it.timers()) == 3, "nothing is dropped before the turns are durable"
            await append.release()
            assert await it.timers() == []
            assert [await it.state_of(workflow_id) for workflow_id in "abc"] == ["completed"] * 3
            assert len(await it.records(COMMANDS)) == commands

    run(test())


def test_an_owner_that_was_replaced_unheard_drops_no_timer_of_its_successor():
    """It does not know the successor's run, as if the run were gone: its tombstone would let the run sleep for ever."""

    async def nothing(*_: Any, **__: Any) -> AsyncIterator[list[Record]]:
        await asyncio.Event().wait()
        yield []

    async def test():
        async with world(flows.app) as it:
            await it.kill()
            it.log.instead(follow=nothing)
            await it.begin()
            successor = World(flows.app, it.log.log)
            await successor.begin("successor")
            await successor.start("a", "sleeps", b"[1]")
            timers = await it.timers()
            assert len(timers) == 1
            await it.fire(*timers)
            assert await it.timers() == timers
            assert it.task is not None
            with pytest.raises(Fenced, match="expected the history to end at offset 2 at most, found 4"):
                await it.task
            await successor.fire(*timers)
            assert (await it.state_of("a"), await it.timers()) == ("completed", [])
            await successor.stop()

    run(test())


def test_an_unknown_timer_is_the_next_runs_where_that_began_while_the_log_was_asked():
    async def test():
        async with world(flows.app) as it:
            at = START + 1_000
            await it.start("a", "sleeps", b"[1]", start_at=at)
            (timer,) = await it.timers()
            await it.send("a", CleanupWorkflow(force=True))
            assert await it.timers() == []
            asked, answered = asyncio.Event(), asyncio.Event()
            end_offset = it.log.log.end_offset

            async def slow(topic: str, partition: int) -> int:
                end = await end_offset(topic, partition)
                asked.set()
                await answered.wait()
                return end

            it.log.instead(end_offset=slow)
            await it.fire(timer)
            await asked.wait()
            await it.start("a", "sleeps", b"[1]", start_at=at)  # the same id and instant: the same key
            answered.set()
            await settle()
            assert await it.state_of("a") == "running"
            (sleeping,) = await it.timers()
            assert sleeping.kind == "sleep"

    run(test())


@pytest.mark.parametrize("rounds_between", range(6))
def test_unknown_timers_that_come_while_others_are_asked_about_are_dropped_too(rounds_between: int):
    async def test():
        async with world(flows.app, pass_inputs_max=2) as it:
            asked: list[int] = []
            end_offset = it.log.log.end_offset

            async def counted(topic: str, partition: int) -> int:
                asked.append(partition)
                return await end_offset(topic, partition)

            for name in "abcdef":
                await it.start(name, "sleeps", b"[1]")
            timers = await it.timers()
            for name in "abcdef":
                await it.send(name, CleanupWorkflow(force=True))
            it.log.instead(end_offset=counted)
            it.clock.advance_to(max(timer.fire_at for timer in timers))
            # As an owner left them that died before its tombstones were out.
            await it.log.log.publish([Outgoing(TIMERS, 0, timer.key, encode_timer(timer)) for timer in timers])
            handed = []
            for some in (timers[:1], timers[1:3], timers[3:]):
                handed.append(asyncio.create_task(it.processor.fire(list(map(encode_timer, some)), it.clock.at_ms)))
                await settle(rounds_between)
            await asyncio.gather(*handed)
            await settle()
            assert await it.timers() == []
            assert len(asked) <= len(timers), "each is asked about once"
            assert it.processor.strays._sure == set()
            await it.start("g", "brief")
            assert await it.state_of("g") == "running"

    run(test())


def test_what_asking_for_the_end_of_the_history_raises_fails_the_processor(caplog: pytest.LogCaptureFixture):
    async def test():
        async with world(flows.app) as it:
            await it.start("a", "sleeps", b"[1]")
            (timer,) = await it.timers()
            await it.send("a", CleanupWorkflow(force=True))

            async def denied(topic: str, partition: int) -> int:
                raise InvalidArguments("this principal may not read test.history")

            it.log.instead(end_offset=denied)
            await it.fire(timer)
            assert it.task is not None
            with pytest.raises(InvalidArguments, match="may not read"):
                await it.task
            assert "strays-p0 failed" in caplog.text

    run(test())


def test_a_timer_counts_from_the_instant_at_which_it_was_found_due():
    async def test():
        async with world(flows.app) as it:
            await it.start("a", "sleeps", b"[1]")
            (timer,) = await it.timers()
            it.clock.advance_to(timer.fire_at + 30)
            await it.processor.fire([encode_timer(timer)], timer.fire_at + 10)
            await settle()
            assert [turn.at for turn in turns(await it.history_of("a"))][-1] == timer.fire_at + 10

    run(test())


def test_timers_wait_for_room_and_count_from_when_there_is():
    async def test():
        async with world(flows.app) as it:
            await it.start("a", "sleeps", b"[1]")
            (timer,) = await it.timers()
            it.clock.advance_to(timer.fire_at)
            it.executor.is_full = True
            fire = asyncio.create_task(it.processor.fire([encode_timer(timer)], timer.fire_at))
            await settle()
            assert not fire.done() and await it.state_of("a") == "running"
            it.clock.advance_to(timer.fire_at + 5_000)
            it.executor.make_room()
            await fire
            await settle()
            assert await it.state_of("a") == "completed"
            assert [turn.at for turn in turns(await it.history_of("a"))][-1] == timer.fire_at + 5_000

    run(test())


@pytest.mark.parametrize(("held_up_ms", "taken_in_after_ms"), [(200, 0), (5_000, 5_000)])
def test_timers_that_were_handed_over_together_have_one_instant_unless_the_log_holds_them_up(
    held_up_ms: int, taken_in_after_ms: int
):
    async def test():
        async with world(flows.app, pass_inputs_max=1, decided_turns_unacknowledged_max=0) as it:
            await it.start("a", "sleeps", b"[1]")
            await it.start("b", "sleeps", b"[1]")
            timers = await it.timers()
            at = max(timer.fire_at for timer in timers)
            it.clock.advance_to(at)
            it.log.hold_appends = True
            fire = asyncio.create_task(it.processor.fire(list(map(encode_timer, timers)), at))
            await settle()
            assert len(it.log.appends) == 1 and not fire.done()
            it.clock.advance_to(at + held_up_ms)
            it.log.hold_appends = False
            await it.log.appends[0].release()
            await fire
            await settle()
            taken_in = [[turn.at for turn in turns(await it.history_of(each.workflow_id))][-1] for each in timers]
            assert taken_in == [at, at + taken_in_after_ms]

    run(test())


def test_timers_wait_until_the_runs_that_need_attention_had_theirs():
    async def test():
        async with world(flows.app) as it:
            await it.start("a", "sleeps", b"[1]")
            (timer,) = await it.timers()
            await it.kill()
            it.clock.advance_to(timer.fire_at)
            it.executor.is_full = True
            processor = it.make()
            fire = asyncio.create_task(processor.fire([encode_timer(timer)], timer.fire_at))
            await settle()
            assert processor.status is ProcessorState.RESTORING and not fire.done()
            it.executor.make_room()
            it.task = asyncio.create_task(processor.run())
            await fire
            await settle()
            assert await it.state_of("a") == "completed"

    run(test())


def test_timers_that_come_while_the_processor_stops_are_the_next_owners():
    async def test():
        async with world(flows.app) as it:
            await it.start("a", "sleeps", b"[1]")
            (timer,) = await it.timers()
            it.clock.advance_to(timer.fire_at)
            it.log.hold_appends = True
            await it.send("a", signal())
            it.processor.stop()
            await settle()
            assert it.processor.status is ProcessorState.STOPPING
            fire = asyncio.create_task(it.processor.fire([encode_timer(timer)], timer.fire_at))
            await settle()
            await it.log.appends[0].release()
            assert it.task is not None
            await it.task
            assert not fire.done() and len(it.log.appends) == 1
            fire.cancel()
            assert await it.state_of("a") == "running" and await it.timers() == [timer]

    run(test())
