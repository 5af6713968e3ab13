"""Timers that are due and that the owner's state does not know: they are dropped, but only by a true owner.

A timer is unknown when it is over and its record is still, or again, on the topic. It is unknown, too, to an owner
that was paused and has not heard of its successor, when a run of the successor has set it: dropped then, that run would
sleep for ever. The successor claimed the partition before it set any timer, so whoever asks for the end of the history
*after* it has read the timer sees that somebody else has written there. (Found by the simulator.)

The answer is no verdict, since the run may have begun meanwhile and have set the very same timer: the timer is decided
on again, and what is unknown then is dropped in that pass, in order with all that it decides.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from streamflow.core.effects import TimerRecord
from streamflow.errors import Unavailable
from streamflow.logs.base import HISTORY

if TYPE_CHECKING:
    from streamflow.worker.processor import Processor

log_ = logging.getLogger("streamflow.worker")


class Strays:
    """Unknown timers of one partition. `run` it while active; what is left then is found due again."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        # As many as the timer service hands over without a tombstone: what is handed over again has the same key.
        self._asked: dict[bytes, TimerRecord] = {}
        # Those that the next pass decides on; what it makes of them, they are not sure any more after it.
        self._sure: set[bytes] = set()
        self._found = asyncio.Event()

    def may_drop(self, timer: TimerRecord) -> bool:
        """Whether this unknown timer is surely nobody else's. If not, the log is asked, and it is decided on again."""
        if timer.key in self._sure:
            return True
        self._asked[timer.key] = timer
        self._found.set()
        return False

    def decided(self) -> None:
        """A pass has decided on all that was staged."""
        self._sure.clear()

    async def run(self) -> None:
        """Ask where the history ends and hand the timers over again, until cancelled."""
        processor = self._processor
        while True:
            await self._found.wait()
            self._found.clear()
            timers, self._asked = list(self._asked.values()), {}
            try:
                end = await processor.log.end_offset(HISTORY, processor.partition)
            except Unavailable as error:
                count = len(timers)
                log_.warning("partition %d: %d timers of no run stay for now: %s", processor.partition, count, error)
                continue  # the timer service hands them over again
            processor.check_end(end)
            most = processor.limits.pass_inputs_max
            for start in range(0, len(timers), most):
                some = timers[start : start + most]
                await processor.take_in(some, processor.clock.now_ms())
                self._sure.update(timer.key for timer in some)  # they are staged, and the pass is still to come
