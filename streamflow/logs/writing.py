"""Writing to a log without conditional appends: the fence of the history, and publishing to all other topics.

The fence. Kafka has no conditional append. Each record carries (term, seq), the writer knows which offset its next
record must get, and an acknowledgement at exactly that offset proves that nobody wrote before it: the record is durable
and valid. Any other acknowledgement, or none, is *unknown*: the caller reads the log again. What was refused this way
may well be in the log; the reading rule (core/reading.py) says whether it counts.

Rules of this file:

- Futures of one partition are completed in the order of the calls; after a failure all that build on it fail.
- One group of appends is under way per partition, and one of publishes per handle; what comes meanwhile goes together
  as the next. A lone record does not wait; under load the groups grow by themselves, and each request that is not made
  saves client, broker and the interpreter's lock some 0.1 ms. So the first record of a new producer, or of one that was
  idle for a day, always goes alone, as it must: brokers give no order between its first batches.
- Groups of publishes keep a distance, one millisecond for each record, at most 20: behind a burst even a lone record
  waits so long, and under load a request to each partition carries more.
- A published offset never moves past records whose publish failed.

Nothing here knows librdkafka or a thread: that is the lane's (`lanes.py`), and so the simulator runs this code, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from streamflow.errors import StreamflowError, Unavailable
from streamflow.logs.base import HISTORY, Outgoing
from streamflow.logs.checks import fenced, fenced_behind
from streamflow.logs.lanes import CLOSE_SECONDS, Lane, MakeLane, NotTaken, Refusal, Sent

log_ = logging.getLogger("streamflow.logs")

PARTITIONS_PER_LANE: Final = 4
"""History partitions that share a producer: what happens to one of them on an error happens to all. A producer for each
cost a third of the throughput on two cores (four partitions: 3,300 steps a second, with one producer 4,700)."""

HISTORY_LANES_MAX: Final = 4
"""Producers for the history per handle: each costs a connection and two threads per broker."""

PENDING_BYTES_MAX: Final = 256 * 1024 * 1024
"""Bytes handed over and not yet durable; a caller that does not await its futures is refused beyond."""

REST_SECONDS_PER_RECORD: Final = 0.001
REST_SECONDS_MAX: Final = 0.02
"""How long after a group of publishes the next one goes at the earliest. Statuses and replies go to all partitions,
each in a request of its own, and for most of them somebody who follows makes another. So 10,000 steps of W2 take 4.0 s
of CPU instead of 4.4, in worker, client and broker together. 40 ms would make it 3.6 s; but each step on a queue and
each command may wait for it."""

FAILED: Final = Refusal("its producer failed for good")


class _Append(Sent):
    """An append under way. `records` are kept while it waits for the group before it; `landed` once it is
    acknowledged.
    """

    __slots__ = ("count", "done", "expected", "landed", "partition", "records", "settled", "size")

    def __init__(
        self,
        done: asyncio.Future[int],
        partition: int,
        expected: int,
        records: Sequence[tuple[bytes, bytes]],
        size: int,
    ) -> None:
        super().__init__(len(records))
        self.done, self.partition, self.expected, self.size = done, partition, expected, size
        self.count = len(records)
        self.records: Sequence[tuple[bytes, bytes]] | None = records
        self.landed = self.settled = False


class _Publish(Sent):
    """A publish under way; `published` is (partition, offset, chain)."""

    __slots__ = ("done", "published", "records", "size")

    def __init__(
        self,
        done: asyncio.Future[None],
        records: Sequence[Outgoing],
        published: tuple[int, int, int] | None,
        size: int,
    ) -> None:
        super().__init__(len(records))
        self.done, self.records, self.published, self.size = done, records, published, size


class _Tail:
    """What was handed over to one history partition."""

    __slots__ = ("failed_end", "sent", "under_way")

    def __init__(self) -> None:
        self.under_way: deque[_Append] = deque()
        self.sent = 0
        """How many of these are with the lane; the others wait for them."""
        self.failed_end: int | None = None
        """Where the failed appends would have ended, until the caller looks again."""


class Writing:
    """The writing half of a log. All methods are called on the event loop, that of the caller unless `loop` is given.

    `url` is for error texts.
    """

    def __init__(
        self,
        url: str,
        app: str,
        partitions: int,
        moved: Callable[[int, int], None],
        make_lane: MakeLane,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._url, self._app, self._make_lane = url, app, make_lane
        self._history = f"{app}.{HISTORY}"
        self._loop = loop or asyncio.get_running_loop()
        self._moved = moved
        """Called with (partition, offset) when all derived from history below the offset is published."""
        self._lanes: list[Lane | None] = [None] * min(-(-partitions // PARTITIONS_PER_LANE), HISTORY_LANES_MAX)
        self._publisher: Lane | None = None
        self._tails = [_Tail() for _ in range(partitions)]
        self._publishes: deque[_Publish] = deque()
        self._publishes_sent = 0
        self._rest_until = 0.0
        self._resting: asyncio.TimerHandle | None = None
        """Ends the rest between two groups of publishes, while some wait for that."""
        self._chains = [0] * partitions
        self._void: set[int] = set()
        self._pending_bytes = 0
        self._closing = False
        """Whether what still waits is not to be sent any more."""
        self._ended: list[Lane] = []
        """Lanes that were dropped, whose threads `close` waits for."""

    def warm_up(self, *, history: bool) -> None:
        """Make the producers before they are needed: each takes half a second until a broker gave it its id."""
        if self._publisher is None:
            self._publisher = self._make_lane("publisher", self._published)
        for partition in range(len(self._lanes) if history else 0):
            self._history_lane(partition)

    # -- history -----------------------------------------------------------------------------------------------------

    def append(
        self, partition: int, expected: int, records: Sequence[tuple[bytes, bytes]], size: int
    ) -> asyncio.Future[int]:
        """See `Log.append`; arguments are checked, `size` is the bytes of all."""
        done: asyncio.Future[int] = self._loop.create_future()
        tail = self._tails[partition]
        # First of all: a lane that has failed takes with it what this append builds on.
        lane = self._history_lane(partition)
        if tail.failed_end is not None:
            if expected == tail.failed_end:
                tail.failed_end += len(records)
                done.set_exception(fenced_behind(self._url, partition, expected))
                return done
            tail.failed_end = None
        if (full := self._full()) is not None:
            done.set_exception(full)
            tail.failed_end = expected + len(records)
            return done
        append = _Append(done, partition, expected, tuple(records), size)
        tail.under_way.append(append)
        self._pending_bytes += size
        if not tail.sent:
            self._send(tail, lane)
        return done

    def looked(self, partition: int) -> None:
        """The caller has looked at the partition's end again: appends build on what it saw."""
        self._tails[partition].failed_end = None

    def _history_lane(self, partition: int) -> Lane:
        number = partition % len(self._lanes)
        lane = self._lanes[number]
        if lane is not None and lane.failed:
            self._drop(lane, "it failed for good")
            lane = None
        if lane is None:
            lane = self._lanes[number] = self._make_lane(f"history-{number}", self._appended)
        return lane

    def _send(self, tail: _Tail, lane: Lane) -> None:
        """Give the lane all that waits: the next group."""
        tail.sent = len(tail.under_way)
        messages = []
        for append in tail.under_way:
            records, append.records = append.records, None
            assert records is not None, append.expected
            for number, (key, value) in enumerate(records):
                messages.append(lane.message(key, value, append, append.expected + number))
        try:
            lane.send(self._history, tail.under_way[0].partition, messages)
        except NotTaken as error:
            # A part of it may be under way: what becomes of the rest of this lane is unknown, too.
            self._drop(lane, error.refusal.text)

    def _appended(self, lane: Lane, acknowledged: list[Sent]) -> None:
        for append in acknowledged:
            assert isinstance(append, _Append), append
            if append.settled:
                continue
            if append.error is not None:
                if not lane.dropped:
                    self._drop(lane, append.error.text)
                continue
            tail = self._tails[append.partition]
            if append.found is not None:
                self._break(tail, fenced(self._url, append.partition, append.expected, append.found))
                continue
            # A group may be several batches on the wire, and the answer to an earlier one may come after it was asked
            # for again: those behind it wait.
            append.landed = True
            while tail.under_way and tail.under_way[0].landed:
                tail.sent -= 1
                self._settle(tail.under_way.popleft(), None)
            if not tail.sent and tail.under_way and not self._closing:
                self._send(tail, lane)
        if lane.failed and not lane.dropped:
            self._drop(lane, "it failed for good")

    def _end(self, lane: Lane) -> None:
        """Keep a lane that was dropped until its thread ends; while a cluster is away, lanes come and go for hours."""
        self._ended = [other for other in self._ended if not other.closed.done()]
        self._ended.append(lane)

    def _break(self, tail: _Tail, error: StreamflowError) -> None:
        """The first append under way failed with `error`: all behind it build on it."""
        for append in tail.under_way:
            self._settle(append, error)
            tail.failed_end = append.expected + append.count
            error = fenced_behind(self._url, append.partition, append.expected)
        tail.under_way.clear()
        tail.sent = 0

    def _drop(self, lane: Lane, why: str) -> None:
        """The outcome of what this lane has under way is unknown: all of it fails, and a new lane takes over."""
        log_.warning("%s: producer %s is replaced: %s", self._url, lane.name, why)
        lane.drop()
        self._end(lane)
        number = self._lanes.index(lane)
        self._lanes[number] = None
        for partition in range(number, len(self._tails), len(self._lanes)):
            self._break(
                self._tails[partition],
                Unavailable(f"{self._url}: history[{partition}]: the outcome of an append is unknown ({why})"),
            )

    def _settle(self, append: _Append, error: StreamflowError | None) -> None:
        append.settled = True
        self._pending_bytes -= append.size
        if append.done.done():
            return  # the caller does not wait any more
        append.done.set_result(append.expected) if error is None else append.done.set_exception(error)

    # -- all other topics --------------------------------------------------------------------------------------------

    def mark(self, published: tuple[int, int] | None) -> tuple[int, int, int] | None:
        """What a publish that is called now moves: (partition, offset, chain); None when it moves nothing."""
        if published is None or published[0] in self._void:
            return None
        return (*published, self._chains[published[0]])

    def void(self, mark: tuple[int, int, int] | None) -> None:
        """A publish failed: those after it do not move the published offset, until its owner begins anew."""
        if mark is not None and mark[2] == self._chains[mark[0]]:
            self._void.add(mark[0])

    def publish(
        self, records: Sequence[Outgoing], upto: tuple[int, int, int] | None, size: int
    ) -> asyncio.Future[None]:
        """See `Log.publish`; arguments are checked, the topics exist, and `upto` is of `mark`."""
        done: asyncio.Future[None] = self._loop.create_future()
        if (full := self._full()) is not None:
            self.void(upto)
            done.set_exception(full)
            return done
        publish = _Publish(done, tuple(records), upto, size)
        self._publishes.append(publish)
        self._pending_bytes += size
        self._send_next()
        return done

    def _send_next(self) -> None:
        """Send the publishes that wait, unless a group is under way or was sent just now."""
        if self._closing or not self._publishes or self._publishes_sent or self._resting is not None:
            return
        seconds = self._rest_until - self._loop.time()
        if seconds > 0:
            self._resting = self._loop.call_later(seconds, self._rested)
        else:
            self._send_publishes()

    def _rested(self) -> None:
        self._resting = None
        self._send_next()

    def _send_publishes(self) -> None:
        """Give the lane all that waits: the next group."""
        self._publishes_sent = len(self._publishes)
        if self._publisher is not None and self._publisher.failed:
            self._drop_publisher(self._publisher)
        if self._publisher is None:
            self._publisher = self._make_lane("publisher", self._published)
        places: dict[tuple[str, int], list[tuple[_Publish, dict[str, Any]]]] = {}
        for publish in self._publishes:
            for topic, partition, key, value in publish.records:
                message = self._publisher.message(key, value, publish)
                places.setdefault((topic, partition), []).append((publish, message))
            publish.records = ()
        count = sum(map(len, places.values()))
        self._rest_until = self._loop.time() + min(count * REST_SECONDS_PER_RECORD, REST_SECONDS_MAX)
        for (topic, partition), sent in places.items():
            try:
                self._publisher.send(f"{self._app}.{topic}", partition, [message for _, message in sent])
            except NotTaken as error:  # some of them may have been taken, and are published again
                for publish, _ in sent:
                    publish.error = error.refusal
                    publish.left = 0
        if self._publisher.failed:  # its thread says nothing more of what was taken before
            self._fail_publishes(self._publisher)
        if self._publishes[0].left <= 0:  # nothing to wait for
            self._loop.call_soon(self._complete)

    def look_at_published(self, partition: int) -> None:
        """The partition's owner begins again from its published offset: what was under way counts no more."""
        self._chains[partition] += 1
        self._void.discard(partition)

    def _published(self, lane: Lane, acknowledged: list[Sent]) -> None:
        if lane.failed and not lane.dropped:
            self._fail_publishes(lane)
        self._complete()

    def _fail_publishes(self, lane: Lane) -> None:
        self._drop_publisher(lane)
        for number in range(self._publishes_sent):  # no acknowledgement will come for these
            publish = self._publishes[number]
            if publish.left > 0:
                publish.left, publish.error = 0, FAILED

    def _drop_publisher(self, lane: Lane) -> None:
        log_.warning("%s: producer %s is replaced: it failed for good", self._url, lane.name)
        lane.drop()
        self._end(lane)
        self._publisher = None

    def _complete(self) -> None:
        """Complete what is acknowledged, in the order of the calls."""
        while self._publishes_sent and self._publishes[0].left <= 0:
            publish = self._publishes.popleft()
            self._publishes_sent -= 1
            self._pending_bytes -= publish.size
            if publish.error is not None:
                self.void(publish.published)
                if not publish.done.done():
                    publish.done.set_exception(self._not_published(publish.error))
                continue
            if publish.published is not None:
                partition, offset, chain = publish.published
                if chain == self._chains[partition] and partition not in self._void:
                    self._moved(partition, offset)
            if not publish.done.done():
                publish.done.set_result(None)
        self._send_next()

    def _not_published(self, refusal: Refusal) -> StreamflowError:
        return refusal.error or Unavailable(f"{self._url}: publishing failed ({refusal.text}): try again")

    def _full(self) -> Unavailable | None:
        if self._pending_bytes <= PENDING_BYTES_MAX:
            return None
        return Unavailable(
            f"{self._url}: {self._pending_bytes:,} bytes wait to be written, at most {PENDING_BYTES_MAX:,} may: "
            "await earlier appends first"
        )

    async def close(self) -> None:
        """Finish what was handed over and somebody waits for, as far as the cluster takes it, and end the threads."""
        waiting: list[asyncio.Future[int] | asyncio.Future[None]] = []
        waiting += [append.done for tail in self._tails for append in tail.under_way]
        waiting += [publish.done for publish in self._publishes]
        left = waiting and (await asyncio.wait(waiting, timeout=CLOSE_SECONDS))[1]
        self._closing = True
        lanes = [lane for lane in (*self._lanes, self._publisher) if lane is not None]
        for lane in lanes:
            lane.drop() if left else lane.close()  # they would wait as long again
        for lane in (*lanes, *self._ended):
            await lane.closed
        await asyncio.sleep(0)  # what the lanes handed over last has been taken in
        for tail in self._tails:
            self._break(tail, Unavailable(f"{self._url}: closed with an append under way"))
        for publish in self._publishes:
            if not publish.done.done():
                publish.done.set_exception(Unavailable(f"{self._url}: closed with a publish under way"))
        self._publishes.clear()
