"""What every log promises of publishes that fail (streamflow/logs/base.py), run against each adapter."""

from __future__ import annotations

import asyncio

from streamflow.errors import Unavailable
from streamflow.logs.base import COMMANDS, Outgoing
from tests.logs.support import Place, on_loop

SMALL = [Outgoing(COMMANDS, 0, b"k", b"v")]


@on_loop
async def test_the_published_offset_does_not_pass_what_failed_until_its_owner_begins_anew(place: Place) -> None:
    found = await place.failing()
    if found is None:
        return  # the memory log takes whatever it is given
    log, failing = found
    await log.publish(SMALL, published=(0, 5))
    first = [
        log.publish(failing, published=(0, 7)),
        log.publish(SMALL, published=(0, 9)),
    ]
    outcomes = await asyncio.gather(*first, return_exceptions=True)
    assert isinstance(outcomes[0], Unavailable)
    await log.publish(SMALL, published=(0, 11))
    assert len(await place.read(log, COMMANDS, 0, 0)) >= 2, "what comes after a failed one is written"
    assert await log.published_offset(0) == 5
    await log.publish(SMALL, published=(0, 11))
    assert await log.published_offset(0) == 11


@on_loop
async def test_a_failure_of_before_does_not_hold_back_an_owner_that_begins_anew(place: Place) -> None:
    found = await place.failing()
    if found is None:
        return  # the memory log takes whatever it is given
    log, failing = found
    late = log.publish(failing, published=(0, 7))
    assert await log.published_offset(0) == 0
    await asyncio.gather(late, return_exceptions=True)
    await log.publish(SMALL, published=(0, 3))
    assert await log.published_offset(0) == 3
