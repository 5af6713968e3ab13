"""The steps of an app as a test sees them: every attempt is counted, and may be mocked or made to fail."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Final

from streamflow.errors import InvalidArguments
from streamflow.sim.guard import NotSimulated, who_runs
from streamflow.sim.host import in_thread
from streamflow.workflow.app import App
from streamflow.workflow.code import StepCall
from streamflow.workflow.definitions import Step
from streamflow.workflow.stepinfo import StepInfo, step_info

FOREIGN: Final = ("attached to a different loop", "bound to a different event loop")
"""What asyncio says of a future, a lock or an event of another loop."""

SCALES: Final = (0.01, 0.1, 1.0)
"""Delays are drawn from up to so much of their limit: those of two steps that are as long, and those that differ by
far, which puts all of a short chain of steps before one step beside it."""
TIMEOUT_SHARE: Final = 0.05
"""Neither of the two delays takes more of an attempt's timeout: only what needs nine tenths of it can fail for them."""


class MadeToFail(Exception):
    """What an attempt raises that `fail_step` makes fail, unless another error is given."""


@dataclass(frozen=True, slots=True)
class Call:
    """One attempt of a step that began, also one that was mocked or made to fail."""

    step: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    workflow_id: str
    number: int
    """The step's number in its run, from 0."""
    attempt: int
    at: datetime
    """When it began, by the world's time."""


@dataclass
class _Script:
    """What the test said of one step."""

    failing: deque[BaseException | type[BaseException]] = field(default_factory=deque)
    mock: tuple[Any] | None = None


class Steps:
    """`began` is told of each attempt before anything of it runs, `ended` when its function has returned or raised;
    `failed` of what must end the test. Before an attempt begins, and before its answer is given, up to `delay` seconds
    pass, drawn from the seed: as a step's own work takes no virtual time, steps that run side by side would always end
    in the order in which they began.
    """

    def __init__(
        self,
        app: App,
        *,
        seed: int,
        delay: float,
        now: Callable[[], datetime],
        began: Callable[[StepInfo], None],
        ended: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._app, self._now, self._began, self._ended, self._failed = app, now, began, ended, failed
        self._scripts: dict[str, _Script] = {}
        self._delay = delay
        self._chance = random.Random(f"steps {seed}")
        self.calls: list[Call] = []

    def name_of(self, step: Step[..., Any] | str) -> str:
        """The name of a step of this app; `InvalidArguments` names those that there are."""
        name = step.name if isinstance(step, Step) else step
        found = self._app.steps.get(name) if isinstance(name, str) else None
        if found is None or (isinstance(step, Step) and found is not step):
            known = ", ".join(self._app.steps) or "none"
            raise InvalidArguments(f"{self._app!r} has no step {name!r}; its steps are: {known}")
        return found.name

    def script(self, step: Step[..., Any] | str) -> _Script:
        """What is said of that step."""
        return self._scripts.setdefault(self.name_of(step), _Script())

    def around(self, call: StepCall) -> Callable[..., Awaitable[Any]]:
        """What runs in the place of the step's function."""
        return partial(self._delayed, call)

    async def _delayed(self, call: StepCall, /, *args: Any, **kwargs: Any) -> Any:
        await self._pass_time(call.timeout)
        try:
            result = await self._run(call.step, *args, **kwargs)
        except Exception:  # an answer as any other; a cancellation is none
            await self._pass_time(call.timeout)
            raise
        await self._pass_time(call.timeout)
        return result

    async def _pass_time(self, timeout: float | None) -> None:
        limit = self._delay if timeout is None else min(self._delay, TIMEOUT_SHARE * timeout)
        if limit:
            await asyncio.sleep(self._chance.uniform(0, limit * self._chance.choice(SCALES)))

    async def _run(self, step: Step[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        info = step_info()
        self._began(info)
        self.calls.append(Call(step.name, args, kwargs, info.workflow_id, info.number, info.attempt, self._now()))
        script = self._scripts.get(step.name)
        if script is not None and script.failing:
            raise script.failing.popleft()
        try:
            if script is not None and script.mock is not None:
                return await _mocked(script.mock[0], args, kwargs)
            if step.is_async:
                return await step.function(*args, **kwargs)
            loop = asyncio.get_running_loop()
            return await in_thread(loop, partial(step.function, *args, **kwargs), copy_context())
        except RuntimeError as error:
            if (foreign := foreign_text(error, who_runs())) is None:
                raise
            strange = NotSimulated(foreign)
            strange.__cause__ = error
            self._failed(strange)
            raise strange from error
        finally:
            self._ended()


async def _mocked(mock: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    result = mock(*args, **kwargs) if callable(mock) else mock
    return await result if inspect.isawaitable(result) else result


def foreign_text(error: BaseException, who: str) -> str | None:
    """What to say of an error of asyncio about two event loops; None if it is not one."""
    if not isinstance(error, RuntimeError) or not any(said in str(error) for said in FOREIGN):
        return None
    return (
        f"{who} waits for a future, lock or event of another event loop, which stands still while the simulated world "
        f"runs: make it inside of the scenario or the step, or mock the step (world.mock_step)"
    )
