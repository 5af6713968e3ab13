"""The brokers: topics, consumer groups, and what the network does to those who talk to them.

What is modelled is what a worker can tell of Kafka through the log port. `Weather` says how likely it is at the moment
that a request goes wrong, for all; what befalls one process, one partition or what the brokers keep is a method of
`Cluster`. What really happened is counted (`World.marks`).
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Final
from zlib import crc32

from streamflow.codec.avro import decode_timer
from streamflow.codec.envelope import DecodeError
from streamflow.logs.base import COMPACTED, HISTORY, TIMERS, Record
from streamflow.logs.groups import assign
from streamflow.sim.world import Process, World

SESSION_SECONDS: Final = 6.0
HAND_OVER_SECONDS: Final = 8.0
GROUP_TICK_SECONDS: Final = 0.5
TWO_BELIEVE: Final = "two members believe that they own it"
EXPIRE_SECONDS: Final = 2.0
"""How much later than the group a member may see that its session is over."""
QUIET_SECONDS: Final = 30.0
"""After so long without a new record, time leaps to the next timer."""
SHORT_OF_SECONDS: Final = 1.0
"""It leaps to so long before: else who fires too early would fire in time."""
LATE_SECONDS_MAX: Final = 60.0
"""How much later a write can land whose sender was told that its outcome is unknown."""


@dataclass
class Weather:
    """How likely, per request: from 0 to 1; delays in seconds."""

    delay: float = 0.001
    spike: float = 0.0
    spike_seconds: float = 1.0
    partial: float = 0.1
    """A read that gives only some of what is there, as any may."""
    slow: float = 0.0
    """A read whose answer takes long: by then it is no news."""
    lost: float = 0.0
    """A write that never lands; its sender is told nothing for a while, then that the outcome is unknown."""
    late: float = 0.0
    """A write that lands long after its sender was told that the outcome is unknown."""
    torn: float = 0.0
    """A write of several records of which only the first land."""
    headless: float = 0.0
    """A write of several records of which only the last land: brokers that know nothing of a producer take any of its
    batches as its first."""
    unacknowledged: float = 0.0
    """A write that lands, and whose sender is told that the outcome is unknown."""
    repeated: float = 0.0
    """A write that lands twice, since it was sent twice and the brokers had forgotten its producer; the acknowledgement
    names the second place."""
    unplaced: float = 0.0
    """A write that lands, and is acknowledged without an offset: a duplicate, says the broker, it knows no more."""
    fatal: float = 0.0
    """A write whose producer fails for good: of all that it has under way nothing is heard. It lands, perhaps late."""
    full: float = 0.0
    """A write of which the producer takes only a part, or nothing."""
    refused: float = 0.0
    """A question that is answered with an error."""
    down: bool = False
    """No request arrives, no answer leaves."""


@dataclass(eq=False)
class Aim:
    """A fault that waits for a write of several records to the history, of the `sender` if there is one."""

    fate: str
    """torn, between two parts of one turn; or headless, with two records left or more."""
    sender: Process | None = None
    hit: Callable[[], None] = lambda: None
    """Called while the write is handed over."""


MOMENTS: Final = (
    "the history was trimmed",
    "a run was copied forward",
    "a published offset was committed",
    "a queue was committed",
    "a run was deleted",
)
"""What a fault can wait for, beside writes: what was there before is not needed any more, says a worker."""


@dataclass(eq=False)
class Ambush:
    """A fault that waits until some process has come so far at the brokers, of which it is yet to hear."""

    moment: str
    """One of `MOMENTS`."""
    hit: Callable[[Process], None]


class Stream:
    """One topic partition. `records` are in offset order, with gaps where compaction took some."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.times: list[float] = []
        self.gone_tombstones: list[int] = []
        """Offsets of tombstones that were cleaned away: who had not read so far never will."""
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

    def offset_at(self, at: float) -> int:
        """The first offset of a record that landed then or later, the end if there is none."""
        first = next((each.offset for each, time in zip(self.records, self.times, strict=True) if time >= at), self.end)
        return max(self.start, first)

    def compact(self, *, upto: int, tombstones_before: float) -> int:
        """Keep the newest record of each key, of those below `upto`; old tombstones go, too: how many."""
        newest = {record.key: record.offset for record in self.records}
        kept = [
            (record, at)
            for record, at in zip(self.records, self.times, strict=True)
            if record.offset >= upto
            or (newest[record.key] == record.offset and (record.value is not None or at >= tombstones_before))
        ]
        left = {record.offset for record, _ in kept}
        gone = [each.offset for each in self.records if each.value is None and each.offset not in left]
        gone = [offset for offset in gone if newest[self.records[self.index(offset)].key] == offset]
        self.gone_tombstones = sorted({*self.gone_tombstones, *gone})
        self.records, self.times = [record for record, _ in kept], [at for _, at in kept]
        return len(gone)

    def has_lost_tombstones(self, offset: int, upto: int) -> bool:
        """Whether a reader from `offset` to below `upto` misses one."""
        found = bisect.bisect_left(self.gone_tombstones, offset)
        return found < len(self.gone_tombstones) and self.gone_tombstones[found] < upto


class Group:
    """A consumer group over the partitions of one topic. The members' own views lag behind."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.members: dict[str, Member] = {}
        self.owners: dict[int, str] = {}
        self.asked_at: dict[int, float] = {}
        self.committed: dict[int, int] = {}
        self.believers: dict[str, Member] = {}
        """Members, past ones too, by name, as long as they believe that they own something."""
        self._names = 0

    def name(self, owner: str) -> str:
        """An id for one more member: a coordinator knows them by ids of its own."""
        self._names += 1
        return f"{owner}#{self._names}"

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

    def seize(self, chance: Random) -> str:
        """Take a partition from a member and give it to another, without a word to the first before."""
        pairs = [
            (p, name) for p, owner in sorted(self.owners.items()) for name in sorted(self.members) if name != owner
        ]
        if not pairs:
            return "nothing is taken: there is nobody to give it to"
        partition, name = chance.choice(pairs)
        before, self.owners[partition] = self.owners[partition], name
        self.asked_at.pop(partition, None)
        self.cluster.mark("partition seized")
        self.rebalance()
        return f"partition {partition} is taken from {before} for {name}"

    def believes(self, member: Member, partitions: frozenset[int]) -> None:
        """A member believes now that these are its own."""
        member.believed = partitions
        self.believers = {name: other for name, other in self.believers.items()
                          if other.believed and other.process.is_alive}  # fmt: skip
        if any(other is not member and other.believed & partitions for other in self.believers.values()):
            self.cluster.mark(TWO_BELIEVE)
        self.believers[member.name] = member

    def tick(self) -> None:
        """Put out who was not heard of for a session, and take what was not handed over in time."""
        now = self.cluster.world.now
        for member in [self.members[name] for name in sorted(self.members)]:
            since = member.silent_since
            if since is not None and now - since > SESSION_SECONDS:
                self.cluster.world.note("group", f"{member.name} is put out")
                self.cluster.mark("member put out")
                self.remove(member)
                member.expire()
        late = [partition for partition, at in self.asked_at.items() if now - at > HAND_OVER_SECONDS]
        for partition in late:
            self.cluster.world.note("group", f"partition {partition} is taken from {self.owners.get(partition)}")
            self.cluster.mark("partition taken before it was stopped")
            self.owners.pop(partition, None)
            self.asked_at.pop(partition)
        if late:
            self.rebalance()


class Member:
    """What the group knows of a member, and how it tells it."""

    def __init__(
        self,
        group: Group,
        name: str,
        process: Process,
        told: Callable[[frozenset[int]], None],
        expire: Callable[[], None],
    ) -> None:
        self.name, self.process = name, process
        self.believed: frozenset[int] = frozenset()
        self.left_at: float | None = None
        """When it left without the brokers hearing of it."""
        self._group, self._told, self._expire = group, told, expire
        self._last: frozenset[int] | None = None
        self._mail: deque[frozenset[int]] = deque()

    @property
    def silent_since(self) -> float | None:
        """Since when the group has not heard of it: it is stopped, dead or gone, or its network is."""
        times = (self.process.silent_since, self.left_at, self._group.cluster.cut_since(self.process))
        return min((at for at in times if at is not None), default=None)

    def tell(self, assigned: frozenset[int]) -> None:
        if assigned != self._last:
            self._last = assigned
            self._mail.append(assigned)
            if len(self._mail) == 1:
                self._post(self.process.world.chance.uniform(0.001, 0.5))

    def _post(self, delay: float) -> None:
        world = self.process.world
        world.at(world.now + delay, self._arrive)

    def _arrive(self) -> None:
        """All that was said so far arrives; or none of it, while the process is not reached."""
        if not self.process.is_alive:
            return
        if not self._group.cluster.heard_by(self.process):
            self._post(GROUP_TICK_SECONDS)
            return
        while self._mail:
            self.process.call(0.0, self._told, self._mail.popleft())

    def forget(self, partition: int) -> None:
        """It gave the partition up; should it get it back at once, it must be told so."""
        self._last = None if self._last is None else self._last - {partition}

    def expire(self) -> None:
        """It finds out by itself that nobody has heard of it; about when the group does."""
        self._mail.clear()
        delay = 0.0 if self.process.silent_since is not None else self.process.world.chance.uniform(0, EXPIRE_SECONDS)
        self.process.call(delay, self._expire)


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
        self.leaderless: set[tuple[str, int]] = set()
        """Topic partitions that nobody can write to or read now."""
        self.aims: list[Aim] = []
        """What waits for a write that it can spoil."""
        self.ambushes: list[Ambush] = []
        self.sender: Process | None = None
        """Whose records land just now; None where it is no process of the world."""
        self._numbers = 0
        self._cuts: dict[int, tuple[bool, float]] = {}
        self._timers: dict[bytes, float] = {}
        """When the timers are due that stand on their topic, in the world's time."""
        self._due_at = 0.0
        self.hangs_until = 0.0
        """When the last of the writes that hang in the network lands: no leap may carry one over."""
        self.landed_at = 0.0
        """When the last record landed."""
        self.landed: list[Callable[[str, int, int], None]] = []
        """Called with topic, partition and offset of each record that landed."""
        self.trimmed: list[Callable[[str, int, int], None]] = []
        """Called with topic, partition and new start where the head of a topic was deleted."""
        self.moved: list[Callable[[int, int], None]] = []
        """Called with partition and offset where a process holds that all below it is published."""
        self.queue_committed: list[Callable[[str, int, int], None]] = []
        """Called with topic, partition and offset that the group of a queue has committed."""
        world.leap_to = self.next_due
        self._tick()

    def next_due(self) -> float | None:
        """Just before the next timer fires, if nobody does anything before; None if somebody may."""
        now = self.world.now
        if (
            now - max(self.landed_at, self._due_at) < QUIET_SECONDS
            or now < self.hangs_until
            or self.weather.down
            or self._cuts
            or self.leaderless
            or any(group.asked_at for group in self.groups.values())
        ):
            return None
        # One that is due soon is waited for: a leap over it would make it overdue by as much.
        first = min((at for at in self._timers.values() if at > now), default=None)
        if first is None or first <= now + QUIET_SECONDS:
            return None
        self._due_at = first  # what it sets off is under way for a while, before anything lands
        return first - SHORT_OF_SECONDS

    def number(self) -> int:
        """One that nobody has had."""
        self._numbers += 1
        return self._numbers

    def stream(self, topic: str, partition: int) -> Stream:
        return self.streams.setdefault((topic, partition), Stream())

    def group(self, name: str) -> Group:
        return self.groups.setdefault(name, Group(self))

    def land(
        self,
        topic: str,
        partition: int,
        records: Sequence[tuple[bytes, bytes | None]],
        sender: Process | None = None,
    ) -> int:
        """Records arrive; the offset of the first."""
        stream = self.stream(topic, partition)
        first = stream.end
        self.sender = sender
        self.landed_at = self.world.now
        for key, value in records:
            offset = stream.add(key, value, self.world.now)
            digest = "-" if value is None else f"{crc32(value):08x}"
            self.world.note("brokers", f"{topic}[{partition}] {offset} {digest}")
            if topic == TIMERS:
                self._timers.pop(key, None)
                with suppress(DecodeError):  # a tombstone, or what is no timer
                    self._timers[key] = decode_timer(value or b"").fire_at / 1000 - self.world.epoch
            for hear in self.landed:
                hear(topic, partition, offset)
        return first

    def trim(self, topic: str, partition: int, before: int, process: Process) -> int:
        """Let the head of a topic go; where it starts then."""
        start = self.stream(topic, partition).trim(before)
        for hear in self.trimmed:
            hear(topic, partition, start)
        if topic == HISTORY:
            self.reached("the history was trimmed", process)
        return start

    def reached(self, moment: str, process: Process | None) -> None:
        """The process has come so far: what has waited for that strikes, the first of it."""
        found = next((each for each in self.ambushes if each.moment == moment), None)
        if found is not None and process is not None and process.is_alive:
            self.ambushes.remove(found)
            found.hit(process)

    def mark(self, situation: str) -> None:
        """One more of a rare situation."""
        self.world.marks[situation] += 1

    # -- what befalls the brokers ------------------------------------------------------------------------------------

    def compact(self, *, delete_retention: float = LATE_SECONDS_MAX) -> None:
        """Clean the compacted topics, up to some point each; tombstones go that are older than so many seconds."""
        for (topic, _), stream in sorted(self.streams.items()):
            if topic in COMPACTED:
                upto = self.world.chance.randint(0, stream.end)
                for _ in range(stream.compact(upto=upto, tombstones_before=self.world.now - delete_retention)):
                    self.mark("tombstone cleaned away")

    def lose_offsets(self, chance: Random) -> str:
        """What groups have committed is older than it was, or gone."""
        said: list[str] = []
        for name, offsets in (
            ("published", self.published),
            *((name, self.groups[name].committed) for name in sorted(self.groups)),
        ):
            for partition in sorted(offsets):
                if chance.random() < 0.5:
                    before, offsets[partition] = (
                        offsets[partition],
                        chance.choice((0, chance.randint(0, offsets[partition]))),
                    )
                    if offsets[partition] < before:
                        said.append(f"{name}[{partition}] {before} -> {offsets[partition]}")
                        self.mark("committed offset lost")
        return f"committed offsets go back: {', '.join(said) or 'none'}"

    # -- the network -------------------------------------------------------------------------------------------------

    def cut(self, process: Process, *, requests_arrive: bool) -> None:
        """Part one process from the brokers: no answer comes back, and perhaps no request arrives either."""
        self._cuts[process.number] = (requests_arrive, self.world.now)
        self.mark("process cut off one way" if requests_arrive else "process cut off")

    def mend(self, process: Process) -> None:
        self._cuts.pop(process.number, None)

    def mend_all(self) -> None:
        """The network and all leaders are there again."""
        self._cuts.clear()
        self.leaderless.clear()

    def cut_since(self, process: Process) -> float | None:
        """Since when the process is parted from the brokers; None if it is not."""
        cut = self._cuts.get(process.number)
        return None if cut is None else cut[1]

    def reached_by(self, process: Process, topic: str = "", partition: int = 0) -> bool:
        """Whether a request of the process, perhaps to a partition's leader, arrives now."""
        requests_arrive, _ = self._cuts.get(process.number, (True, 0.0))
        return requests_arrive and not self.weather.down and (topic, partition) not in self.leaderless

    def heard_by(self, process: Process) -> bool:
        """Whether an answer comes back to the process now."""
        return process.number not in self._cuts and not self.weather.down

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


class Way:
    """The way of one process to the brokers and back. With a `weather` of its own it is no worse than that, ever."""

    def __init__(self, cluster: Cluster, process: Process, weather: Weather | None = None) -> None:
        self._cluster, self._process, self._own = cluster, process, weather

    @property
    def weather(self) -> Weather:
        return self._own or self._cluster.weather

    def delay(self) -> float:
        """How long something is under way now."""
        return self._cluster.delay(self._own)

    def reaches(self, topic: str = "", partition: int = 0) -> bool:
        """Whether a request, perhaps to a partition's leader, arrives now."""
        return self._own is not None or self._cluster.reached_by(self._process, topic, partition)

    def is_heard(self) -> bool:
        """Whether an answer comes back now."""
        return self._own is not None or self._cluster.heard_by(self._process)
