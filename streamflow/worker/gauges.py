"""A worker's gauges, read when Prometheus asks; how far the log is ahead is asked for in between, by `Lags`.

`read` runs in the thread of the metrics' server, while the event loop goes on: it copies dictionaries whole (which the
interpreter does in one go) and reads single numbers, which may be a moment apart.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from streamflow.errors import Unavailable
from streamflow.logs.base import COMMANDS, Log
from streamflow.metrics import Reading
from streamflow.worker.executor import Executor
from streamflow.worker.processor import Processor, ProcessorState
from streamflow.worker.queues import QueueService

log_ = logging.getLogger("streamflow.worker")

LAG_SECONDS: Final = 5.0
"""How often the log is asked for its ends: one short question for each partition, once for most scrapes."""


class Lags:
    """How many records of the log wait for this worker, as of the last `ask`."""

    def __init__(self, log: Log) -> None:
        self.commands: Mapping[int, int] = {}
        self.queues: Mapping[str, int] = {}
        self._log = log

    async def ask(self, processors: Mapping[int, Processor], services: Sequence[QueueService]) -> None:
        """Ask the log for the ends of what is read here; while it is away, what it said last is shown."""
        try:
            commands: dict[int, int] = {}
            for partition, processor in list(processors.items()):
                end = await self._log.end_offset(COMMANDS, partition)
                if processor.status is ProcessorState.ACTIVE:
                    commands[partition] = max(0, end - processor.durably_consumed)
            queues: dict[str, int] = {}
            for service in services:
                queues[service.queue] = 0
                for partition, reader in list(service.readers.items()):
                    end = await self._log.end_offset(reader.topic, partition)
                    queues[service.queue] += max(0, end - reader.below)
        except Unavailable as error:
            log_.debug("how far the log is ahead is not known: %s", error)
            return
        self.commands, self.queues = commands, queues


def read(processors: Mapping[int, Processor], owned: Sequence[int], executor: Executor | None, lags: Lags) -> Reading:
    """The gauges of a worker: `owned` are its partitions, of which those without a processor are between two lives."""
    living = dict(processors)
    active = {partition: each for partition, each in living.items() if each.status is ProcessorState.ACTIVE}
    states = Counter(str(living[each].status) if each in living else "stopped" for each in owned)
    return Reading(
        partitions=states,
        blocked_runs=sum(len(each.observer.blocked) for each in active.values()),
        command_lag={partition: lag for partition, lag in lags.commands.items() if partition in active},
        outbox_lag={partition: each.outbox_lag for partition, each in active.items()},
        queue_lag=lags.queues,
        running_steps=0 if executor is None else len(executor.running),
        waiting_steps=0 if executor is None else len(executor.waiting),
    )
