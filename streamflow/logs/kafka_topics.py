"""The topics of an app on a Kafka cluster: their settings, how they are created and checked, who they are.

Rules of this file:

- A worker makes what is missing and refuses what is wrong, by name and with the command that repairs it; it never
  changes a topic that somebody made.
- All topics of an app have the same number of partitions, fixed for ever: a workflow id hashes to one of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from confluent_kafka import KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported by its stubs only since 2.17
    AdminClient,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from streamflow.errors import InvalidArguments, StreamflowError
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, HISTORY, REPLIES, STATUS, STEPS_PREFIX, TIMERS, TOPICS
from streamflow.logs.checks import no_app, wrong_partitions
from streamflow.logs.kafka_talk import talk
from streamflow.logs.kafka_url import KafkaUrl, refused, unreachable

log_ = logging.getLogger("streamflow.logs")

KAFKA_PARTITIONS_DEFAULT: Final = 12
"""Enough for a dozen workers; the number can never change, and each costs an idle worker about 0.1 % of a core."""

REPLICATION_DEFAULT: Final = 3
"""Where the cluster has that many brokers: a record survives two of them."""

ADMIN_SECONDS: Final = 15.0
RETRY_SECONDS: Final = 0.05
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


def wrong_settings(topic: str, found: Described, *, bootstrap: str) -> list[str]:
    """What is wrong with a topic of that purpose; each with the command that repairs it."""
    wanted = settings_of(topic, found.replication)
    wrong = {
        name: found.settings[name]
        for name in CHECKED.get(topic, ("cleanup.policy",))
        if found.settings.get(name, wanted[name]) != wanted[name]
    }
    wrong |= _wrong_everywhere(found, wanted)
    return [
        f"{found.name}: {name} must be {wanted[name]}, found {value}: kafka-configs.sh --bootstrap-server {bootstrap} "
        f"--alter --entity-type topics --entity-name {found.name} --add-config {name}={wanted[name]}"
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


class Topics:
    """Creates, checks and describes the topics of one app. Its calls wait for the cluster, off the event loop."""

    def __init__(self, url: KafkaUrl, app: str) -> None:
        self.url, self.app = url, app
        try:
            self._admin = AdminClient(url.config(logger=talk))
        except KafkaException as error:
            refused(url.url, error)

    def name(self, topic: str) -> str:
        """The topic's name on the cluster."""
        return f"{self.app}.{topic}"

    async def open(self, *, create: bool) -> tuple[str, dict[str, Described]]:
        """The cluster's id and the app's topics, made if they are missing and `create` is true."""
        return await asyncio.to_thread(self._open, create=create)

    def _open(self, *, create: bool) -> tuple[str, dict[str, Described]]:
        cluster, brokers = self._cluster()
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
            wrong = [text for topic, was in found.items() for text in self.wrong(topic, was)]
            if wrong:
                raise InvalidArguments(f"{self.url.url}: topics with wrong settings:\n  " + "\n  ".join(wrong))
        return cluster, found

    def wrong(self, topic: str, found: Described) -> list[str]:
        """What is wrong with the topic, see `wrong_settings`."""
        return wrong_settings(topic, found, bootstrap=self.url.bootstrap)

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

    def _cluster(self) -> tuple[str, int]:
        try:
            described = self._admin.describe_cluster(request_timeout=ADMIN_SECONDS).result()
        except KafkaException as error:
            raise unreachable(self.url.url, _text(error)) from None
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
        for name, future in self._admin.create_topics(new, request_timeout=ADMIN_SECONDS).items():
            try:
                future.result()
                log_.info("created topic %s with %d partitions, %d replicas", name, partitions, replication)
            except KafkaException as error:
                if error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
                    continue
                raise self._failed(f"topic {name} cannot be created", error) from None
        self._described(topics)

    def _described(self, topics: Sequence[str]) -> dict[str, Described]:
        """Describe topics that were just created: not every broker knows of them at once."""
        deadline = time.monotonic() + ADMIN_SECONDS
        while len(found := self.describe(topics, settings=True)) < len(topics):
            if time.monotonic() > deadline:
                missing = ", ".join(self.name(topic) for topic in topics if topic not in found)
                raise unreachable(self.url.url, f"new topics do not appear: {missing}")
            time.sleep(RETRY_SECONDS)
        return found

    def describe(self, topics: Iterable[str], *, settings: bool) -> dict[str, Described]:
        """Those of the topics that exist, by their name without the app's prefix."""
        names = {self.name(topic): topic for topic in topics}
        found: dict[str, Described] = {}
        try:
            futures = self._admin.describe_topics(TopicCollection(list(names)), request_timeout=ADMIN_SECONDS)
        except KafkaException as error:
            raise unreachable(self.url.url, _text(error)) from None
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
        for resource, future in self._admin.describe_configs(resources, request_timeout=ADMIN_SECONDS).items():
            try:
                entries: Mapping[str, Any] = future.result()
            except KafkaException as error:
                raise self._failed(f"the settings of topic {resource.name} cannot be read", error) from None
            values = {name: str(entry.value) for name, entry in entries.items()}
            found[names[resource.name]] = found[names[resource.name]]._replace(settings=values)
        return found

    def _failed(self, what: str, error: KafkaException) -> StreamflowError:
        code = error.args[0].code()
        if code in (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED):
            return InvalidArguments(
                f"{self.url.url}: {what}: this principal may not: grant it (`streamflow topics create --acls` prints "
                f"the commands), or have an administrator create the topics and start with --no-create-topics"
            )
        if code in (KafkaError.INVALID_REPLICATION_FACTOR, KafkaError.INVALID_PARTITIONS, KafkaError.INVALID_CONFIG,
                    KafkaError.POLICY_VIOLATION):  # fmt: skip
            return InvalidArguments(f"{self.url.url}: {what}: {error.args[0].str()}")
        return unreachable(self.url.url, f"{what}: {_text(error)}")

    async def ids(self) -> dict[str, str]:
        """The topic ids that the app's topics have now."""
        return {
            topic: found.id
            for topic, found in (await asyncio.to_thread(partial(self.describe, TOPICS, settings=False))).items()
        }

    async def delete_before(self, topic: str, partition: int, offset: int) -> int:
        """DeleteRecords: let everything below `offset` go; the new start offset."""

        def delete() -> int:
            target = TopicPartition(self.name(topic), partition, offset)
            futures: Mapping[Any, Any] = self._admin.delete_records([target], request_timeout=ADMIN_SECONDS)
            (future,) = futures.values()
            try:
                return int(future.result().low_watermark)
            except KafkaException as error:
                raise self._failed(f"{topic}[{partition}] cannot be trimmed to {offset}", error) from None

        return await asyncio.to_thread(delete)


def _text(error: KafkaException) -> str:
    found = error.args[0]
    return found.str() if isinstance(found, KafkaError) else str(found)
