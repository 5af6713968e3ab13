"""A process that was stopped (SIGSTOP, Ctrl-Z) in the middle of a write: it holds SQLite's write lock until it goes on.

Nobody can break that lock, and nobody else can write: the log would stand still for as long as the process does. Once
its lease is over, whoever wants its partitions therefore continues it (SIGCONT). It finishes its write, which nobody
can have overtaken, and goes on or is fenced like any owner that wakes up late. It is never killed. Linux only, where
/proc/locks tells who holds what; elsewhere a writer times out with `Unavailable`, which names the lock.
"""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

_log = logging.getLogger("streamflow.logs")

WAL_WRITE_LOCK: Final = 120
"""The byte of the -shm file that a writer locks (SQLite's file format, section 4.8: WAL_WRITE_LOCK)."""

LOCKS: Final = Path("/proc/locks")


class Holder(NamedTuple):
    """Who holds the write lock, and whether that process is stopped."""

    pid: int
    stopped: bool


def write_lock_holder(database: Path, locks: Path = LOCKS) -> Holder | None:
    """The process that holds the write lock of a database in WAL mode; None if nobody does, or nobody can tell."""
    try:
        status = database.with_name(database.name + "-shm").stat()
        lines = locks.read_text().splitlines()
    except OSError:
        return None
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in lines:
        # 12: POSIX  ADVISORY  WRITE 4711 fe:00:10027155 120 120
        fields = line.split()
        if fields[1:2] != ["POSIX"] or fields[3:4] != ["WRITE"] or fields[5:6] != [file] or len(fields) != 8:
            continue
        first, last = int(fields[6]), fields[7]
        if first <= WAL_WRITE_LOCK and (last == "EOF" or int(last) >= WAL_WRITE_LOCK):
            return Holder(int(fields[4]), _is_stopped(int(fields[4])))
    return None


def continue_stopped_writer(database: Path) -> bool:
    """Send SIGCONT to the process that holds the write lock, if it is stopped; whether that was done."""
    holder = write_lock_holder(database)
    if holder is None or not holder.stopped or holder.pid <= 0:
        return False
    with suppress(OSError):  # it is gone, or another user's
        os.kill(holder.pid, signal.SIGCONT)
        _log.warning(
            "%s: process %d was stopped in the middle of a write, longer than its lease, and nobody else could write: "
            "it was continued (SIGCONT). To take a worker out, end it (kill %d); it then hands over at once",
            database,
            holder.pid,
            holder.pid,
        )
        return True
    return False


def _is_stopped(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state == "T"
