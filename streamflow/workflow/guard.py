"""Two guards around workflow code while it runs: against IO, and against never awaiting.

Rules
- A drain (loop.py) is the only time in which workflow code runs. It brackets itself with `enter()` and the
  three lines shown there; `Watch.since` is the one fact that both guards look at, and it is per thread.
- `forbid_io()` turns IO, threads, processes and real sleeping into `NotInWorkflow` at the call, inside drains only.
  It stands on audit events, so it sees C extensions too, whatever name the function was imported under.
  Reading the clock has no audit event: `time.time()` and `datetime.now()` are not guarded; use `sf.now()`.
- Imports, logging, source lines for tracebacks and the debugger do IO of their own inside workflow code. They
  are allowed: they leave no trace in the run's decisions.
- A drain that has burnt `DRAIN_SECONDS_MAX` of its thread's processor time gets `LoopsForever` injected, again
  on each tick if it was caught. Processor time, so that a starved or suspended host condemns nobody.

How an injected exception is kept from surfacing behind its drain
    The drain's last act is a plain store, `since = 0.0`, then it reads `injected`. The watchdog stores
    `injected` first, then reads `since`. So one of them sees the other: either nothing is injected, or the drain
    calls `settle()`, which waits for the watchdog's lock and takes back what is still pending. Neither costs
    a lock on the way that all drains take.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from threading import get_ident
from time import monotonic
from types import FrameType
from typing import Final, ParamSpec, TypeVar

from streamflow.errors import NotInWorkflow

_P = ParamSpec("_P")
_T = TypeVar("_T")

DRAIN_SECONDS_MAX: Final = 2.0
"""A turn is some microseconds; two seconds are a bug, and still short of any lease that a stalled worker would lose."""

TICKS_PER_LIMIT: Final = 4
"""How often the watchdog looks within one limit: late by a quarter at most, twice a second at most."""

TICK_SECONDS_MIN: Final = 0.005
"""Keeps a tiny limit, as tests set it, from turning the watchdog itself into a busy loop."""

FAMILIES: Final = frozenset(
    "fcntl ftplib glob http imaplib mmap msvcrt nntplib pathlib poplib pty shutil smtplib socket sqlite3 subprocess"
    " syslog telnetlib tempfile urllib webbrowser winreg".split()
)
"""Audit events are named `family.what`; everything in these families is IO."""

EVENTS: Final = frozenset(
    "_thread.start_joinable_thread _thread.start_new_thread _winapi.CreateProcess builtins.input open os.chdir"
    " os.chflags os.chmod os.chown os.exec os.fork os.forkpty os.fwalk os.getxattr os.kill os.killpg os.link"
    " os.listdir os.listdrives os.listmounts os.listvolumes os.listxattr os.lockf os.mkdir os.posix_spawn os.remove"
    " os.removexattr os.rename os.rmdir os.scandir os.setxattr os.spawn os.startfile os.startfile/2 os.symlink"
    " os.system os.truncate os.utime os.walk signal.pthread_kill time.sleep".split()
)
"""The single events outside those families."""

INFRASTRUCTURE: Final = frozenset(
    ("importlib", "_frozen_importlib", "_frozen_importlib_external", "zipimport", "linecache", "logging", "pdb", "bdb")
)
"""Modules whose IO, when they are on the stack, is not the workflow's."""

STEP_HINT: Final = "call it inside a step (@app.step), then await that step"

ARGUMENT_CHARS_MAX: Final = 80
"""Enough to recognise a path or an address in a message, too little for what is in a long command line."""

_BOUNDARY: Final = "streamflow.workflow.loop"


class LoopsForever(BaseException):
    """Workflow code ran too long without awaiting, or kept itself busy: the run cannot go on with this code."""

    def __str__(self) -> str:
        return super().__str__() or "workflow code runs without ever awaiting"


class Watch:
    """What is known about one thread: whether it is inside a drain, since when, and what was done about it."""

    __slots__ = ("_clock", "_fired", "_lock", "_thread_id", "injected", "since", "where")

    def __init__(self, thread_id: int) -> None:
        self.since = 0.0
        self.injected = False
        self.where = ""
        self._fired = False
        self._lock = threading.Lock()
        self._thread_id = thread_id
        # Taken on the thread itself: asking for the clock of a thread that may be gone is undefined.
        self._clock = time.pthread_getcpuclockid(thread_id) if hasattr(time, "pthread_getcpuclockid") else None

    def spent_seconds(self) -> float:
        """The thread's processor time; the real clock where the platform does not tell."""
        if self._clock is None:
            return monotonic()
        try:
            return time.clock_gettime(self._clock)
        except OSError:  # the thread ended inside a drain
            return 0.0

    def inject(self, since: float) -> None:
        """Raise LoopsForever in the thread, if it still is in the drain that began at `since`."""
        with self._lock:
            self.injected = True  # before `since` is read: see the module's text
            if self.since == since:
                self.where = _place(sys._current_frames().get(self._thread_id))
                self._fired = True
                _set_async_exception(self._thread_id, LoopsForever)
            else:
                self.injected = self._fired

    def settle(self) -> None:
        """Make sure that nothing is pending for the drain that was just left; `where` is set if something had been.

        Called by that drain, which calls it again if the pending exception surfaced in this very call.
        """
        try:
            self._take_back()
        except LoopsForever:
            self._take_back()

    def complain(self) -> None:
        """Raise, outside of the reach of any injection, a LoopsForever that says where the code was, if there was one.

        Also if the code caught the injected one, or asyncio put it into a task: a drain that was hit always ends so.
        """
        where, self.where = self.where, ""
        if where:
            raise LoopsForever(
                f"workflow code ran for {_watchdog.limit_seconds:g} s without awaiting, {where}: "
                "put long computations into a step (@app.step)"
            )

    def _take_back(self) -> None:
        with self._lock:
            fired = self._fired
            self._fired = self.injected = False
        if fired:
            # Setting NULL would withdraw it, but up to Python 3.12 leaves the interpreter looking for it ever after: a
            # slow path for all code, and an endless loop for traced code. So have one delivered, here.
            with contextlib.suppress(LoopsForever):
                _set_async_exception(self._thread_id, LoopsForever)
                while True:
                    pass


_watches: Final[dict[int, Watch]] = {}


def enter() -> Watch | None:
    """Begin a drain on this thread; None if one is going on already, which then covers this one.

    The caller ends it so, with nothing before it in its `finally` (loop.py, `_inside`): `watch.since = 0.0`, then, if
    `watch.injected`, `watch.settle()`, again if LoopsForever came out of that, and last `watch.complain()`.
    """
    watch = _watches.get(get_ident())
    if watch is None:
        watch = _watch_this_thread()
    elif watch.since:
        return None
    watch.since = monotonic()
    if _watchdog.parked:  # read after the store; the watchdog parks first and then looks: one sees the other
        _watchdog.wake()
    return watch


def inside() -> bool:
    """Whether this thread runs workflow code now."""
    watch = _watches.get(get_ident())
    return watch is not None and watch.since != 0.0


def set_drain_seconds_max(seconds: float) -> None:
    """Change the limit for the whole process; `math.inf` turns it off, as one wants under a debugger."""
    if not seconds > 0:
        raise ValueError(f"the limit must be positive, not {seconds!r}")
    _watchdog.limit_seconds = seconds
    _watchdog.event.set()


def _watch_this_thread() -> Watch:
    _watchdog.start()
    return _watches.setdefault(get_ident(), Watch(get_ident()))


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "place unknown"
    return f"last seen in {frame.f_code.co_qualname}, {frame.f_code.co_filename}:{frame.f_lineno}"


def _set_async_exception(thread_id: int, exception: type[BaseException]) -> None:
    import ctypes  # here, because loading it takes longer than everything else in this module

    # Through PyDLL, so the interpreter lock is held. It replaces one that is still pending.
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), ctypes.py_object(exception))


class _Watchdog:
    """One thread per process. It sleeps without limit while no drain is seen, and looks once per tick else."""

    __slots__ = ("_seen", "event", "limit_seconds", "parked", "thread")

    def __init__(self) -> None:
        self.limit_seconds = DRAIN_SECONDS_MAX
        self._reset()

    def _reset(self) -> None:
        self.parked = True
        self.event = threading.Event()
        self.thread: threading.Thread | None = None
        self._seen: dict[Watch, tuple[float, float]] = {}

    def start(self) -> None:
        if self.thread is None:
            import ctypes  # noqa: F401  # now, and not first within a drain, where loading it would cost the run

            self.thread = threading.Thread(target=self._run, name="streamflow-watchdog", daemon=True)
            self.thread.start()

    def wake(self) -> None:
        self.parked = False
        self.event.set()

    def after_fork(self) -> None:
        """In the child no thread but the forking one is left; the first drain there starts afresh."""
        _watches.clear()
        self._reset()

    def _run(self) -> None:
        while True:
            self.parked = True
            if not any(watch.since for watch in list(_watches.values())):
                self.event.wait()
            self.parked = False
            self.event.clear()
            if self.limit_seconds < math.inf:
                self.event.wait(max(self.limit_seconds / TICKS_PER_LIMIT, TICK_SECONDS_MIN))
            else:
                self.event.wait()  # until the limit is changed
            self._look()

    def _look(self) -> None:
        for watch in list(_watches.values()):
            since = watch.since
            if not since:
                self._seen.pop(watch, None)
                continue
            spent_seconds = watch.spent_seconds()
            seen_since, seen_spent_seconds = self._seen.get(watch, (0.0, 0.0))
            if seen_since != since:
                self._seen[watch] = (since, spent_seconds)
            elif spent_seconds - seen_spent_seconds >= self.limit_seconds:
                watch.inject(since)


_watchdog: Final = _Watchdog()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_watchdog.after_fork)


@functools.cache  # once per process
def forbid_io() -> None:
    """Refuse IO, threads, processes and real sleeping to workflow code, from now on in the whole process.

    It cannot be taken back: an audit hook stays. Code outside of drains pays one dictionary lookup per event.
    """
    sys.addaudithook(_make_hook())
    # What older Pythons do not audit is wrapped instead; `from time import sleep` taken before this call escapes.
    if sys.version_info < (3, 13):
        time.sleep = _refusing(time.sleep, "time.sleep")
    if sys.version_info < (3, 12):
        refusing = _refusing(_thread.start_new_thread, "_thread.start_new_thread")
        _thread.start_new_thread = threading._start_new_thread = refusing  # type: ignore[assignment,attr-defined]


def _make_hook() -> Callable[[str, tuple[object, ...]], None]:
    # Bound here, because the hook outlives the module's globals when the interpreter shuts down.
    watches, ident, events, families, refuse = _watches, get_ident, EVENTS, FAMILIES, _refuse

    def hook(event: str, args: tuple[object, ...]) -> None:
        watch = watches.get(ident())
        if watch is None or not watch.since:
            return
        if event in events or event.partition(".")[0] in families:
            refuse(event, args)

    return hook


def _refusing(function: Callable[_P, _T], event: str) -> Callable[_P, _T]:
    @functools.wraps(function)
    def refusing(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if inside():
            _refuse(event, args)
        return function(*args, **kwargs)

    return refusing


def _refuse(event: str, args: tuple[object, ...]) -> None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__") or ""
        if module == _BOUNDARY:
            break  # whoever called the drain may well be importing
        if module.partition(".")[0] in INFRASTRUCTURE:
            return
        frame = frame.f_back
    raise NotInWorkflow(_text(event, args))


def _text(event: str, args: tuple[object, ...]) -> str:
    if event == "time.sleep":
        return "time.sleep stops the worker and is not replayed: use `await asyncio.sleep(...)`, which is durable"
    if event.startswith("_thread."):
        return f"a workflow cannot start threads ({event}), they do not replay: {STEP_HINT}"
    shown = ", ".join(_shorten(repr(arg)) for arg in args if isinstance(arg, str | int | tuple))
    return f"{event}({shown}) is input or output, which a workflow cannot replay: {STEP_HINT}"


def _shorten(text: str) -> str:
    return text if len(text) <= ARGUMENT_CHARS_MAX else text[: ARGUMENT_CHARS_MAX - 1] + "…"
