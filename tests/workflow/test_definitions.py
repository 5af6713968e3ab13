"""The decorators: what they refuse, which option counts, and what a call is outside of a workflow."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import streamflow as sf
from streamflow.errors import InvalidArguments
from tests.worker.harness import run, world

RETRY = {name: sf.Retry(max_attempts=n) for n, name in enumerate(["call", "block", "step", "workflow", "app"], start=1)}


def test_a_step_and_a_workflow_run_their_function_outside_of_a_workflow():
    app = sf.Registry()

    @app.step
    async def double(n: int) -> int:
        return 2 * n

    @app.step
    def triple(n: int) -> int:
        """Three times."""
        return 3 * n

    @app.workflow
    async def both(n: int) -> int:
        return await double(n) + await triple(n)

    assert asyncio.run(both(2)) == 10
    assert asyncio.run(double(4)) == 8
    assert asyncio.run(triple.options(name="x", delay=9)(1)) == 3
    assert triple.function(2) == 6 and triple.__doc__ == "Three times." and triple.__name__ == "triple"
    assert (repr(triple), repr(both)) == ("<step triple>", "<workflow both>")


def test_a_name_is_taken_once_and_the_error_names_both():
    app = sf.App("shop")

    @app.step(name="charge")
    async def first() -> None: ...

    with pytest.raises(ValueError, match=rf"step 'charge' is registered twice: <step charge> in {__name__}"):

        @app.step
        async def charge() -> None: ...

    @app.workflow
    async def flow() -> None: ...

    with pytest.raises(ValueError, match="workflow 'flow' is registered twice"):
        app.workflow(name="flow")(flow.function)
    app.step(name="flow")(first.function)  # a step and a workflow may share a name


def test_including_a_registry_adds_all_of_it_or_nothing():
    app, other = sf.App("shop"), sf.Registry()

    @app.step(name="b")
    async def mine() -> None: ...

    for name in ("a", "b"):
        other.step(name=name)(mine.function)
    with pytest.raises(ValueError, match="step 'b' is registered twice"):
        app.include(other)
    assert list(app.steps) == ["b"]
    with pytest.raises(ValueError, match=r"streamflow\.Registry"):
        app.include(app)


async def plain() -> None: ...


@pytest.mark.parametrize(
    "options",
    [
        {"name": ""},
        {"name": "x" * 256},
        {"retry": 3},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"timeout": "soon"},
        {"queue": ""},
        {"queue": "GPU 1"},
        {"queue": "gpu", "at_most_once": True},
        {"raises": ("ValueError",)},
        {"raises": ValueError("no class")},
        {"process": True},
    ],
    ids=str,
)
def test_wrong_options_of_a_step_are_refused_where_it_is_decorated(options: dict[str, Any]):
    with pytest.raises(ValueError, match=r"name|retry|timeout|queue|raises|async def"):
        sf.Registry().step(**options)(plain)


@pytest.mark.parametrize(
    "options",
    [
        {"name": ""},
        {"retry": 3},
        {"timeout": 0},
        {"max_parallel_steps": 0},
        {"max_parallel_steps": True},
        {"retention": -1},
    ],
    ids=str,
)
def test_wrong_options_of_a_workflow_are_refused_where_it_is_decorated(options: dict[str, Any]):
    with pytest.raises(ValueError, match=r"name|retry|timeout|max_parallel_steps|retention"):
        sf.Registry().workflow(**options)(plain)


def test_a_workflow_must_be_an_async_def():
    with pytest.raises(ValueError, match="async def"):
        sf.Registry().workflow(lambda: None)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"delay": 1, "at": datetime.now(UTC)}, "exclude each other"),
        ({"delay": -1}, "at least 0"),
        ({"delay": timedelta(seconds=-1)}, "at least 0"),
        ({"at": datetime(2030, 1, 1)}, "aware datetime"),  # noqa: DTZ001 - naive on purpose
        ({"at": "tomorrow"}, "aware datetime"),
        ({"timeout": 0}, "more than 0"),
    ],
    ids=str,
)
def test_wrong_options_of_a_call_are_invalid_arguments(options: dict[str, Any], said: str):
    step = sf.Registry().step(plain)
    with pytest.raises(InvalidArguments, match=said):
        step.options(**options)


def resolved(**levels: bool) -> sf.Retry:
    """The retry that counts when these levels say one."""
    app = sf.App("shop", retry=RETRY["app"] if levels.get("app") else None)

    @app.step(retry=RETRY["step"] if levels.get("step") else None)
    async def work() -> None: ...

    @app.workflow(retry=RETRY["workflow"] if levels.get("workflow") else None)
    async def flow() -> None:
        call = work.options(retry=RETRY["call"]) if levels.get("call") else work
        with app.defaults(retry=RETRY["block"] if levels.get("block") else None):
            await call()

    found: list[sf.Retry] = []

    async def test():
        async with world(app) as it:
            await it.start("w", "flow")
            found.append(it.executor.attempts["w", 0].call.retry)

    run(test())
    return found[0]


def test_the_nearest_retry_counts():
    assert resolved() == sf.Retry()
    levels: dict[str, bool] = {}
    for nearer in ("app", "workflow", "step", "block", "call"):
        levels[nearer] = True
        assert resolved(**levels) == RETRY[nearer]


def test_blocks_of_defaults_nest_merge_and_end():
    app = sf.App("shop")

    @app.step
    async def work(n: int) -> int:
        return n

    @app.workflow
    async def flow() -> None:
        with app.defaults(check_args=False):
            with app.defaults(retry=RETRY["call"]):
                called = [asyncio.ensure_future(work(0))]
            called.append(asyncio.ensure_future(work.options(check_args=True)(1)))
            called.append(asyncio.ensure_future(work(2)))
        try:
            with app.defaults(retry=RETRY["step"], check_args=False):
                raise LookupError
        except LookupError:
            await asyncio.gather(*called, work(3))

    async def test():
        async with world(app) as it:
            await it.start("w", "flow")
            calls = [it.executor.attempts["w", n].call for n in range(4)]
            # work(3) is called at once, the tasks run when the main one waits.
            found = {attempt.args: attempt.call for attempt in it.executor.attempts.values()}
            assert len(calls) == len(found) == 4
            assert [found[b"[%d]" % n].check_args for n in range(4)] == [False, True, False, True]
            assert [found[b"[%d]" % n].retry for n in range(4)] == [RETRY["call"], *[sf.Retry()] * 3]

    run(test())


def test_a_call_may_change_its_name_its_timeout_and_when_it_starts():
    app = sf.App("shop")

    @app.step(timeout=9)
    async def work(n: int) -> int:
        return n

    at = datetime(2030, 1, 1, tzinfo=UTC)

    @app.workflow
    async def flow() -> None:
        await asyncio.gather(
            work.options(name="other", timeout=2)(0), work(1), work.options(delay=1.5)(2), work.options(at=at)(3)
        )

    async def test():
        async with world(app) as it:
            await it.start("w", "flow")
            first, second = it.executor.attempts["w", 0], it.executor.attempts["w", 1]
            assert (first.info.step, first.call.timeout, second.info.step, second.call.timeout) == (
                "other",
                2,
                "work",
                9,
            )
            timers = {timer.number: timer for timer in await it.timers()}
            assert {n: timer.fire_at for n, timer in timers.items()} == {
                2: it.clock.at_ms + 1500,
                3: int(at.timestamp() * 1000),
            }
            await it.fire(timers[2])
            assert ("w", 2) in it.executor.attempts and ("w", 3) not in it.executor.attempts

    run(test())


def test_two_steps_of_one_name_from_two_registries_keep_their_own_options():
    app, other = sf.Registry(), sf.Registry()

    @app.step(name="work", timeout=1)
    async def mine() -> None: ...

    @other.step(name="work", timeout=2)
    async def theirs() -> None: ...

    @app.workflow
    async def flow() -> None:
        await asyncio.gather(mine(), theirs())

    async def test():
        async with world(app) as it:
            await it.start("w", "flow")
            assert [it.executor.attempts["w", n].call.timeout for n in range(2)] == [1, 2]

    run(test())


def test_a_workflow_called_inside_a_workflow_says_what_to_do_instead():
    app = sf.Registry()

    @app.workflow
    async def inner() -> int:
        return 1

    @app.workflow
    async def outer() -> str:
        try:
            await inner()
        except sf.StreamflowError as error:
            return str(error)
        return ""

    async def test():
        async with world(app) as it:
            await it.start("w", "outer")
            status = it.processor.state.status("w")
            assert status is not None and b"inner.function" in (status.result or b"")

    run(test())
