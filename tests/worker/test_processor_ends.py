"""Where the processor comes to an end: a record too small, code that does not fit, a stop, a fault."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from typing import Any

import pytest

import streamflow as sf
from streamflow.config import PAYLOAD_BYTES_MAX, RECORD_BYTES_MAX
from streamflow.core.commands import (
    CleanupWorkflow,
    SignalWorkflow,
)
from streamflow.errors import Unavailable
from streamflow.store.memory import MemoryStore
from streamflow.worker.processor import Processor, ProcessorState
from streamflow.workflow.stepinfo import step_info
from tests.worker import flows
from tests.worker.harness import dump, run, settle, signal, turns, world

# ---------------------------------------------------------------------------------------------------------- large turns


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
            appended, cut_off = it.log.log.append, set[asyncio.Future[int]]()

            def torn(partition: int, expected: int, records: Any) -> Any:
                if len(records) > 1:  # a log that takes records one by one, and its writer dies after two of them
                    cut_off.add(asyncio.ensure_future(appended(partition, expected, records[:2])))
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


# -------------------------------------------------------------------------------------------------------------- blocked


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
            while endless:  # noqa: ASYNC110 - the mistake that is tested
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


# ------------------------------------------------------------------------------------------------------------- stopping


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
            before = asyncio.all_tasks()
            await it.stop()
            assert "appends still under way" in caplog.text
            assert not asyncio.all_tasks() - before, "nothing waits on, for the loop's end to complain about"

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

            it.log.log.end_offset = forever  # type: ignore[method-assign]
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
            it.store.write = lambda *a, **k: 1 // 0  # type: ignore[method-assign, assignment]
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
