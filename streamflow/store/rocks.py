"""The store on RocksDB: one database per partition, one column family, the applied offset under the empty key.

Rules:
- **One batch, one column family.** Data and offset are in one write batch of one column family, so every state that
  RocksDB can recover is the fold of a prefix of the log. DESIGN.md says which crash leaves which prefix.
- **Doubt means wipe.** What is not surely a state of this log is deleted and told in `wiped`; the log has it all.
  What is merely in the way (locked, disk full, no permission) is `Unavailable`, and nothing is deleted.
- **Nothing is half read.** Every block is checked as it is read; damage found in use is remembered, so that the next
  opening wipes.
- Calls take microseconds, but `flush` and `close` wait for the disk: call them from a thread. RocksDB frees the GIL.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from rocksdict import Rdict, RdictIter, ReadOptions, WriteBatch

from streamflow.errors import Unavailable
from streamflow.store.base import Store
from streamflow.store.directory import StoreDirectory
from streamflow.store.memory import FIRST_KEY, prefix_end
from streamflow.store.rocks_options import options

HEAD_KEY: Final = b"\0"
"""Applied offset and newest rung, in every batch. Sorts before all keys of callers, so no scan steps around it."""

RUNG_KEY: Final = b"\0r"
"""Prefix of the rungs: rows numbered 1, 2, 3, … that show a part missing in the middle.

RocksDB takes a MANIFEST whose end is cut off for good, forgets the sorted files named there, and replays the newer
write-ahead log over the hole. So each memtable gets at least one rung, and whoever opens counts them.
"""

RUNG_EVERY_BYTES: Final = 64 << 10
RUNGS: Final = 1024
"""The rungs are a ring. This many reach back 64 MiB, more than the memtables that a log can be replayed into."""

HEAD: Final = struct.Struct(">QQ")


class Head(NamedTuple):
    """The value under `HEAD_KEY`."""

    applied_offset: int
    rung: int


NEW: Final = Head(0, 0)

NOT_DAMAGE: Final = (
    "No space left",
    "Permission denied",
    "Too many open files",
    "Read-only file system",
    "While lock file",
    "lock hold by",
    "Cannot allocate memory",
    "Disk quota exceeded",
)
"""What RocksDB says when the files may well be good but the machine refuses. Anything else is damage."""


class RocksStore:
    """An open store; made by `open_rocks`."""

    def __init__(self, directory: StoreDirectory, db: Rdict, head: Head) -> None:
        self._directory = directory
        self._db: Rdict | None = db
        self._applied_offset, self._rung = head
        # As if long ago: a new memtable begins, so the next batch brings a rung.
        self._bytes_since_rung = RUNG_EVERY_BYTES
        # RocksDB stays locked while an iterator lives, so `close` must be able to end the scans of careless callers.
        self._scans: weakref.WeakSet[Generator[tuple[bytes, bytes], None, None]] = weakref.WeakSet()

    @property
    def applied_offset(self) -> int:
        return self._applied_offset

    @property
    def wiped(self) -> str | None:
        return self._directory.wiped

    def write(self, puts: Mapping[bytes, bytes], deletes: Sequence[bytes] = (), *, applied_offset: int) -> None:
        assert self._db is not None, "write to a closed store"
        assert applied_offset >= self._applied_offset, (applied_offset, self._applied_offset)
        batch = WriteBatch(raw_mode=True)
        put = batch.put
        for key, value in puts.items():
            assert key >= FIRST_KEY, key
            put(key, value)
        for key in deletes:
            assert key >= FIRST_KEY, key
            batch.delete(key)
        self._bytes_since_rung += batch.size_in_bytes()
        rung = self._rung
        if self._bytes_since_rung >= RUNG_EVERY_BYTES:
            rung += 1
            put(_rung_key(rung), rung.to_bytes(8, "big"))
        put(HEAD_KEY, HEAD.pack(applied_offset, rung))
        try:
            self._db.write(batch)
        except Exception as error:  # rocksdict raises nothing narrower
            raise self._failed(error) from error
        self._applied_offset = applied_offset
        if rung > self._rung:
            self._rung, self._bytes_since_rung = rung, 0

    def get(self, key: bytes) -> bytes | None:
        assert self._db is not None, "get from a closed store"
        try:
            value: bytes | None = self._db.get(key)
        except Exception as error:  # rocksdict raises nothing narrower
            raise self._failed(error) from error
        return value

    def scan(
        self, prefix: bytes, *, start: bytes | None = None, reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        assert self._db is not None, "scan of a closed store"
        after = prefix_end(prefix)
        bounds = ReadOptions()
        if after is not None:
            bounds.set_iterate_upper_bound(after)
        low = prefix or FIRST_KEY
        cursor = self._db.iter(bounds)
        if not reverse:
            cursor.seek(low if start is None else max(low, start))
        elif start is None:
            cursor.seek_to_last()
        else:
            cursor.seek_for_prev(start)
        rows = self._rows(cursor, cursor.prev if reverse else cursor.next, low, bounds)
        self._scans.add(rows)
        return rows if limit is None else islice(rows, limit)

    def flush(self) -> None:
        assert self._db is not None, "flush of a closed store"
        try:
            self._db.flush(wait=True)
        except Exception as error:  # rocksdict raises nothing narrower
            raise self._failed(error) from error
        finally:
            # Behind it: what is written meanwhile may bring its rung to the old memtable; the new one needs its own.
            self._bytes_since_rung = RUNG_EVERY_BYTES

    def close(self) -> None:
        db, self._db = self._db, None
        if db is None:
            return
        for rows in list(self._scans):
            rows.close()
        try:
            db.flush(wait=True)
        except Exception as error:  # rocksdict raises nothing narrower
            raise self._failed(error) from error
        finally:
            with suppress(Exception):  # it flushes again, and what that says has been said
                db.close()
            self._directory.unlock()

    def _rows(
        self, cursor: RdictIter, step: Callable[[], None], low: bytes, bounds: ReadOptions
    ) -> Generator[tuple[bytes, bytes], None, None]:
        # Three traps of rocksdict 0.3.29: the cursor points into `bounds` without keeping it alive, so this frame does;
        # a lower bound set there becomes the upper one, so going down ends here; and `items()` would end silently at
        # a damaged block.
        valid, key, value = cursor.valid, cursor.key, cursor.value
        while valid():
            here: bytes = key()
            if here < low:
                return
            yield here, value()
            step()
        try:
            cursor.status()
        except Exception as error:  # rocksdict raises nothing narrower
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> Unavailable:
        path = self._directory.path
        if _is_damage(error):
            self._directory.mark_damaged(_text(error))
            return Unavailable(f"store {path} is damaged: {_text(error)}; open it again and it is rebuilt from the log")
        return Unavailable(f"store {path} refuses: {_text(error)}; free what is missing and open it again")


def open_rocks(path: Path, *, identity: str, log_start: int, log_end: int) -> Store:
    """Open or make the store at `path`, wiped if it is not surely a state of this log; see `wiped`.

    `log_start` and `log_end` are the oldest offset that the log still has and the next that it will give.
    Raises `Unavailable` if the directory is open elsewhere or cannot be used.
    """
    directory = StoreDirectory(path)
    try:
        directory.prepare(identity)
        db, head, doubt = _open_found(directory)
        if not doubt and head.applied_offset > log_end:
            doubt = f"its applied offset {head.applied_offset} is past the log's end {log_end}"
        elif not doubt and 0 < head.applied_offset < log_start:
            doubt = f"its applied offset {head.applied_offset} is before the log's start {log_start}"
        if doubt:
            if db is not None:
                db.close()
            directory.wipe(doubt)
            db, head = None, NEW
        if db is None:
            db = _open_new(directory)
        return RocksStore(directory, db, head)
    except BaseException:
        directory.unlock()
        raise


def _open_found(directory: StoreDirectory) -> tuple[Rdict | None, Head, str | None]:
    """The database found in `directory`, its head, and why it must be wiped if it must."""
    if not (directory.db / "CURRENT").exists():
        return None, NEW, None
    try:
        db = Rdict(str(directory.db), options(create=False))
    except Exception as error:  # rocksdict raises nothing narrower
        if _is_damage(error):
            return None, NEW, f"it cannot be opened: {_text(error)}"
        raise Unavailable(f"store {directory.path} cannot be opened: {_text(error)}") from error
    try:
        stored = db.get(HEAD_KEY)
        if stored is None:
            # Killed before its first write; empty is what offset 0 means.
            return db, NEW, "it has no applied offset" if db.latest_sequence_number() else None
        head = Head(*HEAD.unpack(stored))
        missing = _missing_rung(db, head.rung)
    except Exception as error:  # rocksdict raises nothing narrower
        return db, NEW, f"its head cannot be read: {_text(error)}"
    return db, head, f"a part in the middle is missing (rung {missing} of {head.rung})" if missing else None


def _open_new(directory: StoreDirectory) -> Rdict:
    try:
        return Rdict(str(directory.db), options(create=True))
    except Exception as error:  # rocksdict raises nothing narrower
        raise Unavailable(f"store {directory.path} cannot be made: {_text(error)}") from error


def _rung_key(rung: int) -> bytes:
    return RUNG_KEY + (rung % RUNGS).to_bytes(2, "big")


def _missing_rung(db: Rdict, newest: int) -> int | None:
    """The oldest rung that should be in the ring and is not."""
    for rung in range(max(1, newest - RUNGS + 1), newest + 1):
        if db.get(_rung_key(rung)) != rung.to_bytes(8, "big"):
            return rung
    return None


def _is_damage(error: Exception) -> bool:
    return not any(refusal in str(error) for refusal in NOT_DAMAGE)


def _text(error: Exception) -> str:
    return " ".join(str(error).split())
