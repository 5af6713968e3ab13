"""The guard against the real world: what is simulated must not wait for what is not.

A simulated process lives in virtual time, on one thread. A socket, a subprocess or a real sleep in it would stop the
whole world, give another story for the same seed, or never end. So they are refused while the world runs, at the call,
with a text that says what to do. Files are left alone: they answer at once.

Rules
- `watching` brackets every run of the world. It is per thread, and the listener hears of each refusal, since the code
  that is refused may catch the error.
- What workflow code must not do is for the product's own guard to say (workflow/guard.py): it refuses all of this, too.
- The hook stands on audit events, so it sees C extensions too. It stays for the life of the process, and costs one
  look at a set outside of worlds.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, NoReturn, SupportsIndex

from streamflow.errors import StreamflowError
from streamflow.workflow.guard import inside
from streamflow.workflow.stepinfo import StepInfo, running

FAMILIES: Final = frozenset("ftplib http imaplib nntplib poplib smtplib socket subprocess telnetlib urllib".split())
EVENTS: Final = frozenset(
    "_winapi.CreateProcess os.exec os.fork os.forkpty os.posix_spawn os.spawn os.system time.sleep".split()
)
HARMLESS: Final = frozenset(("socket.gethostname",))
INFRASTRUCTURE: Final = frozenset(("logging", "pdb", "bdb"))
"""Modules that may do what they like: a debugger, and where log records go."""

LOOP_METHODS: Final = frozenset(
    (
        "add_reader add_signal_handler add_writer connect_accepted_socket connect_read_pipe connect_write_pipe"
        " create_connection create_datagram_endpoint create_server create_unix_connection create_unix_server"
        " getaddrinfo getnameinfo sendfile sock_accept sock_connect sock_recv sock_recv_into sock_recvfrom"
        " sock_recvfrom_into sock_sendall sock_sendfile sock_sendto start_tls subprocess_exec subprocess_shell"
    ).split()
)
"""What an event loop does besides running code, all of it refused."""


class NotSimulated(StreamflowError):
    """Code in a simulated world tried something of the real one: a socket, a process, a real sleep or event loop."""


Listener = Callable[[NotSimulated], object]


class _Here(threading.local):
    listener: Listener | None = None


_here: Final = _Here()


@contextmanager
def watching(listener: Listener) -> Iterator[None]:
    """Refuse the real world to what this thread runs inside the block; the listener hears of each refusal."""
    _install()
    before, _here.listener = _here.listener, listener
    try:
        yield
    finally:
        _here.listener = before


def attempt_name(info: StepInfo) -> str:
    """An attempt, as people look for it."""
    return f"step {info.step} (number {info.number}, attempt {info.attempt}) of run {info.workflow_id}"


def who_runs() -> str:
    """Whose code is running: a step's, or the test's."""
    info = running.get(None)
    return "the test's own code, outside of any step" if info is None else attempt_name(info)


def refuse(what: str) -> NoReturn:
    """Raise `NotSimulated` for `what`, and tell the listener."""
    if what == "time.sleep":
        text = (
            "time.sleep() stops the whole simulated world, whose time is virtual: use asyncio.sleep() in async "
            "code, or mock the step that does it (world.mock_step)"
        )
    else:
        text = (
            f"{what} reaches for the real world from a simulated one, where time is virtual and everything runs on "
            f"one thread: mock the step that does it (world.mock_step), or what it calls"
        )
    error = NotSimulated(f"{who_runs()}: {text}")
    if _here.listener is not None:
        _here.listener(error)
    raise error


def loop_method(name: str) -> Any:
    """A method for a simulated event loop that refuses."""

    def method(self: object, *_args: object, **_kwargs: object) -> NoReturn:
        refuse(f"loop.{name}()")

    method.__name__ = name
    return method


@functools.cache  # once per process
def _install() -> None:
    sys.addaudithook(_make_hook())
    if sys.version_info < (3, 13):  # not audited there
        real = time.sleep

        @functools.wraps(real)
        def sleep(seconds: float | SupportsIndex, /) -> None:
            if _here.listener is not None and not inside():
                refuse("time.sleep")
            real(seconds)

        time.sleep = sleep


def _make_hook() -> Callable[[str, tuple[object, ...]], None]:
    # Bound here, because the hook outlives the module's globals when the interpreter shuts down.
    here, families, events, harmless, infrastructure = _here, FAMILIES, EVENTS, HARMLESS, _is_infrastructure
    in_workflow = inside

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event not in events and (event.partition(".")[0] not in families or event in harmless):
            return
        if here.listener is not None and not in_workflow() and not infrastructure():
            refuse(event)

    return hook


def _is_infrastructure() -> bool:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if name == "streamflow.sim.world":
            return False  # whoever runs the world may well be a debugger
        if name.partition(".")[0] in INFRASTRUCTURE:
            return True
        frame = frame.f_back
    return False
