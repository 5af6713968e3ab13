"""What the processor is asked: commands, however odd, queries, and no more of them than it can take."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from streamflow.codec.avro import encode_command
from streamflow.config import RECORD_BYTES_MAX
from streamflow.core.commands import (
    CancelWorkflow,
    Command,
    FireTimer,
    Query,
    SignalWorkflow,
    StartWorkflow,
    TerminateWorkflow,
)
from streamflow.ids import partition_of
from streamflow.store.memory import MemoryStore
from streamflow.worker.processor import ProcessorState
from tests.worker import flows
from tests.worker.harness import run, settle, signal, turns, world

# ------------------------------------------------------------------------------------------------------------- commands


def test_a_refusal_leaves_after_the_turns_that_it_rests_on():
    async def test():
        async with world(flows.app) as it:
            await it.start("w", "listens")
            it.log.hold_appends = True
            await it.send("w", TerminateWorkflow())
            refused = await it.send("w", signal())
            assert refused not in await it.replies()
            await it.log.appends[0].release()
            reply = (await it.replies())[refused]
            assert not reply.accepted and reply.error is not None
            assert reply.error.type == "CommandRejected" and "terminated" in reply.error.message

    run(test())


def test_a_refused_command_that_nobody_waits_for_goes_to_the_dead_letters_as_it_came():
    async def test():
        async with world(flows.app) as it:
            await it.send("unknown", signal(b"42"), command_id="mine", reply_to=None)
            (letter,) = await it.dead_letters()
            assert (letter.key, letter.offset) == (b"unknown", 0) and "WorkflowNotFound" in letter.reason
            sent = Command(command_id="mine", workflow_id="unknown", sent_at=it.clock.at_ms, body=signal(b"42"))
            assert letter.value == encode_command(sent)
            assert await it.replies() == {}

    run(test())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "empty|framing|Command"),
        (b"garbage", "framing|Command"),
        (encode_command(Command(command_id="c", workflow_id="", sent_at=1, body=CancelWorkflow())), "1 to 255"),
        (encode_command(Command(command_id="c", workflow_id="w" * 256, sent_at=1, body=CancelWorkflow())), "1 to 255"),
        (
            encode_command(Command(command_id="c" * 600, workflow_id="w", sent_at=1, body=CancelWorkflow())),
            "command_id",
        ),
        (
            encode_command(
                Command(
                    command_id="c",
                    workflow_id="w",
                    sent_at=1,
                    body=StartWorkflow(workflow="listens", args=b"[]", delay_ms=(1 << 63) - 1),
                )
            ),
            "delay_ms is out of range",
        ),
        (
            encode_command(
                Command(
                    command_id="c",
                    workflow_id="w",
                    sent_at=1,
                    body=StartWorkflow(workflow="x" * (RECORD_BYTES_MAX - 60), args=b"[]"),
                )
            ),
            "can be recorded",
        ),
    ],
)
def test_garbage_goes_to_the_dead_letters_and_the_partition_goes_on(value: bytes, reason: str):
    import re

    async def test():
        async with world(flows.app) as it:
            await it.send_raw(value, b"key")
            (letter,) = await it.dead_letters()
            assert re.search(reason, letter.reason), letter.reason
            await it.start("fine", "listens")
            assert await it.state_of("fine") == "running"
            assert turns(await it.history())[0].consumed == 2

    run(test())


def test_a_command_that_cannot_be_recorded_is_refused_where_somebody_waits():
    async def test():
        async with world(flows.app) as it:
            body = StartWorkflow(workflow="listens", args=b"[" + b" " * (RECORD_BYTES_MAX - 400) + b"]")
            asked = await it.send("w", body)
            error = (await it.replies())[asked].error
            assert error is not None and error.type == "PayloadTooLarge"
            assert await it.dead_letters() == []

    run(test())


@pytest.mark.parametrize(
    "body",
    [
        StartWorkflow(workflow="x" * 900_000, args=b"[]"),
        StartWorkflow(workflow="listens", args=b"[" + b" " * 997_000 + b"]"),
        StartWorkflow(workflow="listens", args=b"[]", start_at=1 << 62),
        StartWorkflow(workflow="listens", args=b"[]", timeout_ms=1 << 62, delay_ms=-(1 << 62)),
        TerminateWorkflow(reason="r" * 997_000),
        FireTimer(kind="k" * 500_000, run=1 << 62, number=-5, attempt=7, fire_at=-1),
        SignalWorkflow(name="n" * 990_000),
    ],
    ids=lambda body: type(body).__name__,
)
def test_no_command_however_odd_stops_the_partition(body: Any):
    async def test():
        async with world(flows.app) as it:
            workflow_id = "w" * 255
            if not isinstance(body, StartWorkflow):
                await it.start(workflow_id, "listens")
            await it.send(workflow_id, body)
            await it.start("fine", "listens")
            assert it.task is not None and not it.task.done()
            assert await it.state_of("fine") == "running"
            await it.begin_again(store=MemoryStore())
            assert it.processor.status is ProcessorState.ACTIVE

    run(test())


def test_queries_are_answered_from_what_is_durable():
    async def test():
        async with world(flows.app) as it:
            await it.start("w", "line", b"[2]")
            it.log.hold_appends = True
            it.executor.complete("w", 0)
            await settle()
            status = await it.send("w", Query(query="status"))
            nothing = await it.send("x", Query(query="status"))
            listed = await it.send("", Query(query="list"))
            wrong = await it.send("w", Query(query="sing"))
            await it.send("w", Query(query="status"), reply_to=None)
            await it.log.appends[0].release()
            replies = await it.replies()
            assert msgspec.json.decode(replies[status].value or b"")["turn"] == 1
            assert [item["id"] for item in msgspec.json.decode(replies[listed].value or b"")["items"]] == ["w"]
            errors = [replies[asked].error for asked in (nothing, wrong)]
            assert [error.type for error in errors if error] == ["WorkflowNotFound", "InvalidArguments"]
            assert len(turns(await it.history())) == 2, "a query is no turn"

    run(test())


def test_a_query_that_breaks_is_answered_with_an_error_and_stops_nothing(monkeypatch: pytest.MonkeyPatch):
    def breaks(*_: Any) -> bytes:
        raise OverflowError("year 60056 is out of range")

    monkeypatch.setattr("streamflow.worker.intake.answer", breaks)

    async def test():
        async with world(flows.app) as it:
            asked = await it.send("w", Query(query="status"))
            error = (await it.replies())[asked].error
            assert error is not None and "year 60056" in error.message
            assert it.task is not None and not it.task.done()

    run(test())


def test_a_query_of_a_run_elsewhere_is_forwarded_and_answered_there():
    async def test():
        async with world(flows.app, partitions=2) as it:
            away = next(name for name in "abcdefgh" if partition_of(name, 2) == 1)
            await it.send(away, Query(query="status"))
            assert [command.workflow_id for command in await it.commands(1)] == [away]
            await it.send("", Query(query="list"))
            assert len(await it.commands(1)) == 1

    run(test())


def test_answers_that_came_while_the_log_was_slow_are_not_forgotten():
    async def test():
        async with world(flows.app, decided_turns_unacknowledged_max=0) as it:
            it.log.hold_appends = True
            await it.start("w", "line", b"[1]")
            held = it.log.appends[0]
            task = asyncio.ensure_future(it.send("w", Query(query="status")))
            asked = await task
            assert it.processor._answers or asked not in await it.replies()
            await held.release()
            await settle()
            assert asked in await it.replies()

    run(test())


# -------------------------------------------------------------------------------------------------------- back-pressure


def test_commands_stay_in_the_log_while_too_much_is_under_way():
    async def test():
        async with world(flows.app, decided_turns_unacknowledged_max=2, commands_read_max=2) as it:
            it.log.hold_appends = True
            for n in range(12):
                await it.start(f"w{n}", "listens")
            assert len(it.log.appends) == 3 and it.processor.core.next_command == 3
            while it.log.appends:
                await it.log.appends.pop(0).release()
            assert len(turns(await it.history())) == 12

    run(test())


def test_a_backlog_is_read_no_faster_than_it_is_decided():
    async def test():
        async with world(flows.app, commands_read_max=10) as it:
            await it.kill()
            for n in range(100):
                await it.start(f"w{n}", "listens")
            largest = 0
            processor = it.make()
            take = processor.core.command

            it.task = asyncio.ensure_future(processor.run())
            for _ in range(400):
                await asyncio.sleep(0)
                largest = max(largest, sum(map(len, processor.core._staged.values())))
            assert take is not None and 0 <= largest <= 10
            assert len(turns(await it.history())) == 100

    run(test())


def test_a_partition_without_work_of_its_own_wakes_up_when_the_executor_has_room():
    async def test():
        async with world(flows.app) as it:
            it.executor.is_full = True
            await it.start("a", "listens")  # read before the executor was looked at
            await it.start("b", "listens")
            assert await it.state_of("b") is None
            it.executor.make_room()
            await settle()
            assert await it.state_of("b") == "running"

    run(test())


def test_commands_wait_while_too_much_is_being_published():
    async def test():
        async with world(flows.app, outgoing_records_max=3) as it:
            it.log.hold_publishes = True
            await it.start("a", "listens")
            await it.start("b", "listens")
            await it.start("c", "listens")
            assert [turn.workflow_id for turn in turns(await it.history())] == ["a", "b"]
            while it.log.publishes:
                await it.log.publishes.pop(0).release()
            assert len(turns(await it.history())) == 3

    run(test())


def test_runs_that_only_wait_leave_memory_and_come_back_on_a_signal():
    async def test():
        async with world(flows.app, live_runs_max=2) as it:
            for n in range(6):
                await it.start(f"w{n}", "listens")
            await it.start("busy", "line", b"[1]")
            assert len(it.processor.core.live) == 2 and "busy" in it.processor.core.live
            for n in range(6):
                await it.send(f"w{n}", signal(b"%d" % n))
                await it.send(f"w{n}", signal(b"null"))
            assert [it.processor.state.status(f"w{n}").result for n in range(6)] == [  # type: ignore[union-attr]
                b"[%d]" % n for n in range(6)
            ]

    run(test())


def test_runs_that_cannot_leave_memory_do_not_keep_the_others_there():
    async def test():
        async with world(flows.app, live_runs_max=4) as it:
            for n in range(50):
                await it.start(f"busy{n}", "line", b"[1]")
            for n in range(20):
                await it.start(f"idle{n}", "listens")
            await it.send("idle0", signal())
            assert sum(name.startswith("idle") for name in it.processor.core.live) <= 2

    run(test())


# --------------------------------------------------------------------------------------------------------------- limits


def ids(partition: int, count: int) -> list[str]:
    """Ids of runs that belong to that partition, of two."""
    return [f"w{n}" for n in range(100) if partition_of(f"w{n}", 2) == partition][:count]


def test_a_batch_that_was_all_forwarded_while_too_much_was_under_way_leaves_the_partition_open():
    async def test():
        async with world(flows.app, partitions=2, decided_turns_unacknowledged_max=1) as it:
            one, other, later = ids(0, 3)
            (elsewhere,) = ids(1, 1)
            for workflow_id in (one, other):
                await it.start(workflow_id, "line", b"[2]")
            it.log.hold_publishes = True
            await it.send_raw(it.command_record(elsewhere, StartWorkflow(workflow="listens", args=b"[]")).value or b"")
            (forward,) = it.log.publishes
            it.log.hold_appends = True
            for workflow_id in (one, other):
                it.executor.complete(workflow_id, 0)
            await settle()
            assert it.processor.turns_in_flight == 2
            await forward.release()
            it.log.hold_publishes = it.log.hold_appends = False
            for held in (*it.log.appends, *it.log.publishes[1:]):
                await held.release()
            await it.start(later, "listens")
            assert await it.state_of(later) == "running"

    run(test())


def test_runs_that_were_loaded_in_vain_leave_memory():
    async def test():
        async with world(flows.app, live_runs_max=1) as it:
            for number in range(5):
                await it.start(f"w{number}", "listens")
            for number in range(5):
                await it.start(f"w{number}", "listens", if_exists="attach")
            assert len(it.processor.core.live) == 1

    run(test())


def test_answers_that_wait_for_an_append_count_as_outgoing():
    async def test():
        async with world(flows.app, outgoing_records_max=3) as it:
            await it.start("w", "listens")
            it.log.hold_appends = True
            await it.send("w", signal(b"1"))
            read = it.processor.core.next_command
            for _ in range(10):
                await it.send("w", StartWorkflow(workflow="listens", args=b"[]", if_exists="attach"))
            assert it.processor.core.next_command - read < 10
            it.log.hold_appends = False
            await it.log.appends[0].release()
            assert it.processor.core.next_command - read == 10
            assert len(await it.replies()) == 12

    run(test())
