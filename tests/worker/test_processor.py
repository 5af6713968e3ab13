"""The processor: durable first, then effects, in order; whatever fails is begun again from the log."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

import streamflow as sf
from streamflow.codec.avro import encode_command, encode_history
from streamflow.config import PAYLOAD_BYTES_MAX, RECORD_BYTES_MAX
from streamflow.core.commands import (
    CancelWorkflow,
    CleanupWorkflow,
    Command,
    FireTimer,
    Query,
    SignalWorkflow,
    StartWorkflow,
    TerminateWorkflow,
)
from streamflow.core.events import Claim, Turn
from streamflow.errors import Fenced, Unavailable
from streamflow.ids import partition_of
from streamflow.logs.base import COMMANDS, HISTORY, REPLIES, STATUS, TIMERS, Outgoing
from streamflow.store.memory import MemoryStore
from streamflow.worker.processor import Processor, ProcessorState
from streamflow.workflow.stepinfo import step_info
from tests.worker import flows
from tests.worker.harness import World, dump, run, settle, world


def signal(value: bytes = b"1") -> SignalWorkflow:
    return SignalWorkflow(name="s", value=value)


def turns(history: list[Any]) -> list[Turn]:
    return [record for record in history if isinstance(record, Turn)]


# ------------------------------------------------------------------------------------------- durable first, then effects


def test_nothing_of_a_turn_happens_before_its_append_is_acknowledged():
    async def test():
        async with world(flows.app) as it:
            it.log.hold_appends = True
            await it.start("w", "line", b"[1]")
            assert len(it.log.appends) == 1
            assert it.executor.started == [] and await it.replies() == {} and await it.records(STATUS) == []
            assert "w" not in {key[1:].decode() for key in dump(it.store) if key.startswith(b"S")}
            await it.log.appends[0].release()
            assert it.executor.started == [("w", 0, 1)]
            assert list(await it.replies()) == ["c0"] and await it.state_of("w") == "running"

    run(test())


def test_appends_are_pipelined_and_their_effects_come_in_order():
    async def test():
        async with world(flows.app) as it:
            it.log.hold_appends = True
            for name in ("a", "b", "c"):
                await it.start(name, "line", b"[1]")
            await it.send("a", TerminateWorkflow())
            assert [held.what[0].workflow_id for held in it.log.appends] == ["a", "b", "c", "a"]
            first, second, third, fourth = it.log.appends
            await first.release()
            assert it.executor.started == [], "a later turn has overtaken this one: the run is closed"
            await second.release()
            await third.release()
            assert it.executor.started == [("b", 0, 1), ("c", 0, 1)]
            assert list(await it.replies()) == ["c0", "c1", "c2"]
            await fourth.release()
            assert await it.state_of("a") == "terminated"

    run(test())


def test_a_run_is_decided_on_top_of_its_own_unacknowledged_turns():
    async def test():
        async with world(flows.app, live_runs_max=0) as it:
            it.log.hold_appends = True
            await it.start("w", "listens")
            it.processor.core.evict("w")  # as if memory had been needed: it must be loaded with what is not durable
            await it.send("w", signal(b"7"))
            await it.send("w", signal(b"null"))
            for held in it.log.appends:
                await held.release()
            assert await it.state_of("w") == "completed"
            assert it.processor.state.status("w").result == b"[7]"  # type: ignore[union-attr]

    run(test())


@pytest.mark.parametrize("error", [Fenced("other"), Unavailable("away"), None])
def test_an_append_that_fails_drops_everything(error: Exception | None):
    async def test():
        async with world(flows.app) as it:
            it.log.hold_appends = True
            await it.start("a", "line", b"[1]")
            await it.start("b", "line", b"[1]")
            first, second = it.log.appends
            if error is None:
                first.future.cancel()
            else:
                first.future.set_exception(error)
            second.future.set_exception(Fenced("builds on one that failed"))
            assert it.task is not None
            with pytest.raises(type(error or Unavailable("")), match=str(error or "the log was closed")):
                await it.task
            assert it.processor.status is ProcessorState.STOPPED
            assert not it.processor.core.live and it.executor.started == [] and await it.replies() == {}
            it.log.hold_appends = False
            await it.begin()
            assert list(it.executor.attempts) == [("a", 0), ("b", 0)], "the log has them still"

    run(test())


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_publish_that_fails_drops_everything_and_is_derived_again(cancelled: bool):
    async def test():
        async with world(flows.app) as it:
            it.log.hold_publishes = True
            await it.start("a", "sleeps", b"[5]")
            assert [record.topic for record in it.log.publishes[0].what] == [TIMERS, STATUS, REPLIES]
            if cancelled:
                it.log.publishes[0].future.cancel()
            else:
                it.log.publishes[0].future.set_exception(Unavailable("away"))
            assert it.task is not None
            with pytest.raises(Unavailable):
                await it.task
            it.log.hold_publishes = False
            await it.begin()
            assert [timer.workflow_id for timer in await it.timers()] == ["a"]
            assert await it.state_of("a") == "running" and list(await it.replies()) == ["c0"]
            published = await it.log.published_offset(0)
            assert published == len(await it.history())

    run(test())


def test_a_failure_after_the_processor_has_stopped_is_nobodys():
    async def test():
        async with world(flows.app) as it:
            it.log.hold_appends = True
            await it.start("a", "line", b"[1]")
            held = it.log.appends[0]
            await it.kill()
            await held.fail(Fenced("late"))
            assert not it.processor._failed.done()

    run(test())


def test_what_is_derived_again_is_derived_once():
    async def test():
        async with world(flows.app) as it:
            it.log.hold_publishes = True
            await it.start("a", "sleeps", b"[5]")
            it.log.hold_publishes = False
            await it.begin_again()
            replies, status = len(await it.records(REPLIES)), len(await it.records(STATUS))
            assert (replies, status) == (1, 1)
            await it.begin_again()
            assert (len(await it.records(REPLIES)), len(await it.records(STATUS))) == (1, 1)

    run(test())


def test_effects_are_derived_from_the_least_turn_also_when_a_zombies_record_lies_before_it():
    async def test():
        async with world(flows.app) as it:
            await it.start("w", "listens")
            it.log.hold_publishes = True
            await it.kill()
            # An owner of an older term gets a record in, of a turn that was decided on others which are lost.
            zombie = Turn(workflow_id="w", turn=9, term=0, seq=9, at=1, consumed=0, events=[])
            await it.log.log.append(0, await it.log.end_offset(HISTORY, 0), [(b"w", encode_history(zombie))])
            it.log.hold_publishes = False
            await it.begin()
            it.log.hold_publishes = True
            asked = await it.send("w", signal(b"1"))
            it.log.hold_publishes = False
            await it.begin_again()
            assert asked in await it.replies()

    run(test())


# --------------------------------------------------------------------------------------------------------- taking over


def test_open_attempts_run_again_after_a_restart_and_completed_steps_do_not():
    async def test():
        async with world(flows.app) as it:
            await it.start("w", "fan", b"[3]")
            it.executor.complete("w", 1)
            await settle()
            await it.begin_again(store=MemoryStore())
            assert sorted(it.executor.attempts) == [("w", 0), ("w", 2)]
            it.executor.complete("w", 0)
            it.executor.complete("w", 2)
            await settle()
            assert await it.state_of("w") == "completed"

    run(test())


def test_an_attempt_that_a_command_opens_during_recovery_starts_once():
    async def test():
        async with world(flows.app, pass_inputs_max=1) as it:
            for n in range(5):
                await it.start(f"w{n}", "mixed")
                await it.send(f"w{n}", signal())
            await it.kill()
            it.executor.started.clear()
            for n in range(5):
                it.executor.attempts.clear()
                await it.send(f"w{n}", SignalWorkflow(name="other"))
            await it.begin()
            await settle()
            assert sorted(it.executor.started) == [(f"w{n}", number, 1) for n in range(5) for number in (2, 3)]

    run(test())


def test_a_late_outcome_of_a_lost_attempt_changes_nothing():
    async def test():
        async with world(flows.app) as it:
            await it.start("w", "line", b"[1]")
            late = it.executor.attempts["w", 0]
            it.executor.complete("w", 0)
            await settle()
            before = await it.history()
            late.report(late.info, sf_completed())
            await settle()
            assert await it.history() == before

    run(test())


def sf_completed() -> Any:
    from streamflow.core.events import StepCompleted

    return StepCompleted(number=0, attempt=1, result=b"99")


def test_the_claim_moves_time_and_term_of_the_stored_row():
    async def test():
        async with world(flows.app) as it:
            it.clock.at_ms += 500
            await it.start("w", "listens")
            it.clock.at_ms -= 400  # the next owner's clock is behind
            await it.begin_again()
            row = it.processor.state.row()
            assert (row.term, row.seq, row.at) == (2, 0, 1_000_500)
            claims = [record for record in await it.history() if isinstance(record, Claim)]
            assert [claim.term for claim in claims] == [1, 2] and claims[1].at == 1_000_500

    run(test())


def test_a_claim_that_is_lost_to_another_owner_is_tried_above_its_term():
    async def test():
        async with world(flows.app) as it:
            await it.stop()
            processor = it.make()
            end, raced = it.log.log.append, []

            def append(partition: int, expected: int, records: Any) -> Any:
                if len(raced) < 2:
                    raced.append(1)
                    rival = Claim(term=10 + len(raced), owner="rival", at=1)
                    asyncio.ensure_future(end(partition, expected, [(b"", encode_history(rival))]))
                return end(partition, expected, records)

            it.log.append = append  # type: ignore[method-assign, assignment]
            it.task = asyncio.ensure_future(processor.run())
            await settle(200)
            assert processor.status is ProcessorState.ACTIVE and processor.core.term == 13

    run(test())


def test_an_owner_that_loses_every_claim_stands_down():
    async def test():
        async with world(flows.app) as it:
            await it.stop()

            def append(partition: int, expected: int, records: Any) -> asyncio.Future[int]:
                refused: asyncio.Future[int] = asyncio.get_running_loop().create_future()
                refused.set_exception(Fenced("rival"))
                return refused

            it.log.append = append  # type: ignore[method-assign, assignment]
            with pytest.raises(Fenced, match="5 claims of me were lost"):
                await it.make().run()

    run(test())


def test_an_owner_that_was_overtaken_is_fenced_at_its_next_append():
    async def test():
        async with world(flows.app) as it:
            await it.start("w", "listens")
            rival = World(it.app, it.log.log)
            await rival.begin("rival")
            first = it.task
            assert first is not None and not first.done()
            await it.send("w", signal(b"5"))
            await settle()
            with pytest.raises(Fenced):
                await first
            await rival.send("w", signal(b"null"), command_id="the rival's")
            assert rival.processor.state.status("w").result == b"[5]"  # type: ignore[union-attr]
            await rival.kill()

    run(test())


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("lost", ["appends", "publishes"])
def test_each_command_takes_effect_once_wherever_the_owner_dies(lost: str, fresh: bool):
    """Dies after each prefix of its writes, and comes back; the commands stay where they are."""

    async def whole(die_after: int) -> tuple[bytes | None, int]:
        async with world(flows.app) as it:
            await it.start("w", "listens")
            if lost == "appends":
                it.log.hold_appends = True
            else:
                it.log.hold_publishes = True
            for value in (b"1", b"2", b"3"):
                await it.send("w", signal(value))
            await it.send_raw(b"garbage")
            await it.send("w", signal(b"null"))
            held = it.log.appends if lost == "appends" else it.log.publishes
            total = len(held)
            for write in held[:die_after]:
                await write.release()
            it.log.hold_appends = it.log.hold_publishes = False
            await it.begin_again(store=MemoryStore() if fresh else None)
            await it.begin_again()
            found = it.processor.state.status("w")
            assert found is not None and found.state == "completed" and await it.state_of("w") == "completed"
            assert len(await it.replies()) == 5
            assert len(await it.dead_letters()) >= 1
            taken = [id for turn in turns(await it.history()) for id in turn.commands]
            assert len(taken) == len({applied.command_id for applied in taken}) == 5
            return found.result, total

    async def test():
        result, total = await whole(0)
        assert result == b"[1,2,3]" and total >= 4
        for die_after in range(1, total + 1):
            assert (await whole(die_after))[0] == b"[1,2,3]"

    run(test())


def test_a_forwarded_command_and_a_dead_letter_are_durable_before_they_count_as_consumed():
    async def test():
        async with world(flows.app, partitions=2) as it:
            home = next(name for name in "abcdefgh" if partition_of(name, 2) == 0)
            away = next(name for name in "abcdefgh" if partition_of(name, 2) == 1)
            it.log.hold_publishes = True
            command = Command(
                command_id="f", workflow_id=away, sent_at=1, body=StartWorkflow(workflow="listens", args=b"[]")
            )
            start = Command(
                command_id="s", workflow_id=home, sent_at=1, body=StartWorkflow(workflow="listens", args=b"[]")
            )
            records = [
                Outgoing(COMMANDS, 0, b"", value) for value in (encode_command(command), b"junk", encode_command(start))
            ]
            await it.log.log.publish(records)
            await settle()
            assert turns(await it.history()) == [], "the run starts when what came before it is safe elsewhere"
            await it.kill()
            it.log.hold_publishes = False
            await it.begin()
            assert [found.command_id for found in await it.commands(1)] == ["f"]
            assert [letter.offset for letter in await it.dead_letters()] == [1]
            assert await it.state_of(home) == "running"
            await it.begin_again()
            assert len(await it.commands(1)) == 1 and len(await it.dead_letters()) == 1

    run(test())


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


# ------------------------------------------------------------------------------------------------------------ large turns


def test_a_turn_larger_than_a_record_is_written_in_parts_and_restored():
    large = b'"' + b"x" * 300_000 + b'"'

    async def test():
        async with world(flows.app) as it:
            await it.start("w", "listens")
            await it.kill()
            for _ in range(8):
                await it.send("w", signal(large))
            await it.begin()
            found = turns(await it.history())[1:]
            assert [turn.part for turn in found] == list(range(len(found))) and len(found) >= 3
            assert [turn.last for turn in found] == [False] * (len(found) - 1) + [True]
            state = dump(it.store)
            assert len(it.processor.state.turns("w")) == 2
            await it.begin_again(store=MemoryStore())
            assert {key: value for key, value in dump(it.store).items() if key != b"P"} == {
                key: value for key, value in state.items() if key != b"P"
            }
            await it.send("w", signal(b"null"))
            status = it.processor.state.status("w")
            assert status is not None and status.error is not None
            assert status.error.type == "streamflow.errors.PayloadTooLarge", "its result is more than a record holds"

    run(test())


def test_parts_that_were_cut_off_are_decided_again_from_the_command():
    large = b'"' + b"x" * 300_000 + b'"'

    async def test():
        async with world(flows.app) as it:
            await it.start("w", "listens")
            await it.kill()
            for _ in range(8):
                await it.send("w", signal(large))
            it.log.hold_appends = False
            appended = it.log.log.append

            def torn(partition: int, expected: int, records: Any) -> Any:
                if len(records) > 1:  # a log that takes records one by one, and its writer dies after two of them
                    asyncio.ensure_future(appended(partition, expected, records[:2]))
                    return asyncio.get_running_loop().create_future()
                return appended(partition, expected, records)

            it.log.append = torn  # type: ignore[method-assign, assignment]
            await it.begin()
            assert len(turns(await it.history())) == 3
            it.log.append = appended  # type: ignore[method-assign]
            await it.begin_again()
            assert len(it.processor.state.turns("w")[1].events) >= 16

    run(test())


def test_a_turn_that_barely_misses_a_record_with_its_key_is_split():
    async def test():
        workflow_id = "w" * 255
        async with world(flows.app) as it:
            await it.start(workflow_id, "listens")
            for size in range(RECORD_BYTES_MAX - 3_000, RECORD_BYTES_MAX - 2_200, 97):
                await it.send(workflow_id, SignalWorkflow(name="other", value=b"1" * size))
            assert it.task is not None and not it.task.done()

    run(test())


# --------------------------------------------------------------------------------------------------------------- blocked


def blocking(versions: list[Callable[[sf.Registry], None]]) -> list[sf.Registry]:
    apps = [sf.Registry() for _ in versions]
    for app, build in zip(apps, versions, strict=True):
        build(app)
    return apps


def version(argument: int, *, endless: bool = False, other_name: bool = False) -> Callable[[sf.Registry], None]:
    def build(app: sf.Registry) -> None:
        @app.step
        async def work(n: int) -> int:
            return n

        @app.workflow(name="other" if other_name else "flow")
        async def flow() -> int:
            found = await work(argument)
            await sf.wait_signal("go")
            while endless:
                await asyncio.sleep(0)
            return found

    return build


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (version(2), "no longer fits its history at step 0"),
        (version(1, other_name=True), "which this worker's app does not have"),
        (version(1, endless=True), "callbacks without waiting"),
    ],
    ids=["changed arguments", "unknown workflow", "never awaiting"],
)
def test_code_that_does_not_fit_blocks_the_run_until_fitting_code_comes(
    bad: Callable[[sf.Registry], None], said: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    caplog.set_level(logging.CRITICAL, logger="streamflow")
    good_app, bad_app = blocking([version(1), bad])

    async def test():
        async with world(good_app) as it:
            await it.start("w", "flow")
            it.executor.complete("w", 0, b"5")
            await settle()
            it.app = bad_app
            await it.begin_again()
            await it.send("w", SignalWorkflow(name="go"))
            assert await it.state_of("w") == "blocked"
            status = it.processor.state.status("w")
            assert status is not None and status.error is not None and said in status.error.message
            assert it.task is not None and not it.task.done()
            await it.begin_again()
            assert await it.state_of("w") == "blocked", "still the same code"
            it.app = good_app
            await it.begin_again(store=MemoryStore())
            assert await it.state_of("w") == "completed"
            status = it.processor.state.status("w")
            assert status is not None and status.result == b"5" and status.error is None

    run(test())


# -------------------------------------------------------------------------------------------------------------- stopping


def test_a_graceful_stop_makes_durable_what_is_decided_and_leaves_attempts_to_the_next_owner():
    async def test():
        async with world(flows.app) as it:
            await it.start("w", "fan", b"[2]")
            it.log.hold_appends = it.log.hold_publishes = True
            it.executor.complete("w", 0)
            it.executor.complete("w", 1)
            await settle()
            it.processor.stop()
            await settle()
            assert it.task is not None and not it.task.done()
            await it.log.appends[0].release()
            assert not it.task.done(), "its status is not published yet"
            await it.log.publishes[-1].release()
            await it.task
            assert await it.state_of("w") == "completed" and it.executor.attempts == {}

    run(test())


def test_a_stopping_owner_begins_no_attempt_that_it_would_only_cut_off():
    async def test():
        async with world(flows.app) as it:
            it.log.hold_appends = True
            await it.start("a", "line", b"[1]")
            await it.start("b", "careful")
            it.processor.stop()
            await settle()
            for held in it.log.appends:
                await held.release()
            assert it.task is not None
            await it.task
            assert it.executor.started == [] and len(it.log.appends) == 2
            it.log.hold_appends = False
            await it.begin()
            assert sorted(it.executor.started) == [("a", 0, 1), ("b", 0, 1)]

    run(test())


def test_a_stop_gives_up_on_a_log_that_does_not_answer(caplog: pytest.LogCaptureFixture):
    async def test():
        async with world(flows.app, stop_seconds=0.01) as it:
            it.log.hold_appends = True
            await it.start("a", "line", b"[1]")
            await it.stop()
            assert "appends still under way" in caplog.text

    run(test())


def test_a_stop_during_the_restore_ends_it_without_a_claim():
    async def test():
        async with world(flows.app) as it:
            await it.stop()
            processor = it.make()
            reading = asyncio.Event()

            async def forever(topic: str, partition: int) -> int:
                reading.set()
                await asyncio.Event().wait()
                raise AssertionError

            it.log.end_offset = forever
            it.task = asyncio.ensure_future(processor.run())
            await reading.wait()
            processor.stop()
            await it.task
            assert len(await it.history()) == 1

    run(test())


def test_an_at_most_once_step_that_was_running_is_failed_and_not_run_again():
    async def test():
        async with world(flows.app) as it:
            await it.start("w", "careful")
            assert it.executor.started == [("w", 0, 1)]
            await it.begin_again()
            assert it.executor.started == [("w", 0, 1)]
            status = it.processor.state.status("w")
            assert status is not None and status.error is not None and status.state == "failed"
            assert "at most once" in status.error.message

    run(test())


def test_the_end_of_the_log_is_a_failure_and_no_stop():
    async def test():
        async with world(flows.app) as it:
            await it.log.log.close()
            assert it.task is not None
            with pytest.raises(Unavailable):
                await it.task

    run(test())


def test_a_broken_invariant_is_said_loudly_and_drops_everything(caplog: pytest.LogCaptureFixture):
    async def test():
        async with world(flows.app) as it:
            it.processor.core.decide = lambda now: 1 // 0  # type: ignore[method-assign, assignment, return-value]
            await it.start("w", "listens")
            assert it.task is not None
            with pytest.raises(ZeroDivisionError):
                await it.task
            assert "deciding failed" in caplog.text

    run(test())


def test_a_store_that_breaks_drops_everything(caplog: pytest.LogCaptureFixture):
    async def test():
        async with world(flows.app) as it:
            it.store.write = lambda *a, **k: 1 // 0  # type: ignore[method-assign, assignment, return-value]
            await it.start("w", "listens")
            assert it.task is not None
            with pytest.raises(ZeroDivisionError):
                await it.task
            assert await it.replies() == {} and "applying failed" in caplog.text

    run(test())


def test_half_a_turn_is_never_written_when_ctrl_c_hits_the_code():
    app = sf.Registry()

    @app.workflow
    async def interrupted() -> None:
        raise KeyboardInterrupt

    histories: list[list[Any]] = []
    processors: list[Processor] = []

    async def test():
        async with world(app) as it:
            processors.append(it.processor)
            try:
                await it.start("w", "interrupted")
                await asyncio.Event().wait()
            finally:
                histories.append(await it.history())

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(test())
    assert [turns(history) for history in histories] == [[]]
    assert processors[0].status is ProcessorState.STOPPED


def test_workflow_code_sees_nothing_of_the_steps_that_wake_it():
    app = sf.Registry()
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    @app.step
    async def work(n: int) -> int:
        return n

    @app.workflow
    async def looks() -> None:
        seen.append(variable.get())
        await work(1)
        with pytest.raises(sf.InvalidArguments):
            step_info()
        seen.append(variable.get())

    async def test():
        async with world(app) as it:
            variable.set("the sender's")
            await it.start("w", "looks")

            def from_a_step() -> None:
                variable.set("the step's")
                it.executor.complete("w", 0)

            contextvars.copy_context().run(from_a_step)
            await settle()
            assert await it.state_of("w") == "completed"
            assert seen == ["unset", "unset"]

    run(test())


def test_the_largest_payloads_go_through_step_and_run():
    async def test():
        large = b"1" * PAYLOAD_BYTES_MAX
        async with world(flows.app) as it:
            await it.start("w", "line", b"[1]")
            it.executor.complete("w", 0, large)
            await settle()
            assert it.task is not None and not it.task.done()
            await it.send("w", CleanupWorkflow(force=True))
            assert await it.state_of("w") is None

    run(test())
