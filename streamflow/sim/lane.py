"""One simulated producer with its connection to the brokers: the lane beneath the product's own writing code.

It does what librdkafka's idempotent producer does, as far as `logs/writing.py` can tell: records of one partition reach
the log in order; what is lost on the way is sent again until `DELIVERY_SECONDS` are over, and lands once, since brokers
know what they have; what is not acknowledged by then is told as failed and may be in the log, or land there later. What
is on its way survives the death of its process. `Weather` says how often which of the worse endings happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from streamflow.config import RECORD_BYTES_MAX
from streamflow.logs.base import HISTORY
from streamflow.logs.lanes import CLOSE_SECONDS, NotTaken, Refusal, Sent
from streamflow.sim.cluster import LATE_SECONDS_MAX, Cluster, Way
from streamflow.sim.world import Process

DELIVERY_SECONDS: Final = 5.0
"""As `kafka_lane.DELIVERY_SECONDS`; short, so that one story sees many outcomes that are unknown."""
RETRY_SECONDS: Final = 0.5
"""After so long without an answer a batch is sent again."""
HANGING: Final = 0.5
"""How often a request whose producer fails, or that meets no broker, hangs in a connection and arrives much later."""
PART_BYTES_MIN: Final = RECORD_BYTES_MAX // 4
"""A record as large is most likely a part of a turn, if another one of the same run follows."""

TIMED_OUT: Final = Refusal("no acknowledgement in time")
PURGED: Final = Refusal("the producer was dropped")
FULL: Final = Refusal("the producer's queue is full")
FATAL: Final = Refusal("the producer has failed for good")

FATES_OF_ONE: Final = ("lost", "late", "unacknowledged", "repeated", "unplaced", "fatal")
FATES_OF_PARTS: Final = ("torn", "headless")
FATES: Final = FATES_OF_PARTS + FATES_OF_ONE
"""What can become of a batch but to land once and be acknowledged; fields of `Weather` say how likely each is."""


class _Batch:
    """Records of one request. `offset` is that of the first, once they have landed."""

    __slots__ = ("fate", "is_in_trouble", "messages", "number", "offset", "place", "sent_at", "settled")

    def __init__(
        self, place: tuple[str, int], messages: list[dict[str, Any]], number: int, fate: str, sent_at: float
    ) -> None:
        self.place, self.messages, self.number, self.fate, self.sent_at = place, messages, number, fate, sent_at
        self.offset: int | None = None
        self.is_in_trouble = self.settled = False


class SimLane:
    """See `streamflow.logs.lanes.Lane`."""

    def __init__(
        self,
        cluster: Cluster,
        way: Way,
        process: Process,
        app: str,
        name: str,
        delivered: Callable[[SimLane, list[Sent]], None],
    ) -> None:
        self.name = name
        self.dropped = self.failed = False
        self.closed: asyncio.Future[None] = process.loop.create_future()
        self._cluster, self._way, self._process, self._world = cluster, way, process, cluster.world
        self._chance = cluster.world.chance
        self._prefix = f"{app}."
        self._delivered = delivered
        self._under_way: list[_Batch] = []
        self._count = 0
        self._landed: dict[tuple[str, int], int] = {}
        """The newest batch that a broker took, by partition: it takes no older one any more."""
        self._arrivals: dict[tuple[str, int], float] = {}
        self._answers: dict[tuple[str, int], float] = {}
        self._ending = False

    def message(self, key: bytes, value: bytes | None, sent: Sent, expected: int = -1) -> dict[str, Any]:
        """See the port."""
        return {"key": key, "value": value, "sent": sent, "expected": expected}

    def send(self, topic: str, partition: int, messages: list[dict[str, Any]]) -> None:
        """Hand over records that belong together; a part of them may be taken (`NotTaken`)."""
        if self.failed:
            raise NotTaken(FATAL)
        place = (topic.removeprefix(self._prefix), partition)
        if self._chance.random() < self._way.weather.full:
            self._mark("queue full")
            if taken := messages[: self._chance.randint(0, len(messages) - 1)]:
                self._hand_over(place, taken, "")
            raise NotTaken(FULL)
        fate = self._draw(FATES if len(messages) > 1 else FATES_OF_ONE)
        cut = self._chance.randint(1, len(messages) - 1) if len(messages) > 1 else 0
        if place[0] == HISTORY and (aimed := self._aimed(messages)) is not None:
            fate, cut = aimed
            self._mark("write aimed at")
        if fate:
            self._mark(f"write {fate}")
            self._world.note(self._process.name, f"{place[0]}[{partition}]: {len(messages)} records {fate}")
        match fate:
            case "torn":
                self._hand_over(place, messages[:cut], self._chance.choice(("", "unacknowledged")))
                self._hand_over(place, messages[cut:], "lost")
            case "headless":
                self._hand_over(place, messages[:cut], fate)
                self._hand_over(place, messages[cut:], "")
            case _:
                self._hand_over(place, messages, fate)

    def _draw(self, fates: tuple[str, ...]) -> str:
        draw = self._chance.random()
        for name in fates:
            draw -= getattr(self._way.weather, name)
            if draw < 0:
                return name
        return ""

    def _aimed(self, messages: list[dict[str, Any]]) -> tuple[str, int] | None:
        """The fate of a write that one has waited for, and where it is cut."""
        for aim in self._cluster.aims:
            if aim.sender not in (None, self._process):
                continue
            if aim.fate == "torn":
                cuts = [number for number in range(1, len(messages)) if _is_part(messages[number - 1 : number + 1])]
            else:
                cuts = list(range(1, len(messages) - 1))
            if cuts:
                self._cluster.aims.remove(aim)
                aim.hit()
                return aim.fate, self._chance.choice(cuts)
        return None

    # -- there and back ----------------------------------------------------------------------------------------------

    def _hand_over(self, place: tuple[str, int], messages: list[dict[str, Any]], fate: str) -> None:
        self._count += 1
        batch = _Batch(place, messages, self._count, fate, self._world.now)
        self._under_way.append(batch)
        self._depart(batch)

    def _depart(self, batch: _Batch) -> None:
        """Send it, behind all that this producer sent there before."""
        at = max(self._world.now + self._way.delay(), self._arrivals.get(batch.place, 0.0))
        self._arrivals[batch.place] = at
        if batch.fate == "late":
            self._trouble(batch)
            at += self._chance.uniform(DELIVERY_SECONDS, LATE_SECONDS_MAX)
        elif batch.fate == "fatal" and self._chance.random() < HANGING:
            self._process.call(self._way.delay(), self._fail)
            at += self._chance.uniform(DELIVERY_SECONDS, LATE_SECONDS_MAX)  # behind those of the next producer
        if batch.fate in ("late", "fatal"):
            self._cluster.hangs_until = max(self._cluster.hangs_until, at)
        self._world.at(at, partial(self._arrive, batch))

    def _arrive(self, batch: _Batch) -> None:
        """At the brokers. Nobody asks whether its sender still lives, or waits."""
        if batch.fate in ("lost", "headless") or not self._way.reaches(*batch.place):
            self._trouble(batch)
            if self._way.weather.down and self._chance.random() < HANGING:
                batch.fate = "late"  # it hangs in a connection that is not broken
                at = self._world.now + self._chance.uniform(0, LATE_SECONDS_MAX)
                self._cluster.hangs_until = max(self._cluster.hangs_until, at)
                self._world.at(at, partial(self._arrive, batch))
            elif batch.fate not in ("lost", "headless", "late"):
                self._process.call(RETRY_SECONDS, self._again, batch)
            return
        if batch.offset is not None:
            self._mark("write sent again, and known")
        elif self._landed.get(batch.place, 0) > batch.number:
            self._mark("write refused as old")
            return
        elif any(other.place == batch.place and other.number < batch.number
                 and other.offset is None and other.fate != "headless"
                 for other in self._under_way):  # fmt: skip
            self._process.call(RETRY_SECONDS, self._again, batch)  # out of order: brokers take none before that one
            return
        else:
            self._land(batch)
        self._answer(batch)

    def _land(self, batch: _Batch) -> None:
        topic, partition = batch.place
        records = [(message["key"], message["value"]) for message in batch.messages]
        if batch.settled or not self._process.can_run:
            self._mark("write landed after its sender stopped or gave up")
        self._landed[batch.place] = batch.number
        batch.offset = self._cluster.land(topic, partition, records, self._process)
        if batch.fate == "repeated":  # the acknowledgement was lost, and the brokers had forgotten the producer
            batch.offset = self._cluster.land(topic, partition, records, self._process)

    def _answer(self, batch: _Batch) -> None:
        """The acknowledgement departs; those of one partition keep their order."""
        if batch.fate in ("late", "unacknowledged"):
            self._trouble(batch)
            return
        if batch.fate == "fatal":
            self._process.call(self._way.delay(), self._fail)
            return
        at = max(self._world.now + self._way.delay(), self._answers.get(batch.place, 0.0))
        self._answers[batch.place] = at
        self._process.call(at - self._world.now, self._answered, batch)

    # -- in the process ----------------------------------------------------------------------------------------------

    def _answered(self, batch: _Batch) -> None:
        if batch.settled or self.failed:
            return
        if not self._way.is_heard():
            self._mark("acknowledgement lost")
            self._trouble(batch)
            self._process.call(RETRY_SECONDS, self._again, batch)
            return
        if self._under_way[0] is not batch:
            self._mark("acknowledgements out of order")
        self._settle([batch], None)

    def _again(self, batch: _Batch) -> None:
        if not batch.settled and not self.failed:
            self._depart(batch)

    def _trouble(self, batch: _Batch) -> None:
        """From here on it can be that it is never acknowledged."""
        if not batch.is_in_trouble:
            batch.is_in_trouble = True
            self._process.call(max(0.0, batch.sent_at + DELIVERY_SECONDS - self._world.now), self._expire, batch)

    def _expire(self, batch: _Batch) -> None:
        if not batch.settled and not self.failed:
            self._settle([batch], TIMED_OUT)

    def _settle(self, batches: list[_Batch], refusal: Refusal | None) -> None:
        done: list[Sent] = []
        for batch in batches:
            batch.settled = True
            self._under_way.remove(batch)
            for number, message in enumerate(batch.messages):
                sent: Sent = message["sent"]
                offset = None if batch.offset is None or batch.fate == "unplaced" else batch.offset + number
                if sent.refused(refusal) if refusal is not None else sent.acknowledged(offset, message["expected"]):
                    done.append(sent)
        if done:
            self._delivered(self, done)
        if self._ending and not self._under_way:
            self._finish()

    def _fail(self) -> None:
        if not self.failed:
            self.failed = True
            self._delivered(self, [])

    def drop(self) -> None:
        """See the port. What is on its way to the brokers lands there."""
        if not self.dropped:
            self.dropped = self._ending = True
            self._process.call(0.0, self._purge)

    def _purge(self) -> None:
        if not self.failed:  # one that has failed reports nothing any more
            self._settle(list(self._under_way), PURGED)
        self._finish()

    def close(self) -> None:
        """See the port."""
        self._ending = True
        self._process.call(CLOSE_SECONDS if self._under_way else 0.0, self._finish)

    def _finish(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def _mark(self, situation: str) -> None:
        self._cluster.mark(situation)


def _is_part(two: list[dict[str, Any]]) -> bool:
    """Whether the first of two records is a part of what goes on in the second: only parts are as large."""
    return two[0]["key"] == two[1]["key"] and len(two[0]["value"]) >= PART_BYTES_MIN
