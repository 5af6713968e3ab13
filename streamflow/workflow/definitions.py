"""What the decorators make of a function: a step or a workflow, callable and typed as the function itself.

A call is always a coroutine. Inside a workflow it is a durable step (or, later, a child run); anywhere else it runs
the function, so that both can be unit-tested. The nearest of call, step, workflow and app decides an option.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Generic, ParamSpec, TypeVar, overload

from streamflow.codec.payload import Signature
from streamflow.core.retry import Duration, Retry, seconds
from streamflow.errors import InvalidArguments, StreamflowError
from streamflow.ids import check_id, check_queue
from streamflow.workflow.code import RunLoop, StepCall
from streamflow.workflow.remote import remote_call

P = ParamSpec("P")
R = TypeVar("R")

# Calls are typed Coroutine[None, None, R]: with Any in it, mypy finds several overloads of asyncio.gather that fit
# equally, and makes the result Any.

_get_running_loop = asyncio._get_running_loop


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What one call, or one block of calls, says differently; None leaves it to the next farther level."""

    name: str | None = None
    retry: Retry | None = None
    timeout: float | None = None
    delay: float | None = None
    at: datetime | None = None
    queue: str | None = None
    check_args: bool | None = None


NO_OPTIONS = CallOptions()
_defaults: ContextVar[CallOptions] = ContextVar("streamflow_defaults", default=NO_OPTIONS)


@contextmanager
def defaults(*, retry: Retry | None = None, check_args: bool | None = None) -> Iterator[None]:
    """Defaults for the step calls in the block; nested ones merge, the inner wins."""
    outer = _defaults.get()
    inner = replace(
        outer,
        retry=outer.retry if retry is None else check_retry(retry),
        check_args=outer.check_args if check_args is None else check_args,
    )
    token = _defaults.set(inner)
    try:
        yield
    finally:
        _defaults.reset(token)


def check_retry(retry: Retry) -> Retry:
    """Return `retry` if it is one."""
    if not isinstance(retry, Retry):
        raise ValueError(f"retry must be a streamflow.Retry, found {retry!r}")
    return retry


def check_instant(at: datetime, *, what: str = "at") -> datetime:
    """Return `at` if it is an aware datetime; a naive one could mean any of 38 instants."""
    if not isinstance(at, datetime):
        raise InvalidArguments(f"{what} must be an aware datetime, found {at!r}")
    if at.tzinfo is None or at.utcoffset() is None:
        raise InvalidArguments(
            f"{what} must be an aware datetime, found the naive {at!r}: say its zone, as in "
            f"datetime.now(timezone.utc) or at.replace(tzinfo=ZoneInfo('Europe/Paris'))"
        )
    return at


def check_duration(value: Duration, *, what: str) -> float:
    """The duration in seconds, or `InvalidArguments` naming `what`."""
    try:
        return seconds(value, what=what)
    except ValueError as error:
        raise InvalidArguments(str(error)) from None


def check_timeout(value: Duration, *, what: str) -> float:
    """The duration in seconds, or `ValueError` naming `what` also when it is 0, in which nothing can be done."""
    found = seconds(value, what=what)
    if not found:
        raise ValueError(f"{what} must be more than 0 seconds, found {value!r}")
    return found


def _call_timeout(value: Duration, *, what: str) -> float:
    try:
        return check_timeout(value, what=what)
    except ValueError as error:
        raise InvalidArguments(str(error)) from None


def _once_on_a_queue(step: str) -> str:
    return (
        f"step {step} has both at_most_once and a queue: when the worker that took it from the queue dies, nobody "
        f"knows whether it began, and another runs it again; leave out one of the two"
    )


def _name_of(function: object) -> str:
    return str(getattr(function, "__name__", ""))


def refuse_later(given: object, *, what: str, instead: str) -> None:
    """Refuse an option whose feature a later version brings: without effect it would promise what is not kept."""
    if given is not None:
        raise ValueError(f"{what} is not part of this version: {instead}")


class Step(Generic[P, R]):
    """A durable step. Call it inside a workflow to schedule it, anywhere else to run it."""

    def __init__(
        self,
        function: Callable[P, R] | Callable[P, Awaitable[R]],
        *,
        name: str | None,
        retry: Retry | None,
        timeout: Duration | None,
        queue: str | None,
        process: bool,
        raises: type[BaseException] | tuple[type[BaseException], ...],
        at_most_once: bool,
    ) -> None:
        self.function = function
        self.name = check_name(name if name is not None else _name_of(function), what="step name")
        self.signature = Signature(function)
        self.retry = None if retry is None else check_retry(retry)
        self.timeout = None if timeout is None else check_timeout(timeout, what=f"timeout of step {self.name}")
        self.queue = None if queue is None else check_queue(queue)
        if queue is not None and at_most_once:
            raise ValueError(_once_on_a_queue(self.name))
        self.is_async = inspect.iscoroutinefunction(function)
        if process and self.is_async:
            raise ValueError(f"step {self.name} is an async def: process=True runs a plain def in a process")
        if process and "<" in getattr(function, "__qualname__", "<"):
            raise ValueError(
                f"step {self.name} is a lambda or defined inside a function ({_name_of(function)}): a process finds a "
                f"step by its name in its module; define it at the top of one"
            )
        self.process = process
        self.raises = raises if isinstance(raises, tuple) else (raises,)
        for declared in self.raises:
            if not isinstance(declared, type) or not issubclass(declared, BaseException):
                raise ValueError(f"raises of step {self.name} must be exception classes, found {declared!r}")
        self.at_most_once = at_most_once
        self.__name__ = self.name
        self.__doc__ = function.__doc__
        self.__wrapped__ = function
        self.__module__ = getattr(function, "__module__", __name__)
        self.__qualname__ = getattr(function, "__qualname__", self.name)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[None, None, R]:
        loop = _get_running_loop()
        if isinstance(loop, RunLoop):
            return loop.code.call_step(self._call(loop, NO_OPTIONS), args, kwargs)
        return self._outside(*args, **kwargs)

    def options(
        self,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        delay: Duration | None = None,
        at: datetime | None = None,
        queue: str | None = None,
        check_args: bool | None = None,
    ) -> Callable[P, Coroutine[None, None, R]]:
        """The same step with one call changed; `delay` or `at` (not both) set when it starts.

        `queue` has it run by the workers that serve that queue (`streamflow worker --queue`, `serve(queues=)`).
        """
        if delay is not None and at is not None:
            raise InvalidArguments(f"step {self.name}: delay and at exclude each other, found both; give one")
        if queue is not None and self.at_most_once:
            raise InvalidArguments(_once_on_a_queue(self.name))
        options = CallOptions(
            name=None if name is None else check_name(name, what="step name"),
            retry=None if retry is None else check_retry(retry),
            timeout=None if timeout is None else _call_timeout(timeout, what=f"timeout of step {self.name}"),
            delay=None if delay is None else check_duration(delay, what=f"delay of step {self.name}"),
            at=None if at is None else check_instant(at, what=f"at of step {self.name}"),
            queue=None if queue is None else check_queue(queue),
            check_args=check_args,
        )

        def call(*args: P.args, **kwargs: P.kwargs) -> Coroutine[None, None, R]:
            loop = _get_running_loop()
            if isinstance(loop, RunLoop):
                return loop.code.call_step(self._call(loop, options), args, kwargs)
            return self._outside(*args, **kwargs)

        return call

    async def _outside(self, *args: P.args, **kwargs: P.kwargs) -> R:
        called: Any = self.function(*args, **kwargs)
        result: R = await called if self.is_async else called
        return result

    def _call(self, loop: RunLoop, options: CallOptions) -> StepCall:
        block = _defaults.get()
        if options is NO_OPTIONS and block is NO_OPTIONS:
            plain = loop.code.plain_calls.get(self)
            if plain is None:
                plain = loop.code.plain_calls[self] = self._resolve(loop, options, block)
            return plain
        return self._resolve(loop, options, block)

    def _resolve(self, loop: RunLoop, options: CallOptions, block: CallOptions) -> StepCall:
        workflow = loop.code.definition
        check_args = options.check_args if options.check_args is not None else block.check_args
        called_with = options.retry or block.retry
        timeout = self.timeout if options.timeout is None else options.timeout
        queue = options.queue or self.queue
        return StepCall(
            step=self,
            name=options.name or self.name,
            retry=called_with or self.retry or workflow.retry or workflow.app_retry,
            timeout=timeout,
            delay=options.delay,
            at=options.at,
            queue=queue,
            check_args=True if check_args is None else check_args,
            remote=None if queue is None else remote_call(self.name, workflow.name, timeout=timeout, retry=called_with),
        )

    def __repr__(self) -> str:
        return f"<step {self.name}>"


class Workflow(Generic[P, R]):
    """A durable workflow. Start it through a client; calling it outside of a workflow runs the function."""

    def __init__(
        self,
        function: Callable[P, Awaitable[R]],
        *,
        name: str | None,
        retry: Retry | None,
        timeout: Duration | None,
        max_parallel_steps: int | None,
        retention: Duration | None,
    ) -> None:
        if not inspect.iscoroutinefunction(function):
            raise ValueError(f"a workflow must be an async def, found {function!r}: write `async def`")
        self.function = function
        self.name = check_name(name if name is not None else _name_of(function), what="workflow name")
        self.signature = Signature(function)
        self.retry = None if retry is None else check_retry(retry)
        self.app_retry = DEFAULT_RETRY
        self.timeout = None if timeout is None else check_timeout(timeout, what=f"timeout of workflow {self.name}")
        if max_parallel_steps is not None and (
            isinstance(max_parallel_steps, bool) or not isinstance(max_parallel_steps, int) or max_parallel_steps < 1
        ):
            raise ValueError(
                f"max_parallel_steps of workflow {self.name} must be an int of at least 1, found {max_parallel_steps!r}"
            )
        self.max_parallel_steps = max_parallel_steps
        self.retention = None if retention is None else seconds(retention, what=f"retention of workflow {self.name}")
        refuse_later(
            max_parallel_steps,
            what=f"max_parallel_steps of workflow {self.name}",
            instead="leave it out, or set it for the worker",
        )
        self.__name__ = self.name
        self.__doc__ = function.__doc__
        self.__wrapped__ = function
        self.__module__ = function.__module__
        self.__qualname__ = function.__qualname__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[None, None, R]:
        if isinstance(_get_running_loop(), RunLoop):
            raise StreamflowError(
                f"workflow {self.name} was called inside a workflow: child runs are not part of this version; "
                f"call {self.name}.function(…) to run it inline, as part of this run"
            )
        return self._outside(*args, **kwargs)

    async def _outside(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<workflow {self.name}>"


DEFAULT_RETRY = Retry()


def check_name(name: str, *, what: str) -> str:
    """Return `name` when it is a usable name, else raise `ValueError`."""
    try:
        return check_id(name, what=what)
    except InvalidArguments as error:
        raise ValueError(str(error)) from None


class Registry:
    """Steps and workflows without an app, for large code bases: `app.include(registry)` adds them."""

    def __init__(self) -> None:
        self.steps: dict[str, Step[..., Any]] = {}
        self.workflows: dict[str, Workflow[..., Any]] = {}

    @overload
    def step(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Step[P, R]: ...
    @overload
    def step(self, function: Callable[P, R], /) -> Step[P, R]: ...
    @overload
    def step(
        self,
        /,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        queue: str | None = None,
        process: bool = False,
        raises: type[BaseException] | tuple[type[BaseException], ...] = (),
        at_most_once: bool = False,
    ) -> _StepDecorator: ...
    def step(
        self,
        function: Any = None,
        /,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        queue: str | None = None,
        process: bool = False,
        raises: type[BaseException] | tuple[type[BaseException], ...] = (),
        at_most_once: bool = False,
    ) -> Any:
        """Make a function a step. A plain `def` runs in a thread, with `process=True` in a process pool.

        With a `queue` the workers that serve that queue run it, wherever they are: `streamflow worker --queue gpu`, or
        `serve(queues=["gpu"])`. Until there is one it waits. `at_most_once` is not for steps on a queue.
        """

        def decorate(function: Any) -> Step[..., Any]:
            made: Step[..., Any] = Step(
                function,
                name=name,
                retry=retry,
                timeout=timeout,
                queue=queue,
                process=process,
                raises=raises,
                at_most_once=at_most_once,
            )
            _add(self.steps, made.name, made, what="step")
            return made

        return decorate if function is None else decorate(function)

    @overload
    def workflow(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...
    @overload
    def workflow(
        self,
        /,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        max_parallel_steps: int | None = None,
        retention: Duration | None = None,
    ) -> _WorkflowDecorator: ...
    def workflow(
        self,
        function: Any = None,
        /,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        max_parallel_steps: int | None = None,
        retention: Duration | None = None,
    ) -> Any:
        """Make an async function a workflow. `retry` is the default of its steps, `timeout` bounds the run.

        A closed run is deleted, as `cleanup` does, when its `retention` is over, None keeps it. What counts is the
        retention that the workflow has when the run closes. Give clients time to read results, and late repeats of a
        start time to arrive: after the deletion the id is unknown, and a start begins it anew.
        """

        def decorate(function: Any) -> Workflow[..., Any]:
            made: Workflow[..., Any] = Workflow(
                function,
                name=name,
                retry=retry,
                timeout=timeout,
                max_parallel_steps=max_parallel_steps,
                retention=retention,
            )
            self._add_workflow(made)
            return made

        return decorate if function is None else decorate(function)

    def include(self, other: Registry) -> None:
        """Add the steps and workflows of another registry; a name that both have is a `ValueError`, and adds none."""
        for step in other.steps.values():
            _check_new(self.steps, step.name, step, what="step")
        for workflow in other.workflows.values():
            _check_new(self.workflows, workflow.name, workflow, what="workflow")
        for step in other.steps.values():
            _add(self.steps, step.name, step, what="step")
        for workflow in other.workflows.values():
            self._add_workflow(workflow)

    def _add_workflow(self, workflow: Workflow[..., Any]) -> None:
        _add(self.workflows, workflow.name, workflow, what="workflow")


class _StepDecorator:
    """The type of `@app.step(…)`; it exists for type checkers alone."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Step[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Step[P, R]: ...
    def __call__(self, function: Any, /) -> Any:
        raise AssertionError("a typing stand-in")


class _WorkflowDecorator:
    """The type of `@app.workflow(…)`; it exists for type checkers alone."""

    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Workflow[P, R]:
        raise AssertionError("a typing stand-in")


T = TypeVar("T")


def _add(known: dict[str, T], name: str, made: T, *, what: str) -> None:
    _check_new(known, name, made, what=what)
    known[name] = made


def _check_new(known: dict[str, T], name: str, made: T, *, what: str) -> None:
    if name in known:
        raise ValueError(
            f"{what} {name!r} is registered twice: {known[name]!r} in {known[name].__module__}, and now in "
            f"{made.__module__}; give one of them another name, as in @app.{what}(name=…)"
        )
