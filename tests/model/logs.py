"""The log as the model has it, what its readers make of it, and what must hold in each log that can be.

Written from design.md alone: nothing of the product is used, so that a mistake in its reading rule does not hide itself
here. All that follows from a log alone is found out when the log is reached first, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

NOBODY: Final = -1
HEIR: Final = 32
"""Added to an owner that goes on in its term with other records under old numbers, which only a mutation does."""


class Entry(NamedTuple):
    """One record of the log. `seq` 0 is the claim of the term; `life` is who wrote it, which no reader is told."""

    life: int
    term: int
    seq: int


class Reader(NamedTuple):
    """What a reader keeps: the newest claimed term, and the seq that may come next; None: none may, after a gap.

    Term -1 is a reader that has seen nothing yet.
    """

    term: int
    following: int | None


FRESH: Final = Reader(-1, 0)


def read(reader: Reader, entry: Entry) -> tuple[Reader, bool]:
    """The reading rule: what the reader is after the entry, and whether the entry counts."""
    if reader.term < 0 or (entry.seq == 0 and entry.term > reader.term):
        return Reader(entry.term, entry.seq + 1), True
    if entry.seq == 0 or entry.term != reader.term or reader.following is None or entry.seq < reader.following:
        return reader, False
    if entry.seq > reader.following:
        return Reader(reader.term, None), False
    return Reader(reader.term, entry.seq + 1), True


@dataclass(frozen=True)
class Protocol:
    """The protocol of design.md, section 3. Each mutation of it is another value of one field."""

    read: Callable[[Reader, Entry], tuple[Reader, bool]] = read
    kept: Callable[[Reader], Reader] = lambda reader: reader
    """What a store keeps of a reader, from which a later one goes on."""
    reads_to_the_end: bool = True
    """False: it may claim at the end, and has read only some of the log before."""
    term_above: int = 1
    """The term of a claim is this much above the newest one."""
    awaits_claim: bool = True
    acts_on_answers: bool = True
    """False: it acts on what it has sent."""
    in_order: bool = True
    """False: an answer counts although that of a batch before it has not come."""
    checks_claim: bool = True
    """False: any offset is good enough for a claim."""
    checks_offset: bool = True
    """False: any offset is good enough for a batch."""
    refuses_offsetless: bool = True
    """False: an answer without an offset says that the batch is where it should be."""
    hears_every_record: bool = True
    """False: the offset of its first record is good enough for a batch, whatever became of the others."""
    hears_the_last: bool = False
    """True: the offset of its last record is good enough for a batch, whatever became of those before."""
    goes_on: str = ""
    """What a life does after an outcome that it does not know. "": it ends, and another life begins with a restore.
    "blindly": it goes on behind the offset that it was told. "in its term": it reads the log, finds no newer claim and
    none of its records, and appends other ones in the same term, without a claim."""
    cuts_at_valid: bool = True
    """False: the head of the log is cut at any record."""
    wipes_stores: bool = True
    """False: a store that ends before the head of the log is used all the same."""


class Node:
    """A log, as its last entry behind a shorter log."""

    __slots__ = (
        "broken", "counts", "end", "entry", "extended", "last", "number", "owner", "parent", "readers", "start",
    )  # fmt: skip

    def __init__(self, parent: Node | None, entry: Entry | None, end: int, start: int) -> None:
        self.parent, self.entry, self.end, self.start = parent, entry, end, start
        self.number = 0
        self.readers: tuple[Reader, ...] = (FRESH,)
        """All that readers can be that have read so far, wherever they began. First the one that has read all."""
        self.counts = False
        self.owner = NOBODY
        """The life whose claim counts."""
        self.last: Entry | None = None
        """The last entry that counts."""
        self.broken: str | None = None
        """What is wrong with this log, if anything is."""
        self.extended: dict[Entry, Node] = {}

    def entries(self) -> list[tuple[int, Entry, bool]]:
        """Offset, entry, and whether it counts, of all that the log has."""
        found: list[tuple[int, Entry, bool]] = []
        node: Node | None = self
        while node is not None and node.entry is not None:
            found.append((node.end - 1, node.entry, node.counts))
            node = node.parent
        return found[::-1]

    def at(self, end: int) -> Node:
        """The log as it was when it ended there."""
        node = self
        while node.end > end:
            assert node.parent is not None, (end, node.end)
            node = node.parent
        return node


class Logs:
    """All logs that were reached."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.nodes: list[Node] = []
        self._roots: dict[tuple[int, tuple[Reader, ...], int, Entry | None], Node] = {}
        self.empty = self.root(0, (FRESH,), NOBODY, None)

    def root(self, start: int, readers: tuple[Reader, ...], owner: int, last: Entry | None) -> Node:
        """A log that begins at `start`; what stood before is gone, and known only by what it left in readers."""
        found = self._roots.get((start, readers, owner, last))
        if found is None:
            found = self._roots[start, readers, owner, last] = self._add(Node(None, None, start, start))
            found.readers, found.owner, found.last = readers, owner, last
        return found

    def _add(self, node: Node) -> Node:
        node.number = len(self.nodes)
        self.nodes.append(node)
        return node

    def extend(self, node: Node, entry: Entry) -> Node:
        """The log with one more entry."""
        found = node.extended.get(entry)
        if found is None:
            found = node.extended[entry] = self._add(Node(node, entry, node.end + 1, node.start))
            self._read(node, found, entry)
            found.broken = node.broken or self._wrong(node, found, entry) or self._wedged(found)
        return found

    def trim(self, node: Node, cut: int) -> Node:
        """The log from offset `cut` on. Whoever has read up to there goes on, and others begin there."""
        kept = [entry for offset, entry, _ in node.entries() if offset >= cut]
        node = node.at(cut)
        readers = [*node.readers, FRESH]
        older: Node | None = node
        while not self.protocol.wipes_stores and (older := older.parent if older else None) is not None:
            readers += older.readers
        trimmed = self.root(cut, tuple(dict.fromkeys(readers)), node.owner, node.last)
        for entry in kept:
            trimmed = self.extend(trimmed, entry)
        return trimmed

    def _read(self, before: Node, node: Node, entry: Entry) -> None:
        rule, kept = self.protocol.read, self.protocol.kept
        read = [rule(reader, entry) for reader in before.readers]
        node.readers = tuple(dict.fromkeys([*(reader for reader, _ in read), kept(read[0][0])]))
        node.counts = read[0][1]
        node.owner = entry.life if node.counts and not entry.seq else before.owner
        node.last = entry if node.counts else before.last
        if any(counts != node.counts for _, counts in read):
            node.broken = f"offset {before.end} counts for one reader, and not for another who began elsewhere"

    def _wrong(self, before: Node, node: Node, entry: Entry) -> str | None:
        """What is wrong with the last entry."""
        if node.broken or not node.counts:
            return node.broken
        where, last = f"offset {before.end} counts", before.last
        if not entry.seq:
            if last is not None and entry.term <= last.term:
                return f"{where}, a claim whose term is not above {last.term}"
            return None
        if before.owner != NOBODY and entry.life % HEIR != before.owner:
            return f"{where}, which the owner did not write: the newest claim that counts is another's"
        older: Node | None = before
        while older is not None and older.entry is not None:
            if older.counts and older.entry[1:] == entry[1:]:
                return f"{where}, and so does offset {older.end - 1} with the same term and seq"
            older = older.parent
        if last is not None and (entry.seq != last.seq + 1 or (entry.seq > 1 and entry.life != last.life)):
            return f"{where}, and the record that it was decided on does not"
        return None

    def _wedged(self, node: Node) -> str | None:
        """None if somebody can claim, append, and be heard by all readers."""
        for reader in node.readers:
            term = max(1, node.readers[0].term + self.protocol.term_above)
            for seq in (0, 1):
                reader, counts = self.protocol.read(reader, Entry(NOBODY, term, seq))
                if not counts:
                    return f"nobody can own a log that ends at {node.end}: what a new owner writes does not count"
        return None
