"""Commands that make no turn: the history says that they are consumed, so that no owner takes them for new."""

from __future__ import annotations

import asyncio

import pytest

from streamflow.core.commands import Body, Query, SignalWorkflow, StartWorkflow
from streamflow.core.events import Consumed, RunSnapshot
from streamflow.ids import partition_of
from streamflow.logs.base import COMMANDS
from streamflow.store.memory import MemoryStore
from streamflow.worker.consumed import Unsaid
from tests.worker import flows
from tests.worker.harness import World, run, settle, signal, world

HERE, NOBODY = [f"w{number}" for number in range(9) if partition_of(f"w{number}", 2) == 0][:2]
ELSEWHERE = next(f"w{number}" for number in range(9) if partition_of(f"w{number}", 2) == 1)


async def said(it: World) -> list[int]:
    """What the records of their own say is consumed, in order."""
    return [record.consumed for record in await it.history() if isinstance(record, Consumed)]


@pytest.mark.parametrize("keeps_its_state", [True, False])
def test_a_command_of_another_partition_is_forwarded_by_one_owner(keeps_its_state: bool):
    async def test():
        async with world(flows.app, partitions=2) as it:
            await it.send(ELSEWHERE, StartWorkflow(workflow="brief", args=b"[]"))
            assert len(await it.records(COMMANDS, 1)) == 1
            assert await said(it) == [1]
            await it.begin_again(store=None if keeps_its_state else MemoryStore())
            assert len(await it.records(COMMANDS, 1)) == 1
            await it.start("a", "brief")
            assert await it.state_of("a") == "running"

    run(test())


def test_garbage_and_what_nobody_waits_for_are_buried_by_one_owner():
    async def test():
        async with world(flows.app) as it:
            await it.send_raw(b"garbage")
            await it.send("nobody", signal(), reply_to=None)
            letters = await it.dead_letters()
            assert [letter.offset for letter in letters] == [0, 1]
            assert await said(it) == [1, 2]
            await it.begin_again(store=MemoryStore())
            assert await it.dead_letters() == letters

    run(test())


def test_it_is_said_once_what_was_consumed_is_durable_elsewhere():
    async def test():
        async with world(flows.app) as it:
            it.log.hold_publishes = True
            await it.send("nobody", signal(), reply_to=None)
            (letter,) = it.log.publishes
            assert await said(it) == []
            await it.begin_again(store=MemoryStore())
            assert len(it.log.publishes) == 1, "the next owner buries it, since nobody has"
            await letter.fail(RuntimeError("the process is gone"))

    run(test())


def test_questions_are_said_when_they_are_many():
    async def test():
        async with world(flows.app, consumed_unsaid_max=2) as it:
            question: Body = Query(query="status", params=b"{}")
            for expected in ([], [], [3], [3]):
                await it.send("a", question)
                assert await said(it) == expected
            await it.send("a", SignalWorkflow(name="x", value=b"1", error=None))  # refused, and answered
            await it.begin_again(store=MemoryStore())
            replies = len(await it.replies())
            await settle()
            assert replies == 5, "each command has an answer"
            assert await said(it) == [3]

    run(test())


def test_a_turn_says_it_as_well():
    async def test():
        async with world(flows.app, consumed_unsaid_max=1) as it:
            for name in "abc":
                await it.start(name, "brief")
            assert await said(it) == []

    run(test())


def test_it_is_not_said_while_a_letter_waits_for_a_turn():
    async def test():
        async with world(flows.app, partitions=2) as it:
            it.log.hold_appends = True
            await it.start(HERE, "brief")
            await it.send(NOBODY, signal(), reply_to=None)  # its letter waits for the turn that is under way
            await it.send(ELSEWHERE, StartWorkflow(workflow="brief", args=b"[]"))
            (turn,) = it.log.appends
            it.log.hold_publishes = True
            await turn.release()
            it.log.hold_appends = it.log.hold_publishes = False
            await it.begin_again(store=MemoryStore())
            assert [letter.offset for letter in await it.dead_letters()] == [1]

    run(test())


def test_what_is_appended_in_between_leaves_it_due(monkeypatch: pytest.MonkeyPatch):
    async def test():
        async with world(flows.app, partitions=2) as it:
            await it.start(HERE, "listens")
            processor, loop = it.processor, asyncio.get_running_loop()
            copy = processor.trimmer._snapshot(HERE)
            assert copy is not None
            hurry = processor._unsaid.hurry

            def then_it_is_the_trimmers_turn(consumed: int) -> None:
                hurry(consumed)
                loop.call_soon(processor.copy_forward, [copy])

            monkeypatch.setattr(processor._unsaid, "hurry", then_it_is_the_trimmers_turn)
            await it.send(ELSEWHERE, StartWorkflow(workflow="brief", args=b"[]"))
            assert any(isinstance(record, RunSnapshot) for record in await it.history())
            await it.begin_again(store=MemoryStore())
            assert len(await it.records(COMMANDS, 1)) == 1

    run(test())


def test_when_it_is_due():
    unsaid = Unsaid(2)
    assert [unsaid.is_due(consumed) for consumed in range(4)] == [False, False, False, True]
    unsaid.said(5)
    assert [unsaid.is_due(consumed) for consumed in (5, 7, 8)] == [False, False, True]
    unsaid.hurry(6)
    assert [unsaid.is_due(consumed) for consumed in (5, 6)] == [False, True]
    unsaid.said(5)
    assert unsaid.is_due(6), "what was said did not cover it"
    unsaid.said(6)
    assert not unsaid.is_due(8) and unsaid.is_due(9)
