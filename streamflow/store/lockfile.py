"""One owner per directory: an exclusive lock on a file in it, freed by the kernel when its process dies.

Rules:
- The lock belongs to the open file, so it also holds between two openers of one process.
- A process forked from the holder does not keep it: otherwise a step process that outlives a killed worker would
  keep the worker's own successor out of its state.
- The file is never deleted: whoever deletes it while another waits would let two in.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path
from typing import Self


class DirectoryLocked(Exception):
    """Another holder has the directory."""


class DirectoryLock:
    """The held lock on `directory/.lock`. `OSError` if the file cannot be made or locked at all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._fd: int | None = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # For the person who finds the directory taken; no program reads it.
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            self.close()
            raise DirectoryLocked(str(directory)) from None
        except BaseException:
            self.close()
            raise
        _held.add(self)

    def close(self) -> None:
        """Let the next one in. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _drop_in_child() -> None:
    # Closing the child's copy does not unlock: the parent's copy of the same open file still holds.
    for lock in list(_held):
        lock.close()


os.register_at_fork(after_in_child=_drop_in_child)
