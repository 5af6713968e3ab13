"""How far everything derived from the history is published: committed offsets of a group without members.

`<app>.outbox` has the history's partitions, so that ordinary lag tools show what a new owner would derive again. A
commit that is lost costs only that; so they are gathered, and one is under way at a time.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from confluent_kafka import KafkaException, TopicPartition

from streamflow.logs.base import HISTORY
from streamflow.logs.checks import closed
from streamflow.logs.kafka_patience import failed, patiently
from streamflow.logs.kafka_reading import make_consumer
from streamflow.logs.kafka_url import KafkaUrl

log_ = logging.getLogger("streamflow.logs")

COMMIT_SECONDS: Final = 0.2
"""Offsets that move meanwhile are committed together."""

COORDINATOR_SECONDS: Final = 6
"""How long a commit waits for the group's coordinator: librdkafka takes the session timeout for it, 45 s by default."""


class PublishedOffsets:
    """The published offsets of one app, as far as this handle knows them."""

    def __init__(self, url: KafkaUrl, app: str) -> None:
        self._url = url
        self._topic = f"{app}.{HISTORY}"
        self._group = f"{app}.outbox"
        self._consumer = make_consumer(
            url._replace(settings={"session.timeout.ms": COORDINATOR_SECONDS * 1000, **url.settings}),
            group=self._group,
        )
        # Its own: a cluster that is away must not keep the loop's few threads, which close local state, too.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="streamflow-kafka-offsets")
        self._ending = threading.Event()
        self._known: dict[int, int] = {}
        self._dirty: dict[int, int] = {}
        self._committing: asyncio.Task[None] | None = None
        self._closed = False

    def moved(self, partition: int, offset: int) -> None:
        """All derived from below `offset` is published; it never goes back."""
        if offset <= self._known.get(partition, 0):
            return
        self._known[partition] = self._dirty[partition] = offset
        if self._committing is None and not self._closed:
            self._committing = asyncio.get_running_loop().create_task(self._commit_later(), name="published-offsets")

    async def get(self, partition: int) -> int:
        """The highest offset known here or committed by anybody."""
        found = await asyncio.get_running_loop().run_in_executor(self._thread, self._committed, partition)
        return max(found, self._known.get(partition, 0))

    def _committed(self, partition: int) -> int:
        place = TopicPartition(self._topic, partition)

        def ask(seconds: float) -> list[TopicPartition]:
            if self._ending.is_set():
                raise closed(self._url.url)
            return self._consumer.committed([place], timeout=seconds)

        (found,) = patiently(self._url, ask, about=f"group {self._group}, which has the published offsets,")
        if found.error is not None:
            raise failed(self._url, found.error, f"group {self._group}")
        return max(0, found.offset)

    async def _commit_later(self) -> None:
        while self._dirty and not self._closed:
            await asyncio.sleep(COMMIT_SECONDS)
            await self._commit()
        self._committing = None

    async def _commit(self) -> None:
        dirty, self._dirty = self._dirty, {}
        if not dirty:
            return
        offsets = [TopicPartition(self._topic, partition, offset) for partition, offset in dirty.items()]
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._commit_now, offsets)
        except asyncio.CancelledError:
            self._dirty = {**dirty, **self._dirty}  # it may not have begun
            raise
        except KafkaException as error:
            self._dirty = {**dirty, **self._dirty}
            log_.debug("%s: published offsets wait: %s", self._url.url, error.args[0].str())

    def _commit_now(self, offsets: list[TopicPartition]) -> None:
        self._consumer.commit(offsets=offsets, asynchronous=False)

    async def close(self) -> None:
        """Commit what moved last, once, and end."""
        self._ending.set()
        if self._committing is not None:
            self._committing.cancel()
            await asyncio.wait((self._committing,))
        self._closed = True
        await self._commit()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._consumer.close)
        self._thread.shutdown()
