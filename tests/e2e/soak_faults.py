"""The faults of a soak: which come when, drawn from a seed, and how they are done to real processes."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from streamflow.broker import Cluster
from streamflow.broker.node import Node
from streamflow.broker.settings import is_free
from streamflow.cli.worker_process import WorkerProcess
from streamflow.errors import Unavailable
from tests.e2e.soak_app import APP_VARIABLE, EFFECTS_VARIABLE, PROGRESS_VARIABLE, QUEUE
from tests.e2e.soak_recorder import RECORDED

ROOT: Final = Path(__file__).resolve().parents[2]
FAULTS: Final = "faults.jsonl"

WORKER, STEP_WORKER, CLIENT, BROKER = "worker", "step worker", "client", "broker"
WORKERS_MIN: Final = 2
WORKERS: Final = 3
WORKERS_MAX: Final = 5
STEP_WORKERS: Final = 2
AT_ONCE_MAX: Final = 3
"""Faults under way at the same time, of which one may be the brokers'."""
PAUSE_SECONDS: Final = 0.1
NODE_SECONDS: Final = 90.0
"""How long a node that was started may take until the cluster counts it in, on a busy machine."""
START_SECONDS: Final = 40.0
"""How long a worker that starts looks for the brokers before it gives up."""
GAVE_UP: Final = ("cannot be reached", "answered with an error")
"""What a worker says that could not reach the brokers when it started."""
STOP_SECONDS: Final = 30.0
"""How long a process may take to stop when all is well, on a busy machine."""
IN_SYNC_SECONDS: Final = 60.0
"""How long its replicas may take to catch up before the next fault of a broker comes all the same."""


class Kind(NamedTuple):
    """A kind of fault: what is done to one of `group`, how long it lasts (from, to, in seconds), how often it comes."""

    name: str
    group: str
    verb: str
    lasts: tuple[float, float]
    weight: int


KINDS: Final = (
    Kind("worker killed", WORKER, "kill", (0.0, 1.0), 6),
    Kind("worker killed, away beyond its session", WORKER, "kill", (7.0, 10.0), 2),
    Kind("worker killed, its state deleted", WORKER, "wipe", (0.0, 2.0), 2),
    Kind("worker paused", WORKER, "pause", (0.5, 3.0), 3),
    Kind("worker paused beyond its session", WORKER, "pause", (8.0, 11.0), 3),
    Kind("worker restarted", WORKER, "restart", (0.0, 1.0), 2),
    Kind("worker added", WORKER, "add", (0.0, 0.0), 2),
    Kind("worker removed", WORKER, "remove", (0.0, 0.0), 2),
    Kind("step worker killed", STEP_WORKER, "kill", (0.0, 3.0), 3),
    Kind("step worker paused beyond its session", STEP_WORKER, "pause", (8.0, 11.0), 2),
    Kind("step worker restarted", STEP_WORKER, "restart", (0.0, 1.0), 1),
    Kind("client killed", CLIENT, "kill", (0.0, 2.0), 2),
    Kind("client paused", CLIENT, "pause", (1.0, 10.0), 1),
    Kind("client restarted", CLIENT, "restart", (0.0, 1.0), 1),
    Kind("broker killed", BROKER, "kill", (1.0, 6.0), 3),
    Kind("broker paused", BROKER, "pause", (0.5, 3.0), 2),
    Kind("broker paused beyond its session", BROKER, "pause", (7.0, 12.0), 2),
    Kind("broker restarted", BROKER, "restart", (0.0, 3.0), 2),
    Kind("two brokers killed", BROKER, "kill two", (3.0, 12.0), 2),
)


class Fault(NamedTuple):
    """One fault of the plan: `after` seconds behind the one before, done to whom `choice` in [0, 1) picks."""

    kind: Kind
    after: float
    lasts: float
    choice: float


def plan(seed: int) -> Iterator[Fault]:
    """The faults of a seed, without end. Each kind comes once before chance decides how often it comes."""
    chance = random.Random(seed)
    first = list(KINDS)
    chance.shuffle(first)
    while True:
        kind = first.pop() if first else chance.choices(KINDS, [kind.weight for kind in KINDS])[0]
        yield Fault(
            kind, round(chance.uniform(1.0, 6.0), 2), round(chance.uniform(*kind.lasts), 2), round(chance.random(), 4)
        )


@dataclass
class Slot:
    """A place for one process, which may have many lives. `hurt`: a fault is under way, and it may be down."""

    name: str
    group: str
    number: int
    process: WorkerProcess | None = None
    lives: int = 0
    hurt: bool = False
    said_from: int = 0
    """Where in its log what this life wrote begins."""


@dataclass
class Fleet:
    """All processes of a soak, and the cluster where it is ours."""

    folder: Path
    url: str
    app: str
    seed: int
    cluster: Cluster | None
    say: Callable[[str], None]
    slots: list[Slot] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    """Processes that ended although nobody ended them."""
    gave_up: int = 0
    """Workers that could not reach the brokers when they started, and said so: whoever started them does so again."""
    broker_hurt: bool = False
    healed_at: float = -math.inf
    """When the last fault of a broker was over, as `time.monotonic` counts."""
    numbers: int = 0

    # -- processes -----------------------------------------------------------------------------------------------------

    def add(self, group: str) -> Slot:
        """One more process of that group."""
        self.numbers += 1
        slot = Slot(f"{group.replace(' ', '-')}-{self.numbers}", group, self.numbers)
        self.slots.append(slot)
        self.start(slot)
        return slot

    def state_of(self, slot: Slot) -> Path:
        """The state directory of a worker, the same in all its lives."""
        return self.folder / "state" / slot.name

    def start(self, slot: Slot) -> None:
        """The next life of the process."""
        match slot.group:
            case "client":
                folder = ["--folder", str(self.folder), "--seed", str(self.seed), "--life", str(slot.lives)]
                command = ["-m", "tests.e2e.soak_driver", "--url", self.url, "--app", self.app, *folder]
            case _:
                more = ["--queue", QUEUE] if slot.group == STEP_WORKER else []
                more += ["--state-dir", str(self.state_of(slot))]
                command = ["-m", "tests.e2e.soak_worker", "worker", "tests.e2e.soak_app:app", "--url", self.url, *more]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {
            APP_VARIABLE: self.app,
            EFFECTS_VARIABLE: str(self.folder / "effects"),
            PROGRESS_VARIABLE: str(self.folder / RECORDED),
            "PYTHONPATH": path,
        }
        output = self.folder / f"{slot.name}.log"
        slot.said_from = output.stat().st_size if output.exists() else 0
        slot.process = WorkerProcess([sys.executable, *command], output, variables)
        slot.lives += 1

    def check(self) -> None:
        """Start again whoever ended by itself, and remember that it did."""
        for slot in self.slots:
            process = slot.process
            if slot.hurt or process is None or process.is_alive:
                continue
            if slot.group == CLIENT and (self.folder / "enough").exists() and self.is_done():
                continue
            said = process.output.read_bytes()[slot.said_from :].decode(errors="replace")
            is_away = self.broker_hurt or time.monotonic() < self.healed_at + START_SECONDS
            if is_away and "Serving app" not in said and any(words in said for words in GAVE_UP):
                self.gave_up += 1
            else:
                self.deaths.append(f"{slot.name}, process {process.pid}, ended by itself: {process.last_words(3)}")
                self.say(f"{slot.name} ended by itself")
            self.start(slot)
        if self.cluster is not None and not self.broker_hurt:
            for node in self.cluster.nodes:
                if not node.is_running:
                    self.deaths.append(f"broker {node.number} ended by itself: {node.last_words()}")
                    node.start()

    def is_done(self) -> bool:
        """Whether the client has seen the end of all its runs."""
        journal = self.folder / "driver.jsonl"
        return journal.exists() and journal.read_text(encoding="utf-8").endswith('{"what": "done"}\n')

    # -- faults --------------------------------------------------------------------------------------------------------

    async def hurt(self, faults: Iterator[Fault], until: float) -> None:
        """Let the faults happen until that time (of `time.monotonic`), and those under way end."""
        async with asyncio.TaskGroup() as group:
            under_way: set[asyncio.Task[None]] = set()
            while True:
                fault = next(faults)
                if not await self._wait(fault.after, until):
                    return
                while len(under_way := {task for task in under_way if not task.done()}) >= AT_ONCE_MAX:
                    if not await self._wait(PAUSE_SECONDS, until):
                        return
                done = self._begin(fault)
                if done is not None:
                    under_way.add(group.create_task(done))

    async def _wait(self, seconds: float, until: float) -> bool:
        """Wait, looking after the processes; False when the time is over."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < min(end, until):
            self.check()
            await asyncio.sleep(min(PAUSE_SECONDS, end - now))  # tidy: faults come at times of their own
        return time.monotonic() < until

    def _begin(self, fault: Fault) -> Any:
        """The fault as a coroutine; None when there is nobody to whom it could be done now."""
        kind = fault.kind
        if kind.group == BROKER:
            if self.cluster is None or self.broker_hurt:
                return None
            self.broker_hurt = True
            return self._to_brokers(fault)
        living = [slot for slot in self.slots if slot.group == kind.group and slot.process is not None]
        whole = [slot for slot in living if not slot.hurt]
        if kind.verb == "add" and len(living) < WORKERS_MAX:
            return self._added(fault)
        if not whole or kind.verb == "add" or (kind.verb == "remove" and len(living) <= WORKERS_MIN):
            return None
        slot = whole[int(fault.choice * len(whole))]
        slot.hurt = True
        return self._to_process(fault, slot)

    async def _added(self, fault: Fault) -> None:
        record = self._record(fault, "")
        record["target"] = self.add(WORKER).name
        self._over(record)

    async def _to_process(self, fault: Fault, slot: Slot) -> None:
        process = slot.process
        assert process is not None
        record = self._record(fault, slot.name)
        verb = fault.kind.verb
        if verb == "pause":
            os.kill(process.pid, signal.SIGSTOP)
        elif verb in ("kill", "wipe"):
            process.kill()
        else:
            await process.stop()
        if verb == "wipe":
            await asyncio.to_thread(shutil.rmtree, self.state_of(slot), ignore_errors=True)
        await asyncio.sleep(fault.lasts)  # tidy: a fault lasts as long as the plan says
        if verb == "pause":
            os.kill(process.pid, signal.SIGCONT)
        elif verb == "remove":
            slot.process = None
        else:
            self.start(slot)
        slot.hurt = False
        self._over(record)

    async def _to_brokers(self, fault: Fault) -> None:
        assert self.cluster is not None
        nodes = list(self.cluster.nodes)
        first = int(fault.choice * len(nodes))
        chosen = [nodes[first], nodes[(first + 1) % len(nodes)]][: 2 if fault.kind.verb == "kill two" else 1]
        record = self._record(fault, ", ".join(str(node.number) for node in chosen))
        for node in chosen:
            match fault.kind.verb:
                case "pause":
                    node.pause()
                case "restart":
                    await asyncio.to_thread(node.stop)
                case _:
                    node.kill()
        await asyncio.sleep(fault.lasts)  # tidy: a fault lasts as long as the plan says
        for node in chosen:
            if fault.kind.verb == "pause":
                node.resume()
            else:
                await self._start_node(node)
        for node in chosen:
            await self._until_it_listens(node)  # until its session is over, the cluster counts a dead node in
        await asyncio.to_thread(self.cluster.wait, seconds=NODE_SECONDS)
        await asyncio.to_thread(self._wait_in_sync)
        self.broker_hurt, self.healed_at = False, time.monotonic()
        self._over(record)

    async def _until_it_listens(self, node: Node) -> None:
        give_up_at = time.monotonic() + NODE_SECONDS
        while is_free(node.port):
            node.check()
            if time.monotonic() > give_up_at:
                raise Unavailable(f"broker {node.number} did not listen within {NODE_SECONDS:g} s: see {node.log_file}")
            await asyncio.sleep(PAUSE_SECONDS)  # tidy: another process makes it true

    def _wait_in_sync(self) -> None:
        """Wait until every replica has caught up: a broker that is hurt before that stops all writing, by design."""
        assert self.cluster is not None
        admin = AdminClient({"bootstrap.servers": self.cluster.bootstrap, "log_level": 0})
        give_up_at = time.monotonic() + IN_SYNC_SECONDS
        while time.monotonic() < give_up_at:
            with suppress(KafkaException):
                topics = admin.list_topics(timeout=5).topics.values()
                partitions = [each for topic in topics for each in topic.partitions.values()]
                if partitions and all(len(each.isrs) == len(each.replicas) for each in partitions):
                    return
            time.sleep(PAUSE_SECONDS)  # tidy: the brokers tell nobody

    async def _start_node(self, node: Node) -> None:
        give_up_at = time.monotonic() + NODE_SECONDS
        while True:
            try:
                node.start()
            except Unavailable:
                if time.monotonic() > give_up_at:
                    raise
                await asyncio.sleep(PAUSE_SECONDS)  # tidy: the port of a node that was killed is not free at once
            else:
                return

    def _record(self, fault: Fault, target: str) -> dict[str, Any]:
        kind = fault.kind
        self.say(f"{kind.name}: {target}" if target else kind.name)
        return {"kind": kind.name, "group": kind.group, "target": target, "began": now_ms(), "ended": 0}

    def _over(self, record: dict[str, Any]) -> None:
        record["ended"] = now_ms()
        self.faults.append(record)
        with (self.folder / FAULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    # -- the end -------------------------------------------------------------------------------------------------------

    async def until_done(self, seconds: float) -> bool:
        """Wait until the client has seen the end of all its runs; False when that takes longer."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.is_done():
                return True
            self.check()
            await asyncio.sleep(PAUSE_SECONDS)  # tidy: another process makes it true
        return False

    async def settle(self, seconds: float) -> None:
        """Let everybody go on for so long, undisturbed."""
        await self._wait(seconds, math.inf)

    async def stop(self) -> None:
        """Stop all processes but the brokers, in order; whoever does not end as it should is among the deaths."""
        running = [slot.process for slot in self.slots if slot.process is not None and slot.process.is_alive]
        codes = await asyncio.gather(*(process.stop(STOP_SECONDS) for process in running))
        for process, code in zip(running, codes, strict=True):
            if code != 0:
                what = f"{process.output.stem}, told to stop, ended with exit code {code}"
                self.deaths.append(f"{what}: {process.last_words(3)}")

    def kill(self) -> None:
        """Whatever happened, leave nobody behind."""
        for slot in self.slots:
            if slot.process is not None and slot.process.is_alive:
                slot.process.kill()


def now_ms() -> int:
    """The wall clock, as the records and the steps' lines have it."""
    return time.time_ns() // 1_000_000
