"""Who may do what on a Kafka cluster with authorization: the least that each role needs, and what a refusal says.

The grants follow what the adapter does, and tests/kafka/test_access.py runs workers and clients with exactly these:

- All roles see (Describe) all topics of the app, since a handle checks them when it is opened; Read and Write imply it.
- A group that is only named and never joined is still looked up (Describe); `<app>` and `<app>.outbox` are joined or
  committed to (Read).
- There are no transactions, so no transactional ids. IdempotentWrite is implied by Write since Kafka 2.8; the grant is
  for older brokers.
- Topics are named one by one: a prefix `shop.` would cover an app `shop.eu`, too. Step queues have names of their own.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from confluent_kafka import KafkaError

from streamflow.errors import InvalidArguments
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, HISTORY, REPLIES, STATUS, STEPS_PREFIX, TIMERS, TOPICS

DENIED: Final = frozenset({
    KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
})  # fmt: skip
"""The broker knows who asks, and refuses."""

COMMAND_CONFIG: Final = "client.properties"
"""The file with security settings that the commands we print name: Kafka's own tools take them from nowhere else."""


class Grant(NamedTuple):
    """Operations on one resource. `name` is "" for the cluster; `prefixed` means all whose names begin with it."""

    resource: str
    name: str
    operations: tuple[str, ...]
    prefixed: bool = False


_READ: Final = ("Read",)
_WRITE: Final = ("Write",)
_SEE: Final = ("Describe",)
_MAKE: Final = ("Create", "DescribeConfigs")
"""To make a topic that is missing, and to check the settings of one that is not."""
_TRIM: Final = ("Delete",)
"""DeleteRecords: the log is trimmed behind its snapshots. There is no narrower right: it allows DeleteTopics, too."""

_TOPICS: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "worker": {
        COMMANDS: (*_READ, *_WRITE, *_MAKE, *_TRIM),
        HISTORY: (*_READ, *_WRITE, *_MAKE, *_TRIM),
        TIMERS: (*_READ, *_WRITE, *_MAKE),
        STATUS: (*_READ, *_WRITE, *_MAKE),
        REPLIES: (*_WRITE, *_MAKE, *_TRIM),
        DEAD_LETTERS: (*_WRITE, *_MAKE, *_TRIM),
    },
    "client": {COMMANDS: _WRITE, REPLIES: _READ, STATUS: _READ},
    "step-worker": {COMMANDS: _WRITE, DEAD_LETTERS: _WRITE},
    "projection": {HISTORY: _READ, STATUS: _READ},
}
ROLES: Final = tuple(_TOPICS)
"""worker: runs workflows and steps; client: starts and follows runs; step-worker: runs the steps of queues alone;
projection: reads the history and status topics, as a program of one's own may."""


def grants(role: str, app: str) -> list[Grant]:
    """The least that `role` needs in that app."""
    own = _TOPICS[role]
    found = [Grant("topic", f"{app}.{topic}", own.get(topic, _SEE)) for topic in TOPICS]
    queues = f"{app}.{STEPS_PREFIX}"
    if role == "worker":
        found.append(Grant("topic", queues, (*_WRITE, *_MAKE), prefixed=True))
        found.append(Grant("group", app, _READ))
    elif role == "step-worker":
        found.append(Grant("topic", queues, (*_READ, *_TRIM), prefixed=True))
        found.append(Grant("group", queues, _READ, prefixed=True))
    found.append(Grant("group", f"{app}.outbox", _READ if role == "worker" else _SEE))
    found += [Grant("group", f"{app}.{name}", _SEE) for name in ("readers", "followers")]
    if "Write" in {operation for operations in own.values() for operation in operations}:
        found.append(Grant("cluster", "", ("IdempotentWrite",)))
    return found


def acl_commands(role: str, app: str, principals: Iterable[str], *, bootstrap: str, secured: bool) -> list[str]:
    """The commands that give `role` to these principals, one for each set of operations."""
    merged: dict[tuple[str, tuple[str, ...], bool], list[str]] = {}
    for grant in grants(role, app):
        merged.setdefault((grant.resource, grant.operations, grant.prefixed), []).append(grant.name)
    commands = []
    for (resource, operations, prefixed), names in merged.items():
        words = ["kafka-acls.sh", "--bootstrap-server", bootstrap]
        words += ["--command-config", COMMAND_CONFIG] if secured else []
        words += ["--add"]
        for principal in principals:
            words += ["--allow-principal", principal]
        for operation in operations:
            words += ["--operation", operation]
        for name in names:
            words += [f"--{resource}", name] if name else [f"--{resource}"]
        words += ["--resource-pattern-type", "prefixed"] if prefixed else []
        commands.append(shlex.join(words))
    return commands


def denied(url: str, what: str) -> InvalidArguments:
    """The principal of this URL lacks a right; `what` begins with the resource."""
    return InvalidArguments(
        f"{url}: {what}: this principal may not: grant it (`streamflow topics create --acls` prints the commands for "
        f"each role)"
    )
