"""The writer thread: everything that is queued goes into one transaction, and the group is acknowledged at once.

Small groups are committed by the event loop instead (`write_now`), in plain statements, while this thread is idle.

Why a thread for the others: they are milliseconds of b-tree work and an fsync that must not stop the event loop. The
thread pays for it with the GIL: a call into SQLite drops it, and when the call was long enough for the busy loop to
take it, getting it back costs up to `sys.getswitchinterval()` (5 ms). Hence the whole group is one call, `INSERT INTO
incoming VALUES (…),(…)`: a temporary view whose triggers check the fence, number the records and move the ends, inside
the implicit transaction of that one statement. It also keeps the compare-and-swap where nobody can come between.
Numbers are in DESIGN.md.

When a fence fails the statement rolls back; the group is then sorted out under `BEGIN IMMEDIATE` (`_write_checked`),
where the ends that are read stay true: fenced appends are dropped, all the others go in.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

from streamflow.errors import StreamflowError, Unavailable
from streamflow.logs.base import COMPACTED, Outgoing
from streamflow.logs.checks import fenced, fenced_behind
from streamflow.logs.open import LocalUrl
from streamflow.logs.sqlite_file import (
    OFFSET_BITS,
    AppRow,
    create_topic,
    setup,
    stream_of,
    transaction,
    translate,
    when_free,
)

_log = logging.getLogger("streamflow.logs")

GROUP_RECORDS_MAX: Final = 2_000
"""Records of one transaction at most: about 10 ms of writing, so that a burst does not delay what comes after it."""

GROUP_BYTES_MAX: Final = 4 * 1024 * 1024
"""Bytes of one transaction at most, for the same reason and to bound the write-ahead log."""

CHECKPOINT_IDLE_BYTES: Final = 1024 * 1024
"""So much written, and nothing more to do for `CHECKPOINT_IDLE_SECONDS`: a checkpoint delays nobody."""

CHECKPOINT_IDLE_SECONDS: Final = 0.05

CHECKPOINT_BYTES_MAX: Final = 8 * 1024 * 1024
"""So much written without an idle moment: a checkpoint between two groups (some 10 ms), lest the file grow for ever."""

TOMBSTONE_SECONDS: Final = 86_400
"""A compacted topic keeps a tombstone for a day, as Kafka does, so that a follower that was away sees the deletion."""

SWEEP_SECONDS: Final = 600
SWEEP_ROWS_MAX: Final = 1_000
"""Old tombstones are deleted every ten minutes, when idle, a bounded number at a time."""

ROWS_HERE_MAX: Final = 16
"""Rows that the event loop commits itself: more of them are worth a hand-over, and the other core."""

ERRAND_BYTES: Final = 256 * 1024
"""What an errand adds to the write-ahead log, roughly: it changes pages and hands over none."""

APPEND, PUBLISH, PUBLISH_COMPACTED, PUBLISHED = 1, 2, 3, 4
"""Kinds of rows; 0 is padding up to a statement's size and does nothing."""

_COLUMNS: Final = 5
_CHUNKS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Rows per statement: a few sizes only, so that each is compiled once and then found in the cache."""

_INCOMING: Final = """
CREATE TEMP VIEW incoming(kind, stream, at, key, value) AS SELECT 0, 0, 0, NULL, NULL;
CREATE TEMP TRIGGER append INSTEAD OF INSERT ON incoming WHEN NEW.kind = 1 BEGIN
    UPDATE streams SET next = next + 1 WHERE stream = NEW.stream AND next = NEW.at;
    SELECT RAISE(ROLLBACK, 'fenced') WHERE changes() = 0;
    INSERT INTO records VALUES (NEW.stream << 40 | NEW.at, NEW.key, NEW.value);
END;
CREATE TEMP TRIGGER publish INSTEAD OF INSERT ON incoming WHEN NEW.kind = 2 BEGIN
    INSERT INTO records SELECT stream << 40 | next, NEW.key, NEW.value FROM streams WHERE stream = NEW.stream;
    UPDATE streams SET next = next + 1 WHERE stream = NEW.stream;
END;
CREATE TEMP TRIGGER publish_compacted INSTEAD OF INSERT ON incoming WHEN NEW.kind = 3 BEGIN
    INSERT INTO latest(id, stream, key, value, dead_at)
        SELECT stream << 40 | next, stream, NEW.key, NEW.value, NEW.at FROM streams WHERE stream = NEW.stream
        ON CONFLICT(stream, key) DO UPDATE SET id = excluded.id, value = excluded.value, dead_at = excluded.dead_at;
    UPDATE streams SET next = next + 1 WHERE stream = NEW.stream;
END;
CREATE TEMP TRIGGER published INSTEAD OF INSERT ON incoming WHEN NEW.kind = 4 BEGIN
    INSERT INTO published VALUES (NEW.stream, NEW.at)
        ON CONFLICT(stream) DO UPDATE SET below = max(below, excluded.below);
END;
"""


@dataclass(slots=True, eq=False)
class Write:
    """One `append` or `publish` on its way. `rows` is flat, `_COLUMNS` values a row."""

    done: asyncio.Future[int] | asyncio.Future[None]
    partition: int = -1
    """Of history for an append; -1 for a publish."""
    stream: int = -1
    expected: int = 0
    chain: int = 0
    """Appends of one chain build on each other: when one fails the later ones fail too."""
    rows: list[object] = field(default_factory=list)
    size: int = 0
    outgoing: Sequence[Outgoing] = ()
    """Records of topics whose id the loop thread does not know; they become rows on the writer thread."""
    topics: tuple[str, ...] = ()
    """Topics to create if they are missing."""
    streams: set[int] = field(default_factory=set)
    """Streams that get records, to wake those who follow them."""
    errand: Callable[[sqlite3.Connection], tuple[int, bool]] | None = None
    """Something else than records to write, in a transaction of its own; the thread's business only."""
    published: tuple[int, int] | None = None
    """(partition, chain) of a publish that moves the published offset, as the last of its rows."""
    result: object = None
    error: StreamflowError | None = None

    @property
    def records(self) -> int:
        return len(self.rows) // _COLUMNS

    def add(self, topics: Mapping[str, int], records: Iterable[Outgoing]) -> None:
        """Add the rows of published records, whose topics have these ids."""
        for topic, partition, key, value in records:
            stream = stream_of(topics[topic], partition)
            self.streams.add(stream)
            if topic in COMPACTED:
                self.rows += (PUBLISH_COMPACTED, stream, int(time.time()) if value is None else None, key, value)
            else:
                self.rows += (PUBLISH, stream, None, key, value)


def accept_rows(db: sqlite3.Connection) -> None:
    """Give the connection the view through which all rows go."""
    db.executescript(_INCOMING)


Finished = Callable[[list[Write]], None]


class Writer(threading.Thread):
    """Owns the one connection that writes records. Results come back through `finished`, on the loop."""

    def __init__(
        self, url: LocalUrl, path: Path, app: str, *, create: bool, loop: asyncio.AbstractEventLoop, finished: Finished
    ) -> None:
        super().__init__(name=f"streamflow-writer-{path.name}", daemon=True)
        self.opened: asyncio.Future[AppRow] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._url, self._path, self._app, self._create = url, path, app, create
        self._loop, self._finished = loop, finished
        self._queue: SimpleQueue[Write | None] = SimpleQueue()
        self._broken: dict[int, int] = {}
        self._void: dict[int, int] = {}
        """By partition: the chain of publishes of which one failed. Its later ones do not move the published offset."""
        self._topics: dict[str, int] = {}
        self._partitions = 0
        self._since_checkpoint = 0
        self.wants_a_look = False
        """Whether the thread must be given something, be it empty, to notice that a checkpoint is due when idle."""
        self.checkpointing = False
        """Whether the thread folds the write-ahead log back: only without writes meanwhile is that ever complete."""
        self._synchronous: dict[int, str] = {}
        """By connection: the thread's, and the loop's."""
        self._next_sweep = time.monotonic()

    def submit(self, write: Write) -> None:
        self._queue.put(write)

    def write_now(self, db: sqlite3.Connection, group: Sequence[Write]) -> bool:
        """Commit the group on the calling thread, with a connection of its own; False when that was not to be had.

        Only what is small and meets no obstacle: for everything else (the lock is taken, an append is fenced, the disk
        is full) nothing was written, and the thread does it again and finds out what is wrong. The caller sees to it
        that the thread has nothing to do meanwhile.

        In plain statements: nobody waits for the GIL here, and SQLite keeps a journal of its own for the one statement
        that the thread writes, which costs a commit of one row 0.15 ms.
        """
        if self._since_checkpoint >= CHECKPOINT_BYTES_MAX or sum(write.records for write in group) > ROWS_HERE_MAX:
            return False
        if any(write.outgoing or write.topics or write.errand or self._is_behind(write) for write in group):
            return False
        self._hold_published(group)
        try:
            self._set_sync(db, any(write.partition >= 0 for write in group))
            db.execute("BEGIN IMMEDIATE")
            if all(_insert_plainly(db, write) for write in group):
                db.execute("COMMIT")
            else:
                db.execute("ROLLBACK")
                return False
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            return False
        before = self._since_checkpoint
        self._since_checkpoint += sum(write.size + 64 * write.records for write in group)
        self.wants_a_look = before < CHECKPOINT_IDLE_BYTES <= self._since_checkpoint
        return True

    def stop(self) -> None:
        """Finish what was submitted, close the connection and end the thread; `closed` is done then."""
        self._queue.put(None)

    def run(self) -> None:
        try:
            db, row = setup(self._url, self._path, self._app, create=self._create)
        except StreamflowError as error:
            self._tell(_fail, self.opened, error)
            return
        except Exception as error:  # a thread's boundary: the opener must hear of it, whatever it is
            self._tell(_fail, self.opened, error)
            return
        try:
            accept_rows(db)
            self._topics, self._partitions = dict(row.topics), row.partitions
            self._tell(_succeed, self.opened, row)
            self._serve(db)
        finally:
            db.close()
            self._tell(_succeed, self.closed, None)

    def _serve(self, db: sqlite3.Connection) -> None:
        open_ = True
        while open_:
            group, open_ = self._take()
            if group:
                self._write(db, group)
            self.checkpointing = self._since_checkpoint >= (CHECKPOINT_BYTES_MAX if group else CHECKPOINT_IDLE_BYTES)
            if group:
                self._tell(self._finished, group)
            if self.checkpointing:
                self._checkpoint(db)
                self.checkpointing = False
            if not group and open_ and time.monotonic() >= self._next_sweep:
                self._sweep(db)

    def _take(self) -> tuple[list[Write], bool]:
        """Everything queued up to the limits, waiting for the first; an empty group after an idle moment."""
        group: list[Write] = []
        records = size = 0
        try:
            idle = CHECKPOINT_IDLE_SECONDS if self._since_checkpoint >= CHECKPOINT_IDLE_BYTES else SWEEP_SECONDS
            write = self._queue.get(timeout=idle)
            while write is not None:
                group.append(write)
                records += write.records + len(write.outgoing)
                size += write.size
                if records >= GROUP_RECORDS_MAX or size >= GROUP_BYTES_MAX:
                    return group, True
                write = self._queue.get_nowait()
        except Empty:
            return group, True
        return group, False

    def _write(self, db: sqlite3.Connection, group: list[Write]) -> None:
        """Commit the group; afterwards `error` of each write says how it went."""
        try:
            for write in group:
                if write.outgoing or write.topics:
                    self._resolve(db, write)
            behind = [write for write in group if self._is_behind(write)]
            for write in behind:
                write.error = fenced_behind(self._url.url, write.partition, write.expected)
            good = [write for write in group if write.error is None] if behind else group
            self._hold_published(good)
            self._set_sync(db, any(write.partition >= 0 for write in good))
            try:
                self._insert(db, good)
            except sqlite3.IntegrityError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_TRIGGER:
                    raise
                transaction(db, lambda: self._write_checked(db, good))
        except sqlite3.Error as error:
            self._fail(group, translate(error, self._url.url))
        except Exception as error:  # a thread's boundary: without it every later write would hang
            _log.exception("%s: a group of %d writes failed", self._url.url, len(group))
            self._fail(group, Unavailable(f"{self._url.url}: write failed ({error!r}): nothing of it was written"))
        for write in group:
            if write.errand is not None and write.error is None:  # apart: the records are written, whatever it meets
                self._run_errand(db, write, write.errand)
        self._since_checkpoint += sum(write.size + 64 * write.records for write in group)

    def _run_errand(
        self, db: sqlite3.Connection, write: Write, errand: Callable[[sqlite3.Connection], tuple[int, bool]]
    ) -> None:
        try:
            write.result = transaction(db, partial(errand, db))
        except sqlite3.Error as error:
            write.error = translate(error, self._url.url)
        except Exception as error:  # a thread's boundary: without it every later write would hang
            _log.exception("%s: an errand failed", self._url.url)
            write.error = Unavailable(f"{self._url.url}: failed ({error!r}): nothing was changed")
        self._since_checkpoint += ERRAND_BYTES

    def _set_sync(self, db: sqlite3.Connection, appends: bool) -> None:
        """Wait for the disk only when there is history in the group.

        What is published is a command, which counts for nothing before its turn, or is derived from turns that are
        durable. The write-ahead log is synced as a whole: an append makes all that was published before it durable,
        too, and after a power cut the file is a prefix of what was written, published offsets included.
        """
        wanted = "full" if appends else "normal"
        if self._url.synchronous == "full" and wanted != self._synchronous.get(id(db), "full"):
            db.execute(f"PRAGMA synchronous={wanted}")
            self._synchronous[id(db)] = wanted

    def _is_behind(self, write: Write) -> bool:
        return write.chain == self._broken.get(write.partition) and write.partition >= 0

    def _fail(self, group: Iterable[Write], error: StreamflowError) -> None:
        for write in group:
            if write.error is None:
                write.error = error
                if write.partition >= 0:
                    self._broken[write.partition] = write.chain
                if write.published is not None:
                    self._void[write.published[0]] = write.published[1]

    def _hold_published(self, group: Iterable[Write]) -> None:
        """Leave the published offset where it is for publishes behind one that failed: their records are written."""
        for write in group:
            if write.published is not None and self._void.get(write.published[0]) == write.published[1]:
                del write.rows[-_COLUMNS:]
                write.published = None

    def _insert(self, db: sqlite3.Connection, writes: Iterable[Write]) -> None:
        """All rows in one transaction, which is one statement if they fit."""
        rows: list[object] = []
        for write in writes:
            rows += write.rows
        most = _CHUNKS[-1] * _COLUMNS
        if len(rows) <= most:
            if rows:
                sql, values = _statement(rows)
                when_free(lambda: db.execute(sql, values))
            return

        def insert() -> None:
            for start in range(0, len(rows), most):
                db.execute(*_statement(rows[start : start + most]))

        insert() if db.in_transaction else transaction(db, insert)

    def _write_checked(self, db: sqlite3.Connection, writes: list[Write]) -> None:
        """Inside a transaction: set the errors of the fenced appends and insert all the others."""
        for write in writes:
            write.error = None  # the transaction may run again after SQLITE_BUSY
        ends: dict[int, int] = {}
        broken: dict[int, int] = {}
        for write in writes:
            if write.partition < 0:
                continue
            if write.stream not in ends:
                found = db.execute("SELECT next FROM streams WHERE stream=?", (write.stream,)).fetchone()
                ends[write.stream] = int(found[0])
            if broken.get(write.partition) == write.chain:
                write.error = fenced_behind(self._url.url, write.partition, write.expected)
            elif write.expected != ends[write.stream]:
                write.error = fenced(self._url.url, write.partition, write.expected, ends[write.stream])
                broken[write.partition] = write.chain
            else:
                ends[write.stream] += write.records
        self._insert(db, [write for write in writes if write.error is None])
        self._broken |= broken

    def _resolve(self, db: sqlite3.Connection, write: Write) -> None:
        """Build the rows of a publish, creating `steps.<queue>` topics that are new."""
        names = (*write.topics, *(record.topic for record in write.outgoing))
        if new := [name for name in dict.fromkeys(names) if name not in self._topics]:
            ids = transaction(db, lambda: [create_topic(db, self._app, name, self._partitions) for name in new])
            self._topics.update(zip(new, ids, strict=True))
        last, write.rows = write.rows, []  # the published offset, if it moves, comes behind the records
        write.add(self._topics, write.outgoing)
        write.rows += last
        write.outgoing = ()

    def _checkpoint(self, db: sqlite3.Connection) -> None:
        self._since_checkpoint = 0
        try:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as error:
            _log.warning("%s: checkpoint failed, the write-ahead log grows on: %s", self._url.url, error)

    def _sweep(self, db: sqlite3.Connection) -> None:
        self._next_sweep = time.monotonic() + SWEEP_SECONDS
        old = int(time.time()) - TOMBSTONE_SECONDS
        try:
            if db.execute("SELECT 1 FROM latest WHERE dead_at < ? LIMIT 1", (old,)).fetchone():
                sql = "DELETE FROM latest WHERE id IN (SELECT id FROM latest WHERE dead_at < ? LIMIT ?)"
                when_free(lambda: db.execute(sql, (old, SWEEP_ROWS_MAX)))
        except sqlite3.Error as error:
            _log.warning("%s: old tombstones stay until the next sweep: %s", self._url.url, error)

    def _tell(self, call: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(call, *args)


def _insert_plainly(db: sqlite3.Connection, write: Write) -> bool:
    """Do what the triggers do, within a transaction; False when an append is fenced."""
    rows = write.rows
    if write.partition >= 0:
        end = write.expected + write.records
        if db.execute(_EXTEND, (end, write.stream, write.expected)).rowcount != 1:
            return False
    for start in range(0, len(rows), _COLUMNS):
        kind, stream, at, key, value = rows[start : start + _COLUMNS]
        if kind == APPEND:
            db.execute(_RECORD, (stream << OFFSET_BITS | at, key, value))  # type: ignore[operator]
        elif kind == PUBLISH:
            db.execute(_PUBLISH, (key, value, stream))
            db.execute(_ADVANCE, (stream,))
        elif kind == PUBLISH_COMPACTED:
            db.execute(_PUBLISH_COMPACTED, (key, value, at, stream))
            db.execute(_ADVANCE, (stream,))
        else:
            assert kind == PUBLISHED, kind
            db.execute(_PUBLISHED, (stream, at))
    return True


_EXTEND: Final = "UPDATE streams SET next = ? WHERE stream = ? AND next = ?"
_ADVANCE: Final = "UPDATE streams SET next = next + 1 WHERE stream = ?"
_RECORD: Final = "INSERT INTO records VALUES (?, ?, ?)"
_PUBLISH: Final = "INSERT INTO records SELECT stream << 40 | next, ?, ? FROM streams WHERE stream = ?"
_PUBLISH_COMPACTED: Final = (
    "INSERT INTO latest(id, stream, key, value, dead_at)"
    " SELECT stream << 40 | next, stream, ?, ?, ? FROM streams WHERE stream = ?"
    " ON CONFLICT(stream, key) DO UPDATE SET id = excluded.id, value = excluded.value, dead_at = excluded.dead_at"
)
_PUBLISHED: Final = (
    "INSERT INTO published VALUES (?, ?) ON CONFLICT(stream) DO UPDATE SET below = max(below, excluded.below)"
)


def _statement(rows: list[object]) -> tuple[str, list[object]]:
    count = len(rows) // _COLUMNS
    size = _CHUNKS[bisect.bisect_left(_CHUNKS, count)]
    padding: list[object] = [0, 0, 0, None, None]
    return _INSERT[size], rows + padding * (size - count)


_INSERT: Final = {size: "INSERT INTO incoming VALUES " + ",".join(["(?,?,?,?,?)"] * size) for size in _CHUNKS}


def _succeed(future: asyncio.Future[object], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[object], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
