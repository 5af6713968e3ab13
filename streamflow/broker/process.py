"""A process that ends with us: whatever ends this process, SIGKILL included, the kernel ends that one.

Linux alone can do so (`PR_SET_PDEATHSIG`). Elsewhere a broker outlives a parent that was killed; the next one that
wants its port says so.

Rules:
- The wish is stated by a small Python program which then becomes the command, not by `preexec_fn`: code between fork
  and exec may deadlock in a process with threads, as one that runs Kafka clients is.
- The kernel means the *thread* that started the process, not our whole process. So one thread, which lives as long as
  the process does, starts all of them: a broker started inside `asyncio.to_thread` must not end with that thread.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Final

_BECOME: Final = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):  # it ended before we could say so
        os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

_Order = tuple[Sequence[str], Path, "Future[subprocess.Popen[bytes]]"]
_orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
_lock = threading.Lock()
_starter: threading.Thread | None = None


def start(command: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    """Run it; what it writes is appended to the file. It has a session of its own: Ctrl-C reaches us, who then decide.

    `command[0]` is a path.
    """
    global _starter  # noqa: PLW0603 - one per process is the point
    with _lock:
        # A fork has no threads but the one that forked.
        if _starter is None or not _starter.is_alive():
            _starter = threading.Thread(target=_start_all, name="broker-starter", daemon=True)
            _starter.start()
    started: Future[subprocess.Popen[bytes]] = Future()
    _orders.put((command, output, started))
    return started.result()


def _start_all() -> None:
    while True:
        command, output, started = _orders.get()
        try:
            with output.open("ab") as sink:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid()), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    start_new_session=True,
                )
        except OSError as error:
            started.set_exception(error)
        else:
            started.set_result(process)
