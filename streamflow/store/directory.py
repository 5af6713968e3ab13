"""What surrounds a disposable database on disk: its lock, its marker file, and the reasons to wipe it.

    <path>/.lock        held while open
    <path>/store.json   store format, identity of the log, boot of the machine, damage seen at run time
    <path>/db/          the database's own files

Only `store.json` and `db/` are ever deleted, and only under the lock. A regular file at `<path>` itself is deleted
too: it can be nothing of ours, and the worker could never start beside it.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from streamflow.errors import Unavailable
from streamflow.store.lockfile import DirectoryLock, DirectoryLocked

STORE_FORMAT: Final = 1
"""Goes up when keys, values or the meaning of the offset change. Stores of other formats are rebuilt, not converted."""

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Marker:
    """`store.json`. `damaged` is what a running store saw wrong in its files; whoever opens next must wipe."""

    format: int
    identity: str
    boot: str
    damaged: str = ""


class StoreDirectory:
    """A locked store directory. Raises `Unavailable` if it cannot be made or another process has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.db = path / "db"
        self.found: Marker | None = None
        self.wiped: str | None = None
        try:
            if path.is_file():
                path.unlink()
                self.wiped = "a regular file was in the way"
            path.mkdir(parents=True, exist_ok=True)
            self._lock = DirectoryLock(path)
        except DirectoryLocked:
            raise Unavailable(f"store {path} is open in another process; stop that one or use another path") from None
        except OSError as error:
            raise _unusable(path, error) from error

    def prepare(self, identity: str) -> None:
        """Leave nothing behind that is not surely a database of `identity` and this format, then mark it ours."""
        boot = current_boot()
        try:
            reason = self._doubt(identity)
            if reason:
                self.wipe(reason)
            elif self.found and self.found.boot != boot:
                self._drop_unsynced()
            self._write(Marker(STORE_FORMAT, identity, boot))
        except OSError as error:
            raise _unusable(self.path, error) from error

    def wipe(self, reason: str) -> None:
        """Delete the database; `reason` is for people and becomes `wiped`."""
        try:
            if self.db.is_symlink() or self.db.is_file():
                self.db.unlink()
            elif self.db.exists():
                shutil.rmtree(self.db)
        except OSError as error:
            raise _unusable(self.path, error) from error
        self.wiped = reason

    def mark_damaged(self, what: str) -> None:
        """Make the next opening wipe. Best effort: a disk that refuses this will also refuse the store."""
        if self.found is not None:
            with suppress(OSError):
                self._write(replace(self.found, damaged=what))

    def unlock(self) -> None:
        self._lock.close()

    def _doubt(self, identity: str) -> str | None:
        """Why what lies here cannot be used, None if it can or if nothing does."""
        has_database = self.db.is_symlink() or (self.db.exists() and (not self.db.is_dir() or any(self.db.iterdir())))
        if not has_database:
            return None
        try:
            self.found = marker = Marker(**json.loads((self.path / "store.json").read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            return f"store.json cannot be read ({error})"
        if marker.format != STORE_FORMAT:
            return f"it has store format {marker.format}, this program writes {STORE_FORMAT}"
        if marker.identity != identity:
            return f"it belongs to log {marker.identity}, not to {identity}"
        if marker.damaged:
            return f"damage was found while it was in use: {marker.damaged}"
        # Without CURRENT RocksDB would call the directory new, and replay old write-ahead logs into it.
        if not (self.db / "CURRENT").is_file():
            return "it has no CURRENT file"
        return None

    def _drop_unsynced(self) -> None:
        """The machine died since: write-ahead logs were never synced, so one may lack a part that a later one has.

        What is in the sorted files was synced when written and is the fold of a prefix without them.
        """
        for log in self.db.glob("*.log"):
            log.unlink()
        _sync(self.db)

    def _write(self, marker: Marker) -> None:
        temporary = self.path / "store.json.new"
        with temporary.open("wb") as file:
            file.write(json.dumps(asdict(marker)).encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / "store.json")
        _sync(self.path)
        self.found = marker


def current_boot() -> str:
    """Which boot of the machine this is; "" where the system does not say (then unsynced logs are trusted)."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unusable(path: Path, error: OSError) -> Unavailable:
    return Unavailable(
        f"store {path} cannot be used: {error.strerror or error} ({error.filename or path}); "
        "make the directory writable or use another path"
    )
