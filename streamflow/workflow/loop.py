"""The event loop that workflow code runs on: asyncio's contract, without a clock, IO or threads.

Rules
- One loop per live run. It does nothing by itself: whoever owns the run sets the time, settles futures, fires timers
  that came due, and then calls `drain()`, which runs callbacks in order of arrival until none is ready.
- The same calls in the same order give the same execution, always: callbacks are first in, first out, time stands
  still within a drain, tasks are named and kept by the loop, and the cyclic garbage collector is off meanwhile,
  because finalizers and weak references must not depend on what else the process allocates.
- A `call_later` is a durable timer: it goes to the `TimerPort` and comes back through `fire()`.
- Everything that would reach outside raises NotInWorkflow. What a newer Python adds to AbstractEventLoop does, too.
- LoopsForever leaves `drain()` whatever the code tries; the loop is then only good for `close()`.

Theory of operation
    A drain may happen inside a callback or a task of a real loop, so it swaps what asyncio keeps per thread: the
    running loop, the current task (Python 3.14; before, it is kept per loop) and the hooks of async generators.
    A resume costs `future.set_result` → `call_soon` → one pass of the loop in `_run_ready`; all the rest is there to
    keep that short.

    Eviction is `close()` with coroutines that still wait. Dropping them would run their `finally` blocks whenever
    and wherever the last reference goes, perhaps on the worker's own loop. So close() does it at once, inside a
    drain of its own whose loop is closed already: callbacks are dropped, and whatever would start or wait for
    something raises Evicted. It derives from GeneratorExit, as which the coroutines end without complaint.
    Code between two awaits of a `finally` does run, and again when the run is replayed: only awaits are durable.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import sys
import warnings
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Sequence
from contextvars import Context, copy_context
from typing import Any, Final, Protocol, TypeVar, TypeVarTuple, Unpack

from streamflow.workflow import guard
from streamflow.workflow.guard import LoopsForever
from streamflow.workflow.order import OrderedFuture, OrderedLoop, OrderedTask

__all__ = ["CALLBACKS_MAX", "Evicted", "LoopsForever", "TimerPort", "WorkflowLoop", "many_drains"]

CALLBACKS_MAX: Final = 500_000
"""Per drain. Half a second and more of callbacks that do nothing; a fan-out of 10,000 steps needs some 50,000."""

EXCEPTIONS_MAX: Final = 16
"""Unhandled exceptions kept per loop. Each holds its frames; the first tell the cause, the rest are in the log."""

CLOSE_ATTEMPTS_MAX: Final = 100
"""How often a coroutine that goes on after GeneratorExit gets it again: each await in a `finally` may cost one."""

EVICTED_MAX: Final = 1_000
"""How often a closed loop raises Evicted before it takes the caller for a loop that swallows everything."""

EAGER: Final = getattr(asyncio, "eager_task_factory", None)
"""The factory whose tasks are made here instead, with a place of their own; it came with Python 3.12."""

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")
_Coro = Generator[Any, None, _T] | Coroutine[Any, Any, _T]
_ExceptionHandler = Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object]

_log: Final = logging.getLogger("streamflow.workflow")


class Evicted(GeneratorExit):
    """The run leaves memory: code that is being unwound tried to start or to wait for something."""


class TimerPort(Protocol):
    """Where a loop leaves its timers; the owner calls `fire()` with the handle when its time has come."""

    def set_timer(self, handle: asyncio.TimerHandle) -> None:
        """A timer is wanted at `handle.when()`, in seconds of the loop's time."""

    def cancel_timer(self, handle: asyncio.TimerHandle) -> None:
        """It is not wanted any more; only called for a handle that was set and has not fired."""


class _Handle(asyncio.Handle):
    """A Handle without the questions about debug mode, which are half of its price."""

    __slots__ = ()
    _context: Context
    _callback: Callable[..., object]

    def __init__(
        self,
        callback: Callable[..., object],
        args: Sequence[object],
        loop: asyncio.AbstractEventLoop,
        context: Context | None = None,
    ) -> None:
        self._context = copy_context() if context is None else context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None


class _Timer(asyncio.TimerHandle):
    """A TimerHandle whose `_scheduled` says whether the port knows it."""

    __slots__ = ()
    _scheduled: bool


class _Ready(list[Any]):
    """The ready list of a closed loop: what is put there is gone."""

    __slots__ = ()

    def append(self, handle: object) -> None:
        pass


_NEVER_READY: Final = _Ready()


class WorkflowLoop(OrderedLoop):
    """The event loop of one run; see the module's text for the rules."""

    __slots__ = (
        "_asyncgen_going",
        "_asyncgens",
        "_callbacks_max",
        "_closed",
        "_evictions",
        "_exception_handler",
        "_exceptions",
        "_ready",
        "_running",
        "_task_factory",
        "_tasks",
        "_time",
        "replaying",
        "timers",
    )

    def __init__(self, timers: TimerPort, *, callbacks_max: int = CALLBACKS_MAX, salt: int = 0) -> None:
        super().__init__(salt)
        self.timers: TimerPort | None = timers  # public: from the running loop to the run it belongs to
        self.replaying = False
        # Swapped for a new one on each pass, so the handles of one pass need no marker; a deque would hold a page.
        self._ready: list[Any] = []
        # Strong, unlike asyncio's: when a task dies that nobody refers to must not depend on the garbage collector.
        self._tasks: dict[asyncio.Future[Any], None] = {}
        self._time = 0.0
        self._running = False
        self._closed = False
        self._callbacks_max = callbacks_max
        self._evictions = 0
        self._exceptions: list[BaseException] | None = None
        self._exception_handler: _ExceptionHandler | None = None
        self._task_factory: Any = None
        self._asyncgens: dict[weakref.ref[AsyncGenerator[Any, Any]], int] | None = None
        self._asyncgen_going: int | None = None

    def __repr__(self) -> str:
        return (
            f"<WorkflowLoop running={self._running} closed={self._closed} time={self._time} tasks={len(self._tasks)}>"
        )

    # ---------------------------------------------------------------------------------------- driven from outside

    def set_time(self, seconds: float) -> None:
        """Set what `time()` returns from now on; an earlier time than the present one is ignored."""
        self._time = max(seconds, self._time)

    def fire(self, handle: asyncio.TimerHandle) -> None:
        """Queue the callback of a timer that came due, unless it was cancelled."""
        assert isinstance(handle, _Timer), handle
        if not handle.cancelled():
            handle._scheduled = False
            self._ready.append(handle)

    def drain(self) -> None:
        """Run callbacks until none is ready."""
        if self._ready:
            self._inside(self._run_ready)

    def close(self) -> None:
        """Let go of everything, in the middle of whatever the run awaits; nothing of it reaches the world."""
        if self._running:
            raise RuntimeError("Cannot close a running event loop")
        if self._closed:
            return
        self._closed = self.replaying = True
        self._ready = _NEVER_READY
        self._exceptions = self._exception_handler = self._task_factory = None
        try:
            if self._tasks:
                self._inside(self._unwind)
        finally:
            self._tasks.clear()
            self._asyncgens = self.timers = None

    def exceptions(self) -> tuple[BaseException, ...]:
        """The first exceptions that nobody handled: of callbacks, and of tasks that were dropped without a look."""
        return tuple(self._exceptions or ())

    def _inside(self, work: Callable[[], None]) -> None:
        """Do `work` with this loop as the running one of this thread, guarded; restore what was there before."""
        if self._running:
            raise RuntimeError("This event loop is already running")
        outer = asyncio._get_running_loop()
        outer_task = _leave_task(outer)
        hooks = sys.get_asyncgen_hooks()
        hooked = hooks.firstiter is _asyncgen_begins
        collecting = gc.isenabled()
        try:
            self._running = True
            asyncio._set_running_loop(self)
            if not hooked:
                sys.set_asyncgen_hooks(_asyncgen_begins, _asyncgen_dropped)
            gc.disable()
            watch = guard.enter()
            try:
                work()
            finally:
                # These lines are the other half of guard.py's promise; the store must come first.
                if watch is not None:
                    watch.since = 0.0
                    if watch.injected:
                        try:
                            watch.settle()
                        except LoopsForever:
                            watch.settle()
                        watch.complain()
        finally:
            if collecting:
                gc.enable()
            if not hooked:
                sys.set_asyncgen_hooks(*hooks)
            asyncio._set_running_loop(outer)
            _return_to_task(outer, outer_task)
            self._running = False

    def _run_ready(self) -> None:
        budget = self._callbacks_max
        while batch := self._ready:
            self._ready = []
            budget -= len(batch)
            if budget < 0:
                raise LoopsForever(
                    f"workflow code ran {self._callbacks_max} callbacks without waiting for anything: look for a loop "
                    "whose awaits are always ready, as asyncio.sleep(0) is"
                )
            rest = iter(batch)
            for handle in rest:
                if handle._cancelled:
                    continue
                try:
                    handle._context.run(handle._callback, *handle._args)
                except (LoopsForever, KeyboardInterrupt):
                    self._ready[:0] = rest
                    raise
                except BaseException as error:
                    # SystemExit, too: a workflow that calls sys.exit() ends itself, not its worker. Its task keeps it.
                    self._report(handle, error)

    def _report(self, handle: asyncio.Handle, error: BaseException) -> None:
        self.call_exception_handler(
            {"message": f"Exception in callback {handle!r}", "exception": error, "handle": handle}
        )

    # -------------------------------------------------------------------------------------------------- eviction

    def _unwind(self) -> None:
        _expect_unawaited()
        tasks = list(self._tasks)
        for task in tasks:
            _close_coroutine(task)
        # Break the cycles task → future that it waits for → wakeup of the task, and mark the tasks as done, so that
        # nothing is left for the garbage collector, and nothing to complain about when they die.
        for task in tasks:
            waiter = getattr(task, "_fut_waiter", None)
            if isinstance(waiter, asyncio.Future):
                waiter.cancel()  # its own, which for gather() reaches the futures gathered
            for future in (waiter, task):
                if isinstance(future, asyncio.Future):  # a task factory may make anything
                    asyncio.Future.cancel(future)  # not Task.cancel, which waits for the coroutine

    def _evicted(self) -> None:
        """Raise Evicted; but code that swallows everything in a loop must get something that it can wait for."""
        self._evictions += 1
        if self._evictions <= EVICTED_MAX:
            raise Evicted("the run leaves memory; nothing can be awaited any more")

    # --------------------------------------------------------------------------------------------------- asyncio

    def time(self) -> float:
        return self._time

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        """Do nothing: debug mode measures real time, and would make callbacks depend on it."""

    def call_soon(
        self, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        if delay is None:
            raise TypeError("delay must not be None")
        return self.call_at(self._time + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        if when is None:
            raise TypeError("when cannot be None")
        handle = _Timer(when, callback, args, self, context)
        if self._closed:
            self._evicted()
        elif not when > self._time:
            self._ready.append(handle)
        elif when < math.inf:  # what never fires needs no timer
            assert self.timers is not None, self
            handle._scheduled = True
            self.timers.set_timer(handle)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        # Called by TimerHandle.cancel(). Not when evicted: the timer stays in the log, and the run comes back.
        if isinstance(handle, _Timer) and handle._scheduled and not self._closed:
            handle._scheduled = False
            assert self.timers is not None, self
            self.timers.cancel_timer(handle)

    def create_future(self) -> asyncio.Future[Any]:
        if self._closed:
            self._evicted()
        return OrderedFuture(loop=self)

    def create_waiter(self) -> asyncio.Future[Any]:
        """A future that is awaited once and never comes into a set: cheaper than `create_future`."""
        if self._closed:
            self._evicted()
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: _Coro[_T], *, name: object = None, context: Context | None = None, **options: Any
    ) -> asyncio.Task[_T]:
        if self._closed:
            coro.close()
            self._evicted()
        self._tasks_made += 1
        # Not asyncio's own default, which counts the tasks of the whole process.
        name = f"task-{self._tasks_made}" if name is None else str(name)
        task: asyncio.Task[_T]
        if self._task_factory is None or self._task_factory is EAGER:
            if self._task_factory is not None:
                options.setdefault("eager_start", True)
            task = OrderedTask(self._task_place(), coro, loop=self, name=name, context=context, **options)
        else:
            if context is not None:
                options["context"] = context
            task = self._task_factory(self, coro, **options)
            if hasattr(task, "set_name"):
                task.set_name(name)
        if not task.done():  # an eager one may be
            self._tasks[task] = None
            task.add_done_callback(self._tasks.pop)
        return task

    def set_task_factory(self, factory: Any) -> None:
        if factory is not None and not callable(factory):
            raise TypeError("task factory must be a callable or None")
        self._task_factory = factory

    def get_task_factory(self) -> Any:
        return self._task_factory

    # ------------------------------------------------------------------------------------------ unhandled exceptions

    def set_exception_handler(self, handler: _ExceptionHandler | None) -> None:
        if handler is not None and not callable(handler):
            raise TypeError(f"A callable object or None is expected, got {handler!r}")
        self._exception_handler = handler

    def get_exception_handler(self) -> _ExceptionHandler | None:
        return self._exception_handler

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """Log it, unless the run is replaying: then it was logged when it happened."""
        if self.replaying:
            return
        error = context.get("exception")
        details = "".join(
            f"\n{key}: {context[key]!r}" for key in sorted(context) if key not in {"message", "exception"}
        )
        _log.error(
            "%s%s", context.get("message") or "Unhandled exception in a workflow", details, exc_info=error or False
        )

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self._closed:  # what is dropped with the run has not gone wrong
            return
        error = context.get("exception")
        if error is not None:
            if self._exceptions is None:
                self._exceptions = []
            if len(self._exceptions) < EXCEPTIONS_MAX:
                self._exceptions.append(error)
        if self._exception_handler is None:
            self.default_exception_handler(context)
            return
        # In the context of what went wrong, as asyncio does it since 3.12.
        origin: Any = context.get("task") or context.get("future") or context.get("handle")
        run = origin.get_context().run if hasattr(origin, "get_context") else _call
        try:
            run(self._exception_handler, self, context)
        except Exception as handler_error:  # the handler is the user's
            self.default_exception_handler(
                {"message": "Unhandled error in exception handler", "exception": handler_error, "context": context}
            )

    # ---------------------------------------------------------------------------------------------- async generators

    def _asyncgen_begins(self, agen: AsyncGenerator[Any, Any]) -> None:
        if self._asyncgens is None:
            self._asyncgens = {}
        self._asyncgens[weakref.ref(agen, self._asyncgen_gone)] = id(agen)

    def _asyncgen_gone(self, reference: weakref.ref[AsyncGenerator[Any, Any]]) -> None:
        # The last reference went. If the generator had not ended, Python calls _asyncgen_dropped next, and there it
        # shows that the generator is one of this loop, whose hooks all loops share.
        self._asyncgen_going = None if self._asyncgens is None else self._asyncgens.pop(reference, None)

    def _asyncgen_dropped(self, agen: AsyncGenerator[Any, Any]) -> None:
        # As in asyncio, its `finally` runs as a task, if the last reference went within a drain: that is the same on
        # each replay. Elsewhere it was the garbage collector or the eviction, and the code must not run at all.
        if not self._closed and self._asyncgen_going == id(agen):
            self.create_task(agen.aclose())

    async def shutdown_asyncgens(self) -> None:
        """Close the async generators that are open, oldest first."""
        agens = [agen for reference in list(self._asyncgens or ()) if (agen := reference()) is not None]
        self._asyncgens = None
        for agen, result in zip(
            agens, await asyncio.gather(*(agen.aclose() for agen in agens), return_exceptions=True), strict=True
        ):
            if isinstance(result, Exception):
                self.call_exception_handler(
                    {
                        "message": f"an error occurred during closing of asynchronous generator {agen!r}",
                        "exception": result,
                        "asyncgen": agen,
                    }
                )


def _asyncgen_begins(agen: AsyncGenerator[Any, Any]) -> None:
    loop = asyncio._get_running_loop()
    if isinstance(loop, WorkflowLoop):
        loop._asyncgen_begins(agen)


def _asyncgen_dropped(agen: AsyncGenerator[Any, Any]) -> None:
    loop = asyncio._get_running_loop()
    if isinstance(loop, WorkflowLoop):
        loop._asyncgen_dropped(agen)


@contextlib.contextmanager
def many_drains() -> Iterator[None]:
    """Around drains that follow each other with no other asynchronous code in between: makes each of them cheaper.

    Each would swap the hooks of async generators and back. That raises four audit events, and with the hook of
    guard.py they take half of what entering and leaving a drain takes: 1.7 of 3.5 us.
    """
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(_asyncgen_begins, _asyncgen_dropped)
    try:
        yield
    finally:
        sys.set_asyncgen_hooks(*hooks)


# ------------------------------------------------------------------------------------------------ odds and ends

if sys.version_info >= (3, 14):

    def _leave_task(loop: asyncio.AbstractEventLoop | None) -> asyncio.Task[Any] | None:
        """Since 3.14 the current task is kept per thread, so a task of the outer loop must step aside."""
        return None if loop is None else asyncio.tasks._swap_current_task(loop, None)

    def _return_to_task(loop: asyncio.AbstractEventLoop | None, task: asyncio.Task[Any] | None) -> None:
        if loop is not None:
            asyncio.tasks._swap_current_task(loop, task)

else:

    def _leave_task(loop: asyncio.AbstractEventLoop | None) -> asyncio.Task[Any] | None:
        """The current task is kept per loop: nothing to do."""

    def _return_to_task(loop: asyncio.AbstractEventLoop | None, task: asyncio.Task[Any] | None) -> None:
        pass


_unkillable: Final[list[object]] = []
"""Coroutines that survive every GeneratorExit. Dropping them would run their code later, somewhere; so they stay."""


def _close_coroutine(task: Any) -> None:
    coro = task.get_coro() if hasattr(task, "get_coro") else None
    if coro is None:
        return
    # In the task's own context, so that `finally` blocks may reset context variables (3.11 does not tell it).
    run = task.get_context().run if hasattr(task, "get_context") else _call
    for _ in range(CLOSE_ATTEMPTS_MAX):
        try:
            run(coro.close)
            return
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            # An error of the user's code ended the coroutine, which is all that is wanted. If it awaited instead,
            # close() says so with a RuntimeError, and the coroutine still has a frame.
            if getattr(coro, "cr_frame", getattr(coro, "gi_frame", None)) is None:
                return
            with contextlib.suppress(AttributeError):
                error.__traceback__ = None
    _unkillable.append(coro)
    _log.warning(
        "%r goes on whatever is raised at its awaits, so its memory cannot be freed: do not catch BaseException in a "
        "loop around an await",
        coro,
    )


def _call(function: Callable[..., object], *args: object) -> None:
    function(*args)


class _WhileUnwinding:
    """Stands for a regular expression in a warning filter: matches only within a close() on this thread."""

    def match(self, _text: str) -> bool:
        loop = asyncio._get_running_loop()
        return isinstance(loop, WorkflowLoop) and loop.is_closed()


_UNAWAITED: Final = ("ignore", _WhileUnwinding(), RuntimeWarning, None, 0)


def _expect_unawaited() -> None:
    """Silence "coroutine was never awaited" for coroutines that a run being evicted had made and not come to yet.

    Not by warnings.catch_warnings(), which is not safe with threads; this filter stays, and matches nothing else.
    """
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    if not filters or filters[0] is not _UNAWAITED:
        with contextlib.suppress(ValueError):
            filters.remove(_UNAWAITED)
        filters.insert(0, _UNAWAITED)
