"""The situations that a search must have met: an invariant that held where nothing happened says nothing.

The worlds count each time that one occurs (`World.marks`). A search over many seeds that never met one of them has a
hole, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

SITUATIONS: Final[Mapping[str, str]] = {
    "all runs listed": "when all was calm, by somebody who held it against what there was",
    "append after a gap": "records of an owner that has lost one: none counts any more",
    "attempt begun again": "an attempt whose outcome was lost with its worker",
    "attempt cut off": "it had its time, and did not end",
    "attempt to be tried again": "after a delay, as its policy says",
    "claim lost": "two owners claimed, and one was later",
    "command on the wrong partition": "whoever sent it has another idea of the partitions: it is forwarded",
    "command repeated": "sent twice, it must count once",
    "consumed without a turn": "a record of its own says so",
    "dead letter": "what is no command is kept for somebody to look at",
    "end of a brief run missed": "who asks for its result comes too late: it is forgotten",
    "gap": "a record was lost, and one behind it landed",
    "killed when a published offset was committed": "who takes over derives again from there, and no more",
    "killed when a queue was committed": "who takes the queue over reads from there",
    "killed when a run was copied forward": "there are two of it, and the head of the history may go or not",
    "killed when a run was deleted": "nobody has seen its tombstone yet",
    "killed when the history was trimmed": "what was there before has nobody any more, but in copies",
    "killed with unacknowledged turns": "what was decided and not known to be durable",
    "old status came late": "from an owner that did not know that it was none",
    "outbox derived again": "the new owner does not know how far the last one came",
    "part of a split turn lost": "a turn larger than a record, cut off by a crash",
    "queued attempt begun again": "a step worker died, or the attempt was put out again",
    "repeated append": "a producer's own batch, twice",
    "run begun after a clean-up": "the same id, and nothing is known of its first run",
    "run begun again": "the same id, beside its first run",
    "run cancelled": "a client was told so",
    "run cancelled at work": "its code unwound, and cleaned up",
    "run cleaned up": "nothing is left of it",
    "run deleted": "by its retention, or by a clean-up",
    "run terminated": "stopped where it stood",
    "run timeout": "it took longer than it may",
    "run watched to its end": "its watcher was shown all that was published, and its end",
    "snapshot": "a live run was copied forward, so that the head of its history may go",
    "some runs listed": "while things went wrong",
    "split turn": "a turn larger than a record",
    "state compared": "an owner's state with that of the log",
    "state compared with a trimmed log": "the same where the head is gone",
    "step cut off": "an at-most-once step whose worker died",
    "store reused": "the new owner found the partition's state on its disk",
    "store wiped": "what it found was of no use",
    "take-over with unacknowledged turns": "the last owner still waited for appends",
    "timer dropped again": "it was handed over again, or a new owner derived its end again",
    "trimmed log read from its start": "the new owner has nothing but copies and what came after",
    "two owners at once": "the group had given the partition to somebody else",
    "zombie append": "a record of an owner that was none any more",
}
"""What each is, and why it matters."""

WORLDS_MIN: Final = 300
"""From so many worlds on, each situation must have occurred."""


def missing(marks: Mapping[str, int]) -> list[str]:
    """The situations that never occurred."""
    return [name for name in SITUATIONS if not marks.get(name)]
