"""How far the history says that commands are consumed, and when a record of its own should say it.

Each turn says it. Commands that make none (another partition's, garbage, questions, repeats) are consumed all the same:
unsaid, each new owner would forward them again, bury them again and answer them again. What was forwarded or buried is
said at once, since it is seen outside, and a forwarded start would begin its run once more where that was deleted
meanwhile. The others are harmless, and are said when they are many and no answer is under way.
"""

from __future__ import annotations

from streamflow.codec.avro import encode_history
from streamflow.core.events import Consumed
from streamflow.core.partition import Partition


class Unsaid:
    """The commands of one partition that are consumed while the history does not say so, `most` of those unseen."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._said = self._seen = 0

    def said(self, consumed: int) -> None:
        """A record says that commands are consumed up to this offset."""
        self._said = consumed

    def hurry(self, consumed: int) -> None:
        """Of the commands before this offset something is seen outside."""
        self._seen = consumed

    def is_due(self, consumed: int) -> bool:
        """Whether a record should say that commands are consumed up to this offset."""
        return consumed > self._said and (self._seen > self._said or consumed > self._said + self._most)


def consumed_record(core: Partition) -> bytes:
    """The value of the record that says how far commands are consumed now; it has the partition's next `seq`."""
    core.seq += 1
    return encode_history(Consumed(term=core.term, seq=core.seq, at=core.at, consumed=core.consumed))
