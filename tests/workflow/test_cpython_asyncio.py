"""CPython's own tests of asyncio, run on the WorkflowLoop: the yardstick for "it is asyncio".

The tests come with the interpreter (package `test.test_asyncio`) and differ from version to version; they run
unchanged. Loops are made by CPython's TestLoop, by asyncio.new_event_loop or by the policy; all three lead to
DrivenLoop here, which only adds running by itself and virtual time. What cannot apply is listed with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import re
import sys
import unittest
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from streamflow.workflow import guard
from tests.workflow.driver import DrivenLoop, DrivenPolicy

try:
    from test.test_asyncio import utils as cpython_utils  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    pytest.skip(
        "this Python comes without its own test suite (package test.test_asyncio), so NOTHING here was checked; "
        "install it (Debian: libpython3-testsuite, Fedora: python3-test) or use a Python from python.org",
        allow_module_level=True,
    )

MODULES = (
    "test_context",
    "test_eager_task_factory",
    "test_futures",
    "test_futures2",
    "test_locks",
    "test_queues",
    "test_taskgroups",
    "test_tasks",
    "test_timeouts",
    "test_waitfor",
)
"""Those without IO. A module that this Python does not have yet is left out."""

NOT_APPLICABLE: dict[str, str] = {
    r"test_tasks\.\w*Tests\.test_baseexception_during_cancel": (
        "wants SystemExit of a task to leave the loop; a workflow that calls sys.exit() must not end its worker"
    ),
    r"test_tasks\.RunCoroutineThreadsafeTests\.\w+": "run_coroutine_threadsafe is for other threads: NotInWorkflow",
    r"test_tasks\.\w+\.test_env_var_debug": "starts interpreters, to see whether PYTHONASYNCIODEBUG is read",
    r"test_tasks\.\w+\.test_log_destroyed_pending_task": (
        "wants a pending task to die with its last reference; the loop holds it, so that the collector decides nothing"
    ),
    r"test_tasks\.CoroutineGatherTests\.test_issue46672": "replaces a method of BaseEventLoop, which is not our base",
    r"test_timeouts\.\w+\.test_nested_timeouts_(concurrent|loop_busy)": "block the loop in time.sleep: NotInWorkflow",
    r"test_(tasks|futures)\.\w*Py(Task|Future)\w*\.\w+": (
        "asyncio written in Python, as a fallback; the same tests run on the C classes, which are what the loop makes"
    ),
}
"""Pattern of a test's id, and why it does not apply. One that matches no test fails, so that none goes stale."""
if sys.version_info >= (3, 12):
    NOT_APPLICABLE[r"test_futures2\.\w+\.test_task_exc_handler_correct_context"] = (
        "wants a failed task to be reported within its `del`; the loop lets go of a task one iteration after its end"
    )


def _tests(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from _tests(test)
        else:
            yield test


def _collect() -> dict[str, unittest.TestCase]:
    found: dict[str, unittest.TestCase] = {}
    for module in MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            suite = unittest.defaultTestLoader.loadTestsFromModule(
                importlib.import_module(f"test.test_asyncio.{module}")
            )
            found |= {test.id().removeprefix("test.test_asyncio."): test for test in _tests(suite)}
    return found


TESTS = _collect()


def _reason(test_id: str) -> str | None:
    return next((reason for pattern, reason in NOT_APPLICABLE.items() if re.fullmatch(pattern, test_id)), None)


def test_no_reason_is_stale() -> None:
    stale = [pattern for pattern in NOT_APPLICABLE if not any(re.fullmatch(pattern, test_id) for test_id in TESTS)]
    assert not stale


@pytest.fixture(scope="module", autouse=True)
def _as_in_a_worker() -> Iterator[None]:
    guard.forbid_io()  # always, for it cannot be taken back: else the order of the tests would decide
    # Some tests collect garbage a hundred times; they need not look at everything that pytest holds.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def _everywhere_driven() -> Iterator[None]:
    DrivenLoop().run_until_complete(
        _nothing()
    )  # starts the watchdog's thread, which CPython's tests would otherwise count as theirs
    asyncio.set_event_loop_policy(DrivenPolicy())  # type: ignore[deprecated]
    with mock.patch.object(cpython_utils, "TestLoop", DrivenLoop):
        yield
    asyncio.set_event_loop_policy(None)  # type: ignore[deprecated]


async def _nothing() -> None:
    pass


# CPython's tests provoke warnings on purpose, and leave unawaited coroutines behind.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_everywhere_driven")
@pytest.mark.parametrize("test_id", [test_id for test_id in TESTS if _reason(test_id) is None])
def test_cpython(test_id: str) -> None:
    test: Any = TESTS[test_id]
    if hasattr(test, "loop_factory"):
        test.loop_factory = DrivenLoop
    result = unittest.TestResult()
    unittest.TestSuite([test]).run(result)
    for _, text in result.failures + result.errors:
        pytest.fail(text, pytrace=False)
    assert not result.unexpectedSuccesses
    for _, reason in result.skipped:
        pytest.skip(reason)
