"""The store in memory: a dict and its sorted keys. For tests, the simulator and short-lived readers.

Same promises as RocksDB, except that nothing survives the process.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

FIRST_KEY: Final = b"\1"
"""The lowest key of callers: the empty one and those that start with a zero byte are the stores' own."""


class MemoryStore:
    """A new, empty store. Its contents are gone when it is."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._keys: list[bytes] = []
        self._applied_offset = 0
        self._closed = False

    @property
    def applied_offset(self) -> int:
        return self._applied_offset

    @property
    def wiped(self) -> str | None:
        return None

    def write(self, puts: Mapping[bytes, bytes], deletes: Sequence[bytes] = (), *, applied_offset: int) -> None:
        assert not self._closed, "write to a closed store"
        assert applied_offset >= self._applied_offset, (applied_offset, self._applied_offset)
        for key in (*puts, *deletes):
            assert key >= FIRST_KEY, key
        new = [key for key in puts if key not in self._values]
        self._values.update(puts)
        if len(new) > 100:  # one sort of an almost sorted list is cheaper than many insertions
            self._keys.extend(new)
            self._keys.sort()
        else:
            for key in new:
                insort(self._keys, key)
        for key in deletes:
            if self._values.pop(key, None) is not None:
                del self._keys[bisect_left(self._keys, key)]
        self._applied_offset = applied_offset

    def get(self, key: bytes) -> bytes | None:
        assert not self._closed, "get from a closed store"
        return self._values.get(key)

    def scan(
        self, prefix: bytes, *, start: bytes | None = None, reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        assert not self._closed, "scan of a closed store"
        low, high = bisect_left(self._keys, prefix), len(self._keys)
        after = prefix_end(prefix)
        if after is not None:
            high = bisect_left(self._keys, after)
        if start is not None and reverse:
            high = min(high, bisect_left(self._keys, start + b"\0"))
        elif start is not None:
            low = max(low, bisect_left(self._keys, start))
        keys = self._keys[low:high]
        if reverse:
            keys.reverse()
        # A copy of the pairs, since a scan shows the store as it was when it was asked for.
        return iter([(key, self._values[key]) for key in keys[:limit]])

    def flush(self) -> None:
        assert not self._closed, "flush of a closed store"

    def close(self) -> None:
        self._closed = True


def prefix_end(prefix: bytes) -> bytes | None:
    """The first key after all that start with `prefix`; None if there is none (empty, or nothing but 0xff)."""
    head = prefix.rstrip(b"\xff")
    return head[:-1] + bytes((head[-1] + 1,)) if head else None
