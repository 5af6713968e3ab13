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
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

from confluent_kafka import OFFSET_END, Consumer, KafkaError, KafkaException, TopicPartition

from streamflow.errors import CorruptLog, StreamflowError, Unavailable
from streamflow.logs.groups import Share
from streamflow.logs.kafka_access import DENIED, denied
from streamflow.logs.kafka_patience import failed, patiently
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
COORDINATOR_SECONDS: Final = 2.0
"""How long the group's coordinator may be silent before we look whether it refuses us."""
LEAVE_SECONDS: Final = 5.0
REJOIN_SECONDS: Final = 1.0
SOON_MAX: Final = 2
"""Put out so many times in a row within a session of joining, a member has a twin that uses the same static id."""
NO_NEWS_SECONDS: Final = 12.0
"""A member that has lost all that it had, and hears nothing more for so long, joins anew: librdkafka does not always
say that the coordinator has fenced it. Twice the session, in which the group would have given it its share."""
FIRST_NEWS_SECONDS: Final = POLL_INTERVAL_SECONDS + NO_NEWS_SECONDS
"""As much for one that has just joined: the group may wait for a member that is stuck before it gives out anything.
Its news are that it gets nothing, if there are more members than partitions."""


class Group(NamedTuple):
    """A consumer group that shares the partitions of one topic.

    `note` is kept with the group's offsets; members with another one are refused. It is the id of the history's topic:
    that a history was deleted and made anew could not be told otherwise by a worker without any state, and all commands
    that are kept would be carried out again. "" is kept and not checked: what is on a queue without its history is
    answered to nobody.
    """

    url: KafkaUrl
    name: str
    topic: str
    partitions: int
    note: str


class KafkaMembership:
    """See `streamflow.logs.base.Membership`."""

    def __init__(self, group: Group, owner: str, instance: str | None) -> None:
        self.owner = owner
        self._group, self._instance = group, instance
        self._url, self._topic = group.url, group.topic
        self._asked: SimpleQueue[tuple[int, int | None, asyncio.Future[bool]]] = SimpleQueue()
        self._consumed: dict[int, int] = {}  # the thread's: what this member has committed since it has them
        self._known: dict[int, int] = {}  # the loop's
        self._wondered: SimpleQueue[tuple[int, asyncio.Future[int]]] = SimpleQueue()
        self._committing: list[tuple[int, int, asyncio.Future[bool]]] = []  # the thread's: not answered yet
        self._going: set[int] = set()  # the thread's: not held any more, and not stopped yet
        self._loop = asyncio.get_running_loop()
        self._share = Share()
        self._changed = asyncio.Event()
        self._assigned: frozenset[int] = frozenset()
        self._hand_over: tuple[set[int], threading.Event] | None = None
        self._failed: StreamflowError | None = None
        self._leaving = threading.Event()
        self._left: asyncio.Future[None] = self._loop.create_future()
        self._held: set[int] = set()  # the thread's own view
        self._unheard: KafkaError | None = None  # the thread's: what the consumer was told outside of _poll
        self._silence: tuple[float, float] | None = None  # the thread's: since when it waits for news, and how long
        self._joined: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._serve, name=f"streamflow-kafka-group-{owner}", daemon=True)
        self._thread.start()

    @property
    def has_left(self) -> bool:
        """Whether it has ended and nothing of it is left to wait for."""
        return self._left.done()

    async def joined(self) -> None:
        """Wait until this is a member. Raises `CorruptLog` when the group's offsets carry another note.

        Who stops waiting leaves: nobody would serve the partitions that this member gets.
        """
        try:
            await self._joined
        except asyncio.CancelledError:
            self._leaving.set()
            raise

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
        if self._failed is not None:  # while the consumer was busy with what it took last
            raise self._failed

    async def release(self, partition: int) -> None:
        self._share.release(partition)
        self._confirm()
        if not self._leaving.is_set() and self._share.update(self._assigned, self._assigned):
            self._changed.set()

    async def confirm(self, partition: int, consumed: int | None = None) -> bool:
        done: asyncio.Future[bool] = self._loop.create_future()
        if self._leaving.is_set():
            return False
        self._asked.put((partition, consumed, done))
        return await done

    async def committed(self, partition: int) -> int:
        """See `streamflow.logs.base.QueueMembership`."""
        if partition not in self._known:
            done: asyncio.Future[int] = self._loop.create_future()
            if self._leaving.is_set():
                raise self._out(partition)
            self._wondered.put((partition, done))
            self._known[partition] = await done
        return self._known[partition]

    async def commit(self, partition: int, offset: int) -> None:
        """See `streamflow.logs.base.QueueMembership`. The group refuses who is out of it."""
        if offset <= await self.committed(partition):
            return
        if not await self.confirm(partition, offset):
            self._known.pop(partition, None)  # what others have committed since counts
            raise self._out(partition)
        self._known[partition] = offset

    def _out(self, partition: int) -> Unavailable:
        return Unavailable(
            f"{self._url.url}: group {self._group.name} does not tell or take the offset of {self._topic}[{partition}] "
            f"now: it is being rearranged, or the partition went to another member"
        )

    async def leave(self) -> None:
        if not self._leaving.is_set():
            self._leaving.set()
            self._changed.set()
            self._confirm()
        await asyncio.shield(self._left)

    # -- on the loop, for the thread ---------------------------------------------------------------------------------

    def _update(self, assigned: frozenset[int], taken: set[int], done: threading.Event | None) -> None:
        """The group gave `assigned`; of `taken` it wants to hear when they are stopped."""
        for partition in assigned - self._assigned:
            self._known.pop(partition, None)  # somebody else may have moved it meanwhile
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
        consumer = make_consumer(
            url,
            group=self._group.name,
            on_error=self._on_error,
            on_commit=self._on_commit,
            partition_assignment_strategy="cooperative-sticky",
            **role,
        )
        self._unheard = None
        self._silence = time.monotonic(), FIRST_NEWS_SECONDS
        consumer.subscribe([self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)
        return consumer

    def _serve(self) -> None:
        try:
            self._consumer = self._join()
            self._check_note()
            self._on_loop(_succeed, self._joined, None)
            joined_at, soon = time.monotonic(), 0
            while not self._leaving.is_set():
                if self._poll():
                    self._answer()
                    continue
                self._close()
                soon = soon + 1 if time.monotonic() - joined_at < SESSION_SECONDS else 0
                if soon == SOON_MAX:
                    self._give_up_place()
                if self._leaving.wait(REJOIN_SECONDS):
                    return  # it has left: what is closed cannot be left again
                self._consumer, joined_at = self._join(), time.monotonic()
            self._leave()
        except StreamflowError as error:
            self._end(error)
        except Exception as error:  # a thread's boundary: the worker must not go on as if it were a member
            log_.exception("%s: member %s of %s failed", self._url.url, self.owner, self._group.name)
            self._end(Unavailable(f"{self._url.url}: no longer in group {self._group.name}: {error!r}"))
        finally:
            self._leaving.set()
            self._doubt_commits()
            while not self._asked.empty():
                self._on_loop(_succeed, self._asked.get()[2], False)
            while not self._wondered.empty():
                partition, wondering = self._wondered.get()
                self._on_loop(_fail, wondering, self._out(partition))
            self._on_loop(_succeed, self._left, None)

    def _close(self) -> None:
        """Be no member for now. An assignment that waits is told while the consumer closes, and counts no more."""
        self._consumer.close()
        self._doubt_commits()
        self._held.clear()
        self._on_loop(self._update, frozenset(), set(), None)

    def _give_up_place(self) -> None:
        """Two with one static id would put each other out for ever."""
        if self._instance is None:
            return
        log_.warning(
            "%s: member %s of %s was put out as soon as it had joined, %d times: another process joins as %r, too, as "
            "with a copy of the same state directory. This one goes on without that place: after a crash its "
            "partitions wait for the end of its session. Give each process a state directory of its own",
            self._url.url,
            self.owner,
            self._group.name,
            SOON_MAX,
            self._instance,
        )
        self._instance = None

    def _end(self, error: StreamflowError) -> None:
        """This member is none any more, or never was one."""
        self._on_loop(self._fail, error)
        self._on_loop(_fail, self._joined, error)
        with suppress(KafkaException, RuntimeError):
            self._consumer.close()

    def _check_note(self) -> None:
        """Raise when the group's offsets belong to another history, or cannot be read."""
        places = [TopicPartition(self._topic, number) for number in range(self._group.partitions)]
        offsets = patiently(
            self._url, lambda seconds: self._committed(places, seconds), about=f"group {self._group.name}"
        )
        for found in offsets:
            if found.error is not None:
                raise self._cannot_join(found.error)
            if self._group.note and found.metadata and found.metadata != self._group.note:
                raise CorruptLog(
                    f"{self._url.url}: the history of app {self._group.name} was deleted and created again (topic id "
                    f"{found.metadata}, now {self._group.note}): its runs are lost, and the commands that are kept "
                    f"would start them again. Restore the topic, or delete all topics of the app and the group "
                    f"{self._group.name} to begin anew"
                )

    def _tell_committed(self, partition: int, done: asyncio.Future[int]) -> None:
        place = [TopicPartition(self._topic, partition)]
        try:
            (found,) = patiently(
                self._url,
                lambda seconds: self._committed(place, seconds),
                about=f"group {self._group.name}",
            )
        except StreamflowError as error:
            self._on_loop(_fail, done, error)
            if not isinstance(error, Unavailable):
                raise  # refused, and so it will be with all else
            return
        if found.error is not None:
            self._on_loop(_fail, done, self._out(partition))
        else:
            self._on_loop(_succeed, done, max(0, found.offset))

    def _committed(self, places: list[TopicPartition], seconds: float) -> list[TopicPartition]:
        """The group's offsets. Who may not use the group is told so in `poll` alone; here it would only take long."""
        if self._leaving.is_set():
            raise self._out(places[0].partition)
        try:
            return self._consumer.committed(places, timeout=min(seconds, COORDINATOR_SECONDS))
        except KafkaException as error:
            if self._going:
                raise  # called back from a poll: what that returns comes after
            message = self._consumer.poll(0)
            told = None if message is None else message.error()
            if told is not None and told.code() in DENIED:
                raise KafkaException(told) from error
            if told is not None:
                self._on_error(told)
            raise

    def _cannot_join(self, error: KafkaError) -> StreamflowError:
        if error.code() in DENIED:
            return denied(self._url.url, f"group {self._group.name} cannot be used ({error.str()})")
        return failed(self._url, error, f"group {self._group.name}")

    def _answer(self) -> None:
        """Commit for those who ask: the group takes a commit only of a member that it knows, in its present shape."""
        while not self._wondered.empty():
            self._tell_committed(*self._wondered.get())
        while not self._asked.empty():
            partition, consumed, done = self._asked.get()
            if partition not in self._held and partition not in self._going:
                self._on_loop(_succeed, done, False)
                continue
            offset = consumed if consumed is not None else self._consumed.get(partition)
            try:
                if offset is None:  # what the last owner committed; less would move the group's lag back
                    (found,) = self._committed([TopicPartition(self._topic, partition)], COORDINATOR_SECONDS)
                    offset = max(0, found.offset)
                place = TopicPartition(self._topic, partition, offset, metadata=self._group.note)
                if not self._going:  # waiting for an answer would wait for brokers that are away, without a limit
                    self._consumer.commit(offsets=[place], asynchronous=True)
                    self._committing.append((partition, offset, done))
                    continue
                (committed,) = self._consumer.commit(offsets=[place], asynchronous=False) or [place]
                self._confirmed(partition, offset, done, committed.error is None)
            except (KafkaException, Unavailable) as error:
                log_.debug("%s: group %s: %s", self._url.url, self._group.name, error)
                self._on_loop(_succeed, done, False)

    def _on_commit(self, error: KafkaError | None, places: list[TopicPartition]) -> None:
        for place in places:
            for index, (partition, offset, done) in enumerate(self._committing):
                if (partition, offset) == (place.partition, place.offset):
                    del self._committing[index]
                    self._confirmed(partition, offset, done, error is None and place.error is None)
                    break

    def _confirmed(self, partition: int, offset: int, done: asyncio.Future[bool], confirmed: bool) -> None:
        if confirmed:
            self._consumed[partition] = offset
        self._on_loop(_succeed, done, confirmed)

    def _doubt_commits(self) -> None:
        """This consumer will tell no more what became of them."""
        for _, _, done in self._committing:
            self._on_loop(_succeed, done, False)
        self._committing.clear()

    def _poll(self) -> bool:
        """Serve the group for a while; False when this consumer can go on no more."""
        try:
            message = self._consumer.poll(POLL_SECONDS)
            error = None if message is None else message.error()
        except KafkaException as raised:
            error = raised.args[0]
            self._leaving.wait(POLL_SECONDS)  # raised at once, and perhaps again and again
        error = error or self._unheard
        if error is None:
            return not self._hears_nothing()
        if error.code() in DENIED:
            raise self._cannot_join(error)
        if not _is_final(error):
            log_.debug("%s: group %s: %s", self._url.url, self._group.name, error.str())
            return True
        # Another process has taken this static id: a second worker on the same state directory, or one that was
        # stopped for so long that its successor is at work.
        log_.warning("%s: member %s of %s was put out: %s", self._url.url, self.owner, self._group.name, error.str())
        return False

    def _hears_nothing(self) -> bool:
        if self._silence is None:
            return False
        since, seconds = self._silence
        if time.monotonic() - since < seconds:
            return False
        log_.warning(
            "%s: member %s of %s has had no partition and no news for %d s: it joins anew",
            self._url.url,
            self.owner,
            self._group.name,
            seconds,
        )
        return True

    def _on_error(self, error: KafkaError) -> None:
        """Called whatever the consumer is asked. The message that says the same may get lost in a rebalance."""
        log_.debug("%s: member %s of %s: %s", self._url.url, self.owner, self._group.name, error.str())
        if _is_final(error):
            self._unheard = error

    def _leave(self) -> None:
        # A static member that only closes keeps its place for the session; unsubscribing leaves at once.
        deadline = time.monotonic() + LEAVE_SECONDS
        try:
            self._consumer.unsubscribe()
            while self._held and time.monotonic() < deadline:
                self._consumer.poll(POLL_SECONDS)
            self._consumer.poll(POLL_SECONDS)
        except KafkaException as error:
            if not _is_final(error.args[0]):
                raise
            # Put out on its way: there is nothing left to leave.
            log_.info(
                "%s: member %s of %s was out before it left: %s", self._url.url, self.owner, self._group.name, error
            )
        self._consumer.close()

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        for partition in partitions:
            partition.offset = OFFSET_END
            self._consumed.pop(partition.partition, None)  # somebody else may have moved it meanwhile
        consumer.incremental_assign(partitions)
        consumer.pause(partitions)
        self._held |= {partition.partition for partition in partitions}
        self._silence = None
        self._on_loop(self._update, frozenset(self._held), set(), None)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        taken = {partition.partition for partition in partitions}
        self._held -= taken
        stopped = threading.Event()
        if self._on_loop(self._update, frozenset(self._held), taken, stopped) and not self._leaving.is_set():
            deadline = time.monotonic() + HAND_OVER_SECONDS
            self._going = taken
            while not stopped.wait(POLL_SECONDS) and not self._leaving.is_set():
                self._answer()  # who stops a step queue's partition commits how far it came
                if time.monotonic() > deadline:
                    log_.warning(
                        "%s: partitions %s go to another worker before this one has stopped them (it had %.0f s); the "
                        "history's fence keeps it safe", self._url.url, sorted(taken), HAND_OVER_SECONDS,
                    )  # fmt: skip
                    break
        self._going = set()
        if not self._held:
            self._silence = (
                time.monotonic(),
                NO_NEWS_SECONDS,
            )  # not before: the group cannot tell it anything while it is waited for
        consumer.incremental_unassign(partitions)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """The group has given them away already."""
        self._held -= {partition.partition for partition in partitions}
        if not self._held:
            self._silence = time.monotonic(), NO_NEWS_SECONDS
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


def _is_final(error: KafkaError) -> bool:
    """Whether this consumer can do nothing any more. What a poll returns has no such mark, and says so by its code."""
    return error.fatal() or error.code() == KafkaError._FATAL


def _succeed(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[None], error: StreamflowError) -> None:
    if not future.done():
        future.set_exception(error)
