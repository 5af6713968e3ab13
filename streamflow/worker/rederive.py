"""A new owner derives again what the last one may not have published."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

from streamflow.core.derive import effects_since
from streamflow.core.effects import Effect, PublishStatus
from streamflow.logs.base import HISTORY, Log, Outgoing
from streamflow.worker.restore import first_turns_since
from streamflow.worker.state import PartitionState

RUNS_PUBLISHED_AT_ONCE: Final = 500

OutgoingOf: TypeAlias = Callable[[Iterable[Effect], str], list[Outgoing]]
"""The records that effects of a run make."""


async def publish_again(log: Log, partition: int, state: PartitionState, end: int, outgoing_of: OutgoingOf) -> int:
    """Publish what follows from the history up to `end` and is not known to be published; `end`, when it is."""
    offset = await log.published_offset(partition)
    offset = max(offset, await log.start_offset(HISTORY, partition))
    first_turns = await first_turns_since(log, partition, offset, end)
    pending: list[Outgoing] = []
    for count, (workflow_id, first) in enumerate(first_turns.items(), start=1):
        pending += outgoing_of(_derived(state, workflow_id, first), workflow_id)
        if count % RUNS_PUBLISHED_AT_ONCE == 0:
            await log.publish(pending)
            pending = []
    await log.publish(pending, published=(partition, end))
    return end


def _derived(state: PartitionState, workflow_id: str, first: int) -> list[Effect]:
    turns = state.turns(workflow_id)
    if not turns:
        return [PublishStatus(None)]
    run, effects = effects_since(turns, first)
    return [*effects, PublishStatus(run.status())]
