"""Trimming of the SQLite log, and the marks that tell how old records are at least. Runs on the writer thread.

Rules:
- The start of a stream moves in one transaction, before anything is deleted: the cut is where the caller wanted it,
  also after a crash. Readers never look below the start, so what is left there is only room to be freed.
- Each call is one short transaction. Who wants all of it deleted calls again while the second value is true.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from streamflow.logs.sqlite_file import OFFSET_BITS

TRIM_ROWS_MAX: Final = 1_000
"""Rows deleted in one transaction: a few milliseconds, during which appends wait."""

_START: Final = "UPDATE streams SET first = max(first, min(?, next)) WHERE stream = ? RETURNING first"
_DELETE: Final = "DELETE FROM records WHERE id IN (SELECT id FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT ?)"


def trim(db: sqlite3.Connection, stream: int, before: int) -> tuple[int, bool]:
    """Move the start and delete some of what is below it: the start, and whether there is more to delete."""
    first = int(db.execute(_START, (before, stream)).fetchall()[0][0])
    low = stream << OFFSET_BITS
    deleted = db.execute(_DELETE, (low, low | first, TRIM_ROWS_MAX)).rowcount
    return first, deleted == TRIM_ROWS_MAX


def mark(db: sqlite3.Connection, stream: int, now_ms: int, at_ms: int) -> tuple[int, bool]:
    """Remember where the stream ends now; the offset of the last mark at `at_ms` or before."""
    first, end = db.execute("SELECT first, next FROM streams WHERE stream = ?", (stream,)).fetchone()
    db.execute("DELETE FROM marks WHERE stream = ? AND offset <= ?", (stream, first))
    newest = db.execute("SELECT max(offset) FROM marks WHERE stream = ?", (stream,)).fetchone()[0]
    if (newest or first) < end:
        db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?, ?)", (stream, now_ms, end))
    found = db.execute("SELECT max(offset) FROM marks WHERE stream = ? AND at <= ?", (stream, at_ms)).fetchone()[0]
    return max(first, found or 0), False
