"""The log port: topics with partitions and offsets, one fenced writer per history partition, group membership.

What every adapter promises (tests/contract/test_log.py runs against each):

- **Order and offsets.** A record appended to a topic partition gets the next offset; offsets never repeat and only
  grow; readers see records in offset order and only once they are durable.
- **Fence.** `append` to history is a compare-and-swap: it succeeds only if nobody else wrote since the caller last
  knew the end. `Fenced` means that the caller's knowledge is stale: nothing of that batch was written. `Unavailable`
  means that the outcome is a refusal for now (SQLite) or unknown (Kafka): the caller must re-read before it goes on.
- **Asynchronous acknowledgement.** `append` and `publish` return futures at once, in call order; several may be under
  way. Appends of several partitions that wait at the same time share one transaction where the log has them.
- **Membership is never the fence.** The group only says who should try to own what; two members may believe that they
  own one partition, and the fence decides.
- **A step queue has a group of its own**, whose members share the partitions of its topic and keep there how far each
  is done with; nothing fences them, since an attempt that two of them run counts once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

COMMANDS: Final = "commands"
HISTORY: Final = "history"
TIMERS: Final = "timers"
STATUS: Final = "status"
REPLIES: Final = "replies"
DEAD_LETTERS: Final = "dead-letters"
TOPICS: Final = (COMMANDS, HISTORY, TIMERS, STATUS, REPLIES, DEAD_LETTERS)
COMPACTED: Final = frozenset({TIMERS, STATUS})
"""Topics that keep the newest record of each key; older ones may vanish, offsets stay. They are never trimmed."""

STEPS_PREFIX: Final = "steps."
"""Topics `steps.<queue>` come into being with their first record, reader or member."""


def steps_topic(queue: str) -> str:
    """The topic (without the app's prefix) of a step queue."""
    return STEPS_PREFIX + queue


class Record(NamedTuple):
    """One entry of a topic partition. `value` is None for a tombstone (compacted topics only)."""

    offset: int
    key: bytes
    value: bytes | None


class Outgoing(NamedTuple):
    """A record to publish: to `topic` (without the app's prefix) and an explicit `partition`."""

    topic: str
    partition: int
    key: bytes
    value: bytes | None


class Log(Protocol):
    """A log opened for one app. Created by `open_log(url, app=…)`; used on one event loop; closed once."""

    @property
    def app(self) -> str: ...

    @property
    def partitions(self) -> int:
        """How many partitions each topic has; fixed when the topics are created."""
        ...

    @property
    def url(self) -> str: ...

    @property
    def state_dir(self) -> Path | None:
        """Where workers keep their local state unless told otherwise; None: in memory, as the log itself."""
        ...

    @property
    def identity(self) -> str:
        """Which log this is (cluster and topic ids); a local store of another identity is wiped."""
        ...

    def append(
        self, partition: int, expected_offset: int, records: Sequence[tuple[bytes, bytes]]
    ) -> asyncio.Future[int]:
        """Append (key, value) records to `history[partition]`, all or nothing, if its end is at `expected_offset`.

        The future gives the offset of the first record (== `expected_offset`) once all are durable.
        It raises `Fenced` (end elsewhere, nothing written) or `Unavailable` (disk full, locked, unreachable).
        Appends to one partition may be pipelined; when one fails, later ones that build on it fail as `Fenced` too:
        those handed over before the failure was known, and any at the offset where the failed ones would have ended,
        until `read` or `end_offset` of the partition shows where it really ends. The call itself raises
        `InvalidArguments` or `PayloadTooLarge` for what no log takes; nothing is handed over then.
        """
        ...

    def publish(self, records: Sequence[Outgoing], *, published: tuple[int, int] | None = None) -> asyncio.Future[None]:
        """Append records to any topics but history, in order; when the future is done, all can read them.

        They survive the death of any process; the death of the machine, at the latest when an `append` that was
        handed over after them is acknowledged. That is enough: a command counts for nothing before its turn, and all
        else is derived from turns and is derived again.

        `published=(partition, offset)` records in the same transaction (or right after) that everything derived from
        `history[partition]` below `offset` has been published; it never goes back. The future raises `Unavailable`,
        and then this call does not move the published offset, nor does any later one of the partition, even one whose
        records are written: what failed must be derived again. Asking `published_offset` ends that: from there the
        partition's owner begins anew, and calls made before count no more. Of a call that failed nothing is
        written, or (Kafka) perhaps a part. Topics `steps.<queue>` come into being with their first record.
        """
        ...

    async def published_offset(self, partition: int) -> int:
        """The highest offset recorded by `publish(published=…)` for this partition, 0 if none.

        Who asks derives from there again: see `publish` for what that means after a failed one.
        """
        ...

    async def read(self, topic: str, partition: int, offset: int, *, limit: int = 1000) -> list[Record]:
        """Durable records from `offset` on, at most `limit`, at once; [] at the end.

        Below the start it goes on at the start: what was trimmed is not missed by most, and a reader that cannot do
        without it (a restore) compares `start_offset`.
        """
        ...

    def follow(self, topic: str, partition: int, offset: int, *, limit: int = 1000) -> AsyncIterator[list[Record]]:
        """Non-empty batches from `offset` on, waiting (not spinning) at the end, until the log is closed.

        Pulling slower is back-pressure. The position is the reader's own: any number may follow one partition. Below
        the start it goes on at the start, as `read` does, also when the part ahead of it is trimmed meanwhile.
        """
        ...

    async def start_offset(self, topic: str, partition: int) -> int:
        """The oldest offset that can still be read (trimming moves it), 0 at first."""
        ...

    async def end_offset(self, topic: str, partition: int) -> int:
        """The offset that the next record will get, as far as it is durable now."""
        ...

    async def trim(self, topic: str, partition: int, before: int) -> int:
        """Let everything below offset `before` go; gives the new start. Nobody reads below it from now on, but for what
        a follower has fetched already.

        The start moves at once and all the way, or not at all; when the room is free again is the log's affair. It
        never goes back and never beyond the end, so repeating is harmless. Compacted topics are `InvalidArguments`;
        `Unavailable` means that the start may or may not have moved.
        """
        ...

    async def offset_at(self, topic: str, partition: int, at_ms: int) -> int:
        """An offset so that every record below it was written before `at_ms`, by the log's own clock.

        The highest such offset where the log keeps the time of each record. A local log keeps none: it remembers
        where the end was whenever it is asked, and answers with the last of those marks; asked once an hour it is an
        hour behind at most, and never ahead.
        """
        ...

    async def join(self, owner: str, *, instance: str | None = None) -> Membership:
        """Become a worker of the app's group under `owner`; a name that a living member has is `InvalidArguments`.

        `instance` names what outlives the process: a worker that was killed and comes back as the same instance may
        have its partitions again at once. Where a lock of the system tells of a death (SQLite) it is not needed.
        """
        ...

    async def verify(self) -> None:
        """Raise `CorruptLog` when the topics are not the ones that were opened: deleted, and perhaps made anew."""
        ...

    async def join_queue(self, queue: str, owner: str) -> QueueMembership:
        """Become a member of the group that serves the topic `steps.<queue>`, apart from the app's own group.

        A name that a living member of that group has is `InvalidArguments`. The topic is made if it is missing.
        """
        ...

    async def close(self) -> None:
        """Finish what was handed over (append, publish), leave, free everything. Idempotent."""
        ...


class Membership(Protocol):
    """A worker's place in the group: which partitions it should own now."""

    def assignments(self) -> AsyncIterator[frozenset[int]]:
        """The partitions this member should own: at once, then after every change, until `leave`. One consumer only.

        When a partition disappears from the set the member stops it and calls `release`; only then (or when the member
        is dead, or its lease ends) is it given to another, and only then can it come back to this one.
        """
        ...

    async def release(self, partition: int) -> None:
        """This member has stopped the partition: it may go to another at once. Idempotent."""
        ...

    async def confirm(self, partition: int, consumed: int | None = None) -> bool:
        """Whether the group says that this member should own the partition; asked now, where the group is elsewhere.

        False also where the group cannot say yet (it is being rearranged). `consumed`: commands below that offset are
        consumed, which a group that keeps offsets notes, so that ordinary tools show what is left. Raises
        `Unavailable`.
        """
        ...

    async def leave(self) -> None:
        """Release everything and leave the group at once. Idempotent."""
        ...


class QueueMembership(Membership, Protocol):
    """A step worker's place in the group of one queue, and how far that group is done with the queue's partitions."""

    async def committed(self, partition: int) -> int:
        """The offset to go on from: the highest that any member committed, 0 at first."""
        ...

    async def commit(self, partition: int, offset: int) -> None:
        """Every record below `offset` is done with. It never goes back.

        Raises `Unavailable`, and also where the partition is this member's no more (Kafka): then nothing changed, and
        whoever has it does the records in between again.
        """
        ...
