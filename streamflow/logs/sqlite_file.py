"""The SQLite file: what is in it, how it is opened, what its errors mean.

Tables. A *stream* is one partition of one topic of one app: `topic id << 8 | partition`.

    meta         the file's identity
    apps         app, how many partitions its topics have, its identity
    topics       topic id of (app, topic)
    streams      per stream the oldest readable offset and the next one; the only source of offsets, so that deleting
                 records never makes one come twice
    records      id = stream << 40 | offset: a partition lies together and in order, and reading it is one range scan
    latest       the same for compacted topics, with the newest record of each key
    published    per history stream how far everything derived from it is published; per stream of a step queue how far
                 its records are done with
    marks        per stream where its end was at some instants: how old its records are at least
    owners       which member holds which partition of a group: `app`, or `app+steps.queue` (the members themselves are
                 lock files, see sqlite_membership)

2^40 offsets at the smallest record fill SQLite's largest file; 2^15 topics of 2^8 partitions fill the rest of the id.
"""

from __future__ import annotations

import os
import sqlite3
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from streamflow.errors import CorruptLog, InvalidArguments, StreamflowError, Unavailable
from streamflow.logs.base import TOPICS
from streamflow.logs.checks import no_app, wrong_partitions
from streamflow.logs.open import PARTITIONS_DEFAULT, LocalUrl

APPLICATION_ID: Final = 0x73666C77
"""`sflw` in the file's header: how `file(1)` and we tell our files from those of other programs."""

SCHEMA_VERSION: Final = 2
OFFSET_BITS: Final = 40
PARTITION_BITS: Final = 8
OFFSET_MASK: Final = (1 << OFFSET_BITS) - 1

BUSY_SECONDS: Final = 5.0
"""How long to wait for other processes' write locks. They hold one for about a millisecond; seconds mean a stopped
process or a foreign tool in a transaction."""

BUSY_RETRY_SECONDS: Final = (0.0002, 0.005)
"""First and longest pause between tries for the write lock; SQLite's own handler starts at 1 ms and grows to 100."""

_MAGIC: Final = b"SQLite format 3\x00"
_SCHEMA: Final = """
CREATE TABLE meta(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE apps(app TEXT PRIMARY KEY, partitions INTEGER NOT NULL, identity TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE topics(id INTEGER PRIMARY KEY, app TEXT NOT NULL, topic TEXT NOT NULL, UNIQUE(app, topic));
CREATE TABLE streams(stream INTEGER PRIMARY KEY, first INTEGER NOT NULL, next INTEGER NOT NULL);
CREATE TABLE records(id INTEGER PRIMARY KEY, key BLOB NOT NULL, value BLOB);
CREATE TABLE latest(id INTEGER PRIMARY KEY, stream INTEGER NOT NULL, key BLOB NOT NULL, value BLOB, dead_at INTEGER,
                    UNIQUE(stream, key));
CREATE INDEX latest_dead ON latest(dead_at) WHERE dead_at IS NOT NULL;
CREATE TABLE published(stream INTEGER PRIMARY KEY, below INTEGER NOT NULL);
CREATE TABLE marks(stream INTEGER NOT NULL, at INTEGER NOT NULL, offset INTEGER NOT NULL,
                   PRIMARY KEY(stream, at)) WITHOUT ROWID;
CREATE TABLE owners(app TEXT NOT NULL, partition INTEGER NOT NULL, owner TEXT NOT NULL,
                    PRIMARY KEY(app, partition)) WITHOUT ROWID;
"""

_T = TypeVar("_T")


class AppRow(NamedTuple):
    """What the file says about one app. `topics` maps a topic to its id."""

    file_identity: str
    identity: str
    partitions: int
    topics: dict[str, int]


def stream_of(topic_id: int, partition: int) -> int:
    """The number under which the tables know one partition of one topic."""
    return topic_id << PARTITION_BITS | partition


def connect(path: Path, *, synchronous: str = "full", busy_seconds: float = BUSY_SECONDS) -> sqlite3.Connection:
    """A connection in autocommit mode with our settings, to a file that `inspect` has approved."""
    db = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, cached_statements=256)
    db.execute(f"PRAGMA synchronous={synchronous}")
    # Checkpoints are the writer thread's business: in the middle of a commit they would delay an acknowledgement.
    db.execute("PRAGMA wal_autocheckpoint=0")
    db.execute("PRAGMA cache_size=-16000")
    return db


def setup(url: LocalUrl, path: Path, app: str, *, create: bool) -> tuple[sqlite3.Connection, AppRow]:
    """Open `path` for writing, create what is missing and allowed; the connection belongs to the calling thread."""
    try:
        inspect(url.url, path, create=create)
        db = connect(path, synchronous=url.synchronous)
        try:
            return db, _create_missing(db, url, app, create=create)
        except BaseException:
            db.close()
            raise
    except sqlite3.Error as error:
        raise translate(error, url.url) from error


def inspect(url: str, path: Path, *, create: bool) -> None:
    """Raise when the file cannot be used or is not ours; never changes a byte of it."""
    if not path.parent.is_dir():
        raise Unavailable(f"{url}: directory {path.parent} does not exist: create it (mkdir -p {path.parent})")
    if path.is_dir():
        raise InvalidArguments(f"{url}: {path} is a directory: name a file in it")
    if not path.exists() and not create:
        raise Unavailable(f"{url}: there is no file {path}: start a worker, which creates it")
    for place, what in ((path.parent, "directory"), (path, "file")):
        if place.exists() and not os.access(place, os.R_OK | os.W_OK):
            raise Unavailable(
                f"{url}: {what} {place} is not writable for this user: change its rights or name another place"
            )
    if path.exists() and path.stat().st_size:
        try:
            _inspect_owner(url, path)
        except sqlite3.DatabaseError as error:
            if _primary(error) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                _explain_damage(url, path)
            raise


def _explain_damage(url: str, path: Path) -> None:
    """Say what is wrong with a file that SQLite refuses.

    Only such a file may be opened here by other means than SQLite: closing *any* descriptor of a file drops all POSIX
    locks that this process has on it. With another log of this process on the same file, other processes would then
    think that they close it last, and delete the write-ahead log under it.
    """
    with path.open("rb") as file:
        header = file.read(100)
    size = path.stat().st_size
    if not header.startswith(_MAGIC):
        raise CorruptLog(f"{url}: {path} is not a SQLite file (it starts with {header[:16]!r}): name another file")
    page = int.from_bytes(header[16:18], "big")
    expected = int.from_bytes(header[28:32], "big") * (65536 if page == 1 else page)
    wal = path.with_name(path.name + "-wal")
    if not (wal.exists() and wal.stat().st_size) and size < max(expected, 100):
        # With a write-ahead log the file may be shorter than its header says: the rest is in there.
        raise CorruptLog(
            f"{url}: {path} is truncated: {expected:,} bytes expected, {size:,} found: restore it from a backup"
        )


def _inspect_owner(url: str, path: Path) -> None:
    # Read-only, so that looking at another program's file neither recovers nor checkpoints its write-ahead log.
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        application, version, tables = db.execute(
            "SELECT a.application_id, v.user_version, (SELECT count(*) FROM sqlite_master)"
            " FROM pragma_application_id a, pragma_user_version v"
        ).fetchone()
    finally:
        db.close()
    if application == 0 and version == 0 and tables == 0:
        return  # an empty database: we, or a crash while we created it
    if application != APPLICATION_ID:
        raise CorruptLog(
            f"{url}: {path} is another program's SQLite file (application id {application:#x}, ours is "
            f"{APPLICATION_ID:#x}; {tables} tables): nothing was changed; name another file"
        )
    if version < SCHEMA_VERSION:
        raise InvalidArguments(
            f"{url}: {path} has schema version {version}, this streamflow needs {SCHEMA_VERSION}: let its runs end "
            f"under the version that wrote it, then name a new file"
        )
    if version > SCHEMA_VERSION:
        raise InvalidArguments(
            f"{url}: {path} has schema version {version}, this streamflow knows {SCHEMA_VERSION}: upgrade streamflow"
        )


def _create_missing(db: sqlite3.Connection, url: LocalUrl, app: str, *, create: bool) -> AppRow:
    def change() -> AppRow | None:
        if db.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
            if not create:
                raise no_app(url.url, app)
            db.execute("PRAGMA journal_mode=WAL")
            _transaction(db, lambda: _create_file(db))
        row = read_app(db, app)
        if row is None and create:
            row = _transaction(db, lambda: _create_app(db, app, url.partitions or PARTITIONS_DEFAULT))
        return row

    row = when_free(change)
    if row is None:
        raise no_app(url.url, app)
    if url.partitions not in (None, row.partitions):
        raise wrong_partitions(url.url, app, row.partitions, url.partitions)
    limit_size(db, url)
    db.execute("PRAGMA busy_timeout=0")  # from here on `when_free` waits, in shorter steps
    return row


def _create_file(db: sqlite3.Connection) -> None:
    if db.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,):
        return  # another process was faster
    for statement in _SCHEMA.split(";"):
        db.execute(statement)
    db.execute("INSERT INTO meta VALUES ('identity', ?)", (uuid.uuid4().hex,))
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    db.execute(f"PRAGMA application_id={APPLICATION_ID}")


def _create_app(db: sqlite3.Connection, app: str, partitions: int) -> AppRow:
    if (row := read_app(db, app)) is None:
        db.execute("INSERT INTO apps VALUES (?, ?, ?)", (app, partitions, uuid.uuid4().hex))
        for topic in TOPICS:
            create_topic(db, app, topic, partitions)
        row = read_app(db, app)
    assert row is not None
    return row


def create_topic(db: sqlite3.Connection, app: str, topic: str, partitions: int) -> int:
    """The id of a topic, created inside the caller's transaction when it is missing."""
    db.execute("INSERT INTO topics(app, topic) VALUES (?, ?) ON CONFLICT DO NOTHING", (app, topic))
    topic_id = int(db.execute("SELECT id FROM topics WHERE app=? AND topic=?", (app, topic)).fetchone()[0])
    rows = [(stream_of(topic_id, partition),) for partition in range(partitions)]
    db.executemany("INSERT INTO streams VALUES (?, 0, 0) ON CONFLICT DO NOTHING", rows)
    return topic_id


def read_app(db: sqlite3.Connection, app: str) -> AppRow | None:
    """What the file holds of `app`, None if nothing."""
    found = db.execute(
        "SELECT value, apps.identity, partitions FROM meta, apps WHERE name='identity' AND app=?", (app,)
    ).fetchone()
    if found is None:
        return None
    topics = dict(db.execute("SELECT topic, id FROM topics WHERE app=?", (app,)).fetchall())
    return AppRow(found[0], found[1], found[2], topics)


def _transaction(db: sqlite3.Connection, change: Callable[[], _T]) -> _T:
    db.execute("BEGIN IMMEDIATE")
    try:
        result = change()
        db.execute("COMMIT")
        return result
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def limit_size(db: sqlite3.Connection, url: LocalUrl) -> None:
    """Hold this connection's writes to the size that the URL allows."""
    if url.max_mib is not None:
        page_size = int(db.execute("PRAGMA page_size").fetchone()[0])
        db.execute(f"PRAGMA max_page_count={max(1, url.max_mib * 1024 * 1024 // page_size)}")


def transaction(db: sqlite3.Connection, change: Callable[[], _T]) -> _T:
    """Run `change` in one write transaction, waiting up to `BUSY_SECONDS` for other writers."""
    return when_free(lambda: _transaction(db, change))


def when_free(attempt: Callable[[], _T]) -> _T:
    """Call `attempt` again while another process holds the write lock; `SQLITE_BUSY` after `BUSY_SECONDS`."""
    deadline = time.monotonic() + BUSY_SECONDS
    pause, longest = BUSY_RETRY_SECONDS
    while True:
        try:
            return attempt()
        except sqlite3.OperationalError as error:
            if _primary(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _primary(error: sqlite3.Error) -> int:
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF


def translate(error: sqlite3.Error, url: str) -> StreamflowError:
    """What a SQLite error means to the caller: `CorruptLog` for damage, else `Unavailable`, with the next step."""
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    match _primary(error):
        case sqlite3.SQLITE_FULL:
            found, advice = "no room to write", "nothing of this was written; free disk space (or raise max_mib)"
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED | sqlite3.SQLITE_PROTOCOL:
            found, advice = f"locked by another process for {BUSY_SECONDS:g} s", "see which one (fuser) and stop it"
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_AUTH:
            found, advice = "cannot be opened for writing", "check the rights of the file and its directory"
        case sqlite3.SQLITE_IOERR | sqlite3.SQLITE_NOMEM | sqlite3.SQLITE_INTERRUPT:
            found, advice = "the system failed a read or write", "check the disk, then try again"
        case _:
            return CorruptLog(f"{url}: damaged ({name}: {error}): stop its workers and restore the file from a backup")
    return Unavailable(f"{url}: {found} ({name}: {error}): {advice}")
