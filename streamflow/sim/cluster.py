"""The brokers: topics, consumer groups, and what the network does to those who talk to them.

What is modelled is what a worker can tell of Kafka through the log port: records land in the order of each sender's
connection, whoever sends them; an acknowledgement at the expected offset proves the fence; others, or none, prove
nothing, and what was not acknowledged may land much later. `Weather` says how likely each of that is at the moment.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from zlib import crc32

from streamflow.codec.avro import decode_timer
from streamflow.logs.base import COMPACTED, TIMERS, Record
from streamflow.logs.groups import assign
from streamflow.sim.world import Process, World

SESSION_SECONDS: Final = 6.0
HAND_OVER_SECONDS: Final = 8.0
GROUP_TICK_SECONDS: Final = 0.5
QUIET_SECONDS: Final = 30.0
"""After so long without a new record, time leaps to the next timer."""
LATE_SECONDS_MAX: Final = 60.0
"""How much later a write can land whose sender was told that its outcome is unknown."""


@dataclass
class Weather:
    """How likely, per request: from 0 to 1; delays in seconds."""

    delay: float = 0.001
    spike: float = 0.0
    spike_seconds: float = 1.0
    lost: float = 0.0
    """A write that never lands; its sender is told nothing for a while, then that the outcome is unknown."""
    late: float = 0.0
    """A write that lands long after its sender was told that the outcome is unknown."""
    torn: float = 0.0
    """A write of several records of which only the first land."""
    unacknowledged: float = 0.0
    """A write that lands, and whose sender is told that the outcome is unknown."""
    repeated: float = 0.0
    """A write that lands twice; the broker then acknowledges it without an offset."""
    refused: float = 0.0
    """A question that is answered with an error."""
    down: bool = False
    """No request arrives, no answer leaves."""


class Stream:
    """One topic partition. `records` are in offset order, with gaps where compaction took some."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.times: list[float] = []
        self.start = 0
        self.end = 0
        self.waiting: dict[int, Callable[[], None]] = {}

    def add(self, key: bytes, value: bytes | None, now: float) -> int:
        self.records.append(Record(self.end, key, value))
        self.times.append(now)
        self.end += 1
        waiting, self.waiting = self.waiting, {}
        for wake in waiting.values():
            wake()
        return self.end - 1

    def index(self, offset: int) -> int:
        return bisect.bisect_left(self.records, (offset,))

    def trim(self, before: int) -> int:
        if before > self.start:
            self.start = min(before, self.end)
            gone = self.index(self.start)
            del self.records[:gone], self.times[:gone]
        return self.start

    def compact(self, *, upto: int, tombstones_before: float) -> None:
        """Keep the newest record of each key, of those below `upto`; old tombstones go, too."""
        newest = {record.key: record.offset for record in self.records}
        kept = [
            (record, at)
            for record, at in zip(self.records, self.times, strict=True)
            if record.offset >= upto
            or (newest[record.key] == record.offset and (record.value is not None or at >= tombstones_before))
        ]
        self.records, self.times = [record for record, _ in kept], [at for _, at in kept]


class Group:
    """A consumer group over the partitions of one topic. The members' own views lag behind."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.members: dict[str, Member] = {}
        self.owners: dict[int, str] = {}
        self.asked_at: dict[int, float] = {}
        self.committed: dict[int, int] = {}

    def rebalance(self) -> None:
        """Give free partitions away, ask for those that should move, and tell every member what it has."""
        now = self.cluster.world.now
        plan = assign(self.cluster.partitions, self.members, self.owners)
        for partition, name in sorted(plan.items()):
            self.owners.setdefault(partition, name)
            if self.owners[partition] == name:
                self.asked_at.pop(partition, None)
            else:
                self.asked_at.setdefault(partition, now)
        for name, member in sorted(self.members.items()):
            member.tell(frozenset(p for p, owner in self.owners.items() if owner == name == plan[p]))

    def release(self, member: Member, partition: int) -> None:
        if self.members.get(member.name) is member and self.owners.get(partition) == member.name:
            del self.owners[partition]
            member.forget(partition)
            self.rebalance()

    def remove(self, member: Member) -> None:
        if self.members.get(member.name) is member:
            del self.members[member.name]
            self.owners = {p: name for p, name in self.owners.items() if name != member.name}
            self.rebalance()

    def add(self, member: Member) -> None:
        self.members[member.name] = member
        self.rebalance()

    def tick(self) -> None:
        """Put out who was not heard of for a session, and take what was not handed over in time."""
        now = self.cluster.world.now
        for member in [self.members[name] for name in sorted(self.members)]:
            since = member.process.silent_since
            if since is not None and now - since > SESSION_SECONDS:
                self.cluster.world.note("group", f"{member.name} is put out")
                self.remove(member)
                member.expire()
        late = [partition for partition, at in self.asked_at.items() if now - at > HAND_OVER_SECONDS]
        for partition in late:
            self.cluster.world.note("group", f"partition {partition} is taken from {self.owners.get(partition)}")
            self.owners.pop(partition, None)
            self.asked_at.pop(partition)
        if late:
            self.rebalance()


class Member:
    """What the group knows of a member, and how it tells it."""

    def __init__(self, name: str, process: Process, told: Callable[[frozenset[int]], None], expire: Callable[[], None]):
        self.name, self.process = name, process
        self._told, self._expire = told, expire
        self._last: frozenset[int] | None = None
        self._told_at = 0.0

    def tell(self, assigned: frozenset[int]) -> None:
        if assigned != self._last:
            self._last = assigned
            world = self.process.world
            self._told_at = max(world.now + world.chance.uniform(0.001, 0.5), self._told_at)
            self.process.call(self._told_at - world.now, self._told, assigned)

    def forget(self, partition: int) -> None:
        """It gave the partition up; should it get it back at once, it must be told so."""
        self._last = None if self._last is None else self._last - {partition}

    def expire(self) -> None:
        self.process.call(0.0, self._expire)


class Cluster:
    """All that brokers keep for one app."""

    def __init__(self, world: World, *, partitions: int, identity: str = "cluster") -> None:
        self.world = world
        self.partitions = partitions
        self.identity = identity
        self.weather = Weather()
        self.streams: dict[tuple[str, int], Stream] = {}
        self.published: dict[int, int] = {}
        self.groups: dict[str, Group] = {}
        self.landed_at = 0.0
        """When the last record landed."""
        self.landed: list[Callable[[str, int, int], None]] = []
        """Called with topic, partition and offset of each record that landed."""
        world.leap_to = self.next_due
        self._tick()

    def next_due(self) -> float | None:
        """When the next timer fires, if nobody does anything before; None if somebody may."""
        now, newest = self.world.now, dict[bytes, bytes | None]()
        if (
            now - self.landed_at < QUIET_SECONDS
            or self.weather.down
            or any(group.asked_at for group in self.groups.values())
        ):
            return None
        for (topic, _), stream in self.streams.items():
            if topic == TIMERS:
                newest.update((record.key, record.value) for record in stream.records)
        due = [decode_timer(value).fire_at / 1000 - self.world.epoch for value in newest.values() if value is not None]
        return min((at for at in due if at > now + QUIET_SECONDS), default=None)

    def stream(self, topic: str, partition: int) -> Stream:
        return self.streams.setdefault((topic, partition), Stream())

    def group(self, name: str) -> Group:
        return self.groups.setdefault(name, Group(self))

    def land(self, topic: str, partition: int, records: Sequence[tuple[bytes, bytes | None]]) -> int:
        """Records arrive; the offset of the first."""
        stream = self.stream(topic, partition)
        first = stream.end
        self.landed_at = self.world.now
        for key, value in records:
            offset = stream.add(key, value, self.world.now)
            digest = "-" if value is None else f"{crc32(value):08x}"
            self.world.note("brokers", f"{topic}[{partition}] {offset} {digest}")
            for hear in self.landed:
                hear(topic, partition, offset)
        return first

    def compact(self) -> None:
        """Clean the compacted topics, up to some point each."""
        for (topic, _), stream in sorted(self.streams.items()):
            if topic in COMPACTED:
                upto = self.world.chance.randint(0, stream.end)
                stream.compact(upto=upto, tombstones_before=self.world.now - LATE_SECONDS_MAX)

    def delay(self, weather: Weather | None = None) -> float:
        """How long something is under way now, in the cluster's weather unless another is given."""
        chance, weather = self.world.chance, weather or self.weather
        if chance.random() < weather.spike:
            return chance.uniform(0, weather.spike_seconds)
        return chance.uniform(0.1, 2.0) * weather.delay

    def _tick(self) -> None:
        if not self.weather.down:
            for name in sorted(self.groups):
                self.groups[name].tick()
        self.world.at(self.world.now + GROUP_TICK_SECONDS, self._tick)
