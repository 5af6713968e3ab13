"""The topics of an app on a Kafka cluster: their settings, how they are created and checked, who they are.

Rules of this file:

- A worker makes what is missing and refuses what is wrong, by name and with the command that repairs it; it never
  changes a topic that somebody made.
- All topics of an app have the same number of partitions, fixed for ever: a workflow id hashes to one of them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from confluent_kafka import KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported by its stubs only since 2.17
    AdminClient,
    ClusterMetadata,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourceType,
)

from streamflow.errors import InvalidArguments, InvalidUrl, StreamflowError, Unavailable
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, HISTORY, REPLIES, STATUS, STEPS_PREFIX, TIMERS, TOPICS
from streamflow.logs.checks import no_app, wrong_partitions
from streamflow.logs.kafka_access import COMMAND_CONFIG, DENIED, denied
from streamflow.logs.kafka_patience import failed, is_an_answer
from streamflow.logs.kafka_talk import talk
from streamflow.logs.kafka_url import KafkaUrl, answered, refused, unreachable

log_ = logging.getLogger("streamflow.logs")

_T = TypeVar("_T")

KAFKA_PARTITIONS_DEFAULT: Final = 12
"""Enough for a dozen workers; the number can never change, and each costs an idle worker about 0.1 % of a core."""

REPLICATION_DEFAULT: Final = 3
"""Where the cluster has that many brokers: a record survives two of them."""

ADMIN_SECONDS: Final = 15.0
RETRY_SECONDS: Final = 0.05
RETRY_SECONDS_MAX: Final = 0.5
QUESTION_SECONDS_MAX: Final = 5.0
FIRST_QUESTION_SECONDS: Final = 1.0
"""Of three brokers the one that stands still is named to a third of those who ask, until the cluster gives it up (9 s).
"""
FIRST_PATIENCE_SECONDS: Final = 0.1
SHORT_PATIENCE_SECONDS_MAX: Final = 0.4
"""How long the first calls wait before it is seen what hinders them; each further one waits twice as long."""
MOVING: Final = frozenset({
    KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE, KafkaError.UNKNOWN_TOPIC_OR_PART,
})  # fmt: skip
FINAL: Final = frozenset({
    KafkaError.INVALID_REPLICATION_FACTOR, KafkaError.INVALID_PARTITIONS, KafkaError.INVALID_CONFIG,
    KafkaError.POLICY_VIOLATION, KafkaError.TOPIC_EXCEPTION, KafkaError.INVALID_REQUEST, KafkaError.UNSUPPORTED_VERSION,
    KafkaError.SECURITY_DISABLED,
})  # fmt: skip
"""Said at once, since asking again would give the same answer. (A cluster that is still starting may say of replicas
that there are too few brokers; who knows better starts again.)"""
POLL_SECONDS: Final = 0.05
CRITICAL_ONLY: Final = 2
"""As syslog counts: each vain attempt to connect would be a line otherwise, and the error that follows has it."""
HOPELESS: Final = frozenset({KafkaError._AUTHENTICATION, KafkaError._SSL})
"""The broker refused the password, or we its certificate."""
HOUR_MS: Final = 3_600_000
WEEK_MS: Final = 7 * 24 * HOUR_MS
MAX_MESSAGE_BYTES: Final = 1_048_588
"""Kafka's own default: a record of ours (`RECORD_BYTES_MAX`) and its framing fit."""

FOREVER: Final = "-1"
_EVERYWHERE: Final = {
    "unclean.leader.election.enable": "false",
    "max.message.bytes": str(MAX_MESSAGE_BYTES),
    "compression.type": "producer",
}
_KEPT: Final = {"cleanup.policy": "delete", "retention.ms": FOREVER, "retention.bytes": FOREVER}
_COMPACTED: Final = {"cleanup.policy": "compact"}
_WEEKS: Final = {"cleanup.policy": "delete", "retention.ms": str(4 * WEEK_MS)}
_SETTINGS: Final[Mapping[str, Mapping[str, str]]] = {
    COMMANDS: _KEPT,
    HISTORY: _KEPT,
    TIMERS: _COMPACTED,
    STATUS: _COMPACTED,
    REPLIES: {"cleanup.policy": "delete", "retention.ms": str(HOUR_MS)},
    DEAD_LETTERS: _WEEKS,
}
CHECKED: Final[Mapping[str, tuple[str, ...]]] = {
    COMMANDS: ("cleanup.policy", "retention.ms", "retention.bytes"),
    HISTORY: ("cleanup.policy", "retention.ms", "retention.bytes"),
    TIMERS: ("cleanup.policy",),
    STATUS: ("cleanup.policy",),
    REPLIES: ("cleanup.policy",),
    DEAD_LETTERS: ("cleanup.policy",),
}
"""What must be exactly so, for otherwise records vanish that are still needed. The rest is the operator's business,
but for the settings of `_wrong_everywhere`."""


class Described(NamedTuple):
    """One topic as the cluster has it."""

    name: str
    id: str
    partitions: int
    replication: int
    settings: Mapping[str, str]


def settings_of(topic: str, replication: int) -> dict[str, str]:
    """The settings that `topic` (without the app's prefix) is created with."""
    return {
        **_SETTINGS.get(topic, _KEPT if topic.startswith(STEPS_PREFIX) else _WEEKS),
        **_EVERYWHERE,
        "min.insync.replicas": str(max(1, replication - 1)) if replication < 3 else "2",
    }


class Wrong(NamedTuple):
    """Something about a topic that is not as it must be, and the command that repairs it."""

    topic: str
    setting: str
    expected: str
    found: str
    repair: str

    def __str__(self) -> str:
        return f"{self.topic}: {self.setting} must be {self.expected}, found {self.found}: {self.repair}"


def wrong_settings(topic: str, found: Described, *, url: KafkaUrl) -> list[Wrong]:
    """What is wrong with a topic of that purpose; each with the command that repairs it."""
    wanted = settings_of(topic, found.replication)
    wrong = {
        name: found.settings[name]
        for name in CHECKED.get(topic, ("cleanup.policy",))
        if found.settings.get(name, wanted[name]) != wanted[name]
    }
    wrong |= _wrong_everywhere(found, wanted)
    tool = f"kafka-configs.sh --bootstrap-server {url.bootstrap} "
    tool += f"--command-config {COMMAND_CONFIG} " if url.is_secured else ""
    return [
        Wrong(
            found.name,
            name,
            wanted[name],
            value,
            f"{tool}--alter --entity-type topics --entity-name {found.name} --add-config {name}={wanted[name]}",
        )
        for name, value in sorted(wrong.items())
    ]


def _wrong_everywhere(found: Described, wanted: Mapping[str, str]) -> dict[str, str]:
    wrong = {}
    unclean = found.settings.get("unclean.leader.election.enable", "false")
    if unclean != "false":
        wrong["unclean.leader.election.enable"] = unclean
    for name in ("max.message.bytes", "min.insync.replicas"):
        value = found.settings.get(name, wanted[name])
        if value.isdigit() and int(value) < int(wanted[name]):
            wrong[name] = value
    # With as many as there are replicas, one broker that is away stops all writes.
    least = found.settings.get("min.insync.replicas", "1")
    if (
        found.replication > 1
        and least.isdigit()
        and int(least) >= found.replication > int(wanted["min.insync.replicas"])
    ):
        wrong["min.insync.replicas"] = least
    return wrong


class _Connected(NamedTuple):
    """A client that has just heard from the cluster, and what it heard. Held until the futures that it gives are done:
    those of a client that is let go may never be."""

    admin: AdminClient
    cluster: ClusterMetadata


class Topics:
    """Creates, checks and describes the topics of one app. Its calls wait for the cluster, off the event loop."""

    def __init__(self, url: KafkaUrl, app: str) -> None:
        self.url, self.app = url, app
        self._said = ""
        self._hopeless: str | None = None
        self._admin = self._client()
        self._replacing = threading.Lock()

    def _client(self) -> AdminClient:
        config = self.url.config(defaults={"log_level": CRITICAL_ONLY}, logger=talk, error_cb=self._note)
        try:
            return AdminClient(config)
        except KafkaException as error:
            refused(self.url, error)

    def _replace(self, admin: AdminClient) -> None:
        """Take another client than this one, unless another thread did; whoever holds the old one goes on with it."""
        with self._replacing:
            if self._admin is admin:
                with suppress(InvalidUrl):  # it was valid once: what hinders now will pass
                    self._admin = self._client()

    def _note(self, error: KafkaError) -> None:
        """Why nobody answers (a wrong password, say) comes here alone, in `poll`: what waits is only told that it did.

        librdkafka tries again and again; a password or certificate that was refused is not worth the wait.
        """
        text = self.url.redact(error.str())
        log_.debug("%s: admin: %s", self.url.url, text)
        if error.code() in HOPELESS:
            self._hopeless = text
        if error.code() != KafkaError._ALL_BROKERS_DOWN:
            self._said = text

    def _unavailable(self, error: KafkaException, about: str = "") -> StreamflowError:
        """What the cluster answered; where it did not, with what is known of why."""
        found = error.args[0]
        assert isinstance(found, KafkaError), found
        if is_an_answer(found):
            return failed(self.url, found, about)
        text = f"{about}: {found.str()}" if about else found.str()
        return unreachable(self.url.url, f"{text}: {self._said}" if self._said else text)

    def name(self, topic: str) -> str:
        """The topic's name on the cluster."""
        return f"{self.app}.{topic}"

    async def open(self, *, create: bool) -> tuple[str, dict[str, Described]]:
        """The cluster's id and the app's topics, made if they are missing and `create` is true."""
        return await asyncio.to_thread(self._open, create=create)

    def _open(self, *, create: bool) -> tuple[str, dict[str, Described]]:
        cluster, brokers = self._asked(self._cluster)
        found = self.describe(TOPICS, settings=create)
        missing = [topic for topic in TOPICS if topic not in found]
        if missing and not create:
            if COMMANDS in found:
                raise InvalidArguments(
                    f"{self.url.url}: app {self.app!r} lacks the topics "
                    f"{', '.join(map(self.name, missing))}: start a worker, or run `streamflow topics create`"
                )
            raise no_app(self.url.url, self.app)
        if missing:
            self._refuse_half(found, missing)
            partitions = self.url.partitions or next(
                (topic.partitions for topic in found.values()), KAFKA_PARTITIONS_DEFAULT
            )
            replication = self.url.replication or min(REPLICATION_DEFAULT, brokers)
            self.create(missing, partitions, replication)
            found = self._described(TOPICS)
        self._check_partitions(found)
        if create:
            wrong = [str(each) for topic, was in found.items() for each in self.wrong(topic, was)]
            if wrong:
                raise InvalidArguments(f"{self.url.url}: topics with wrong settings:\n  " + "\n  ".join(wrong))
        return cluster, found

    def wrong(self, topic: str, found: Described) -> list[Wrong]:
        """What is wrong with the topic, see `wrong_settings`."""
        return wrong_settings(topic, found, url=self.url)

    def _refuse_half(self, found: Mapping[str, Described], missing: Iterable[str]) -> None:
        """A history without commands, or the other way round, tells of a topic that somebody deleted."""
        if found and HISTORY in missing:
            raise InvalidArguments(
                f"{self.url.url}: topic {self.name(HISTORY)} is missing while "
                f"{', '.join(sorted(map(self.name, found)))} exist: all runs are kept there. Restore it, or delete the "
                f"other topics of the app to begin anew"
            )

    def _check_partitions(self, found: Mapping[str, Described]) -> None:
        numbers = {topic.partitions for topic in found.values()}
        if len(numbers) > 1:
            listed = ", ".join(f"{topic.name}: {topic.partitions}" for topic in found.values())
            raise InvalidArguments(
                f"{self.url.url}: all topics of an app must have the same number of partitions, found {listed}: "
                f"delete and create those without data again"
            )
        (number,) = numbers
        if self.url.partitions not in (None, number):
            raise wrong_partitions(self.url.url, self.app, number, self.url.partitions or 0)

    def _asked(self, ask: Callable[[float], _T]) -> _T:
        """The answer of `ask(seconds)`, asked again while there is none but an error, for `ADMIN_SECONDS`.

        librdkafka waits for the one broker that it takes for the controller and asks no other. The cluster itself may
        name one that is already dead, so such a wait has to end long before all the patience is gone. Each is twice as
        long as the one before, for a cluster that is merely slow; but the last begins when a dead one is given up.
        """
        deadline = time.monotonic() + ADMIN_SECONDS
        seconds, pause = FIRST_QUESTION_SECONDS, RETRY_SECONDS
        while True:
            try:
                return ask(max(min(seconds, deadline - time.monotonic()), RETRY_SECONDS))
            except Unavailable:
                if self._hopeless is not None or deadline - time.monotonic() < FIRST_QUESTION_SECONDS:
                    raise
            time.sleep(pause)
            seconds, pause = min(seconds * 2, QUESTION_SECONDS_MAX), min(pause * 2, RETRY_SECONDS_MAX)

    def _cluster(self, seconds: float) -> tuple[str, int]:
        admin, _ = self._find_controller(seconds)
        try:
            asked = admin.describe_cluster(request_timeout=seconds)
            while not asked.done():
                admin.poll(POLL_SECONDS)
                if self._hopeless is not None:
                    raise unreachable(self.url.url, self._hopeless)
            described = asked.result()
        except KafkaException as error:
            raise self._unavailable(error) from None
        return str(described.cluster_id), len(described.nodes)

    def create(self, topics: Sequence[str], partitions: int, replication: int) -> None:
        """Create topics, and wait until they are there; those that exist meanwhile are left as they are."""
        new = [
            NewTopic(
                self.name(topic),
                num_partitions=partitions,
                replication_factor=replication,
                config=settings_of(topic, replication),
            )
            for topic in topics
        ]
        self._asked(lambda seconds: self._create(new, seconds))
        self._described(topics)

    def _create(self, new: Sequence[NewTopic], seconds: float) -> None:
        admin, _ = self._find_controller(seconds)
        for name, future in admin.create_topics(list(new), request_timeout=seconds).items():
            try:
                future.result()
                shape = f"{new[0].num_partitions} partitions, {new[0].replication_factor} replicas"
                log_.info("created topic %s with %s", name, shape)
            except KafkaException as error:
                if error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
                    continue
                raise self._failed(f"topic {name} cannot be created", error) from None

    def _described(self, topics: Sequence[str]) -> dict[str, Described]:
        """Describe topics that were just created: not every broker knows of them at once."""
        deadline = time.monotonic() + ADMIN_SECONDS
        while len(found := self.describe(topics, settings=True)) < len(topics):
            if time.monotonic() > deadline:
                missing = ", ".join(self.name(topic) for topic in topics if topic not in found)
                raise answered(self.url.url, f"new topics do not appear: {missing}")
            time.sleep(RETRY_SECONDS)
        return found

    def describe(self, topics: Iterable[str], *, settings: bool) -> dict[str, Described]:
        """Those of the topics that exist, by their name without the app's prefix."""
        names = {self.name(topic): topic for topic in topics}
        return self._asked(lambda seconds: self._describe(names, seconds, settings=settings))

    def _describe(self, names: Mapping[str, str], seconds: float, *, settings: bool) -> dict[str, Described]:
        found: dict[str, Described] = {}
        admin, _ = self._find_controller(seconds)
        try:
            futures = admin.describe_topics(TopicCollection(list(names)), request_timeout=seconds)
        except KafkaException as error:
            raise self._unavailable(error) from None
        for name, future in futures.items():
            try:
                topic = future.result()
            except KafkaException as error:
                if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                    continue
                raise self._failed(f"topic {name} cannot be described", error) from None
            replication = min((len(part.replicas) for part in topic.partitions), default=1)
            found[names[name]] = Described(name, str(topic.topic_id), len(topic.partitions), replication, {})
        if not settings or not found:
            return found
        resources = [ConfigResource(ResourceType.TOPIC, topic.name) for topic in found.values()]
        for resource, future in admin.describe_configs(resources, request_timeout=seconds).items():
            try:
                entries: Mapping[str, Any] = future.result()
            except KafkaException as error:
                if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                    del found[names[resource.name]]  # just made, and not every broker knows of it yet
                    continue
                raise self._failed(f"the settings of topic {resource.name} cannot be read", error) from None
            values = {name: str(entry.value) for name, entry in entries.items()}
            found[names[resource.name]] = found[names[resource.name]]._replace(settings=values)
        return found

    def _find_controller(self, seconds: float) -> _Connected:
        """Learn anew which broker takes such questions; the client that knows it, and what the cluster is.

        librdkafka keeps the one that it was told of first: partitions could not be taken over for as long as a single
        broker was dead. All topics are asked for, since asking for one makes it, with settings that are not ours, on a
        cluster that makes what it does not know.
        """
        deadline = time.monotonic() + seconds
        patience = FIRST_PATIENCE_SECONDS
        admin = self._admin
        while True:
            left = max(deadline - time.monotonic(), RETRY_SECONDS)
            # An answer that comes after its call has ended is lost: the last call has all the time that is left.
            wait = left if patience > SHORT_PATIENCE_SECONDS_MAX else min(patience, left)
            try:
                found = _Connected(admin, admin.list_topics(timeout=wait))
                self._hopeless = None
                return found
            except KafkaException as error:
                admin.poll(0)  # the call has heard why, and tells only those who poll
                if self._hopeless is not None:
                    raise unreachable(self.url.url, self._hopeless) from None
                if is_an_answer(error.args[0]):
                    raise self._unavailable(error) from None
                if time.monotonic() >= deadline:
                    # A client that has one connection asks there alone, even where a broker stands still, until the
                    # socket's timeout a minute later. A new one connects to whichever answers.
                    self._replace(admin)
                    raise self._unavailable(error) from None
            time.sleep(RETRY_SECONDS)
            patience *= 2

    def queues(self) -> list[str]:
        """The step queues that have a topic, without the app's prefix."""
        prefix = self.name(STEPS_PREFIX)
        known = self._asked(self._find_controller).cluster.topics
        return sorted(name.removeprefix(f"{self.app}.") for name in known if name.startswith(prefix))

    def offsets(self, found: Mapping[str, Described]) -> dict[str, tuple[list[int], list[int]]]:
        """Of each topic the start offsets and the end offsets of its partitions."""
        places = [TopicPartition(was.name, number) for was in found.values() for number in range(was.partitions)]
        first = self._offsets(places, OffsetSpec.earliest())  # type: ignore[no-untyped-call]
        last = self._offsets(places, OffsetSpec.latest())  # type: ignore[no-untyped-call]
        return {
            topic: (
                [first[was.name, number] for number in range(was.partitions)],
                [last[was.name, number] for number in range(was.partitions)],
            )
            for topic, was in found.items()
        }

    def _offsets(self, places: list[TopicPartition], spec: OffsetSpec) -> dict[tuple[str, int], int]:
        admin = self._admin
        deadline = time.monotonic() + ADMIN_SECONDS
        answers: dict[tuple[str, int], int] = {}
        while True:
            wanted = {each: spec for each in places if (each.topic, each.partition) not in answers}
            if not wanted:
                return answers
            for place, future in admin.list_offsets(wanted, request_timeout=ADMIN_SECONDS).items():
                try:
                    answers[place.topic, place.partition] = int(future.result().offset)
                except KafkaException as error:
                    # A new partition, or one that moves, has no leader for a moment.
                    if error.args[0].code() not in MOVING or time.monotonic() > deadline:
                        raise self._failed(f"the offsets of topic {place.topic} cannot be read", error) from None
            if len(answers) < len(places):
                time.sleep(RETRY_SECONDS)

    def _failed(self, what: str, error: KafkaException) -> StreamflowError:
        code = error.args[0].code()
        if code in DENIED:
            return denied(self.url.url, what)
        if code in FINAL:
            return InvalidArguments(f"{self.url.url}: {what}: {error.args[0].str()}")
        return self._unavailable(error, what)

    def delete(self) -> None:
        """Delete all topics of the app, step queues included, with all that is in them. Blocks."""
        admin, cluster = self._asked(self._find_controller)
        mine = [name for name in cluster.topics if name.startswith(f"{self.app}.")]
        for name, future in (admin.delete_topics(mine) if mine else {}).items():
            try:
                future.result()
            except KafkaException as error:
                raise self._failed(f"topic {name} cannot be deleted", error) from None

    async def ids(self) -> dict[str, str]:
        """The topic ids that the app's topics have now."""
        return {
            topic: found.id
            for topic, found in (await asyncio.to_thread(partial(self.describe, TOPICS, settings=False))).items()
        }

    async def delete_before(self, topic: str, partition: int, offset: int) -> int:
        """DeleteRecords: let everything below `offset` go; the new start offset."""
        return await asyncio.to_thread(self._delete_before, topic, partition, offset)

    def _delete_before(self, topic: str, partition: int, offset: int) -> int:
        target = TopicPartition(self.name(topic), partition, offset)
        admin = self._admin  # held, see `_Connected`
        futures: Mapping[Any, Any] = admin.delete_records([target], request_timeout=ADMIN_SECONDS)
        (future,) = futures.values()
        try:
            return int(future.result().low_watermark)
        except KafkaException as error:
            raise self._failed(f"{topic}[{partition}] cannot be trimmed to {offset}", error) from None
