"""Timers that are due and that the owner's state does not know: they are dropped, but only by a true owner.

A timer is unknown when it is over and its record is still, or again, on the topic. It is unknown, too, to an owner
that was paused and has not heard of its successor, when a run of the successor has set it: dropped then, that run would
sleep for ever. The successor claimed the partition before it set any timer, so whoever asks for the end of the history
*after* it has read the timer sees that somebody else has written there. (Found by the simulator. Commands need no such
question: they lie on one topic, in one order, so a stale owner has to decide on the run's start before, which the fence
refuses.)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from streamflow.errors import Unavailable
from streamflow.logs.base import HISTORY, Outgoing

if TYPE_CHECKING:
    from streamflow.worker.processor import Processor

log_ = logging.getLogger("streamflow.worker")


class Strays:
    """Drops unknown timers of one partition. `run` it while active; what is left then is found due again."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        # As many as the timer service hands over at once: one that is handed over again is the same key.
        self._tombstones: dict[bytes, Outgoing] = {}
        self._found = asyncio.Event()

    def add(self, tombstones: Iterable[Outgoing]) -> None:
        """Drop these, once it is sure that the state is that of the log."""
        self._tombstones.update((each.key, each) for each in tombstones)
        self._found.set()

    async def run(self) -> None:
        """Ask and drop, until cancelled."""
        processor = self._processor
        while True:
            await self._found.wait()
            self._found.clear()
            tombstones, self._tombstones = list(self._tombstones.values()), {}
            try:
                end = await processor.log.end_offset(HISTORY, processor.partition)
            except Unavailable as error:
                log_.warning(
                    "partition %d: %d timers of no run stay for now: %s", processor.partition, len(tombstones), error
                )
                continue  # the timer service hands them over again
            processor.answer_up_to(end, tombstones)
