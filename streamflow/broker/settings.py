"""The settings of a broker that lives on one machine for the time of a test or a working day."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from streamflow.errors import Unavailable

HOST: Final = "127.0.0.1"
PORTS: Final = range(20_000, 32_000)
"""Where free ports are looked for: below those that the kernel lends to outgoing connections, so that a node which was
killed finds its port free when it comes back."""
PROBES_MAX: Final = 200

LOGGING: Final = """\
status = error
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{ISO8601} %p %c{1}: %m%n
rootLogger.level = warn
rootLogger.appenderRef.out.ref = out
"""
"""A broker's own log: what it warns of, on its stdout, which goes to a file."""

COMMON: Final = {
    "auto.create.topics.enable": "false",
    # Long enough for processes that start together to begin as one group: a rebalance would take a second or two.
    "group.initial.rebalance.delay.ms": "100",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.num.partitions": "4",
    "log.cleaner.backoff.ms": "1000",
    # Tests of dead members and dead nodes must not wait for the minutes that production would.
    "group.min.session.timeout.ms": "1000",
    "broker.session.timeout.ms": "4000",
    "broker.heartbeat.interval.ms": "500",
    # A few threads are plenty, and three nodes share one machine.
    "num.network.threads": "2",
    "num.io.threads": "4",
    "log.cleaner.dedupe.buffer.size": "16777216",
}


def properties(
    number: int,
    data: Path,
    *,
    ports: Sequence[int],
    controller_ports: Sequence[int],
    overrides: Mapping[str, str],
    listeners: Mapping[str, tuple[str, int]] = MappingProxyType({}),
) -> str:
    """The text of the properties file of node `number`, counted from 1; the ports are those of all nodes, in order.

    `listeners` are this node's further ones for clients: name → (security protocol, port).
    """
    further = "".join(f",{name}://{HOST}:{port}" for name, (_, port) in listeners.items())
    protocols = "".join(f",{name}:{protocol}" for name, (protocol, _) in listeners.items())
    nodes = len(ports)
    copies, copies_min = str(min(nodes, 3)), "2" if nodes >= 3 else "1"
    settings = {
        "process.roles": "broker,controller",
        "node.id": str(number),
        "controller.quorum.voters": ",".join(
            f"{each}@{HOST}:{port}" for each, port in enumerate(controller_ports, start=1)
        ),
        "listeners": f"PLAINTEXT://{HOST}:{ports[number - 1]},CONTROLLER://{HOST}:{controller_ports[number - 1]}"
        + further,
        "advertised.listeners": f"PLAINTEXT://{HOST}:{ports[number - 1]}{further}",
        "inter.broker.listener.name": "PLAINTEXT",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": f"PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT{protocols}",
        "log.dirs": str(data),
        "default.replication.factor": copies,
        "min.insync.replicas": copies_min,
        "offsets.topic.replication.factor": copies,
        "transaction.state.log.replication.factor": copies,
        "transaction.state.log.min.isr": copies_min,
        "share.coordinator.state.topic.replication.factor": copies,
        "share.coordinator.state.topic.min.isr": copies_min,
        **COMMON,
        **overrides,
    }
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def free_ports(count: int) -> list[int]:
    """That many ports on which nobody listens now."""
    # Chance of its own: a test that seeds the shared one must not make two sessions draw the same ports.
    draw = random.Random(os.urandom(8))
    found: list[int] = []
    for _ in range(PROBES_MAX):
        port = draw.choice(PORTS)
        if port not in found and is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise Unavailable(f"no {count} free ports on {HOST} between {PORTS.start} and {PORTS.stop}: name the ports to use")


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        # As the broker does, for which connections of a dead predecessor are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
