"""The processor: durable first, then effects, in order; whatever fails is begun again from the log."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from streamflow.codec.avro import encode_command, encode_history
from streamflow.core.commands import (
    Command,
    SignalWorkflow,
    StartWorkflow,
    TerminateWorkflow,
)
from streamflow.core.events import Claim, Turn
from streamflow.errors import Fenced, Unavailable
from streamflow.ids import partition_of
from streamflow.logs.base import COMMANDS, HISTORY, REPLIES, STATUS, TIMERS, Outgoing
from streamflow.logs.open import open_log
from streamflow.store.memory import MemoryStore
from streamflow.worker.processor import ProcessorState
from tests.worker import flows
from tests.worker.harness import World, dump, run, settle, signal, turns, world

# ------------------------------------------------------------------------------------------ durable first, then effects


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


# ---------------------------------------------------------------------------------------------------------- taking over


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
            end, raced, rivals = it.log.log.append, list[int](), set[asyncio.Future[int]]()

            def append(partition: int, expected: int, records: Any) -> Any:
                if len(raced) < 2:
                    raced.append(1)
                    rival = Claim(term=10 + len(raced), owner="rival", at=1)
                    rivals.add(asyncio.ensure_future(end(partition, expected, [(b"", encode_history(rival))])))
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
            theirs = await open_log(it.log.log.url, app="test")  # a handle has one owner per partition
            rival = World(it.app, theirs)
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
            await theirs.close()

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
