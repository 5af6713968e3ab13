"""Following a topic partition for as long as a client lives, over failures of the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Final, cast

from streamflow.errors import Unavailable
from streamflow.logs.base import Log, Record

FOLLOW_RETRY_SECONDS: Final = 0.5
"""Pause before a read that the log refused is tried again: a locked file or a broker's election ends about then."""

_log = logging.getLogger("streamflow.client")


async def follow(
    log: Log, topic: str, partition: int, offset: int, take: Callable[[list[Record]], Awaitable[None]]
) -> None:
    """Hand every batch from `offset` on to `take`; returns when the log is closed, raises when it is damaged."""
    while True:
        try:
            batches = log.follow(topic, partition, offset)
            # Every adapter's follow is a generator; closing it here is what ends its wait in the log at once.
            async with aclosing(cast("AsyncGenerator[list[Record]]", batches)):
                async for batch in batches:
                    offset = batch[-1].offset + 1
                    await take(batch)
            return
        except Unavailable as error:
            _log.warning("%s[%d] cannot be read from offset %d: %s; trying again", topic, partition, offset, error)
            await asyncio.sleep(FOLLOW_RETRY_SECONDS)
