"""How tasks end, and futures: what became of them is always looked at, so that asyncio reports none of it as lost."""

from __future__ import annotations

import asyncio
from typing import Any

from streamflow.errors import Unavailable


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and wait for them; what they failed of is dropped."""
    if not tasks:
        return
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()


def error_of(future: asyncio.Future[Any]) -> BaseException | None:
    """What a write failed of; a cancelled one failed of the log's end."""
    return Unavailable("the log was closed with writes under way") if future.cancelled() else future.exception()
