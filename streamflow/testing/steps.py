"""The steps of an app as a test sees them: every attempt is counted, and may be mocked or made to fail."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Final

from streamflow.errors import InvalidArguments
from streamflow.sim.guard import NotSimulated
from streamflow.sim.host import in_thread
from streamflow.workflow.app import App
from streamflow.workflow.definitions import Step
from streamflow.workflow.stepinfo import StepInfo, step_info

FOREIGN: Final = ("attached to a different loop", "bound to a different event loop")
"""What asyncio says of a future, a lock or an event of another loop."""


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
    `failed` of what must end the test."""

    def __init__(
        self,
        app: App,
        *,
        now: Callable[[], datetime],
        began: Callable[[StepInfo], None],
        ended: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._app, self._now, self._began, self._ended, self._failed = app, now, began, ended, failed
        self._scripts: dict[str, _Script] = {}
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

    def around(self, step: Step[..., Any]) -> Callable[..., Awaitable[Any]]:
        """What runs in the step's place."""
        return partial(self._run, step)

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
            if (foreign := foreign_text(error, f"step {step.name}")) is None:
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
