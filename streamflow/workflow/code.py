"""The code of one live run: its coroutines on a `WorkflowLoop`, and the bridge between them and the core's `Decisions`.

Each thing that the code waits for has a number; `_waiting` maps it to the future, or to the timer handle, that its
outcome resolves. `calls` keeps how each open step was called (its retry policy, its timeout) for the executor: these
are code, not data, so they come from replay and not from the log.
"""

from __future__ import annotations

import asyncio
import math
import signal as signals
import threading
import traceback
import uuid
from collections.abc import Collection, Iterable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

from streamflow.codec.payload import decode_value, encode_value
from streamflow.config import PAYLOAD_BYTES_MAX, TRACEBACK_BYTES_MAX
from streamflow.core.events import (
    RemoteCall,
    RunCancelled,
    RunCompleted,
    RunFailed,
    SignalReceived,
    StepCompleted,
    StepFailed,
)
from streamflow.core.machines.run import Run
from streamflow.core.replay import Decisions, Diverged, Outcome
from streamflow.core.retry import SECONDS_MAX, Retry
from streamflow.errors import (
    ErrorInfo,
    InvalidArguments,
    NonDeterminismError,
    NotInWorkflow,
    PayloadTooLarge,
    SignalError,
)
from streamflow.errors import (
    StepFailed as StepFailedError,
)
from streamflow.workflow.loop import EAGER, LoopsForever, WorkflowLoop

if TYPE_CHECKING:
    from streamflow.workflow.definitions import Step, Workflow

MESSAGE_BYTES_MAX: Final = 16_384
"""The beginning of an error's text that is kept with it."""


@dataclass(frozen=True, slots=True)
class StepCall:
    """How a step was called: every option resolved to what counts."""

    step: Step[..., Any]
    name: str
    retry: Retry
    timeout: float | None
    delay: float | None
    at: datetime | None
    queue: str | None
    check_args: bool
    remote: RemoteCall | None = None
    """For a step on a queue: what whoever runs it must know."""


class RunLoop(WorkflowLoop):
    """The loop of one run; `code` leads from the running loop to the run."""

    __slots__ = ("code",)

    def __init__(self, code: RunCode) -> None:
        super().__init__(code, salt=crc32(f"{code.run.workflow_id}\0{code.run.run}".encode()))
        self.code = code

    def set_task_factory(self, factory: Any) -> None:
        """Take None, or from Python 3.12 on asyncio.eager_task_factory; tasks of any other have no place (order.py)."""
        if factory is not None and factory is not EAGER:
            raise NotInWorkflow(
                "loop.set_task_factory inside a workflow takes None or asyncio.eager_task_factory: what another makes "
                "has another order in each replay, in a TaskGroup as in any set; wrap the coroutine where you call it"
            )
        super().set_task_factory(factory)

    def _each_once(self, items: Iterable[Any]) -> Collection[Any]:
        if isinstance(items, set | frozenset) and sum(map(asyncio.iscoroutine, items)) > 1:
            raise NotInWorkflow(
                "a set of coroutines has another order in each replay, and so would the steps that they call: pass "
                "asyncio.as_completed a list"
            )
        return super()._each_once(items)

    def close(self) -> None:
        """Close, and let go of the run: loop and code hold each other, which would leave them to the collector."""
        super().close()
        with suppress(AttributeError):  # closed before
            del self.code


class RunCode:
    """Implements the core's `Code` with asyncio coroutines, and the loop's `TimerPort` with durable timers."""

    __slots__ = (
        "_chance",
        "_main",
        "_timers",
        "_waiting",
        "at",
        "calls",
        "decisions",
        "definition",
        "loop",
        "plain_calls",
        "replaying",
        "run",
    )

    def __init__(self, definition: Workflow[..., Any], decisions: Decisions, run: Run) -> None:
        self.definition = definition
        self.decisions = decisions
        self.run = run
        self.at = 0
        self.replaying = False
        self.calls: dict[int, StepCall] = {}
        self.plain_calls: dict[Step[..., Any], StepCall] = {}
        self.loop = RunLoop(self)
        self._waiting: dict[int, asyncio.Future[Any] | asyncio.TimerHandle] = {}
        self._timers: dict[int, int] = {}
        self._main: asyncio.Task[None] | None = None
        self._chance: tuple[Random, Random] | None = None

    # -- Code: called by the core ------------------------------------------------------------------------------------

    def begin(self, args: bytes) -> None:
        """Make the main task; it runs at the next drain."""
        # In a context of its own: what the worker's context holds just now would differ on replay.
        self._main = self.loop.create_task(self._run(args), name=self.run.workflow_id, context=Context())

    def resolve(self, number: int, outcome: Outcome, signal: SignalReceived | None) -> bool:
        """Hand an outcome to whoever waits for it."""
        waiter = self._waiting.pop(number, None)
        if waiter is None:
            return False
        self.calls.pop(number, None)
        if isinstance(waiter, asyncio.TimerHandle):
            self._timers.pop(id(waiter), None)
            self.loop.fire(waiter)
        elif not waiter.done():
            waiter.set_result(signal if signal is not None else outcome)
        return True

    def cancel(self) -> None:
        """Cancel the main task."""
        if self._main is not None:
            self._main.cancel()

    def drain(self, at: int, replaying: bool) -> None:
        """Run until everything waits."""
        self.at = at
        self.replaying = self.loop.replaying = replaying
        self.loop.set_time(at / 1000)
        try:
            self.loop.drain()
        except LoopsForever as error:
            raise NonDeterminismError(
                f"run {self.run.workflow_id} ({self.run.workflow}) {error}. The run is blocked and kept as it is: "
                f"await something in the loop, or move the work into a step, and start a worker with the mended code"
            ) from None

    def close(self) -> None:
        """Drop the coroutines where they stand."""
        self.loop.close()
        self._waiting.clear()
        self._timers.clear()
        self.calls.clear()
        self._main = None

    # -- TimerPort: called by the loop -------------------------------------------------------------------------------

    def set_timer(self, handle: asyncio.TimerHandle) -> None:
        """A `call_later` of the code is a durable timer; instants are rounded up, so that none fires early."""
        callback = getattr(handle, "_callback", None)
        name = "sleep" if getattr(callback, "__name__", "") == "_set_result_unless_cancelled" else "timeout"
        number = self.decisions.timer(name, math.ceil(round(min(handle.when(), SECONDS_MAX) * 1000, 3)))
        self._waiting[number] = handle
        self._timers[id(handle)] = number

    def cancel_timer(self, handle: asyncio.TimerHandle) -> None:
        """The code no longer needs the timer."""
        number = self._timers.pop(id(handle), None)
        if number is not None and self._waiting.pop(number, None) is not None:
            self.decisions.cancel(number)

    # -- called by the workflow's code -------------------------------------------------------------------------------

    async def call_step(self, call: StepCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Schedule the step and wait for its outcome."""
        future = self.loop.create_waiter()  # first: it refuses code that unwinds while its run leaves memory
        step = call.step
        encoded = step.signature.encode_args(args, kwargs)
        check_size(encoded, what=f"the arguments of step {call.name}")
        start_at = None
        if call.delay is not None:
            start_at = self.at + math.ceil(call.delay * 1000)
        elif call.at is not None:
            start_at = to_ms(call.at)
        number = self.decisions.step(
            call.name,
            encoded,
            start_at=start_at,
            queue=call.queue,
            at_most_once=step.at_most_once,
            check_args=call.check_args,
            remote=call.remote,
        )
        self.calls[number] = call
        outcome = await self._outcome(number, future)
        if isinstance(outcome, StepCompleted):
            return step.signature.decode_result(outcome.result)
        assert isinstance(outcome, StepFailed), outcome
        raise _step_error(step, call.name, outcome)

    async def wait_signal(self, name: str, type_: Any) -> Any:
        """Wait for the next signal of that name and decode its value."""
        future = self.loop.create_waiter()
        received = await self._outcome(self.decisions.wait(name), future)
        assert isinstance(received, SignalReceived), received
        if received.error is not None:
            raise SignalError(name, received.error)
        try:
            return decode_value(received.value if received.value is not None else b"null", type_)
        except InvalidArguments as error:
            raise InvalidArguments(
                f"signal {name} of run {self.run.workflow_id}: {error}: send a value of the type that the run waits for"
            ) from None

    async def _outcome(self, number: int, future: asyncio.Future[Any]) -> Any:
        self._waiting[number] = future
        try:
            return await future
        except asyncio.CancelledError:
            if self._waiting.pop(number, None) is not None and not self.loop.is_closed():
                self.calls.pop(number, None)
                self.decisions.cancel(number)
            raise

    def set_progress(self, value: object) -> None:
        """Report progress."""
        try:
            encoded = encode_value(value)
        except InvalidArguments as error:
            raise InvalidArguments(f"progress of run {self.run.workflow_id}: {error}: report plain data") from None
        check_size(encoded, what="progress")
        if self.loop.is_closed():
            return
        self.decisions.progress(encoded)

    def now(self) -> datetime:
        """The turn's instant."""
        return from_ms(self.at)

    def random(self) -> Random:
        """The run's own chance: the same on every replay."""
        return self._streams()[0]

    def uuid4(self) -> uuid.UUID:
        """A UUID from a stream of its own, so that `random` and `uuid4` do not disturb each other."""
        return uuid.UUID(int=self._streams()[1].getrandbits(128), version=4)

    def _streams(self) -> tuple[Random, Random]:
        if self._chance is None:
            seed = f"{self.run.workflow_id}\0{self.run.run}"
            self._chance = Random(f"{seed}\0random"), Random(f"{seed}\0uuid")
        return self._chance

    async def _run(self, args: bytes) -> None:
        """The main task: the workflow's function from arguments to the event that closes the run."""
        event: RunCompleted | RunFailed | RunCancelled
        try:
            positional, named = self.definition.signature.decode_args(args)
            returned = await self.definition.function(*positional, **named)
            result = self.definition.signature.encode_result(returned)
            check_size(result, what=f"the result of workflow {self.definition.name}")
            event = RunCompleted(result=result)
        except asyncio.CancelledError as error:
            event = RunCancelled() if self.run.cancel_requested else RunFailed(error=error_info(error))
        except (Diverged, LoopsForever, GeneratorExit):
            raise
        except BaseException as error:  # whatever the code raises is the run's outcome, SystemExit too
            if is_interrupt(error):
                raise
            event = RunFailed(error=error_info(error))
        self.decisions.close_run(event)


def current(what: str) -> RunCode:
    """The run whose code is running; `NotInWorkflow` naming `what` outside of one."""
    loop = asyncio._get_running_loop()
    if isinstance(loop, RunLoop):
        return loop.code
    raise NotInWorkflow(f"{what} works only inside a workflow, while its code runs: call it there")


def check_size(payload: bytes, *, what: str) -> None:
    """Refuse a payload that would not fit a record."""
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise PayloadTooLarge(
            f"{what} has {len(payload):,} bytes of JSON, at most {PAYLOAD_BYTES_MAX:,} fit a record: "
            f"keep the value elsewhere and pass a reference to it"
        )


def _step_error(step: Step[..., Any], name: str, outcome: StepFailed) -> BaseException:
    """The exception that the awaiting code gets: the very class where the step lists it in `raises`."""
    info = outcome.error
    for declared in step.raises:
        if qualified(declared) == info.type:
            try:
                return declared(info.message)
            except Exception:  # its constructor wants something else: the message alone must do
                made = declared.__new__(declared)
                made.args = (info.message,)
                return made
    return StepFailedError(name, outcome.attempt, info)


def qualified(type_: type[BaseException]) -> str:
    """The class's name, with its module unless it is built in."""
    return type_.__qualname__ if type_.__module__ == "builtins" else f"{type_.__module__}.{type_.__qualname__}"


def error_info(error: BaseException) -> ErrorInfo:
    """An exception as the log keeps it."""
    text = _utf8("".join(traceback.format_exception(error)))
    if len(text) > TRACEBACK_BYTES_MAX:
        text = b"\xe2\x80\xa6" + text[-TRACEBACK_BYTES_MAX:]  # its end: the frames that matter
    try:
        message = str(error)
    except Exception as broken:  # a user's __str__ may raise anything
        message = f"(its text could not be made: {type(broken).__name__})"
    return ErrorInfo(
        type=_utf8(qualified(type(error))).decode(),
        message=_utf8(message)[:MESSAGE_BYTES_MAX].decode("utf-8", "ignore"),
        traceback=text.decode("utf-8", "ignore"),
    )


def is_interrupt(error: BaseException) -> bool:
    """Whether this may be Ctrl-C: it belongs to whoever runs the process, and must never be recorded as a failure.

    Only where SIGINT raises: a process that handles it otherwise, as `streamflow worker` does, has the error from the
    user's code, which would else end every worker that takes the run.
    """
    if not isinstance(error, KeyboardInterrupt) or threading.current_thread() is not threading.main_thread():
        return False
    handler = signals.getsignal(signals.SIGINT)
    raised_by = getattr(handler, "func", handler)  # asyncio.run installs a partial
    return handler is signals.default_int_handler or getattr(raised_by, "__module__", None) == "asyncio.runners"


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def to_ms(at: datetime) -> int:
    """An aware datetime as milliseconds since the epoch, rounded up."""
    return math.ceil(round(at.timestamp() * 1000, 3))


def from_ms(at: int) -> datetime:
    """Milliseconds since the epoch as an aware datetime in UTC."""
    return datetime.fromtimestamp(at / 1000, UTC)
