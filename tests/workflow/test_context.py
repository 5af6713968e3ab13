"""What workflow code calls as `sf.…`: the same on replay, and an error outside."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

import streamflow as sf
from streamflow.core.commands import CancelWorkflow, SignalWorkflow, TerminateWorkflow
from streamflow.errors import InvalidArguments, NotInWorkflow
from streamflow.store.memory import MemoryStore
from tests.worker.harness import START, World, run, world


def app_of(flow: Callable[..., Any]) -> sf.Registry:
    app = sf.Registry()
    app.workflow(name="flow")(flow)
    return app


async def result(it: World, workflow_id: str = "w") -> Any:
    status = it.processor.state.status(workflow_id)
    assert status is not None
    assert status.error is None, status.error
    assert status.result is not None, status.waiting_on
    return msgspec.json.decode(status.result)


async def error(it: World, workflow_id: str = "w") -> sf.ErrorInfo:
    status = it.processor.state.status(workflow_id)
    assert status is not None and status.error is not None, status
    return status.error


def signal(value: Any = None, name: str = "s") -> SignalWorkflow:
    return SignalWorkflow(name=name, value=None if value is None else msgspec.json.encode(value))


# -------------------------------------------------------------------------------------------------------------- signals


def test_signals_are_taken_in_order_of_arrival_also_those_sent_before():
    async def flow() -> list[int]:
        await sf.wait_signal("begin")
        return [await sf.wait_signal("s", int) for _ in range(3)]

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("w", "flow")
            for n in (1, 2):
                await it.send("w", signal(n))
            await it.send("w", signal(name="begin"))
            await it.send("w", signal(3))
            assert await result(it) == [1, 2, 3]

    run(test())


def test_a_signal_sent_before_a_delayed_run_begins_is_kept_for_it():
    async def flow() -> int:
        return await sf.wait_signal("s", int)

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("w", "flow", delay_ms=1000)
            await it.send("w", signal(5))
            (timer,) = await it.timers()
            await it.begin_again()
            await it.fire(timer)
            assert await result(it) == 5

    run(test())


@pytest.mark.parametrize("seconds", [2.5, timedelta(seconds=2.5)])
def test_a_signal_that_does_not_come_in_time_is_a_timeout(seconds: Any):
    async def flow() -> str:
        try:
            await sf.wait_signal("s", timeout=seconds)
        except TimeoutError:
            return f"late {await sf.wait_signal('s')}"
        return "in time"

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("w", "flow")
            (timer,) = await it.timers()
            assert timer.fire_at == START + 2500
            await it.fire(timer)
            await it.send("w", signal(1))
            assert await result(it) == "late 1"

    run(test())


def test_a_timeout_of_zero_takes_a_signal_that_is_there_and_waits_for_none():
    async def flow() -> list[int]:
        heard = []
        while True:
            try:
                heard.append(await sf.wait_signal("s", int, timeout=0))
            except TimeoutError:
                return heard

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("w", "flow", delay_ms=5)
            await it.send("w", signal(1))
            await it.send("w", signal(2))
            await it.fire((await it.timers())[0])
            await it.fire((await it.timers())[0])
            assert await result(it) == [1, 2] and await it.timers() == []

    run(test())


def test_a_signal_sent_as_an_error_raises_it():
    async def flow() -> str:
        try:
            await sf.wait_signal("s")
        except sf.SignalError as error:
            return f"{error.name}: {error.error}"
        return ""

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("w", "flow")
            await it.send("w", SignalWorkflow(name="s", error="refused"))
            assert await result(it) == "s: refused"

    run(test())


def test_a_signal_of_another_type_is_an_error_that_says_so():
    async def flow() -> str:
        try:
            await sf.wait_signal("s", int)
        except InvalidArguments as error:
            return str(error)
        return ""

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("w", "flow")
            await it.send("w", signal("text"))
            assert "expected `int`, found `str`" in await result(it)

    run(test())


def test_a_wait_that_cannot_be_is_refused_before_it_begins():
    async def flow() -> list[str]:
        said = []
        for arguments in (
            {"name": ""},
            {"name": "s", "timeout": -1},
            {"name": "s", "timeout": "x"},
            {"name": "s", "type": object()},
        ):
            try:
                await sf.wait_signal(**arguments)
            except (InvalidArguments, TypeError) as error:
                said.append(type(error).__name__)
        return said

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("w", "flow")
            assert await result(it) == ["InvalidArguments"] * 3 + ["TypeError"]

    run(test())


# ----------------------------------------------------------------------------------------------------------------- time


def test_sleeping_until_an_instant_is_a_timer_of_that_instant_and_nothing_when_it_is_past():
    at = datetime.fromtimestamp(START / 1000 + 7.25, UTC)

    async def flow() -> float:
        await sf.sleep_until(datetime(1970, 1, 1, tzinfo=UTC))
        await sf.sleep_until(at)
        return (sf.now() - at).total_seconds()

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("w", "flow")
            (timer,) = await it.timers()
            assert timer.fire_at == START + 7250
            await it.fire(timer)
            assert await result(it) == 0

    run(test())


def test_a_naive_instant_is_refused():
    async def flow() -> None:
        await sf.sleep_until(datetime(2030, 1, 1))  # noqa: DTZ001 - naive on purpose

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("w", "flow")
            found = await error(it)
            assert found.type == "streamflow.errors.InvalidArguments" and "naive" in found.message

    run(test())


@pytest.mark.parametrize("seconds", [1e15, 1e300])
def test_a_sleep_past_the_end_of_the_calendar_never_ends_and_breaks_nothing(seconds: float):
    async def flow() -> None:
        await asyncio.sleep(seconds)  # tidy: durable, on the loop of the run

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("w", "flow")
            (timer,) = await it.timers()
            assert datetime.fromtimestamp(timer.fire_at / 1000, UTC).year == 9999
            await it.send("w", CancelWorkflow())
            assert await it.state_of("w") == "cancelled" and await it.timers() == []

    run(test())


# --------------------------------------------------------------------------------------------------- the same on replay


def test_time_chance_and_ids_are_the_same_after_the_run_left_memory():
    lives: list[list[Any]] = []

    async def flow() -> list[Any]:
        seen: list[Any] = []
        lives.append(seen)
        for _ in range(3):
            seen.append([sf.now().timestamp(), sf.random().random(), sf.random().randint(0, 99), str(sf.uuid4())])
            info = sf.info()
            seen.append([info.workflow_id, info.workflow, info.run, info.started_at.timestamp()])
            await sf.wait_signal("s")
        return seen

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("w", "flow")
            for restart in (False, True, False):
                it.clock.at_ms += 1000
                it.processor.core.evict("w")
                if restart:
                    await it.begin_again(store=MemoryStore())
                await it.send("w", signal())
            assert len(lives) == 4
            final = await result(it)
            assert final == lives[-1] and len(final) == 6
            for life in lives:
                assert life == final[: len(life)]
            assert [entry[0] for entry in final[::2]] == [START / 1000, START / 1000 + 1, START / 1000 + 2]
            assert final[1] == ["w", "flow", 1, START / 1000]
            assert len({entry[3] for entry in final[::2]}) == 3

    run(test())


def test_two_runs_and_two_runs_of_one_id_have_chances_of_their_own():
    async def flow() -> list[Any]:
        return [sf.random().random(), str(sf.uuid4())]

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("a", "flow")
            await it.start("b", "flow")
            first = await result(it, "a")
            assert await result(it, "b") != first
            await it.start("a", "flow", if_exists="restart")
            assert await result(it, "a") != first

    run(test())


def test_the_log_is_silent_on_replay_and_while_the_run_leaves_memory(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="streamflow.user")

    async def flow() -> None:
        sf.log.info("begun %d", 1, extra={"more": 2})
        try:
            await sf.wait_signal("s")
            sf.log.info("heard")
            await sf.wait_signal("s")
        finally:
            sf.log.info("ended")

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("w", "flow")
            it.processor.core.evict("w")
            await it.send("w", signal())
            await it.begin_again()
            await it.send("w", signal())
            assert await it.state_of("w") == "completed"

    run(test())
    assert [record.getMessage() for record in caplog.records] == ["begun 1", "heard", "ended"]
    assert {record.__dict__["workflow_id"] for record in caplog.records} == {"w"}
    assert caplog.records[0].__dict__["more"] == 2


def test_the_log_is_a_plain_one_outside_of_a_workflow(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="streamflow.user")
    sf.log.info("outside")
    assert caplog.messages == ["outside"]


def test_info_tells_whether_the_code_is_replaying():
    seen: list[bool] = []

    async def flow() -> None:
        seen.append(sf.info().replaying)
        await sf.wait_signal("s")
        seen.append(sf.info().replaying)

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("w", "flow")
            it.processor.core.evict("w")
            await it.send("w", signal())
            assert seen == [False, True, False]

    run(test())


# ------------------------------------------------------------------------------------------------------------- progress


def test_progress_is_shown_once_and_not_again_on_replay():
    async def flow() -> None:
        sf.progress({"done": 1})
        await sf.wait_signal("s")
        sf.progress([2])
        await sf.wait_signal("s")

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("w", "flow")
            await it.begin_again()
            await it.send("w", signal())
            status = it.processor.state.status("w")
            assert status is not None and status.progress == b"[2]"
            events = [type(event).__name__ for turn in it.processor.state.turns("w") for event in turn.events]
            assert events.count("ProgressSet") == 2

    run(test())


@pytest.mark.parametrize("value", [object(), float("nan"), "x" * 900_000])
def test_progress_that_cannot_be_shown_is_an_error_at_the_call(value: Any):
    async def flow() -> str:
        try:
            sf.progress(value)
        except sf.RequestError as error:
            return type(error).__name__
        return ""

    async def test():
        async with world(app_of(flow)) as it:
            await it.start("w", "flow")
            assert await result(it) in {"InvalidArguments", "PayloadTooLarge"}

    run(test())


@pytest.mark.parametrize("end", ["evict", "terminate"])
def test_code_that_unwinds_while_its_run_leaves_memory_changes_nothing(end: str):
    app = sf.Registry()

    @app.step
    async def refund() -> None: ...

    @app.workflow
    async def flow() -> None:
        try:
            await sf.wait_signal("s")
        finally:
            sf.progress("unwinding")
            await refund()

    async def test():
        async with world(app) as it:
            await it.start("w", "flow")
            if end == "evict":
                it.processor.core.evict("w")
                await it.begin_again()
                assert await it.state_of("w") == "running"
            else:
                await it.send("w", TerminateWorkflow())
                assert await it.state_of("w") == "terminated"
            status = it.processor.state.status("w")
            assert status is not None and status.progress is None
            assert it.executor.started == []

    run(test())


@pytest.mark.parametrize(
    "call",
    [
        lambda: sf.progress(1),
        sf.now,
        sf.random,
        sf.uuid4,
        sf.info,
        lambda: asyncio.run(sf.sleep_until(datetime.now(UTC))),
        lambda: asyncio.run(sf.wait_signal("s")),
    ],
)
def test_outside_of_a_workflow_there_is_no_context(call: Callable[[], object]):
    with pytest.raises(NotInWorkflow, match="only inside a workflow"):
        call()
