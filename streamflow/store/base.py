"""The store port: the local, disposable state of one partition as ordered bytes.

The log is the truth. A store is only its fold up to `applied_offset`, kept so that a restart need not read everything
again; whoever doubts a store wipes it. Every write carries the applied offset in the same atomic batch, so a store is
always the exact fold of some prefix of the log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol


class Store(Protocol):
    """Ordered key-value state. Synchronous: every call is served from memory or page cache in microseconds."""

    @property
    def applied_offset(self) -> int:
        """Offset of the next log record to apply; 0 in a new store."""
        ...

    @property
    def wiped(self) -> str | None:
        """Why the store that was found had to be wiped when opening, None if it was new or good."""
        ...

    def write(self, puts: Mapping[bytes, bytes], deletes: Sequence[bytes] = (), *, applied_offset: int) -> None:
        """Put, delete and move the applied offset in one atomic batch. The offset never goes back."""
        ...

    def get(self, key: bytes) -> bytes | None: ...

    def scan(
        self, prefix: bytes, *, start: bytes | None = None, reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        """Pairs whose key starts with `prefix`, in key order (or reverse), from `start` (inclusive) on."""
        ...

    def flush(self) -> None:
        """Make everything written so far survive the death of the machine."""
        ...

    def close(self) -> None:
        """Flush and free the directory. Idempotent."""
        ...
