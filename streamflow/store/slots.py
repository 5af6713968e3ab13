"""State directories for worker processes: `root/slot-0`, `root/slot-1`, … under an OS lock each.

A worker takes the first free slot. One that was killed and started again so gets its old state back at once, and two
workers on one host never share a directory. Nothing is ever deleted here.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Final, Self

from streamflow.errors import Unavailable
from streamflow.store.lockfile import DirectoryLock, DirectoryLocked

SLOTS_MAX: Final = 1024
"""More workers than this on one host and state directory is a loop that starts workers, not a deployment."""

INSTANCE_FILE: Final = "instance"


class Slot:
    """A leased state directory: `path` is this process's own until `close` or its death."""

    def __init__(self, path: Path, lock: DirectoryLock) -> None:
        self.path = path
        self._lock = lock

    @property
    def instance(self) -> str:
        """An id that whoever holds this slot has: the same after a crash, another for each slot and directory."""
        file = self.path / INSTANCE_FILE
        found = file.read_text().strip() if file.exists() else ""
        if not found:  # new, or cut off by a crash
            found = uuid.uuid4().hex
            file.write_text(found)
        return found

    def close(self) -> None:
        """Give the directory back; what is in it stays for the next holder. Idempotent."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lease_slot(root: Path) -> Slot:
    """The first free slot below `root`, which is made if missing. Raises `Unavailable` with what to do."""
    for number in range(SLOTS_MAX):
        path = root / f"slot-{number}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            return Slot(path, DirectoryLock(path))
        except DirectoryLocked:
            continue
        except OSError as error:
            raise Unavailable(
                f"no state directory below {root}: {error.strerror or error} ({error.filename or path}); "
                "give this user a writable local directory (file locks needed, so no plain NFS)"
            ) from error
    raise Unavailable(f"all {SLOTS_MAX} slots below {root} are locked by running workers; use another directory")
