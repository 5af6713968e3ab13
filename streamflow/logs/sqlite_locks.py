"""Lock files: who lives. What locks and leases mean is told in sqlite_membership.

A file is removed only under its lock and only while its name still leads to it, and a lock counts only if the name
still leads to the file that was locked: so no two processes can hold one name, and no living file is removed.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

from streamflow.logs.checks import name_taken

LEASE_SECONDS: Final = 5.0
"""A member that has not renewed for so long is stuck; longer than any pause of a healthy process should be."""

RENEW_SECONDS: Final = 1.0
"""Four renewals may fail before a lease runs out."""

LOCK_TRIES: Final = 50
LOCK_PAUSE_SECONDS: Final = 0.01
"""Others hold a dead member's lock for an instant before they remove its file; half a second of trying is plenty."""

_SUFFIX: Final = ".lock"
_LEASE_WIDTH: Final = 24

_held: set[int] = set()


def _after_fork_in_child() -> None:
    # A lock belongs to the open file, which a forked child shares: a child that outlives a killed worker (a pool of
    # step processes) would keep its member alive.
    for fd in _held:
        with suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


class MemberFiles:
    """The members of one app on one file, seen by the member `owner`. Used by one thread."""

    def __init__(self, url: str, directory: Path, owner: str) -> None:
        self._url, self._directory, self._owner = url, directory, owner
        self._path = directory / f"{quote(owner, safe='')}{_SUFFIX}"
        self._fd = -1
        self._renew_at = 0.0

    def enter(self) -> None:
        """Create and lock this member's file; `InvalidArguments` when a living member has the name."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for _ in range(LOCK_TRIES):
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if _try_lock(fd) and _leads_to(self._path, fd):
                self._fd = fd
                _held.add(fd)
                self._renew_at = 0.0
                self.renew()
                return
            os.close(fd)
            time.sleep(LOCK_PAUSE_SECONDS)
        raise name_taken(self._url, self._owner)

    def renew(self) -> None:
        """Extend the lease when it is time to; make the file again if somebody removed it."""
        now = time.monotonic()
        if now < self._renew_at:
            return
        if os.fstat(self._fd).st_nlink == 0:
            self._forget()
            self.enter()
            return
        # Always the same bytes of a file that is there: a full disk does not fail it.
        os.pwrite(self._fd, f"{now + LEASE_SECONDS:.3f}".ljust(_LEASE_WIDTH).encode(), 0)
        self._renew_at = now + RENEW_SECONDS

    def alive(self) -> frozenset[str]:
        """The members that hold their lock and whose lease lasts, this one among them; removes files of dead ones."""
        found = {self._owner}
        for name in os.listdir(self._directory):
            owner = unquote(name.removesuffix(_SUFFIX))
            if name.endswith(_SUFFIX) and owner != self._owner and self._is_alive(self._directory / name):
                found.add(owner)
        return frozenset(found)

    def _is_alive(self, path: Path) -> bool:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if _try_lock(fd):
                if _leads_to(path, fd):
                    path.unlink(missing_ok=True)
                return False
            lease = os.pread(fd, _LEASE_WIDTH, 0).strip()
            # Empty: locked an instant ago.
            return not lease or float(lease) > time.monotonic()
        finally:
            os.close(fd)

    def leave(self) -> None:
        """Remove the file and free the lock. Idempotent."""
        if self._fd >= 0:
            if _leads_to(self._path, self._fd):
                self._path.unlink(missing_ok=True)
            self._forget()
            with suppress(OSError):
                self._directory.rmdir()  # the last member of the app
                self._directory.parent.rmdir()  # and of the file

    def _forget(self) -> None:
        _held.discard(self._fd)
        os.close(self._fd)
        self._fd = -1


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leads_to(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False
