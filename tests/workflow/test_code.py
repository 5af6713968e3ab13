"""The code of a run on a real partition: asyncio's tools are durable, and errors are what they were."""

from __future__ import annotations

import asyncio
import contextvars
import decimal
import gc
from typing import Any

import msgspec
import pytest

import streamflow as sf
from streamflow.core.commands import CancelWorkflow, SignalWorkflow
from streamflow.core.events import StepFailed
from streamflow.core.replay import Execution
from streamflow.store.memory import MemoryStore
from streamflow.workflow.code import RunCode, check_size, error_info, from_ms, is_interrupt, qualified, to_ms
from streamflow.workflow.loop import WorkflowLoop
from tests.worker.harness import World, run, settle, world


class Refused(Exception):
    """Listed in `raises`."""


class Picky(Exception):
    """Its constructor wants more than a text."""

    def __init__(self, code: int, *, place: str) -> None:
        super().__init__(f"{code} at {place}")


class Refusing(Exception):
    """Its constructor raises something else."""

    def __init__(self, text: str) -> None:
        raise KeyError(text)


async def status_of(it: World, workflow_id: str = "w") -> Any:
    status = it.processor.state.status(workflow_id)
    assert status is not None
    return status


async def result(it: World) -> Any:
    status = await status_of(it)
    assert status.error is None, status.error
    assert status.result is not None, status.waiting_on
    return msgspec.json.decode(status.result)


def fail(it: World, number: int, type_: str, message: str = "no") -> None:
    attempt = it.executor.attempts.pop(("w", number))
    attempt.report(
        attempt.info, StepFailed(number=number, attempt=attempt.info.attempt, error=sf.ErrorInfo(type_, message))
    )


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("type_", "raised"),
    [
        (f"{__name__}.Refused", "Refused: no"),
        (f"{__name__}.Picky", "Picky: no"),
        (f"{__name__}.Refusing", "Refusing: no"),
        ("ValueError", "StepFailed: step work failed after 1 attempt: ValueError: no"),
        ("TimeoutError", "TimeoutError: no"),
    ],
)
def test_a_failed_step_raises_the_very_class_that_raises_lists_and_else_step_failed(type_: str, raised: str):
    app = sf.Registry()

    @app.step(raises=(Refused, Picky, Refusing, TimeoutError))
    async def work() -> None: ...

    @app.workflow
    async def flow() -> str:
        try:
            await work()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    async def test():
        async with world(app) as it:
            await it.start("w", "flow")
            fail(it, 0, type_)
            await settle()
            assert await result(it) == raised
            await it.begin_again(store=MemoryStore())
            assert await result(it) == raised

    run(test())


def test_whatever_the_code_raises_fails_the_run_with_its_type_and_traceback():
    app = sf.Registry()

    @app.workflow
    async def flow(kind: str) -> int:
        match kind:
            case "own":
                raise Refused("mine")
            case "exit":
                raise SystemExit(3)
            case "cancel":
                raise asyncio.CancelledError("by itself")
            case "group":
                raise ExceptionGroup("many", [ValueError("one"), Refused("two")])
            case "child exits":

                async def child() -> None:
                    raise SystemExit(4)

                await asyncio.gather(child())
            case "result":
                return "text"  # type: ignore[return-value]
        return 1

    expected = {
        "own": f"{__name__}.Refused",
        "exit": "SystemExit",
        "cancel": "asyncio.exceptions.CancelledError",
        "group": "ExceptionGroup",
        "child exits": "SystemExit",
        "result": "streamflow.errors.InvalidArguments",
    }

    async def test():
        async with world(app) as it:
            for kind, type_ in expected.items():
                await it.start(kind, "flow", msgspec.json.encode([kind]))
                status = await status_of(it, kind)
                assert (status.state, status.error.type) == ("failed", type_)
            assert "in flow" in (await status_of(it, "own")).error.traceback
            assert it.task is not None and not it.task.done()

    run(test())


def test_arguments_that_the_function_refuses_fail_the_run():
    app = sf.Registry()

    @app.workflow
    async def flow(n: int) -> int:
        return n

    async def test():
        async with world(app) as it:
            await it.start("w", "flow", b'["text"]')
            status = await status_of(it)
            assert status.state == "failed" and status.error.type == "streamflow.errors.InvalidArguments"

    run(test())


def test_arguments_and_payloads_that_do_not_fit_raise_at_the_call():
    app = sf.Registry()

    @app.step
    async def work(text: str) -> None: ...

    @app.workflow
    async def flow() -> list[str]:
        said = []
        for value in (3, "x" * 900_000):
            try:
                await work(value)  # type: ignore[arg-type]
            except sf.RequestError as error:
                said.append(type(error).__name__)
        return said

    async def test():
        async with world(app) as it:
            await it.start("w", "flow")
            assert await result(it) == ["InvalidArguments", "PayloadTooLarge"]
            assert it.executor.started == []

    run(test())


# --------------------------------------------------------------------------------------------------------- cancellation


def test_a_cancelled_run_unwinds_durably_and_may_still_run_steps():
    app = sf.Registry()

    @app.step
    async def work(n: int) -> int:
        return n

    @app.workflow
    async def flow() -> None:
        try:
            await work(1)
        finally:
            await work(2)

    async def test():
        async with world(app) as it:
            await it.start("w", "flow")
            await it.send("w", CancelWorkflow())
            assert it.executor.cancelled == [("w", 0)] and await it.state_of("w") == "running"
            await it.begin_again()
            it.executor.complete("w", 1)
            await settle()
            assert await it.state_of("w") == "cancelled"

    run(test())


def test_code_that_catches_its_cancellation_for_good_completes():
    app = sf.Registry()

    @app.workflow
    async def flow() -> str:
        try:
            await asyncio.sleep(9)
        except asyncio.CancelledError:
            return "kept on"
        return ""

    async def test():
        async with world(app) as it:
            await it.start("w", "flow")
            await it.send("w", CancelWorkflow())
            assert await result(it) == "kept on" and await it.timers() == []

    run(test())


def test_a_step_under_a_timeout_is_cancelled_when_the_timer_fires():
    app = sf.Registry()

    @app.step
    async def work() -> int:
        return 1

    @app.workflow
    async def flow() -> str:
        try:
            async with asyncio.timeout(3):
                await work()
        except TimeoutError:
            return "late"
        return "in time"

    async def test():
        async with world(app) as it:
            await it.start("w", "flow")
            status = await status_of(it)
            assert [line.split(" ")[0] for line in status.waiting_on] == ["timeout", "step"]
            (timer,) = await it.timers()
            await it.fire(timer)
            assert await result(it) == "late" and it.executor.cancelled == [("w", 1)]

    run(test())


def test_attempts_are_counted_over_delays_and_restarts():
    app = sf.Registry()

    @app.step
    async def work() -> int:
        return 1

    @app.workflow
    async def flow() -> int:
        return await work()

    async def test():
        async with world(app) as it:
            await it.start("w", "flow")
            for attempt in (1, 2):
                assert it.executor.started[-1] == ("w", 0, attempt)
                it.executor.fail("w", 0, retry_at=it.clock.at_ms + 500)
                await settle()
                (timer,) = await it.timers()
                assert (timer.attempt, timer.fire_at) == (attempt + 1, it.clock.at_ms + 500)
                await it.begin_again()
                await it.fire(timer)
            assert it.executor.started[-1] == ("w", 0, 3) and await it.timers() == []

    run(test())


# ------------------------------------------------------------------------------------------------------------- contexts


def test_context_variables_of_the_code_are_its_own_on_every_replay():
    app = sf.Registry()
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen: list[tuple[str, int]] = []

    async def child() -> str:
        before = variable.get()
        variable.set("the child's")
        await sf.wait_signal("s")
        return f"{before}, {variable.get()}"

    @app.workflow
    async def flow() -> list[str]:
        seen.append((variable.get(), decimal.getcontext().prec))
        decimal.getcontext().prec = 5
        variable.set("the parent's")
        heard = list(await asyncio.gather(child(), child()))
        asyncio.get_running_loop().call_soon(lambda: heard.append(variable.get()))
        await asyncio.sleep(0)
        return [*heard, variable.get()]

    async def test():
        variable.set("the worker's")
        precision = decimal.getcontext().prec
        async with world(app) as it:
            await it.start("w", "flow")
            await it.send("w", SignalWorkflow(name="s"))
            await it.begin_again()
            await it.send("w", SignalWorkflow(name="s"))
            parts = ["the parent's, the child's"] * 2
            assert await result(it) == [*parts, "the parent's", "the parent's"]
            assert seen == [("unset", 28), ("unset", 28)]
            assert variable.get() == "the worker's" and decimal.getcontext().prec == precision

    run(test())


# ---------------------------------------------------------------------------------------------------------- odds, ends


def test_names_of_classes_are_qualified_unless_built_in():
    assert [qualified(type_) for type_ in (ValueError, Refused, asyncio.TimeoutError)] == [
        "ValueError",
        f"{__name__}.Refused",
        "TimeoutError",
    ]


def test_an_error_without_a_traceback_has_its_one_line():
    found = error_info(ValueError("no"))
    assert found == sf.ErrorInfo("ValueError", "no", "ValueError: no\n")


def test_instants_survive_the_way_to_milliseconds_and_back():
    for at_ms in (0, 1, 999, 1_700_000_000_123, 253_402_300_799_000):
        assert to_ms(from_ms(at_ms)) == at_ms


def test_a_payload_is_measured_in_bytes():
    check_size(b"x" * 900_000, what="it")
    with pytest.raises(sf.PayloadTooLarge, match="it has 900,001 bytes"):
        check_size(b"x" * 900_001, what="it")


def test_a_finished_run_leaves_nothing_to_the_collector():
    app = sf.App("shop")

    @app.workflow
    async def short() -> int:
        return 1

    def living() -> set[int]:
        return {id(each) for each in gc.get_objects() if isinstance(each, RunCode | WorkflowLoop | Execution)}

    async def test():
        async with world(app) as it:
            gc.collect()
            before = living()
            gc.disable()
            try:
                await it.start("w", "short")
                await settle()
                assert living() <= before
            finally:
                gc.enable()
            assert await result(it) == 1

    run(test())


def test_only_the_main_thread_can_be_interrupted():
    async def test():
        assert is_interrupt(KeyboardInterrupt()) and not is_interrupt(SystemExit())
        assert not await asyncio.to_thread(is_interrupt, KeyboardInterrupt())

    run(test())
