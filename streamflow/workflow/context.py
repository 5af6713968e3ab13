"""What workflow code calls as `sf.…`: signals, progress, and replay-safe time, chance and logging."""

from __future__ import annotations

import asyncio
import logging
import random as random_module
import uuid
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from streamflow.codec.payload import check_value_type
from streamflow.core.retry import Duration
from streamflow.errors import InvalidArguments, StreamflowError
from streamflow.ids import check_id
from streamflow.workflow.code import RunLoop, current, from_ms
from streamflow.workflow.definitions import check_duration, check_instant

T = TypeVar("T")

WAIT_SECONDS_MIN: Final = 0.001
"""The shortest wait for a signal: long enough to take one that came before."""


@dataclass(frozen=True, slots=True)
class WorkflowInfo:
    """What `sf.info()` tells of the run whose code is running."""

    workflow_id: str
    workflow: str
    run: int
    started_at: datetime
    replaying: bool


def _later(what: str, instead: str) -> StreamflowError:
    return StreamflowError(f"{what} is not part of this version: {instead}")


def promise(type: Any = Any) -> Any:
    """A slot with an id that anybody may settle once. Not part of this version."""
    raise _later("sf.promise", "use sf.wait_signal with a name of your own")


async def start(workflow: object, *args: object, **options: object) -> str:
    """Start a run of its own from a workflow. Not part of this version."""
    raise _later("sf.start", "start the run from a step, through a client")


def continue_as_new(*args: object) -> None:
    """End this history and begin a fresh one under the same id. Not part of this version."""
    raise _later("sf.continue_as_new", "return, and let a client start the next run")


@overload
async def wait_signal(name: str, type: type[T], timeout: Duration | None = None) -> T: ...
@overload
async def wait_signal(name: str, type: Any = Any, timeout: Duration | None = None) -> Any: ...
async def wait_signal(name: str, type: Any = Any, timeout: Duration | None = None) -> Any:
    """Wait for the next signal of that name, in order of arrival, also one sent before.

    The value is decoded as `type`. Raises `TimeoutError` after `timeout` (seconds or a timedelta), and `SignalError`
    when the signal was sent with `error=`.
    """
    code = current("sf.wait_signal")
    check_id(name, what="signal name")
    check_value_type(type)
    if timeout is None:
        return await code.wait_signal(name, type)
    limit = check_duration(timeout, what="timeout of sf.wait_signal")
    # A timeout of 0 is over before the engine could hand out even a signal that is there already.
    async with asyncio.timeout(max(limit, WAIT_SECONDS_MIN)):
        return await code.wait_signal(name, type)


async def sleep_until(at: datetime) -> None:
    """Sleep durably until the instant `at` (aware); at once when it is past."""
    code = current("sf.sleep_until")
    delay = check_instant(at, what="at of sf.sleep_until").timestamp() - code.loop.time()
    await asyncio.sleep(max(delay, 0.0))


def progress(value: object) -> None:
    """Show `value` (JSON) as the run's progress in its status."""
    current("sf.progress").set_progress(value)


def now() -> datetime:
    """The time in UTC, replay-safe: the instant at which the engine took the input that the code runs on."""
    return current("sf.now").now()


def random() -> random_module.Random:
    """The run's own `random.Random`, replay-safe: seeded by the run, one for the whole run."""
    return current("sf.random").random()


def uuid4() -> uuid.UUID:
    """A random UUID, replay-safe."""
    return current("sf.uuid4").uuid4()


def info() -> WorkflowInfo:
    """The run whose code is running."""
    code = current("sf.info")
    run = code.run
    if run.started_at is None:
        raise InvalidArguments(f"run {run.workflow_id} has not started")
    return WorkflowInfo(run.workflow_id, run.workflow, run.run, from_ms(run.started_at), code.replaying)


if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter


class WorkflowLogger(_Adapter):
    """A logger for workflow code: silent while replaying, and each record carries the run's id as `workflow_id`."""

    def isEnabledFor(self, level: int) -> bool:
        """Whether a record of that level is logged now: not while replaying, nor while the run leaves memory."""
        loop = asyncio._get_running_loop()
        if isinstance(loop, RunLoop) and loop.replaying:
            return False
        return super().isEnabledFor(level)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the run's id to the record."""
        loop = asyncio._get_running_loop()
        if isinstance(loop, RunLoop):
            kwargs["extra"] = {"workflow_id": loop.code.run.workflow_id, **(kwargs.get("extra") or {})}
        return msg, kwargs


log = WorkflowLogger(logging.getLogger("streamflow.user"), {})
