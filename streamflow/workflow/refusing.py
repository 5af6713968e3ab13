"""What an event loop can do besides running code: all of it leads out of the run, so all of it is refused.

The names are spelled out for the type checker and for the reader. What a newer Python adds to AbstractEventLoop is
refused, too, unless loop.py defines it: nothing reaches the world because this list is old.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, NoReturn

from streamflow.errors import NotInWorkflow
from streamflow.workflow.guard import STEP_HINT

_DOES: Final = {
    "add_signal_handler": "handles signals of the process",
    "call_soon_threadsafe": "is for other threads",
    "run_forever": "would run the loop from within itself",
    "run_in_executor": "starts a thread",
    "run_until_complete": "would run the loop from within itself",
    "set_default_executor": "is for threads",
    "shutdown_default_executor": "is for threads",
    "stop": "would end the drain early",
    "subprocess_exec": "starts a process",
    "subprocess_shell": "starts a process",
}


def _refusal(name: str) -> Any:
    does = _DOES.get(name, "does input or output")
    text = f"loop.{name} {does}, which a workflow cannot replay: {STEP_HINT}"

    def method(self: Refusing, *_args: object, **_kwargs: object) -> NoReturn:
        # At the call, also where a coroutine is expected: nothing is left that was never awaited.
        raise NotInWorkflow(text)

    method.__name__ = name
    method.__qualname__ = f"Refusing.{name}"
    method.__doc__ = f"Raise NotInWorkflow: it {does}."
    return method


class Refusing(asyncio.AbstractEventLoop):
    """An event loop's methods that do IO, threads, processes or signals, or that run it: each raises NotInWorkflow."""

    __slots__ = ()

    add_reader = _refusal("add_reader")
    add_signal_handler = _refusal("add_signal_handler")
    add_writer = _refusal("add_writer")
    call_soon_threadsafe = _refusal("call_soon_threadsafe")
    connect_accepted_socket = _refusal("connect_accepted_socket")
    connect_read_pipe = _refusal("connect_read_pipe")
    connect_write_pipe = _refusal("connect_write_pipe")
    create_connection = _refusal("create_connection")
    create_datagram_endpoint = _refusal("create_datagram_endpoint")
    create_server = _refusal("create_server")
    create_unix_connection = _refusal("create_unix_connection")
    create_unix_server = _refusal("create_unix_server")
    getaddrinfo = _refusal("getaddrinfo")
    getnameinfo = _refusal("getnameinfo")
    remove_reader = _refusal("remove_reader")
    remove_signal_handler = _refusal("remove_signal_handler")
    remove_writer = _refusal("remove_writer")
    run_forever = _refusal("run_forever")
    run_in_executor = _refusal("run_in_executor")
    run_until_complete = _refusal("run_until_complete")
    sendfile = _refusal("sendfile")
    set_default_executor = _refusal("set_default_executor")
    shutdown_default_executor = _refusal("shutdown_default_executor")
    sock_accept = _refusal("sock_accept")
    sock_connect = _refusal("sock_connect")
    sock_recv = _refusal("sock_recv")
    sock_recv_into = _refusal("sock_recv_into")
    sock_recvfrom = _refusal("sock_recvfrom")
    sock_recvfrom_into = _refusal("sock_recvfrom_into")
    sock_sendall = _refusal("sock_sendall")
    sock_sendfile = _refusal("sock_sendfile")
    sock_sendto = _refusal("sock_sendto")
    start_tls = _refusal("start_tls")
    stop = _refusal("stop")
    subprocess_exec = _refusal("subprocess_exec")
    subprocess_shell = _refusal("subprocess_shell")


OURS: Final = frozenset(
    (
        "call_at call_exception_handler call_later call_soon close create_future create_task default_exception_handler"
        " get_debug get_exception_handler get_task_factory is_closed is_running set_debug set_exception_handler"
        " set_task_factory shutdown_asyncgens time"
    ).split()
)
"""What is left for WorkflowLoop to define."""

REFUSED: Final = frozenset(name for name in dir(asyncio.AbstractEventLoop) if not name.startswith("_")) - OURS

for _name in REFUSED - vars(Refusing).keys():
    setattr(Refusing, _name, _refusal(_name))
