"""A worker's place in the consumer group of its app.

The group's coordinator says who should own which partition; it is never the fence. One consumer subscribes to the
commands topic for that alone: it fetches nothing, and its own thread polls it, so that a busy event loop costs no
membership.

A member that the group tells to give partitions up holds the group's answer back until it has stopped them (at most
`HAND_OVER_SECONDS`): the next owner then finds a history that nobody writes to. With a static id (`instance`) a worker
that was killed and is started again gets its partitions back at once, and nobody else gets them meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from confluent_kafka import OFFSET_END, Consumer, TopicPartition

from streamflow.errors import StreamflowError, Unavailable
from streamflow.logs.groups import Share
from streamflow.logs.kafka_reading import make_consumer
from streamflow.logs.kafka_url import KafkaUrl

log_ = logging.getLogger("streamflow.logs")

SESSION_SECONDS: Final = 6
"""After so long without a heartbeat a member counts as dead: the least that brokers take by default."""

HEARTBEAT_SECONDS: Final = 0.5
"""How often a member asks; it learns of a rebalance this late at most."""

HAND_OVER_SECONDS: Final = 8.0
"""How long the group waits for partitions to be stopped: a worker's own limit, and some."""

POLL_INTERVAL_SECONDS: Final = 60
"""A thread that does not poll for so long is stuck, and its member counts as dead."""

POLL_SECONDS: Final = 0.1
LEAVE_SECONDS: Final = 5.0
REJOIN_SECONDS: Final = 1.0


class KafkaMembership:
    """See `streamflow.logs.base.Membership`."""

    def __init__(
        self, url: KafkaUrl, *, topic: str, group: str, owner: str, instance: str | None, partitions: int
    ) -> None:
        self.owner = owner
        self._url, self._topic, self._group, self._instance = url, topic, group, instance
        self._partitions = partitions
        self._loop = asyncio.get_running_loop()
        self._share = Share()
        self._changed = asyncio.Event()
        self._assigned: frozenset[int] = frozenset()
        self._hand_over: tuple[set[int], threading.Event] | None = None
        self._failed: StreamflowError | None = None
        self._leaving = threading.Event()
        self._left: asyncio.Future[None] = self._loop.create_future()
        self._held: set[int] = set()  # the thread's own view
        self._consumer = self._join()
        self._thread = threading.Thread(target=self._serve, name=f"streamflow-kafka-group-{owner}", daemon=True)
        self._thread.start()

    async def assignments(self) -> AsyncIterator[frozenset[int]]:
        """See the port. Ends after `leave`."""
        self._changed.set()
        while not self._leaving.is_set():
            await self._changed.wait()
            self._changed.clear()
            if self._failed is not None:
                raise self._failed
            if not self._leaving.is_set():
                yield self._share.take()

    async def release(self, partition: int) -> None:
        self._share.release(partition)
        self._confirm()
        if not self._leaving.is_set() and self._share.update(self._assigned, self._assigned):
            self._changed.set()

    async def leave(self) -> None:
        if not self._leaving.is_set():
            self._leaving.set()
            self._changed.set()
            self._confirm()
        await asyncio.shield(self._left)

    # -- on the loop, for the thread ---------------------------------------------------------------------------------

    def _update(self, assigned: frozenset[int], taken: set[int], done: threading.Event | None) -> None:
        """The group gave `assigned`; of `taken` it wants to hear when they are stopped."""
        self._assigned = assigned
        if self._share.update(assigned, assigned):
            self._changed.set()
        if done is not None:
            self._hand_over = (taken, done)
            self._confirm()

    def _confirm(self) -> None:
        """Tell the waiting thread once nothing of what it asked for is being stopped."""
        if self._hand_over is not None:
            taken, done = self._hand_over
            if self._leaving.is_set() or not taken & self._share.stopping:
                self._hand_over = None
                done.set()

    def _fail(self, error: StreamflowError) -> None:
        self._failed = error
        self._changed.set()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _join(self) -> Consumer:
        role: dict[str, object] = {} if self._instance is None else {"group_instance_id": self._instance}
        url = self._url._replace(
            settings={
                "session.timeout.ms": SESSION_SECONDS * 1000,
                "heartbeat.interval.ms": int(HEARTBEAT_SECONDS * 1000),
                "max.poll.interval.ms": POLL_INTERVAL_SECONDS * 1000,
                **self._url.settings,
            }
        )
        consumer = make_consumer(url, group=self._group, partition_assignment_strategy="cooperative-sticky", **role)
        consumer.subscribe([self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)
        return consumer

    def _serve(self) -> None:
        try:
            while not self._leaving.is_set():
                if self._poll():
                    continue
                self._leaving.wait(REJOIN_SECONDS)
                if not self._leaving.is_set():
                    self._consumer = self._join()
            self._leave()
        except Exception as error:  # a thread's boundary: the worker must not go on as if it were a member
            log_.exception("%s: member %s of %s failed", self._url.url, self.owner, self._group)
            self._on_loop(self._fail, Unavailable(f"{self._url.url}: no longer in group {self._group}: {error!r}"))
        finally:
            self._on_loop(_finish, self._left)

    def _poll(self) -> bool:
        """Serve the group for a while; False when this consumer can go on no more."""
        message = self._consumer.poll(POLL_SECONDS)
        error = None if message is None else message.error()
        if error is None:
            return True
        if not error.fatal():
            log_.debug("%s: group %s: %s", self._url.url, self._group, error.str())
            return True
        # Another process has taken this static id: a second worker on the same state directory, or one that was
        # stopped for so long that its successor is at work.
        log_.warning("%s: member %s of %s was put out: %s", self._url.url, self.owner, self._group, error.str())
        self._on_lost(self._consumer, [TopicPartition(self._topic, number) for number in self._held])
        self._consumer.close()
        return False

    def _leave(self) -> None:
        # A static member that only closes keeps its place for the session; unsubscribing leaves at once.
        deadline = time.monotonic() + LEAVE_SECONDS
        self._consumer.unsubscribe()
        while self._held and time.monotonic() < deadline:
            self._consumer.poll(POLL_SECONDS)
        self._consumer.poll(POLL_SECONDS)
        self._consumer.close()

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        for partition in partitions:
            partition.offset = OFFSET_END
        consumer.incremental_assign(partitions)
        consumer.pause(partitions)
        self._held |= {partition.partition for partition in partitions}
        self._on_loop(self._update, frozenset(self._held), set(), None)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        taken = {partition.partition for partition in partitions}
        self._held -= taken
        stopped = threading.Event()
        if self._on_loop(self._update, frozenset(self._held), taken, stopped) and not self._leaving.is_set():
            deadline = time.monotonic() + HAND_OVER_SECONDS
            while not stopped.wait(POLL_SECONDS) and not self._leaving.is_set():
                if time.monotonic() > deadline:
                    log_.warning(
                        "%s: partitions %s go to another worker before this one has stopped them (it had %.0f s); the "
                        "history's fence keeps it safe", self._url.url, sorted(taken), HAND_OVER_SECONDS,
                    )  # fmt: skip
                    break
        consumer.incremental_unassign(partitions)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """The group has given them away already."""
        self._held -= {partition.partition for partition in partitions}
        self._on_loop(self._update, frozenset(self._held), set(), None)
        if partitions:
            consumer.incremental_unassign(partitions)

    def _on_loop(self, call: Callable[..., None], *args: Any) -> bool:
        """THE line where the group's news enter the event loop; False once it is closed."""
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            return False
        return True


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
