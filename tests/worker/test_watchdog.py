"""The watchdog: names the step that blocks the loop, and nobody else."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from streamflow.core.events import StepCompleted
from streamflow.metrics import LOOP_BLOCKED
from streamflow.worker import watchdog
from streamflow.worker.watchdog import Watchdog
from tests.worker.executing import a_step, bench, run


class Heard(logging.Handler):
    """Sets an event when a warning comes, from whatever thread: it frees the step that blocks."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.event = threading.Event()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        self.event.set()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watchdog, "REPEAT_SECONDS", 0.01)
    handler = Heard()
    watchdog.log.addHandler(handler)
    yield handler
    watchdog.log.removeHandler(handler)


def counted() -> float:
    value: float = LOOP_BLOCKED._value.get()
    return value


@pytest.mark.parametrize("timeout", [None, 60])
def test_a_step_that_blocks_the_loop_is_named_and_counted(heard: Heard, timeout: float | None):
    async def sleepy() -> None:
        assert heard.event.wait(20), "nobody complained"

    async def test():
        before = counted()
        async with bench() as it:
            dog = Watchdog(it.executor, blocked_seconds=0.02)
            dog.start()
            await it.of(a_step(sleepy), timeout=timeout)
            dog.stop()
            assert dog.blocked_count == counted() - before == 1
        assert re.fullmatch(
            r"step sleepy of run w \(attempt 1\) has been blocking the event loop for \d+\.\d s: "
            "make it a plain def: it then runs in a thread",
            heard.texts[0],
        )

    run(test())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="a task tells its context since Python 3.12")
def test_a_task_that_the_step_made_is_blamed_on_the_step(heard: Heard):
    async def part() -> None:
        assert heard.event.wait(20), "nobody complained"

    async def sleepy() -> None:
        await asyncio.gather(part())

    async def test():
        async with bench() as it:
            dog = Watchdog(it.executor, blocked_seconds=0.02)
            dog.start()
            outcome = await it.of(a_step(sleepy))
            dog.stop()
        assert isinstance(outcome, StepCompleted), outcome
        assert heard.texts[0].startswith("step sleepy of run w ")

    run(test())


def test_the_engines_own_work_is_blamed_on_nobody(heard: Heard, monkeypatch: pytest.MonkeyPatch):
    looked: list[object] = []
    seen = threading.Event()

    async def idle() -> None:
        await asyncio.Event().wait()

    def spy(dog: Watchdog, culprit: Callable[[], Any]) -> Callable[[], Any]:
        def look() -> Any:
            looked.append(culprit())
            seen.set()
            return looked[-1]

        return look

    async def test():
        async with bench() as it:
            it.start(a_step(idle))
            dog = Watchdog(it.executor, blocked_seconds=0.02)
            monkeypatch.setattr(dog, "_culprit", spy(dog, dog._culprit))
            dog.start()
            # The engine decides in callbacks of the loop, and in tasks that are no step's.
            asyncio.get_running_loop().call_soon(seen.wait, 20)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert seen.is_set()
            seen.clear()
            assert seen.wait(20)
            dog.stop()
        assert looked[:2] == [None, None] and not heard.texts and dog.blocked_count == 0

    run(test())


def test_it_stops_at_once_also_twice_and_when_it_never_began():
    async def test():
        async with bench() as it:
            dog = Watchdog(it.executor, blocked_seconds=3600)
            dog.stop()
            dog = Watchdog(it.executor, blocked_seconds=3600)
            dog.start()
            dog.stop()
            dog.stop()
            assert not dog._thread.is_alive()

    run(test())


def test_it_ends_by_itself_when_the_loop_is_closed():
    dogs: list[Watchdog] = []

    async def test():
        async with bench() as it:
            dogs.append(Watchdog(it.executor, blocked_seconds=0.002))

    run(test())
    dogs[0].start()
    dogs[0]._thread.join(20)
    assert not dogs[0]._thread.is_alive()
