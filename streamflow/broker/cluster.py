"""A cluster of one or three nodes in one directory, from its first format to its last stop.

The directory holds `node-N` (data), `node-N.log`, `node-N.properties` and `log4j2.properties`; all but the data is
written anew at each start. A directory that was used before is used again with what is in it: the ports may be others
then, the number of nodes may not.
"""

from __future__ import annotations

import base64
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from streamflow.broker import settings
from streamflow.broker.jars import Runtime, find_runtime
from streamflow.broker.node import Node, stop_all
from streamflow.broker.probe import Probe
from streamflow.errors import InvalidArguments, Unavailable

SIZES: Final = (1, 3)
"""How many nodes: two lose their majority with either of them, and no test needs more than three."""
HEAP_MB_DEFAULT: Final = 512
ANSWER_SECONDS_MAX: Final = 60.0
"""How long nodes may take until they answer; three on a busy machine took 20 seconds."""

_POLL_SECONDS: Final = 0.05
_OURS: Final = re.compile(r"node-\d+(\.formatting)?(\.log|\.properties)?|log4j2\.properties")


class Cluster:
    """One or three nodes of Apache Kafka. `start` fetches what is missing, starts them and waits until they answer.

    `ports` are those for clients, one per node; without it free ones are chosen. `settings` are the broker's own, and
    win over ours. `listeners` are further ones for clients, name → security protocol, on free ports (`address`); what
    they need beyond that is in `settings` (`listener.name.<name>.…`). `say` is told before something takes long.
    Leaving the `with` block stops all nodes; the directory stays.
    """

    def __init__(
        self,
        directory: Path,
        *,
        nodes: int = 1,
        ports: Sequence[int] | None = None,
        heap_mb: int = HEAP_MB_DEFAULT,
        settings: Mapping[str, str] | None = None,
        listeners: Mapping[str, str] | None = None,
        say: Callable[[str], None] = lambda _: None,
        runtime: Runtime | None = None,
    ) -> None:
        if nodes not in SIZES:
            raise InvalidArguments(f"a broker has 1 or 3 nodes, not {nodes}")
        if ports is not None and len(ports) != nodes:
            raise InvalidArguments(f"{nodes} nodes need {nodes} ports, found {len(ports)}: {list(ports)}")
        self.directory = directory.absolute()
        self.size = nodes
        self.nodes: list[Node] = []
        self._ports = ports
        self._heap_mb = heap_mb
        self._settings = settings or {}
        self._listeners = listeners or {}
        self._listener_ports: list[dict[str, int]] = []
        self._say = say
        self._runtime = runtime
        self._probe: Probe | None = None

    @property
    def bootstrap(self) -> str:
        """The addresses for clients, as in `bootstrap.servers`."""
        return ",".join(node.address for node in self._started())

    @property
    def url(self) -> str:
        """The same as the URL of a log."""
        return f"kafka://{self.bootstrap}"

    def address(self, listener: str) -> str:
        """The addresses of one of the further listeners, as in `bootstrap.servers`."""
        self._started()
        return ",".join(f"{settings.HOST}:{ports[listener]}" for ports in self._listener_ports)

    def node(self, number: int) -> Node:
        """The node of that number, counted from 1, as in what Kafka says of leaders and replicas."""
        return self._started()[number - 1]

    def start(self) -> Self:
        """Start all nodes and wait until they answer; on a failure those that were started are stopped again."""
        if any(node.is_running for node in self.nodes):
            raise InvalidArguments(f"the broker in {self.directory} runs already: stop() it before start()")
        runtime = self._runtime or find_runtime(self._say)
        cluster_id = self._read_cluster_id() or _new_cluster_id()
        self.directory.mkdir(parents=True, exist_ok=True)
        free = settings.free_ports((2 + len(self._listeners)) * self.size)
        ports = list(self._ports or free[: self.size])
        controller_ports = free[self.size : 2 * self.size]
        further = iter(free[2 * self.size :])
        self._listener_ports = [{name: next(further) for name in self._listeners} for _ in range(self.size)]
        (self.directory / "log4j2.properties").write_text(settings.LOGGING)
        self.nodes = [
            Node(
                number,
                self.directory,
                port=ports[number - 1],
                controller_port=controller_ports[number - 1],
                runtime=runtime,
                heap_mb=self._heap_mb,
            )
            for number in range(1, self.size + 1)
        ]
        for node in self.nodes:
            node.properties.write_text(
                settings.properties(
                    node.number,
                    node.data,
                    ports=ports,
                    controller_ports=controller_ports,
                    overrides=self._settings,
                    listeners={
                        name: (protocol, self._listener_ports[node.number - 1][name])
                        for name, protocol in self._listeners.items()
                    },
                )
            )
        try:
            with ThreadPoolExecutor(self.size, "broker-format") as pool:
                list(pool.map(lambda node: node.format(cluster_id), self.nodes))
            for node in self.nodes:
                node.start()
            self._probe = Probe(self.bootstrap)
            self.wait()
        except BaseException:
            for node in self.nodes:
                node.kill()
            raise
        return self

    def wait(self, numbers: Sequence[int] | None = None, *, seconds: float = ANSWER_SECONDS_MAX) -> None:
        """Wait until exactly these nodes are counted in by the cluster, all of those that run if none are named."""
        expected = sorted(numbers) if numbers is not None else [node.number for node in self.nodes if node.is_running]
        give_up_at = time.monotonic() + seconds
        while True:
            for node in self._started():
                node.check()
            found = self._probe.nodes() if self._probe is not None else []
            if found == expected:
                return
            if time.monotonic() > give_up_at:
                raise Unavailable(
                    f"the broker at {self.bootstrap} was to answer with nodes {expected} within {seconds:g} s, "
                    f"found {found}: look into {self.directory}/node-*.log"
                )
            time.sleep(_POLL_SECONDS)

    def check(self) -> None:
        """Raise when a node ended and nobody here ended it."""
        for node in self.nodes:
            node.check()

    def stop(self) -> None:
        """Stop all nodes that run; those that take too long are killed. Nothing in the directory is lost."""
        stop_all(self.nodes)

    def erase(self) -> None:
        """Delete the data and the logs of all nodes, and nothing else that may lie in the directory."""
        if any(node.is_running for node in self.nodes):
            raise InvalidArguments(f"the broker in {self.directory} runs: stop() it before erase()")
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            if _OURS.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def leader_of(self, topic: str, partition: int) -> int | None:
        """The number of the node that leads the partition; None while none does."""
        self._started()
        assert self._probe is not None
        return self._probe.leader_of(topic, partition)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _started(self) -> list[Node]:
        if not self.nodes:
            raise InvalidArguments(f"the broker in {self.directory} was never started: call start() first")
        return self.nodes

    def _read_cluster_id(self) -> str | None:
        """The id with which the directory was formatted; None for a new one."""
        found = {path.parent.name: path for path in sorted(self.directory.glob("node-*/meta.properties"))}
        if not found:
            return None
        numbers = {name.removeprefix("node-") for name in found}
        if len(found) > self.size or not numbers <= {str(number) for number in range(1, self.size + 1)}:
            raise InvalidArguments(
                f"{self.directory} holds a broker of {len(found)} nodes, asked for was {self.size}: "
                "name the same number of nodes, another directory, or erase it"
            )
        text = next(iter(found.values())).read_text()
        match = re.search(r"^cluster\.id=(.+)$", text, re.MULTILINE)
        if match is None:
            raise Unavailable(f"{next(iter(found.values()))} names no cluster.id: erase the directory")
        return match[1].replace("\\", "").strip()


def _new_cluster_id() -> str:
    # As Kafka writes ids. One that began with a dash would be taken for an option of its tool.
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "_")
