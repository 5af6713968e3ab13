"""The guards: no IO inside a drain, and no drain without end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamflow.errors import NotInWorkflow
from streamflow.workflow import guard
from streamflow.workflow.guard import LoopsForever
from streamflow.workflow.loop import WorkflowLoop


class NoTimers:
    def set_timer(self, handle: asyncio.TimerHandle) -> None:
        pytest.fail("no timer expected")

    def cancel_timer(self, handle: asyncio.TimerHandle) -> None:
        pytest.fail("no timer expected")


@pytest.fixture
def loop() -> Iterator[WorkflowLoop]:
    guard.forbid_io()
    loop = WorkflowLoop(NoTimers())
    yield loop
    loop.close()


@pytest.fixture
def quick_limit() -> Iterator[None]:
    guard.set_drain_seconds_max(0.02)
    yield
    guard.set_drain_seconds_max(guard.DRAIN_SECONDS_MAX)


def in_workflow(loop: WorkflowLoop, function: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return function()

    task = loop.create_task(main())
    loop.drain()
    return task.result()


FORBIDDEN: dict[str, Callable[[], Any]] = {
    "time.sleep": lambda: time.sleep(0),  # tidy: refused, or of no length
    "open": lambda: Path(__file__).read_text(),
    "os.listdir": lambda: os.listdir("."),
    "os.system": lambda: os.system("true"),
    "subprocess.Popen": lambda: subprocess.run(["true"], check=True),
    "socket.__new__": socket.socket,
    "socket.getaddrinfo": lambda: socket.getaddrinfo("localhost", 80),
    "sqlite3.connect": lambda: sqlite3.connect(":memory:"),
    "_thread.start": lambda: threading.Thread(target=int).start(),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_forbidden_inside_a_drain(loop: WorkflowLoop, what: str) -> None:
    with pytest.raises(NotInWorkflow) as caught:
        in_workflow(loop, FORBIDDEN[what])
    assert what in str(caught.value)
    assert "@app.step" in str(caught.value) or "asyncio.sleep" in str(caught.value)


def test_allowed_outside(loop: WorkflowLoop) -> None:
    in_workflow(loop, int)
    assert not guard.inside()
    time.sleep(0)  # tidy: refused, or of no length
    assert Path(__file__).read_text(encoding="utf-8")
    sqlite3.connect(":memory:").close()


def test_other_threads_are_not_concerned(loop: WorkflowLoop) -> None:
    go, done = threading.Event(), threading.Event()
    read: list[str] = []

    def other() -> None:
        go.wait()
        read.append(Path(__file__).read_text(encoding="utf-8"))
        done.set()

    def hand_over() -> None:
        go.set()
        done.wait()

    thread = threading.Thread(target=other)
    thread.start()
    in_workflow(loop, hand_over)
    thread.join()
    assert read


def test_imports_and_tracebacks_are_allowed(
    loop: WorkflowLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lazily_imported.py").write_text("import os\nFILES = os.listdir('.')\ndef fail(): raise ValueError\n")
    monkeypatch.syspath_prepend(tmp_path)

    def workflow() -> str:
        import lazily_imported  # type: ignore[import-not-found]

        assert lazily_imported.FILES
        try:
            lazily_imported.fail()
        except ValueError:
            return traceback.format_exc()
        return ""

    assert "def fail(): raise ValueError" in in_workflow(loop, workflow)


def test_a_drain_within_an_import_is_guarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: WorkflowLoop
) -> None:
    (tmp_path / "drains_on_import.py").write_text("import builtins\nbuiltins.drain_now()\n")
    monkeypatch.syspath_prepend(tmp_path)
    task = loop.create_task(_open())
    monkeypatch.setattr("builtins.drain_now", loop.drain, raising=False)
    __import__("drains_on_import")
    assert isinstance(task.exception(), NotInWorkflow)


async def _open() -> None:
    os.listdir(".")


def test_long_arguments_are_shortened(loop: WorkflowLoop) -> None:
    with pytest.raises(NotInWorkflow) as caught:
        in_workflow(loop, lambda: os.listdir("x" * 500))
    assert len(str(caught.value)) < 300


# ------------------------------------------------------------------------------------------------------- the watchdog


def spin() -> None:
    while True:
        pass


def stubborn() -> None:
    for _ in range(3):
        with contextlib.suppress(BaseException):
            spin()


@pytest.mark.usefixtures("quick_limit")
@pytest.mark.parametrize("endless", [spin, stubborn])
def test_code_that_never_awaits_is_stopped(loop: WorkflowLoop, endless: Callable[[], None]) -> None:
    task = loop.create_task(_call(endless))
    with pytest.raises(LoopsForever, match=r"0\.02 s without awaiting, last seen in spin, .*test_guard\.py"):
        loop.drain()
    assert not guard.inside()
    assert asyncio._get_running_loop() is None
    assert task.done()
    task.exception() if not task.cancelled() else None


async def _call(function: Callable[[], object]) -> None:
    function()


@pytest.mark.usefixtures("quick_limit")
def test_nothing_is_left_in_the_interpreter(loop: WorkflowLoop) -> None:
    """An exception that is withdrawn, not delivered, makes traced code hang on Python 3.11 and 3.12."""
    task = loop.create_task(_call(spin))
    with pytest.raises(LoopsForever):
        loop.drain()
    task.exception()
    calls: list[str] = []

    def tracer(_frame: object, event: str, _arg: object) -> None:
        calls.append(event)

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        guard.inside()
    finally:
        sys.settrace(before)
    assert calls


@pytest.mark.usefixtures("quick_limit")
def test_an_endless_finally_does_not_hold_up_the_eviction(loop: WorkflowLoop) -> None:
    async def main() -> None:
        try:
            await loop.create_future()
        finally:
            spin()

    loop.create_task(main())
    loop.drain()
    with pytest.raises(LoopsForever):
        loop.close()
    assert loop.is_closed()


def test_an_injection_never_surfaces_behind_its_drain() -> None:
    """The watchdog's half is called at the worst moments: while inside, just before, and just after leaving."""
    watch = guard.enter()
    assert watch is not None
    since = watch.since
    surfaced = 0
    for moment in range(200):
        watch.since = since
        try:
            if moment % 2:
                watch.inject(since)
            watch.since = 0.0
            watch.inject(since)  # too late: nothing may happen
        except LoopsForever:
            surfaced += 1
            watch.since = 0.0
        if watch.injected:
            try:
                watch.settle()
            except LoopsForever:
                watch.settle()
        assert not watch.injected
        assert bool(watch.where) == bool(moment % 2)
        watch.where = ""
    list(map(str, range(1_000)))  # anything left behind would be raised here


def test_a_race_of_injections_against_short_drains(loop: WorkflowLoop) -> None:
    stop = threading.Event()
    in_workflow(loop, int)
    watch = guard._watches[threading.get_ident()]

    def attack() -> None:
        while not stop.is_set():
            since = watch.since
            if since:
                watch.inject(since)

    class Finalised:
        def __del__(self) -> None:
            sum(range(50))

    attacker = threading.Thread(target=attack)
    interval = sys.getswitchinterval()
    # An injection may hit a finaliser, which the interpreter can only report. A hook written in Python, as pytest's,
    # would be hit itself while it reports.
    swallowed: list[sys.UnraisableHookArgs] = []
    report, sys.unraisablehook = sys.unraisablehook, swallowed.append
    sys.setswitchinterval(1e-6)
    attacker.start()
    hit = 0
    try:
        for _ in range(2_000):
            task = loop.create_task(_call(lambda: sum(range(50), bool(Finalised()))))
            try:
                loop.drain()
            except LoopsForever:
                hit += 1
            if task.done() and not task.cancelled():
                task.exception()
    finally:
        stop.set()
        attacker.join()
        sys.setswitchinterval(interval)
        sys.unraisablehook = report
    assert hit, "no drain was hit: this has shown nothing"
    assert {each.exc_type for each in swallowed} <= {LoopsForever}
    assert not guard.inside()
    assert asyncio._get_running_loop() is None


def test_a_drain_inside_a_drain_is_covered_by_the_outer_one(loop: WorkflowLoop) -> None:
    def nested() -> bool:
        assert guard.enter() is None
        inner = WorkflowLoop(NoTimers())
        inner.call_soon(int)
        inner.drain()
        inner.close()
        return guard.inside()

    assert in_workflow(loop, nested)
    assert not guard.inside()


def test_the_limit_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        guard.set_drain_seconds_max(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_has_a_watchdog_of_its_own() -> None:
    program = """if True:
        import asyncio, os, sys
        from streamflow.workflow import guard
        from streamflow.workflow.loop import LoopsForever, WorkflowLoop
        guard.set_drain_seconds_max(0.02)
        def endless():
            while True: pass
        def stopped():
            loop = WorkflowLoop(None)
            loop.call_soon(endless)
            try: loop.drain()
            except LoopsForever: return True
        assert stopped()
        child = os.fork()
        if child == 0:
            os._exit(0 if stopped() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print("both stopped")
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], check=False, capture_output=True, text=True, timeout=30
    )
    assert (done.stdout, done.stderr) == ("both stopped\n", "")
